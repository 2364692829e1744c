"""What a peer may ask for and send at all: questions have a price, and credit is an upper bound at both ends."""

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec, table_id
from p2p import knowledge, sizes
from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.identity import retirement
from p2p.link import allowance, links
from p2p.link.links import Link
from p2p.members import gossip
from p2p.paper.sync import SHARD_VERSIONS
from p2p.replica import RowColumns
from p2p.stamps import EPOCH_MS, make_stamp
from sim_cluster.checkers import check_converged
from sim_cluster.virtual import VirtualCluster
from tests.p2p.test_hostile import hello_of, link_of, machine_of
from tests.p2p.test_machine import counters, start, synced
from tests.p2p.test_peer_bounds import effects_of, over_the_wire

SHARDS = 4_096


def unasked_chunk(cluster: VirtualCluster) -> m.PullReply:
    """A chunk of an answer that nobody waits for."""
    nothing = np.empty(0, np.uint16), np.zeros((8, 0), np.uint64), np.empty(0, np.uint64)
    return m.PullReply(cluster.model.id, 1, 1, False, (), *nothing)


def paper_cluster() -> VirtualCluster:
    model = ModelSpec("ctr", SHARDS, {"item": TableSpec("item", 4)})
    cluster = VirtualCluster(1, model=model, sync=SHARD_VERSIONS)
    cluster.add("t1", "train", "train")
    cluster.add("eu1", "eu", seeds=["t1"])
    assert cluster.run_until(lambda: synced(cluster, "eu1"))
    cluster.publish("t1", "item", list(range(64)), 1.0)
    cluster.run(2_000)
    return cluster


@pytest.mark.parametrize("kind", ["versions", "shards"])
def test_questions_of_a_round_have_a_price(kind: str) -> None:
    """Each may be about all shards, and none of them costs its sender credit."""
    cluster = paper_cluster()
    number = cluster.model.id
    every = np.arange(SHARDS, dtype=np.uint32)
    nothing = np.empty(0, np.uint16), np.empty((SHARDS, 0), np.uint64)
    before = counters(cluster, "t1").pulls_refused
    answers = 0
    for request in range(1, 1_001):
        asked = m.VersionsWanted(number, request, 0) if kind == "versions" else m.ShardsWanted(number, request, every, *nothing)
        effects = effects_of(cluster, "t1", "eu1", asked)
        answers += sum(isinstance(effect, m.Send) for effect in effects)
    each_ms = allowance.ROUND_MS + SHARDS // allowance.ROUND_SHARDS_PER_MS
    admitted = allowance.SELECTIONS_MAX * allowance.SELECTION_MS // each_ms + 1
    assert 0 < answers <= admitted
    assert counters(cluster, "t1").pulls_refused - before >= 1_000 - admitted
    cluster.run(2_000)  # paid by then: the rounds of a correct peer go on
    cluster.publish("t1", "item", [7], 2.0)
    assert cluster.run_until(lambda: check_converged(cluster) == "", 5_000)


def test_a_correct_sender_never_overruns_however_its_sessions_break() -> None:
    sender, receiver = Link("b", 2, "b:1", "eu", own_boot=1), Link("a", 1, "a:1", "us", own_boot=2)
    for lost_first in (True, False) * 3:  # a hole, and then all that credit still allows, each of it twice
        first = True
        while sender.has_credit():
            envelope = sender.next_envelope(1 << 20)
            if not (first and lost_first):
                for _ in range(2):
                    receiver.on_arrival(envelope)
                    assert not receiver.overruns(1 << 20)
            first = False
        sender.restart_session()


def test_what_goes_on_without_credit_is_dropped_and_counted() -> None:
    """After a hole nothing is acknowledged, so a correct peer comes to a halt."""
    cluster = start()
    link = link_of(cluster, "eu1", "t1")
    machine = machine_of(cluster, "eu1")
    rejected = 0
    chunk = unasked_chunk(cluster)
    for number in range(10 * links.CREDIT_MESSAGES_MAX):
        envelope = m.Envelope(link.boot, machine._core.options.boot, link.session_in + (number == 0), 5 + number, version=2)
        try:
            machine.handle(m.MessageReceived(envelope, chunk), cluster.now())
        except RemoteProtocolError:
            rejected += 1
    assert rejected >= 7 * links.CREDIT_MESSAGES_MAX
    assert counters(cluster, "eu1").credit_overruns == rejected
    envelope = m.Envelope(link.boot, machine._core.options.boot, link.session_in + 1, 1, version=2)
    machine.handle(m.MessageReceived(envelope, chunk), cluster.now())  # a new session has credit of its own


def test_each_new_session_counts_as_a_call() -> None:
    cluster = start()
    link = link_of(cluster, "eu1", "t1")
    machine = machine_of(cluster, "eu1")
    chunk = unasked_chunk(cluster)
    for session in range(link.session_in + 1, link.session_in + 4):
        envelope = m.Envelope(link.boot, machine._core.options.boot, session, 1, version=2)
        effects = machine.handle(m.MessageReceived(envelope, chunk), cluster.now())
        assert m.Unwanted() in effects


# --- what is kept of retired writers


def floored(keyspace: int, writer: int, shards: int, stage: int = m.FLOORED) -> m.Retired:
    return m.Retired(
        keyspace, keyspace, writer, writer + 1, stage, np.full(shards, make_stamp(EPOCH_MS + 1_000, 0, writer), np.uint64)
    )


def test_floors_of_keyspaces_that_nobody_knows_have_a_bound() -> None:
    """4,096 of them of 65,536 shards would be 2 GiB, in memory and in the ledger."""
    cluster = start()
    core = machine_of(cluster, "eu1")._core
    for keyspace in range(1, 11):
        told = tuple(floored(keyspace, writer, 65_536) for writer in range(8))
        effects_of(cluster, "eu1", "eu2", m.Retirements((), told))
    assert 0 < retirement.floor_bytes(core) <= retirement.STRANGE_FLOOR_BYTES_MAX
    assert core.counters.retirements_refused >= 70
    fill = {queue.name: queue.fill for queue in machine_of(cluster, "eu1").status(cluster.now()).queues}
    assert fill["retired_floor_bytes"] == retirement.floor_bytes(core)
    # Those of what is held here still have room.
    own = floored(cluster.model.id, 99, 8)
    effects_of(cluster, "eu1", "eu2", m.Retirements((), (own,)))
    assert own.key in core.record.retired


def test_a_floor_that_grows_is_counted_once() -> None:
    cluster = start()
    core = machine_of(cluster, "eu1")._core
    for _ in range(3):
        for stage in (m.FLOORED, m.DONE):
            effects_of(cluster, "eu1", "eu2", m.Retirements((), (floored(5, 7, 65_536, stage),)))
    assert retirement.floor_bytes(core) == 65_536 * 8
    assert core.counters.retirements_refused == 0


def test_two_floors_of_different_lengths_for_one_strange_keyspace_end_nobody() -> None:
    cluster = start()
    for shards in (8, 9):
        effects_of(cluster, "eu1", "eu2", m.Retirements((), (floored(5, 7, shards),)))
    assert len(machine_of(cluster, "eu1")._core.record.retired[5, 7, 8].floor) == 8


# --- what a node says itself fits in a message


def invent_writers(cluster: VirtualCluster, name: str, count: int) -> None:
    """As if so many had written to every shard, and their rows had been deleted and collected."""
    held = machine_of(cluster, name)._core.keyspaces[cluster.model.id].knowledge
    writers = np.arange(100, 100 + count, dtype=np.uint16)
    stamps = np.array([make_stamp(EPOCH_MS + 1_000, 0, int(writer)) for writer in writers], np.uint64)
    vector = np.broadcast_to(stamps, (held.shards, count))
    held.learn_reply(writers, np.zeros_like(vector), vector, stamps)


def test_the_largest_vector_travels() -> None:
    model = ModelSpec("ctr", 8_192, {"item": TableSpec("item", 4)})
    cluster = VirtualCluster(1, model=model)
    cluster.add("t1", "train", "train")
    cluster.publish("t1", "item", range(64), 1.0)
    held = machine_of(cluster, "t1")._core.keyspaces[model.id].knowledge
    invent_writers(cluster, "t1", held.room)
    assert held.room == 0
    for name, region in (("eu1", "eu"), ("eu2", "eu")):
        cluster.add(name, region, seeds=["t1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in ("eu1", "eu2")))
    cluster.publish("t1", "item", [1], 2.0)
    cluster.crash("eu2")
    cluster.publish("t1", "item", [2], 2.0)
    cluster.restart("eu2")  # asks with the whole vector
    assert cluster.run_until(lambda: synced(cluster, "eu2") and check_converged(cluster) == "", 10_000)
    assert counters(cluster, "eu2").pulls_completed >= 1


def test_a_writer_for_whom_the_vector_has_no_room_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    for name in cluster.nodes:
        invent_writers(cluster, name, 3)
    monkeypatch.setattr(knowledge, "VECTOR_BYTES_MAX", 8 * 8 * 4)
    cluster.add("t2", "train", "train", seeds=["t1"])
    assert cluster.run_until(lambda: synced(cluster, "t2"))
    node = cluster.nodes["t2"]
    columns = (RowColumns(table_id("item"), np.array([5], np.uint64), np.zeros((1, 16), np.uint8)),)
    refused = cluster.request("t2", lambda number: m.PublishRequested(number, cluster.model.id, columns))
    assert isinstance(refused, m.Refused)
    assert "fewer shards" in refused.reason
    assert node.fatal == ""
    cluster.publish("t1", "item", [2], 2.0)  # who writes already goes on
    assert cluster.run_until(lambda: check_converged(cluster) == "", 5_000)


def test_writers_that_a_peer_invents_do_not_outgrow_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = start()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    monkeypatch.setattr(knowledge, "VECTOR_BYTES_MAX", 8 * 8 * 4)
    held = machine_of(cluster, "eu1")._core.keyspaces[cluster.model.id].knowledge
    nothing = np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint16)
    link = link_of(cluster, "eu1", "eu2")
    for writer in range(100, 200):
        stamp = make_stamp(cluster.now().unix_ms, 0, writer)
        batch = m.Batch(cluster.model.id, "eu2", "eu", writer, 9, stamp, 0, 0, m.ShardClaims(*nothing), ())
        envelope = m.Envelope(link.boot, link.own_boot, link.session_in + 1, writer - 99, version=2)
        cluster.feed(cluster.nodes["eu1"], machine_of(cluster, "eu1"), m.MessageReceived(envelope, batch))
    assert held.room == 0
    assert counters(cluster, "eu1").writers_refused >= 96
    cluster.publish("t1", "item", [2], 2.0)
    assert cluster.run_until(lambda: check_converged(cluster) == "", 5_000)


def test_many_partitions_and_writers_are_told_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with 4,096 partitions: no heartbeat has a summary of each, and no message the records of all."""
    monkeypatch.setattr(gossip, "SUMMARY_ITEMS_MAX", 50)
    monkeypatch.setattr(sizes, "RECORD_ITEMS_MAX", 100)
    models = [ModelSpec(f"m{number}", 8, {"item": TableSpec("item", 4)}, partitions=8) for number in range(5)]
    cluster = VirtualCluster(1, model=models[0], more_models=models[1:])
    cluster.add("t1", "train", "train")
    cluster.add("t2", "train", "train", seeds=["t1"])
    cluster.add("eu1", "eu", seeds=["t1"])
    cluster.add("eu2", "eu", seeds=["eu1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    cluster.cut |= {("t1", "eu1"), ("t1", "eu2"), ("t2", "eu1"), ("t2", "eu2")}
    for name in ("t1", "t2"):
        for model in models:
            cluster.publish(name, "item", range(64), 1.0, model=model.name)
    cluster.run(100)
    cluster.cut.clear()
    core = machine_of(cluster, "t1")._core
    beat = machine_of(cluster, "t1")._gossip._heartbeat(cluster.now())
    assert 0 < len(beat.summaries) < len(core.keyspaces) == 40
    assert cluster.run_until(lambda: check_converged(cluster) == "", 60_000)
    records = [machine_of(cluster, "eu2")._core.membership.members[name].record for name in ("t1", "t2")]
    assert all(len(record.writers) == len(record.holds) == 5 for record in records)
    assert sizes.fitting(records) == 1


# --- small messages with large answers


@pytest.mark.parametrize("kind", ["schema", "register", "hello"])
def test_a_large_answer_is_given_once_a_moment(kind: str) -> None:
    """The schema may be 4 MiB, and so may a hello; a flood of calls begins at 2,000 a second."""
    cluster = start()
    core = machine_of(cluster, "eu2")._core
    nothing = np.empty(0, np.uint64)
    asked: m.Message = m.Heartbeat(core.own_record(), (), 4711, cluster.now().unix_ms, ())
    if kind == "register":
        asked = m.RegisterIndex(nothing, nothing, answer_wanted=True)
    elif kind == "hello":
        asked = hello_of(cluster, "eu1", member=core.own_record(), answer_wanted=True)
    large = {"schema": m.SchemaUpdate, "register": m.MemberNews, "hello": m.Hello}[kind]

    def answers() -> int:
        effects = [effect for _ in range(50) for effect in effects_of(cluster, "eu1", "eu2", asked)]
        return sum(isinstance(effect, m.Send) and isinstance(effect.message, large) for effect in effects)

    once = 2 if kind == "register" else 1  # its first record says that we live, whom the index does not name
    assert answers() == once
    cluster.run(allowance.ANSWER_MS)
    assert answers() <= once
    assert answers() == 0


def test_a_heartbeat_names_each_keyspace_once() -> None:
    """Each summary costs its receiver a digest of a vector, which may be 12 MiB."""
    cluster = start()
    own = machine_of(cluster, "eu2")._core.own_record()
    summary = m.KeyspaceSummary(cluster.model.id, 1, 2, ())
    with pytest.raises(RemoteProtocolError, match="two summaries"):
        over_the_wire(m.Heartbeat(own, (), 0, cluster.now().unix_ms, (summary,) * 4_096))
