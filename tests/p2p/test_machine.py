"""Whole clusters in virtual time: the machine, the codec and the store together."""

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import knowledge as knowledge_module
from p2p import messages as m
from p2p import wire
from p2p.link.links import ACK_DELAY_MS
from p2p.machine import Machine, MachineOptions
from p2p.members import membership
from p2p.members.introductions import ALONE_MS
from p2p.pushing import push as push_module
from p2p.replica import RowColumns
from p2p.stamps import EPOCH_MS, make_stamp
from sim_cluster.checkers import check_converged, check_knowledge, contents
from sim_cluster.network import NetworkOptions
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import (
    CALM,
    REGIONS,
    at_rest,
    chaos,
    form,
    origin_dies_in_mid_push,
    writing_goes_on_while_a_node_joins,
)
from tests.p2p.writer_chaos import writes
from tests.seeds import seeds


def start(seed: int = 1, options: NetworkOptions = CALM, model: ModelSpec | None = None) -> VirtualCluster:
    cluster = form(seed, options, model)
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes)), "the cluster never formed"
    return cluster


def synced(cluster: VirtualCluster, name: str) -> bool:
    machine = cluster.nodes[name].machine
    return machine is not None and machine.status(cluster.now()).synced


def counters(cluster: VirtualCluster, name: str) -> object:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine.counters


def test_a_step_reaches_every_node_once_by_push_alone() -> None:
    cluster = start()
    stamp = cluster.publish("t1", "item", range(100), 1.5)
    cluster.run(40)  # before any heartbeat could start a pull
    assert check_converged(cluster) == ""
    for name in cluster.nodes:
        replica = cluster.nodes[name].store.models["ctr"]
        assert int(replica.frontier[0]) >= stamp
        assert counters(cluster, name).pulls_started <= 1, "one to join"
        assert counters(cluster, name).batches_repeated == 0
    # Invariant 12: each batch enters a region once.
    leaders = [sum(counters(cluster, name).batches_received for name in names) for names in REGIONS.values()]
    assert leaders[0] == 0
    children = cluster.nodes["t1"].machine.counters.batches_forwarded
    assert children == 2 * cluster.nodes["t1"].machine.counters.batches_published + 2 * idle_beats(cluster)


def test_links_of_the_trees_are_open_before_anything_is_sent() -> None:
    cluster = start()
    for node in cluster.nodes.values():
        assert node.machine is not None
        core, pushing = node.machine._core, node.machine._push
        core.links.clear()  # gossip may have opened them
        core.by_boot.clear()
        pushing.open_links(cluster.now())
        children = core.membership.trees(cluster.now_ms).children("t1", 0)
        # Who writes sends to leaders; the others learn with the first batch that it writes.
        assert set(core.links) == set(children if node.name == "t1" else ())
        assert children or node.name != "t1"


def idle_beats(cluster: VirtualCluster) -> int:
    received = counters(cluster, "eu1").batches_received
    return received - cluster.nodes["t1"].machine.counters.batches_published


def test_deletes_and_later_writes_win_everywhere() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1, 2, 3], 1.0)
    cluster.publish("t1", "item", [2], delete=True)
    cluster.publish("t1", "item", [3], 3.0)
    at_rest(cluster)
    held = contents(cluster.nodes["us3"].store, "ctr")
    item = cluster.model.tables["item"].id
    assert held[item, 2][1] == b""
    assert np.frombuffer(held[item, 3][1], np.float32).tolist() == [3.0] * 4


@pytest.mark.parametrize("seed", seeds(6, 12))
def test_faults_end_in_equal_stores(seed: int) -> None:
    """Loss, repeats, reordering, crashes with and without memory: at rest all is well (invariants 1, 2, 3)."""
    chaos(seed)


@pytest.mark.parametrize("scenario", [origin_dies_in_mid_push, writing_goes_on_while_a_node_joins], ids=lambda s: s.__name__)
def test_directed(scenario: Callable[[int], None]) -> None:
    scenario(1)


def test_one_seed_gives_one_trace() -> None:
    def trace(seed: int) -> str:
        cluster = start(seed, NetworkOptions(1, 20, 10, 0.05, 0.05, 0.1))
        for step in range(20):
            cluster.publish("t1", "item", range(step, step + 5), float(step))
            cluster.run(50)
        return cluster.trace

    assert trace(7) == trace(7)
    assert trace(7) != trace(8)


def test_pull_alone_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theorem T7: push may lose everything."""
    cluster = start()
    monkeypatch.setattr(push_module.Push, "_forward", lambda *_args, **_kwargs: None)
    for step in range(5):
        cluster.publish("t1", "item", range(step * 10, step * 10 + 10), float(step))
        cluster.run(100)
    at_rest(cluster)


def test_a_node_that_was_away_catches_up_and_the_others_do_not_notice() -> None:
    cluster = start()
    cluster.crash("eu1")
    for step in range(50):
        cluster.publish("t1", "item", range(step * 3, step * 3 + 3), float(step))
        cluster.run(20)
    pulls = {name: counters(cluster, name).pulls_started for name in ("us1", "us2", "us3")}
    cluster.restart("eu1")
    at_rest(cluster)
    assert {name: counters(cluster, name).pulls_started for name in pulls} == pulls


def test_a_new_node_gets_everything_in_several_chunks() -> None:
    wide = ModelSpec("ctr", 8, {"item": TableSpec("item", 1024)})
    cluster = start(model=wide)
    for start_key in range(0, 1_500, 500):
        cluster.publish("t1", "item", range(start_key, start_key + 500), 2.0)
        cluster.run(20)
    cluster.add("ap1", "ap", seeds=["us1"])
    at_rest(cluster)
    assert counters(cluster, "ap1").pull_rows_received == 1_500
    assert cluster.run_until(lambda: synced(cluster, "ap1"))


def test_a_step_over_the_size_limit_travels_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BATCH_BYTES_MAX", 600)
    cluster = start()
    cluster.publish("t1", "item", range(200), 1.0)
    cluster.publish("t1", "item", range(100, 300), 2.0)
    cluster.run(60)
    assert check_converged(cluster) == "", "without a pull"
    assert counters(cluster, "us3").batches_received > 10
    # One part of one shard lost: its shard is not claimed, and the pull repairs it.
    cluster.options = NetworkOptions(loss_probability=0.2)
    cluster.publish("t1", "item", range(400), 3.0)
    cluster.run(60)
    for node in cluster.nodes.values():
        assert check_knowledge(cluster, node) == ""
    cluster.options = CALM
    at_rest(cluster)


def test_a_large_cluster_spreads_a_step_over_several_trees() -> None:
    cluster = VirtualCluster(3, model=ModelSpec("ctr", 64, {"item": TableSpec("item", 4)}))
    cluster.add("t1", "train", "train")
    for number in range(12):
        cluster.add(f"n{number}", ("eu", "us")[number % 2], seeds=["t1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    cluster.run(2_000)  # everybody has met everybody
    for step in range(10):
        cluster.publish("t1", "item", range(step, 400 + step), float(step))
        cluster.run(20)
    cluster.run(50)
    assert check_converged(cluster) == "", "without a pull"
    received = [counters(cluster, name).batches_received for name in cluster.nodes if name != "t1"]
    assert min(received) >= 40, "one message for each tree of each step"
    assert sum(counters(cluster, name).batches_repeated for name in cluster.nodes) == 0
    forwarded = [counters(cluster, name).batches_forwarded for name in cluster.nodes if name != "t1"]
    assert sum(1 for count in forwarded if count) > 4, "interior nodes of one tree are leaves of others"


def test_a_lost_last_batch_is_noticed_by_the_idle_beat() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    cluster.options = NetworkOptions(loss_probability=1.0)
    cluster.publish("t1", "item", [2], 2.0)
    cluster.run(30)
    cluster.options = CALM
    lost_ms = cluster.now_ms
    at_rest(cluster)
    assert cluster.now_ms - lost_ms < 500, "sooner than a heartbeat's round"


def test_the_last_beat_of_a_dead_writer_reaches_all_without_a_pull() -> None:
    """It has no rows, so no vector tells who got it; nobody is to pull for it later, when other batches are on their way."""
    cluster = start()
    cluster.add("t2", "eu", "train", ["t1"])
    cluster.run(5_000)
    writes(cluster, "t2")
    cluster.run(1_000)
    far = [name for name in cluster.nodes if not name.startswith("eu")]
    cluster.cut = {(one, other) for one in ("t2", "eu1", "eu2") for other in far}
    cluster.run(250)
    cluster.crash("t2")
    writer = cluster.nodes["t2"].store.models["ctr"].writer
    del cluster.nodes["t2"]
    cluster.cut = set()
    assert writer is not None

    def frontiers() -> set[int]:
        return {int(node.store.models["ctr"].frontier[writer.writer]) for node in cluster.nodes.values()}

    assert len(frontiers()) == 2, "the scenario left nothing to learn"
    cluster.run(5_000)
    assert len(frontiers()) == 1
    before = sum(node.machine.counters.pulls_started for node in cluster.nodes.values() if node.machine)
    for step in range(100):
        assert cluster.publish("t1", "item", [step], 2.0)
        cluster.run(37)
    assert sum(node.machine.counters.pulls_started for node in cluster.nodes.values() if node.machine) == before


def test_a_node_that_is_late_pulls_only_when_nothing_comes_any_more() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(2_000)
    node = cluster.nodes["us3"]
    assert node.machine is not None
    pull, core = node.machine._pull, node.machine._core
    keyspace, link = core.keyspaces[cluster.model.id], core.link("t1")
    assert link is not None
    started = node.machine.counters.pulls_started

    def told(ahead_ms: int) -> int:
        """The training node says that it has written far more than what has come; how many pulls there were."""
        stamp = make_stamp(cluster.now().unix_ms + ahead_ms, 0, 0)
        pull.on_summary(link, m.KeyspaceSummary(cluster.model.id, ahead_ms, 0, ((0, stamp),)), cluster.now())
        assert int(keyspace.knowledge.frontier[0]) < stamp
        return node.machine.counters.pulls_started - started

    for ahead_ms in (10_000, 10_001, 10_002):
        assert told(ahead_ms) == 0
        cluster.publish("t1", "item", [2], 1.0)  # moves the frontier
        cluster.run(10)
    assert told(10_003) == 0
    assert told(10_004) == 1


def test_wait_ends_when_all_in_scope_have_it_and_names_who_lags() -> None:
    cluster = start(options=NetworkOptions(region_delay_ms=30))
    stamp = cluster.publish("t1", "item", [1], 1.0)
    number = ask(cluster, stamp, m.Scope.ALL, 5_000)
    assert number not in cluster.nodes["t1"].replies
    cluster.run(200)
    assert cluster.nodes["t1"].replies[number] == m.WaitEnded(number, ())
    cluster.cut.add(("t1", "us1"))
    cluster.cut |= {(a, "us3") for a in cluster.nodes}
    stamp = cluster.publish("t1", "item", [2], 1.0)
    number = ask(cluster, stamp, m.Scope.ALL, 2_000)
    cluster.run(2_500)
    reply = cluster.nodes["t1"].replies[number]
    assert isinstance(reply, m.WaitEnded)
    assert "us3" in reply.lagging
    assert "eu1" not in reply.lagging
    local = ask(cluster, stamp, m.Scope.LOCAL, 0)
    assert cluster.nodes["t1"].replies[local] == m.WaitEnded(local, ())


def test_a_wait_names_whom_it_does_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of R21: suspects are named, also when everybody else has it, and also those that the register forgot long ago."""
    monkeypatch.setattr(membership, "FORGET_MS", 40_000)
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    cluster.crash("eu2")
    cluster.crash("us1")
    for silence_ms in (20_000, membership.FORGET_MS + 10_000):
        cluster.run(silence_ms)
        stamp = cluster.publish("t1", "item", [1], 2.0)
        number = ask(cluster, stamp, m.Scope.ALL, 5_000)
        cluster.run(1_000)
        assert cluster.nodes["t1"].replies[number] == m.WaitEnded(number, (), ("eu2", "us1"))
    assert "eu2" not in cluster.nodes["t1"].machine._core.membership.members
    number = ask(cluster, stamp, m.Scope.REGION, 5_000)
    assert cluster.nodes["t1"].replies[number] == m.WaitEnded(number, ())
    cluster.request("t1", lambda request: m.ExpelRequested(request, "eu2"))
    cluster.run(1_000)
    number = ask(cluster, stamp, m.Scope.ALL, 5_000)
    cluster.run(1_000)
    assert cluster.nodes["t1"].replies[number] == m.WaitEnded(number, (), ("us1",)), "an expelled one is no member"


def ask(cluster: VirtualCluster, stamp: int, scope: m.Scope, timeout_ms: int) -> int:
    number = 0

    def make(request: int) -> m.Event:
        nonlocal number
        number = request
        return m.WaitRequested(request, cluster.model.id, stamp, scope, timeout_ms)

    cluster.request("t1", make)
    return number


def test_wait_for_a_stamp_never_published_is_refused() -> None:
    cluster = start()
    number = ask(cluster, make_stamp(EPOCH_MS + 10**9, 0, 0), m.Scope.ALL, 100)
    reply = cluster.nodes["t1"].replies[number]
    assert isinstance(reply, m.Refused)
    assert "was not published on this node" in reply.reason


def test_serving_nodes_refuse_to_publish() -> None:
    cluster = start()
    rows = np.zeros((1, 16), np.uint8)
    columns = (RowColumns(cluster.model.tables["item"].id, np.array([1], np.uint64), rows),)
    reply = cluster.request("eu1", lambda number: m.PublishRequested(number, cluster.model.id, columns))
    assert isinstance(reply, m.Refused)
    assert "role 'serve'" in reply.reason


def test_a_second_training_node_refuses_while_the_first_lives_among_nodes_of_version_1() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.add("us9", "us", "serve", ["t1"], protocol_version=1)
    cluster.add("t2", "train", "train", ["t1"])
    assert cluster.run_until(lambda: synced(cluster, "t2"))
    cluster.run(1_000)
    assert cluster.publish("t2", "item", [2], 1.0) == 0


def test_a_second_live_node_with_one_id_is_refused() -> None:
    cluster = start()
    twin = dataclasses.replace(cluster.nodes["eu1"], name="eu9", seeds=("virtual://t1",))
    cluster.nodes["eu9"] = twin
    twin.store = type(twin.store).anonymous()
    original_name = "eu1"
    twin.machine = None

    twin.store.add_model(cluster.model, capacity_rows=8)
    options = MachineOptions(original_name, 4242, cluster.now().unix_ms, "eu", "serve", twin.seeds)
    twin.ledger = type(twin.ledger)()
    twin.machine = Machine(options, twin.store, twin.ledger, random.Random(1))
    cluster.feed(twin, twin.machine, m.Started("virtual://eu9"))
    cluster.run(2_000)
    assert "node id 'eu1' is in use by a live node" in twin.fatal
    assert synced(cluster, "eu1")


def test_a_silent_node_leaves_the_trees_and_comes_back() -> None:
    cluster = start()
    cluster.crash("us1")
    cluster.run(membership.SILENCE_MS_MAX + 1_000)
    machine = cluster.nodes["t1"].machine
    assert machine is not None
    alive = {peer.node: peer.alive for peer in machine.status(cluster.now()).peers}
    assert alive == {"eu1": True, "eu2": True, "us1": False, "us2": True, "us3": True}
    skipped = machine.counters.batches_skipped
    cluster.publish("t1", "item", [5], 5.0)
    cluster.run(60)
    assert machine.counters.batches_skipped == skipped
    cluster.restart("us1")
    at_rest(cluster)


def test_staleness_follows_the_live_writer_and_is_unknown_without_one() -> None:
    cluster = start()
    machine = cluster.nodes["us1"].machine
    assert machine is not None
    assert machine.status(cluster.now()).keyspaces[0].synced_until_ms == 0
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(30)
    assert machine.status(cluster.now()).keyspaces[0].synced_until_ms > 0, "known with the first batch"
    cluster.run(2_000)
    behind_ms = cluster.now().unix_ms - machine.status(cluster.now()).keyspaces[0].synced_until_ms
    assert 0 <= behind_ms <= push_module.IDLE_BEAT_MS + 20
    cluster.crash("t1")
    cluster.run(membership.SILENCE_MS_MAX + 1_000)
    assert machine.status(cluster.now()).keyspaces[0].synced_until_ms == 0, "the writer is gone"


def test_messages_of_a_peer_that_lie_change_nothing() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(100)
    victim = cluster.nodes["eu1"]
    before = contents(victim.store, "ctr")
    item = cluster.model.tables["item"].id
    link = next(link for link in cluster.nodes["t1"].machine._core.links.values() if link.node == "eu1")
    future = make_stamp(cluster.now().unix_ms + 120_000, 0, 0)
    stamp = make_stamp(cluster.now().unix_ms + 1, 0, 0)
    good = {"table": item, "keys": np.array([1], np.uint64), "rows": np.ones((1, 16), np.uint8)}
    wrong_shard = 1 + int(victim.store.models["ctr"].shards_of(np.array([1], np.uint64))[0])
    for lie in (
        lying_batch(cluster, future, RowColumns(**good)),
        lying_batch(cluster, stamp, RowColumns(**good | {"rows": np.ones((1, 12), np.uint8)})),
        lying_batch(cluster, stamp, RowColumns(**good), shard=wrong_shard % 8),
        lying_batch(cluster, stamp, RowColumns(**good), shard=99),
    ):
        rejected = len(victim.rejected)
        envelope = link.next_envelope(0)
        cluster.feed(victim, victim.machine, m.MessageReceived(envelope, lie))
        assert len(victim.rejected) == rejected + 1
        assert contents(victim.store, "ctr") == before
    unknown = counters(cluster, "eu1").batches_unknown
    batch = lying_batch(cluster, stamp, RowColumns(**good | {"table": 12345}))
    cluster.feed(victim, victim.machine, m.MessageReceived(link.next_envelope(0), batch))
    assert counters(cluster, "eu1").batches_unknown == unknown + 1, "no lie: the schema may be on its way"
    assert contents(victim.store, "ctr") == before


def test_a_second_nonce_under_one_writer_id_is_dropped_and_told_once() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(100)
    victim = cluster.nodes["eu1"]
    before = contents(victim.store, "ctr")
    columns = RowColumns(cluster.model.tables["item"].id, np.array([1], np.uint64), np.ones((1, 16), np.uint8))
    assert victim.machine is not None
    link = victim.machine._core.link("t1")
    for step in range(3):
        batch = lying_batch(cluster, make_stamp(cluster.now().unix_ms + 1 + step, 0, 0), columns, nonce=666)
        envelope = m.Envelope(link.boot, link.own_boot, 9, step + 1, version=2)
        cluster.feed(victim, victim.machine, m.MessageReceived(envelope, batch))
    assert contents(victim.store, "ctr") == before
    assert victim.machine.counters.writer_conflicts == 3
    alarms = [note for note in victim.notes if note.name == "writer_conflict"]
    assert len(alarms) == 1, "an alarm for each batch would fill the log"
    assert alarms[0].alarm
    assert "two nodes write under one id" in str(dict(alarms[0].fields)["reason"])


def lying_batch(
    cluster: VirtualCluster, stamp: int, columns: RowColumns, shard: int | None = None, nonce: int | None = None
) -> m.Batch:
    replica = cluster.nodes["t1"].store.models["ctr"]
    where = int(replica.shards_of(columns.keys)[0]) if shard is None else shard
    claims = m.ShardClaims(np.array([where], np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.uint16), np.ones(1, np.uint16))
    bound = replica.writer.nonce if nonce is None else nonce
    return m.Batch(cluster.model.id, "t1", "train", 0, bound, stamp, 0, 1, claims, (columns,))


def test_queues_report_their_fill_and_stay_below_their_bounds() -> None:
    cluster = start(options=NetworkOptions(loss_probability=0.3))
    for step in range(50):
        cluster.publish("t1", "item", range(step, step + 10), 1.0)
        cluster.run(10)
    for node in cluster.nodes.values():
        assert node.machine is not None
        for queue in node.machine.status(cluster.now()).queues:
            assert 0 <= queue.fill <= queue.bound
    assert any(
        queue.name == "open_steps" and queue.bound == knowledge_module.OPEN_STEPS_MAX
        for queue in cluster.nodes["t1"].machine.status(cluster.now()).queues
    )


def test_a_restarted_first_node_calls_whom_it_knew_and_waits_for_them() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(500)
    cluster.crash("t1")
    cluster.cut |= {(name, "t1") for name in ("us1", "us2", "us3")}  # they cannot answer yet
    cluster.restart("t1")
    stamp = cluster.publish("t1", "item", [2], 2.0)
    number = ask(cluster, stamp, m.Scope.ALL, 20_000)
    cluster.run(2_000)
    assert number not in cluster.nodes["t1"].replies, "an empty view is not everybody"
    assert synced(cluster, "t1"), "the others answered"
    cluster.cut.clear()
    cluster.run(2_000)
    assert cluster.nodes["t1"].replies[number] == m.WaitEnded(number, ())


def test_a_first_node_whose_peers_are_all_gone_goes_on_alone_after_a_while() -> None:
    cluster = start()
    for name in cluster.nodes:
        cluster.crash(name)
    cluster.restart("t1")
    cluster.run(2_000)
    assert not synced(cluster, "t1")
    cluster.run(ALONE_MS)
    assert synced(cluster, "t1")
    assert any(note.name == "alone" and note.alarm for note in cluster.nodes["t1"].notes)


def test_what_little_is_applied_is_acknowledged_together_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that carries ten messages a second would otherwise carry as many acknowledgements."""
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(ACK_DELAY_MS * 2)
    acks: list[m.Ack] = []
    original = cluster.post.transmit

    def transmit(sender: VirtualNode, address: str, envelope: m.Envelope, message: m.Message) -> bool:
        if isinstance(message, m.Ack):
            acks.append(message)
        return original(sender, address, envelope, message)

    monkeypatch.setattr(cluster.post, "transmit", transmit)
    for step in range(8):
        cluster.publish("t1", "item", [step], 1.0)
        cluster.run(ACK_DELAY_MS // 4)
    cluster.run(ACK_DELAY_MS)
    assert len(cluster.nodes) - 1 <= len(acks) <= 4 * (len(cluster.nodes) - 1), "of eight steps, in three times the delay"
    for node in cluster.nodes.values():
        assert node.machine is not None
        assert all(peer.bytes_in_flight == 0 for peer in node.machine.status(cluster.now()).peers)
