"""A worker that trains the demo's DLRM through parameter servers, and the same training by torch alone.

`python server_trainer.py JOB.json`: a worker; `alone(job)`: torch in one process, on the same batches in the same order. Each
batch is divided among the workers; their dense parameters are averaged by DDP, the rows by the servers.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ekko.torch
from ekko.train import Client
from ekko.train.optimizers import initializer_of, optimizer_of
from ekko.zoo import DLRM
from sim_cluster.demo.data import Events, generate
from sim_cluster.demo.learning import DIM, Inputs, shape_of

EVENTS = 4_000
SEED = 5
INITIALIZER = {"name": "normal", "std": DIM**-0.5 / 4, "seed": SEED}
DENSE_RATE = 0.02


@dataclass(frozen=True)
class Job:
    """What to train, where, and where to say how far it is."""

    folder: str
    endpoints: list[str] = field(default_factory=list)
    worker: int = 0
    workers: int = 1
    steps: int = 30
    batch: int = 32  # of all workers together
    span: int = EVENTS - 64  # events that come again and again
    prefetch: bool = False
    pace_s: float = 0.0  # of one step
    rendezvous: str = ""  # for DDP; empty: this worker's dense parameters are its own
    resume: bool = False
    timeout: float = 60.0

    def save(self) -> Path:
        path = Path(self.folder) / f"job-{self.worker}.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    def path(self, name: str) -> Path:
        return Path(self.folder) / f"{self.worker}-{name}"


def events() -> Events:
    return generate(SEED, "for a test", EVENTS)


def batches(job: Job, worker: int, first: int = 0) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """This worker's part of each batch, from batch `first` on."""
    inputs = Inputs(events())
    share = job.batch // job.workers
    for step in range(first, job.steps):
        begin = step * job.batch % job.span + worker * share
        some = slice(begin, begin + share)
        yield inputs.dense[some], {name: ids[some] for name, ids in inputs.ids.items()}, inputs.labels[some]


def dense_model() -> DLRM:
    torch.manual_seed(SEED)
    return DLRM(shape_of(events()), with_tables=False)


def dense_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=DENSE_RATE)


class Served(nn.Module):
    """A DLRM whose rows are on the servers."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.bags = {name: ekko.torch.PSEmbeddingBag(client, name, mode=None) for name in client.tables}
        self.dlrm = dense_model()

    def forward(self, dense: Tensor, ids: Mapping[str, Tensor]) -> Tensor:
        rows = torch.stack([self.bags[name](ids[name]) for name in ids], dim=1)
        logits: Tensor = self.dlrm(dense, embeddings=rows)
        return logits


def main() -> None:
    torch.set_num_threads(1)
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if job.rendezvous:
        torch.distributed.init_process_group("gloo", job.rendezvous, rank=job.worker, world_size=job.workers)
    with Client(job.endpoints, "ctr", job.worker, average=True, timeout=job.timeout) as client:
        served = Served(client)
        model = DistributedDataParallel(served) if job.rendezvous else served
        optimizer = dense_optimizer(served.dlrm)
        if job.resume and job.path("dense.pt").exists():
            served.dlrm.load_state_dict(torch.load(job.path("dense.pt"), weights_only=True))
        first = client.clock
        job.path("first").write_text(str(first))
        source = batches(job, job.worker, first)
        if job.prefetch:
            source = ekko.torch.prefetched(source, lambda batch: {served.bags[name]: ids for name, ids in batch[1].items()})
        losses = []
        for step, (dense, ids, labels) in enumerate(source, first + 1):
            optimizer.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(model(dense, ids), labels)
            loss.backward()
            optimizer.step()
            client.step()
            losses.append(float(loss.detach()))
            if job.pace_s:
                client.flush()
                torch.save(served.dlrm.state_dict(), job.path("dense.part"))
                job.path("dense.part").rename(job.path("dense.pt"))
                _say(job, step)  # answered: it must never be lost from now on
                time.sleep(job.pace_s)
        client.flush()
        torch.save(served.dlrm.state_dict(), job.path("dense.pt"))
        np.save(job.path("losses.npy"), np.array(losses))
        _say(job, job.steps)
        job.path("retries").write_text(str(client.retries))
    if job.rendezvous:
        torch.distributed.destroy_process_group()


def _say(job: Job, step: int) -> None:
    job.path("acked.part").write_text(str(step))
    job.path("acked.part").rename(job.path("acked"))


class Kernel:
    """The servers' own optimizer, on the tables of one process: what is left to compare is all but its arithmetic."""

    def __init__(self, weights: list[nn.Parameter], settings: Mapping[str, Any]) -> None:
        self._optimizer = optimizer_of(dict(settings))
        self._weights = weights
        self._states = [self._optimizer.initial_state(weight.detach().numpy()) for weight in weights]

    def zero_grad(self) -> None:
        for weight in self._weights:
            weight.grad = None

    def step(self) -> None:
        for weight, state in zip(self._weights, self._states, strict=True):
            assert weight.grad is not None
            self._optimizer.apply(weight.detach().numpy(), state, weight.grad.numpy())


@dataclass
class Trained:
    """What torch alone comes to."""

    tables: dict[str, np.ndarray]
    dense: dict[str, Tensor]
    losses: list[float]


def alone(job: Job, *, by_worker: bool, optimizer: Mapping[str, Any]) -> Trained:
    """The same training by torch in one process, with `nn.Embedding` as it comes: dense gradients, which add up in the order of
    the batch. (Sparse ones are sorted first, and their sums differ in the last bit.)

    Args:
        job: what to train.
        by_worker: gradients of each worker's part of a batch are taken one after the other, and added up; else those of the
            whole batch at once.
        optimizer: of the rows, as servers have it in their settings.
    """
    torch.set_num_threads(1)
    model = dense_model()
    initializer = initializer_of(INITIALIZER)
    tables = {
        name: nn.Embedding.from_pretrained(
            torch.from_numpy(initializer.rows(name, np.arange(rows, dtype=np.uint64), DIM)), freeze=False
        )
        for name, rows in events().rows.items()
    }
    weights = [table.weight for table in tables.values()]
    of_rows: torch.optim.Optimizer | Kernel = (
        torch.optim.SGD(weights, lr=optimizer["lr"]) if optimizer["name"] == "sgd" else Kernel(weights, optimizer)
    )
    optimizers = [dense_optimizer(model), of_rows]
    losses = []
    for parts in zip(*(batches(job, worker) for worker in range(job.workers)), strict=True):
        for one in optimizers:
            one.zero_grad()
        if not by_worker:
            parts = [tuple(_joined(some) for some in zip(*parts, strict=True))]  # type: ignore[assignment]
        sums: dict[str, Tensor] = {}
        for dense, ids, labels in parts:
            rows = torch.stack([tables[name](ids[name]) for name in ids], dim=1)
            loss = functional.binary_cross_entropy_with_logits(model(dense, embeddings=rows), labels)
            (loss / len(parts)).backward()
            losses.append(float(loss.detach()))
            for name, table in tables.items():
                own, table.weight.grad = table.weight.grad, None
                assert own is not None
                sums[name] = own if name not in sums else sums[name] + own
        for name, table in tables.items():
            table.weight.grad = sums[name]
        for one in optimizers:
            one.step()
    return Trained({name: table.weight.detach().numpy() for name, table in tables.items()}, dict(model.state_dict()), losses)


def _joined(some: tuple[Tensor | dict[str, Tensor], ...]) -> Tensor | dict[str, Tensor]:
    """The parts of all workers as one batch."""
    if isinstance(some[0], Tensor):
        return torch.cat(some)  # type: ignore[arg-type]
    return {name: torch.cat([part[name] for part in some]) for name in some[0]}  # type: ignore[index, misc]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
