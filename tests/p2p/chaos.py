"""The scenario of the fault tests: six nodes in three regions, every fault at once, and the checkers at each step."""

from unittest import mock

from ekko.model import ModelSpec, TableSpec
from p2p import wire
from p2p.core import Keyspace
from p2p.members import gossip
from p2p.members.trees import Trees
from p2p.messages import Batch, Now
from p2p.paper.sync import PUSH, SyncOptions
from p2p.pulling import outbox
from p2p.pushing import push
from p2p.pushing.groups import LINGER_MS
from p2p.stamps import unix_ms_of
from sim_cluster.checkers import Watch, check_converged, check_knowledge, contents
from sim_cluster.meter import Meter
from sim_cluster.network import NetworkOptions
from sim_cluster.node import address_of
from sim_cluster.version_watch import VersionWatch
from sim_cluster.virtual import VirtualCluster

CALM = NetworkOptions()
FAULTS = NetworkOptions(1, 30, 40, loss_probability=0.1, repeat_probability=0.1, reorder_probability=0.2)
REGIONS = {"train": ("t1",), "eu": ("eu1", "eu2"), "us": ("us1", "us2", "us3")}


def form(seed: int, options: NetworkOptions = CALM, model: ModelSpec | None = None, sync: SyncOptions = PUSH) -> VirtualCluster:
    """Start the six nodes; they have yet to meet."""
    cluster = VirtualCluster(seed, options, model, sync=sync)
    for region, names in REGIONS.items():
        for name in names:
            cluster.add(name, region, "train" if region == "train" else "serve", [] if name == "t1" else ["t1"])
    return cluster


def at_rest(cluster: VirtualCluster, limit_ms: int = 60_000) -> None:
    """Wait until nothing differs any more, then check what everybody claims."""
    assert cluster.run_until(lambda: check_converged(cluster) == "", limit_ms), check_converged(cluster)
    check_claims(cluster)


def check_claims(cluster: VirtualCluster) -> None:
    """Invariant 3 on every node."""
    for node in cluster.nodes.values():
        assert check_knowledge(cluster, node) == "", f"seed {cluster.seed}, {cluster.now_ms} ms"


def chaos(seed: int, sync: SyncOptions = PUSH) -> None:
    """One run; raises AssertionError on the first violation. Messages are cut small, so that parts and chunks are many."""
    with mock.patch.object(wire, "BATCH_BYTES_MAX", 150), mock.patch.object(outbox, "CHUNK_BYTES_MAX", 300):
        cluster = form(seed, FAULTS, sync=sync)
        watch, versions = Watch(cluster), VersionWatch(cluster)
        cluster.run(3_000)
        for step in range(60):
            if cluster.nodes["t1"].machine is not None:
                keys = [(step * 7 + offset) % 40 for offset in range(1 + step % 9)]
                cluster.publish("t1", "item" if step % 3 else "user", keys, float(step), delete=step % 11 == 0)
            disturb(cluster, step, seed)
            problem = ""
            for _ in range(4):
                cluster.run(15)
                problem = problem or versions.check()
            problem = problem or watch.check()
            assert problem == "", f"seed {seed}, {cluster.now_ms} ms: {problem}"
        cluster.options = CALM
        at_rest(cluster)
        assert watch.check_converged() == ""
        assert versions.check() == ""
        assert versions.versions or not sync.shard_versions


def disturb(cluster: VirtualCluster, step: int, seed: int) -> None:
    """Crashes and restarts, with and without memory, at fixed steps of a scenario."""
    match step:
        case 15:
            cluster.crash("us1")
        case 20:
            cluster.crash("t1")
        case 25:
            cluster.restart("t1")
        case 30:
            cluster.restart("us1", keep_state=seed % 2 == 0)
        case 40:
            cluster.crash("t1")
            cluster.restart("t1", keep_state=seed % 3 != 0)
            cluster.run(4_000)  # a training node that lost its memory learns before it goes on


def origin_dies_in_mid_push(seed: int) -> None:
    """A step was lost, the next one reached one region as strays, and its origin is gone for good (R8)."""
    cluster = form(seed)
    assert cluster.run_until(
        lambda: all(node.machine and node.machine.status(cluster.now()).synced for node in cluster.nodes.values())
    )
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(500)
    cluster.options = NetworkOptions(loss_probability=1.0)
    cluster.publish("t1", "item", [1], 2.0)
    cluster.options = CALM
    cluster.cut |= {("t1", name) for name in REGIONS["us"]}
    cluster.run(LINGER_MS)  # or it would be held, and its origin would be gone before it is sent
    cluster.publish("t1", "item", [1], 3.0)
    cluster.run(12)
    cluster.crash("t1")
    held = [contents(cluster.nodes[name].store, "ctr") for name in ("eu1", "us1")]
    assert held[0] != held[1], "the scenario did not leave strays"
    cluster.run(10_000)
    live = [contents(node.store, "ctr") for node in cluster.nodes.values() if node.machine is not None]
    assert all(one == live[0] for one in live), f"seed {seed}: nodes stay apart"


def writing_goes_on_while_a_node_joins(seed: int) -> None:
    """A join is answered in many chunks while new steps are written, and push loses them all."""
    with mock.patch.object(outbox, "CHUNK_BYTES_MAX", 300), mock.patch.object(push.Push, "_forward"):
        cluster = VirtualCluster(seed)
        cluster.add("t1", "train", "train")
        for step in range(20):
            cluster.publish("t1", "item", range(step * 20, step * 20 + 20), 1.0)
        joiner = cluster.add("eu1", "eu", seeds=["t1"])
        for step in range(400):
            cluster.publish("t1", "user", [step], float(step))
            cluster.run(1)
            assert check_knowledge(cluster, joiner) == "", f"seed {seed}, {cluster.now_ms} ms"
        at_rest(cluster)


def a_writer_returns_without_its_memory(seed: int) -> None:
    """Its last step reached one region; it comes back empty, meets the other region only, and writes on (R4)."""
    cluster = form(seed)
    cluster.run(5_000)
    assert cluster.publish("t1", "item", [1, 2], 1.0)
    cluster.run(1_000)
    apart = {(one, other) for one in REGIONS["eu"] for other in REGIONS["us"]} | {("t1", name) for name in REGIONS["us"]}
    cluster.cut = apart | {(other, one) for one, other in apart}
    assert cluster.publish("t1", "item", [2, 3], 2.0)
    cluster.run(300)
    cluster.crash("t1")
    cluster.nodes["t1"].seeds = (address_of("us1"),)
    apart = {(one, other) for one in REGIONS["eu"] for other in (*REGIONS["us"], "t1")}
    cluster.cut = apart | {(other, one) for one, other in apart}
    cluster.run(100)
    cluster.restart("t1", keep_state=False)
    assert cluster.run_until(lambda: cluster.publish("t1", "item", range(100, 160), 3.0) != 0, 60_000), (
        "the writer never came back"
    )
    cluster.run(1_000)
    cluster.cut = set()
    at_rest(cluster)


def origin_dies_between_two_messages(seed: int) -> None:
    """One message of its last step reached one region and is claimed there; nothing but the vectors differs (R9)."""
    cluster = form(seed)
    cluster.run(5_000)
    forward, calls = push.Push._forward, []

    def only_the_first(self: push.Push, keyspace: Keyspace, batch: Batch, hops: int, trees: Trees, now: Now) -> None:
        if hops or not calls:
            calls.append(batch.stamp)
            forward(self, keyspace, batch, hops, trees, now)

    cluster.cut |= {("t1", name) for name in REGIONS["us"]}
    with mock.patch.object(wire, "BATCH_BYTES_MAX", 60), mock.patch.object(push.Push, "_forward", only_the_first):
        cluster.publish("t1", "item", range(30), 1.0)
        cluster.run(12)
        cluster.crash("t1")
    cluster.run(20_000)
    live = [contents(node.store, "ctr") for node in cluster.nodes.values() if node.machine is not None]
    assert any(live), "the scenario did not leave anything"
    assert all(one == live[0] for one in live), f"seed {seed}: nodes stay apart"


def a_clock_runs_ahead(seed: int) -> None:
    """What a trainer with a wrong clock writes is refused and moves nobody's rows, knowledge or clock (R14, R17)."""
    cluster = form(seed)
    cluster.add("t2", "ap", "train", ["t1"])
    cluster.run(8_000)
    assert cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    cluster.shift_clock("t1", 600_000)
    assert not cluster.publish("t1", "item", [1, 2], 2.0), "it writes although its peers say that its clock is wrong"
    with mock.patch.object(gossip.Gossip, "check_clock"):
        assert cluster.publish("t1", "item", [1, 2], 2.0)
    cluster.run(1_000)
    assert cluster.violations == []
    assert cluster.nodes["t2"].rejected, "the scenario was refused by nobody"
    cluster.crash("t1")
    cluster.history = cluster.history[:1]
    stamps: list[int] = []
    assert cluster.run_until(lambda: bool(stamps.append(cluster.publish("t2", "item", [3], 3.0)) or stamps[-1]))
    assert unix_ms_of(stamps[-1]) <= cluster.now().unix_ms, f"seed {seed}: a clock follows the wrong one"
    at_rest(cluster)


def a_clock_goes_back(seed: int) -> None:
    """A trainer restarts with its memory under a clock that was set back; its later steps still win."""
    cluster = form(seed)
    cluster.run(5_000)
    first = cluster.publish("t1", "item", [1], 1.0)
    cluster.run(500)
    cluster.crash("t1")
    cluster.shift_clock("t1", -15_000)
    cluster.restart("t1")
    cluster.run(3_000)
    assert cluster.publish("t1", "item", [1], 2.0) > first, f"seed {seed}: a later step has an earlier stamp"
    at_rest(cluster)


def nothing_goes_wrong(seed: int) -> None:
    """Invariant 10: each batch enters a region once and a node once; and a shard's batches always enter at one node (R1)."""
    cluster = VirtualCluster(seed, NetworkOptions(region_delay_ms=30))
    cluster.add("t1", "train", "train")
    for number in range(12):
        cluster.add(f"n{number}", f"region-{number % 2}", seeds=["t1"])
    cluster.run(5_000)
    meter = cluster.meter = Meter()
    for step in range(20):
        cluster.publish("t1", "item", range(step, step + 30), float(step))
        cluster.run(100)
    at_rest(cluster)
    twice = [place for place, times in meter.into_region.items() if times > 1]
    assert not twice, f"seed {seed}: entered a region twice: {twice[:3]}"
    repeats = [node.name for node in cluster.nodes.values() if node.machine and node.machine.counters.batches_repeated]
    assert not repeats, f"seed {seed}: batches came twice to {repeats}"
    paths = {shard: nodes for shard, nodes in meter.entries.items() if len(nodes) > 1}
    assert not paths, f"seed {seed}: a shard enters a region on several paths: {paths}"


def rows_are_rounded_once(seed: int) -> None:
    """Values that no codec has exactly: whoever got them by push or by pull holds the bits that the origin holds (R20)."""
    cluster = form(seed, model=ModelSpec("ctr", 8, {"item": TableSpec("item", 4, "float16")}, codec="float16"))
    watch = Watch(cluster)
    cluster.run(5_000)
    cluster.crash("us1")
    for step in range(5):
        assert cluster.publish("t1", "item", range(step, step + 20), 1.1 + step / 7)
        cluster.run(200)
    cluster.restart("us1")
    cluster.add("ap1", "ap", seeds=["eu1"])
    cluster.run(3_000)
    at_rest(cluster)
    assert watch.check_converged() == "", f"seed {seed}: {watch.check_converged()}"
