"""The older state of a node's models beside the current one, and what lies between them (the paper, 5.3; R15).

Think of a shop with a shelf and a back room. What is delivered goes to the shelf at once, and a copy of it, in order, to the
back room's queue. From the queue it moves into the back room only when somebody says up to when. So the back room is the shelf
as it was then; and what was changed since is what is newer on the shelf.

The *current* store is the node's own. The *older* one is a second store of the same models. `advance` moves what the log has
there, up to a moment. Between the two, the state at any moment can be told (`at`), as far as it is known exactly
(`valid_cut`, `ekko.delayed.history`).

One thread uses all of it, the one that writes the current store.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from ekko.delayed.comparing import absent_in, compare, stamps_of
from ekko.delayed.history import History, cut_of, unix_ms_of_cut
from ekko.delayed.limits import LOG_BYTES_DEFAULT
from ekko.delayed.log import DEAD, Log, LogFullError
from ekko.delayed.records import DamagedError
from ekko.errors import ModelError, StoreError
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.placement import take
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX, unix_ms_of

U64 = NDArray[np.uint64]

# Rows that are applied with one call.
BATCH_ROWS: Final = 1 << 15
# What is known is written down when it has come so far; a kill costs that much of what may be known exactly.
NOTE_MS: Final = 250
# Deleted and expired rows that go with one call of `collect`.
COLLECTED_MAX: Final = 4_096
# A disk that refused is tried again after so long.
RETRY_S: Final = 1.0

log = structlog.get_logger(__name__)


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


@dataclass(slots=True, eq=False)
class _Model:
    """One model in both stores. Fulfils `ekko.store.listening.Listener`."""

    owner: "DelayedStore"
    current: ModelStore
    older: ModelStore
    history: History
    synced_until_ms: int = 0  # as the protocol said last
    noted: int = 0  # `complete` as it was written down last
    claimed: tuple[NDArray[np.int64], U64] | None = None  # writers, and their vector [w, shards] as an advance began
    comparing: Iterator[int] | None = None
    rows_advanced: int = 0

    def on_rows(self, columns: Sequence[RowColumns], stamp: int) -> None:
        newest = max([stamp if column.stamps is None else int(column.stamps.max()) for column in columns])
        self.history.note_rows(newest)
        self.owner.write_down(self, columns, stamp, newest)

    def on_rows_gone(self, newest: int) -> None:
        self.history.note_rows(newest)  # as if the tombstones had come
        self.owner.lose(self, newest, "rows went with an answer that brought their shards whole")
        self.owner.note_state(self.current.spec.id)

    def on_coalesced(self, since: Mapping[int, int]) -> None:
        self.history.note_coalesced(since)
        self.mark()
        self.owner.note_state(self.current.spec.id)

    def on_progress(self, synced_until_ms: int) -> None:
        self.synced_until_ms = synced_until_ms
        if self.history.is_due(synced_until_ms):
            self.mark()
            if unix_ms_of(self.history.complete) - unix_ms_of(self.noted) >= NOTE_MS:
                self.noted = self.history.complete
                self.owner.note_state(self.current.spec.id)

    def mark(self) -> None:
        """Take note of how far everything is here."""
        current = self.current
        self.history.mark(self.synced_until_ms, current.frontiers[list(current.hold)], current.newest_rows)


@dataclass(frozen=True, slots=True)
class DelayedPicture:
    """What is to be said of one model's older state. Moments are Unix milliseconds; 0: none."""

    until_ms: int  # it has what came, up to here
    exact_until_ms: int  # and everything of every live writer, up to here
    known_until_ms: int  # the newest moment of which the state can be told
    pending_records: int
    comparing: bool  # part of the log was lost, and both stores will be compared
    blurs: int  # stretches of time of which the state cannot be told
    rows: int
    bytes: int  # of shared memory


class DelayedStore:
    """Use `open`.

    Args:
        current: the node's store.
        older: the other one.
        log: of what comes to the current one.
    """

    def __init__(self, current: Store, older: Store, log: Log) -> None:
        self.current = current
        self.older = older
        self.log = log
        self._models: dict[int, _Model] = {}  # by id
        self._written: dict[str, Any] = {}  # of models, as a process before this one wrote it down
        self._retry_s: float | None = None  # monotonic: the disk refused, and is tried again then
        self.losses = 0  # how often something of a model was lost
        self.reason = ""  # of the last one

    @classmethod
    def open(cls, current: Store, older: Store, folder: Path, log_bytes_max: int = LOG_BYTES_DEFAULT) -> "DelayedStore":
        """Take up what a process before this one left, or begin; from now on all that comes to `current` is written down.

        Args:
            current: the node's store, before the protocol starts.
            older: another one, which nobody else writes.
            folder: on a disk.
            log_bytes_max: of the log.

        Raises:
            StoreError: the folder or shared memory cannot be used.
        """
        opened = cls(current, older, Log.open(folder, log_bytes_max, f"{current.identity}/{older.identity}"))
        opened.log.describe = opened._describe
        opened.log.lose = opened._on_lost
        opened._written = dict(opened.log.state["models"]) if opened.log.state is not None else {}
        opened.follow_schema()
        current.listen(opened._listener_of)
        for model in opened._models.values():
            opened._resume(model)
        opened._written = {}
        opened.note_state()
        return opened

    def close(self) -> None:
        """Let go of the files and of the older store; both stay for the next process."""
        for model in self.current.models.values():
            model.listener = None
        self.log.close()
        self.older.close()

    def destroy(self) -> None:
        """Remove the log and the older store."""
        for model in self.current.models.values():
            model.listener = None
        self.log.clear()
        self.older.destroy()

    # --- models

    def _listener_of(self, current: ModelStore) -> _Model:
        self.follow_schema()
        return self._models[current.spec.id]

    def follow_schema(self) -> None:
        """Have in the older store the models, tables and tensors that the current one has, and no others.

        Raises:
            StoreError: shared memory is full.
        """
        current, older = self.current, self.older
        if older.registers != current.registers:
            older.learn_registers(current.registers)
        for name in [name for name, one in older.models.items() if current.generation(name) != older.generation(name)]:
            if name in current.models:  # it came to have another incarnation, which drops the one before
                older.learn_registers(current.registers)
        for name, model in current.models.items():
            twin = older.models.get(name)
            if twin is None or not _same_schema(model, twin):
                twin = older.add_model(replace(model.spec), 0, model.hold)
            known = self._models.get(model.spec.id)
            if known is None or known.older is not twin:
                self._models[model.spec.id] = _Model(self, model, twin, self._history_of(model))
        ids = {model.spec.id for model in current.models.values()}
        for gone in [number for number in {*self._models, *self.log.models} if number not in ids]:
            self._models.pop(gone, None)
            self.log.forget(gone)

    def _history_of(self, model: ModelStore) -> History:
        written = self._written.get(str(model.spec.id))
        return History() if written is None else History.from_json(written)

    def _resume(self, model: _Model) -> None:
        """Find out whether all is here that came to this model."""
        history, current = model.history, model.current
        history.newest = max(history.newest, self.log.replayed.get(current.spec.id, 0))
        reason = ""
        if not self.log.complete:
            reason = "a file of the log is missing or damaged"
        elif current.newest_row > history.newest:
            reason = "rows came that the log does not have"
        elif model.older.newest_row > max(history.until, history.target):
            reason = "there is no word of how old the older state is"
        if reason:
            history.until = max(history.until, model.older.newest_row)
            history.target = max(history.target, history.until + (model.older.newest_row > 0))
            history.newest = max(history.newest, current.newest_row)
            self.lose(model, current.newest_row, reason)
        elif history.newest:
            history.resume(current.frontiers[list(current.hold)])
        model.mark()

    def _model(self, name: str) -> _Model:
        model = self.current.models.get(name)
        if model is None or model.spec.id not in self._models:
            known = ", ".join(map(repr, self.current.models)) or "none"
            raise ModelError(f"there is no model {name!r} here: there are {known}")
        return self._models[model.spec.id]

    # --- what comes

    def write_down(self, model: _Model, columns: Sequence[RowColumns], stamp: int, newest: int) -> None:
        """Rows come: into the log with them. What cannot be written is lost for the older state, and for nothing else."""
        if self._retry_s is not None and time.monotonic() < self._retry_s:
            self.lose(model, newest, self.reason)
            return
        try:
            self.log.append(model.current.spec.id, columns, stamp)
        except LogFullError as error:
            self._retry_s = time.monotonic() + RETRY_S
            self.lose(model, newest, str(error))
            return
        if self._retry_s is not None:
            self._retry_s = None
            log.info("log_written_again")

    def note_state(self, model: int | None = None) -> None:
        """Write down what is known, of one model or of all; what cannot be is found out by the next process, as a loss."""
        try:
            self.log.note_state(model)
        except LogFullError as error:
            self._retry_s = time.monotonic() + RETRY_S
            self.reason = str(error)

    def _describe(self, model: int | None) -> dict[str, Any]:
        numbers = [number for number in self._models if model in (None, number)]
        return {str(number): self._models[number].history.to_json() for number in numbers}

    def _on_lost(self, models: list[int], why: str) -> None:
        for number in models:
            if (model := self._models.get(number)) is not None:
                self.lose(model, model.history.newest, why)

    def lose(self, model: _Model, newest: int, why: str) -> None:
        """Versions up to this stamp may never have come, or are gone."""
        if model.history.compare_at is None:
            self.losses += 1
            self.reason = why
            log.warning("delayed_state_lost", model=model.current.spec.name, reason=why)
        if model.comparing is not None:
            model.comparing = None  # it would miss this
        model.history.lose(newest)

    # --- the older state moves on

    def advance(self, name: str, until_ms: int, rows_max: int | None = None) -> bool:
        """Bring the older state of a model to a moment; what it has passed already stays.

        Args:
            name: of the model.
            until_ms: Unix milliseconds, the last one that counts.
            rows_max: to be looked at with this call, about; None: as many as there are.

        Returns:
            Whether it is there; else call again.

        Raises:
            ModelError: there is no such model.
            StoreError: shared memory is full, or nothing can be written down. What has come so far stays, and counts when the
                rest has.
        """
        self.follow_schema()
        model = self._model(name)
        history, cut = model.history, cut_of(until_ms)
        if cut > history.target:
            if model.claimed is None:
                model.claimed = _claims_of(model.current)
            history.begin_advance(cut)
            self.log.note_state(model.current.spec.id)
        elif history.target <= history.until and not self._has_pending(model, history.target):
            return True
        cut = history.target
        left = self._apply_pending(model, cut, rows_max)
        if left is not None and left <= 0:
            return False
        if history.compare_at is not None and cut >= history.compare_at and not self._compare(model, cut, left):
            return False
        self._arrive(model, cut)
        return True

    def _has_pending(self, model: _Model, cut: int) -> bool:
        pending = self.log.pending(model.current.spec.id)
        return bool((pending["least"] <= np.uint64(cut)).any()) if len(pending) else False

    def _apply_pending(self, model: _Model, cut: int, rows_max: int | None) -> int | None:
        """Apply what the log has up to a cut; returns how many of `rows_max` are left."""
        number, left = model.current.spec.id, rows_max
        pending = self.log.pending(number)
        chosen = np.flatnonzero(pending["least"] <= np.uint64(cut))
        for begin, end in _batches(pending["rows"][chosen]):
            columns: dict[int, list[RowColumns]] = {}
            for index in chosen[begin:end].tolist():
                rows = self._read(model, pending[index])
                if rows is not None and rows.table in model.older.tables_by_id:
                    columns.setdefault(rows.table, []).append(_up_to(rows, cut))
            joined = [_join(table, parts) for table, parts in columns.items()]
            model.older.reserve(joined)
            applied = model.older.apply(joined, 0)
            model.rows_advanced += applied.written
            for index in chosen[begin:end].tolist():
                pending["least"][index] = DEAD if pending["most"][index] <= cut else cut + 1
            if left is not None:
                left -= int(pending["rows"][chosen[begin:end]].sum())
                if left <= 0 and end < len(chosen):
                    self.log.release(number)
                    return left
        self.log.release(number)
        return left if left is None else max(left, 1)

    def _read(self, model: _Model, record: np.void) -> RowColumns | None:
        try:
            return self.log.read(record)
        except DamagedError as error:
            self.lose(model, model.history.newest, str(error))
            return None

    def _compare(self, model: _Model, cut: int, rows_max: int | None) -> bool:
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

    def _arrive(self, model: _Model, cut: int) -> None:
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
        self.log.sweep()
        self.note_state(model.current.spec.id)

    def collect(self, name: str, unix_ms: int) -> int:
        """Drop some deleted and expired rows of the older state that everybody knows of; returns how many (R5).

        Raises:
            ModelError: there is no such model.
        """
        model = self._model(name)
        rows = 0
        for partition in model.older.hold:
            stable = model.current.stable_in(partition)
            if stable is None or not model.older.collectable:
                continue
            until = np.minimum(stable, np.uint64(model.history.until))
            rows += model.older.collect_in(partition, until, unix_ms, COLLECTED_MAX).rows
        return rows

    # --- what is asked

    def valid_cut(self, name: str, wanted_ms: int) -> int | None:
        """The newest moment up to `wanted_ms` of which the state can be told exactly, Unix milliseconds; None: there is none.

        Raises:
            ModelError: there is no such model.
        """
        model = self._model(name)
        model.mark()
        cut = model.history.valid_cut(cut_of(wanted_ms))
        while cut is not None and cut_of(unix_ms_of_cut(cut)) != cut:  # it ends within a millisecond
            cut = model.history.valid_cut(cut_of(unix_ms_of_cut(cut)))
        return None if cut is None else unix_ms_of_cut(cut)

    def lost(self, name: str) -> bool:
        """Whether part of the log is lost, so that both stores are to be compared.

        Raises:
            ModelError: there is no such model.
        """
        return self._model(name).history.compare_at is not None

    def is_whole(self, name: str) -> bool:
        """Whether the older state has everything that it should have: nothing of it is blurred, or lost.

        Raises:
            ModelError: there is no such model.
        """
        model = self._model(name)
        history = model.history
        if history.target > history.until or history.compare_at is not None or not history.until:
            return False
        # Where nobody writes, or nobody has been heard of who does, there is no more to wait for than what is here.
        return not any(begin <= history.until < end for begin, end in history.blurs)

    def oldest_cut(self, name: str) -> int:
        """Up to where the older state has come, Unix milliseconds: nothing before can be told; 0: it has not begun."""
        history = self._model(name).history
        return unix_ms_of_cut(max(history.until, history.target)) if history.target else 0

    def changed_since(self, name: str, cut_ms: int) -> list[Changed]:
        """Keys whose current version is newer than a moment, and those that had a row then and are absent now.

        Raises:
            ModelError: there is no such model.
            StoreError: the older state has passed that moment.
        """
        return list(self.changes(name, cut_ms))

    def changes(self, name: str, cut_ms: int) -> Iterator[Changed]:
        """`changed_since`, table by table."""
        model = self._model(name)
        cut = self._checked(model, cut_ms)
        current = model.current
        base = np.full(current.shards * WRITERS_MAX, cut, np.uint64)
        now_ms = time.time_ns() // 1_000_000
        for table in current.tables:
            keys, stamps = table.heads(table.scan(base, current.shards))
            gone = self._gone(model, table.spec.id, cut, now_ms)
            if len(keys) or len(gone):
                yield Changed(table.spec.id, np.concatenate((keys, gone)), np.concatenate((stamps, np.zeros_like(gone))))

    def _gone(self, model: _Model, table: int, cut: int, now_ms: int) -> U64:
        """Keys that had a row at a cut and are absent by now: deleted after it, and forgotten."""
        here = model.current.table(table)
        if not len(model.current.floor_writers):
            return np.empty(0, np.uint64)
        older = model.older.table(table)
        everything = np.zeros(model.older.shards * WRITERS_MAX, np.uint64)
        keys = [older.heads(older.scan(everything, model.older.shards))[0]]
        keys += [rows.keys for rows in self._pending(model, table, 0, cut)]
        every = np.unique(np.concatenate(keys))
        absent = every[absent_in(here, every)]
        versions = self._versions(model, table, absent, cut)
        expired = versions.stamps < np.uint64(here.spec.stamp_min(now_ms))
        return absent[versions.live & ~expired]

    def at(self, name: str, cut_ms: int, table: int, keys: U64) -> Versions:
        """What keys of a table were at a moment.

        Args:
            name: of the model.
            cut_ms: Unix milliseconds; exact where `valid_cut` says so.
            table: its id.
            keys: uint64[n], without repeats.

        Raises:
            ModelError: there is no such model or table.
            StoreError: the older state has passed that moment.
        """
        model = self._model(name)
        cut = self._checked(model, cut_ms)
        if table not in model.current.tables_by_id:
            raise ModelError(f"model {name!r} has no table with id {table}")
        self.follow_schema()
        return self._versions(model, table, np.ascontiguousarray(keys, np.uint64), cut)

    def at_risk(self, name: str, cut_ms: int, wanted_ms: int) -> list[Changed]:
        """Keys that were written after one moment and not after another: what is lost where the first one has to do for it.

        The stamps are those of the newest such version. Only of what has come.

        Raises:
            ModelError: there is no such model.
        """
        model = self._model(name)
        first, last = cut_of(cut_ms), cut_of(wanted_ms)
        found = []
        for table in model.current.tables:
            rows = list(self._pending(model, table.spec.id, first, last))
            if not rows:
                continue
            keys = np.concatenate([one.keys for one in rows])
            stamps = np.concatenate([_stamps(one) for one in rows])
            every, place = np.unique(keys, return_inverse=True)
            newest = np.zeros(len(every), np.uint64)
            np.maximum.at(newest, place, stamps)
            found.append(Changed(table.spec.id, every, newest))
        return found

    def _checked(self, model: _Model, cut_ms: int) -> int:
        history, cut = model.history, cut_of(cut_ms)
        if cut < max(history.until, history.target):
            raise StoreError(
                f"the state of model {model.current.spec.name!r} at {cut_ms} ms is not kept any more: the older state is at "
                f"{unix_ms_of_cut(max(history.until, history.target))} ms; ask for that, or for a later one"
            )
        return cut

    def _pending(self, model: _Model, table: int, above: int, cut: int) -> Iterator[RowColumns]:
        """Rows of one table that the log has and that are not applied, with stamps above one cut and up to another."""
        pending = self.log.pending(model.current.spec.id)
        if not len(pending):
            return
        wanted = (pending["table"] == table) & (pending["least"] <= np.uint64(cut)) & (pending["most"] > np.uint64(above))
        for index in np.flatnonzero(wanted).tolist():
            rows = self._read(model, pending[index])
            if rows is not None:
                yield _up_to(rows, cut, above)

    def _versions(self, model: _Model, table: int, keys: U64, cut: int) -> Versions:
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
        for rows in self._pending(model, table, 0, cut):
            _overlay(rows, ordered, stamps, live, data)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Versions(table, keys, stamps[back], live[back], data[back])

    def pictures(self) -> dict[str, DelayedPicture]:
        """What is to be said of each model."""
        pictures = {}
        for model in self._models.values():
            history = model.history
            known = history.valid_cut((1 << 64) - 1)
            stats = model.older.table_stats()
            pictures[model.current.spec.name] = DelayedPicture(
                unix_ms_of_cut(history.until) if history.until else 0,
                unix_ms_of_cut(history.exact_until()) if history.exact_until() else 0,
                unix_ms_of_cut(known) if known else 0,
                len(self.log.pending(model.current.spec.id)),
                history.compare_at is not None,
                len(history.blurs),
                sum(stat.rows for stat in stats.values()),
                model.older.memory_bytes,
            )
        return pictures


def _same_schema(model: ModelStore, twin: ModelStore) -> bool:
    return (
        model.tables_by_id.keys() == twin.tables_by_id.keys()
        and model.spec.tensors.keys() == twin.spec.tensors.keys()
        and model.hold == twin.hold
    )


def _claims_of(model: ModelStore) -> tuple[NDArray[np.int64], U64]:
    """Writers that anything is known of, and how far it is here: uint64[w, shards]."""
    writers = np.flatnonzero(model.frontiers.any(axis=0))
    return writers, model.vector.T[writers].copy()


def _batches(rows: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Cut records with so many rows each into runs of about `BATCH_ROWS`."""
    ends = np.cumsum(rows.astype(np.int64))
    begin = 0
    while begin < len(rows):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + BATCH_ROWS, "right")))
        yield begin, end
        begin = end


def _stamps(rows: RowColumns) -> U64:
    assert rows.stamps is not None, "a record's rows have stamps"
    return rows.stamps


def _up_to(rows: RowColumns, cut: int, above: int = 0) -> RowColumns:
    """Those with stamps above one cut and up to another."""
    stamps = _stamps(rows)
    kept = (stamps <= np.uint64(cut)) & (stamps > np.uint64(above))
    return rows if kept.all() else take(rows, np.flatnonzero(kept))


def _join(table: int, parts: Sequence[RowColumns]) -> RowColumns:
    """Rows of one table as one: live ones first."""
    if len(parts) == 1:
        return parts[0]
    lives = [len(part.rows) for part in parts]
    keys = [part.keys[:live] for part, live in zip(parts, lives, strict=True)]
    keys += [part.keys[live:] for part, live in zip(parts, lives, strict=True)]
    stamps = [_stamps(part)[:live] for part, live in zip(parts, lives, strict=True)]
    stamps += [_stamps(part)[live:] for part, live in zip(parts, lives, strict=True)]
    rows = [part.rows for part in parts if len(part.rows)]
    return RowColumns(
        table,
        np.concatenate(keys),
        np.concatenate(rows) if rows else np.empty((0, parts[0].rows.shape[1]), np.uint8),
        np.concatenate(stamps),
    )


def _overlay(rows: RowColumns, keys: U64, stamps: U64, live: NDArray[np.bool_], data: NDArray[np.uint8]) -> None:
    """Put newer versions of sorted keys in their places; a key may come again, the newest counts."""
    if not len(keys):
        return
    theirs = _stamps(rows)
    place = np.minimum(np.searchsorted(keys, rows.keys), len(keys) - 1)
    newer = np.flatnonzero((keys[place] == rows.keys) & (theirs > stamps[place]))
    newer = newer[np.argsort(theirs[newer], kind="stable")]  # of those that are written twice the last one stays
    stamps[place[newer]] = theirs[newer]
    has_row = newer < len(rows.rows)
    # Whether the newest of a key has a row is known only when all are in their places.
    live[place[newer]] = has_row
    data[place[newer]] = 0
    which = newer[has_row]
    if len(which):  # of deletions alone the rows that there are none of have any width
        last = theirs[which] == stamps[place[which]]
        data[place[which[last]]] = rows.rows[which[last]]
