"""One rank of `test_ranks_processes.py`, started by torchrun: DistributedDataParallel over gloo, with checkpoints.

    torchrun ... ranks_trainer.py FOLDER LOCAL RUN_DIR

Writes FOLDER/rank-R-life-L.npz: of each step which rows of which table it published, and which had changed in its weights; in
its first life rank 1 is killed in the middle of a step.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ekko
import ekko.torch

ROWS = {"item": 200, "user": 60}
DIM, BATCH = 8, 6
STEPS, SAVE_EVERY, KILLED_AT = 16, 4, 10


class Model(nn.Module):
    """Sparse and dense gradients, and dense parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ROWS["item"], DIM, sparse=True)
        self.user = nn.EmbeddingBag(ROWS["user"], DIM, mode="sum")
        self.top = nn.Linear(DIM, 1)

    def forward(self, items: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.top(self.item(items) * self.user(users)) - 1).square().mean()
        return loss


class Recorder:
    """A publisher that remembers what really went out; the real one is behind it."""

    def __init__(self, publisher: ekko.Publisher) -> None:
        self._publisher = publisher
        self.published: list[tuple[str, list[int]]] = []
        self.tensors: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)

    @contextmanager
    def step(self) -> Iterator["RecordedStep"]:
        with self._publisher.step() as step:
            yield RecordedStep(self, step)


class RecordedStep:
    """One of its steps."""

    def __init__(self, recorder: Recorder, step: Any) -> None:
        self._recorder, self._step = recorder, step

    @property
    def stamp(self) -> int:
        return int(self._step.stamp)

    def publish(self, table: str, keys: np.ndarray, rows: np.ndarray, significance: np.ndarray | None = None) -> None:
        self._recorder.published.append((table, keys.tolist()))
        self._step.publish(table, keys, rows, significance)

    def publish_dense(self, name: str, array: np.ndarray) -> None:
        self._recorder.tensors.append(name)
        self._step.publish_dense(name, array)


def main(folder: Path, local: str, run_dir: Path) -> None:
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.disable()
    # A place of its own to meet for each life: in torchrun's store gloo at times finds the address of a rank that is dead.
    place = f"file://{folder}/meet-{life}"
    dist.init_process_group("gloo", place, timedelta(seconds=60), world_size=int(os.environ["WORLD_SIZE"]), rank=rank)
    torch.manual_seed(rank)  # DDP has all ranks begin with the weights of rank 0
    model = Model()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adagrad(parallel.parameters(), lr=0.1)
    told: dict[str, np.ndarray] = {}
    with (
        ekko.Publisher(local, "ctr", dict.fromkeys(ROWS, DIM), timeout=60.0) as publisher,
        ekko.Reader("ctr", run_dir, wait=60.0, counted=False) as reader,
    ):
        recorder = Recorder(publisher)
        tables = {"item": "item", "user": "user"}
        tracker = ekko.torch.track(parallel, optimizer, recorder, tables, dense_every=1, reader=reader, background=life > 0)
        checkpoint = ekko.torch.checkpoint_hook(tracker, optimizer, timeout=10.0)
        saved, first = folder / "checkpoint.pt", 0
        if saved.exists():
            state = torch.load(saved, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            resumed = checkpoint.resume()
            told["resumed"] = np.array([resumed.rows.get(table, 0) for table in ROWS])
        else:
            tracker.publish_all()
        told["first"] = np.array(first)
        for number in range(first, STEPS):
            before = {name: getattr(model, name).weight.detach().clone() for name in ROWS}
            recorder.published.clear()
            recorder.tensors.clear()
            rng = np.random.default_rng((rank, number))
            items, users = (torch.from_numpy(rng.integers(0, ROWS[name], (BATCH, 1))) for name in ROWS)
            optimizer.zero_grad()
            if (life, number) == (0, KILLED_AT):
                dist.barrier()  # both have written down what they did before
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            parallel(items.squeeze(1), users).backward()
            optimizer.step()
            tracker.flush()
            for name in ROWS:
                changed = (getattr(model, name).weight.detach() != before[name]).any(dim=1).nonzero().reshape(-1)
                told[f"changed/{number}/{name}"] = changed.numpy()
                keys = [key for table, some in recorder.published for key in some if table == name]
                told[f"published/{number}/{name}"] = np.array(keys, np.int64)
            told[f"tensors/{number}"] = np.array(len(recorder.tensors))
            if (number + 1) % SAVE_EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}
                if rank == 0:
                    torch.save(state, folder / "new.pt")
                    (folder / "new.pt").replace(saved)
                dist.barrier()
            np.savez(folder / f"rank-{rank}-new.npz", **told)
            (folder / f"rank-{rank}-new.npz").replace(folder / f"rank-{rank}-life-{life}.npz")
        tracker.remove()
        publisher.wait(tracker.stamp, timeout=60.0)
        dist.barrier()
        np.savez(folder / f"weights-{rank}.npz", **{name: value.numpy() for name, value in model.state_dict().items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
