"""What is due of tables and dense parameters, as batches: taken as of one moment, and due again unless they arrive."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.torch.capture import TrackedTable
from ekko.torch.dense import DenseParameters

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


class PublishStep(Protocol):
    """What `track` asks of a step; `ekko.train.publisher.Step` offers it."""

    @property
    def stamp(self) -> int: ...

    def publish(self, table: str, keys: U64, rows: F32, significance: F32 | None = None) -> None: ...

    def publish_dense(self, name: str, array: F32) -> None: ...


@runtime_checkable
class DeletingStep(Protocol):
    """What it asks beyond that where tables grow, and keys are freed."""

    def delete(self, table: str, keys: U64) -> None: ...


class StepPublisher(Protocol):
    """What `track` asks of a publisher; `ekko.Publisher` offers it."""

    @property
    def tables(self) -> Mapping[str, int]: ...

    def step(self) -> AbstractContextManager[PublishStep]: ...


# Batches that a version of the dense parameters is put off for at most, while more rows are due than a copy may have.
PUT_OFF_MAX: Final = 32


@dataclass(frozen=True, slots=True)
class Counts:
    """What a tracker has done."""

    steps: int  # of the optimizer, or of the last of several; where there are more than batches, batches have several steps
    batches: int
    rows: int  # in these
    failures: int  # batches that did not arrive; what was in them is due again
    rows_due: int  # as far as it was added up: what the newest steps touched is not among them
    rows_due_max: int  # most of each table at a time
    bytes_due: int  # what is kept of due rows, however many: 4 bytes and a bit for each row of the tables
    waited_s: float  # that steps have waited for copies


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows of one table in a batch."""

    table: TrackedTable
    ids: I64  # [n]
    weights: F32  # [n]
    keys: U64  # [n]
    rows: F32  # [n, dim]

    def of(self, chosen: NDArray[np.bool_]) -> "Part":
        """Those of the rows that are chosen, bool[n]."""
        return Part(self.table, self.ids[chosen], self.weights[chosen], self.keys[chosen], self.rows[chosen])


# Of a table's name, keys and rows: bool[n], which to publish.
Choice = Callable[[str, U64, F32], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows and dense parameters of one moment."""

    parts: list[Part] = field(default_factory=list)
    version: dict[str, F32] | None = None  # of the dense parameters
    deletes: list[tuple[TrackedTable, U64]] = field(default_factory=list)


class Outbox:
    """Takes batches and publishes them; used by one thread at a time.

    Args:
        tables: in training.
        dense: parameters of the same model.
        publisher: to publish with.
        says_significance: whether rows go with what they weigh; else the node looks how far they move.
    """

    def __init__(
        self, tables: Sequence[TrackedTable], dense: DenseParameters, publisher: StepPublisher, *, says_significance: bool
    ) -> None:
        self._tables = tables
        self._dense = dense
        self._publisher = publisher
        self._says_significance = says_significance
        self.stamp = 0  # of the last batch
        self._batches = self._rows = self._failures = 0
        self._put_off = 0  # batches

    @property
    def is_due(self) -> bool:
        """Whether there may be anything to send."""
        return self._dense.due or any(table.is_due for table in self._tables)

    def counts(self, steps: int, waited_s: float) -> Counts:
        """What has been done; what others count is given."""
        due = [table.due for table in self._tables]
        rows, most, size = (sum(getattr(one, name) for one in due) for name in ("count", "count_max", "nbytes"))
        return Counts(steps, self._batches, self._rows, self._failures, rows, most, size, waited_s)

    def take(self, bytes_max: int | None) -> Batch | None:
        """What is due, up to so many bytes of rows; None: nothing is. Called between two steps.

        Dense parameters go with all rows that are due: beside rows that are still to come they would be newer than those. While
        more is due than a copy may have they are put off, and after `PUT_OFF_MAX` batches they take all of it along.
        """
        batch = Batch()
        try:
            return self._taken(batch, bytes_max)
        except BaseException:  # a device is out of memory, say
            self._give_back(batch)
            raise

    def _taken(self, batch: Batch, bytes_max: int | None) -> Batch | None:
        """What is due, noted in `batch` before anything may fail."""
        parts, deletes = batch.parts, batch.deletes
        dense_goes = self._dense.due and self._all_may_go(bytes_max)
        room = None if dense_goes else bytes_max
        for table in self._tables:
            if not table.is_due:
                continue
            row_bytes = 4 * table.weight.shape[1]
            if len(freed := table.take_freed()):
                deletes.append((table, freed))
            ids, weights = table.take(None if room is None else max(1, room // row_bytes))
            if len(ids):
                try:
                    rows = table.rows(ids)
                except BaseException:
                    table.give_back(ids, weights)
                    raise
                parts.append(Part(table, ids, weights, table.keys_of(ids), rows))
                room = None if room is None else room - len(ids) * row_bytes
        version = self._dense.take() if dense_goes else None
        return Batch(parts, version, deletes) if parts or deletes or version is not None else None

    def _all_may_go(self, bytes_max: int | None) -> bool:
        for table in self._tables:
            table.settle()
        if bytes_max is None or self._put_off >= PUT_OFF_MAX or sum(table.bytes_due for table in self._tables) <= bytes_max:
            self._put_off = 0
            return True
        self._put_off += 1
        return False

    def send(self, batch: Batch) -> None:
        """Publish a batch; what raises here has made it due again."""
        try:
            with self._publisher.step() as step:
                for table, keys in batch.deletes:
                    assert isinstance(step, DeletingStep)
                    step.delete(table.name, keys)
                for part in batch.parts:
                    said = self._says_significance and part.table.says_significance
                    step.publish(part.table.name, part.keys, part.rows, part.weights if said else None)
                if batch.version is not None:
                    self._dense.add_to(step, batch.version)
        except BaseException:
            self._failures += 1
            self._give_back(batch)
            raise
        for part in batch.parts:
            part.table.sent(part.ids, part.rows)
            self._rows += len(part.ids)
        if batch.version is not None:
            self._dense.published(batch.version, getattr(self._publisher, "openings", 0))  # one of yours may not count them
        self._batches += 1
        self.stamp = step.stamp

    def _give_back(self, batch: Batch) -> None:
        """What was taken is due again."""
        for table, keys in batch.deletes:
            table.give_back_freed(keys)
        for part in batch.parts:
            part.table.give_back(part.ids, part.weights)
        if batch.version is not None:
            self._dense.failed()

    def publish_all(self, bytes_max: int, choice: Choice | None = None) -> None:
        """Publish every row of every table, or those that are chosen, in batches of about so many bytes.

        Raises:
            ModelError: a batch had to wait for the end of a rollback: the others are not published, since they would undo it.
        """
        for table in self._tables:
            table.settle()
            chunk = max(1, bytes_max // (4 * table.weight.shape[1]))
            for begin in range(0, len(table.weight), chunk):
                ids = np.arange(begin, min(begin + chunk, len(table.weight)), dtype=np.int64)
                ids = table.live(ids)
                part = Part(table, ids, np.zeros(len(ids), np.float32), table.keys_of(ids), table.rows(ids))
                if choice is not None:
                    part = part.of(choice(table.name, part.keys, part.rows))
                if len(part.ids):
                    self.send(Batch([part]))
                    if getattr(self._publisher, "has_restored", False):
                        raise ModelError(
                            "the model was rolled back while all of its rows were published: call Tracker.reload(), which "
                            "loads what was restored, and then publish_all() again"
                        )
                table.accept(ids)

    def forget(self) -> dict[str, I64]:
        """Nothing is due any more: table -> int64[n], the rows of which something was."""
        self._dense.drop()
        return {table.name: table.forget() for table in self._tables}
