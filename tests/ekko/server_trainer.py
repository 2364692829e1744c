"""`python server_trainer.py JOB.json`: a worker that trains the demo's DLRM through parameter servers.

Each batch is divided among the workers; their dense parameters are averaged by DDP, the rows by the servers. What the same
training by torch alone comes to is in `torch_alone.py`.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ekko.torch
from ekko.train import Client
from ekko.zoo import DLRM
from sim_cluster.demo.data import Events, generate, load
from sim_cluster.demo.learning import DIM, Inputs, shape_of

EVENTS = 4_000
SEED = 5
NUMBER = torch.zeros(1, dtype=torch.int64)  # the counter's only key
INITIALIZER = {"name": "normal", "std": DIM**-0.5 / 4, "seed": SEED}
DENSE_RATE = 0.02
# A table of one number, which each push makes larger by one: a pull tells how many pushes are in the rows that came with it.
COUNTER = "pushes"
COUNTED = {"dim": 1, "optimizer": {"name": "sgd", "lr": 1.0}, "initializer": {"name": "zeros"}}


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
    stream: str = "generated"  # or "movielens": the demo's data
    seed: int = SEED  # of the first dense parameters
    outstanding: int = 4  # pushes under way

    def save(self) -> Path:
        path = Path(self.folder) / f"job-{self.worker}.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    def path(self, name: str) -> Path:
        return Path(self.folder) / f"{self.worker}-{name}"


@functools.cache
def events(stream: str = "generated") -> Events:
    return load() if stream == "movielens" else generate(SEED, "for a test", EVENTS)


def batches(job: Job, worker: int, first: int = 0) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """This worker's part of each batch, from batch `first` on."""
    inputs = Inputs(events(job.stream))
    share = job.batch // job.workers
    for step in range(first, job.steps):
        begin = step * job.batch % job.span + worker * share
        some = slice(begin, begin + share)
        yield inputs.dense[some], {name: ids[some] for name, ids in inputs.ids.items()}, inputs.labels[some]


def dense_model(job: Job) -> DLRM:
    torch.manual_seed(job.seed)
    return DLRM(shape_of(events(job.stream)), with_tables=False)


def dense_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=DENSE_RATE)


Bags = Mapping[str, ekko.torch.PSEmbeddingBag]


class Served(nn.Module):
    """A DLRM whose rows are on the servers."""

    def __init__(self, client: Client, dlrm: DLRM) -> None:
        super().__init__()
        self.bags = {name: ekko.torch.PSEmbeddingBag(client, name, mode=None) for name in client.tables}
        self.dlrm = dlrm

    def forward(self, dense: Tensor, ids: Mapping[str, Tensor]) -> Tensor:
        rows = torch.stack([self.bags[name](ids[name]) for name in ids], dim=1)
        logits: Tensor = self.dlrm(dense, embeddings=rows)
        return logits


def main() -> None:
    torch.set_num_threads(1)
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if job.rendezvous:
        torch.distributed.init_process_group("gloo", job.rendezvous, rank=job.worker, world_size=job.workers)
    with Client(job.endpoints, "ctr", job.worker, average=True, timeout=job.timeout, outstanding=job.outstanding) as client:
        served = Served(client, dense_model(job))
        model = DistributedDataParallel(served) if job.rendezvous else served
        optimizer = dense_optimizer(served.dlrm)
        if job.resume and job.path("dense.pt").exists():
            served.dlrm.load_state_dict(torch.load(job.path("dense.pt"), weights_only=True))
        first = client.clock
        job.path("first").write_text(str(first))
        source = batches(job, job.worker, first)
        if job.prefetch:
            source = ekko.torch.prefetched(source, lambda batch: _wanted(served.bags, batch[1]))
        losses, logits, counts = [], [], []
        for step, (dense, ids, labels) in enumerate(source, first + 1):
            optimizer.zero_grad()
            count = served.bags[COUNTER](NUMBER) if COUNTER in served.bags else torch.zeros(1)
            answers = model(dense, ids)
            loss = functional.binary_cross_entropy_with_logits(answers, labels)
            (loss - count.sum()).backward()
            optimizer.step()
            client.step()
            logits.append(answers.detach().numpy())
            counts.append(float(count.sum()))
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
        np.savez(job.path("seen.npz"), logits=np.array(logits), counts=np.array(counts))
        _say(job, job.steps)
        job.path("retries").write_text(str(client.retries))
    if job.rendezvous:
        torch.distributed.destroy_process_group()


def _wanted(bags: Bags, ids: Mapping[str, Tensor]) -> dict[ekko.torch.PSEmbeddingBag, Tensor]:
    wanted = {bags[name]: some for name, some in ids.items()}
    return {**wanted, bags[COUNTER]: NUMBER} if COUNTER in bags else wanted


def _say(job: Job, step: int) -> None:
    job.path("acked.part").write_text(str(step))
    job.path("acked.part").rename(job.path("acked"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
