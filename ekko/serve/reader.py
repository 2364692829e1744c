"""Look-ups by an inference process, straight from the memory that the node writes: no call, no lock, no network.

A reader follows its node by itself. The control file says when there is a new manifest (a table was added) or when the store
was replaced (the node began anew); the table's header says when the index was replaced. Each look-up reads those three words
first. A node that is restarted on intact memory goes on in the same files, and its readers do not notice.

The model's name may be an alias (`ekko.generations`). Which model it stands for is settled when the reader attaches, and each
look-up uses one attachment from its beginning to its end; when the alias is switched, the next look-up attaches anew.
"""

import os
import time
from collections.abc import Callable, Sequence
from collections.abc import Mapping as ReadOnlyMapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError, StoreError
from ekko.health.traffic import ONLINE, Arms, RequestIds, Traffic, arms_of
from ekko.health.wire import events_of
from ekko.model import DENSE_TABLE, TensorSpec, check_name
from ekko.serve.arguments import as_bags, as_keys, output
from ekko.serve.attachment import Attacher, Attachment, names
from ekko.serve.consistency import DEADLINE_S, Moment, at_one_moment, between_batches, mostly_between_batches
from ekko.serve.defaults import Default, Defaults
from ekko.serve.tensor import Tensor
from ekko.serve.together import State, check_arguments
from ekko.store import layout
from ekko.store.kernels.index import shards_of
from ekko.store.locks import ForkSafeLock
from ekko.store.view import NO_STAMPS, Bags, TableView

if TYPE_CHECKING:
    from ekko.device.tier import Ask, DeviceTier
    from ekko.health.reporting import ReportCounts, Reporter

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]
T = TypeVar("T")

# How often a waiting reader looks for its model, seconds.
POLL_S = 0.01
# What was reported last gets so long to reach the node when a reader is closed.
REPORTS_S_MAX = 1.0
_SYNCED_UNTIL = layout.MODEL.offset("synced_until_ms") // 8
_ONLINE_FROM, _ONLINE_UNTIL = (layout.MODEL.offset(name) // 8 for name in ("online_from", "online_until"))


class Reader:
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
        if unheld not in ("raise", "absent"):
            raise ModelError(f"unheld is {unheld!r}: expected 'raise' or 'absent'")
        self.model = model
        self._arguments = (model, run_dir, wait, unheld, dict(defaults), counted, device)
        self._counted = counted
        self._refuses_unheld = unheld == "raise"
        self._defaults = Defaults(defaults)
        check_name("model", model)
        self._run_dir = Path(run_dir)
        self._wait_s = wait or 0.0
        self._attacher = Attacher(model, self._run_dir, counted, self._defaults.check)
        self._attaching = ForkSafeLock()
        self._closed = False
        self._attachment: Attachment | None = None
        self._reports: Reporter | None = None
        self._tier: DeviceTier | None = None
        self._current()
        if device is not None:
            self._tier = _tier_of(device, self._run_dir, self._wait_s, counted)

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
            reports, self._reports = self._reports, None
            self._tier = None
        if reports is not None:
            reports.flush(REPORTS_S_MAX)
            reports.close()
        if attachment is not None:
            for view in attachment.tables.values():
                view.counter.flush()

    @property
    def tables(self) -> ReadOnlyMapping[str, int]:
        """Name -> dim of the model's tables."""
        tables = self._current().tables
        return MappingProxyType({name: view.spec.dim for name, view in tables.items() if name != DENSE_TABLE})

    @property
    def generation(self) -> str:
        """The name of the model that look-ups read now: `model` itself, or what it stands for as an alias."""
        return self._current().model.name

    @property
    def counting(self) -> bool:
        """Whether look-ups are counted (`ekko hot`): not with `counted=False`, nor where this process may not
        write to the node's hot files.
        """
        return self._counted and all(view.counter.on for name, view in self._current().tables.items() if name != DENSE_TABLE)

    @property
    def device(self) -> "DeviceTier | None":
        """What this reader does with its device: `device.counts`, and `device.reason` why rows come from the host; None: no
        device was asked for.
        """
        return self._tier

    @property
    def partitions(self) -> int:
        """Into how many partitions the model is divided."""
        return self._current().partitions

    @property
    def hold(self) -> tuple[int, ...]:
        """The partitions that the node holds, ascending."""
        return self._current().hold

    def partition_of(self, keys: ArrayLike) -> NDArray[np.int64]:
        """int64[*keys.shape]: the partition of each key, for sending it to a node that holds it."""
        wanted = as_keys(keys)
        attachment = self._current()
        return _partition_of(wanted.reshape(-1), attachment.shards, attachment.partitions).reshape(wanted.shape)

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

    def _ask(self, attachment: Attachment, view: TableView) -> "Ask":
        from ekko.device.tier import Ask

        return Ask(attachment.header_address, view, self._defaults.row(view).values)

    def _lookup_on(
        self,
        tier: "DeviceTier",
        attachment: Attachment,
        view: TableView,
        keys: ArrayLike,
        out: Any,
        stamps: bool,
        consistent: bool,
    ) -> Any:
        """`lookup` of a reader that has a device."""
        wanted = as_keys(tier.host_keys(keys))
        self._check_keys(attachment, view.spec.name, wanted, None)
        if not consistent:
            rows, found = tier.lookup(self._ask(attachment, view), wanted, out, stamps=stamps)
        else:  # the device does not say where its batches end
            copied, found = np.empty((*wanted.shape, view.spec.dim), np.float32), np.empty(wanted.shape, np.uint64)
            self._read(attachment, consistent, lambda: self._copy(view, wanted, copied, found))
            rows = tier.upload(copied, out)
        return (rows, found) if stamps else rows

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

    def _shown(self, rows: F32) -> F32:
        """Rows of the host where this reader's are."""
        return rows if self._tier is None else self._tier.upload(rows)

    def _calls(
        self, attachment: Attachment, keys: ReadOnlyMapping[str, ArrayLike], out: ReadOnlyMapping[str, F32]
    ) -> list[tuple[TableView, U64, F32]]:
        """What look-ups of several tables are to read, and where to, all of it checked."""
        calls = []
        for table, asked in keys.items():
            view, wanted = self._view(attachment, table), as_keys(asked)
            self._check_keys(attachment, table, wanted, None)
            calls.append((view, wanted, output(out.get(table), (*wanted.shape, view.spec.dim))))
        return calls

    def _read(self, attachment: Attachment, consistent: bool, gather: Callable[[], None]) -> None:
        if consistent:
            between_batches(self.model, attachment.header_address, gather)
        else:
            gather()

    def _copy(self, view: TableView, keys: U64, rows: F32, stamps: U64) -> None:
        default = self._defaults.row(view)  # it is kept alive through the call
        if keys.ndim == 1:
            view.lookup(keys, rows, stamps, default.address)
        else:
            view.lookup(keys.reshape(-1), rows.reshape(-1, view.spec.dim), stamps.reshape(-1), default.address)

    def _pool(self, view: TableView, keys: U64, bags: Bags, rows: F32) -> None:
        default = self._defaults.row(view)  # it is kept alive through the call
        view.pool(keys.reshape(-1), bags, rows, default.address)

    def _host_keys(self, keys: ArrayLike) -> ArrayLike:
        """Keys that may be in an array of this reader's device."""
        return keys if self._tier is None else self._tier.host_keys(keys)

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

    def _tensor(self, attachment: Attachment, name: str) -> TensorSpec:
        spec = attachment.tensors.get(name)
        if spec is None:
            raise ModelError(f"{self._named(attachment)} has no dense tensor {name!r}: it has {names(attachment.tensors)}")
        if len(attachment.hold) != attachment.partitions:
            self._check_held(attachment, spec.keys, f"rows of dense tensor {name!r}", "read it on a node that holds them")
        return spec

    def arm(self, request_ids: RequestIds) -> Arms:
        """Which requests the online model is to answer (0), and which the baseline (1), the model with delayed state.

        The same answer for the same id in every process and language, as long as the shares stay as they are; they come from
        the node, through shared memory. See `ekko.health.traffic`.

        Args:
            request_ids: integers >= 0 of any shape, or text or bytes.

        Returns:
            uint8, of their shape.

        Raises:
            ModelError: they are none of these.
        """
        attachment = self._current()
        return arms_of(attachment.model.name, request_ids, attachment.header[_ONLINE_FROM], attachment.header[_ONLINE_UNTIL])

    def traffic(self) -> Traffic:
        """The shares by which `arm` divides requests now."""
        header = self._current().header
        return Traffic.of_bounds(header[_ONLINE_FROM], header[_ONLINE_UNTIL])

    def report(
        self,
        model: str | None,
        prediction: ArrayLike,
        label: ArrayLike,
        weight: ArrayLike | None = None,
        segment: str | Sequence[str] | None = None,
        *,
        arm: ArrayLike = ONLINE,
        at: ArrayLike | None = None,
    ) -> int:
        """Tell the node how good answers were, so that it can judge the model (`ekko health`). Never waits, never fails.

        What finds no room in a queue of this process, or no node, is dropped and counted (`report_counts`).

        Args:
            model: which model answered; None: this reader's.
            prediction: the probabilities that it gave, [n].
            label: what came of it, 0 or 1, [n].
            weight: importance of each, [n] or one for all; None: 1.
            segment: what they are to be told apart by, a name for each or one for all; of a model 32 are kept.
            arm: which arm answered (see `arm`), [n] or one for all.
            at: when the model answered, Unix seconds, [n] or one for all; None: now. Labels that come late need it.

        Returns:
            How many events were queued.

        Raises:
            ModelError: predictions or labels are not from 0 to 1, or columns do not fit each other. Nothing is queued.
        """
        at_ms = time.time_ns() // 1_000_000 if at is None else np.round(np.asarray(at, np.float64) * 1000)
        name = self.model if model is None else check_name("model", model)
        parts = events_of(prediction, label, weight, segment, arm, at_ms)
        reporter = self._reporter
        return sum(len(events) for events in parts if reporter.put(name, events))

    @property
    def report_counts(self) -> "ReportCounts":
        """What became of the events that `report` was given in this process."""
        return self._reporter.counts

    def flush_reports(self, timeout: float = 5.0) -> bool:
        """Wait until what `report` queued is with the node, or dropped; False: not in time. For tests and the end of jobs."""
        return self._reporter.flush(timeout)

    @property
    def _reporter(self) -> "Reporter":
        if self._reports is None:
            from ekko.health.reporting import Reporter  # serving needs no network, reporting does

            with self._attaching:
                self._reports = self._reports or Reporter(self._run_dir)
        return self._reports

    def staleness_ms(self) -> float | None:
        """Now minus the newest moment up to which this node has everything that every live writer wrote; None: unknown."""
        until = self._current().header[_SYNCED_UNTIL]
        return max(0.0, time.time() * 1000 - until) if until else None

    def _check_keys(self, attachment: Attachment, table: str, keys: U64, padding_key: int | None) -> None:
        """Refuse keys of partitions that are not here, padding aside, unless they are to count as absent."""
        if len(attachment.hold) != attachment.partitions and self._refuses_unheld:
            asked = keys.reshape(-1)
            if padding_key is not None:
                asked = asked[asked != np.uint64(padding_key)]
            what, remedy = f"keys of table {table!r}", "ask a node that holds them (see Reader.partition_of)"
            self._check_held(attachment, asked, what, remedy)

    def _check_held(self, attachment: Attachment, keys: U64, what: str, remedy: str) -> None:
        """Refuse keys of partitions that are not here.

        Raises:
            ModelError: naming those partitions, and the ones that are here.
        """
        partitions = _partition_of(keys, attachment.shards, attachment.partitions)
        here = np.zeros(attachment.partitions, np.bool_)
        here[list(attachment.hold)] = True
        missing = np.unique(partitions[~here[partitions]]).tolist()
        if missing:
            raise ModelError(
                f"{what} are in partitions {missing} of model {self.model!r}, and the node at {self._run_dir} holds "
                f"{list(attachment.hold)} of {attachment.partitions}: {remedy}, or "
                f"add them to models.{self.model}.hold of this one"
            )

    def _table(self, name: str) -> TableView:
        return self._view(self._current(), name)

    def _view(self, attachment: Attachment, name: str) -> TableView:
        view = attachment.tables.get(name)
        if view is None:
            known = [table for table in attachment.tables if table != DENSE_TABLE]
            what = f"has table {name!r} no more, which was dropped" if name in attachment.dropped else f"has no table {name!r}"
            raise ModelError(f"{self._named(attachment)} {what}: it has {names(dict.fromkeys(known))}")
        return view

    def _named(self, attachment: Attachment) -> str:
        """The model in an error: by what was asked for, and by what that stands for."""
        name = attachment.model.name
        return f"model {name!r}" if name == self.model else f"model {name!r}, for which alias {self.model!r} stands,"

    def _current(self) -> Attachment:
        attachment = self._attachment
        if attachment is not None and attachment.current:
            return attachment
        with self._attaching:
            deadline = time.monotonic() + self._wait_s
            while self._attachment is None or not self._attachment.current:
                if self._closed:
                    raise ModelError(f"the reader of model {self.model!r} is closed: make a new one")
                try:
                    self._attachment = self._attacher.attach(self._attachment)  # None lets go of memory that was dropped
                except PermissionError as error:
                    raise StoreError(
                        f"user {os.geteuid()} may not read {error.filename} of the node at {self._run_dir} (Permission denied)"
                        ': let others by node.shm_mode = "0644", or a group by node.shm_group'
                    ) from error
                if self._attachment is not None:
                    break
                if time.monotonic() >= deadline:
                    raise ModelError(self._attacher.missing())
                time.sleep(POLL_S)
            return self._attachment


def _partition_of(keys: U64, shards: int, partitions: int) -> NDArray[np.int64]:
    """int64[n]: shard mod partitions of each key of uint64[n]."""
    out = np.empty(keys.size, np.int64)
    shards_of(np.ascontiguousarray(keys), shards, out)
    out %= partitions
    return out


def _tier_of(device: str, run_dir: Path, wait_s: float, counted: bool) -> "DeviceTier":
    from ekko.device.tier import DeviceTier  # readers without a device need none of it

    return DeviceTier(device, run_dir, wait_s, asks=counted)


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
