"""Scenarios of links in state mode: little credit, narrow links, and every fault of a network beside them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from p2p.busy import state_mode
from p2p.busy.backlog import Backlog
from p2p.busy.state_mode import StateMode
from p2p.link import links
from p2p.members import trees
from p2p.pushing import push
from p2p.replica import RowColumns
from sim_cluster.checkers import Watch, check_converged
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster

REGIONS = {"t1": "home", "t2": "us", "eu1": "eu", "eu2": "eu", "us1": "us"}
KEYS = 80
PAIRS = ("eu/home", "eu/us", "home/us")


@contextmanager
def little_credit(bytes_max: int = 3_000, one_tree: int = trees.ONE_TREE_HOLDERS_MAX) -> Iterator[None]:
    """A link is full after a few steps, chunks have a few rows, and state mode is left soon."""
    with (
        mock.patch.object(links, "CREDIT_BYTES_MAX", bytes_max),
        mock.patch.object(push, "SHORT_BYTES_MAX", bytes_max // 6),
        mock.patch.object(state_mode, "CHUNK_BYTES_MAX", bytes_max // 5),
        mock.patch.object(state_mode, "CALM_MS", 200),
        mock.patch.object(trees, "ONE_TREE_HOLDERS_MAX", one_tree),
        watched(),
    ):
        yield


@contextmanager
def watched() -> Iterator[None]:
    """What is claimed is of exactly the pairs that the view gives to the sender (R1), and goes out when no batch does (R16)."""
    emit, send = StateMode._emit, push.Push._send

    def checked(self: StateMode, one: Backlog, columns: tuple[RowColumns, ...], *, claims: bool, ends: bool) -> None:
        cycle = one.cycle
        if claims:
            view = self._core.membership.trees(self._core.now_ms, one.keyspace.replica.place)
            assert cycle is not None
            ours = self._pairs(one.keyspace, one.link.node)
            late_ms = self._core.now_ms - one.looked_ms
            assert ours == one.pairs or (one.view is view and late_ms < state_mode.LOOK_MS), "R1: the view has changed"
            assert not (cycle.until.astype(bool) & ~one.pairs.grid(len(cycle.until))).any(), "R1: others' pairs are claimed"
        emit(self, one, columns, claims=claims, ends=ends)
        if claims and cycle is not None:
            assert (one.frontier <= cycle.frontier).all(), "T2: a frontier is told that is newer than the vector beside it"

    def sent(self: push.Push, link: links.Link, one: push.WaitingBatch) -> None:
        assert one.batch.keyspace not in self.state_mode.of_link(link), "R16: a batch goes out in state mode"
        send(self, link, one)

    with mock.patch.object(StateMode, "_emit", checked), mock.patch.object(push.Push, "_send", sent):
        yield


def start(seed: int, options: NetworkOptions | None = None) -> VirtualCluster:
    """Five nodes in three regions, two of which write; all know each other."""
    cluster = VirtualCluster(seed, options or NetworkOptions(1, 5))
    cluster.collect_ms = 500
    for name, region in REGIONS.items():
        cluster.add(name, region, "train" if name[0] == "t" else "serve", [] if name == "t1" else ["t1"])
    cluster.run(5_000)
    for name in ("t1", "t2"):
        cluster.publish(name, "item", [0], -1.0)  # one that has no writer id yet gets it
    cluster.run(1_000)
    return cluster


def narrow(rng: random.Random) -> dict[str, LinkOptions]:
    """Some pairs of regions are so narrow that they carry less than is written."""
    return {pair: LinkOptions(rng.randrange(30), rng.choice((2.0, 4.0, 8.0))) for pair in PAIRS if rng.random() < 0.8}


def counted(cluster: VirtualCluster, name: str) -> int:
    """A counter of all nodes that are up."""
    return sum(getattr(node.machine.counters, name) for node in cluster.nodes.values() if node.machine is not None)


def congested_under_faults(seed: int) -> None:
    """Two writers overwrite, delete and bring back a few keys; links are narrow for a while, messages get lost, nodes go."""
    rng = random.Random(seed)
    lossy = NetworkOptions(1, 20, loss_probability=rng.choice((0.0, 0.03)), repeat_probability=0.05, reorder_probability=0.03)
    with little_credit(one_tree=rng.choice((1, trees.ONE_TREE_HOLDERS_MAX))):
        cluster = start(seed)
        watch = Watch(cluster)
        cluster.options = lossy
        for step in range(120):
            if step % 40 == 5:
                cluster.options = NetworkOptions(1, 20, links=narrow(rng), loss_probability=lossy.loss_probability)
            if step % 40 == 30:
                cluster.options = lossy
            if step % 25 == 12:
                disturb(cluster, rng)
            for name in ("t1", "t2"):
                if cluster.nodes[name].machine is not None and rng.random() < 0.7:
                    keys = [rng.randrange(KEYS) for _ in range(rng.randint(1, 40))]
                    cluster.publish(name, rng.choice(("item", "user")), keys, float(step), delete=rng.random() < 0.1)
            for _ in range(2):
                cluster.run(rng.choice((10, 40, 80)))
                problem = watch.check()
                assert not problem, f"seed {seed}, step {step}: {problem}"
        problem = watch.check_queues()
        assert not problem, f"seed {seed}: {problem}"
        settle(cluster, watch)


def disturb(cluster: VirtualCluster, rng: random.Random) -> None:
    """A node is cut off, or comes back; or is killed, and starts again."""
    away, others = rng.choice(list(REGIONS)), list(REGIONS)
    if cluster.cut or rng.random() < 0.4:
        cluster.cut = set()
    elif rng.random() < 0.5:
        cluster.cut = {(away, other) for other in others} | {(other, away) for other in others}
    else:
        cluster.crash(away)
        cluster.run(200)
        cluster.restart(away, keep_state=rng.random() < 0.7)


def settle(cluster: VirtualCluster, watch: Watch) -> None:
    """All faults end: every node holds the same, and batches pass through again."""
    cluster.cut, cluster.options = set(), NetworkOptions(1, 5)
    assert cluster.run_until(lambda: check_converged(cluster) == "", 90_000, 500), (
        f"seed {cluster.seed}: {check_converged(cluster)}"
    )
    problem = watch.check_converged()
    assert not problem, f"seed {cluster.seed}: {problem}"
    assert cluster.run_until(lambda: not in_state_mode(cluster), 30_000), f"seed {cluster.seed}: state mode is not left"


def in_state_mode(cluster: VirtualCluster) -> list[str]:
    """Links in state mode, from both sides."""
    found = []
    for node in cluster.nodes.values():
        if node.machine is None:
            continue
        core = node.machine._core
        found += [f"{node.name}>{boot}" for keyspace in core.keyspaces.values() for boot in keyspace.backlogs]
        found += [f"{node.name}<{feed.node}" for keyspace in core.keyspaces.values() for feed in keyspace.feeds.values()]
    return found


def pair(seed: int, rate: float = 6.0) -> VirtualCluster:
    """A trainer and one node, whose link becomes narrow after they met."""
    cluster = VirtualCluster(seed, NetworkOptions(1, 5))
    cluster.collect_ms = 400
    cluster.add("t1", "home", "train")
    cluster.add("eu1", "eu", seeds=["t1"])
    cluster.run(4_000)
    assert cluster.publish("t1", "item", [0], -1.0)
    cluster.run(1_000)
    cluster.options = NetworkOptions(1, 5, links={"eu/home": LinkOptions(10, rate)})
    return cluster


def backlog_of(cluster: VirtualCluster, parent: str, child: str) -> Backlog | None:
    """State mode of a link, in the first keyspace."""
    machine = cluster.nodes[parent].machine
    assert machine is not None
    for boot, one in next(iter(machine._core.keyspaces.values())).backlogs.items():
        if machine._core.by_boot[boot].node == child:
            assert isinstance(one, Backlog)
            return one
    return None


def fill(cluster: VirtualCluster, steps: int, keys: int = KEYS, every_ms: int = 20) -> None:
    """Write faster than a narrow link carries."""
    for step in range(steps):
        cluster.publish("t1", "item", [(step * 7 + number) % keys for number in range(8)], float(step))
        cluster.run(every_ms)


def fill_checked(cluster: VirtualCluster, watch: Watch, steps: int, keys: int) -> None:
    """The same, two at a time, and nothing is claimed that is not there."""
    for step in range(steps):
        fill(cluster, 2, keys)
        problem = watch.check()
        assert not problem, f"seed {cluster.seed}, step {step}: {problem}"
