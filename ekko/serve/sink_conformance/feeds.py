"""A real feed beside a node's store, restarts, a ring that goes round, a store that begins anew."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import numpy as np

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve.feeding import Feed
from ekko.serve.sink import Sink
from ekko.serve.sink_conformance.subject import BASE_MS, MODEL, U64, Subject, held, stamp, values
from ekko.store import Store, layout
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import writer_of

TURNS_MAX: Final = 10_000  # of a feed until it has nothing to do
RING_ENTRIES: Final = 1 << layout.CHANGES_LOG2


class Node:
    """A node's store without its daemon, written by the test; and what readers would find in it."""

    def __init__(self, subject: Subject, run_dir: Path) -> None:
        self.subject = subject
        self.run_dir = run_dir
        self.at = 0
        self._begin()

    def _begin(self) -> None:
        self.store = Store.open(self.run_dir)
        first, *_ = self.subject.tables
        self.add_table(first)

    @property
    def model(self) -> ModelStore:
        """The one."""
        return self.store.models[MODEL]

    def add_table(self, table: str) -> None:
        """Have this table, too."""
        self.store.add_model(ModelSpec(MODEL, 8, {table: TableSpec(table, self.subject.tables[table])}))

    def put(self, keys: U64, table: str = "item") -> None:
        """Publish rows that only this call has."""
        self.at += 1
        self._apply(table, keys, encode("float32", values(self.subject, table, keys, self.at)), self.at)

    def delete(self, keys: U64, table: str = "item") -> None:
        """Publish that they are gone."""
        self.at += 1
        self._apply(table, keys, np.empty((0, 4 * self.subject.tables[table]), np.uint8), self.at)

    def _apply(self, table: str, keys: U64, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], at: int) -> None:
        model = self.model
        model.apply([RowColumns(table_id(table), keys, rows)], stamp(at))
        writer = writer_of(stamp(at))
        for known in (model.vector, model.frontiers):  # after the rows, as always (R4)
            known[:, writer] = np.maximum(known[:, writer], np.uint64(stamp(at)))
        model.set_synced_until(int(time.time() * 1000) + 60_000)

    def drop(self, keys: U64, table: str = "item") -> U64:
        """Let go of rows for good, as an eviction does: what is deleted and what is live. Returns the keys of the latter."""
        live = keys[self.model.lookup(table, keys)[1] > 0]
        places = self.model.table(table_id(table)).resolve(keys)
        self.model.remove(table_id(table), places[places >= 0], complete=False)
        return live

    def come_back(self, keys: U64, table: str = "item") -> None:
        """Rows of these keys come back, as evicted ones do that are fetched: versions that the node knew before."""
        at = max(1, self.at - 20)
        rows = encode("float32", values(self.subject, table, keys, at))
        stamps = np.full(keys.size, stamp(at), np.uint64)
        self.model.copy([RowColumns(table_id(table), keys, rows, stamps)])

    def restart(self) -> None:
        """As a daemon that is started again on memory that is as it was."""
        self.store.close()
        self.store = Store.open(self.run_dir)
        assert self.store.resumed

    def begin_anew(self) -> None:
        """As a daemon whose memory was lost."""
        self.store.destroy()
        self._begin()

    def check(self, sink: Sink, why: str) -> None:
        """The sink has what the node has, and nothing else, in all tables."""
        for table in self.model.spec.tables:
            keys = self.subject.keys
            rows, stamps = self.model.lookup(table, keys)
            wanted = np.where((stamps > 0)[:, None], self.subject.stored(rows), np.float32(0))
            found = self.subject.rows(table, keys)
            wrong = np.flatnonzero((found != wanted).any(axis=1))
            assert not wrong.size, f"{why}: key {keys[wrong[0]]} of {table!r} is {found[wrong[0]]}, expected {wanted[wrong[0]]}"
            there = dict(zip(keys[stamps > 0].tolist(), stamps[stamps > 0].tolist(), strict=True))
            assert held(sink, table) == there, f"{why}: held is not what the node has of {table!r}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.destroy()


@contextmanager
def node_of(subject: Subject) -> Iterator[Node]:
    """A node's store, for as long as a block runs."""
    with tempfile.TemporaryDirectory() as folder, Node(subject, Path(folder) / "node") as node:
        yield node


def caught_up(feed: Feed) -> None:
    """Turn by turn, until there is nothing to do; the cursor is left behind as by a feed that is stopped."""
    for _ in range(TURNS_MAX):
        if not feed.turn():
            feed.leave_cursor()
            return
    raise AssertionError(f"the feed has not ended after {TURNS_MAX} turns: {feed.counts}")


def a_feed_brings_what_the_node_has(subject: Subject) -> None:
    """A first state, then updates, deletions, rows that go for good, and that come back."""
    with node_of(subject) as node:
        sink, keys = subject.sink(), subject.keys
        node.at = 30
        node.put(keys)
        feed = Feed(node.run_dir, MODEL, sink)
        caught_up(feed)
        node.check(sink, "the first state")
        node.put(keys[:40])
        node.delete(keys[30:50])
        node.put(keys[45:60])
        caught_up(feed)
        node.check(sink, "updates and deletions")
        node.drop(keys[:60])
        caught_up(feed)
        node.check(sink, "rows went for good")
        node.come_back(keys[:20])
        assert node.model.lookup("item", keys[:20])[1].all()
        node.put(keys[10:15])
        caught_up(feed)
        node.check(sink, "older rows came back")
        node.come_back(node.drop(keys[60:70]))
        caught_up(feed)
        node.check(sink, "rows went, and came back at once, in older versions")
        assert feed.counts.walks == 1, "changes are not followed, but looked for"
        sink.close()


def a_feed_goes_on_where_another_one_ended(subject: Subject) -> None:
    """Without rows that the sink has; with what it was not told; after a kill, with some of it again."""
    with node_of(subject) as node:
        keys, sink = subject.keys, subject.sink()
        node.put(keys)
        caught_up(Feed(node.run_dir, MODEL, sink))
        node.put(keys[:9])
        node.delete(keys[9:12])
        again = Feed(node.run_dir, MODEL, sink)
        caught_up(again)
        node.check(sink, "another feed went on")
        assert again.counts.walks == 0, "another feed began from the beginning"
        assert again.counts.rows == 9, f"another feed sent {again.counts.rows} rows, expected 9"
        killed = Feed(node.run_dir, MODEL, sink)
        node.put(keys[5:30])
        while killed.turn():
            pass  # and no cursor is left behind
        node.put(keys[25:40])
        node.restart()
        node.delete(keys[40:50])
        caught_up(Feed(node.run_dir, MODEL, sink))
        node.check(sink, "a feed went on after a kill, and after the node's restart")
        sink.close()


def what_the_ring_lost_is_found(subject: Subject) -> None:
    """A sink that is so slow that changes are overwritten, and rows that went meanwhile."""
    with node_of(subject) as node:
        keys, sink = subject.keys, subject.sink()
        node.put(keys)
        feed = Feed(node.run_dir, MODEL, sink)
        caught_up(feed)
        node.put(keys[:50])
        node.drop(keys[60:70])
        node.delete(keys[70:80])
        node.drop(keys[70:75])
        for _ in range(RING_ENTRIES // 10 + 1):
            node.put(keys[20:30])
        before = feed.counts.rows
        caught_up(feed)
        node.check(sink, "the ring had gone round")
        assert feed.counts.overflows == 1, "the ring has not gone round"
        assert feed.counts.rows - before <= 2 * keys.size, "rows were sent once for each change"
        sink.close()


def what_went_while_nobody_looked_is_found(subject: Subject) -> None:
    """Rows that were evicted, some of which came back in older versions, before a daemon began anew."""
    with node_of(subject) as node:
        keys, sink = subject.keys, subject.sink()
        node.at = 30
        node.put(keys)
        caught_up(Feed(node.run_dir, MODEL, sink))
        node.drop(keys[10:20])
        node.come_back(node.drop(keys[20:30])[:5])
        node.restart()
        caught_up(Feed(node.run_dir, MODEL, sink))
        node.check(sink, "rows went while no feed was there")
        sink.close()


def a_node_that_begins_anew_is_followed(subject: Subject) -> None:
    """What it does not have any more goes, when it has caught up; what it has in an older version is taken."""
    with node_of(subject) as node:
        keys, sink = subject.keys, subject.sink()
        node.at = 50
        node.put(keys)
        feed = Feed(node.run_dir, MODEL, sink)
        caught_up(feed)
        node.begin_anew()
        node.at = 10
        node.put(keys[:20])
        node.model.set_synced_until(0)
        caught_up(feed)
        late = subject.rows("item", keys[20:])
        assert late.any(axis=1).all(), "a node that has not caught up is believed to lack rows for good"
        node.model.set_synced_until(int(time.time() * 1000) + 60_000)
        caught_up(feed)
        node.check(sink, "the node began anew")
        sink.close()


def tables_that_come_later_are_fed(subject: Subject) -> None:
    """With their first rows, while one feed runs and before the next one."""
    with node_of(subject) as node:
        keys, sink = subject.keys, subject.sink()
        _, *later = subject.tables
        node.put(keys[:10])
        feed = Feed(node.run_dir, MODEL, sink)
        caught_up(feed)
        for number, table in enumerate(later):
            node.add_table(table)
            node.put(keys, table)
            caught_up(feed)
            node.check(sink, f"table {table!r} came")
            if number == 0:
                feed = Feed(node.run_dir, MODEL, sink)
        node.store.drop_table(MODEL, later[0], BASE_MS)
        caught_up(feed)
        assert not held(sink, later[0]), "rows of a table that was dropped are there"
        node.check(sink, "a table was dropped")
        sink.close()
