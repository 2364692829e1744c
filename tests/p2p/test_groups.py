"""Steps that share a message do what they do one by one, and a step waits for others only where steps come fast."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from p2p import messages as m
from p2p import wire
from p2p.classes import NOT_KNOWN
from p2p.core import Keyspace
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.knowledge import Knowledge
from p2p.members.membership import Membership
from p2p.members.trees import TREES_MAX
from p2p.pushing import groups
from p2p.pushing.cutting import split_step
from p2p.pushing.groups import LINGER_MS, Group, Step, join
from p2p.pushing.push import Push, learn_batch
from p2p.replica import RowColumns, WriterIdentity
from p2p.stamps import make_stamp
from p2p.versions import PROTOCOL_VERSION
from p2p.wire.frames import body_of
from p2p.wire.pushing import BATCH
from p2p.wire.table import NUMBER_OF
from sim_cluster.checkers import check_converged, contents
from sim_cluster.meter import Meter
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import at_rest

MODEL = ModelSpec("ctr", 8, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)})
WRITER = 7
ME = WriterIdentity(WRITER, 99)
FIRST, STEP = make_stamp(1_700_000_000_001, 0, WRITER), 1 << 22  # the stamp of the first step, and between two of them
ENVELOPE = m.Envelope(11, 22, 3, 4, 1, PROTOCOL_VERSION)


# --- any grouping ends where its steps end ----------------------------------------------------------------------------------


class Node:
    """Rows and knowledge of one node, without the machine around them."""

    def __init__(self) -> None:
        self.store = Store.anonymous()
        self.store.add_model(MODEL, 64)
        (self.replica,) = self.store.replicas.values()
        self.knowledge = Knowledge(self.replica.vector, self.replica.frontier)

    def write(self, number: int, columns: tuple[RowColumns, ...]) -> Step:
        """One step of the writer, which is this node, as `Push` writes it."""
        stamp = make_stamp(1_700_000_000_000 + number, 0, WRITER)
        shard_of = [self.replica.shards_of(section.keys) for section in columns]
        touched = np.unique(np.concatenate(shard_of)).astype(np.uint32)
        before, prev = int(self.replica.frontier[WRITER]), self.replica.vector[touched, WRITER]
        step = Step(ME, stamp, before, touched, prev, columns, shard_of, number)
        self.take(message_of([step]))
        return step

    def take(self, batch: m.Batch) -> None:
        """A batch's rows, then its claims, as `Push.apply` takes them."""
        self.replica.check(batch.columns, batch.claims.shards)
        self.replica.apply(batch.columns, batch.stamp)
        learn_batch(self.knowledge, batch)

    def pull(self, other: "Node") -> None:
        """All that the other one holds, and its vector."""
        base = self.replica.vector.copy()
        known = self.knowledge.known_steps(1 << 16)
        selections = other.replica.changed_since(base)
        for selection in other.replica.without(selections, known) if len(known.stamps) else selections:
            self.replica.apply([other.replica.read(selection.table, selection.slots)], 0)
        writers = other.knowledge.writers
        self.knowledge.learn_reply(writers, base[:, writers], other.replica.vector[:, writers], other.replica.frontier[writers])

    def state(self) -> tuple[object, ...]:
        """All that nodes compare, and the rows."""
        vector, frontier = self.replica.vector[:, WRITER].tolist(), int(self.replica.frontier[WRITER])
        return contents(self.store, "ctr"), vector, frontier, self.knowledge.digest(), self.replica.stray_digest()


def message_of(steps: list[Step], trees: int = 1) -> m.Batch:
    joined = join(steps)
    return m.Batch(
        MODEL.id,
        "t1",
        "train",
        WRITER,
        ME.nonce,
        steps[-1].stamp,
        steps[0].writer_prev,
        len(joined.claims.shards),
        joined.claims,
        joined.columns,
        steps[-1].published_ns,
        trees=trees,
        steps=joined.steps,
    )


def over_the_wire(batch: m.Batch) -> m.Batch:
    frames = wire.encode(ENVELOPE, wire.seal(batch))
    _, received = wire.decode([memoryview(bytes(frame)) for frame in frames])
    assert isinstance(received, m.Batch)
    return received


def columns_of(draw: random.Random, number: int) -> tuple[RowColumns, ...]:
    """A step of one or two tables, of keys that come again and again, some of them deleted."""
    columns = []
    weighted = draw.random() < 0.3
    for table in draw.sample(list(MODEL.tables.values()), draw.randint(1, 2)):
        keys = np.array(draw.sample(range(30), draw.randint(1, 6)), np.uint64)
        live = draw.choice([0, len(keys), draw.randint(0, len(keys))])
        rows = np.full((live, table.dim if live else 1), number, np.float32).view(np.uint8)  # none has any width
        weights = np.full(len(keys), number % 256, np.uint8) if weighted else None
        columns.append(RowColumns(table.id, keys, rows, None, weights))
    return tuple(columns)


def grouped(draw: random.Random, steps: list[Step]) -> Iterator[list[Step]]:
    """Consecutive steps in random groups, as `Group` admits them."""
    group = Group()
    for step in steps:
        if group.steps and (not group.admits(step) or draw.random() < 0.4):
            yield group.take(0)
        group.add(step)
    yield group.take(0)


def messages_of(draw: random.Random, steps: list[Step], trees: int) -> list[m.Batch]:
    messages = []
    for group in grouped(draw, steps):
        whole = message_of(group, trees)
        messages += [over_the_wire(one) for one in split_step(whole, join(group).shard_of, wire.BATCH_BYTES_MAX)]
    return messages


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 14), st.sampled_from([1, TREES_MAX]), st.floats(0.0, 1.0))
def test_any_grouping_in_any_order_ends_where_its_steps_end(seed: int, count: int, trees: int, kept: float) -> None:
    draw = random.Random(seed)
    origin, one_by_one, receiver, lossy = Node(), Node(), Node(), Node()
    steps = [origin.write(number, columns_of(draw, number)) for number in range(1, count + 1)]
    for step in steps:
        one_by_one.take(over_the_wire(message_of([step])))
    assert one_by_one.state() == origin.state()

    messages = messages_of(draw, steps, trees)
    mixed = messages + draw.choices(messages, k=len(messages))
    draw.shuffle(mixed)
    for message in mixed:
        receiver.take(message)
    assert receiver.state() == origin.state()
    assert receiver.knowledge.open_steps == 0

    for message in mixed:
        if draw.random() < kept:
            lossy.take(message)
            assert_nothing_claimed_is_missing(lossy, steps)
            assert_what_is_named_is_held(lossy, steps)
    lossy.pull(origin)
    assert lossy.state() == origin.state()


def rows_of(steps: list[Step]) -> Iterator[tuple[Step, tuple[int, int], int]]:
    """Of every row of every step: the step, (table, key), and the shard."""
    for step in steps:
        for section, shard_of in zip(step.columns, step.shard_of, strict=True):
            for key, shard in zip(section.keys.tolist(), shard_of.tolist(), strict=True):
                yield step, (section.table, key), shard


def assert_nothing_claimed_is_missing(node: Node, steps: list[Step]) -> None:
    """Invariant 3, and the same of the frontier."""
    held = contents(node.store, "ctr")
    for step, row, shard in rows_of(steps):
        covered = max(int(node.replica.vector[shard, WRITER]), int(node.replica.frontier[WRITER])) >= step.stamp
        assert not covered or held.get(row, (0, b""))[0] >= step.stamp


def assert_what_is_named_is_held(node: Node, steps: list[Step]) -> None:
    """A pull names each step of a group that waits, and in which shards it is here."""
    held, known = contents(node.store, "ctr"), node.knowledge.known_steps(1 << 16)
    bits = np.unpackbits(known.shards, axis=1, bitorder="little")
    named = dict(zip(known.stamps.tolist(), bits, strict=True))
    assert sorted(named) == list(named)
    for step, row, shard in rows_of(steps):
        if step.stamp in named and named[step.stamp][shard]:
            assert held.get(row, (0, b""))[0] >= step.stamp
    waiting = [step for step in node.knowledge._open.values() if step.waiting]
    assert len(named) == sum(1 if step.stamps is None else len(step.stamps) for step in waiting)


@given(st.integers(0, 2**32), st.integers(2, 10), st.sampled_from([1, TREES_MAX]))
@settings(deadline=None, max_examples=40)
def test_a_group_keeps_every_row_its_stamp_and_each_step_its_moment(seed: int, count: int, trees: int) -> None:
    draw = random.Random(seed)
    origin = Node()
    steps = [origin.write(number, columns_of(draw, number)) for number in range(1, count + 1)]
    sent: list[tuple[int, int, int, bool]] = []
    counted = dict.fromkeys((step.stamp for step in steps), 0)
    for message in messages_of(draw, steps, trees):
        for section in message.columns:
            live = [True] * len(section.rows) + [False] * (len(section.keys) - len(section.rows))
            stamps = [message.stamp] * len(live) if section.stamps is None else section.stamps.tolist()
            sent += zip([section.table] * len(live), section.keys.tolist(), stamps, live, strict=True)
        if message.steps is None:
            counted[message.stamp] += message.row_count
            assert message.published_ns == next(step.published_ns for step in steps if step.stamp == message.stamp)
            continue
        for stamp, published_ns, rows in zip(*(column.tolist() for column in vars_of(message.steps)), strict=True):
            counted[stamp] += rows
            assert published_ns == next(step.published_ns for step in steps if step.stamp == stamp)
    expected = [
        (section.table, key, step.stamp, place < len(section.rows))
        for step in steps
        for section in step.columns
        for place, key in enumerate(section.keys.tolist())
    ]
    assert sorted(sent) == sorted(expected)
    assert counted == {step.stamp: sum(len(section.keys) for section in step.columns) for step in steps}


def vars_of(steps: m.Steps) -> tuple[np.ndarray, ...]:
    return steps.stamps, steps.published_ns, steps.rows


def test_a_claim_reaches_as_far_as_its_shard_was_touched() -> None:
    """What is claimed by a group's last stamp would make the vectors of equal nodes differ."""
    origin = Node()
    keys = [
        next(key for key in range(100) if origin.replica.shards_of(np.array([key], np.uint64))[0] == shard) for shard in (2, 5)
    ]
    rows = np.zeros((1, 4), np.float32).view(np.uint8)
    item = MODEL.tables["item"].id
    one, two = (origin.write(n + 1, (RowColumns(item, np.array([key], np.uint64), rows),)) for n, key in enumerate(keys))
    claims = message_of([one, two]).claims
    assert claims.shards.tolist() == [2, 5]
    assert claims.until is not None
    assert claims.until.tolist() == [one.stamp, two.stamp]
    assert claims.prev.tolist() == [0, 0]


# --- when steps wait --------------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """What the origin sent: when, and the stamps of the steps in it."""

    at_ms: int
    stamps: list[int]


def pair(**options: object) -> tuple[VirtualCluster, VirtualNode, VirtualNode]:
    """A writer that has written, and a replica that has it."""
    cluster = VirtualCluster(1)
    writer = cluster.add("t1", "train", "train")
    replica = cluster.add("eu1", "eu", seeds=["t1"], **options)  # type: ignore[arg-type]
    cluster.run(3_000)
    assert cluster.publish("t1", "item", [0], 0.0)
    cluster.run(1_000)
    return cluster, writer, replica


def spied(cluster: VirtualCluster, patch: pytest.MonkeyPatch) -> list[Sent]:
    sent: list[Sent] = []
    original = Push._forward

    def forward(self: Push, keyspace: Keyspace, batch: m.Batch, hops: int, *rest: object) -> None:
        if hops == 0 and batch.columns:
            stamps = [batch.stamp] if batch.steps is None else batch.steps.stamps.tolist()
            sent.append(Sent(cluster.now_ms, stamps))
        original(self, keyspace, batch, hops, *rest)  # type: ignore[arg-type]

    patch.setattr(Push, "_forward", forward)
    return sent


def test_the_first_leaves_at_once_and_others_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, writer, _ = pair()
    sent = spied(cluster, monkeypatch)
    begin = cluster.now_ms
    stamps = []
    for number in range(4):
        stamps.append(cluster.publish("t1", "item", [number], float(number)))
        cluster.run(1)
    assert [one.stamps for one in sent] == [stamps[:1]]
    cluster.run(20)
    assert sent == [Sent(begin, stamps[:1]), Sent(begin + LINGER_MS, stamps[1:])]
    at_rest(cluster)
    assert writer.machine is not None
    counters = writer.machine.counters
    assert (counters.groups_held, counters.groups_sent, counters.batches_published) == (1, 3, 5)


def test_whoever_writes_slower_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, writer, _ = pair()
    sent = spied(cluster, monkeypatch)
    for number in range(10):
        before = cluster.now_ms
        stamp = cluster.publish("t1", "item", [number], 1.0)
        assert sent[-1] == Sent(before, [stamp])
        cluster.run(LINGER_MS)
    assert writer.machine is not None
    assert writer.machine.counters.groups_held == 0


def test_what_is_held_is_readable_and_answered_at_once() -> None:
    cluster, writer, replica = pair()
    cluster.publish("t1", "item", [1], 1.0)
    stamp = cluster.publish("t1", "item", [2], 2.0)
    assert stamp, "it is answered"
    assert (MODEL.tables["item"].id, 2) in contents(writer.store, "ctr")
    assert (MODEL.tables["item"].id, 2) not in contents(replica.store, "ctr")


def test_delays_count_from_each_steps_own_publish() -> None:
    cluster, _, _ = pair()
    cluster.meter = Meter()
    for number in range(3):
        cluster.publish("t1", "item", [number], 1.0)
        cluster.run(2)
    cluster.run(50)
    _, second, third = cluster.meter.delays_ms
    assert second == third + 2, "they came together, and one was published 2 ms before the other"
    assert third > LINGER_MS - 4


def test_a_wait_sends_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _, _ = pair()
    sent = spied(cluster, monkeypatch)
    stamps = [cluster.publish("t1", "item", [number], 1.0) for number in range(3)]
    cluster.ask("t1", lambda n: m.WaitRequested(n, cluster.model.id, stamps[0], m.Scope.ALL, 1_000))
    assert len(sent) == 1, "what is waited for has left already"
    cluster.ask("t1", lambda n: m.WaitRequested(n, cluster.model.id, stamps[1], m.Scope.ALL, 1_000))
    assert [one.stamps for one in sent] == [stamps[:1], stamps[1:]]


def test_a_node_that_leaves_sends_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, writer, _ = pair()
    sent = spied(cluster, monkeypatch)
    stamps = [cluster.publish("t1", "item", [number], 1.0) for number in range(2)]
    assert writer.machine is not None
    cluster.feed(writer, writer.machine, m.Leaving())
    assert [one.stamps for one in sent] == [stamps[:1], stamps[1:]]


def test_a_group_is_at_most_so_large(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _, _ = pair()
    sent = spied(cluster, monkeypatch)
    row = 16 + 2 * 8  # value, key, stamp
    monkeypatch.setattr(groups, "GROUP_BYTES_MAX", 5 * row)
    sizes = [1, 2, 2, 2, 7, 1, 5, 1]
    stamps = [cluster.publish("t1", "item", range(size), 1.0) for size in sizes]
    # The first leaves at once. Two of two, and a third would be too many; seven leave alone, as do five.
    assert [one.stamps for one in sent] == [stamps[:1], stamps[1:3], stamps[3:4], stamps[4:5], stamps[5:6], stamps[6:7]]
    cluster.run(10)
    assert [one.stamps for one in sent][-1] == stamps[7:]
    at_rest(cluster)


def test_a_group_is_of_at_most_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _, _ = pair()
    sent = spied(cluster, monkeypatch)
    monkeypatch.setattr(wire, "GROUP_STEPS_MAX", 3)
    stamps = [cluster.publish("t1", "item", [1], 1.0) for _ in range(6)]
    assert [one.stamps for one in sent] == [stamps[:1], stamps[1:4]]
    cluster.run(10)
    assert [one.stamps for one in sent][-1] == stamps[4:]


def test_a_step_in_parts_follows_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _, _ = pair()
    monkeypatch.setattr(wire, "BATCH_BYTES_MAX", 150)
    sent = spied(cluster, monkeypatch)
    stamps = [cluster.publish("t1", "item", range(size), 1.0) for size in (1, 1, 60)]
    cluster.run(10)
    order = [one.stamps for one in sent]
    assert order[:2] == [stamps[:1], stamps[1:2]]
    assert order[2:] == [stamps[2:]] * len(order[2:])
    assert len(order) > 4, "it was not cut"
    at_rest(cluster)


def test_each_keyspace_waits_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also each partition of a model: a step of several is held in each."""
    model = ModelSpec("ctr", 8, {"item": TableSpec("item", 4)}, partitions=2)
    cluster = VirtualCluster(1, model=model)
    cluster.add("t1", "train", "train")
    cluster.add("eu1", "eu", seeds=["t1"])
    cluster.run(3_000)
    cluster.publish("t1", "item", range(20), 0.0)
    cluster.run(1_000)
    sent = spied(cluster, monkeypatch)
    stamps = [cluster.publish("t1", "item", range(20), float(step)) for step in range(3)]
    assert [one.stamps for one in sent] == [stamps[:1]] * 2
    cluster.run(10)
    assert [one.stamps for one in sent][2:] == [stamps[1:]] * 2
    at_rest(cluster)


def test_an_idle_beat_does_not_overtake_what_is_held() -> None:
    cluster, writer, _ = pair()
    stamps = [cluster.publish("t1", "item", [number], 1.0) for number in range(2)]
    assert writer.machine is not None
    writer.machine._core.keyspaces[cluster.model.id].last_batch_ms -= 1_000
    with mock.patch.object(Push, "_forward") as forward:
        writer.machine._push.beat(cluster.now())
    assert [call.args[1].writer_prev for call in forward.call_args_list] == stamps, "a beat follows the last step"


def test_steps_whose_rows_have_classes_join_others() -> None:
    """Rows of the others are not known to matter, so they count as ordinary."""
    origin, group = Node(), Group()
    columns = tuple(replace(section, priority=None) for section in columns_of(random.Random(1), 1))
    known = tuple(replace(section, priority=np.full(len(section.keys), 200, np.uint8)) for section in columns)
    steps = [origin.write(number, one) for number, one in enumerate((columns, known, columns), 1)]
    for step in steps:
        assert group.admits(step)
        group.add(step)
    for section in over_the_wire(message_of(group.take(0))).columns:
        assert section.priority is not None
        assert section.stamps is not None
        assert (section.priority == np.where(section.stamps == steps[1].stamp, 200, NOT_KNOWN)).all()


def test_a_group_of_many_tables_is_not_longer_than_its_rows() -> None:
    """Steps that touch sixteen tables each, others than the one before."""
    group, at, row = Group(), np.zeros(1, np.uint32), np.zeros((1, 16), np.uint8)
    for number in range(wire.GROUP_STEPS_MAX):
        prev = make_stamp(1_700_000_000_000 + number, 0, WRITER)
        columns = tuple(RowColumns(16 * number + table, np.zeros(1, np.uint64), row) for table in range(16))
        stamp, of_shard = make_stamp(1_700_000_000_001 + number, 0, WRITER), [np.zeros(1, np.int64)] * 16
        step = Step(ME, stamp, prev, at, np.array([prev], np.uint64), columns, of_shard, 0)
        if not group.admits(step):
            break
        group.add(step)
    batch = over_the_wire(message_of(group.steps))
    assert batch.step_count > 1
    assert sum(memoryview(frame).nbytes for frame in batch.body) < 2 * batch.payload_bytes + 1_024


def test_a_fresh_writer_id_begins_a_group() -> None:
    origin, group = Node(), Group()
    step = origin.write(1, columns_of(random.Random(1), 1))
    group.add(step)
    assert not group.admits(replace(step, identity=WriterIdentity(8, 100)))


# --- what goes wrong --------------------------------------------------------------------------------------------------------


def test_what_an_origin_held_when_it_died_is_pulled() -> None:
    """Push may lose everything (theorem T7): the rows are stored, and covered by a vector that others compare."""
    cluster, writer, replica = pair()
    for number in range(4):
        assert cluster.publish("t1", "item", [number], float(number + 1))
    cluster.crash("t1")
    cluster.run(500)
    item = MODEL.tables["item"].id
    assert (item, 3) not in contents(replica.store, "ctr"), "the scenario held nothing"
    cluster.restart("t1")
    at_rest(cluster)
    assert contents(replica.store, "ctr")[item, 3] == contents(writer.store, "ctr")[item, 3]
    assert replica.machine is not None
    assert replica.machine.counters.pulls_completed


def test_nothing_waits_while_somebody_speaks_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, writer, _ = pair(protocol_version=1)
    sent = spied(cluster, monkeypatch)
    stamps = [cluster.publish("t1", "item", [number], 1.0) for number in range(4)]
    assert [one.stamps for one in sent] == [[stamp] for stamp in stamps]
    at_rest(cluster)
    assert writer.machine is not None
    assert writer.machine.counters.groups_held == 0


def test_a_group_is_not_forwarded_to_version_1() -> None:
    """One was on its way when a node of version 1 came: it pulls what it does not get."""
    cluster, writer, replica = pair(protocol_version=1)
    with mock.patch.object(Membership, "protocol_min", return_value=PROTOCOL_VERSION):
        for number in range(4):
            assert cluster.publish("t1", "item", [number], 1.0)
        cluster.run(10)
    assert writer.machine is not None
    assert writer.machine.counters.batches_skipped == 1
    at_rest(cluster)
    assert not replica.rejected
    assert check_converged(cluster) == ""


def group_of() -> m.Batch:
    """Three steps of five rows in one table, the last of which is deleted."""
    origin, table = Node(), MODEL.tables["item"]
    rows = np.zeros((4, table.dim), np.float32).view(np.uint8)
    return message_of([origin.write(n, (RowColumns(table.id, np.arange(n, n + 5, dtype=np.uint64), rows),)) for n in (1, 2, 3)])


STAMPS, PUBLISHED, ENDS, RUNS = 4, 5, 6, 8  # places of columns
STAMP_FIELD, PREV_FIELD, COUNT_FIELD = 5, 6, -1  # places in the header
Spoil = Callable[[list[Any], list[Any]], None]


def column(place: int, change: Callable[[Any], Any]) -> Spoil:
    def spoil(_header: list[Any], columns: list[Any]) -> None:
        columns[place] = change(columns[place].copy())

    return spoil


def field_of(place: int, change: Callable[[int], int]) -> Spoil:
    def spoil(header: list[Any], _columns: list[Any]) -> None:
        header[place] = change(header[place])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (column(STAMPS, lambda stamps: stamps[[0, 0, 2]]), "do not follow each other"),
        (column(STAMPS, lambda stamps: stamps[[1, 0, 2]]), "do not follow each other"),
        (column(STAMPS, lambda stamps: stamps + np.array([1, 0, 0], np.uint64)), "do not follow each other"),
        (field_of(STAMP_FIELD, lambda stamp: stamp + 4096), "contradicts its steps"),
        (field_of(PREV_FIELD, lambda _: FIRST), "contradicts its steps"),
        (column(1, lambda prev: prev + np.uint64(FIRST + 2 * STEP)), "contradicts itself"),
        (column(3, lambda parts: parts + np.uint16(1)), "contradicts itself"),
        (column(ENDS, lambda ends: ends + np.uint16(3)), "a claim up to step 5 of 3"),
        (column(RUNS, lambda runs: runs + np.uint32(1)), "rows of 3 steps are not"),
        (column(RUNS, lambda runs: np.roll(runs, 3)), "rows of 3 steps are not"),
        (column(RUNS, lambda runs: runs + np.array([1, 0, 0, 0, 0, 0xFFFFFFFF], np.uint32)), "rows of 3 steps are not"),
        (field_of(COUNT_FIELD, lambda _: 1), "a group of 1 steps"),
        (field_of(COUNT_FIELD, lambda _: wire.GROUP_STEPS_MAX + 1), "a group of 257 steps"),
        (field_of(COUNT_FIELD, lambda _: 70_000), "16-bit"),
        (field_of(COUNT_FIELD, lambda _: 0), "too many|expected|missing"),
    ],
)
def test_groups_that_contradict_themselves_are_refused(spoil: Spoil, complaint: str) -> None:
    header, columns = BATCH.pack(group_of(), PROTOCOL_VERSION)
    decode_batch(header, columns)
    spoil(header, columns)
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode_batch(header, columns)


def decode_batch(header: list[Any], columns: list[Any]) -> None:
    body = body_of(header, columns, PROTOCOL_VERSION)
    number = NUMBER_OF[m.Batch]
    envelope = wire.ENVELOPE.pack(wire.MAGIC, PROTOCOL_VERSION, number, 1, 2, 3, 0, 0, 4, wire.checksum(body))
    wire.decode([memoryview(bytes(frame)) for frame in (envelope, *body)])


def test_a_group_cannot_be_said_in_version_1() -> None:
    with pytest.raises(LocalProtocolError, match="the link speaks 1"):
        wire.encode(replace(ENVELOPE, version=1), group_of())
    with pytest.raises(LocalProtocolError, match="the link speaks 1"):
        wire.encode(replace(ENVELOPE, version=1), wire.seal(group_of()))
