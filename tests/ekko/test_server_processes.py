"""Servers beside real training nodes: killed, restarted, expelled and back; no acknowledged push is lost or counts twice."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from server_cluster import MODEL, ServerCluster, ServerSpec, Worker

import ekko
from ekko.model import training_name
from ekko.train.server import wire as w
from p2p.transport.curve import KeyPair
from sim_cluster.processes import NodeSpec, living, wait_until

pytestmark = pytest.mark.processes

KEYS = np.arange(200, dtype=np.uint64)
ONES = np.ones((len(KEYS), 4), np.float32)
SOON_S = 60.0
START_S = 120.0  # with kernels that are not compiled yet, on a busy machine


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerCluster]:
    folder = tmp_path_factory.mktemp("alone")
    with ServerCluster(folder, [NodeSpec("train-1", "home", "train"), NodeSpec("eu-1", "eu")], ServerSpec()) as cluster:
        cluster.start()
        wait_until(lambda: cluster.all_served, "every partition to be served", START_S)
        yield cluster


@pytest.fixture
def three(tmp_path: Path) -> Iterator[ServerCluster]:
    nodes = [NodeSpec(f"train-{number}", "home", "train") for number in (1, 2, 3)]
    with ServerCluster(tmp_path, nodes, ServerSpec(), encrypted=True) as cluster:
        cluster.start()
        wait_until(lambda: cluster.all_served, "every partition to be served", START_S)
        yield cluster


@pytest.mark.long
def test_with_keys_only_who_has_one_is_heard(tmp_path: Path) -> None:
    nodes = [NodeSpec("train-1", "home", "train"), NodeSpec("train-2", "home", "train")]
    with ServerCluster(tmp_path, nodes, ServerSpec(), encrypted=True) as cluster:
        cluster.start()
        wait_until(lambda: cluster.all_served, "servers to have asked each other", START_S)
        stranger = {**cluster.keys, "worker": KeyPair(*(key.decode() for key in zmq.curve_keypair()))}
        with Worker(cluster) as worker:
            worker.push(KEYS, ONES)
            assert (worker.pull(KEYS) == -0.5).all()
        known, cluster.keys = cluster.keys, stranger
        with Worker(cluster) as worker:
            assert worker.ask("train-1", w.WhoServes(MODEL), 1.0) is None
        cluster.keys = {}
        with Worker(cluster) as worker:
            assert worker.ask("train-1", w.WhoServes(MODEL), 1.0) is None
        cluster.keys = known
        wait_until(lambda: cluster["train-1"].status()["server"]["strangers"], "the stranger to be counted", SOON_S)
        (tmp_path / "allowed_keys" / "worker.pub").unlink()
        with Worker(cluster) as worker:
            wait_until(lambda: worker.ask("train-1", w.WhoServes(MODEL), 0.3) is None, "the worker to be cut off", SOON_S)


def served(cluster: ServerCluster, node: str) -> np.ndarray:
    with ekko.Reader(MODEL, run_dir=cluster[node].run_dir, wait=SOON_S) as reader:
        return reader.lookup("item", KEYS)


def pid_of(cluster: ServerCluster, node: str) -> int:
    """The process of a node's server: its one child."""
    return int(Path(f"/proc/{cluster[node].pid}/task/{cluster[node].pid}/children").read_text().split()[0])


def test_what_is_pushed_is_trained_served_and_counted_once(alone: ServerCluster) -> None:
    with Worker(alone) as worker:
        for count in range(1, 4):
            worker.push(KEYS, ONES)
            assert (worker.pull(KEYS) == -0.5 * count).all()
            # Acknowledged is served: at once on the server's node, and wherever a push has arrived.
            assert (served(alone, "train-1") == -0.5 * count).all()
        worker.pushed -= 1
        worker.push(KEYS, ONES)  # the same number again
        assert (worker.pull(KEYS) == -1.5).all()
    wait_until(lambda: (served(alone, "eu-1") == -1.5).all(), "serving nodes to have it", SOON_S)
    wait_until(lambda: alone.state("train-1")["counts"]["pushes"] >= 4, "the status to tell of it", SOON_S)
    with ekko.Reader(training_name(MODEL), run_dir=alone["eu-1"].run_dir, unheld="absent") as reader:
        assert reader.hold == ()
    assert training_name(MODEL) not in alone["eu-1"].status()["models"]
    metrics = alone["train-1"].metrics()
    assert 'ekko_server_pushes_total{model="ctr"}' in metrics


def test_a_server_that_is_killed_is_started_again_and_goes_on(alone: ServerCluster) -> None:
    with Worker(alone, 1) as worker:
        before = worker.pull(KEYS)
        worker.push(KEYS, ONES)
        os.kill(pid_of(alone, "train-1"), signal.SIGKILL)
        worker.push(KEYS, ONES)
        assert (worker.pull(KEYS) == before - 1.0).all()
    status = alone["train-1"].status()["server"]
    assert (status["starts"], status["failures"]) == (2, 1)
    wait_until(lambda: (served(alone, "eu-1") == before - 1.0).all(), "serving nodes to have it", SOON_S)
    assert alone["train-1"].stop() == 0, "a node ends its server and itself in order"


def test_spares_take_over_once_a_dead_node_is_expelled_and_give_back_when_it_returns(three: ServerCluster) -> None:
    victim = "train-2"
    mine = sorted(partition for partition, servers in three.acting().items() if servers == [victim])
    assert mine, "the seed of names gives each server something"
    with Worker(three) as worker:
        worker.push(KEYS, ONES)
        three[victim].kill()
        wait_until(lambda: victim not in living(three["train-1"].status()), "others to miss it", SOON_S)
        worker.patience_s = 2.0

        def waited_for() -> bool:
            # Of its partitions nobody may act; of the others a push is not acknowledged while a holder is silent.
            with pytest.raises(AssertionError, match=r"no answer for partitions \[0, 1, 2, 3\]"):
                worker.push(KEYS, ONES)
            worker.pushed -= 1
            waiting = [three.state(node)["waiting_for"] for node in three.endpoints if node != victim]
            return any(victim in nodes for what in waiting for nodes in what.values())

        wait_until(waited_for, "the status to tell whom the push waits for", SOON_S)
        worker.patience_s = SOON_S
        status, body = three["train-1"].post("/expel", {"node": victim})
        assert status == 200, body
        worker.push(KEYS, ONES)
        assert (worker.pull(KEYS) == -1.0).all(), "what was acknowledged is there, and what was pushed twice counts once"
        wait_until(lambda: three.all_served, "others to serve what the dead one did", SOON_S)
        three[victim].start()
        three[victim].wait_ready()
        wait_until(lambda: three.all_served and mine == _served_by(three, victim), "the same division as before", START_S)
        worker.push(KEYS, ONES)
        assert (worker.pull(KEYS) == -1.5).all()
    for node in three.nodes:
        wait_until(lambda node=node: (served(three, node) == -1.5).all(), f"{node} to serve what is trained", SOON_S)


def _served_by(cluster: ServerCluster, node: str) -> list[int]:
    return sorted(partition for partition, servers in cluster.acting().items() if servers == [node])
