# ruff: noqa: SLF001 - a state is a part of its reader
"""Several look-ups and dense tensors of one moment: `Reader.together`.

What a function reads through a `State` was in the node's memory at one moment, between two batches. The state looks after each
copy whether a batch has begun since its first one; then the function ends there, before it sees what it has just read, and is
called again with a state of a later moment. So nothing is kept twice, nothing is locked, and the writer does not notice.

That the rows and the tensors of a moment belong together is the trainer's promise: it publishes tensors in one step with the
rows of that time. Where it publishes them with every n-th step only, rows may be newer than the tensors; their stamps say by
how much, and `newer_ms` is what a caller takes.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError
from ekko.model import DENSE_TABLE
from ekko.serve.arguments import as_bags, as_keys, output
from ekko.serve.attachment import Attachment
from ekko.serve.consistency import Moment, MovedOnError
from ekko.serve.tensor import Tensor
from ekko.store.view import TableView
from p2p.stamps import unix_ms_of

if TYPE_CHECKING:
    from ekko.serve.reader import Reader

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]


class State:
    """A model as it was at one moment; given to the function that `Reader.together` calls, and of no use after it.

    Used by one thread. Rows are those of shared memory, also where the reader has a device: they are then brought there.
    """

    def __init__(self, reader: "Reader", attachment: Attachment, moment: Moment, newer_ms: float | None) -> None:
        self._reader = reader
        self._attachment = attachment
        self._moment = moment
        self._newer_ms = newer_ms
        self._rows_stamp = 0  # the newest that was read
        self._tensors_stamp = 0
        self._tensors: dict[str, NDArray[Any]] = {}
        self._ended = False

    def end(self) -> None:
        """The function that it was given to has returned.

        Raises:
            MovedOnError: it was told that the moment is over, and kept that to itself.
        """
        self._check()
        self._ended = True

    @property
    def rows_stamp(self) -> int:
        """The newest stamp of the rows that were looked up so far, pooled ones left out but with `newer_ms`; 0: none."""
        return self._rows_stamp

    @property
    def tensors_stamp(self) -> int:
        """The newest stamp of the tensors that were read so far: of which step they are; 0: none."""
        return self._tensors_stamp

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the model's dense tensors."""
        return tuple(self._attachment.tensors)

    @overload
    def lookup(self, table: str, keys: ArrayLike, *, stamps: Literal[False] = False) -> F32: ...

    @overload
    def lookup(self, table: str, keys: ArrayLike, *, stamps: Literal[True]) -> tuple[F32, U64]: ...

    def lookup(self, table: str, keys: ArrayLike, *, stamps: bool = False) -> F32 | tuple[F32, U64]:
        """As `Reader.lookup`."""
        view, wanted, rows = self._calls({table: keys})[0]
        found = self._copied(view, wanted, rows)
        self._check()
        shown = self._reader._shown(rows)
        return (shown, found) if stamps else shown

    def lookup_many(self, keys: Mapping[str, ArrayLike]) -> dict[str, F32]:
        """As `Reader.lookup_many`."""
        calls = self._calls(keys)
        for view, wanted, rows in calls:
            self._copied(view, wanted, rows)
        self._check()
        return {table: self._reader._shown(rows) for table, (_, _, rows) in zip(keys, calls, strict=True)}

    def lookup_pooled(
        self,
        table: str,
        keys: ArrayLike,
        offsets: ArrayLike | None = None,
        *,
        mode: Literal["sum", "mean", "max"] = "sum",
        weights: ArrayLike | None = None,
        include_last_offset: bool = False,
        padding_key: int | None = None,
    ) -> F32:
        """As `Reader.lookup_pooled`. With `newer_ms` the rows are read twice: pooled, and for their stamps."""
        reader, attachment = self._reader, self._attachment
        view, wanted = reader._view(attachment, table), as_keys(reader._host_keys(keys))
        bags = as_bags(wanted, offsets, mode, weights, include_last_offset, padding_key)
        reader._check_keys(attachment, table, wanted, padding_key)
        rows = output(None, (bags.ends.size - 1, view.spec.dim))
        reader._pool(view, wanted, bags, rows)
        if self._newer_ms is not None:
            asked = wanted if padding_key is None else wanted[wanted != np.uint64(padding_key)]
            self._copied(view, asked, np.empty((*asked.shape, view.spec.dim), np.float32))
        self._check()
        return reader._shown(rows)

    def dense(self, name: str) -> NDArray[Any]:
        """As `Reader.dense`; a tensor that is asked for again is not copied again."""
        return self.dense_many([name])[name]

    def dense_many(self, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Tensors by name; None: all that the model has."""
        wanted = self.tensors if names is None else tuple(names)
        view = self._attachment.tables.get(DENSE_TABLE)
        read = {name: Tensor(self._reader._tensor(self._attachment, name)) for name in wanted if name not in self._tensors}
        for tensor in read.values():
            assert view is not None, "a model with tensors has a table of their rows"
            tensor.read(view)
            self._tensors_stamp = max(self._tensors_stamp, tensor.stamp)
        self._check()
        self._tensors |= {name: tensor.whole(self._reader.model) for name, tensor in read.items()}
        return {name: self._tensors[name] for name in wanted}

    def _calls(self, keys: Mapping[str, ArrayLike]) -> list[tuple[TableView, U64, F32]]:
        reader = self._reader
        return reader._calls(self._attachment, {table: reader._host_keys(asked) for table, asked in keys.items()}, {})

    def _copied(self, view: TableView, keys: U64, rows: F32) -> U64:
        """Rows into `rows`; their stamps."""
        stamps = np.empty(keys.shape, np.uint64)
        self._reader._copy(view, keys, rows, stamps)
        if stamps.size:
            self._rows_stamp = max(self._rows_stamp, int(stamps.max()))
        return stamps

    def _check(self) -> None:
        """What was copied may be shown: it is of this state's moment, and rows are not too much newer than tensors."""
        if self._ended:
            raise ModelError(f"a state of model {self._reader.model!r} was used after its function: call Reader.together again")
        self._moment.check()
        newer_ms = self._newer_ms
        if newer_ms is None or not self._tensors_stamp or self._rows_stamp <= self._tensors_stamp:
            return
        apart_ms = unix_ms_of(self._rows_stamp) - unix_ms_of(self._tensors_stamp)
        if not newer_ms or apart_ms > newer_ms:
            raise MovedOnError(
                f"rows are {apart_ms} ms newer than the dense tensors: let them be so with newer_ms=, wait longer with "
                "timeout=, or publish tensors with more steps (ekko.torch.track(..., dense_every=1): with each)"
            )


def check_arguments(newer_ms: float | None, timeout: float) -> None:
    """Refuse what `Reader.together` cannot honour.

    Raises:
        ModelError: which, and what it may be.
    """
    if newer_ms is not None and not newer_ms >= 0:
        raise ModelError(f"newer_ms is {newer_ms!r}: expected milliseconds from 0, or None for any number")
    if not timeout >= 0:
        raise ModelError(f"timeout is {timeout!r}: expected seconds from 0")
