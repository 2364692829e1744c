"""The feed, on a node's store in shared memory that is written while it reads; what it does when things go wrong."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ekko.serve
from ekko.errors import ConfigError, ModelError, SinkError
from ekko.generations import Alias, Generation
from ekko.model import SHARDS_MAX, ModelSpec, TableSpec, TensorSpec
from ekko.serve import cursor as cursors
from ekko.serve.comparing import Walk
from ekko.serve.cursor import Cursor, Known, Place, Way, way_from
from ekko.serve.feeding import Feed
from ekko.serve.session import Session
from ekko.serve.sink import Batch, Sink
from ekko.serve.sink_conformance import feeds
from ekko.serve.sink_conformance.feeds import MODEL, Node, caught_up
from ekko.serve.source import Source
from ekko.store.changes import ChangeRing
from p2p.stamps import WRITERS_MAX
from sim_cluster.processes import wait_until
from tests.ekko.sinks.plain_sink import PlainSink, PlainStore, PlainSubject
from tests.seeds import seeds

Patch = pytest.MonkeyPatch
TIMEOUT_S = 60.0
# Before and after each of these the node is written.
READS = ("place", "known", "changes", "whole_since", "refresh", "read")


@pytest.fixture
def subject() -> PlainSubject:
    return PlainSubject()


@pytest.fixture
def node(tmp_path: Path, subject: PlainSubject) -> Iterator[Node]:
    with Node(subject, tmp_path / "node") as node:
        yield node


class Restless:
    """Writes the node whenever the feed has read something of it: the next thing that it reads is another one."""

    def __init__(self, node: Node, seed: int, patch: Patch) -> None:
        self.node = node
        self.resting = True
        self._rng = np.random.default_rng(seed)
        self._drops = seed % 2 == 0  # without, nothing is swept but at first: a sweep mends what was missed
        for name in READS:
            patch.setattr(Source, name, self._around(getattr(Source, name)))

    def _around(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **named: Any) -> Any:
            self._maybe_write()
            found = read(*args, **named)
            self._maybe_write()
            return found

        return both

    def _maybe_write(self) -> None:
        if self.resting or self._rng.random() < 0.4:
            return
        node, keys = self.node, self._rng.choice(self.node.subject.keys, 5, replace=False)
        what = self._rng.random()
        if what < 0.6:
            node.put(keys)
        elif what < 0.75:
            node.delete(keys)
        elif what < 0.85:
            node.restart()
        elif what < 0.95 and self._drops:
            live = node.drop(keys)
            if what > 0.9:
                node.come_back(live[:3])
        elif what < 0.96 and "user" not in node.model.spec.tables:
            node.add_table("user")
            node.put(node.subject.keys[:3], "user")
        elif "user" in node.model.spec.tables:
            node.put(keys, "user")


def restless_history(node: Node, subject: PlainSubject, seed: int, patch: Patch) -> None:
    """Feeds that come and go while the node is written; then it rests, and the sink is compared."""
    patch.setattr("ekko.serve.session.ENTRIES_AT_ONCE", 16)
    patch.setattr("ekko.serve.comparing.rows_at_once", lambda dim: 20)
    node.put(subject.keys[:60])
    restless = Restless(node, seed, patch)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        feed = Feed(node.run_dir, MODEL, subject.sink())
        restless.resting = False
        for _ in range(int(rng.integers(1, 30))):
            feed.turn()
        if rng.random() < 0.5:
            restless.resting = True
            feed.leave_cursor()
    restless.resting = True
    sink = subject.sink()
    caught_up(Feed(node.run_dir, MODEL, sink))
    node.check(sink, f"seed {seed}")


@pytest.mark.parametrize("seed", seeds(4, 8))
def test_whatever_is_written_while_a_feed_reads_arrives(
    node: Node, subject: PlainSubject, seed: int, monkeypatch: Patch
) -> None:
    restless_history(node, subject, seed, monkeypatch)


def rows_change_while_all_are_compared(node: Node, subject: PlainSubject, patch: Patch) -> None:
    """After a daemon's restart; those that the walk has passed already."""
    sink = subject.sink()
    node.put(subject.keys)
    caught_up(Feed(node.run_dir, MODEL, sink))
    node.restart()
    following = Walk.next
    late = [subject.keys[:3]]

    def next_part(self: Walk) -> Any:
        part = following(self)
        if part is None and late:
            node.put(late.pop())
        return part

    patch.setattr(Walk, "next", next_part)
    caught_up(Feed(node.run_dir, MODEL, sink))
    node.check(sink, "rows changed while all were compared")
    assert not late


def a_cursor_is_left_before_all_is_sent(node: Node, subject: PlainSubject, patch: Patch) -> None:
    """And what is noted by then is lost with the daemon."""
    patch.setattr("ekko.serve.session.COMMIT_S", 60.0)  # none is left meanwhile
    sink = subject.sink()
    feed = Feed(node.run_dir, MODEL, sink)
    node.put(subject.keys)
    caught_up(feed)
    node.put(subject.keys[:9])
    while feed.turn():
        pass
    node.put(subject.keys[40:50])
    feed.leave_cursor()
    node.restart()
    caught_up(Feed(node.run_dir, MODEL, sink))
    node.check(sink, "a cursor was left before all was sent")


def a_daemon_restarts_before_the_feed_has_looked(node: Node, subject: PlainSubject, patch: Patch) -> None:
    """And notes nothing again of what it had noted."""
    sink = subject.sink()
    feed = Feed(node.run_dir, MODEL, sink)
    node.put(subject.keys)
    caught_up(feed)
    node.put(subject.keys[:9])
    node.restart()
    caught_up(feed)
    node.check(sink, "a daemon restarted before the feed had looked")


OF_THE_SUITE = (feeds.a_feed_brings_what_the_node_has, feeds.what_went_while_nobody_looked_is_found)
HISTORIES = (
    rows_change_while_all_are_compared,
    a_cursor_is_left_before_all_is_sent,
    a_daemon_restarts_before_the_feed_has_looked,
)


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
def test_moments_that_matter(history: Callable[..., None], node: Node, subject: PlainSubject, monkeypatch: Patch) -> None:
    history(node, subject, monkeypatch)


# --- bugs of the feed, each of which such histories notice ----------------------------------------------------------------


def the_place_is_read_last(patch: Patch) -> None:
    go_on = Session._go_on

    def late(self: Session, moment: Any) -> bool:
        walked = self._walk is not None
        busy = go_on(self, moment)
        if walked and self._walk is None:
            self._place = self._source.place()
        return busy

    patch.setattr(Session, "_go_on", late)


def what_is_known_is_read_last(patch: Patch) -> None:
    commit = Session.commit

    def late(self: Session) -> None:
        self._known = self._source.known()
        commit(self)

    patch.setattr(Session, "commit", late)


def breaks_are_passed_over(patch: Patch) -> None:
    def lose(self: Session, now: Place, moment: Any) -> None:
        self._place = now

    patch.setattr(Session, "_lose_sight", lose)


def nothing_came_back(patch: Patch) -> None:
    send = Session._send
    patch.setattr(Session, "_send", lambda self, keys, back: send(self, keys, back[:0]))


def nothing_is_swept(patch: Patch) -> None:
    patch.setattr(Session, "_sweep_on", lambda self: False)


def no_shard_is_whole(patch: Patch) -> None:
    patch.setattr(Walk, "finds_removals", False)
    patch.setattr(Source, "whole_since", lambda self, known, now: np.zeros(self.shards, np.bool_))


def new_tables_are_as_others(patch: Patch) -> None:
    patch.setattr(Session, "_offer_tables", lambda self: None)


@pytest.mark.parametrize(
    "bug",
    [
        the_place_is_read_last,
        what_is_known_is_read_last,
        breaks_are_passed_over,
        nothing_came_back,
        nothing_is_swept,
        no_shard_is_whole,
        new_tables_are_as_others,
    ],
    ids=lambda bug: bug.__name__,
)
def test_a_bug_of_the_feed_is_noticed(bug: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch) -> None:
    runs: list[Callable[[Node, PlainSubject, Patch], None]] = [*HISTORIES]
    runs += [lambda *_, case=case: case(PlainSubject()) for case in OF_THE_SUITE]
    runs += [lambda *args, seed=seed: restless_history(*args[:2], seed, args[2]) for seed in range(4)]
    for number, run in enumerate(runs):
        with monkeypatch.context() as patch:
            bug(patch)
            subject = PlainSubject()
            with Node(subject, tmp_path / f"node-{number}") as node:
                try:
                    run(node, subject, patch)
                except (AssertionError, KeyError):
                    return
    pytest.fail("nothing was noticed")


# --- without a ring, with errors, in a thread -----------------------------------------------------------------------------


def test_a_node_without_room_for_a_ring_is_looked_through(tmp_path: Path, subject: PlainSubject, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ChangeRing, "attach", classmethod(lambda cls, *args: None))
    monkeypatch.setattr("ekko.serve.session.WALK_S", 0.0)  # to remove what is gone takes longer, in any case
    with Node(subject, tmp_path / "node") as node:
        sink = subject.sink()
        node.put(subject.keys)
        with ekko.serve.feed(node.run_dir, MODEL, sink) as feed:
            feed.flush(TIMEOUT_S)
            node.check(sink, "the first state")
        node.put(subject.keys[:30])
        with ekko.serve.feed(node.run_dir, MODEL, sink) as feed:
            feed.flush(TIMEOUT_S)
            node.check(sink, "what another feed found")
            assert feed.counts.rows == 30
            node.delete(subject.keys[20:40])
            node.drop(subject.keys[30:50])
            feed.flush(TIMEOUT_S)
            node.check(sink, "changes")
            assert feed.counts.noted == 0


def test_no_key_goes_back_while_a_thread_writes(node: Node, subject: PlainSubject) -> None:
    newest: dict[int, int] = {}
    store = subject.store

    class Watching(PlainSink):
        def apply(self, batch: Batch) -> None:
            for key, stamp in zip(batch.keys.tolist(), batch.stamps.tolist(), strict=True):
                assert newest.get(key, 0) <= stamp
                newest[key] = stamp
            assert np.unique(batch.keys).size == batch.keys.size
            super().apply(batch)

    stop = threading.Event()

    def write() -> None:
        rng = np.random.default_rng(0)
        while not stop.is_set():
            node.put(rng.choice(subject.keys, 20, replace=False))

    writer = threading.Thread(target=write)
    sink = Watching(store)
    with ekko.serve.feed(node.run_dir, MODEL, sink) as feed:
        writer.start()
        try:
            for _ in range(20):
                feed.flush(TIMEOUT_S)
        finally:
            stop.set()
            writer.join()
        feed.flush(TIMEOUT_S)
        node.check(sink, "after all")
        counts = feed.counts
        # A ring that went round while this thread wrote and the feed's stood still is followed by a walk.
        assert counts.noted > counts.rows - 128 * counts.walks
        assert counts.coalesced >= counts.noted - counts.rows
        assert counts.error == ""


class EmptiedError(SinkError):
    """What was in the store is gone in the moment in which this is raised."""


class Failing(PlainSink):
    """Raises whatever it is told to raise, from its next batches."""

    def __init__(self, store: PlainStore) -> None:
        super().__init__(store)
        self.errors: list[Exception] = []
        self.closed = 0

    def apply(self, batch: Batch) -> None:
        if self.errors:
            error = self.errors.pop(0)
            if isinstance(error, EmptiedError):
                self._store.tables, self._store.cursor = {}, None
            raise error
        super().apply(batch)

    def close(self) -> None:
        self.closed += 1


def test_a_sink_that_fails_is_opened_again_and_lacks_nothing(node: Node, subject: PlainSubject, monkeypatch: Patch) -> None:
    monkeypatch.setattr("ekko.serve.feeding.RETRY_S_MAX", 0.01)
    sink = Failing(subject.store)
    node.put(subject.keys)
    sink.errors = [SinkError("the store is out of reach")] * 3
    with ekko.serve.feed(node.run_dir, MODEL, sink) as feed:
        feed.flush(TIMEOUT_S)
        node.check(sink, "it failed three times")
        assert feed.counts.retries == 3
        assert feed.counts.error == ""
        sink.errors = [EmptiedError("the store has lost what was in it")]
        node.put(subject.keys[:3])
        feed.flush(TIMEOUT_S)
        node.check(sink, "it was emptied")
    assert sink.closed == 1


def test_another_error_ends_the_feed_and_is_told(node: Node, subject: PlainSubject) -> None:
    sink = Failing(subject.store)
    node.put(subject.keys)
    sink.errors = [ZeroDivisionError("a bug of the sink")]
    feed = ekko.serve.feed(node.run_dir, MODEL, sink)
    with pytest.raises(ZeroDivisionError, match="a bug of the sink"):
        feed.flush(TIMEOUT_S)
    with pytest.raises(ZeroDivisionError):
        feed.close()
    assert sink.closed == 1
    assert "a bug of the sink" in feed.counts.error


def test_a_flush_says_what_is_in_the_way(node: Node, subject: PlainSubject, tmp_path: Path, monkeypatch: Patch) -> None:
    with ekko.serve.feed(tmp_path / "nothing", MODEL, subject.sink()) as feed:
        wait_until(lambda: feed.counts.retries > 0, "the feed to look", TIMEOUT_S)
        with pytest.raises(TimeoutError, match="there is no store"):
            feed.flush(0.2)
    node.put(subject.keys)
    sink = subject.sink()
    caught_up(Feed(node.run_dir, MODEL, sink))
    node.begin_anew()
    with ekko.serve.feed(node.run_dir, MODEL, sink) as feed:
        wait_until(lambda: feed.counts.sweeps > 0, "all rows to be sent", TIMEOUT_S)
        with pytest.raises(TimeoutError, match="caught up with the others"):
            feed.flush(0.2)
    with pytest.raises(TimeoutError, match="was stopped"):
        feed.flush(1.0)


def test_an_alias_and_a_model_that_was_dropped_are_refused(node: Node, subject: PlainSubject) -> None:
    feed = Feed(node.run_dir, MODEL, subject.sink())
    feed.turn()
    node.store.set_alias(Alias("prod", Generation(MODEL, 0), None, 1, 1, 1))
    with pytest.raises(ModelError, match="'prod' is an alias, of model 'ctr' now"):
        Feed(node.run_dir, "prod", subject.sink()).turn()
    node.store.drop_model(MODEL, 1)
    with pytest.raises(FileNotFoundError):  # then it is looked for again
        feed.turn()
    with pytest.raises(ModelError, match="model 'ctr' was dropped"):
        Feed(node.run_dir, MODEL, subject.sink()).run()
    with pytest.raises(ModelError, match="model"):
        Feed(node.run_dir, "no/name", subject.sink())


# --- tensors, codecs, expiry, tables --------------------------------------------------------------------------------------


def test_tensors_come_whole_and_once_for_each_change(node: Node, subject: PlainSubject) -> None:
    told: list[tuple[str, float, int]] = []

    class Taking(PlainSink):
        def apply_dense(self, name: str, values: Any, stamp: int) -> None:
            assert values.shape == (20, 30)
            assert (values == values[0, 0]).all()
            told.append((name, float(values[0, 0]), stamp))

    spec = TensorSpec("top.weight", (20, 30), "float32")
    node.store.add_tensor(MODEL, spec)

    def publish(value: float, rows: int) -> None:
        from ekko.model import DENSE_DIM, DENSE_SPEC
        from ekko.serve.sink_conformance.subject import stamp
        from p2p.replica import RowColumns

        node.at += 1
        values = np.full((spec.rows, DENSE_DIM), value, np.float32)
        node.model.apply([RowColumns(DENSE_SPEC.id, spec.keys[:rows], values[:rows].view(np.uint8))], stamp(node.at))

    feed = Feed(node.run_dir, MODEL, Taking(subject.store))
    publish(1.0, 1)  # not all of it is here
    caught_up(feed)
    assert told == []
    publish(2.0, 3)
    caught_up(feed)
    publish(3.0, 3)
    publish(4.0, 3)
    caught_up(feed)
    assert [(name, value) for name, value, _ in told] == [("top.weight", 2.0), ("top.weight", 4.0)]
    assert told[1][2] > told[0][2]
    assert feed.counts.tensors == 2


def test_rows_that_expired_are_forgotten(tmp_path: Path, subject: PlainSubject) -> None:
    with Node(subject, tmp_path / "node") as node:
        table = TableSpec("user", 3, ttl_s=60)
        node.store.add_model(ModelSpec(MODEL, 8, {"user": table}))
        sink = subject.sink()
        feed = Feed(node.run_dir, MODEL, sink)
        node.at = int(time.time() * 1000) - 1_700_000_000_000
        node.put(subject.keys[:10], "user")
        caught_up(feed)
        assert subject.rows("user", subject.keys[:10]).all()
        node.at -= 120_000
        node.put(subject.keys[20:30], "user")  # written, and too old to be read
        node.drop(subject.keys[:5], "user")
        caught_up(feed)
        assert feed.counts.forgotten == 15
        assert not subject.rows("user", subject.keys[20:30]).any()
        assert subject.rows("user", subject.keys[5:10]).all()
        assert not subject.rows("user", subject.keys[:5]).any()


def test_tables_may_be_chosen_and_one_that_is_chosen_later_comes_whole(node: Node, subject: PlainSubject) -> None:
    node.add_table("user")
    for table in subject.tables:
        node.put(subject.keys, table)
    sink = subject.sink()
    caught_up(Feed(node.run_dir, MODEL, sink, tables=["item"]))
    assert set(subject.store.tables) == {"item"}
    node.put(subject.keys[:5])
    both = Feed(node.run_dir, MODEL, sink)
    caught_up(both)
    node.check(sink, "both tables")
    assert both.counts.rows <= 2 * 5 + 128
    one = Feed(node.run_dir, MODEL, sink, tables=["user"])
    caught_up(one)
    assert set(subject.store.tables) == {"user"}
    assert one.counts.rows == 0


# --- cursors --------------------------------------------------------------------------------------------------------------


def known(shards: int = 8) -> Known:
    vector = np.zeros((WRITERS_MAX, shards), np.uint64)
    vector[[3, 4095]] = np.random.default_rng(0).integers(1, 2**63, (2, shards))
    return Known(vector, np.arange(SHARDS_MAX // 8, dtype=np.uint64).astype(np.uint8))


def test_a_cursor_comes_back_as_it_was() -> None:
    held = Cursor(Place("ekko-ab-cd", 7, 3, 1 << 40), known(), {"item": (64, 2), "user": (8, 0)}, sweep=True)
    again = cursors.decode(cursors.encode(held))
    assert again is not None
    assert (again.place, again.tables, again.sweep) == (held.place, held.tables, True)
    assert (again.known.vector == held.known.vector).all()
    assert (again.known.incomplete == held.known.incomplete).all()


def test_junk_is_no_cursor() -> None:
    whole = cursors.encode(Cursor(Place("ekko-ab-cd", 7, 3, 9), known(), {"item": (64, 2)}))
    rng = np.random.default_rng(1)
    assert cursors.decode(None) is None
    assert cursors.decode(b"") is None
    for _ in range(300):
        junk = bytearray(whole)
        for place in rng.integers(0, min(len(junk), 120), 3):
            junk[place] = rng.integers(256)
        cursors.decode(bytes(junk))  # something or nothing, but no error
        assert cursors.decode(whole[: rng.integers(len(whole))]) is None


@pytest.mark.parametrize(
    ("now", "way"),
    [
        (Place("a", 1, 2, 100), Way.FOLLOW),
        (Place("a", 1, 2, 200), Way.FOLLOW),
        (Place("a", 1, 2, 201), Way.COMPARE),  # the ring has gone round
        (Place("a", 1, 2, 99), Way.COMPARE),  # a ring that began anew
        (Place("a", 1, 3, 100), Way.COMPARE),  # a daemon attached
        (Place("a", 1), Way.COMPARE),  # there is no ring
        (Place("b", 1, 2, 100), Way.EVERYTHING),  # another store
        (Place("a", 2, 2, 100), Way.EVERYTHING),  # another incarnation
    ],
)
def test_the_way_to_go_on(now: Place, way: Way) -> None:
    held = Cursor(Place("a", 1, 2, 100), known())
    assert way_from(held, now, 100, 8) is way
    assert way_from(None, now, 100, 8) is Way.EVERYTHING
    assert way_from(held, now, 100, 9) is Way.EVERYTHING


def test_what_is_missing_is_named(monkeypatch: Patch) -> None:
    import sys

    import ekko.sinks

    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "ekko.sinks.redis", raising=False)
    monkeypatch.delitem(ekko.sinks.__dict__, "RedisSink", raising=False)
    with pytest.raises(ConfigError, match=r"RedisSink needs the package redis.*ekko-dissemination\[redis\]"):
        _ = ekko.sinks.RedisSink


def test_a_class_without_the_methods_is_no_sink() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Sink()  # type: ignore[abstract]
