"""What the trainer published, step by step, and its replay.

The replay applies the recorded batches in order and stops at any of them, which gives the state that a replica would hold if
everything reached it a fixed number of events late. It answers like a reader, so that it is scored by the same code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.codec import rounded
from ekko.model import CODEC_DEFAULT, CODECS
from ekko.torch import PublishStep, StepPublisher
from sim_cluster.demo.data import Events
from sim_cluster.demo.learning import STREAM_BATCH
from sim_cluster.demo.scoring import Scorer

FROZEN: Final = 1 << 62  # a delay that no stream reaches

Floats = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Batch:
    """One published step, as copies of what a replica makes of it."""

    tables: dict[str, tuple[NDArray[np.uint64], Floats]] = field(default_factory=dict)
    dense: dict[str, Floats] = field(default_factory=dict)
    codec: str = CODEC_DEFAULT

    @property
    def row_count(self) -> int:
        """How many table rows it carries."""
        return sum(len(keys) for keys, _ in self.tables.values())

    @property
    def payload_bytes(self) -> int:
        """Bytes of keys and values as they are sent, dense ones included."""
        row_bytes = CODECS[self.codec].row_bytes
        rows = sum(keys.nbytes + len(rows) * row_bytes(rows.shape[1]) for keys, rows in self.tables.values())
        return rows + sum(value.nbytes for value in self.dense.values())


class Recorder:
    """A publisher that writes down what passes through it on its way to the real one.

    Args:
        publisher: the real one.
        codec: in which its model's rows are stored.
    """

    def __init__(self, publisher: StepPublisher, codec: str = CODEC_DEFAULT) -> None:
        self._publisher = publisher
        self._codec = codec
        self.batches: list[Batch] = []

    @property
    def tables(self) -> dict[str, int]:
        """Table name -> dim."""
        return dict(self._publisher.tables)

    @contextmanager
    def step(self) -> Iterator[PublishStep]:
        """One batch; it is kept once the real publisher has published it."""
        with self._publisher.step() as step:
            recording = _RecordingStep(step, self._codec)
            yield recording
        self.batches.append(recording.batch)


class _RecordingStep:
    def __init__(self, step: PublishStep, codec: str) -> None:
        self._step = step
        self.batch = Batch(codec=codec)

    @property
    def stamp(self) -> int:
        return self._step.stamp

    def publish(
        self, table: str, keys: NDArray[np.uint64], rows: Floats, significance: NDArray[np.float32] | None = None
    ) -> None:
        self._step.publish(table, keys, rows, significance)
        self.batch.tables[table] = (keys.copy(), rounded(self.batch.codec, rows))

    def publish_dense(self, name: str, array: Floats) -> None:
        self._step.publish_dense(name, array)
        self.batch.dense[name] = array.copy()


@dataclass(frozen=True, slots=True, eq=False)
class TableHistory:
    """A table at the start of the stream, and its rows of every batch since, one after the other."""

    start: Floats  # [rows, dim]
    keys: NDArray[np.uint64]  # [n]
    rows: Floats  # [n, dim]
    ends: NDArray[np.int64]  # [batches]: how many of the n had come with this batch


@dataclass(frozen=True, slots=True, eq=False)
class TensorHistory:
    """A dense parameter at the start of the stream, and its values since."""

    start: Floats
    values: Floats  # [n, *shape]
    ends: NDArray[np.int64]  # [batches]: how many of the n had come with this batch


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Everything that was published during the stream.

    Args:
        learnt: int64[batches]: how many events of the stream had been learnt when the batch was published.
        tables: by table name.
        tensors: by parameter name.
    """

    learnt: NDArray[np.int64]
    tables: dict[str, TableHistory]
    tensors: dict[str, TensorHistory]

    @classmethod
    def of(cls, tables: dict[str, Floats], tensors: dict[str, Floats], batches: list[Batch], learnt: list[int]) -> "History":
        """Gather recorded batches.

        Args:
            tables: table -> float32[rows, dim] at the start.
            tensors: parameter -> value at the start.
            batches: since then.
            learnt: per batch, as in the class.
        """
        return cls(
            learnt=np.array(learnt, dtype=np.int64),
            tables={name: _table_history(name, start, batches) for name, start in tables.items()},
            tensors={name: _tensor_history(name, start, batches) for name, start in tensors.items()},
        )

    def save(self, path: Path) -> None:
        """Write everything to one `.npz` file."""
        columns: dict[str, ArrayLike] = {"learnt": self.learnt}
        for name, table in self.tables.items():
            columns |= {f"table/{name}/{field}": getattr(table, field) for field in ("start", "keys", "rows", "ends")}
        for name, tensor in self.tensors.items():
            columns |= {f"tensor/{name}/{field}": getattr(tensor, field) for field in ("start", "values", "ends")}
        np.savez(path, allow_pickle=False, **columns)

    @classmethod
    def load(cls, path: Path) -> "History":
        """Read what `save` wrote."""
        parts: dict[str, dict[str, dict[str, NDArray[np.float32]]]] = {"table": {}, "tensor": {}}
        with np.load(path) as saved:
            for key in saved:
                if key != "learnt":
                    kind, name, column = key.split("/")
                    parts[kind].setdefault(name, {})[column] = saved[key]
            return cls(
                learnt=saved["learnt"],
                tables={name: TableHistory(**columns) for name, columns in parts["table"].items()},  # type: ignore[arg-type]
                tensors={name: TensorHistory(**columns) for name, columns in parts["tensor"].items()},  # type: ignore[arg-type]
            )


def _table_history(name: str, start: Floats, batches: list[Batch]) -> TableHistory:
    parts = [batch.tables[name] for batch in batches if name in batch.tables]
    counts = [len(batch.tables[name][0]) if name in batch.tables else 0 for batch in batches]
    return TableHistory(
        start=start.copy(),
        keys=np.concatenate([np.empty(0, np.uint64), *(keys for keys, _ in parts)]),
        rows=np.concatenate([start[:0], *(rows for _, rows in parts)]),
        ends=np.cumsum(counts, dtype=np.int64),
    )


def _tensor_history(name: str, start: Floats, batches: list[Batch]) -> TensorHistory:
    values = [batch.dense[name] for batch in batches if name in batch.dense]
    return TensorHistory(
        start=start.copy(),
        values=np.stack(values) if values else np.empty((0, *start.shape), np.float32),
        ends=np.cumsum([name in batch.dense for batch in batches], dtype=np.int64),
    )


class Replay:
    """A reader of the state after some batch; goes forwards only."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._applied = 0  # batches
        self._tables = {name: table.start.copy() for name, table in history.tables.items()}

    def advance(self, batches: int) -> None:
        """Go to the state after the first `batches` batches."""
        assert batches >= self._applied, "a replay goes forwards only"
        for name, table in self._history.tables.items():
            first, last = _end(table.ends, self._applied), _end(table.ends, batches)
            # Of a key that repeats, NumPy keeps the last assignment: the newest row.
            self._tables[name][table.keys[first:last].astype(np.int64)] = table.rows[first:last]
        self._applied = batches

    def lookup(self, table: str, keys: NDArray[np.uint64]) -> Floats:
        """float32[n, dim]."""
        return self._tables[table][keys.astype(np.int64)]

    def dense(self, name: str) -> Floats:
        """The newest value so far."""
        tensor = self._history.tensors[name]
        count = _end(tensor.ends, self._applied)
        return tensor.values[count - 1] if count else tensor.start


def _end(ends: NDArray[np.int64], batches: int) -> int:
    return int(ends[batches - 1]) if batches else 0


def replay_scores(events: Events, history: History, start: int, delay: int) -> Floats:
    """float32[len(events) - start]: the stream, scored with state that is `delay` events old; `FROZEN`: of its start.

    An event is scored with what had been published when the events up to `delay` before it were learnt, rounded down to whole
    steps, as events become visible live; never with less than the state at the start of the stream; sparse and dense alike.
    """
    replay = Replay(history)
    scorer = Scorer(events, replay)
    scores = np.empty(len(events) - start, np.float32)
    step = len(scores) if delay >= len(scores) else STREAM_BATCH
    for first in range(0, len(scores), step):
        last = min(first + step, len(scores))
        replay.advance(int(np.searchsorted(history.learnt, first - delay, side="right")))
        scores[first:last] = scorer.score(start + first, start + last)
    return scores
