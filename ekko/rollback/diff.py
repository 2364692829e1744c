"""What differs between a model as it is and as it was at a cut, over the union of their keys (R15).

Born since: a deletion. Deleted since: the row. Changed since: the row of then; where only one writer's rows are taken back, the
newest that another one has written since, if there is one. What is equal by value is left out, whatever its
stamp: so a plan that is made anew after half of another one was carried out has the other half in it, and no more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ekko.generations import Generation
from ekko.rollback.past import Past, Versions
from ekko.rollback.plan import BATCH_BYTES_MAX, BATCH_ROWS_MAX, PlanBatch, RowsAtRisk
from ekko.rollback.scope import Scope
from ekko.store.model_store import ModelStore
from ekko.store.table import Table
from p2p.stamps import make_stamp

U64 = NDArray[np.uint64]


def stamp_until(unix_ms: int) -> int:
    """The largest stamp of a moment."""
    return make_stamp(unix_ms + 1, 0, 0) - 1


def versions_now(table: Table, keys: U64) -> Versions:
    """How the rows of these keys, uint64[n] without repeats, are now."""
    slots = table.resolve(keys)
    found = np.flatnonzero(slots >= 0)
    live, stamps = np.zeros(keys.size, np.bool_), np.zeros(keys.size, np.uint64)
    rows = np.zeros((keys.size, table.spec.row_bytes), np.uint8)
    if found.size:
        held, data, held_stamps = table.read(table.places(slots[found]))
        order = np.argsort(keys)
        at = order[np.searchsorted(keys, held, sorter=order)]
        stamps[at] = held_stamps
        live[at[: len(data)]] = True
        rows[at[: len(data)]] = data
    return Versions(live, stamps, rows)


def differences(
    model: ModelStore,
    past: Past,
    cut_ms: int,
    wanted_ms: int,
    scope: Scope,
    unix_ms: int,
    known: Mapping[int, Sequence[U64]] = MappingProxyType({}),
) -> Iterator[PlanBatch | RowsAtRisk | None]:
    """What has to be written for the model to be as it was at the cut, and the good rows that this takes away.

    Args:
        model: as it is.
        past: as it was.
        cut_ms: a mark.
        wanted_ms: the moment that is wanted, not before the mark: what was written in between is at risk.
        scope: what of it is meant.
        unix_ms: now: what has expired by now is not brought back.
        known: keys by table, as of when each table's turn comes, that are left out: their rows of then are in the plan already.
    """
    generation = Generation.of(model.spec)
    tables = {table.spec.id: table for table in model.tables}
    if cut_ms < wanted_ms:
        for number, keys, stamps in past.at_risk(generation, cut_ms, wanted_ms):
            meant = scope.mask(keys, stamps)
            if number in tables and scope.has_table(tables[number].spec.name) and meant.any():
                yield RowsAtRisk(number, keys[meant], stamps[meant])
    for piece in past.changed_since(generation, cut_ms):
        if piece is None:
            yield None
            continue
        table = tables.get(piece.table)
        if table is None or not scope.has_table(table.spec.name) or not piece.keys.size:
            continue  # it was dropped since, which no rollback takes back
        keys = _without(piece.keys, known.get(piece.table, ()))
        if not keys.size:
            continue
        now = versions_now(table, keys)
        if scope.writer:
            under = past.under(generation, cut_ms, piece.table, keys, scope.writers)
            meant, then = scope.mask(keys, under.held), under.versions
            newer, unsure = under.newer, np.flatnonzero(meant & under.unsure)
            if unsure.size:
                yield RowsAtRisk(piece.table, keys[unsure], np.zeros(unsure.size, np.uint64))
        else:
            meant, then = scope.mask(keys, now.stamps), past.at(generation, cut_ms, piece.table, keys)
            newer = np.zeros(keys.size, np.bool_)
        live_then = then.live & ~(then.stamps < np.uint64(table.spec.stamp_min(unix_ms)))
        same = (now.live == live_then) & (~now.live | (now.rows == then.rows).all(axis=1))
        for batch, which in _batches(table, keys, now, live_then, then.rows, np.flatnonzero(meant & ~same)):
            yield replace(batch, others=int(newer[which].sum()))
        yield None


def _without(keys: U64, known: Sequence[U64]) -> U64:
    return keys[~np.isin(keys, np.concatenate(known))] if known and keys.size else keys


def _batches(
    table: Table, keys: U64, now: Versions, live: NDArray[np.bool_], rows: NDArray[np.uint8], which: NDArray[np.int64]
) -> Iterator[tuple[PlanBatch, NDArray[np.int64]]]:
    """These keys, cut into batches, and which of them are in each; of each, live rows come first."""
    which = np.concatenate([which[live[which]], which[~live[which]]])
    at_once = max(1, min(BATCH_ROWS_MAX, BATCH_BYTES_MAX // (table.spec.row_bytes + 8)))
    for begin in range(0, which.size, at_once):
        part = which[begin : begin + at_once]
        yield PlanBatch(table.spec.id, keys[part], rows[part[live[part]]], now.stamps[part]), part
