"""How well workers learn a stream through parameter servers, and how old the rows are that they compute with.

    python -m tests.ekko.stream_quality [EVENTS] [SEEDS]

MovieLens-100K in the order of time, each event once. Quality is measured twice: on each batch before it is learnt
(progressive), and on the events that follow, of what has been learnt in the end (held out). The delay of a push is how many
other pushes were applied between the pull of the rows that it was computed from and itself; divided by the number of workers
it is one of steps.
"""

import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import ekko
from ekko.train.optimizers import initializer_of, optimizer_of
from sim_cluster.demo.evaluation import auc
from sim_cluster.demo.learning import DIM, EMBEDDING_RATE, Inputs
from sim_cluster.processes import NodeSpec, free_ports
from tests.ekko.server_trainer import COUNTED, COUNTER, INITIALIZER, Job, batches, dense_model, dense_optimizer, events
from tests.ekko.training_processes import TrainingCluster, WorkerProcess, table_settings

NODES = (NodeSpec("home-1", "home", "train"), NodeSpec("home-2", "home", "train"))
STREAM = "movielens"
BATCH = 64
HELD_OUT = 20_000
STALENESS = 2  # of mode "bounded"
ADAGRAD = {"name": "adagrad", "lr": EMBEDDING_RATE}
TIMEOUT_S = 900.0


Rows = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one run. `delay`: mean, in steps; `pushes`: how many count in the end."""

    loss: float
    auc: float
    held_loss: float
    held_auc: float
    delay: float = 0.0
    pushes: int = 0


def job_of(folder: str, count: int, seed: int, workers: int = 1, **more: object) -> Job:
    """What one worker does with the first `count` events."""
    assert count + HELD_OUT <= len(events(STREAM))
    span = count // BATCH * BATCH
    return Job(folder, workers=workers, steps=span // BATCH, batch=BATCH, span=span, stream=STREAM, seed=seed, **more)  # type: ignore[arg-type]


def initializer(seed: int) -> dict[str, object]:
    return {**INITIALIZER, "seed": seed}


def losses(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log-loss."""
    return float(np.logaddexp(0, np.where(labels > 0, -logits, logits)).mean())


def quality_of(job: Job, logits: np.ndarray, dense: Mapping[str, Tensor], rows: Rows, **more: float) -> Quality:
    """Of a training.

    Args:
        job: of the first worker.
        logits: float32[events], of each before it was learnt, in the order of the stream.
        dense, rows: what was learnt in the end.
    """
    model = dense_model(job)
    model.load_state_dict(dict(dense))
    inputs, labels = Inputs(events(STREAM)), events(STREAM).labels
    held = slice(job.span, job.span + HELD_OUT)
    with torch.no_grad():
        found = [torch.from_numpy(rows[name][ids[held].numpy()]) for name, ids in inputs.ids.items()]
        after = model(inputs.dense[held], embeddings=torch.stack(found, dim=1)).numpy()
    learnt = labels[: job.span]
    return Quality(losses(logits, learnt), auc(learnt, logits), losses(after, labels[held]), auc(labels[held], after), **more)  # type: ignore[arg-type]


def through_servers(folder: Path, mode: str, workers: int, count: int, seed: int, **more: object) -> Quality:
    """Real nodes, servers and workers, whose dense parameters are averaged by DDP."""
    rows = events(STREAM).rows
    tables: dict[str, object] = {name: table_settings(DIM, ADAGRAD, initializer(seed)) for name in rows}
    counted = 0 if mode == "async" else workers
    model = {"mode": mode, "workers": counted, "partitions": 2, "tables": {**tables, COUNTER: COUNTED}}
    with TrainingCluster(folder, NODES, model | ({"staleness": STALENESS} if mode == "bounded" else {})) as cluster:
        cluster.start()
        rendezvous = f"tcp://127.0.0.1:{free_ports(1)[0]}" if workers > 1 else ""
        shared = {"endpoints": list(cluster.endpoints.values()), "rendezvous": rendezvous, "timeout": TIMEOUT_S, **more}
        jobs = [job_of(str(folder / "work"), count, seed, workers, worker=worker, **shared) for worker in range(workers)]
        processes = [WorkerProcess(job).start() for job in jobs]
        try:
            for process in processes:
                process.wait(TIMEOUT_S)
        finally:
            for process in processes:
                process.kill()
        with ekko.Reader("ctr", run_dir=cluster["home-1"].run_dir, wait=60.0) as reader:
            keys = {name: np.arange(size, dtype=np.uint64) for name, size in rows.items()}
            learnt = {name: _learnt(reader, name, own, seed) for name, own in keys.items()}
            pushed = float(reader.lookup(COUNTER, [0])[0, 0])
    seen = [np.load(job.path("seen.npz")) for job in jobs]
    logits = np.stack([one["logits"] for one in seen], axis=1).reshape(-1)  # [steps, workers, events of a part]
    # Where gradients are averaged, so is what the counter counts.
    scale = 1 if mode == "async" else workers
    pushes = round(pushed * scale)
    # Each push has a place from 0 to pushes - 1, and saw as many as the counter said: so much for the mean of all.
    delay = ((pushes - 1) / 2 - float(np.mean([one["counts"] for one in seen])) * scale) / workers
    dense = torch.load(jobs[0].path("dense.pt"), weights_only=True)
    return quality_of(jobs[0], logits, dense, learnt, delay=delay, pushes=pushes)


def _learnt(reader: ekko.Reader, table: str, keys: np.ndarray, seed: int) -> np.ndarray:
    """Rows as workers have them: what no push has touched is as it begins."""
    rows, stamps = reader.lookup(table, keys, stamps=True)
    rows[stamps == 0] = initializer_of(initializer(seed)).rows(table, keys, DIM)[stamps == 0]
    return rows


def delayed(count: int, seed: int, delay: int = 0, workers: int = 1) -> Quality:
    """The same in one process without servers, where rows lack the pushes of exactly so many steps. 0: as torch alone."""
    job = job_of("", count, seed, workers)
    model, optimizer = dense_model(job), optimizer_of(ADAGRAD)
    of_dense = dense_optimizer(model)
    rows = {
        name: initializer_of(initializer(seed)).rows(name, np.arange(size, dtype=np.uint64), DIM)
        for name, size in events(STREAM).rows.items()
    }
    states = {name: optimizer.initial_state(own) for name, own in rows.items()}

    def apply(push: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        for name, (keys, gradients) in push.items():
            some, state = rows[name][keys], states[name][keys]
            optimizer.apply(some, state, gradients)
            rows[name][keys], states[name][keys] = some, state

    logits, under_way = [], deque[list[Mapping[str, tuple[np.ndarray, np.ndarray]]]]()
    for parts in zip(*(batches(job, worker) for worker in range(workers)), strict=True):
        of_dense.zero_grad()
        pushes = []
        for dense, ids, labels in parts:
            leaves = {name: _leaf(rows[name], own.numpy()) for name, own in ids.items()}
            taken = [functional.embedding(places, leaf) for _, places, leaf in leaves.values()]
            answers = model(dense, embeddings=torch.stack(taken, dim=1))
            (functional.binary_cross_entropy_with_logits(answers, labels) / workers).backward()
            logits.append(answers.detach().numpy())
            pushes.append({name: (keys, _gradient(leaf) * workers) for name, (keys, _, leaf) in leaves.items()})
        of_dense.step()
        under_way.append(pushes)
        if len(under_way) > delay:
            for push in under_way.popleft():
                apply(push)
    for push in (one for some in under_way for one in some):
        apply(push)
    return quality_of(job, np.concatenate(logits), model.state_dict(), rows)


def _leaf(rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, Tensor, nn.Parameter]:
    """Each key once, where each id's is among them, and their rows."""
    keys, places = np.unique(ids, return_inverse=True)
    return keys, torch.from_numpy(places), nn.Parameter(torch.from_numpy(rows[keys]))


def _gradient(leaf: nn.Parameter) -> np.ndarray:
    assert leaf.grad is not None
    gradient: np.ndarray = leaf.grad.numpy()
    return gradient


VARIANTS: Mapping[str, Mapping[str, object]] = {
    "sync": {"mode": "sync"},
    "bounded": {"mode": "bounded"},
    "async": {"mode": "async"},
    "async, prefetched": {"mode": "async", "prefetch": True},
    "async, one under way": {"mode": "async", "outstanding": 1},
}


def _runs(count: int, seeds: int) -> Iterator[tuple[str, list[Quality]]]:
    for delay in (0, 1, 2, 4, 8, 16, 64):
        yield f"one process, delay {delay}", [delayed(count, seed, delay) for seed in range(seeds)]
    for workers in (1, 2, 4):
        for name, settings in VARIANTS.items():
            found = []
            for seed in range(seeds):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(through_servers(Path(folder), workers=workers, count=count, seed=seed, **settings))  # type: ignore[arg-type]
            yield f"{name}, {workers} workers", found


def main() -> None:
    """Print a line for each way: means over seeds, and by how much they differ."""
    count, seeds = map(int, (*sys.argv[1:], *("20000", "3")[len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    for name, found in _runs(count, seeds):
        columns = {key: [asdict(one)[key] for one in found] for key in asdict(found[0])}
        figures = "  ".join(f"{key} {np.mean(values):.4f} ± {np.std(values):.4f}" for key, values in columns.items())
        print(f"{name:32s} {figures}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
