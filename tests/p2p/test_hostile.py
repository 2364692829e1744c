"""What a peer, a network or a restart can do to a node that must not last: poison, leaks, and states nobody leaves."""

import dataclasses
from unittest import mock

import msgpack
import numpy as np
import pytest

from ekko.errors import StoreError
from ekko.model import ModelSpec, TableSpec
from ekko.store.table import Table
from p2p import messages as m
from p2p import wire
from p2p.errors import RemoteProtocolError
from p2p.link import links
from p2p.link.links import Link
from p2p.machine import Machine
from p2p.members import gossip, membership
from p2p.members.introductions import CONSTANTS
from p2p.pulling import outbox, pull
from p2p.replica import RowColumns, SchemaEntry
from p2p.stamps import make_stamp
from p2p.versions import FIRST_VERSION
from sim_cluster.checkers import check_converged, check_knowledge, contents
from sim_cluster.network import NetworkOptions
from sim_cluster.node import MemoryLedger
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, REGIONS, at_rest
from tests.p2p.test_machine import counters, start, synced


def machine_of(cluster: VirtualCluster, name: str) -> Machine:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine


def link_of(cluster: VirtualCluster, name: str, peer: str) -> Link:
    return machine_of(cluster, name)._core.links[peer]


def hello_of(at: VirtualCluster, name: str, **changes: object) -> m.Hello:
    """A hello as another node might send it."""
    core = machine_of(at, name)._core
    member = m.MemberRecord(name, 77, 1, "eu", "serve", f"virtual://{name}", 1)
    hello = m.Hello(FIRST_VERSION, 0, CONSTANTS, member, (), tuple(core.host.schema()), False)
    return dataclasses.replace(hello, **changes)  # type: ignore[arg-type]


def receive(cluster: VirtualCluster, name: str, message: m.Message, sender_boot: int, receiver_boot: int | None = None) -> None:
    machine = machine_of(cluster, name)
    boot = machine._core.options.boot if receiver_boot is None else receiver_boot
    cluster.feed(cluster.nodes[name], machine, m.MessageReceived(m.Envelope(sender_boot, boot), message))


def stranger(node: str, boot: int, **changes: object) -> m.MemberRecord:
    record = m.MemberRecord(node, boot, 1, "eu", "serve", f"virtual://{node}", 1)
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


# --- credit


def test_credit_lost_with_its_messages_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that swallows a whole credit's worth of messages leaves nothing that could show the receiver a hole."""
    monkeypatch.setattr(links, "CREDIT_MESSAGES_MAX", 20)
    cluster = start()
    cluster.cut |= {("t1", "eu1"), ("t1", "eu2")}
    for step in range(40):
        cluster.publish("t1", "item", [step], 1.0)
        cluster.run(20)
    cluster.cut.clear()
    at_rest(cluster)
    cluster.run(2 * links.ACK_SILENCE_MS)
    skipped = counters(cluster, "t1").batches_skipped
    cluster.publish("t1", "item", [1], 2.0)
    cluster.run(60)
    assert counters(cluster, "t1").batches_skipped == skipped
    assert check_converged(cluster) == "", "by push"


def test_refused_batches_give_their_credit_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CREDIT_MESSAGES_MAX", 100)
    monkeypatch.setattr(links, "ACK_MESSAGES", 10)
    monkeypatch.setattr(gossip.Gossip, "check_clock", lambda *_args: None)  # as one that does not care would write
    cluster = start()
    machine_of(cluster, "t1")._core.clock.observe(make_stamp(cluster.now().unix_ms + 65_000, 0, 0))
    for step in range(120):
        cluster.publish("t1", "item", [step], 1.0)
        cluster.run(5)
    refusing = [name for name, node in cluster.nodes.items() if node.rejected]
    assert refusing, "the clock is not ahead enough"
    cluster.run(2 * links.ACK_DELAY_MS)
    assert all(len(link_of(cluster, "t1", name)._in_flight) < 20 for name in refusing)
    cluster.run(20_000)
    at_rest(cluster)


# --- introductions


def test_a_refused_newcomer_leaves_nothing_behind() -> None:
    cluster = VirtualCluster(1)
    cluster.add("eu1", "eu", seeds=["t1"])
    clash = SchemaEntry(cluster.model.id, "table:item", msgpack.packb(["item", 99, "float32"]))
    record = stranger("x", 77, writers=(m.WriterRecord(cluster.model.id, 0, 666, 0),))
    receive(cluster, "eu1", hello_of(cluster, "eu1", cluster=0xBAD, member=record, schema=(clash,)), 77)
    assert counters(cluster, "eu1").peers_refused == 1
    assert machine_of(cluster, "eu1").status(cluster.now()).cluster == 0
    cluster.add("t1", "train", "train")
    cluster.publish("t1", "item", [1], 1.0)
    at_rest(cluster)
    assert cluster.run_until(lambda: synced(cluster, "eu1"))
    assert cluster.nodes["eu1"].fatal == ""


def test_peers_cannot_make_a_node_remember_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MEMBERS_MAX", 20)
    cluster = start()
    for number in range(100):
        writers = tuple(m.WriterRecord(1_000 + number * 100 + k, 0, 5, 0) for k in range(100))
        member = stranger(f"x{number}", 100 + number, writers=writers)
        receive(cluster, "eu1", hello_of(cluster, "eu1", member=member), member.boot)
    core = machine_of(cluster, "eu1")._core
    assert len(core.membership.members) <= 20
    assert len(core.links) <= 20
    assert len(core.by_boot) <= 20
    assert len(core.record.bindings) < 100
    # A full register does not stop the gossip of those who are in it.
    cluster.publish("t1", "item", [1], 1.0)
    at_rest(cluster)
    crowd = tuple(stranger(f"y{number}", 500 + number) for number in range(50))
    cluster.cut.add(("t1", "eu1"))
    cluster.run(100)
    cluster.publish("t1", "item", [2], 1.0)
    own = machine_of(cluster, "t1")
    beat = m.Heartbeat(own._core.own_record(), crowd, 0, 0, ())
    beat = dataclasses.replace(beat, member=dataclasses.replace(beat.member, heartbeat=10**6))
    rejected = len(cluster.nodes["eu1"].rejected)
    receive(cluster, "eu1", beat, own._core.options.boot)
    assert len(cluster.nodes["eu1"].rejected) == rejected
    for boot in range(100, 200):
        receive(cluster, "eu1", m.Leave("x"), boot)  # of one who is not in the register


def test_a_refusal_for_another_life_does_not_stop_a_node() -> None:
    cluster = VirtualCluster(1)
    node = cluster.add("eu1", "eu", seeds=["t1"])
    receive(cluster, "eu1", m.Refusal("go away"), 5, receiver_boot=12345)
    assert node.fatal == ""
    receive(cluster, "eu1", m.Refusal("go away"), 5)
    assert "go away" in node.fatal


def test_the_farewell_of_a_former_life_does_not_send_its_successor_away() -> None:
    cluster = start()
    machine = machine_of(cluster, "us1")
    old = link_of(cluster, "us1", "eu1")
    record = dataclasses.replace(machine._core.membership.members["eu1"].record, boot=4711, boot_ms=2**50, heartbeat=1)
    machine._core.membership.learn(record, cluster.now_ms)  # gossip is faster than the farewell
    receive(cluster, "us1", m.Leave("eu1"), old.boot)
    assert machine._core.membership.alive("eu1", cluster.now_ms)


def test_a_late_hello_of_a_former_life_does_not_replace_the_link() -> None:
    cluster = start()
    link = link_of(cluster, "us1", "eu1")
    record = dataclasses.replace(machine_of(cluster, "us1")._core.membership.members["eu1"].record, boot=4711, boot_ms=1)
    receive(cluster, "us1", hello_of(cluster, "us1", member=record), 4711)
    assert link_of(cluster, "us1", "eu1") is link


# --- schema


def test_a_schema_too_large_is_refused_whole() -> None:
    cluster = start()
    models = [ModelSpec(f"m{number}", 1) for number in range(1_100)]
    entries = tuple(entry for model in models for entry in model.entries())
    boot = link_of(cluster, "eu1", "t1").boot
    receive(cluster, "eu1", m.SchemaUpdate(entries), boot)
    assert len(cluster.nodes["eu1"].rejected) == 1
    assert list(cluster.nodes["eu1"].store.models) == ["ctr"]


def test_a_schema_beyond_the_memory_is_refused_and_the_node_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = start()

    def no_memory(*_args: object) -> None:
        raise StoreError("Cannot allocate memory")

    monkeypatch.setattr(Table, "create", no_memory)
    entries = tuple(ModelSpec("big", 1, {"a": TableSpec("a", 4)}).entries())
    receive(cluster, "eu1", m.SchemaUpdate(entries), link_of(cluster, "eu1", "t1").boot)
    assert "no room" in cluster.nodes["eu1"].rejected[0]
    assert list(cluster.nodes["eu1"].store.models) == ["ctr"]


def test_a_fact_in_other_bytes_is_refused_and_not_spread() -> None:
    cluster = start()
    boot = link_of(cluster, "eu1", "t1").boot
    body = b"\xdc\x00\x03" + msgpack.packb(["item", 4, "float32"])[1:]  # the same list with a longer length
    receive(cluster, "eu1", m.SchemaUpdate((SchemaEntry(cluster.model.id, "table:item", body),)), boot)
    assert len(cluster.nodes["eu1"].rejected) == 1
    before = cluster.delivered
    cluster.run(200)
    assert cluster.delivered - before < 200


# --- writers


def test_writers_that_a_peer_invents_do_not_outgrow_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "WRITER_RECORDS_MAX", 10)
    cluster = start()
    register = machine_of(cluster, "eu1")._core.membership
    for writer in range(100):
        register.note_writer("t1", cluster.model.id, writer, 5, 0)
    assert len(register.members["t1"].record.writers) == 10


def test_a_row_without_a_stamp_is_refused() -> None:
    cluster = start()
    asker, link = machine_of(cluster, "eu1"), link_of(cluster, "eu1", "t1")
    keyspace = asker._core.keyspaces[cluster.model.id]
    now = cluster.now()
    asker._pull.ask(keyspace, link, now, "test")
    rows = RowColumns(
        cluster.model.tables["item"].id, np.ones(1, np.uint64), np.ones((1, 16), np.uint8), np.zeros(1, np.uint64)
    )
    nothing = np.empty(0, np.uint16), np.empty((8, 0), np.uint64), np.empty(0, np.uint64)
    reply = m.PullReply(cluster.model.id, asker._pull._requests, 0, True, (rows,), *nothing)
    with pytest.raises(RemoteProtocolError, match="without a stamp"):
        asker._pull.on_reply(link, reply, now)
    assert contents(cluster.nodes["eu1"].store, "ctr") == {}


@pytest.mark.parametrize("seeds", [(), ("us1",)])
def test_a_training_node_that_lost_everything_takes_a_fresh_writer_id(seeds: tuple[str, ...]) -> None:
    cluster = start()
    cluster.publish("t1", "item", [1, 2], 1.0)
    at_rest(cluster)
    cluster.crash("t1")
    cluster.nodes["t1"].ledger = MemoryLedger()
    cluster.nodes["t1"].seeds = tuple(f"virtual://{seed}" for seed in seeds)
    cluster.restart("t1", keep_state=False)
    cluster.run(3_000)
    assert cluster.publish("t1", "item", [2, 3], 2.0)
    at_rest(cluster)
    assert all(not node.rejected for node in cluster.nodes.values())


def test_of_two_training_nodes_of_version_1_exactly_one_may_write() -> None:
    cluster = VirtualCluster(1)
    for name, role in (("t1", "train"), ("eu1", "serve"), ("t2", "train")):
        cluster.add(name, "train" if role == "train" else "eu", role, [] if name == "t1" else ["t1"], protocol_version=1)
    assert cluster.run_until(lambda: synced(cluster, "t2"))
    cluster.run(1_000)
    assert cluster.publish("t2", "item", [2], 1.0) == 0, "the first one is there, though it has not written yet"
    assert cluster.publish("t1", "item", [1], 1.0)
    cluster.crash("t1")
    cluster.run(membership.SILENCE_MS_MAX + 1_000)
    assert cluster.publish("t2", "item", [2], 2.0), "its successor"
    cluster.restart("t1")
    cluster.run(2_000)
    assert cluster.publish("t1", "item", [3], 3.0) == 0
    assert cluster.publish("t2", "item", [3], 3.0), "who came back does not stop who writes"
    at_rest(cluster)


# --- states that nobody leaves


def test_a_gap_that_nobody_can_fill_is_given_up() -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(500)
    cluster.options = NetworkOptions(loss_probability=1.0)
    cluster.publish("t1", "item", [1], 2.0)
    cluster.options = CALM
    cluster.publish("t1", "item", [2], 3.0)
    cluster.run(12)
    cluster.crash("t1")
    cluster.run(30_000)
    pulls = {name: counters(cluster, name).pulls_started for name in ("eu1", "us1", "us3")}
    assert machine_of(cluster, "us1").status(cluster.now()).keyspaces[0].open_steps == 0
    cluster.run(10_000)
    assert {name: counters(cluster, name).pulls_started for name in pulls} == pulls


def test_joining_with_many_models_asks_for_no_more_than_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "STREAMS_MAX", 4)
    monkeypatch.setattr(outbox, "CHUNK_BYTES_MAX", 100)
    cluster = VirtualCluster(1)
    t1 = cluster.add("t1", "train", "train")
    models = [ModelSpec(f"m{number}", 2, {"a": TableSpec("a", 1)}) for number in range(20)]
    for model in models:
        t1.store.add_model(model, 8)
    cluster.feed(t1, machine_of(cluster, "t1"), m.SchemaChanged())
    rows = RowColumns(models[0].tables["a"].id, np.arange(50, dtype=np.uint64), np.ones((50, 4), np.uint8))
    for model in models:
        reply = cluster.request("t1", lambda number, model=model: m.PublishRequested(number, model.id, (rows,)))  # type: ignore[misc]
        assert isinstance(reply, m.Published)
    cluster.add("eu1", "eu", seeds=["t1"])
    assert cluster.run_until(lambda: synced(cluster, "eu1"))
    assert counters(cluster, "eu1").pulls_abandoned == 0
    assert counters(cluster, "t1").pulls_refused == 0


def test_a_node_is_not_ready_with_the_nothing_of_another_newcomer() -> None:
    """A region restarts without memory; its nodes find each other long before the far training node answers them."""
    cluster = start(options=NetworkOptions(region_delay_ms=90))
    cluster.publish("t1", "item", range(50), 1.0)
    at_rest(cluster)
    for name in REGIONS["us"]:
        cluster.crash(name)
        cluster.restart(name, keep_state=False)
    for _ in range(300):
        cluster.run(10)
        for name in REGIONS["us"]:
            if synced(cluster, name):
                assert len(contents(cluster.nodes[name].store, "ctr")) == 50
    assert all(synced(cluster, name) for name in cluster.nodes)


# --- scenarios that hold


def test_two_nodes_that_seed_each_other_become_ready() -> None:
    cluster = VirtualCluster(1)
    cluster.add("t1", "train", "train", ["eu1"])
    cluster.add("eu1", "eu", "serve", ["t1"])
    assert cluster.run_until(lambda: synced(cluster, "t1") and synced(cluster, "eu1"))
    assert cluster.publish("t1", "item", [1], 1.0)
    at_rest(cluster)


@pytest.mark.parametrize("keep_state", [True, False])
def test_everybody_restarts_at_once(keep_state: bool) -> None:
    cluster = start(3)
    cluster.publish("t1", "item", range(20), 1.0)
    at_rest(cluster)
    for name in cluster.nodes:
        cluster.crash(name)
    if not keep_state:
        cluster.history.clear()
    for name in cluster.nodes:
        cluster.restart(name, keep_state)
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    assert cluster.publish("t1", "user", [1], 1.0)
    at_rest(cluster)


@pytest.mark.parametrize("shards", [1, 4_096])
def test_any_number_of_shards(shards: int) -> None:
    cluster = start(model=ModelSpec("ctr", shards, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}))
    cluster.publish("t1", "item", range(100), 1.0)
    cluster.publish("t1", "item", [5, 1_000], delete=True)
    cluster.add("ap1", "ap", seeds=["t1"])
    at_rest(cluster)


def test_a_lossy_one_way_world_with_steps_in_parts() -> None:
    with mock.patch.object(wire, "BATCH_BYTES_MAX", 200):
        cluster = start(5, NetworkOptions(1, 30, 20, 0.2, 0.1, 0.2))
        cluster.cut |= {("t1", "us1"), ("us2", "us1"), ("eu1", "t1")}
        for step in range(30):
            cluster.publish("t1", "item", range(step, step + 60), float(step))
            cluster.run(50)
        for node in cluster.nodes.values():
            assert check_knowledge(cluster, node) == ""
        at_rest(cluster)
