"""What a peer may say of a backlog: it raises only `RemoteProtocolError`, changes nothing, and nobody believes it for long."""

import contextlib
import dataclasses
import random

import numpy as np
import pytest

from p2p import messages as m
from p2p import wire
from p2p.busy import feeds
from p2p.busy.pairs import STALLED_MS, Pairs
from p2p.errors import BlamelessError, RemoteProtocolError
from p2p.link import allowance
from p2p.machine import Machine
from p2p.replica import RowColumns
from p2p.stamps import make_stamp, unix_ms_of
from p2p.wire.frames import pack_envelope
from p2p.wire.table import NUMBER_OF
from sim_cluster.checkers import Watch, check_converged
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import backlog_of, fill, in_state_mode, little_credit, pair, settle

NONE = np.empty(0, np.uint16)


def fed(seed: int = 1) -> tuple[VirtualCluster, Machine, m.StateChunk]:
    """A pair in state mode; the child's machine, and an honest chunk of it with a claim."""
    cluster = pair(seed)
    fill(cluster, 100, keys=100)
    backlog, machine = backlog_of(cluster, "t1", "eu1"), cluster.nodes["eu1"].machine
    assert backlog is not None
    assert machine is not None
    assert cluster.run_until(lambda: bool(backlog.request and feed_of(machine).request == backlog.request), 10_000)
    (spec,) = [table for table in cluster.model.tables.values() if table.name == "item"]
    stamp = make_stamp(unix_ms_of(backlog.keyspace.replica.stamp_max), 0, 0) | backlog.pairs.served[0][0]
    rows = RowColumns(spec.id, np.array([5], np.uint64), np.zeros((1, spec.row_bytes), np.uint8), np.array([stamp], np.uint64))
    until = np.array([[stamp]], np.uint64)
    shards, writers = np.array([2], np.uint32), np.array([backlog.pairs.served[0][0]], np.uint16)
    chunk = m.StateChunk(
        cluster.model.id,
        backlog.request,
        False,
        (rows,),
        shards,
        writers,
        until,
        until[0],
        shards[:0],
        until[:0],
        NONE,
        np.empty(0, np.uint64),
    )
    return cluster, machine, chunk


def feed_of(machine: Machine) -> "feeds.Feed":
    (keyspace,) = machine._core.keyspaces.values()
    return next(iter(keyspace.feeds.values()))


def receive(cluster: VirtualCluster, machine: Machine, message: m.Message, sequence: int | None = None) -> None:
    """As the next message of the trainer's session."""
    link = machine._core.links["t1"]
    if sequence is None:
        sequence = link._sequence_in + 1
    envelope = m.Envelope(link.boot, machine._core.options.boot, link.session_in, sequence, 0, 2)
    machine.handle(m.MessageReceived(envelope, message), cluster.now())


def test_chunks_that_do_not_fit_are_refused_and_no_claim_behind_them_counts() -> None:
    with little_credit(1_500):
        cluster, machine, chunk = fed()
        replica = cluster.nodes["eu1"].store.models["ctr"]
        far = make_stamp(cluster.now().unix_ms + 10_000_000, 0, int(chunk.writers[0]))
        (rows,) = chunk.columns
        wrong = [
            dataclasses.replace(chunk, shards=np.array([8], np.uint32)),
            dataclasses.replace(chunk, columns=(dataclasses.replace(rows, table=99),)),
            dataclasses.replace(chunk, columns=(dataclasses.replace(rows, rows=np.zeros((1, 3), np.uint8)),)),
            dataclasses.replace(chunk, columns=(dataclasses.replace(rows, stamps=np.zeros(1, np.uint64)),)),
            dataclasses.replace(chunk, until=np.array([[far]], np.uint64)),
        ]
        for one in wrong:
            feed_of(machine).request = chunk.request
            before = replica.vector.copy(), replica.frontier.copy()
            with pytest.raises(RemoteProtocolError):
                receive(cluster, machine, one)
            receive(cluster, machine, chunk)
            assert (replica.vector == before[0]).all()
            assert (replica.frontier == before[1]).all()
        settle(cluster, Watch(cluster))


def test_chunks_of_other_questions_behind_holes_and_repeats_claim_nothing() -> None:
    with little_credit(1_500):
        cluster, machine, chunk = fed()
        replica, link = cluster.nodes["eu1"].store.models["ctr"], machine._core.links["t1"]
        before = replica.vector.copy(), replica.frontier.copy()
        receive(cluster, machine, dataclasses.replace(chunk, request=chunk.request + 1))
        with pytest.raises(RemoteProtocolError, match="answers no question"):
            receive(cluster, machine, dataclasses.replace(chunk, request=0))
        feed_of(machine).request = chunk.request
        receive(cluster, machine, dataclasses.replace(chunk, keyspace=77))
        receive(cluster, machine, chunk, sequence=link._sequence_in)
        receive(cluster, machine, chunk, sequence=link._sequence_in + 2)
        receive(cluster, machine, chunk, sequence=link._sequence_in + 1)
        assert (replica.vector == before[0]).all()
        assert (replica.frontier == before[1]).all()
        settle(cluster, Watch(cluster))


def test_rows_that_go_ahead_of_our_answer_are_taken_and_claim_nothing() -> None:
    with little_credit(1_500):
        cluster, machine, chunk = fed()
        replica, feed = cluster.nodes["eu1"].store.models["ctr"], feed_of(machine)
        (rows,) = chunk.columns
        no_shards, no_stamps = np.empty(0, np.uint32), np.empty((0, 0), np.uint64)
        none = no_shards, NONE, no_stamps, np.empty(0, np.uint64), no_shards, no_stamps
        ahead = m.StateChunk(chunk.keyspace, 0, False, chunk.columns, *none, NONE, np.empty(0, np.uint64))
        before = replica.vector.copy(), replica.frontier.copy()

        def held() -> bytes:
            return replica.read(rows.table, replica.places_of(rows.table, rows.keys)).rows.tobytes()

        old = held()
        assert old != rows.rows.tobytes()
        with pytest.raises(RemoteProtocolError, match="answers no question"):
            receive(cluster, machine, dataclasses.replace(ahead, ends=True))
        feed.retired_digest += 1
        receive(cluster, machine, ahead)
        assert held() == old, "its sender may have retired somebody, or not, whom we have not"
        feed.retired_digest -= 1
        receive(cluster, machine, ahead)
        assert held() == rows.rows.tobytes()
        assert (replica.vector == before[0]).all()
        assert (replica.frontier == before[1]).all()


def test_a_notice_of_nobody_in_need_is_forgotten_and_parents_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = pair(1)
    machine = cluster.nodes["eu1"].machine
    assert machine is not None
    told = m.Backlogged(cluster.model.id, 1, True, 1, np.array([3], np.uint16), np.array([1], np.uint8))
    link = machine._core.links["t1"]
    envelope = m.Envelope(link.boot, machine._core.options.boot, version=2)
    machine.handle(m.MessageReceived(envelope, told), cluster.now())
    assert in_state_mode(cluster) == ["eu1<t1"]
    monkeypatch.setattr(feeds, "FEEDS_MAX", 0)
    feed_of(machine)
    next(iter(machine._core.keyspaces.values())).feeds.clear()
    with pytest.raises(BlamelessError, match="more than 0 parents"):
        machine.handle(m.MessageReceived(envelope, told), cluster.now())
    monkeypatch.undo()
    machine.handle(m.MessageReceived(envelope, told), cluster.now())
    cluster._arm(cluster.nodes["eu1"], machine)
    cluster.run(5_000)
    assert in_state_mode(cluster) == [], "nobody repeats it"


@pytest.mark.parametrize("kind", [m.Backlogged, m.StateChunk])
def test_any_bytes_of_them_raise_only_one_error(kind: type) -> None:
    rng = random.Random(kind.__name__)
    writers = np.array([2, 9], np.uint16)
    stamps = np.array([[make_stamp(1_700_000_000_000, shard, writer) for writer in (2, 9)] for shard in range(3)], np.uint64)
    rows = RowColumns(1, np.arange(3, dtype=np.uint64), np.zeros((2, 8), np.uint8), np.arange(1, 4, dtype=np.uint64))
    shards, nonces = np.array([0, 1, 7], np.uint32), np.array([5, 6], np.uint64)
    message: m.Message = m.Backlogged(5, 7, True, 4, writers, np.array([1, 8], np.uint8))
    if kind is m.StateChunk:
        message = m.StateChunk(
            5, 7, False, (rows,), shards, writers, stamps, stamps[0], shards[1:], stamps[1:], writers, nonces
        )
    frames = [bytes(frame) for frame in wire.encode(m.Envelope(1, 2, 1, 1, 0, 2), message)]
    for _ in range(400):
        broken = [bytearray(frame) for frame in frames]
        for _ in range(rng.randint(1, 3)):
            frame = rng.choice(broken[1:])
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        body = [bytes(frame) for frame in broken[1:]]
        envelope = pack_envelope(m.Envelope(1, 2, 1, 1, 0, 2), NUMBER_OF[kind], wire.checksum(body))
        with contextlib.suppress(RemoteProtocolError):
            wire.decode([memoryview(frame) for frame in (envelope, *body)])


def test_who_says_for_ever_that_rows_are_queued_and_brings_none_is_pulled_round() -> None:
    cluster = pair(2)
    cluster.options = NetworkOptions(1, 5)
    cluster.add("us1", "us", seeds=["t1"])
    cluster.run(6_000)
    node = cluster.nodes["eu1"]
    machine = node.machine
    assert machine is not None
    link, writer = machine._core.links["us1"], next(iter(machine._core.keyspaces.values())).knowledge.writers[:1]
    told = m.Backlogged(cluster.model.id, 1, True, 1, writer, np.array([1], np.uint8))
    envelope = m.Envelope(link.boot, machine._core.options.boot, version=2)
    cluster.feed(node, machine, m.MessageReceived(envelope, told))
    cluster.cut = {("t1", "eu1")}
    assert cluster.publish("t1", "item", [1, 2, 3], 7.0)
    cluster.run(100)
    cluster.cut = set()
    waited_ms = 0
    while check_converged(cluster):
        cluster.feed(node, machine, m.MessageReceived(envelope, told))
        cluster.run(400)
        waited_ms += 400
        assert waited_ms < STALLED_MS + 10_000, "rows that nobody sends are waited for"
    assert waited_ms > STALLED_MS - 2_000, "what a parent says is believed for a while (R16)"


def test_notices_make_us_tell_our_vector_only_so_often() -> None:
    cluster = pair(3)
    machine = cluster.nodes["eu1"].machine
    assert machine is not None
    link, writers, bits = machine._core.links["t1"], np.array([3], np.uint16), np.array([1], np.uint8)
    envelope = m.Envelope(link.boot, machine._core.options.boot, version=2)
    told = 0
    for number in range(300):
        for on in (True, number % 2 == 0):
            notice = m.Backlogged(cluster.model.id, number, on, 1, writers, bits)
            effects = machine.handle(m.MessageReceived(envelope, notice), cluster.now())
            told += sum(isinstance(one, m.Send) and isinstance(one.message, m.PullRequest) for one in effects)
    assert 0 < told <= allowance.SELECTIONS_MAX


@pytest.mark.parametrize("which", ["another writer", "another tree"])
def test_a_claim_for_pairs_that_were_not_told_is_not_taken(which: str) -> None:
    with little_credit(1_500):
        cluster, machine, chunk = fed()
        replica, feed = cluster.nodes["eu1"].store.models["ctr"], feed_of(machine)
        ((writer, _),) = feed.pairs.served
        feed.pairs = Pairs(1, ((writer + 1, 1),)) if which == "another writer" else Pairs(4, ((writer, 0b1011),))
        before = replica.vector.copy(), replica.frontier.copy()
        receive(cluster, machine, chunk)
        assert (replica.vector == before[0]).all()
        assert (replica.frontier == before[1]).all()
        assert not feed.request, "it is asked anew"
        settle(cluster, Watch(cluster))
