"""The older state of a model moves on: what the log has up to a cut is applied to it, in slices, and forgotten.

An advance says first where it goes (`History.begin_advance`), so one that was cut short by a kill is finished before anything
is told; what lies between is told all the same, from the older state and the log together.
"""

import numpy as np
import structlog

from ekko.delayed.columns import U64, batches, join, up_to
from ekko.delayed.comparing import compare
from ekko.delayed.history import cut_of, unix_ms_of_cut
from ekko.delayed.log import DEAD
from ekko.delayed.model import DelayedModel
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

# Deleted and expired rows that go with one call of `collect`.
COLLECTED_MAX = 4_096

log = structlog.get_logger(__name__)


def advance(model: DelayedModel, until_ms: int, rows_max: int | None) -> bool:
    """See `DelayedStore.advance`."""
    history, cut = model.history, cut_of(until_ms)
    if cut > history.target:
        if model.claimed is None:
            model.claimed = _claims_of(model.current)
        history.begin_advance(cut)
        model.log.note_state(model.id)
    elif history.target <= history.until and not _has_pending(model, history.target):
        return True
    cut = history.target
    left = _apply_pending(model, cut, rows_max)
    if left is not None and left <= 0:
        return False
    if history.compare_at is not None and cut >= history.compare_at and not _compare(model, cut, left):
        return False
    _arrive(model, cut)
    return True


def collect(model: DelayedModel, unix_ms: int) -> int:
    """See `DelayedStore.collect`."""
    rows = 0
    for partition in model.older.hold:
        stable = model.current.stable_in(partition)
        if stable is None or not model.older.collectable:
            continue
        until = np.minimum(stable, np.uint64(model.history.until))
        rows += model.older.collect_in(partition, until, unix_ms, COLLECTED_MAX).rows
    return rows


def _has_pending(model: DelayedModel, cut: int) -> bool:
    pending = model.log.pending(model.id)
    return bool((pending["least"] <= np.uint64(cut)).any()) if len(pending) else False


def _apply_pending(model: DelayedModel, cut: int, rows_max: int | None) -> int | None:
    """Apply what the log has up to a cut; returns how many of `rows_max` are left."""
    left = rows_max
    pending = model.log.pending(model.id)
    chosen = np.flatnonzero(pending["least"] <= np.uint64(cut))
    for begin, end in batches(pending["rows"][chosen]):
        columns: dict[int, list[RowColumns]] = {}
        for index in chosen[begin:end].tolist():
            rows = model.read(pending[index])
            if rows is not None and rows.table in model.older.tables_by_id:
                columns.setdefault(rows.table, []).append(up_to(rows, cut))
        joined = [join(table, parts) for table, parts in columns.items()]
        model.older.reserve(joined)
        model.older.apply(joined, 0)
        for index in chosen[begin:end].tolist():
            pending["least"][index] = DEAD if pending["most"][index] <= cut else cut + 1
        if left is not None:
            left -= int(pending["rows"][chosen[begin:end]].sum())
            if left <= 0 and end < len(chosen):
                model.log.release(model.id)
                return left
    model.log.release(model.id)
    return left if left is None else max(left, 1)


def _compare(model: DelayedModel, cut: int, rows_max: int | None) -> bool:
    """Compare both stores, or go on with it; whether that is done."""
    if model.comparing is None:
        model.comparing = compare(model.current, model.older, cut)
    left = rows_max
    for looked_at in model.comparing:
        if left is not None:
            left -= looked_at
            if left <= 0:
                return False
    model.comparing = None
    model.history.compared(max(model.history.newest, model.current.newest_row))
    log.info("delayed_state_compared", model=model.current.spec.name)
    return True


def _arrive(model: DelayedModel, cut: int) -> None:
    """The older state is at this cut: say so, to readers too, and let go of what is not needed any more."""
    history, older = model.history, model.older
    history.end_advance(cut)
    model.mark()
    exact = history.exact_until()
    if model.claimed is not None:
        writers, vector = model.claimed
        held = older.vector.T
        held[writers] = np.maximum(held[writers], np.minimum(vector, np.uint64(cut)))
        model.claimed = None
    hold = list(older.hold)
    older.frontiers[hold] = np.maximum(older.frontiers[hold], np.uint64(exact))
    # Of nothing that this node has it knows how fresh it is, where it does not know that of what is current.
    older.set_synced_until(unix_ms_of_cut(exact) if model.synced_until_ms and exact else 0)
    model.log.sweep()
    model.keeper.note_state(model.id)


def _claims_of(model: ModelStore) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], U64]:
    """Writers that anything is known of, and how far it is here: uint64[w, shards]."""
    writers = np.flatnonzero(model.frontiers.any(axis=0))
    return writers, model.vector.T[writers].copy()
