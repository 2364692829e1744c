"""Training through parameter servers is the training that torch does alone: same seed, same batches, same order.

With plain SGD tables and dense parameters are torch's bit for bit. Adagrad is compared with the servers' own kernel in one
process, bit for bit too: torch's differs from it in last bits (`test_optimizers.py`), and since Adagrad's first step of a value
is its rate times the gradient's sign, a gradient that is zero but for rounding carries a last bit into the second digit.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from sim_cluster.demo.learning import DIM, EMBEDDING_RATE
from sim_cluster.processes import NodeSpec, free_ports
from tests.ekko.server_trainer import Job, Trained, alone, events
from tests.ekko.training_processes import TrainingCluster, WorkerProcess, replicas_equal, rows_at, table_settings

pytestmark = pytest.mark.processes

NODES = (NodeSpec("home-1", "home", "train"), NodeSpec("home-2", "home", "train"), NodeSpec("eu-1", "eu"))
# Sums of floats depend on their order: where a key comes more than once in the parts of both workers, servers add up
# (a1 + a2) + (b1 + b2), and torch, given the batch as a whole, ((a1 + a2) + b1) + b2. That is a last bit, which the following
# steps carry on.
ROUNDING_TOLERANCE = 1e-6


def model_of(mode: str, workers: int, optimizer: dict[str, object]) -> dict[str, object]:
    tables = {table: table_settings(DIM, optimizer) for table in events().rows}
    return {"mode": mode, "workers": workers, "partitions": 4, "tables": tables}


def trained(cluster: TrainingCluster, jobs: list[Job]) -> dict[str, np.ndarray]:
    """The rows at the serving node once all workers are through."""
    workers = [WorkerProcess(job).start() for job in jobs]
    try:
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            worker.kill()
    replicas_equal(cluster)
    return {table: rows for table, (rows, _) in rows_at(cluster["eu-1"]).items()}


def touched(reference: Trained, initial: Trained) -> dict[str, np.ndarray]:
    """Which rows training changed; servers keep no others."""
    return {table: (rows != initial.tables[table]).any(axis=1) for table, rows in reference.tables.items()}


def largest_difference(rows: dict[str, np.ndarray], reference: Trained, job: Job) -> float:
    changed = touched(reference, alone(Job(job.folder, steps=0), by_worker=True, optimizer=SGD))
    assert all(some.any() for some in changed.values())
    return max(float(np.abs(rows[table][some] - reference.tables[table][some]).max()) for table, some in changed.items())


def assert_dense_equal(job: Job, reference: Trained, tolerance: float) -> None:
    for name, value in torch.load(job.path("dense.pt"), weights_only=True).items():
        torch.testing.assert_close(value, reference.dense[name], rtol=0, atol=tolerance, msg=name)


SGD = {"name": "sgd", "lr": 1.0}
ADAGRAD = {"name": "adagrad", "lr": EMBEDDING_RATE}


@pytest.mark.long  # two workers do the same in the quick test below
@pytest.mark.parametrize("optimizer", [pytest.param(SGD, id="sgd"), pytest.param(ADAGRAD, id="adagrad")])
def test_one_worker_in_step_trains_as_one_process_does_bit_for_bit(tmp_path: Path, optimizer: dict[str, object]) -> None:
    with TrainingCluster(tmp_path, NODES, model_of("sync", 1, optimizer)) as cluster:
        cluster.start()
        job = Job(str(tmp_path / "work"), list(cluster.endpoints.values())[:1], prefetch=optimizer is ADAGRAD)
        rows = trained(cluster, [job])
    reference = alone(job, by_worker=True, optimizer=optimizer)
    assert np.load(job.path("losses.npy")).tolist() == reference.losses
    assert largest_difference(rows, reference, job) == 0
    assert_dense_equal(job, reference, 0)
    assert min(reference.losses) < max(reference.losses) - 0.05, "it learns"


def test_two_workers_in_step_train_as_torch_does_on_the_same_batches(tmp_path: Path) -> None:
    with TrainingCluster(tmp_path, NODES, model_of("sync", 2, SGD)) as cluster:
        cluster.start()
        rendezvous = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        jobs = [
            Job(str(tmp_path / "work"), list(cluster.endpoints.values()), worker, 2, rendezvous=rendezvous) for worker in (0, 1)
        ]
        rows = trained(cluster, jobs)
    # Gradients of the two parts of each batch one after the other, and added up: the order of the servers and of DDP.
    reference = alone(jobs[0], by_worker=True, optimizer=SGD)
    assert largest_difference(rows, reference, jobs[0]) == 0
    assert_dense_equal(jobs[0], reference, 0)
    assert_dense_equal(jobs[1], reference, 0)
    whole = alone(jobs[0], by_worker=False, optimizer=SGD)
    assert 0 < largest_difference(rows, whole, jobs[0]) <= ROUNDING_TOLERANCE
    assert_dense_equal(jobs[0], whole, ROUNDING_TOLERANCE)


# Mean log-loss over the second half of the training, of two workers that do not wait for each other, above that of torch alone
# (0.127, from 0.69 at the beginning). How old rows are depends on the machine: decision 0059 has what runs came to.
ASYNC_LOSS_MAX = 0.02


@pytest.mark.long  # the examples' quick test has such workers, too
def test_workers_that_do_not_wait_learn_as_well(tmp_path: Path) -> None:
    with TrainingCluster(tmp_path, NODES, model_of("async", 0, ADAGRAD)) as cluster:
        cluster.start()
        rendezvous = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        endpoints = list(cluster.endpoints.values())
        jobs = [Job(str(tmp_path / "work"), endpoints, worker, 2, 60, 64, span=640, rendezvous=rendezvous) for worker in (0, 1)]
        trained(cluster, jobs)
    reference = np.array(alone(jobs[0], by_worker=True, optimizer=ADAGRAD).losses)
    losses = np.mean([np.load(job.path("losses.npy"))[30:].mean() for job in jobs])
    worse = float(losses - reference[60:].mean())
    print(f"log-loss of asynchronous workers: {losses:.4f}, {worse:+.4f} against torch alone")  # noqa: T201
    assert reference[60:].mean() < reference[:20].mean() - 0.02, "it learns"
    assert worse < ASYNC_LOSS_MAX
