"""Batches that come by hand: what counts, what is repeated, what comes late."""

from collections.abc import Callable

import numpy as np

from ekko.errors import SinkError, SinkTakenError
from ekko.serve.sink import Batch, Removed
from ekko.serve.sink_conformance.subject import MODEL, Subject, expect, gone, held, opened, put, stamp, values


def rows_are_written_as_they_come(subject: Subject) -> None:
    """All keys, the least and the largest too, in all tables."""
    sink = opened(subject)
    for table in subject.tables:
        sink.apply(put(subject, subject.keys, 1, table))
    for table in subject.tables:
        expect(subject, subject.keys, 1, "rows were written", table)
    sink.apply(put(subject, subject.keys[:20], 2))
    expect(subject, subject.keys[:20], 2, "newer rows were written")
    expect(subject, subject.keys[20:], 1, "other rows were written")
    expect(subject, subject.keys, 1, "rows of another table were written", "user")


def repeats_change_nothing(subject: Subject) -> None:
    """The same batches once more, in the same order and in another one."""
    sink = opened(subject)
    history = [
        put(subject, subject.keys[:30], 1),
        put(subject, subject.keys[10:40], 2),
        gone(subject, subject.keys[:5], 3),
        put(subject, subject.keys[20:30], 4),
    ]
    for batch in [*history, *history, *reversed(history), history[1], history[0]]:
        sink.apply(batch)
    expect(subject, subject.keys[:5], None, "deleted, then batches came again")
    expect(subject, subject.keys[5:10], 1, "batches came again")
    expect(subject, subject.keys[10:20], 2, "batches came again")
    expect(subject, subject.keys[20:30], 4, "batches came again")
    expect(subject, subject.keys[30:40], 2, "batches came again")


def what_is_older_never_wins(subject: Subject) -> None:
    """A row, a deletion, a later one; stamps that differ in their upper, and only in their lowest bits."""
    sink = opened(subject)
    for later, earlier in ((1 << 30, 1), (3, 2), (1 << 20, 1 << 19)):
        keys = subject.keys
        sink.apply(put(subject, keys, later))
        sink.apply(put(subject, keys, earlier))
        expect(subject, keys, later, "an older row came")
        sink.apply(gone(subject, keys, earlier))
        expect(subject, keys, later, "an older deletion came")
        sink.apply(gone(subject, keys, later, forget=True))
    one = subject.keys[:1]
    near = [Batch("item", one, values(subject, "item", one, at), np.array([stamp(5) + at], np.uint64)) for at in (1, 0)]
    for batch in near:
        sink.apply(batch)
    expect(subject, one, 1, "a row came whose stamp is less by one")


def what_is_deleted_stays_deleted(subject: Subject) -> None:
    """Until something newer comes."""
    sink = opened(subject)
    keys = subject.keys[:16]
    sink.apply(put(subject, keys, 1))
    sink.apply(gone(subject, keys, 3))
    expect(subject, keys, None, "deleted")
    sink.apply(put(subject, keys, 2))
    sink.apply(put(subject, keys, 3))
    expect(subject, keys, None, "deleted, and an older row came late")
    assert not held(sink), "held tells of keys that were deleted"
    sink.apply(put(subject, keys, 4))
    expect(subject, keys, 4, "deleted, and published again")
    sink.apply(gone(subject, subject.keys[16:32], 5))
    sink.apply(put(subject, subject.keys[16:32], 4))
    expect(subject, subject.keys[16:32], None, "deleted before it came")


def what_is_forgotten_may_come_back(subject: Subject) -> None:
    """In the same version, or in an older one; but a newer one is not forgotten."""
    sink = opened(subject)
    keys = subject.keys[:16]
    sink.apply(put(subject, keys, 5))
    sink.apply(gone(subject, keys, 4, forget=True))
    expect(subject, keys, 5, "an older version was to be forgotten")
    sink.apply(gone(subject, keys, 6, forget=True))
    expect(subject, keys, None, "forgotten")
    assert not held(sink), "held tells of keys that were forgotten"
    sink.apply(put(subject, keys, 5))
    expect(subject, keys, 5, "forgotten, and came back")
    sink.apply(put(subject, keys, 3, forgotten=Removed(keys, np.full(keys.size, stamp(5), np.uint64))))
    expect(subject, keys, 3, "forgotten and there again in one batch, in an older version")
    sink.apply(gone(subject, keys, 7))
    sink.apply(gone(subject, keys, 8, forget=True))
    sink.apply(put(subject, keys, 2))
    expect(subject, keys, 2, "its deletion was forgotten, and an older version came back")


def held_tells_of_all_rows(subject: Subject) -> None:
    """With their stamps, in parts, each table for itself."""
    sink = opened(subject)
    assert not held(sink), "held tells of keys of an empty store"
    sink.apply(put(subject, subject.keys, 1))
    sink.apply(put(subject, subject.keys[:9], 2))
    sink.apply(gone(subject, subject.keys[9:12], 3))
    wanted = dict.fromkeys(subject.keys[:9].tolist(), stamp(2)) | dict.fromkeys(subject.keys[12:].tolist(), stamp(1))
    assert held(sink) == wanted, "held does not tell what was written"
    assert not held(sink, "user"), "held tells of another table's keys"


def tables_come_and_go(subject: Subject) -> None:
    """A table is told of any number of times; one that is dropped is empty when it comes again, and older rows count there."""
    sink = opened(subject)
    keys = subject.keys[:16]
    for table, dim in subject.tables.items():
        sink.apply(put(subject, keys, 5, table))
        sink.add_table(table, dim)
    sink.drop_table("item")
    sink.drop_table("never there")
    sink.add_table("item", subject.tables["item"])
    expect(subject, keys, None, "the table was dropped")
    expect(subject, keys, 5, "another table was dropped", "user")
    assert not held(sink), "held tells of keys of a table that was dropped"
    sink.apply(put(subject, keys, 1))
    expect(subject, keys, 1, "the table was dropped and came again")


def the_cursor_is_kept(subject: Subject) -> None:
    """Of an empty store there is none; of a store that outlives its sink, another sink finds it."""
    sink = subject.sink()
    assert sink.open(MODEL) is None, "an empty store has a cursor"
    for table, dim in subject.tables.items():
        sink.add_table(table, dim)
    for cursor in (b"\x00\xff first", b"second " * 20_000):
        sink.apply(put(subject, subject.keys[:4], 1))
        sink.commit(cursor)
        assert sink.open(MODEL) == cursor, "open does not give what was committed last"
    if subject.durable:
        sink.close()
        again = subject.sink()
        assert again.open(MODEL) == cursor, "another sink of this store does not find what was committed"
        expect(subject, subject.keys[:4], 1, "what came before the commit is not there")
        again.close()


def a_feed_that_was_replaced_writes_no_more(subject: Subject) -> None:
    """Where a feed begins while an earlier one is stopped, nothing of the earlier one counts when it goes on."""
    if not subject.durable:
        return
    old = opened(subject)
    old.apply(put(subject, subject.keys[:8], 1))
    new = opened(subject)
    new.commit(b"new")
    writes: tuple[Callable[[], None], ...] = (
        lambda: old.apply(put(subject, subject.keys[:8], 2)),
        lambda: old.commit(b"old"),
        lambda: old.drop_table("item"),
    )
    for write in writes:
        try:
            write()
        except (SinkTakenError, SinkError):
            continue
        raise AssertionError("a feed that was replaced is not told so")
    expect(subject, subject.keys[:8], 1, "a feed that was replaced has written")
    assert new.open(MODEL) == b"new", "a feed that was replaced has committed"


def any_order_ends_the_same(subject: Subject) -> None:
    """Random histories with repeats and restarts, of rows, deletions and what is forgotten, against what the rules say."""
    rng = np.random.default_rng(5)
    sink = opened(subject)
    versions: dict[int, int | None] = {}  # key -> its moment, None once it was deleted
    newest: dict[int, int] = {}
    past: list[tuple[str, int, Batch]] = []
    for at in range(1, 120):
        keys = rng.choice(subject.keys, rng.integers(1, 24), replace=False)
        when = int(rng.integers(max(1, at - 10), at + 1))  # some come late
        kind = rng.choice(["put", "delete", "forget"], p=[0.65, 0.2, 0.15])
        batch = put(subject, keys, when) if kind == "put" else gone(subject, keys, when, forget=kind == "forget")
        past.append((kind, when, batch))
        for what, moment, one in [past[-1], *([past[int(rng.integers(len(past)))]] if rng.random() < 0.3 else [])]:
            sink.apply(one)
            for key in np.concatenate((one.keys, one.deleted.keys, one.forgotten.keys)).tolist():
                if what == "forget" and moment >= newest.get(key, 0):
                    newest[key], versions[key] = 0, None
                elif what != "forget" and moment > newest.get(key, 0):
                    newest[key], versions[key] = moment, moment if what == "put" else None
        if subject.durable and rng.random() < 0.05:
            sink.close()
            sink = opened(subject)
    live = {key: at for key, at in versions.items() if at is not None}
    for key in subject.keys.tolist():
        expect(subject, np.array([key], np.uint64), live.get(key), "after a random history")
    assert held(sink) == {key: stamp(at) for key, at in live.items()}, "held, after a random history"
