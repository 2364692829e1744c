"""Scenarios of writer ids: who gets them, who loses them, and what happens when somebody has one that is not his."""

from collections.abc import Callable
from unittest import mock

from p2p import messages as m
from p2p.core import Core
from p2p.identity import allotment
from p2p.identity.ledger import NodeRecord
from p2p.identity.writers import BLOCKS
from p2p.link.links import Link
from p2p.members.membership import SILENCE_MS_MAX
from p2p.stamps import writer_of
from sim_cluster.checkers import Watch, contents
from sim_cluster.network import NetworkOptions
from sim_cluster.node import MemoryLedger, VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, at_rest, form

LOSSY = NetworkOptions(1, 30, 40, loss_probability=0.1, repeat_probability=0.1, reorder_probability=0.2)


def record_of(node: VirtualNode) -> NodeRecord:
    """What a node's ledger says, also while it is down."""
    return NodeRecord.load(node.ledger)


def check_ids(cluster: VirtualCluster) -> None:
    """No block of ids is in two hands, and no id is bound to two nonces anywhere (R12)."""
    owners: dict[int, str] = {}
    nonces: dict[tuple[int, int], int] = {}
    for node in cluster.nodes.values():
        record = record_of(node)
        for block in record.blocks:
            other = owners.setdefault(block, node.name)
            assert other == node.name, f"seed {cluster.seed}: block {block} of writer ids belongs to {other} and {node.name}"
        for writer, nonce in record.bindings.items():
            assert nonces.setdefault(writer, nonce) == nonce, f"seed {cluster.seed}: {writer} is bound to two nonces"


def caught_up(cluster: VirtualCluster, name: str) -> bool:
    """The node holds what its cluster holds."""
    machine = cluster.nodes[name].machine
    return machine is not None and machine.status(cluster.now_of(cluster.nodes[name])).synced


def formed(cluster: VirtualCluster) -> None:
    """Everybody has caught up."""
    assert cluster.run_until(lambda: all(caught_up(cluster, name) for name in cluster.nodes)), "the cluster never formed"


def writes(cluster: VirtualCluster, name: str, limit_ms: int = 20_000) -> int:
    """The stamp of a step that a node publishes as soon as it can."""
    stamps: list[int] = []

    def published() -> bool:
        stamps.append(cluster.publish(name, "item", [1, len(stamps)], float(cluster.now_ms)))
        return stamps[-1] != 0

    assert cluster.run_until(published, limit_ms), f"seed {cluster.seed}: {name} cannot write: {last_reply(cluster, name)}"
    return stamps[-1]


def last_reply(cluster: VirtualCluster, name: str) -> m.Reply | None:
    """What a node answered last."""
    return next(reversed(cluster.nodes[name].replies.values()), None)


def split(cluster: VirtualCluster, side: set[str]) -> None:
    """Nothing passes between these nodes and the others."""
    rest = set(cluster.nodes) - side
    cluster.cut = {(one, other) for one in side for other in rest} | {(other, one) for one in side for other in rest}


def several_write_at_once(seed: int) -> None:
    """Training nodes in three regions write the same keys; they crash, and two of them lose their memory on the way."""
    cluster = form(seed, LOSSY)
    for name, region in (("t2", "eu"), ("t3", "us")):
        cluster.add(name, region, "train", ["t1"])
    formed(cluster)
    watch = Watch(cluster)
    for name in ("t1", "t2", "t3"):
        writes(cluster, name)
    for step in range(60):
        for place, name in enumerate(("t1", "t2", "t3")):
            if cluster.nodes[name].machine is not None and caught_up(cluster, name):
                cluster.publish(name, "item", [(step * 7 + place * offset) % 30 for offset in range(4)], step + place / 10)
        match step:
            case 10 | 30:
                cluster.crash("t2")
            case 15 | 35:
                cluster.restart("t2", keep_state=step == 15)
            case 20:
                cluster.crash("t1")
            case 40:
                cluster.restart("t1", keep_state=seed % 2 == 0)
        cluster.run(100)
        assert watch.check() == "", f"seed {seed}, {cluster.now_ms} ms"
        check_ids(cluster)
    cluster.options = CALM
    at_rest(cluster)
    for name in ("t1", "t2", "t3"):
        writes(cluster, name)
    at_rest(cluster)
    check_ids(cluster)
    writers = {writer_of(write.stamp) for write in cluster.history}
    assert len(writers) >= 4, "a training node that lost its memory wrote on under its old id"


def the_founder_leaves_as_soon_as_it_has_founded(seed: int) -> None:
    """The next training node has not heard of it, while others have: it must not found another cluster."""
    cluster = form(seed)
    cluster.add("t2", "eu", "train", ["t1"])
    formed(cluster)
    cluster.cut = {(name, "t2") for name in cluster.nodes}
    assert cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_200)
    cluster.cut = set()
    cluster.leave("t1")
    writes(cluster, "t2")
    clusters = {record_of(node).cluster for node in cluster.nodes.values()}
    assert len(clusters - {0}) == 1, f"seed {seed}: two clusters"
    cluster.restart("t1")
    cluster.run(3_000)
    writes(cluster, "t1")
    at_rest(cluster)
    check_ids(cluster)


def a_cluster_is_split_before_it_is_founded(seed: int) -> None:
    """Both sides have a training node that wants to write; one of them founds, the other waits and says for whom."""
    cluster = form(seed)
    cluster.add("t2", "eu", "train", ["t1"])
    formed(cluster)
    split(cluster, {"t1"} if seed % 2 else {"t1", "us1", "us2", "us3"})
    cluster.run(SILENCE_MS_MAX + 2_000)
    writes(cluster, "t1")
    assert not cluster.publish("t2", "item", [1], 1.0)
    cluster.run(10_000)
    assert "node 't1', which is silent, may have founded the cluster" in str(last_reply(cluster, "t2"))
    cluster.cut = set()
    writes(cluster, "t2", 60_000)
    writes(cluster, "t1", 60_000)
    cluster.run(3_000)
    assert len({record_of(node).cluster for node in cluster.nodes.values()}) == 1, f"seed {seed}: two clusters"
    at_rest(cluster)
    check_ids(cluster)


def an_allotter_crashes_as_it_answers(seed: int) -> None:
    """It has recorded that a block is gone, and nobody was told, or only just; later it comes back, and is asked again."""
    cluster = form(seed)
    formed(cluster)
    crashes: list[str] = []
    original = Core.send

    def send(self: Core, link: Link, message: m.Message) -> None:
        if isinstance(message, m.BlockGrant) and message.blocks and len(crashes) < 3:
            crashes.append(self.options.node)
            if seed % 2:
                cluster.post.transmit(cluster.nodes[self.options.node], link.address, link.envelope(), message)
            cluster.crash(self.options.node)
            return
        original(self, link, message)

    with mock.patch.object(Core, "send", send):
        writes(cluster, "t1")
        for name, region in (("t2", "eu"), ("t3", "us")):
            cluster.add(name, region, "train", ["t1"])
        for _ in range(40):
            cluster.run(1_000)
            check_ids(cluster)
            for node in cluster.nodes.values():
                if node.machine is None:
                    cluster.restart(node.name)
    assert len(crashes) == 3, "the scenario did not crash anybody"
    for name in ("t1", "t2", "t3"):
        writes(cluster, name)
        check_ids(cluster)
    at_rest(cluster)


def a_side_has_blocks_of_its_own(seed: int) -> None:
    """A split leaves the founder on one side; the stewards of the other one give blocks to a writer that comes up there."""
    cluster = form(seed)
    formed(cluster)
    writes(cluster, "t1")
    cluster.run(10_000)
    split(cluster, {"us1", "us2", "us3", "t2"})
    cluster.add("t2", "us", "train", ["us1"])
    cluster.cut |= {(one, "t2") for one in ("t1", "eu1", "eu2")} | {("t2", one) for one in ("t1", "eu1", "eu2")}
    writes(cluster, "t2")
    writes(cluster, "t1")
    check_ids(cluster)
    cluster.cut = set()
    at_rest(cluster)


def a_side_without_blocks_adds_no_writer(seed: int) -> None:
    """It says so, is not ready, and goes on when the split ends."""
    with mock.patch.object(allotment, "STEWARDS", 0):
        cluster = form(seed)
        formed(cluster)
        writes(cluster, "t1")
        cluster.run(3_000)
        split(cluster, {"us1", "us2", "us3"})
        cluster.add("t2", "us", "train", ["us1"])
        cluster.cut |= {(one, "t2") for one in ("t1", "eu1", "eu2")} | {("t2", one) for one in ("t1", "eu1", "eu2")}
        cluster.run(SILENCE_MS_MAX + 4_000)
        assert cluster.publish("t2", "item", [1], 2.0) == 0, "it found an id that nobody gave it"
        machine = cluster.nodes["t2"].machine
        assert machine is not None
        assert "in sight" in machine.ids_wanted
        cluster.cut = set()
        writes(cluster, "t2", 40_000)
        assert machine.ids_wanted == ""
        check_ids(cluster)
        at_rest(cluster)


def a_machine_is_cloned(seed: int) -> None:
    """A copy of a training node's disk starts under another name: both use the next id, under two nonces (R12)."""
    cluster = form(seed)
    formed(cluster)
    writes(cluster, "t1")
    cluster.run(1_000)
    cluster.crash("t1")
    copy = cluster.nodes["t1"].ledger.record
    cluster.restart("t1", keep_state=False)  # so that it needs the next id, too
    cluster.nodes["clone"] = VirtualNode("clone", "us", "train", ("virtual://us1",), cluster.model, ledger=MemoryLedger(copy))
    split(cluster, {"us1", "us2", "us3", "clone"})
    cluster.boot(cluster.nodes["clone"])
    acknowledged = len(cluster.history)
    # Each side binds the same id before it hears of the other, and writes different rows with it.
    _force(cluster, "t1", [10, 11], 1.0)
    _force(cluster, "clone", [20, 21], 2.0)
    cluster.run(1_000)
    _force(cluster, "t1", [12], 3.0)
    ids = {writer_of(write.stamp) for write in cluster.history[acknowledged:]}
    assert len(ids) == 1, "the scenario did not give one id to two nodes"
    cluster.run(1_000)
    item = cluster.model.tables["item"].id
    theirs = {"t1": {(item, key) for key in (10, 11, 12)}, "clone": {(item, key) for key in (20, 21)}}
    sides = {
        node.name: theirs["clone" if node.name in ("clone", "us1", "us2", "us3") else "t1"] for node in cluster.nodes.values()
    }
    cluster.cut = set()
    for _ in range(20):
        cluster.run(1_000)
        for node in cluster.nodes.values():
            mixed = (theirs["t1"] | theirs["clone"]) & contents(node.store, "ctr").keys()
            assert mixed == sides[node.name], f"seed {seed}: {node.name} merged the streams of two writers"
    alarms = [note for node in cluster.nodes.values() for note in node.notes if note.name == "writer_conflict" and note.alarm]
    assert alarms, "nobody was told"


def _force(cluster: VirtualCluster, name: str, keys: list[int], value: float) -> None:
    stamps: list[int] = []

    def published() -> bool:
        stamps.append(cluster.publish(name, "item", keys, value))
        return stamps[-1] != 0

    assert cluster.run_until(published, 60_000), f"{name} cannot write: {last_reply(cluster, name)}"


def the_founder_is_lost(seed: int) -> None:
    """Its machine is gone for good; a new training node gets ids from whom the founder gave some."""
    cluster = form(seed)
    formed(cluster)
    writes(cluster, "t1")
    cluster.run(5_000)
    at_rest(cluster)
    cluster.crash("t1")
    cluster.run(SILENCE_MS_MAX)
    cluster.add("t2", "eu", "train", ["us1"])
    writes(cluster, "t2")
    check_ids(cluster)
    at_rest(cluster)


def training_nodes_without_disks_are_deployed_again_and_again(seed: int, deployments: int = 40) -> None:
    """Each goes in order and comes back with nothing at all, the founder too; everybody writes after every deployment."""
    cluster = VirtualCluster(seed)
    cluster.add("eu1", "eu", "serve")
    for name, region, role in (("t1", "eu", "train"), ("t2", "us", "train"), ("eu2", "eu", "serve"), ("us1", "us", "serve")):
        cluster.add(name, region, role, ["eu1"])
    formed(cluster)
    trainers = ("t1", "t2")
    for name in trainers:
        writes(cluster, name)
    cluster.run(5_000)
    stamps = set[int]()
    for _ in range(deployments):
        for name in trainers:
            cluster.leave(name)
            cluster.run(200)
            cluster.nodes[name].ledger = MemoryLedger()
            cluster.restart(name, keep_state=False)
            stamps.add(writes(cluster, name))
            check_ids(cluster)
    assert len({writer_of(stamp) for stamp in stamps}) == deployments * len(trainers), "two lives wrote under one id"
    at_rest(cluster)


def a_cluster_of_version_1_gets_blocks(seed: int) -> None:
    """Its ids were granted by its training nodes themselves; upgraded, it is founded anew, and none of them is used again."""
    cluster = VirtualCluster(seed)
    for name, region, role in (("t1", "train", "train"), ("eu1", "eu", "serve"), ("us1", "us", "serve")):
        cluster.add(name, region, role, [] if name == "t1" else ["t1"], protocol_version=1)
    formed(cluster)
    writes(cluster, "t1")
    at_rest(cluster)
    for name in ("us1", "t1", "eu1"):
        cluster.crash(name)
        cluster.nodes[name].protocol_version = 2
        cluster.restart(name)
        cluster.run(8_000)
    cluster.add("t2", "eu", "train", ["us1"])
    cluster.run(3_000)
    cluster.crash("t1")
    cluster.restart("t1", keep_state=seed % 2 == 0)
    cluster.run(3_000)
    writes(cluster, "t2")
    writes(cluster, "t1")
    check_ids(cluster)
    at_rest(cluster)
    assert sum(len(record_of(node).blocks) for node in cluster.nodes.values()) == BLOCKS, (
        "it was not founded, or more than once"
    )


SCENARIOS: tuple[Callable[[int], None], ...] = (
    several_write_at_once,
    an_allotter_crashes_as_it_answers,
    a_side_has_blocks_of_its_own,
    a_side_without_blocks_adds_no_writer,
    a_machine_is_cloned,
    the_founder_is_lost,
    training_nodes_without_disks_are_deployed_again_and_again,
    the_founder_leaves_as_soon_as_it_has_founded,
    a_cluster_is_split_before_it_is_founded,
    a_cluster_of_version_1_gets_blocks,
)
