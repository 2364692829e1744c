"""The whole path with real processes: publisher -> daemon -> sockets -> daemons -> shared memory -> readers."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import zmq

import ekko
from p2p import wire
from p2p.messages import Ack, Envelope
from sim_cluster.processes import LocalCluster, NodeProcess, NodeProcessError, NodeSpec, wait_until

pytestmark = pytest.mark.processes

DELAYS_MS = {"home/eu": 2.0, "home/us": 40.0, "home/ap": 90.0, "eu/us": 40.0, "eu/ap": 90.0, "us/ap": 60.0}
NODES = (NodeSpec("train-1", "home", "train"), NodeSpec("eu-1", "eu"), NodeSpec("us-1", "us"), NodeSpec("ap-1", "ap"))
# What the path may add to the emulated one-way delay, at the 99th percentile, on a machine that has a core to give.
EXCESS_MS_MAX = 25.0
# A machine that wakes an idle thread later than this is busy with other things, and then a step waits for a core at each hop:
# publisher, trainer's node, its I/O thread, the other node.
LATENESS_MS_QUIET = 5.0
HOPS = 4
# One that stood still for so long held up all that was published meanwhile, which may be more than one in a hundred.
STOOD_STILL_MS = 50.0

TABLES = {"item": 16, "user": 8}
KEYS = 2_000
BATCH_ROWS = 100
BATCHES_PER_S = 50.0
DEADLINE_S = 60.0


@dataclass
class Oracle:
    """What every replica must hold, by table."""

    rows: dict[str, np.ndarray] = field(default_factory=lambda: {t: np.zeros((KEYS, d), np.float32) for t, d in TABLES.items()})
    stamps: dict[str, np.ndarray] = field(default_factory=lambda: {t: np.zeros(KEYS, np.uint64) for t in TABLES})

    def write(self, table: str, keys: np.ndarray, rows: np.ndarray | None, stamp: int) -> None:
        """`rows` None: the keys were deleted."""
        self.rows[table][keys] = 0 if rows is None else rows
        self.stamps[table][keys] = 0 if rows is None else stamp

    def assert_held_by(self, node: NodeProcess) -> None:
        """Bit for bit, stamps included."""
        with ekko.Reader("ctr", run_dir=node.run_dir, wait=DEADLINE_S) as reader:
            for table in TABLES:
                rows, stamps = reader.lookup(table, np.arange(KEYS, dtype=np.uint64), stamps=True)
                assert np.array_equal(stamps, self.stamps[table]), (node.id, table)
                assert rows.tobytes() == self.rows[table].tobytes(), (node.id, table)


class Stream:
    """Publishes random rows at an even pace in a thread, and remembers them."""

    def __init__(self, publisher: ekko.Publisher, oracle: Oracle) -> None:
        self._publisher = publisher
        self._oracle = oracle
        self._rng = np.random.default_rng(11)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self.published = 0

    def __enter__(self) -> "Stream":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            due = time.monotonic()
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                self.publish_one()
                due += 1 / BATCHES_PER_S
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            self._failure = error

    def publish_one(self) -> None:
        written = []
        with self._publisher.step() as step:
            for table, dim in TABLES.items():
                keys = self._rng.choice(KEYS, BATCH_ROWS // len(TABLES), replace=False).astype(np.uint64)
                rows = self._rng.standard_normal((len(keys), dim), dtype=np.float32)
                step.publish(table, keys, rows)
                written.append((table, keys, rows))
        for table, keys, rows in written:
            self._oracle.write(table, keys, rows, step.stamp)
        self.published += 1


class Lateness:
    """How late each core of this machine wakes a thread that asked for nothing but to be woken: its noise, not ours."""

    def __init__(self) -> None:
        self._late_ms: dict[int, list[float]] = {core: [] for core in os.sched_getaffinity(0)}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(core,)) for core in self._late_ms]

    def __enter__(self) -> "Lateness":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, core: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread
        while not self._stop.is_set():
            due = time.monotonic() + 0.005
            self._stop.wait(0.005)
            self._late_ms[core].append((time.monotonic() - due) * 1_000)

    @property
    def p99_ms(self) -> float:
        return float(max(np.percentile(late_ms, 99) for late_ms in self._late_ms.values()))

    @property
    def longest_ms(self) -> float:
        return max(max(late_ms) for late_ms in self._late_ms.values())


def visible_everywhere(cluster: LocalCluster, publisher: ekko.Publisher, oracle: Oracle) -> None:
    """Wait for the last step at every node, then compare every replica with what was published."""
    # Who was taken for silent, after a moment in which it did not run, is not waited for at first.
    wait_until(lambda: not publisher.wait(publisher.last_stamp, "all", DEADLINE_S), "all nodes to be heard", DEADLINE_S)
    for node in cluster.nodes.values():
        oracle.assert_held_by(node)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path, NODES, delays_ms=DELAYS_MS) as nodes:
        nodes.start()
        yield nodes


@pytest.fixture
def publisher(cluster: LocalCluster) -> Iterator[ekko.Publisher]:
    with ekko.Publisher(cluster["train-1"].local, model="ctr", tables=TABLES) as publisher:
        yield publisher


def test_steps_deletes_and_dense_reach_every_region_bit_for_bit(cluster: LocalCluster, publisher: ekko.Publisher) -> None:
    oracle = Oracle()
    stream = Stream(publisher, oracle)
    for _ in range(100):
        stream.publish_one()
    gone = np.arange(0, KEYS, 7, dtype=np.uint64)
    oracle.write("item", gone, None, publisher.delete("item", gone))
    weights = np.random.default_rng(5).standard_normal((300, 7), dtype=np.float32)
    publisher.publish_dense("top.0.weight", weights)
    visible_everywhere(cluster, publisher, oracle)
    for node in cluster.nodes.values():
        with ekko.Reader("ctr", run_dir=node.run_dir) as reader:
            assert reader.dense("top.0.weight").tobytes() == weights.tobytes()
            # Which writers live is known from the next heartbeat on.
            wait_until(lambda reader=reader: (reader.staleness_ms() or np.inf) < 1_000, "staleness is known", DEADLINE_S)  # type: ignore[misc]
    assert_observable(cluster)


def assert_observable(cluster: LocalCluster) -> None:
    """Status and metrics tell what happened."""
    for node in cluster.nodes.values():
        # Who was made a replica while rows came is in sync from the next heartbeat on.
        wait_until(lambda node=node: node.status()["synced"], f"{node.id} is in sync", DEADLINE_S)  # type: ignore[misc]
        wait_until(lambda node=node: _living(node) == set(cluster.nodes), f"{node.id} hears all", DEADLINE_S)  # type: ignore[misc]
        status = node.status()
        assert status["ready"]
        assert status["models"]["ctr"]["tables"]["user"]["rows"] > 0
        assert status["rejected"] == {}
        assert all(0 <= queue["fill"] <= queue["bound"] for queue in status["queues"])
        metrics = node.metrics()
        for name in ("ekko_update_delay_seconds", "ekko_staleness_ms", "ekko_peer_rows", "ekko_gaps", "ekko_queue_bound"):
            assert f"\n{name}" in metrics, name
    delays = cluster["ap-1"].delays()
    assert len(delays.delays_ms) == delays.next >= 100
    assert min(delays.delays_ms) >= DELAYS_MS["home/ap"]
    assert 'ekko_update_delay_seconds_bucket{le="+Inf",origin_region="home"}' in cluster["ap-1"].metrics()


def _living(node: NodeProcess) -> set[str]:
    """Itself included."""
    return {member["node"] for member in node.status()["members"] if member["alive"]}


def excess_ms(node: NodeProcess, since: int, percent: int) -> float:
    """How far a percentile of the node's delays since then lies above the emulated one from the trainer's region."""
    samples = node.delays(since).delays_ms
    assert len(samples) > 100, f"{node.id}: only {len(samples)} samples"
    return float(np.percentile(samples, percent)) - DELAYS_MS[f"home/{node.spec.region}"]


@pytest.mark.alone
def test_killed_node_catches_up_by_pull_while_other_regions_stay_fast(cluster: LocalCluster, publisher: ekko.Publisher) -> None:
    oracle = Oracle()
    victim = cluster["us-1"]
    others = [cluster["eu-1"], cluster["ap-1"]]
    with Stream(publisher, oracle) as stream, Lateness() as lateness:
        wait_until(lambda: stream.published >= 100, "the stream is under way", DEADLINE_S)
        publisher.wait(publisher.last_stamp, scope="all", timeout=DEADLINE_S)
        since = {node.id: node.delays().next for node in others}
        killed_s = time.monotonic()
        victim.kill()
        published_then = stream.published
        wait_until(lambda: time.monotonic() > killed_s + 5.0, "five seconds", DEADLINE_S)
        assert stream.published > published_then + 50  # writing went on
        victim.start()
        victim.wait_ready()
        assert victim.status()["node"]["resumed"]
        publisher.wait(publisher.last_stamp, scope="all", timeout=DEADLINE_S)
        caught_up_s = time.monotonic() - killed_s - 5.0
        percent = 99 if lateness.longest_ms < STOOD_STILL_MS else 50
        excess = {node.id: excess_ms(node, since[node.id], percent) for node in others}
    noise = f"{lateness.p99_ms:.1f} ms, at most {lateness.longest_ms:.1f} ms"
    figures = f"p{percent} above the delay: {excess} ms; this machine's own lateness: p99 {noise}"
    print(f"caught up {caught_up_s:.1f} s after its restart; {figures}")  # noqa: T201
    assert victim.status()["counters"]["pulls_completed"] >= 1
    assert victim.status()["counters"]["pull_rows_received"] > 0
    visible_everywhere(cluster, publisher, oracle)
    waiting_ms = HOPS * lateness.p99_ms if lateness.p99_ms > LATENESS_MS_QUIET else 0.0
    assert max(excess.values()) <= EXCESS_MS_MAX + waiting_ms, figures


def test_node_that_lost_its_memory_pulls_everything_again(cluster: LocalCluster, publisher: ekko.Publisher) -> None:
    oracle = Oracle()
    stream = Stream(publisher, oracle)
    for _ in range(50):
        stream.publish_one()
    victim = cluster["eu-1"]
    victim.kill()
    victim.remove_memory()
    for _ in range(10):
        stream.publish_one()
    victim.start()
    victim.wait_ready()
    assert not victim.status()["node"]["resumed"]
    visible_everywhere(cluster, publisher, oracle)


def test_trainers_node_restarts_and_goes_on_writing(cluster: LocalCluster, publisher: ekko.Publisher) -> None:
    oracle = Oracle()
    stream = Stream(publisher, oracle)
    with ExitStack() as stack:
        readers = {
            node.id: stack.enter_context(ekko.Reader("ctr", run_dir=node.run_dir, wait=DEADLINE_S))
            for node in cluster.nodes.values()
        }
        keys = np.arange(KEYS, dtype=np.uint64)
        stamps = {node: np.zeros(KEYS, np.uint64) for node in readers}
        trainer = cluster["train-1"]
        for end in (lambda: None, trainer.kill, trainer.stop):
            end()
            if not trainer.running:
                trainer.start()
                trainer.wait_ready()
            for _ in range(20):
                stream.publish_one()
            cluster.wait_members()  # `wait` asks the nodes that the trainer's node knows of
            visible_everywhere(cluster, publisher, oracle)
            for node, reader in readers.items():  # attached once, across both restarts
                _, seen = reader.lookup("item", keys, stamps=True)
                assert np.all(seen >= stamps[node])
                assert np.array_equal(seen, oracle.stamps["item"])
                stamps[node] = seen


def test_strangers_and_junk_are_counted_and_do_no_harm(cluster: LocalCluster, publisher: ekko.Publisher) -> None:
    oracle = Oracle()
    stream = Stream(publisher, oracle)
    node = cluster["eu-1"]
    host, port = node.peers.removeprefix("tcp://").split(":")
    random = np.random.default_rng(7)
    good = [bytes(frame) for frame in wire.encode(Envelope(1, 2), Ack(1, 1))]
    for junk in (b"GET / HTTP/1.0\r\n\r\n", random.bytes(4_096)):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(junk)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.set(zmq.LINGER, 60_000)
        stranger.connect(node.peers)
        for frames in (random.bytes(100), b"EK", good[0][:-1]), ([good[0], good[1][:-1]]), ([b""]), good:
            stranger.send_multipart(list(frames))
            stream.publish_one()
        wait_until(lambda: sum(node.status()["rejected"].values()) >= 3, "junk was counted", DEADLINE_S)
    assert "ekko_rejected_frames_total" in node.metrics()
    assert node.running
    visible_everywhere(cluster, publisher, oracle)


def test_second_node_with_a_taken_id_is_told_and_stops(
    cluster: LocalCluster, publisher: ekko.Publisher, tmp_path: Path
) -> None:
    twin = LocalCluster(tmp_path / "twin", [NodeSpec("eu-1", "eu")], delays_ms=DELAYS_MS)
    with twin:
        node = twin["eu-1"]
        node.write_config([cluster["train-1"].peers], {}, DELAYS_MS)
        node.start()
        with pytest.raises(NodeProcessError):
            node.wait_ready()
        wait_until(lambda: not node.running, "the twin stops", DEADLINE_S)
        assert "eu-1" in node.log_tail()
        assert "in use by a live node" in node.log_tail()
    oracle = Oracle()
    Stream(publisher, oracle).publish_one()
    visible_everywhere(cluster, publisher, oracle)
