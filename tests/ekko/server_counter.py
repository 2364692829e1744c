"""A worker whose pushes can be counted: each step adds one to a few counters on the servers.

`python server_counter.py JOB.json`: trains batches from `clock + 1` on, as far as it is granted, each of which follows from
(worker, number) alone, and says how far servers have answered; it ends where no more will be granted. The rows begin with zeros
and plain SGD of rate 1 takes the gradient off: a row is minus the number of batches that had its key, exactly, if each batch
counted once.

Worker 0 also is the trainer: it publishes a dense parameter, the number of its last answered batch, with `ekko.torch.track`.
"""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ekko.train import Client

TABLES = {"item": 4, "user": 2}
KEYS = 300
BATCH_KEYS = 20
DENSE = "answered"


@dataclass(frozen=True)
class CounterJob:
    """What one worker does."""

    folder: str
    endpoints: list[str] = field(default_factory=list)
    worker: int = 0
    pace_s: float = 0.01
    outstanding: int = 4
    local: str = ""  # where a trainer publishes dense parameters; empty: it is none

    def save(self) -> Path:
        path = Path(self.folder) / f"{self.worker}-job.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    def path(self, name: str) -> Path:
        return Path(self.folder) / f"{self.worker}-{name}"

    def say(self, name: str, number: int) -> None:
        """For whoever reads it meanwhile: the former number or this one, never half of it."""
        part = self.path(f"{name}.part")
        part.write_text(str(number))
        part.rename(self.path(name))

    def said(self, name: str) -> int:
        """The number that was said last; 0: none was."""
        path = self.path(name)
        return int(path.read_text()) if path.exists() else 0


def batch(worker: int, number: int) -> dict[str, np.ndarray]:
    """Table -> keys of a batch; some come twice."""
    rng = np.random.default_rng((worker, number))
    return {table: rng.integers(0, KEYS, BATCH_KEYS).astype(np.uint64) for table in TABLES}


def counted(steps_of: dict[int, int]) -> dict[str, np.ndarray]:
    """float32[KEYS, dim] of each table after the first so many batches of each worker."""
    rows = {table: np.zeros((KEYS, dim), np.float32) for table, dim in TABLES.items()}
    for worker, steps in steps_of.items():
        for number in range(1, steps + 1):
            for table, keys in batch(worker, number).items():
                np.subtract.at(rows[table], keys.astype(np.int64), np.float32(1))
    return rows


def main() -> None:
    job = CounterJob(**json.loads(Path(sys.argv[1]).read_text()))
    with ExitStack() as stack:
        client = stack.enter_context(Client(job.endpoints, "ctr", job.worker, outstanding=job.outstanding, timeout=120.0))
        publish = _publisher(job, stack)
        job.path("first").open("a").write(f"{client.clock}\n")
        least = {table: np.zeros((KEYS, dim), np.float32) for table, dim in TABLES.items()}
        number = answered = client.clock
        assert number >= job.said("acked"), f"servers have {number} batches, and had answered {job.said('acked')}"
        while True:
            last = job.path("last").exists()  # looked at before what is granted, which then is final
            granted = job.said("granted")
            if answered < number and (number % job.outstanding == 0 or number >= granted):
                client.flush()
                answered = number
                job.say("acked", answered)  # whoever reads this may insist on it
                publish(answered)
            if number < granted:
                number += 1
                keys = batch(job.worker, number)
                for table, rows in client.pull_async(keys).result().items():
                    places = keys[table].astype(np.int64)
                    assert (rows <= least[table][places]).all(), f"batch {number}: rows of {table} went back"
                    least[table][places] = rows
                client.push({table: (some, np.ones((len(some), TABLES[table]), np.float32)) for table, some in keys.items()})
            elif last:
                break
            time.sleep(job.pace_s)
        job.say("retries", client.retries)
        job.path("done").touch()


def _publisher(job: CounterJob, stack: ExitStack):  # type: ignore[no-untyped-def]
    if not job.local:
        return lambda _: None
    import torch

    import ekko
    import ekko.torch

    model = torch.nn.Module()
    model.register_parameter(DENSE, torch.nn.Parameter(torch.zeros(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    publisher = stack.enter_context(ekko.Publisher(job.local, "ctr"))
    tracker = stack.enter_context(ekko.torch.track(model, optimizer, publisher, tables={}, dense_every=1))

    def publish(number: int) -> None:
        with torch.no_grad():
            model.get_parameter(DENSE).fill_(number)
        optimizer.step()
        tracker.publish_dense()

    return publish


if __name__ == "__main__":
    main()
