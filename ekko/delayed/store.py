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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from ekko.delayed import advancing, telling
from ekko.delayed.columns import U64
from ekko.delayed.history import History, cut_of, unix_ms_of_cut
from ekko.delayed.limits import LOG_BYTES_DEFAULT
from ekko.delayed.log import Log, LogFullError
from ekko.delayed.model import DelayedModel
from ekko.delayed.telling import ByOthers, Changed, Versions
from ekko.errors import ModelError
from ekko.store import Store
from ekko.store.model_store import ModelStore
from ekko.store.recent import WINDOW_MAX
from p2p.replica import RowColumns

# A disk that refused is tried again after so long.
RETRY_S: Final = 1.0

log = structlog.get_logger(__name__)


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
        self._models: dict[int, DelayedModel] = {}  # by id
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

    def _listener_of(self, current: ModelStore) -> DelayedModel:
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
            for table in model.tables:  # what changed since a moment is asked where nobody pulls
                table.recent.keep(WINDOW_MAX)
            if known is None or known.older is not twin:
                self._models[model.spec.id] = DelayedModel(self, self.log, model, twin, self._history_of(model))
        ids = {model.spec.id for model in current.models.values()}
        for gone in [number for number in {*self._models, *self.log.models} if number not in ids]:
            self._models.pop(gone, None)
            self.log.forget(gone)

    def _history_of(self, model: ModelStore) -> History:
        written = self._written.get(str(model.spec.id))
        return History() if written is None else History.from_json(written)

    def _resume(self, model: DelayedModel) -> None:
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

    def _model(self, name: str) -> DelayedModel:
        model = self.current.models.get(name)
        if model is None or model.spec.id not in self._models:
            known = ", ".join(map(repr, self.current.models)) or "none"
            raise ModelError(f"there is no model {name!r} here: there are {known}")
        return self._models[model.spec.id]

    # --- what comes

    def write_down(self, model: DelayedModel, columns: Sequence[RowColumns], stamp: int, newest: int) -> None:
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

    def lose(self, model: DelayedModel, newest: int, why: str) -> None:
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
        return advancing.advance(self._model(name), until_ms, rows_max)

    def collect(self, name: str, unix_ms: int) -> int:
        """Drop some deleted and expired rows of the older state that everybody knows of; returns how many (R5).

        Raises:
            ModelError: there is no such model.
        """
        return advancing.collect(self._model(name), unix_ms)

    # --- what is asked

    def valid_cut(self, name: str, wanted_ms: int) -> int | None:
        """The newest moment up to `wanted_ms` of which the state can be told exactly, Unix milliseconds; None: there is none.

        Raises:
            ModelError: there is no such model.
        """
        return self._model(name).valid_cut(wanted_ms)

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
        return self._model(name).is_whole

    def oldest_cut(self, name: str) -> int:
        """Up to where the older state has come, Unix milliseconds: nothing before can be told; 0: it has not begun."""
        model = self._model(name)
        return unix_ms_of_cut(model.passed) if model.history.target else 0

    def changed_since(self, name: str, cut_ms: int) -> list[Changed]:
        """Keys whose current version is newer than a moment, and those that had a row then and are absent now.

        Raises:
            ModelError: there is no such model.
            StoreError: the older state has passed that moment.
        """
        found = [one for one in self.changes(name, cut_ms) if len(one.keys)]
        tables = dict.fromkeys(one.table for one in found)
        return [
            Changed(
                table,
                np.concatenate([one.keys for one in found if one.table == table]),
                np.concatenate([one.stamps for one in found if one.table == table]),
            )
            for table in tables
        ]

    def reads_log_at(self, name: str, cut_ms: int) -> bool:
        """Whether what keys were at a moment is to be found in the log, in part, and not in the older state alone."""
        return bool((self.log.pending(self._model(name).id)["least"] <= np.uint64(cut_of(cut_ms))).any())

    def changes(self, name: str, cut_ms: int) -> Iterator[Changed]:
        """`changed_since` in pieces, table by table; some have no keys."""
        return telling.changes(self._model(name), cut_ms)

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
        cut = model.checked(cut_ms)
        if table not in model.current.tables_by_id:
            raise ModelError(f"model {name!r} has no table with id {table}")
        self.follow_schema()
        return telling.versions_at(model, table, np.ascontiguousarray(keys, np.uint64), cut)

    def by_others(self, name: str, cut_ms: int, table: int, keys: U64, writers: U64) -> ByOthers:
        """What there would be of keys if some writers, by their ids, had written nothing after a moment.

        Raises:
            ModelError: there is no such model.
            StoreError: the older state has passed that moment.
        """
        model = self._model(name)
        return telling.by_others(model, table, np.ascontiguousarray(keys, np.uint64), model.checked(cut_ms), writers)

    def at_risk(self, name: str, cut_ms: int, wanted_ms: int) -> list[Changed]:
        """Keys that were written after one moment and not after another: what is lost where the first one has to do for it.

        The stamps are those of the newest such version. Only of what has come.

        Raises:
            ModelError: there is no such model.
        """
        return telling.at_risk(self._model(name), cut_ms, wanted_ms)

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
