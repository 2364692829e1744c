"""One step of a publisher while it is collected: calls on any number of tables become one batch.

Within a step the last word on a key counts: of duplicate keys the last row, of a publish and a delete the later call.
"""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.codec import encode
from ekko.errors import ModelError, PublishError
from ekko.model import DENSE_DIM, DENSE_SPEC, DENSE_TABLE, TensorSpec
from ekko.store.kernels.checks import last_occurrences
from ekko.train.arguments import dense_of, keys_of, rows_of, significance_of
from p2p.replica import U64, RowColumns

if TYPE_CHECKING:
    from ekko.train.publisher import Publisher

# Of a row whose publisher does not say how much it matters: the node looks how far it moved.
NOT_SAID: Final = float("nan")

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class Step:
    """What one step publishes, collected until it is committed; made by `Publisher.step()`. Used by one thread."""

    def __init__(self, publisher: "Publisher", *, copy: bool) -> None:
        self._publisher = publisher
        self._copy = copy  # values are those at the call, whatever the caller does to its arrays before the step ends
        self._changes: dict[str, list[_Change]] = {}
        self._stamp: int | None = None
        self._done = False
        self.tensors: dict[str, TensorSpec] = {}

    @property
    def stamp(self) -> int:
        """The stamp the step was published under.

        Raises:
            PublishError: the step is not published (yet).
        """
        if self._stamp is None:
            raise PublishError(
                "this step is not published: its stamp is known when the `with` block has ended without an exception"
            )
        return self._stamp

    def publish(self, table: str, keys: ArrayLike, rows: ArrayLike, significance: ArrayLike | None = None) -> None:
        """Add rows of one table; arguments and errors as in `Publisher.publish`."""
        self._check_collecting()
        dim = self._publisher.dim_of(table)
        checked_keys = keys_of(table, keys)
        values = rows_of(table, checked_keys, rows, dim, self._publisher.codec)
        weights = None if significance is None else significance_of(table, checked_keys, significance)
        chosen = self._publisher.admitted(table, checked_keys)
        if chosen is not None:
            checked_keys, values = checked_keys[chosen], values[chosen]
            weights = None if weights is None else weights[chosen]
        self._add(table, _Change(checked_keys, encode(self._publisher.codec, values), weights))

    def publish_checked(self, table: str, keys: U64, rows: F32, significance: F32 | None = None) -> None:
        """Add rows that a parameter server has worked out, and knows to be right: nothing is looked at again, or held back.

        Args:
            table: which no other call of this step names.
            keys: uint64[n], contiguous, none twice.
            rows: float32[n, dim], contiguous, finite and within the codec's range.
            significance: float32[n], finite, not negative.

        Raises:
            ModelError: unknown table.
        """
        self._check_collecting()
        dim = self._publisher.dim_of(table)
        assert rows.shape == (len(keys), dim), f"rows of table {table!r} have shape {rows.shape}, not {(len(keys), dim)}"
        self._add(table, _Change(keys, encode(self._publisher.codec, rows), significance, unique=True))

    def delete(self, table: str, keys: ArrayLike) -> None:
        """Add deletes of one table."""
        self._check_collecting()
        self._publisher.dim_of(table)
        self._add(table, _Change(keys_of(table, keys), None, None))

    def publish_dense(self, name: str, array: ArrayLike) -> None:
        """Add a dense tensor: float32 of any shape."""
        spec, rows = self._dense_rows(name, array)
        self._add(DENSE_TABLE, _Change(spec.keys, encode(DENSE_SPEC.codec, rows), None))

    def publish_dense_changes(self, name: str, array: ArrayLike, before: ArrayLike) -> int:
        """Add what of a dense tensor is not as it was: the rows of `DENSE_DIM` values in which a bit differs, and the first.

        The first goes along though nothing changed: its stamp says of which step the tensor is.

        Args:
            name: the tensor's.
            array: float32 of any shape, as it is now.
            before: float32 of that shape, as this publisher published it last, and nobody else since.

        Returns:
            How many of the tensor's rows go.

        Raises:
            ModelError, PublishError: as `Publisher.publish_dense`; `before` has another shape.
        """
        spec, rows = self._dense_rows(name, array)
        if np.shape(before) != spec.shape:
            raise ModelError(f"tensor {name!r} has shape {spec.shape}, and before that {np.shape(before)}: publish it whole")
        differs = (rows.view(np.uint32) != _in_rows(spec, np.asarray(before, np.float32)).view(np.uint32)).any(axis=1)
        differs[:1] = True
        self._add(DENSE_TABLE, _Change(spec.keys[differs], encode(DENSE_SPEC.codec, rows[differs]), None))
        return int(np.count_nonzero(differs))

    def _dense_rows(self, name: str, array: ArrayLike) -> tuple[TensorSpec, F32]:
        """A tensor's schema entry, noted, and its float32[rows, DENSE_DIM]."""
        self._check_collecting()
        values = dense_of(name, array)
        spec = self._publisher.tensor_spec(name, values)
        if self.tensors.setdefault(name, spec) != spec:
            raise ModelError(f"tensor {name!r} appears in one step with shapes {self.tensors[name].shape} and {spec.shape}")
        return spec, _in_rows(spec, values)

    def columns(self) -> list[tuple[RowColumns, F32 | None]]:
        """Everything collected, one column per table: unique keys, live rows first; and how much each of its rows matters."""
        columns = (_column_of(self._publisher.table_number(table), changes) for table, changes in self._changes.items())
        return [both for both in columns if len(both[0].keys)]

    def _add(self, table: str, change: "_Change") -> None:
        self._changes.setdefault(table, []).append(change.snapshot() if self._copy else change)

    def _check_collecting(self) -> None:
        if self._done:
            raise PublishError("this step has ended: begin another one with Publisher.step()")

    def __enter__(self) -> Self:
        self._check_collecting()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._check_collecting()
        self._done = True
        if kind is None:
            self._stamp = self._publisher._commit(self, time.monotonic_ns())  # noqa: SLF001 - the two are one unit
        self._changes.clear()


def _in_rows(spec: TensorSpec, values: F32) -> F32:
    """float32[rows, DENSE_DIM]; the last row is filled with zeros."""
    rows = np.zeros((spec.rows, DENSE_DIM), np.float32)
    rows.reshape(-1)[: values.size] = values.reshape(-1)
    return rows


class _Change:
    """One call of a step on one table; `rows`, uint8[n, row_bytes] as they are stored; None: a delete. `unique`: whether it is
    known that no key comes twice.
    """

    __slots__ = ("keys", "rows", "significance", "unique")

    def __init__(self, keys: U64, rows: U8 | None, significance: F32 | None, *, unique: bool = False) -> None:
        self.unique = unique
        self.keys = keys
        self.rows = rows
        self.significance = significance

    def snapshot(self) -> "_Change":
        """The same values in memory of our own."""
        return _Change(
            self.keys.copy(),
            None if self.rows is None else self.rows.copy(),
            None if self.significance is None else self.significance.copy(),
            unique=self.unique,
        )


def _column_of(table: int, changes: list[_Change]) -> tuple[RowColumns, F32 | None]:
    """Merge the calls on one table; of each key the last call's last word stays. And float32[n], how much its rows matter."""
    keys = changes[0].keys if len(changes) == 1 else np.concatenate([change.keys for change in changes])
    keep = None if len(changes) == 1 and changes[0].unique else last_occurrences(keys)
    live_parts = [change.rows for change in changes if change.rows is not None]
    rows = np.concatenate(live_parts) if len(live_parts) > 1 else live_parts[0] if live_parts else np.empty((0, 4), np.uint8)
    weights = _weights_of(changes)
    if keep is not None or len(live_parts) != len(changes):
        live = np.concatenate([np.full(len(change.keys), change.rows is not None) for change in changes])
        row_of = np.cumsum(live) - 1  # position in `rows` of each live entry
        keep = np.arange(len(keys)) if keep is None else keep
        stays, goes = keep[live[keep]], keep[~live[keep]]
        order = np.concatenate([stays, goes])
        keys, rows = keys[order], rows[row_of[stays]]
        weights = None if weights is None else weights[order]
    return RowColumns(table, np.ascontiguousarray(keys), np.ascontiguousarray(rows)), weights


def _weights_of(changes: list[_Change]) -> F32 | None:
    """float32[n] over all calls; None when no call gave any."""
    if all(change.significance is None for change in changes):
        return None
    parts = [np.full(len(c.keys), NOT_SAID, np.float32) if c.significance is None else c.significance for c in changes]
    return np.concatenate(parts)
