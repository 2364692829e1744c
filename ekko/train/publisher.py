"""The training side: hand changed rows to the local node, one optimiser step at a time.

A step is a batch under one stamp: rows of any number of tables, deletes and dense tensors. Everything that can be wrong with
the data is found here, at the call, in the caller's own process. Rows are encoded here too (R20): the node's one thread has no
work with it, and the local hop carries as few bytes as the others. `publish` returns once the local node has stored the step;
how it travels from there is the node's business.

    pub = ekko.Publisher("tcp://127.0.0.1:7700", model="ctr", tables={"item": 16})
    pub.publish("item", keys, rows)

Within a step the last word on a key counts: of duplicate keys the last row, of a publish and a delete the later call.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.addresses import check_endpoint
from ekko.ceilings import Above, AboveAsk
from ekko.errors import ConfigError, EkkoError, ModelError, PublishError
from ekko.local import (
    FAILURES,
    OTHER_RELEASE,
    REOPEN,
    WAIT_MS_MAX,
    Answer,
    Failed,
    Held,
    Open,
    Opened,
    PairStored,
    PublishPair,
    PublishStep,
    Request,
    Stored,
    Wait,
    Waited,
)
from ekko.model import (
    DENSE_DIM,
    DENSE_ROWS_MAX,
    DENSE_TABLE,
    TensorSpec,
    check_codec,
    check_name,
    table_id,
)
from ekko.restored import Restored
from ekko.train.admission import Admission
from ekko.train.arguments import shards_of, stamp_number, tables_wanted
from ekko.train.connection import Connections
from ekko.train.pause import Pause, WhileFenced, is_pause
from ekko.train.step import Step
from p2p.messages import Scope
from p2p.replica import U64

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
        while_fenced: what becomes of a step while the model is rolled back: "raise" refuses it; "wait" has it wait until that
            is over. If rows were restored all of it is dropped, since it was worked out from the model of before; `restored`
            names its rows, too. If none were it is published.
        fenced_timeout: seconds that a step waits so at most.

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
        while_fenced: WhileFenced = "raise",
        fenced_timeout: float = 600.0,
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
        if while_fenced not in ("raise", "wait") or not fenced_timeout > 0:
            raise ConfigError(
                f"while_fenced is {while_fenced!r} and fenced_timeout {fenced_timeout!r}: expected 'raise' or 'wait', and a "
                "positive number of seconds"
            )
        self._timeout = float(timeout)
        self._silent_named = True  # whether the node tells whom nobody waited for, as far as we know
        self._connections = Connections(address)
        self._before_close: dict[int, Callable[[], object]] = {}
        check_name("model", model)
        wanted = None if codec is None else check_codec("model", model, codec)
        self._open = Open(model, tables_wanted(model, tables), shards_of(model, shards), wanted)
        try:
            opened = self._opened(self._open)
            wait_s = fenced_timeout if while_fenced == "wait" else None
            self._pause = Pause(model, lambda ask: self._connections.ask(ask, self._timeout), wait_s)
        except BaseException:
            self._connections.close()
            raise
        self._tables = dict(opened.tables)
        self._held = Held(opened.held.incarnation, {table: opened.table_id(table) for table in opened.tables})
        self._tensors = dict(opened.tensors)
        self._last_stamp = opened.last_stamp
        self._openings = 1
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
    def openings(self) -> int:
        """How often this publisher has opened the model: once, and again each time the node had lost its memory."""
        return self._openings

    @property
    def rows_held_back(self) -> int:
        """Rows that were not published, since their keys were not touched often enough (`admission`)."""
        return sum(admission.held_back for admission in self._admission.values())

    @property
    def rows_left_out(self) -> int:
        """Rows of steps that waited for the end of a rollback and were dropped, since it restored rows."""
        return self._pause.rows_left_out

    @property
    def has_restored(self) -> bool:
        """Whether a step of this publisher waited for the end of a rollback, so that `restored` has something to tell."""
        return self._pause.has_kept

    @property
    def epoch(self) -> int:
        """The last rollback of the model that this publisher knows of; 0: none."""
        return self._pause.epoch or 0

    def look_back(self, epoch: int) -> None:
        """Take it that the model in training is as it was after this rollback: `restored` tells what later ones wrote.

        For who goes on from a checkpoint, and kept `epoch` with it. Where there were later ones, steps are refused until
        `restored` was called.
        """
        self._pause.look_back(epoch)

    def restored(self) -> tuple[Restored, ...]:
        """What rollbacks wrote since this was called last, or this publisher was made: load it into the model in training.

        After a rollback a publisher with `while_fenced="raise"` is refused until it has called this: what it would publish was
        worked out from rows that are not there any more. After a step that waited ("wait") call it, too: what it gives has the
        rows of that step as they are served, so that who loads it trains what is served. Restored rows that somebody else has
        written since are not among these.

        Raises:
            NodeUnreachable: no answer in time.
        """
        self._connections.check_open()
        return self._pause.restored(self._names(), self.codec, self._tensors)

    def _names(self) -> dict[int, tuple[str, int]]:
        """Table id -> name and width."""
        names = {self.table_number(table): (table, dim) for table, dim in self._tables.items()}
        return {**names, self.table_number(DENSE_TABLE): (DENSE_TABLE, DENSE_DIM)}

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
            significance: float32[n], how much each row matters, as the L1 norm of its gradient; None: as far as it moves.

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

    def step(self) -> Step:
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
        answer = self.look(stamp, scope, timeout)
        if answer.lagging:
            silent = f"; silent, and not waited for: {', '.join(answer.silent)}" if answer.silent else ""
            raise TimeoutError(f"stamp {stamp} is not yet visible on {', '.join(answer.lagging)} after {timeout:g} s{silent}")
        return answer.silent

    def look(self, stamp: int, scope: ScopeName = "local", timeout: float = 5.0) -> Waited:
        """The same for who goes on waiting: who lags after `timeout` seconds, and who was silent, is what it returns.

        Raises:
            NodeUnreachable: the local node does not answer.
        """
        if not isinstance(scope, str) or scope.upper() not in Scope.__members__:
            raise PublishError(f"scope is {scope!r}: expected 'local', 'region' or 'all'")
        if not 0 <= timeout * 1000 <= WAIT_MS_MAX:
            raise PublishError(f"timeout is {timeout!r}: expected 0 to {WAIT_MS_MAX // 1000} seconds")
        stamp = stamp_number(stamp)
        self._connections.check_open()
        if stamp == 0:
            return Waited(())  # nothing was published: it is visible everywhere
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
        return answer

    def publish_above(self, stamp: int = 0, timeout: float = 10.0) -> Above:
        """Have all that is published from now on win over what any region holds now, and over `stamp`.

        For a trainer that goes on from an older state, as from a checkpoint. What those regions hold is here afterwards, too.

        Args:
            stamp: the newest one that is known of the former life; 0: none is.
            timeout: seconds that regions get to answer.

        Returns:
            Which regions told what they hold, and which did not: rows that are there may be newer still.

        Raises:
            PublishError: the stamp is of a clock too far ahead; the node is of the release before, or no training node.
            NodeUnreachable: the local node does not answer.
        """
        if not 0 <= timeout * 1000 <= WAIT_MS_MAX:
            raise PublishError(f"timeout is {timeout!r}: expected 0 to {WAIT_MS_MAX // 1000} seconds")
        request = AboveAsk(self.model, stamp_number(stamp), round(timeout * 1000), self._held.incarnation)
        answer = self._ask(request, timeout + self._timeout)
        assert isinstance(answer, Above), answer
        return answer

    def before_close(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have something done when this is closed, before it is: publish what is still due. Returns what takes that back."""
        self._before_close[id(call)] = call

        def take_back() -> None:
            self._before_close.pop(id(call), None)

        return take_back

    def close(self) -> None:
        """Close the connections. What was published stays published, and what trackers have still to publish is published now.

        Raises:
            TimeoutError: that could not be; the connections are closed all the same.
        """
        try:
            while self._before_close:
                self._before_close.popitem()[1]()
        finally:
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

    def request_of(self, step: Step, started_ns: int) -> PublishStep:
        """What is asked of the node to publish `step`; no columns: there is nothing to publish."""
        collected = step.columns()
        columns, significance = zip(*collected, strict=True) if collected else ((), ())
        tensors, epoch = tuple(step.tensors.values()), self._pause.epoch
        incarnation = self._held.incarnation
        return PublishStep(self.model, columns, tensors, started_ns, self.codec, incarnation, significance, epoch)

    def publish_pair(self, step: Step, then: PublishStep, timeout: float) -> PairStored | None:
        """Publish a parameter server's step, and as soon as it is visible everywhere another one, in one request.

        Args:
            step: collected, and not to be used again.
            then: what another publisher at this node makes of its step (`request_of`); what is the same memory travels once.
            timeout: seconds that `step` may take.

        Returns:
            How far it came; None: the node refused `step`, and says why when it is published alone, or they are too large to
            be published together. Nothing was published.

        Raises:
            NodeUnreachable: no answer in time; whether they were published is not known.
        """
        first = self.request_of(step, time.monotonic_ns())
        at = {(_place_of(column.keys), _place_of(column.rows)): number for number, column in enumerate(first.columns)}
        same = tuple(at.get((_place_of(column.keys), _place_of(column.rows))) for column in then.columns)
        try:
            answer = self._connections.ask(PublishPair(first, then, same, round(timeout * 1000)), timeout + self._timeout)
        except PublishError:  # together they are more than one message may have
            return None
        if not isinstance(answer, PairStored):
            return None
        self._last_stamp = max(self._last_stamp, answer.stamp)
        return answer

    def _commit(self, step: Step, started_ns: int) -> int:
        """Send what `step` holds and return its stamp."""
        self._connections.check_open()
        request = self.request_of(step, started_ns)
        if not request.columns:
            return self._last_stamp
        while isinstance(answer := self._ask(request, self._timeout), Failed):  # the model is rolled back, or was
            again = self._pause.retry(request, answer, self._names(), self.codec)
            if again is None:
                return self._last_stamp
            request = again
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
        self._openings += 1
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
        return answer if is_pause(answer) else _checked(answer)


def _place_of(array: NDArray[np.uint64] | NDArray[np.uint8]) -> tuple[int, int]:
    """Where its bytes are, of an array that is contiguous."""
    return array.ctypes.data, array.nbytes


def _checked(answer: Answer) -> Answer:
    """The answer, unless it is a refusal.

    Raises:
        EkkoError: of the kind the node named.
    """
    if isinstance(answer, Failed):
        raise FAILURES.get(answer.kind, EkkoError)(answer.reason)
    return answer
