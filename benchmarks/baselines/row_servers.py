"""Parameter servers that one would build otherwise: on Redis, and on torch's own RPC over TensorPipe; and the workers of each.

    redis      MGET and MSET of rows, several batches in one pipeline, over a Unix socket, through hiredis. A worker would have
               to compute new rows itself, and lock them; it is charged neither for that nor for the names of keys
    torch_rpc  a process that holds rows in a tensor: a pull selects some, a push subtracts gradients from them (plain SGD),
               with several calls under way. TensorPipe uses shared memory between processes of one machine

Both keep rows in one process, without a second holder, without versions, and without an update to those who serve.

A worker is a process of its own, so that what it spends can be counted; what it pulls and pushes is made before that.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

import numpy as np

from benchmarks.baselines.load import F32, U64
from benchmarks.baselines.mget import names
from benchmarks.baselines.servers import REDIS_SOCKET, server
from benchmarks.baselines.spent import spent_ns
from sim_cluster.processes import free_ports

JOIN_S = 120.0
RATE = 0.01
FILL_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class RowLoad:
    """Keys 0, 1, 2, ... of `table_rows`; `batch` different ones at a time, `depth` batches under way, `batches` in a round."""

    table_rows: int
    dim: int
    batch: int
    batches: int
    depth: int

    def keys(self, seed: int) -> list[U64]:
        """uint64[batch] of each batch of a round."""
        rng = np.random.default_rng(seed)
        return [rng.choice(self.table_rows, self.batch, replace=False).astype(np.uint64) for _ in range(self.batches)]

    def gradients(self) -> F32:
        """float32[batch, dim]."""
        return np.random.default_rng(1).standard_normal((self.batch, self.dim), dtype=np.float32)


class RowClient(Protocol):
    """A worker's end of some parameter server."""

    def prepare(self, batches: Sequence[U64]) -> None:
        """Whatever this side is not charged for."""

    def pull(self, batches: Sequence[U64]) -> Sequence[F32]:
        """Rows of these keys, float32[batch, dim] each; the batches are under way at the same time."""

    def push(self, batches: Sequence[U64], gradients: F32) -> None:
        """Gradients for each of these batches; all are applied on return."""

    def close(self) -> None: ...


class Redis:
    """Rows in a Redis server."""

    def __init__(self, path: str) -> None:
        import hiredis  # noqa: F401 - without it redis-py parses in Python, and that would not be a fair opponent
        import redis

        self._redis = redis.Redis(unix_socket_path=path)
        self._names: dict[int, list[bytes]] = {}

    def fill(self, rows: int, dim: int) -> None:
        """Store zeros for keys 0, 1, 2, ..."""
        for begin in range(0, rows, FILL_ROWS):
            keys = np.arange(begin, min(begin + FILL_ROWS, rows), dtype=np.uint64)
            self._redis.mset(dict.fromkeys(names(keys), bytes(4 * dim)))

    def prepare(self, batches: Sequence[U64]) -> None:
        self._names = {id(batch): names(batch) for batch in batches}

    def pull(self, batches: Sequence[U64]) -> Sequence[F32]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for batch in batches:
                pipeline.mget(self._names[id(batch)])
            return [np.frombuffer(b"".join(rows), np.float32).reshape(len(rows), -1) for rows in pipeline.execute()]

    def push(self, batches: Sequence[U64], gradients: F32) -> None:
        row_bytes = gradients.shape[1] * 4
        with self._redis.pipeline(transaction=False) as pipeline:
            for batch in batches:
                raw = gradients.tobytes()
                values = [raw[at : at + row_bytes] for at in range(0, len(raw), row_bytes)]
                pipeline.mset(dict(zip(self._names[id(batch)], values, strict=True)))
            pipeline.execute()

    def close(self) -> None:
        self._redis.close()


class _Table:
    """The rows that a torch RPC server holds, in its process."""

    weight: Any = None


def _torch_fill(rows: int, dim: int) -> int:
    import torch

    _Table.weight = torch.zeros(rows, dim)
    return os.getpid()


def _torch_pull(ids: Any) -> Any:
    return _Table.weight.index_select(0, ids)


def _torch_push(ids: Any, gradients: Any) -> None:
    _Table.weight.index_add_(0, ids, gradients, alpha=-RATE)


def _torch_join(name: str, rank: int, port: int) -> Any:
    import torch
    from torch.distributed import rpc

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    rpc.init_rpc(name, rank=rank, world_size=2)
    return rpc


def torch_server(port: int) -> None:
    """The server's process."""
    _torch_join("server", 0, port).shutdown()


class TorchRPC:
    """Rows in a process that torch RPC calls."""

    def __init__(self, port: int, rows: int, dim: int) -> None:
        self._rpc = _torch_join("worker", 1, port)
        self.server_pid = int(self._rpc.rpc_sync("server", _torch_fill, (rows, dim)))

    def prepare(self, batches: Sequence[U64]) -> None:
        """Nothing: a tensor of the keys costs nothing."""

    def pull(self, batches: Sequence[U64]) -> Sequence[F32]:
        import torch

        calls = [self._rpc.rpc_async("server", _torch_pull, (torch.from_numpy(batch.view(np.int64)),)) for batch in batches]
        return [call.wait().numpy() for call in calls]

    def push(self, batches: Sequence[U64], gradients: F32) -> None:
        import torch

        values = torch.from_numpy(gradients)
        calls = [
            self._rpc.rpc_async("server", _torch_push, (torch.from_numpy(batch.view(np.int64)), values)) for batch in batches
        ]
        for call in calls:
            call.wait()

    def close(self) -> None:
        self._rpc.shutdown()


class Ekko:
    """Rows on ekko's parameter servers; with `run_dir` they are pulled in the memory of the node there."""

    def __init__(self, endpoint: str, model: str, worker: int, depth: int, run_dir: str | None = None) -> None:
        from ekko.train import Client

        self._client = Client([endpoint], model, worker, outstanding=depth, run_dir=run_dir)
        self._table = next(iter(self._client.tables))

    def prepare(self, batches: Sequence[U64]) -> None:
        """Nothing."""

    def pull(self, batches: Sequence[U64]) -> Sequence[F32]:
        pulls = [self._client.pull_async({self._table: batch}) for batch in batches]
        return [pull.result()[self._table] for pull in pulls]

    def push(self, batches: Sequence[U64], gradients: F32) -> None:
        for batch in batches:
            self._client.push({self._table: (batch, gradients)})
        self._client.flush()

    def close(self) -> None:
        self._client.close()


class Stepper(Ekko):
    """Whole steps on ekko's servers, one after the other: pull, compute, push, and wait for the answer."""

    def __init__(self, endpoint: str, model: str, worker: int, compute_s: float) -> None:
        super().__init__(endpoint, model, worker, depth=1)
        self._compute_s = compute_s

    def push(self, batches: Sequence[U64], gradients: F32) -> None:
        for batch in batches:
            self.pull([batch])
            time.sleep(self._compute_s)
            super().push([batch], gradients)


def worker_process(pipe: Connection, load: RowLoad, make: Callable[..., RowClient], arguments: tuple[Any, ...]) -> None:
    """A worker: does what the pipe says, until it says None."""
    client = make(*arguments)
    gradients = load.gradients()
    batches: list[U64] = []
    pipe.send((os.getpid(), getattr(client, "server_pid", None)))
    while (order := pipe.recv()) is not None:
        kind, seed = order
        if kind == "prepare":
            batches = load.keys(seed)
            client.prepare(batches)
        for begin in range(0, len(batches), load.depth):
            some = batches[begin : begin + load.depth]
            if kind == "pull":
                rows = client.pull(some)
                assert rows[0].shape == (load.batch, load.dim)
            elif kind == "push":
                client.push(some, gradients)
        pipe.send(None)
    client.close()


class Worker:
    """A worker's process, and those of its servers; `pids`: of all of them."""

    def __init__(
        self, load: RowLoad, make: Callable[..., RowClient], arguments: tuple[Any, ...], pids: Sequence[int] = ()
    ) -> None:
        self._load = load
        self._pipe, theirs = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=worker_process, args=(theirs, load, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        own, servers = self._pipe.recv()
        self.pids = [own, *([] if servers is None else [servers]), *pids]

    def rows_per_cpu_s(self, kind: str, seed: int) -> float:
        """One round of pulls or pushes: rows for each second that all processes spend together."""
        self.ask("prepare", seed)
        before = sum(map(spent_ns, self.pids))
        self.ask(kind, seed)
        spent_s = (sum(map(spent_ns, self.pids)) - before) / 1e9
        return self._load.batch * self._load.batches / spent_s

    def ask(self, kind: str, seed: int) -> None:
        """Have something done."""
        self.order(kind, seed)
        self.done()

    def order(self, kind: str, seed: int) -> None:
        """Have something begun: "prepare", "pull" or "push"."""
        self._pipe.send((kind, seed))

    def done(self) -> None:
        """Wait for its end."""
        self._pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join(JOIN_S)
        self._process.kill()
        self._process.join()


@contextmanager
def redis_worker(load: RowLoad) -> Iterator[Worker]:
    """A Redis server with all rows, and a worker."""
    with TemporaryDirectory(prefix="ekko-bench-") as directory, ExitStack() as stack:
        stack.enter_context(server("redis", Path(directory)))
        path = str(Path(directory) / REDIS_SOCKET)
        filler = Redis(path)
        filler.fill(load.table_rows, load.dim)
        import redis

        with redis.Redis(unix_socket_path=path) as asked:
            pid = int(asked.info("server")["process_id"])
        filler.close()
        yield stack.enter_context(Worker(load, Redis, (path,), [pid]))


@contextmanager
def torch_worker(load: RowLoad) -> Iterator[Worker]:
    """A torch RPC server with all rows, and a worker."""
    (port,) = free_ports(1)
    process = get_context("spawn").Process(target=torch_server, args=(port,), daemon=True)
    process.start()
    try:
        with Worker(load, TorchRPC, (port, load.table_rows, load.dim)) as worker:
            yield worker
        process.join(JOIN_S)
    finally:
        process.kill()
        process.join()


def absent_rpc() -> str | None:
    """Why torch RPC cannot run here; None when it can."""
    try:
        from torch.distributed import rpc
    except ImportError:
        return "torch is not installed: pip install torch"
    return None if rpc.is_available() else "this torch is built without torch.distributed.rpc"
