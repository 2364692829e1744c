"""Training nodes with parameter servers, serving nodes, and workers, as real processes."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

import ekko
from sim_cluster.processes import LocalCluster, NodeProcess, NodeSpec, free_ports, wait_until
from tests.ekko.server_trainer import INITIALIZER, Job, events

TRAINER = Path(__file__).with_name("server_trainer.py")
DEADLINE_S = 180.0  # processes that import torch, on a busy machine


def table_settings(dim: int, optimizer: Mapping[str, Any], initializer: Mapping[str, Any] = INITIALIZER) -> dict[str, Any]:
    return {"dim": dim, "optimizer": dict(optimizer), "initializer": dict(initializer)}


class ServerNode(NodeProcess):
    """A node that, where it trains, has a parameter server beside it; a witness holds what the servers train."""

    def __init__(self, spec: NodeSpec, folder: Path, ports: Sequence[int]) -> None:
        super().__init__(spec, folder, ports)
        self.server: dict[str, Any] = {}  # [server]
        self.witnessed: dict[str, Any] = {}  # [models."ctr.training"]

    def write_config(self, *arguments: Any) -> None:
        super().write_config(*arguments)
        if self.server:
            with self.config_path.open("a") as config:
                config.write("\n".join(_toml("server", self.server)) + "\n")
        if self.witnessed:
            with self.config_path.open("a") as config:
                config.write("\n".join(_toml('models."ctr.training"', self.witnessed)) + "\n")


def _toml(name: str, section: Mapping[str, Any]) -> list[str]:
    """A section and those in it; a table's optimizer and initializer are sections, too."""
    lines = [f"[{name}]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in section.items() if not isinstance(value, dict)]
    for key, value in section.items():
        if isinstance(value, dict):
            lines += _toml(f"{name}.{json.dumps(key)}", value)
    return lines


class TrainingCluster(LocalCluster):
    """Nodes of which the training ones have parameter servers of the model "ctr".

    Args:
        folder: see `LocalCluster`.
        nodes: the same.
        model: `[server.models.ctr]`.
        server: more of `[server]`.
        witnessed: whether witnesses hold what servers train.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[NodeSpec],
        model: Mapping[str, Any],
        server: Mapping[str, Any] | None = None,
        *,
        witnessed: bool = True,
    ) -> None:
        self.model = model
        training = [spec.id for spec in nodes if spec.role == "train"]
        ports = free_ports(len(training))
        self.endpoints = {node: f"tcp://127.0.0.1:{port}" for node, port in zip(training, ports, strict=True)}
        more = server or {}

        def make(spec: NodeSpec, home: Path, ports: Sequence[int]) -> ServerNode:
            node = ServerNode(spec, home, ports)
            node.witnessed = {"partitions": model["partitions"]} if spec.role == "witness" and witnessed else {}
            if spec.id in self.endpoints:
                peers = {other: endpoint for other, endpoint in self.endpoints.items() if other != spec.id}
                node.server = {"listen": self.endpoints[spec.id], **more, "peers": peers, "models": {"ctr": dict(model)}}
            return node

        super().__init__(folder, nodes, make_node=make)


class WorkerProcess:
    """One worker."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        Path(self.job.folder).mkdir(parents=True, exist_ok=True)
        with self.job.path("stderr").open("wb") as stderr:
            self._process = subprocess.Popen([sys.executable, str(TRAINER), str(self.job.save())], stderr=stderr)
        return self

    @property
    def acked(self) -> int:
        """Steps that servers answered."""
        path = self.job.path("acked")
        return int(path.read_text()) if path.exists() else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def complaint(self) -> str:
        return self.job.path("stderr").read_text()[-2_000:]

    def check(self) -> None:
        assert self.running or self._process is None or self._process.returncode == 0, self.complaint()

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        assert self._process is not None
        self._process.wait(timeout_s)
        assert self._process.returncode == 0, self.complaint()

    def wait_acked(self, steps: int, timeout_s: float = DEADLINE_S) -> None:
        def there() -> bool:
            self.check()
            return self.acked >= steps

        wait_until(there, f"{steps} steps of worker {self.job.worker} are answered", timeout_s)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def rows_at(node: NodeProcess, model: str = "ctr") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All rows of all tables that a node holds, and their stamps."""
    with ekko.Reader(model, run_dir=node.run_dir, wait=60.0) as reader:
        return {
            name: reader.lookup(name, np.arange(rows, dtype=np.uint64), stamps=True) for name, rows in events().rows.items()
        }


def replicas_equal(cluster: TrainingCluster, timeout_s: float = DEADLINE_S) -> None:
    """Wait until every running node serves, bit for bit, what the servers' nodes have trained."""

    def equal() -> bool:
        running = [node for node in cluster.nodes.values() if node.running]
        trained = [rows_at(node, "ctr.training") for node in running if node.spec.role == "train"]
        served = [rows_at(node) for node in running]
        first = {table: (rows, stamps > 0) for table, (rows, stamps) in trained[0].items()}
        return all(
            np.array_equal(stamps > 0, first[table][1]) and rows.tobytes() == first[table][0].tobytes()
            for node in (*trained, *served)
            for table, (rows, stamps) in node.items()
        )

    wait_until(equal, "all replicas hold what the servers hold", timeout_s)
