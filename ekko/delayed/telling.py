"""How a model was at a moment, and what changed since: the older state under the newest versions of the log up to there."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.delayed.columns import U64, not_by, overlay, stamps_in
from ekko.delayed.comparing import absent_in, stamps_of
from ekko.delayed.history import STAMP_MAX, cut_of
from ekko.delayed.model import DelayedModel
from ekko.store.table import Table
from p2p.stamps import WRITERS_MAX

# Rows whose stamps are looked at before others have their turn: a few milliseconds.
SLICE_ROWS: Final = 1 << 17


@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """Keys of one table that may differ from what they were, without repeats."""

    table: int
    keys: U64  # [n]
    stamps: U64  # [n], of the current version, which may be a tombstone; 0: there is none


@dataclass(frozen=True, slots=True, eq=False)
class Versions:
    """Versions of keys of one table."""

    table: int
    keys: U64  # [n], as they were asked for
    stamps: U64  # [n]; 0: there was none; of a tombstone where it is known
    live: NDArray[np.bool_]  # [n]: it had a row
    rows: NDArray[np.uint8]  # [n, row_bytes], as the codec encodes them; zeros where it had none


@dataclass(frozen=True, slots=True, eq=False)
class ByOthers:
    """What there would be of some keys if some writers had written nothing after a cut, as far as that is known."""

    under: Versions  # of the cut, or newer ones of other writers
    held: U64  # [n]: stamps of the newest versions; 0: nothing is known of one
    newer: NDArray[np.bool_]  # [n]: `under` is newer than the cut
    unsure: NDArray[np.bool_]  # [n]: another one may lie between `under` and `held`, which did not come here (`History`)


def changes(model: DelayedModel, cut_ms: int) -> Iterator[Changed]:
    """See `DelayedStore.changed_since`; table by table, and in slices, some of them empty, where a table is to be scanned."""
    cut = model.checked(cut_ms)
    current = model.current
    base = np.full(current.shards * WRITERS_MAX, cut, np.uint64)
    now_ms = time.time_ns() // 1_000_000
    for table in current.tables:
        for places in _newer(table, base, current.shards):
            keys, stamps = table.heads(places)
            yield Changed(table.spec.id, keys, stamps)
        gone = _gone(model, table.spec.id, cut, now_ms)
        if len(gone):
            yield Changed(table.spec.id, gone, np.zeros_like(gone))


def _newer(table: Table, base: U64, shards: int) -> Iterator[NDArray[np.int64]]:
    """Places of the rows above a flattened vector: from the update cache if it reaches so far back, else by a scan."""
    recent = table.cached_since(base)
    if recent is not None:
        yield recent
        return
    for begin in range(0, table.rows_used, SLICE_ROWS):
        yield table.scan(base, shards, begin, begin + SLICE_ROWS)


def _gone(model: DelayedModel, table: int, cut: int, now_ms: int) -> U64:
    """Keys that had a row at a cut and are absent by now: deleted after it, and forgotten."""
    here = model.current.table(table)
    if not len(model.current.floor_writers):
        return np.empty(0, np.uint64)
    older = model.older.table(table)
    everything = np.zeros(model.older.shards * WRITERS_MAX, np.uint64)
    keys = [older.heads(older.scan(everything, model.older.shards))[0]]
    keys += [rows.keys for rows in model.pending(table, 0, cut)]
    every = np.unique(np.concatenate(keys))
    absent = every[absent_in(here, every)]
    versions = versions_at(model, table, absent, cut)
    expired = versions.stamps < np.uint64(here.spec.stamp_min(now_ms))
    return absent[versions.live & ~expired]


def versions_at(model: DelayedModel, table: int, keys: U64, cut: int, but: U64 | None = None) -> Versions:
    """What keys, uint64[n] without repeats, were at a cut; with `but`, ids of writers, versions count as well that came later
    and that none of these wrote.
    """
    older = model.older.table(table)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    stamps = stamps_of(older, ordered)
    live = np.zeros(len(ordered), np.bool_)
    data = np.zeros((len(ordered), older.row_bytes), np.uint8)
    places = older.resolve(ordered)
    held = older.read(places[places >= 0])
    where = np.searchsorted(ordered, held[0][: len(held[1])])
    live[where], data[where] = True, held[1]
    for rows in model.pending(table, 0, cut):
        overlay(rows, ordered, stamps, live, data)
    if but is not None:
        for rows in model.pending(table, cut, STAMP_MAX):
            overlay(not_by(rows, but), ordered, stamps, live, data)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Versions(table, keys, stamps[back], live[back], data[back])


def by_others(model: DelayedModel, table: int, keys: U64, cut: int, writers: U64) -> ByOthers:
    """See `DelayedStore.by_others`."""
    held = stamps_of(model.current.table(table), keys)
    forgotten = np.flatnonzero(held == 0)  # deletions of which only the log knows by now who made them
    order = np.argsort(keys[forgotten])
    sorted_, newest = keys[forgotten][order], np.zeros(len(forgotten), np.uint64)
    for rows in model.pending(table, cut, STAMP_MAX) if len(forgotten) else ():
        place = np.minimum(np.searchsorted(sorted_, rows.keys), len(sorted_) - 1)
        found = sorted_[place] == rows.keys
        np.maximum.at(newest, place[found], stamps_in(rows)[found])
    held[forgotten[order]] = newest
    under = versions_at(model, table, keys, cut, writers)
    first = np.maximum(under.stamps, np.uint64(cut)) + np.uint64(1)
    unsure = np.zeros(len(keys), np.bool_)
    for begin, end in (*model.history.blurs, *model.history.strays):
        unsure |= np.maximum(first, np.uint64(begin)) < np.minimum(held, np.uint64(end))
    return ByOthers(under, held, under.stamps > np.uint64(cut), unsure)


def at_risk(model: DelayedModel, cut_ms: int, wanted_ms: int) -> list[Changed]:
    """See `DelayedStore.at_risk`."""
    first, last = cut_of(cut_ms), cut_of(wanted_ms)
    found = []
    for table in model.current.tables:
        rows = list(model.pending(table.spec.id, first, last))
        if not rows:
            continue
        keys = np.concatenate([one.keys for one in rows])
        stamps = np.concatenate([stamps_in(one) for one in rows])
        every, place = np.unique(keys, return_inverse=True)
        newest = np.zeros(len(every), np.uint64)
        np.maximum.at(newest, place, stamps)
        found.append(Changed(table.spec.id, every, newest))
    return found
