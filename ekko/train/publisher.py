"""The training side: hand changed rows to the local node, one optimiser step at a time.

A step is a batch under one stamp: rows of any number of tables, deletes and dense tensors. Everything that can be wrong with
the data is found here, at the call, in the caller's own process. Rows are encoded here too (R20): the node's one thread has no
work with it, and the local hop carries as few bytes as the others. `publish` returns once the local node has stored the step;
how it travels from there is the node's business.

    pub = ekko.Publisher("tcp://127.0.0.1:7700", model="ctr", tables={"item": 16})
    pub.publish("item", keys, rows)

Within a step the last word on a key counts: of duplicate keys the last row, of a publish and a delete the later call.
"""

import contextlib
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.addresses import check_endpoint
from ekko.codec import LIMIT_BITS, encode, limit_of
from ekko.errors import ConfigError, EkkoError, ModelError, PublishError
from ekko.local import (
    FAILURES,
    OTHER_RELEASE,
    REOPEN,
    WAIT_MS_MAX,
    Answer,
    Connection,
    Failed,
    Held,
    Open,
    Opened,
    PublishStep,
    Request,
    Stored,
    Wait,
    Waited,
)
from ekko.model import (
    DENSE_DIM,
    DENSE_ROWS_MAX,
    DENSE_SPEC,
    DENSE_TABLE,
    ModelSpec,
    TableSpec,
    TensorSpec,
    check_codec,
    check_name,
    table_id,
    ttl_seconds,
)
from ekko.store.kernels.checks import all_below, all_finite, last_occurrences
from ekko.train.admission import Admission
from p2p.messages import Scope
from p2p.replica import U64, RowColumns

# Connections kept for the next call. One is enough for one thread; more are opened while more threads call at once.
CONNECTIONS_IDLE_MAX: Final = 8
# What a row counts for where its publisher did not say; the mean, in the scale of priorities.
SIGNIFICANCE_DEFAULT: Final = 1.0

Rows = NDArray[np.float32]
U8 = NDArray[np.uint8]
ScopeName = Literal["local", "region", "all"]


class Publisher:
    """Publishes one model's changes through the local node. May be shared by threads; survives a fork.

    Args:
        address: the local endpoint of a training node, `tcp://127.0.0.1:PORT` or `ipc:///PATH`.
        model: the model's name.
        tables: table name -> dim, or `{"dim": 16, "ttl": "30d"}` where rows expire so long after their last update; tables that
            the node does not know yet are added. None: the model must exist.
        shards: the model's number of shards, if this publisher creates it.
        codec: how its rows are stored and sent (`ekko.codec`), if this publisher creates it; None: as the node has it.
        admission: table -> from which touch on a key is published, or an `ekko.train.admission.Admission`; a table that is not
            named: from the first. Rows before that are checked and left out (`rows_held_back`); deletes always go.
        timeout: seconds after which a node that does not answer counts as unreachable.

    Raises:
        NodeUnreachable: nobody answers at `address`.
        ModelError: the tables contradict what the node knows, or the model is unknown and `tables` is None.
    """

    def __init__(
        self,
        address: str,
        model: str,
        tables: Mapping[str, int | Mapping[str, int | str]] | None = None,
        shards: int | None = None,
        timeout: float = 5.0,
        codec: str | None = None,
        admission: Mapping[str, int | Admission] | None = None,
    ) -> None:
        self._admission = {
            table: wanted if isinstance(wanted, Admission) else Admission(wanted) for table, wanted in (admission or {}).items()
        }
        try:
            check_endpoint(address, ipc=True)
        except ValueError as error:
            raise ConfigError(f"address of the local endpoint: {error}") from None
        if not timeout > 0:
            raise ConfigError(f"timeout is {timeout!r}: expected a positive number of seconds")
        self._timeout = float(timeout)
        self._silent_named = True  # whether the node tells whom nobody waited for, as far as we know
        self._connections = _Connections(address)
        check_name("model", model)
        wanted = None if codec is None else check_codec("model", model, codec)
        self._open = Open(model, _tables_wanted(model, tables), _shards_of(model, shards), wanted)
        try:
            opened = self._opened(self._open)
        except BaseException:
            self._connections.close()
            raise
        self._tables = dict(opened.tables)
        self._held = Held(opened.held.incarnation, {table: opened.table_id(table) for table in opened.tables})
        self._tensors = dict(opened.tensors)
        self._last_stamp = opened.last_stamp
        self.codec = opened.codec
        self.model = model
        self.node = opened.node
        self.region = opened.region
        for table in self._admission:
            self._check_admission(table)

    @property
    def tables(self) -> dict[str, int]:
        """Table name -> dim, as the node knew them when this publisher opened the model."""
        return dict(self._tables)

    @property
    def rows_held_back(self) -> int:
        """Rows that were not published, since their keys were not touched often enough (`admission`)."""
        return sum(admission.held_back for admission in self._admission.values())

    def admitted(self, table: str, keys: U64) -> NDArray[np.bool_] | None:
        """Touch these keys; bool[n], which of their rows are to be published, or None: all."""
        admission = self._admission.get(table)
        return None if admission is None else admission.admit(keys)

    def _check_admission(self, table: str) -> None:
        try:
            self.dim_of(table)
        except ModelError:
            self._connections.close()
            raise

    @property
    def last_stamp(self) -> int:
        """The newest stamp this publisher knows of; 0: nothing was published yet."""
        return self._last_stamp

    def publish(self, table: str, keys: ArrayLike, rows: ArrayLike, significance: ArrayLike | None = None) -> int:
        """Publish rows of one table as a step of its own.

        Args:
            table: a table of the model.
            keys: integer[n], not negative; of duplicates the last counts.
            rows: float32[n, dim], finite, and below what the model's codec can hold (`ekko.codec`).
            significance: float32[n], how much each row matters; None: as much as any.

        Returns:
            The step's stamp; it is stored on the local node. An empty batch is not a step: the last stamp.

        Raises:
            ModelError: unknown table, wrong dim or dtype. Nothing is published.
            PublishError: the data are not publishable, or the node refused them. Nothing is published.
            NodeUnreachable: no answer in time.
        """
        started_ns = time.monotonic_ns()
        step = Step(self, copy=False)
        step.publish(table, keys, rows, significance)
        return self._commit(step, started_ns)

    def delete(self, table: str, keys: ArrayLike) -> int:
        """Delete rows as a step of their own; keys that do not exist are fine. Returns and raises like `publish`."""
        started_ns = time.monotonic_ns()
        step = Step(self, copy=False)
        step.delete(table, keys)
        return self._commit(step, started_ns)

    def publish_dense(self, name: str, array: ArrayLike) -> int:
        """Publish a dense tensor, float32 of any shape, as a step of its own. Returns and raises like `publish`."""
        started_ns = time.monotonic_ns()
        step = Step(self, copy=False)
        step.publish_dense(name, array)
        return self._commit(step, started_ns)

    def step(self) -> "Step":
        """One batch under one stamp, published when the `with` block ends; an exception in it publishes nothing."""
        self._connections.check_open()
        return Step(self, copy=True)

    def wait(self, stamp: int, scope: ScopeName = "local", timeout: float = 5.0) -> tuple[str, ...]:
        """Return when the step `stamp` is visible on this node, in the publisher's region, or everywhere.

        Returns:
            Nodes in scope that were silent when this was called, so that nobody waited for them; they catch up when they are
            back. Empty when all is well, and where the node is of the release before.

        Raises:
            TimeoutError: it is not within `timeout` seconds; names the nodes that lag, and the silent ones.
            NodeUnreachable: the local node does not answer.
        """
        if not isinstance(scope, str) or scope.upper() not in Scope.__members__:
            raise PublishError(f"scope is {scope!r}: expected 'local', 'region' or 'all'")
        if not 0 <= timeout * 1000 <= WAIT_MS_MAX:
            raise PublishError(f"timeout is {timeout!r}: expected 0 to {WAIT_MS_MAX // 1000} seconds")
        stamp = _stamp_number(stamp)
        self._connections.check_open()
        if stamp == 0:
            return ()  # nothing was published: it is visible everywhere
        wanted = Scope[scope.upper()]
        request = Wait(self.model, stamp, wanted, round(timeout * 1000), self._silent_named, self._held.incarnation)
        try:
            answer = self._ask(request, timeout + self._timeout)
        except PublishError as error:
            if not request.named or not str(error).startswith(OTHER_RELEASE):
                raise
            self._silent_named = False  # the node is of the release before
            request = replace(request, named=False)
            answer = self._ask(request, timeout + self._timeout)
        assert isinstance(answer, Waited), answer
        if answer.lagging:
            silent = f"; silent, and not waited for: {', '.join(answer.silent)}" if answer.silent else ""
            raise TimeoutError(f"stamp {stamp} is not yet visible on {', '.join(answer.lagging)} after {timeout:g} s{silent}")
        return answer.silent

    def close(self) -> None:
        """Close the connections. What was published stays published."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def dim_of(self, table: str) -> int:
        """The width of a table.

        Raises:
            ModelError: the model has no such table.
        """
        dim = self._tables.get(table) if isinstance(table, str) else None
        if dim is None:
            known = ", ".join(sorted(self._tables)) or "none"
            raise ModelError(
                f"unknown table {table!r} of model {self.model!r}: known: {known}; add it with Publisher(tables={{...}})"
            )
        return dim

    def table_number(self, table: str) -> int:
        """The id of a table in steps; of dense tensors the reserved one."""
        return self._held.tables.get(table) or table_id(table)

    def tensor_spec(self, name: str, array: NDArray[np.float32]) -> TensorSpec:
        """The schema entry of a dense tensor that looks like `array`.

        Raises:
            ModelError: its name or size is not usable, or the tensor was published with another shape.
        """
        spec = TensorSpec(check_name("tensor", name), array.shape, array.dtype.name)
        if spec.rows > DENSE_ROWS_MAX:
            raise ModelError(f"tensor {name!r} has {array.size} elements: the limit is {DENSE_ROWS_MAX * DENSE_DIM}")
        known = self._tensors.get(name, spec)
        if known != spec:
            raise ModelError(
                f"tensor {name!r} has shape {spec.shape}: it was published with shape {known.shape}; use another name"
            )
        return spec

    def _commit(self, step: "Step", started_ns: int) -> int:
        """Send what `step` holds and return its stamp."""
        self._connections.check_open()
        columns = step.columns()
        if not columns:
            return self._last_stamp
        tensors = tuple(step.tensors.values())
        request = PublishStep(self.model, columns, tensors, started_ns, self.codec, self._held.incarnation)
        answer = self._ask(request, self._timeout)
        assert isinstance(answer, Stored), answer
        self._tensors.update(step.tensors)
        self._last_stamp = max(self._last_stamp, answer.stamp)  # other threads publish too
        return answer.stamp

    def _opened(self, request: Open) -> Opened:
        answer = _checked(self._connections.ask(request, self._timeout))
        assert isinstance(answer, Opened), answer
        return answer

    def _reopen(self) -> None:
        """Open the model on the node again, after the node lost its memory: what is sent again finds the same model and tables.

        Raises:
            ModelError: it is another one by now.
            PublishError: its rows have another codec.
        """
        try:
            opened = self._opened(replace(self._open, again=self._held))
        except PublishError as error:
            if not str(error).startswith(OTHER_RELEASE):
                raise
            opened = self._opened(self._open)  # the node is of the release before
        if opened.held.incarnation != self._held.incarnation:
            raise ModelError(
                f"model {self.model!r} was dropped, and node {opened.node!r} has another one of that name: make a new Publisher"
            )
        if opened.codec != self.codec:  # what is encoded already cannot be sent
            raise PublishError(
                f"node {opened.node!r} now has model {self.model!r} in codec {opened.codec!r}, this publisher began with "
                f"{self.codec!r}: make a new Publisher, and publish all rows again"
            )

    def _ask(self, request: Request, timeout_s: float) -> Answer:
        answer = self._connections.ask(request, timeout_s)
        if isinstance(answer, Failed) and answer.kind == REOPEN:
            self._reopen()
            answer = self._connections.ask(request, timeout_s)
        return _checked(answer)


class Step:
    """What one step publishes, collected until it is committed; made by `Publisher.step()`. Used by one thread."""

    def __init__(self, publisher: Publisher, *, copy: bool) -> None:
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
        checked_keys = _keys_of(table, keys)
        values = _rows_of(table, checked_keys, rows, dim, self._publisher.codec)
        weights = None if significance is None else _significance_of(table, checked_keys, significance)
        chosen = self._publisher.admitted(table, checked_keys)
        if chosen is not None:
            checked_keys, values = checked_keys[chosen], values[chosen]
            weights = None if weights is None else weights[chosen]
        self._add(table, _Change(checked_keys, encode(self._publisher.codec, values), weights))

    def delete(self, table: str, keys: ArrayLike) -> None:
        """Add deletes of one table."""
        self._check_collecting()
        self._publisher.dim_of(table)
        self._add(table, _Change(_keys_of(table, keys), None, None))

    def publish_dense(self, name: str, array: ArrayLike) -> None:
        """Add a dense tensor: float32 of any shape."""
        self._check_collecting()
        values = _dense_of(name, array)
        spec = self._publisher.tensor_spec(name, values)
        if self.tensors.setdefault(name, spec) != spec:
            raise ModelError(f"tensor {name!r} appears in one step with shapes {self.tensors[name].shape} and {spec.shape}")
        rows = np.zeros((spec.rows, DENSE_DIM), np.float32)
        rows.reshape(-1)[: values.size] = values.reshape(-1)
        self._add(DENSE_TABLE, _Change(spec.keys, encode(DENSE_SPEC.codec, rows), None))

    def columns(self) -> tuple[RowColumns, ...]:
        """Everything collected, one column per table: unique keys, live rows first."""
        columns = (_column_of(self._publisher.table_number(table), changes) for table, changes in self._changes.items())
        return tuple(column for column in columns if len(column.keys))

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


class _Change:
    """One call of a step on one table; `rows`, uint8[n, row_bytes] as they are stored; None: a delete."""

    __slots__ = ("keys", "rows", "significance")

    def __init__(self, keys: U64, rows: U8 | None, significance: NDArray[np.float32] | None) -> None:
        self.keys = keys
        self.rows = rows
        self.significance = significance

    def snapshot(self) -> "_Change":
        """The same values in memory of our own."""
        return _Change(
            self.keys.copy(),
            None if self.rows is None else self.rows.copy(),
            None if self.significance is None else self.significance.copy(),
        )


def _column_of(table: int, changes: list[_Change]) -> RowColumns:
    """Merge the calls on one table; of each key the last call's last word stays."""
    keys = changes[0].keys if len(changes) == 1 else np.concatenate([change.keys for change in changes])
    keep = last_occurrences(keys)
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
    return RowColumns(table, np.ascontiguousarray(keys), np.ascontiguousarray(rows), None, weights)


def _weights_of(changes: list[_Change]) -> NDArray[np.float32] | None:
    """float32[n] over all calls; None when no call gave any."""
    if all(change.significance is None for change in changes):
        return None
    default = np.float32(SIGNIFICANCE_DEFAULT)
    parts = [np.full(len(c.keys), default) if c.significance is None else c.significance for c in changes]
    return np.concatenate(parts)


# --- checks of what the user gave -----------------------------------------------------------------------------------------


def _array_of(what: str, value: ArrayLike) -> NDArray[Any]:
    """A NumPy view of an array, a list or a CPU tensor of torch."""
    detach: Callable[[], Any] | None = getattr(value, "detach", None)
    if detach is not None:  # a tensor; torch itself is not needed to read it
        tensor = detach()
        if tensor.device.type != "cpu":
            raise ModelError(f"{what} are on device {tensor.device}: expected them in CPU memory; use .cpu()")
        try:
            return np.asarray(tensor.numpy())
        except TypeError:
            raise ModelError(f"{what} have dtype {tensor.dtype}, which NumPy does not know: use .float()") from None
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ModelError(f"{what} are not an array: {error}") from None


def _keys_of(table: str, keys: ArrayLike) -> U64:
    """uint64[n], contiguous."""
    array = _array_of(f"keys of table {table!r}", keys)
    if array.ndim != 1:
        raise ModelError(f"keys of table {table!r} have shape {array.shape}: expected one dimension")
    if array.size == 0:
        return np.empty(0, np.uint64)
    if array.dtype.kind not in "iu":
        raise ModelError(
            f"keys of table {table!r} have dtype {array.dtype}: expected whole numbers, not negative; use .astype(np.uint64)"
        )
    if array.dtype.kind == "i" and array.min() < 0:
        raise PublishError(f"keys of table {table!r} contain {array.min()}: expected whole numbers, not negative")
    return np.ascontiguousarray(array, dtype=np.uint64)


def _rows_of(table: str, keys: U64, rows: ArrayLike, dim: int, codec: str) -> Rows:
    """float32[n, dim], contiguous, finite, and within the codec's range."""
    array = _array_of(f"rows of table {table!r}", rows)
    if array.size == 0 and len(keys) == 0 and array.shape in ((0,), (0, dim)):
        return np.empty((0, dim), np.float32)
    if array.dtype != np.float32:
        raise ModelError(f"rows of table {table!r} have dtype {array.dtype}: expected float32; use .astype(np.float32)")
    if array.ndim != 2 or array.shape[1] != dim:
        raise ModelError(f"rows of table {table!r} have shape {array.shape}: expected ({len(keys)}, {dim})")
    if len(array) != len(keys):
        raise PublishError(f"table {table!r} was given {len(keys)} keys and {len(array)} rows: expected a row for each key")
    array = np.ascontiguousarray(array)
    if not all_below(array, LIMIT_BITS[codec]):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        what, remedy = "NaN or infinity", ""
        if not len(bad):
            bad = np.flatnonzero((np.abs(array) >= limit_of(codec)).any(axis=1))
            what, remedy = f"values from {limit_of(codec):g} on, which {codec} cannot hold", ", or use codec 'bfloat16'"
        raise PublishError(
            f"rows of table {table!r} contain {what}: {len(bad)} of {len(array)} rows, first at index {bad[0]} "
            f"(key {keys[bad[0]]}); nothing was published: drop these rows or lower the learning rate{remedy}"
        )
    return array


def _significance_of(table: str, keys: U64, significance: ArrayLike) -> NDArray[np.float32]:
    """float32[n], finite, not negative."""
    array = _array_of(f"significance of table {table!r}", significance)
    if array.shape != keys.shape:
        raise PublishError(f"significance of table {table!r} has shape {array.shape}: expected {keys.shape}, one for each key")
    if array.dtype.kind not in "fiu":
        raise ModelError(f"significance of table {table!r} has dtype {array.dtype}: expected float32")
    weights = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise PublishError(
            f"significance of table {table!r} contains negative numbers, NaN or infinity: expected finite weights from 0"
        )
    return weights


def _dense_of(name: str, array: ArrayLike) -> Rows:
    """float32, contiguous, finite, of any shape."""
    values = _array_of(f"values of tensor {name!r}", array)
    if values.dtype != np.float32:
        raise ModelError(
            f"tensor {name!r} has dtype {values.dtype}: only float32 is available in this version; use .astype(np.float32)"
        )
    shape = values.shape
    values = np.ascontiguousarray(values)
    if values.size and not all_finite(values.reshape(1, -1)):
        raise PublishError(f"tensor {name!r} contains NaN or infinity: nothing was published")
    return values.reshape(shape)  # ascontiguousarray makes a scalar one-dimensional


def _tables_wanted(
    model: str, tables: Mapping[str, int | Mapping[str, int | str]] | None
) -> tuple[tuple[str, int, int | None], ...] | None:
    """Name, dim and ttl in seconds of each, None where nothing is said of it."""
    if tables is None:
        return None
    if DENSE_TABLE in tables:
        raise ModelError(f"table name {DENSE_TABLE!r} of model {model!r} is reserved for dense tensors: use another name")
    wanted = []
    for name, table in tables.items():
        said = table if isinstance(table, Mapping) else {"dim": table}
        if not {"dim"} <= said.keys() <= {"dim", "ttl"}:
            raise ModelError(f'table {name!r} is {table!r}: expected its dim, or {{"dim": 16, "ttl": "30d"}}')
        ttl_s = ttl_seconds(name, said["ttl"]) if "ttl" in said else None
        spec = TableSpec(name, _dim_number(name, said["dim"]))
        wanted.append((spec.name, spec.dim, ttl_s))
    return tuple(wanted)


def _dim_number(table: str, dim: object) -> int:
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise ModelError(f"table {table!r} has dim {dim!r}: expected a whole number")
    return operator.index(dim)


def _shards_of(model: str, shards: int | None) -> int | None:
    return None if shards is None else ModelSpec(model, shards).shards


def _stamp_number(stamp: object) -> int:
    try:
        number = operator.index(stamp)  # type: ignore[arg-type]
    except TypeError:
        raise PublishError(f"stamp is {stamp!r}: expected what publish() returned") from None
    if not 0 <= number < 1 << 64:
        raise PublishError(f"stamp is {stamp!r}: expected what publish() returned")
    return number


def _checked(answer: Answer) -> Answer:
    """The answer, unless it is a refusal.

    Raises:
        EkkoError: of the kind the node named.
    """
    if isinstance(answer, Failed):
        raise FAILURES.get(answer.kind, EkkoError)(answer.reason)
    return answer


class _Connections:
    """Connections to one endpoint: one per call under way, kept for the next. Safe for threads and forks."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def check_open(self) -> None:
        if self._closed:
            raise PublishError("this publisher is closed: make another one")

    def ask(self, request: Request, timeout_s: float) -> Answer:
        """One request, one answer."""
        self.check_open()
        with self._connection() as connection:
            return connection.request(request, timeout_s)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        if os.getpid() != self._pid:
            # A child has copies of the parent's connections and maybe of a lock that is held there: neither is usable.
            self._pid, self._lock, self._idle = os.getpid(), threading.Lock(), []
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or Connection(self._address)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            kept = not self._closed and len(self._idle) < CONNECTIONS_IDLE_MAX
            if kept:
                self._idle.append(connection)
        if not kept:
            connection.close()

    def close(self) -> None:
        self._closed = True
        if os.getpid() != self._pid:
            return  # the connections are the parent's
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
