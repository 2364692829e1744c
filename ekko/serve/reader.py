"""Look-ups by an inference process, straight from the memory that the node writes: no call, no lock, no network.

A reader follows its node by itself. The control file says when there is a new manifest (a table was added) or when the store
was replaced (the node began anew); the table's header says when the index was replaced. Each look-up reads those three words
first. A node that is restarted on intact memory goes on in the same files, and its readers do not notice.

The model's name may be an alias (`ekko.generations`). Which model it stands for is settled when the reader attaches, and each
look-up uses one attachment from its beginning to its end; when the alias is switched, the next look-up attaches anew.
"""

from collections.abc import Callable, Sequence
from collections.abc import Mapping as ReadOnlyMapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError
from ekko.model import DENSE_TABLE
from ekko.serve.arguments import as_bags, as_keys, output
from ekko.serve.attachment import Attachment, names
from ekko.serve.consistency import DEADLINE_S, Moment, at_one_moment, between_batches, mostly_between_batches
from ekko.serve.copying import Copier
from ekko.serve.defaults import Default, Defaults
from ekko.serve.scoring import Scorer
from ekko.serve.tensor import Tensor
from ekko.serve.together import State, check_arguments
from ekko.store.view import NO_STAMPS

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]
T = TypeVar("T")


class Reader(Copier, Scorer):
    """Looks rows up in one model of the node on this machine. Safe to use from any number of threads.

    A process that was forked may go on with its parent's reader; a pickled one attaches anew where it is unpickled. Memory is
    mapped read-only, so another user than the node's may read, if the node lets it (`shm_mode`, `shm_group`).

    With `consistent=True` a look-up answers from between two batches: of each writer it shows some step and all before it, in
    all tables, and nothing of a later one. It tries again while batches are being applied, for at most a quarter of a second; a
    node that has half of something (it was away, or a step arrives in parts) is catching up, and that is a `StoreError`. Other
    look-ups cost what they cost without.

    Args:
        model: the model's name, or an alias: then the reader follows it from model to model, between two look-ups.
        run_dir: the node's `run_dir`.
        wait: seconds to wait for the model when the node does not have it yet; None: raise at once.
        unheld: what keys in partitions that the node does not hold are: "raise", a `ModelError`, since zeros in their place
            would spoil a model's answers in silence; or "absent", for those who merge the answers of several nodes.
        defaults: table -> what its absent keys are: "zeros", as without; "mean", the mean of (a sample of) the rows that are
            live, made anew once a minute and when the table has doubled; or a row, float32[dim].
        counted: count what is looked up, so that the node knows what is hot (`ekko hot`). False for whoever reads keys that no
            request asked for: a whole table that is exported says nothing of which rows matter, or are to be on a device.
        device: "cuda:0", or "host-twin": look rows up in the node's caches there first. `lookup`, `lookup_many` and
            `lookup_pooled` then return arrays of that device, and `out` is to be one; what is not cached comes from shared
            memory. See docs/reference/gpu-caches.md.

    Raises:
        ModelError: the node does not have the model (within `wait`), or a default is none of these; this process has no such
            device.
        StoreError: what is in shared memory cannot be read by this version; the node keeps no rows on this device.
    """

    def __init__(
        self,
        model: str,
        run_dir: str | Path,
        wait: float | None = None,
        unheld: Literal["raise", "absent"] = "raise",
        *,
        defaults: ReadOnlyMapping[str, Default] = MappingProxyType({}),
        counted: bool = True,
        device: str | None = None,
    ) -> None:
        self._arguments = (model, run_dir, wait, unheld, dict(defaults), counted, device)
        super().__init__(model, run_dir, wait, unheld, Defaults(defaults), counted, device)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process (a worker that is spawned, not forked): it attaches there by itself."""
        return _reader_of, (type(self), *self._arguments, self._closed)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory, in this process. Look-ups still running in other threads finish."""
        self._closed = True
        with self._attaching:  # a thread that attaches just now may not bring it back
            attachment, self._attachment = self._attachment, None
            self._tier = None
        self._end_reports()
        if attachment is not None:
            for view in attachment.tables.values():
                view.counter.flush()

    @overload
    def lookup(
        self, table: str, keys: ArrayLike, *, out: F32 | None = None, stamps: Literal[False] = False, consistent: bool = False
    ) -> F32: ...

    @overload
    def lookup(
        self, table: str, keys: ArrayLike, *, out: F32 | None = None, stamps: Literal[True], consistent: bool = False
    ) -> tuple[F32, U64]: ...

    def lookup(
        self, table: str, keys: ArrayLike, *, out: F32 | None = None, stamps: bool = False, consistent: bool = False
    ) -> F32 | tuple[F32, U64]:
        """Copy rows out by key.

        Args:
            table: its name.
            keys: integers >= 0 of any shape.
            out: float32[*keys.shape, dim], C-contiguous, to write into; None: a new array.
            stamps: return the rows' stamps too.
            consistent: answer from between two batches, never from half of one; see the class.

        Returns:
            float32[*keys.shape, dim], the table's default (zeros, see `defaults`) for keys that are absent or deleted; with
            `stamps` also uint64[*keys.shape], 0 for such keys. Each row is one version of it, whole, and never older than one
            this process saw before.

        Raises:
            ModelError: an unknown table, keys that are not integers >= 0, an `out` that does not fit, or keys in partitions
                that the node does not hold (see `unheld`). `out` is unchanged.
            StoreError: a row stays locked because its node was killed in mid-row.
        """
        attachment = self._current()
        view = self._view(attachment, table)
        if (tier := self._tier) is not None:
            # Arrays of a device, which are called what those of NumPy are.
            return self._lookup_on(tier, attachment, view, keys, out, stamps, consistent)  # type: ignore[no-any-return]
        wanted = as_keys(keys)
        self._check_keys(attachment, table, wanted, None)
        rows = output(out, (*wanted.shape, view.spec.dim))
        found = np.empty(wanted.shape, np.uint64) if stamps else NO_STAMPS
        if consistent:
            self._read(attachment, consistent, lambda: self._copy(view, wanted, rows, found))
        else:  # with as few steps as there can be: of 64 keys, all of Python's take as long as the rows
            self._copy(view, wanted, rows, found)
        return (rows, found) if stamps else rows

    def lookup_many(
        self,
        keys: ReadOnlyMapping[str, ArrayLike],
        *,
        out: ReadOnlyMapping[str, F32] = MappingProxyType({}),
        consistent: bool = False,
    ) -> dict[str, F32]:
        """Copy rows of several tables out, all of them of one model generation.

        Args:
            keys: table -> integers >= 0 of any shape.
            out: table -> float32[*keys.shape, dim], C-contiguous, to write into; a new array for tables that it does not name.
            consistent: answer from between two batches, never from half of one; see the class.

        Returns:
            Table -> its rows, in the order of `keys`. See `lookup`.

        Raises:
            ModelError: as `lookup`, before any table was read; or `out` names a table that `keys` does not.
            StoreError: as `lookup`.
        """
        attachment = self._current()
        strangers = {name: None for name in out if name not in keys}
        if strangers:
            raise ModelError(f"out has {names(strangers)}, and keys are asked of {names(keys)}")
        tier = self._tier
        calls = self._calls(attachment, keys, out if tier is None else {})
        if tier is not None and not consistent:
            asked = [(self._ask(attachment, view), wanted, out.get(view.spec.name)) for view, wanted, _ in calls]
            return {name: tier.lookup(*one)[0] for name, one in zip(keys, asked, strict=True)}

        def copy() -> None:
            for view, wanted, rows in calls:
                self._copy(view, wanted, rows, NO_STAMPS)

        self._read(attachment, consistent, copy)
        copied = dict(zip(keys, (rows for _, _, rows in calls), strict=True))
        return copied if tier is None else {name: tier.upload(rows, out.get(name)) for name, rows in copied.items()}

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
        out: F32 | None = None,
        consistent: bool = False,
    ) -> F32:
        """Make the rows of each bag one while they are read, as `torch.nn.functional.embedding_bag`.

        Args:
            table: its name.
            keys: integers >= 0; [n] with `offsets`, or [bags, length] without.
            offsets: [bags], where in `keys` each bag begins, ascending from 0.
            mode: how rows become one, value by value. An absent or deleted key counts as a row, of the table's default.
            weights: of the shape of `keys`, what each row is multiplied by; mode "sum" only.
            include_last_offset: `offsets` ends with the number of keys, so that there is one bag less.
            padding_key: this key is left out: it is neither summed nor counted.
            out: float32[bags, dim], C-contiguous, to write into; None: a new array.
            consistent: answer from between two batches, never from half of one; see the class.

        Returns:
            float32[bags, dim]; an empty bag is zeros. Sums are float32, from the first row of a bag to the last.

        Raises:
            ModelError: as `lookup`; or offsets, mode or weights that do not fit. `out` is unchanged.
            StoreError: as `lookup`.
        """
        attachment, tier = self._current(), self._tier
        view = self._view(attachment, table)
        wanted = as_keys(keys if tier is None else tier.host_keys(keys))
        bags = as_bags(wanted, offsets, mode, weights, include_last_offset, padding_key)
        self._check_keys(attachment, table, wanted, padding_key)
        if tier is not None and not consistent:
            return tier.pool(self._ask(attachment, view), wanted.reshape(-1), bags, out)  # type: ignore[no-any-return]
        rows = output(out if tier is None else None, (bags.ends.size - 1, view.spec.dim))
        self._read(attachment, consistent, lambda: self._pool(view, wanted, bags, rows))
        return rows if tier is None else tier.upload(rows, out)

    def dense(self, name: str, *, consistent: bool = False) -> NDArray[Any]:
        """A dense tensor, with its shape and dtype.

        Rows of `DENSE_DIM` values are each of one version. While a batch is being applied, the tensor is read again, a few
        times; a mixture of two versions remains possible, but with `consistent`.

        Args:
            name: the tensor's.
            consistent: answer from between two batches: of one version, whole; see the class.

        Raises:
            ModelError: an unknown tensor, one that is not here yet as a whole, or one of which some rows are in partitions that
                the node does not hold, whatever `unheld`: like all rows, those of a tensor are spread over the partitions by
                their keys, so of a divided model only small ones are on a node that holds a part.
            StoreError: as `lookup`.
        """
        tensor = Tensor(self._tensor(attachment := self._current(), name))
        rows = attachment.tables[DENSE_TABLE]
        if consistent:
            between_batches(self.model, attachment.header_address, lambda: tensor.read(rows))
        else:
            mostly_between_batches(attachment.header_address, lambda: tensor.read(rows))
        return tensor.whole(self.model)

    def lookup_with_dense(
        self, keys: ReadOnlyMapping[str, ArrayLike], dense: Sequence[str], *, consistent: bool = True
    ) -> tuple[dict[str, F32], dict[str, NDArray[Any]]]:
        """Rows of several tables and dense tensors that belong together: of one model generation, and of the same steps.

        A trainer that publishes rows and dense tensors in one step gives a pair that was trained together; without `consistent`
        either may be a step ahead of the other.

        Args:
            keys: table -> integers >= 0 of any shape.
            dense: names of tensors.
            consistent: answer from between two batches, never from half of one; see the class.

        Returns:
            Table -> its rows, as `lookup_many`; and tensor -> its values, as `dense`.

        Raises:
            ModelError, StoreError: as those.
        """
        attachment = self._current()
        calls = self._calls(attachment, keys, {})
        tensors = {name: Tensor(self._tensor(attachment, name)) for name in dense}

        def copy() -> None:
            for view, wanted, rows in calls:
                self._copy(view, wanted, rows, NO_STAMPS)
            for tensor in tensors.values():
                tensor.read(attachment.tables[DENSE_TABLE])

        self._read(attachment, consistent, copy)
        rows_of = {name: self._shown(rows) for name, (_, _, rows) in zip(keys, calls, strict=True)}
        return rows_of, {name: tensor.whole(self.model) for name, tensor in tensors.items()}

    def together(self, read: Callable[[State], T], *, newer_ms: float | None = None, timeout: float = DEADLINE_S) -> T:
        """Several look-ups and dense tensors of one moment, between two batches: of each writer whole steps, the same in all.

            def inputs(state):
                films = state.lookup("history", users)  # one look-up may need the answer of another
                return state.lookup("item", films), state.dense_many()

            rows, tensors = reader.together(inputs)

        `read` is ended, within one of its look-ups, as soon as a batch is applied, and called again: it sees nothing of two
        moments, and should read, and compute afterwards. Calls that are many microseconds long between batches that follow
        each other at once find no moment that is long enough.

        Args:
            read: given the `State` to read from, may be called any number of times; what it raises goes to the caller.
            newer_ms: how much newer than the newest of its tensors the rows may be that it reads, in milliseconds by their
                stamps; 0: not at all, so that each is as it was when the tensors were published; None: as they are. A key that
                is absent counts as old.
            timeout: seconds after which no call is begun.

        Returns:
            What `read` returns.

        Raises:
            ModelError: as look-ups; `newer_ms` or `timeout` is negative.
            StoreError: there was no such moment in time: the node is catching up, a batch came into each attempt, or rows are
                too much newer than the tensors. It says which.
        """
        check_arguments(newer_ms, timeout)

        def attach() -> tuple[int, Attachment]:
            attachment = self._current()
            return attachment.header_address, attachment

        def attempt(attachment: Attachment, moment: Moment) -> T:
            state = State(self, attachment, moment, newer_ms)
            answer = read(state)
            state.end()
            return answer

        return at_one_moment(self.model, attach, attempt, timeout)


def _reader_of(
    kind: type[Reader],
    model: str,
    run_dir: str | Path,
    wait: float | None,
    unheld: Literal["raise", "absent"],
    defaults: ReadOnlyMapping[str, Default],
    counted: bool,
    device: str | None,
    closed: bool,
) -> Reader:
    """A reader out of a pickle."""
    if closed:
        raise ModelError(f"the reader of model {model!r} was closed before it was pickled: make a new one")
    return kind(model, run_dir, wait, unheld, defaults=defaults, counted=counted, device=device)
