"""Training nodes with servers, as real processes, and a client that speaks their wire and does nothing by itself."""

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from ekko.security import generate, read_secret
from ekko.train.server import wire as w
from ekko.train.server.coding import decode_answer, encode_request
from ekko.train.server.schema import partitions_of
from p2p.transport.curve import KeyPair, demand
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, free_ports

MODEL = "ctr"
ANSWER_S = 120.0  # a server that starts again meanwhile, on a busy machine, included
SGD = {"name": "sgd", "lr": 0.5}


@dataclass(frozen=True)
class ServerSpec:
    """`[server.models.ctr]` of all servers; one table, `item`."""

    dim: int = 4
    partitions: int = 4
    mode: str = "async"
    workers: int = 0
    optimizer: Mapping[str, Any] = field(default_factory=lambda: SGD)
    initializer: Mapping[str, Any] = field(default_factory=lambda: {"name": "zeros"})
    admission: int = 1
    ack: str = "spares"
    more: str = ""  # further lines of the model's section
    anywhere: bool = False  # servers listen on all addresses, as where workers are on other machines

    def toml(self, listen: str, peers: Mapping[str, str]) -> str:
        def inline(values: Mapping[str, Any]) -> str:
            return "{ " + ", ".join(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in values.items()) + " }"

        workers = f"workers = {self.workers}\n" if self.workers else ""
        at = listen.replace("127.0.0.1", "0.0.0.0") if self.anywhere else listen
        return (
            f"[server]\nlisten = {json.dumps(at)}\nadvertise = {json.dumps(listen)}\n"
            f"peers = {inline(peers)}\nack = {json.dumps(self.ack)}\n"
            f"[server.models.{MODEL}]\nmode = {json.dumps(self.mode)}\npartitions = {self.partitions}\n{workers}{self.more}\n"
            f"[server.models.{MODEL}.tables.item]\ndim = {self.dim}\nadmission = {self.admission}\n"
            f"optimizer = {inline(self.optimizer)}\ninitializer = {inline(self.initializer)}\n"
        )


class ServerCluster(LocalCluster):
    """Nodes, of which those that train have servers."""

    def __init__(self, folder: Path, nodes: Sequence[NodeSpec], spec: ServerSpec, *, encrypted: bool = False) -> None:
        trainers = [node.id for node in nodes if node.role == "train"]
        self.spec = spec
        self.endpoints = {
            name: f"tcp://127.0.0.1:{port}" for name, port in zip(trainers, free_ports(len(trainers)), strict=True)
        }
        super().__init__(folder, nodes, models={MODEL: ModelTables({"item": spec.dim})})
        for name in trainers:
            with self[name].config_path.open("a") as file:
                file.write(spec.toml(self.endpoints[name], self.endpoints))
        self.keys: dict[str, KeyPair] = {}
        if encrypted:
            self._encrypt(folder)

    def _encrypt(self, folder: Path) -> None:
        """Give all nodes keys, and a worker, too."""
        allow = folder / "allowed_keys"
        allow.mkdir()
        for name in (*self.nodes, "worker"):
            public = generate(folder / f"{name}.key")
            shutil.move(public, allow / public.name)
            self.keys[name] = read_secret(folder / f"{name}.key")
        for name, node in self.nodes.items():
            with node.config_path.open("a") as file:
                file.write(
                    f"[security]\nkey_file = {json.dumps(str(folder / f'{name}.key'))}\nallow = {json.dumps(str(allow))}\n"
                )

    def state(self, node: str) -> dict[str, Any]:
        """What `/status` says of a node's server; empty: nothing yet."""
        server = self[node].status()["server"]
        return server["models"].get(MODEL, {}) if server["running"] else {}

    def acting(self) -> dict[int, list[str]]:
        """Partition -> the servers that act for it."""
        found: dict[int, list[str]] = {partition: [] for partition in range(self.spec.partitions)}
        for name in self.endpoints:
            if self[name].running:
                for partition in self.state(name).get("acting", []):
                    found[partition].append(name)
        return found

    @property
    def all_served(self) -> bool:
        """Whether every partition has its one server."""
        return all(len(servers) == 1 for servers in self.acting().values())


class Worker:
    """One life of one worker: pushes and pulls, sent where the servers say, again until they are answered."""

    def __init__(self, cluster: ServerCluster, number: int = 0, key: str = "worker") -> None:
        self._key = cluster.keys.get(key)
        self._cluster = cluster
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._numbers = itertools.count(1)
        self.worker = number
        self.life = time.time_ns() // 1_000
        self.pushed = 0
        self.shards = 64
        self.patience_s = ANSWER_S

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def ask(self, node: str, request: w.Request, timeout_s: float = 2.0) -> w.Answer | None:
        """One question to one server; None: no answer in time."""
        endpoint = self._cluster.endpoints[node]
        if endpoint not in self._sockets:
            self._sockets[endpoint] = self._context.socket(zmq.DEALER)
            if self._key is not None:
                demand(self._sockets[endpoint], self._key, self._cluster.keys[node].public)
            self._sockets[endpoint].connect(endpoint)
        socket, number = self._sockets[endpoint], next(self._numbers)
        socket.send_multipart(encode_request(number, request))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if socket.poll(1_000 * left):
                theirs, answer = decode_answer(socket.recv_multipart())
                if theirs == number:
                    return answer
        return None

    def servers(self) -> list[str]:
        """The node of each partition's server, as somebody who answers believes."""
        for node in self._cluster.endpoints:
            if self._cluster[node].running:
                answer = self.ask(node, w.WhoServes(MODEL), 0.5)
                if isinstance(answer, w.Serving):
                    return [answer.servers[place][0] for place in answer.primaries]
        return []

    def until(self, keys_of: Mapping[int, np.ndarray], make: Any) -> list[w.Answer]:
        """Send what `make(partitions)` makes to whoever serves these partitions, until all of it is answered."""
        left, answers = set(keys_of), []
        deadline = time.monotonic() + self.patience_s
        while left:
            assert time.monotonic() < deadline, f"no answer for partitions {sorted(left)}: {answers[-3:]}"
            servers = self.servers()
            for node in sorted({servers[partition] for partition in left} if servers else ()):
                mine = tuple(sorted(partition for partition in left if servers[partition] == node))
                answer = self.ask(node, make(mine))
                if isinstance(answer, w.Failed) and answer.kind == w.HELLO:
                    self.ask(node, w.Hello(MODEL, self.worker, self.life))
                elif isinstance(answer, w.Failed) and answer.kind not in (w.BUSY, w.GAP):
                    raise AssertionError(answer)
                elif isinstance(answer, (w.Pushed, w.Pulled)):
                    answers.append((mine, answer))
                    left -= set(mine)
            if left:
                time.sleep(0.02)
        return answers

    def push(self, keys: np.ndarray, gradients: np.ndarray) -> None:
        """One step, acknowledged in all partitions."""
        self.pushed += 1
        belongs = partitions_of(keys, self.shards, self._cluster.spec.partitions)

        def make(partitions: tuple[int, ...]) -> w.Push:
            mine = np.isin(belongs, partitions)
            table = {"item": (np.ascontiguousarray(keys[mine]), np.ascontiguousarray(gradients[mine]))}
            return w.Push(MODEL, self.worker, self.life, self.pushed, partitions, table)

        self.until(dict.fromkeys(range(self._cluster.spec.partitions)), make)

    def pull(self, keys: np.ndarray) -> np.ndarray:
        """float32[n, dim]: as the servers have them."""
        belongs = partitions_of(keys, self.shards, self._cluster.spec.partitions)
        rows = np.zeros((len(keys), self._cluster.spec.dim), np.float32)

        def make(partitions: tuple[int, ...]) -> w.Pull:
            mine = np.isin(belongs, partitions)
            return w.Pull(MODEL, w.OBSERVER, 0, 0, partitions, {"item": np.ascontiguousarray(keys[mine])})

        wanted = dict.fromkeys(np.unique(belongs).tolist())
        for partitions, answer in self.until(wanted, make):
            rows[np.isin(belongs, partitions)] = answer.tables["item"]
        return rows
