"""The rows of one model on one server: read from the node's shared memory, changed by optimisers, published as steps.

A group of pushes is carried out in two parts. `prepare` does the arithmetic, once: it reads the rows of all keys of the group,
lets the optimiser go over them step by step, and has what was there before put on record (`undo`). `publish` hands the result
to the node as one step, and may be repeated until it is answered. Look-ups of pulls go on meanwhile, from any thread: they see
rows as they were before a step of the node, or after it.

Nobody else writes these rows: of each partition there is one primary, and of one model one group at a time.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ekko
from ekko.errors import ModelError, PublishError
from ekko.model import MARKS_TABLE, STATE_SUFFIX, STEPS_SUFFIX
from ekko.train.admission import Admission
from ekko.train.optimizers import aggregate
from ekko.train.server import kernels
from ekko.train.server.arithmetic import TableWork, Unit, place
from ekko.train.server.events import Apply, Mark, Step
from ekko.train.server.schema import (
    MARK_DIM,
    WORDS,
    TrainedModel,
    TrainedTable,
    numbers_of,
    own_keys,
    words_of,
)
from ekko.train.server.undo import Before, Undo
from ekko.train.server.wire import Push
from ekko.train.step import Step as PublishedStep

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

ATTACH_S = 30.0  # a node that has just begun has its models within this
PUBLISH_S = 5.0  # for one answer of the node


@dataclass(slots=True, eq=False)
class Changed:
    """Rows of one table after a group: uint64[n], float32[n, dim], float32[n]: L1 norms of their gradients."""

    keys: U64
    rows: F32
    significance: F32


@dataclass(slots=True, eq=False)
class Prepared:
    """What a group comes to: to be published as one step."""

    columns: list[tuple[str, U64, F32]] = field(default_factory=list)  # table, keys, rows; no key of a table twice
    changed: dict[str, Changed] = field(default_factory=dict)


@dataclass(slots=True)
class RowCounts:
    """What happened to rows so far."""

    applied: int = 0  # rows that steps changed
    pulled: int = 0
    made: int = 0  # rows that there were none of before
    not_admitted: int = 0  # gradients of keys that were not pushed often enough yet
    not_finite: int = 0  # rows that a step would have made infinite or no number, and left as they were


class TrainingRows:
    """One model's. Use: `prepare`, then `publish`, from one thread at a time; `pull` from any.

    Args:
        model: how it is trained.
        run_dir: of the node beside.
        local: the node's local endpoint.

    Raises:
        EkkoError: the node is not there, or does not have the model.
    """

    def __init__(self, model: TrainedModel, run_dir: Path, local: str) -> None:
        self.model = model
        self.counts = RowCounts()
        ekko.Reader(model.training, run_dir, wait=ATTACH_S, unheld="absent", counted=False).close()  # from then on it is there
        self.reader = ekko.Reader(model.training, run_dir, unheld="absent", counted=False)  # look-ups of pulls must not wait
        self.publisher = ekko.Publisher(local, model.training, timeout=PUBLISH_S)
        self.undo = Undo(run_dir, model.training)
        self._own_keys = own_keys(model.settings.shards, model.settings.partitions)
        self._admissions = {table.name: Admission(table.admission) for table in model.tables.values() if table.admission > 1}
        self._counting = threading.Lock()

    def close(self) -> None:
        """Let go of the node."""
        self.publisher.close()
        self.reader.close()
        self.undo.close()

    # --- what workers read

    def pull(self, tables: Mapping[str, U64]) -> dict[str, F32]:
        """Table -> float32[n, dim]: the rows of these keys; those of absent ones as they would begin."""
        found = {}
        for name, keys in tables.items():
            table = self.model.tables[name]
            rows, stamps = self.reader.lookup(name, keys, stamps=True)
            if len(absent := np.flatnonzero(stamps == 0)):
                kernels.put_rows(rows, table.initializer.rows(name, np.ascontiguousarray(keys[absent]), table.dim), absent)
            found[name] = rows
        with self._counting:
            self.counts.pulled += sum(map(len, tables.values()))
        return found

    def marks(self, partitions: Iterable[int]) -> tuple[Mark, ...]:
        """All that are stored of these partitions."""
        marks = []
        for partition in partitions:
            rows, stamps = self.reader.lookup(MARKS_TABLE, self._own_keys[partition], stamps=True)
            workers = np.flatnonzero(stamps)
            numbers = numbers_of(rows[workers].reshape(len(workers), 2, WORDS))
            marks += [
                Mark(partition, worker, life, number)
                for worker, (life, number) in zip(workers.tolist(), numbers.tolist(), strict=True)
            ]
        return tuple(marks)

    def has(self, marks: Sequence[Mark]) -> bool:
        """Whether the step that these marks are of, all that it has, is in the node's memory."""
        last = {(mark.partition, mark.worker): mark for mark in marks}
        return set(last.values()) <= set(self.marks({mark.partition for mark in marks}))

    # --- what they change

    def prepare(self, group: Apply, pushes: Mapping[int, Push]) -> Prepared:
        """Do the arithmetic of a group, and put what its rows were on record.

        Args:
            group: steps and marks.
            pushes: ask -> what it brought: keys of known tables and partitions, gradients finite.

        Raises:
            StoreError: there is no room for the record, or a row cannot be read.
        """
        prepared = Prepared()
        before: list[Before] = []
        works = [self._gather(table, group.steps, pushes, prepared, before) for table in self.model.tables.values()]
        self._prepare_marks(group.marks, prepared, before)
        self.undo.write(before)  # before the rows change, in place
        for work in works:
            if work is not None:
                self._compute(work, prepared)
        return prepared

    def publish(self, prepared: Prepared) -> int:
        """Hand the step to the node; returns its stamp. May be repeated.

        Raises:
            EkkoError: the node did not take it, or did not say whether it did.
        """
        with self.step_of(prepared) as step:
            pass
        return step.stamp

    def left_of(self, prepared: Prepared, marks: Sequence[Mark]) -> Prepared | None:
        """What is to be published of a step that the node refused; None: it is to be worked out anew.

        If the model was rolled back, the rows that it was worked out from are others now. If the step is there, of an attempt
        before that came to no answer, it is what they were worked into: to do so again would count twice. And if it was taken
        back since, only its marks were not: to publish its rows as they were would bring back what was taken back.

        Raises:
            EkkoError: the node does not say what was taken back; nothing has changed.
        """
        there, epoch = self.has(marks), self.publisher.epoch
        self.publisher.restored()
        if not there:
            return None
        if self.publisher.epoch == epoch:
            return prepared
        return Prepared([column for column in prepared.columns if column[0] == MARKS_TABLE])

    def step_of(self, prepared: Prepared) -> PublishedStep:
        """What `publish` hands over."""
        step = PublishedStep(self.publisher, copy=False)
        for table, keys, rows in prepared.columns:  # none is more urgent than another (`ekko.priority.origin`)
            step.publish_checked(table, keys, rows)
        return step

    def take_back(self) -> int | None:
        """Publish what is on record as it was; its stamp, None: nothing is. Raises as `publish`, and may be repeated."""
        if not (before := self.undo.read()):
            return None
        try:
            with PublishedStep(self.publisher, copy=False) as step:
                for part in before:
                    if part.there.any():
                        step.publish(part.table, part.keys[part.there], part.rows[part.there])
                    if not part.there.all():
                        step.delete(part.table, part.keys[~part.there])
        except (ModelError, PublishError):
            self.publisher.restored()  # else it is refused for ever, where the model was rolled back since we began
            raise
        return step.stamp

    # --- one table

    def _gather(
        self,
        table: TrainedTable,
        steps: Sequence[Step],
        pushes: Mapping[int, Push],
        prepared: Prepared,
        before: list[Before],
    ) -> TableWork | None:
        """What there is to do in a table, with the rows as they are, which are added to `before`; None: nothing."""
        step_of = self._count_steps(table, steps, prepared, before) if table.optimizer.needs_step else {}
        units = [unit for step in steps for unit in self._units(table, step, pushes)]
        if not units:
            return None
        keys = place(units, self.model)
        rows, stamps = self.reader.lookup(table.name, keys, stamps=True)
        if (admission := self._admissions.get(table.name)) is not None and not stamps.all():
            units = [self._admitted(unit, stamps, admission) for unit in units]
            keys = place(units, self.model)
            rows, stamps = self.reader.lookup(table.name, keys, stamps=True)
        if not len(keys):
            return None
        there = stamps != 0
        before.append(Before(table.name, keys, rows, there))
        state = state_there = None
        if table.state_dim:
            state, stamps = self.reader.lookup(table.name + STATE_SUFFIX, keys, stamps=True)
            state_there = stamps != 0
            before.append(Before(table.name + STATE_SUFFIX, keys, state, state_there))
        return TableWork(table, units, keys, rows, there, state, state_there, step_of)

    def _compute(self, work: TableWork, prepared: Prepared) -> None:
        """Do the arithmetic of one table."""
        keys, rows, state, significance = work.compute(self.model.partition_of)
        table = work.table
        self.counts.not_finite += len(work.keys) - len(keys)
        self.counts.applied += len(keys)
        self.counts.made += len(work.there) - int(np.count_nonzero(work.there))
        prepared.columns.append((table.name, keys, rows))
        if table.state_dim:
            prepared.columns.append((table.name + STATE_SUFFIX, keys, state))
        prepared.changed[table.name] = Changed(keys, rows, significance)

    def _units(self, table: TrainedTable, step: Step, pushes: Mapping[int, Push]) -> list[Unit]:
        """What the optimiser takes one after another in this step."""
        brought: list[tuple[U64, F32]] = []
        rates: list[float] = []
        for ask in step.asks:
            push = pushes[ask]
            if table.name not in push.tables and not table.optimizer.needs_step:
                continue
            keys, gradients = push.tables.get(table.name) or (np.empty(0, np.uint64), np.empty((0, table.dim), np.float32))
            if not set(push.partitions) <= set(step.partitions):  # the others count in another step
                mine = np.isin(self.model.partition_of(keys), step.partitions)
                keys, gradients = keys[mine], gradients[mine]
            brought.append((keys, gradients))
            rates.append(push.rate)
        if step.summed and brought:
            keys, gradients = aggregate([keys for keys, _ in brought], [gradients for _, gradients in brought])
            brought, rates = [(keys, gradients)], [next((rate for rate in rates if rate == rate), float("nan"))]
        elif not step.summed:
            brought = [_each_once(keys, gradients) for keys, gradients in brought]
        return [Unit(keys, gradients, rate, step.partitions) for (keys, gradients), rate in zip(brought, rates, strict=True)]

    def _admitted(self, unit: Unit, stamps: U64, admission: Admission) -> Unit:
        """The same without the keys that there are no rows of and that were not pushed often enough."""
        fresh = np.flatnonzero((stamps if unit.places is None else stamps[unit.places]) == 0)
        admitted = admission.admit(np.ascontiguousarray(unit.keys[fresh]))
        if admitted is None:
            return unit
        stays = np.ones(len(unit.keys), np.bool_)
        stays[fresh[~admitted]] = False
        self.counts.not_admitted += int(np.count_nonzero(~admitted))
        return Unit(unit.keys[stays], unit.gradients[stays], unit.rate, unit.partitions)

    def _count_steps(
        self, table: TrainedTable, steps: Sequence[Step], prepared: Prepared, before: list[Before]
    ) -> dict[int, int]:
        """Count the steps of a group; how many each partition had before it."""
        taken: dict[int, int] = {}
        for step in steps:
            count = 1 if step.summed else len(step.asks)
            for partition in step.partitions:
                taken[partition] = taken.get(partition, 0) + count
        if not taken:
            return {}
        partitions = sorted(taken)
        keys = np.sort(self._own_keys[partitions, 0])
        order = np.argsort(self._own_keys[partitions, 0])
        name = table.name + STEPS_SUFFIX
        rows, stamps = self.reader.lookup(name, keys, stamps=True)
        before.append(Before(name, keys, rows, stamps != 0))
        had = numbers_of(rows)
        ordered = [partitions[place] for place in order.tolist()]
        now = had + np.array([taken[partition] for partition in ordered], np.uint64)
        prepared.columns.append((name, keys, words_of(now)))
        return dict(zip(ordered, had.tolist(), strict=True))

    def _prepare_marks(self, marks: Sequence[Mark], prepared: Prepared, before: list[Before]) -> None:
        """The marks as rows: of two of one worker in one partition the last one counts."""
        last = {(mark.partition, mark.worker): mark for mark in marks}
        if not last:
            return
        keys = np.array([self._own_keys[place] for place in last], np.uint64)
        numbers = np.array([(mark.life, mark.number) for mark in last.values()], np.uint64)
        rows, stamps = self.reader.lookup(MARKS_TABLE, keys, stamps=True)
        before.append(Before(MARKS_TABLE, keys, rows, stamps != 0))
        prepared.columns.append((MARKS_TABLE, keys, words_of(numbers).reshape(len(keys), MARK_DIM)))


def _each_once(keys: U64, gradients: F32) -> tuple[U64, F32]:
    """Gradients of one push, each key once; where that is so already, as a rule, in the order in which they came."""
    if kernels.are_distinct(keys):
        return keys, gradients
    return aggregate([keys], [gradients])
