"""A worker's side of the parameter servers: rows are pulled, gradients are pushed.

    client = ekko.train.Client(["tcp://10.0.0.7:7900"], model="ctr", worker=0)
    rows = client.pull("item", keys)                       # float32[n, dim]
    client.push({"item": (keys, gradients)})               # answered later: up to `outstanding` of them are under way
    client.flush()                                         # all are applied, and no holder of them can lose them

Pushes are numbered; one that is sent twice counts once. `clock` is the number of the last push: a worker that starts again
continues where its pushes ended, so that a job that feeds it the batch after `clock` trains on each batch once.

There is no thread behind it: ZeroMQ's own carries messages while the caller computes, and answers are read when the client is
called. What may be under way is bounded by `outstanding` pushes, and by the pulls that the caller has begun.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn, Self, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ConfigError, ModelError, PublishError, WorkerDropped
from ekko.model import CODEC_DEFAULT, check_name
from ekko.train.arguments import keys_of, rows_of
from ekko.train.beside import Beside
from ekko.train.exchange import Exchange
from ekko.train.gradients import GradientSource, Sources
from ekko.train.outstanding import Outstanding
from ekko.train.pull import Pull
from ekko.train.requests import Pulling
from ekko.train.routing import by_partition
from ekko.train.server import wire as w
from ekko.train.server.wire import F32, U64
from ekko.train.sockets import Sockets, keys_of_worker

__all__ = ["Client", "Pull", "WorkerDropped"]

TIMEOUT_S: Final = 300.0
OUTSTANDING_DEFAULT: Final = 4
OUTSTANDING_MAX: Final = 1_024
# Pulls that were begun and are not answered. A caller that begins more has lost count of them.
PULLS_MAX: Final = 256


class Client:
    """One worker of one model. Used by one thread at a time; another one waits.

    Args:
        endpoints: of one or more of the model's parameter servers; the others are learnt from them.
        model: the model's name.
        worker: which worker this is: 0, 1, 2, ... Two processes at once may not be the same one.
        timeout: seconds that a call waits for servers, and for other workers in modes "bounded" and "sync".
        outstanding: pushes that may be under way; one more waits until the oldest is answered.
        average: gradients count divided by the number of workers, as `DistributedDataParallel` has it; else they are added up.
        key_file, allow: this worker's secret key, and the folder of the servers' public keys, as in a node's `[security]`; for
            servers beyond this machine they have to be given.
        run_dir: of a training node on this machine that holds the model's partitions: in mode "async" rows are read in its
            shared memory, and only those that are not there are asked for. Else it has no effect.

    Raises:
        NodeUnreachable: no server answers, or none acts for all partitions, within `timeout`.
        ModelError: the servers do not know the model or the worker.
        ConfigError: an endpoint that is none.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str,
        worker: int = 0,
        *,
        timeout: float = TIMEOUT_S,
        outstanding: int = OUTSTANDING_DEFAULT,
        average: bool = False,
        key_file: str | Path | None = None,
        allow: str | Path | None = None,
        run_dir: str | Path | None = None,
    ) -> None:
        _check(endpoints, worker, timeout, outstanding)
        self._model = check_name("model", model)
        self._worker = worker
        self._timeout_s = timeout
        self._outstanding_max = outstanding
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._sources = Sources()
        self._closed = False
        self._lost = 0
        self._beside: Beside | None = None
        self._asked = Outstanding(model, worker, time.time_ns() // 1_000, tuple(endpoints))
        keys = keys_of_worker(endpoints, f"worker-{worker}", key_file, allow, self._asked.standing.node_at)
        self._exchange = Exchange(model, self._asked, Sockets(keys))
        try:
            self._wait(lambda: self._asked.joined, "take this worker in")
            settings = self._asked.settings
            assert settings is not None
            if run_dir is not None and settings.mode == w.ASYNC:
                self._beside = Beside(model, run_dir, settings.tables)
        except BaseException:
            self.close()
            raise
        self.settings: Final = settings
        self._clock = self._asked.clock
        self._share = np.float32(1 / settings.workers) if average and settings.workers > 1 else None

    # --- what is known ---------------------------------------------------------------------------------------------------

    @property
    def tables(self) -> Mapping[str, int]:
        """Table -> dim."""
        return self.settings.tables

    @property
    def mode(self) -> str:
        """One of "async", "bounded" and "sync"."""
        return self.settings.mode

    @property
    def clock(self) -> int:
        """The number of this worker's last push, over all its lives; at the beginning of a life, of the last that counts."""
        return self._clock

    @property
    def stamp(self) -> int:
        """The largest stamp, in the servers' training model, of pushes that were answered; 0: none."""
        return self._asked.stamp

    @property
    def lost(self) -> int:
        """Pushes that had no answer when this worker was dropped: they may count or not."""
        return self._lost

    @property
    def requests(self) -> int:
        """Requests that were sent."""
        return self._asked.requests

    @property
    def retries(self) -> int:
        """Requests that were sent again."""
        return self._asked.retries

    # --- pulls -----------------------------------------------------------------------------------------------------------

    def pull(self, table: str, keys: ArrayLike) -> F32:
        """Rows of one table: float32[n, dim], of keys without a row what the table's initializer says.

        Args:
            table: its name.
            keys: n integers >= 0; they may come twice.

        Raises:
            ModelError: an unknown table, or keys that are not integers.
            NodeUnreachable: no answer in time.
        """
        return self.pull_async({table: keys}).result()[table]

    def pull_async(self, keys: Mapping[str, ArrayLike], *, ahead: int = 0) -> Pull:
        """Begin to pull rows of any number of tables, in one message to each server.

        Args:
            keys: table -> n integers >= 0; they are copied.
            ahead: how many pushes will have been made before the rows are used: in modes "bounded" and "sync" the servers wait
                for them. 1 for the batch after the next `push`.

        Raises:
            ModelError: as `pull`, or more than `PULLS_MAX` are under way.
        """
        if not isinstance(keys, Mapping):
            raise ModelError(f"a pull of {type(keys).__name__}: expected a dict, table -> keys")
        wanted = {table: self._keys(table, some).copy() for table, some in keys.items()}
        with self._alone():
            rows: dict[str, F32] = {}
            missing: dict[str, NDArray[np.int64]] = {}
            if self._beside is not None and (near := self._beside.rows(wanted)) is not None:
                rows, missing = near
                wanted = {table: wanted[table][at] for table, at in missing.items()}
                if not wanted:
                    self._exchange.hear()
                    return Pull(None, rows, missing, self._result, self._cancel)
            self._check()
            if self._asked.pulls >= PULLS_MAX:
                raise ModelError(f"{PULLS_MAX} pulls were begun and are not answered: take the result() of earlier ones first")
            pulling = self._asked.pull(wanted, self._clock + ahead, time.monotonic())
            self._exchange.transmit()
        return Pull(pulling, rows, missing, self._result, self._cancel)

    def _result(self, pulling: Pulling) -> dict[str, F32]:
        with self._alone():
            try:
                self._wait(lambda: pulling.done, "answer a pull")
            except BaseException:
                self._asked.cancel(pulling)
                raise
            if pulling.failure is not None:
                raise pulling.failure
            return {table: pulling.rows[table] for table in pulling.keys}

    def _cancel(self, pulling: Pulling) -> None:
        with self._alone():
            self._asked.cancel(pulling)

    # --- pushes ----------------------------------------------------------------------------------------------------------

    def push(self, gradients: Mapping[str, tuple[ArrayLike, ArrayLike]], *, rate: float | None = None) -> int:
        """Push gradients of one step: the servers' optimizer changes the rows by them. They are copied.

        A step without gradients is a push, too: other workers may wait for its number.

        Args:
            gradients: table -> n integers >= 0, and float32[n, dim]. Gradients of a key that comes twice are added up.
            rate: the learning rate of this step; None: that of the servers' settings.

        Returns:
            Its number. It is answered later, see `flush`.

        Raises:
            ModelError, PublishError: an unknown table, another shape or dtype, NaN or infinity. Nothing was pushed.
            NodeUnreachable: `outstanding` pushes wait, and no answer comes in time. Nothing was pushed.
        """
        columns = {}
        for table, (keys, values) in _pairs_of(gradients):
            checked = self._keys(table, keys)
            rows = rows_of(table, checked, values, self.tables[table], CODEC_DEFAULT, what="gradients")
            # A copy by partition costs no more than any other, and spares servers and nodes one.
            order = by_partition(checked, self.settings.shards, self.settings.partitions)
            rows = rows.take(order, axis=0)
            columns[table] = checked[order], rows if self._share is None else np.multiply(rows, self._share, out=rows)
        return self._push(columns, rate)

    def step(self, *, rate: float | None = None, scale: float = 1.0) -> int:
        """Push what the sources of gradients (`ekko.torch.PSEmbeddingBag`) have since the last step.

        Args:
            rate: as in `push`.
            scale: gradients are multiplied by it, such as `1 / scaler.get_scale()` of a loss that was scaled.

        Returns:
            The number of the push.

        Raises:
            PublishError: gradients with NaN or infinity; they are forgotten, and nothing was pushed.
            NodeUnreachable: as `push`; the sources have their gradients still.
        """
        _check_rate(rate)
        self._await_room()  # before the gradients are taken
        share = np.float32(scale) if self._share is None else np.float32(scale) * self._share
        return self._push(self._sources.take(share, self.tables), rate)

    def finite(self, scale: float = 1.0) -> bool:
        """Whether the gradients that sources have are finite, times `scale`; they stay where they are."""
        return self._sources.finite(scale)

    def discard(self) -> None:
        """Forget the gradients that sources have since the last step, as an optimizer that skips a step does."""
        self._sources.discard()

    def attach(self, source: GradientSource) -> None:
        """Have `step` take the gradients of a source, as long as it lives."""
        self._sources.attach(source)

    def _push(self, columns: Mapping[str, tuple[U64, F32]], rate: float | None) -> int:
        _check_rate(rate)
        with self._alone():
            self._await_room()
            self._clock += 1
            self._asked.push(self._clock, columns, math.nan if rate is None else float(rate), time.monotonic())
            self._exchange.transmit()
            self._check()  # of what cannot be divided into messages
            return self._clock

    def _await_room(self) -> None:
        """Return when one more push may be under way."""
        with self._alone():
            self._check()
            self._wait(lambda: self._asked.pushes < self._outstanding_max, "answer a push")

    def flush(self, timeout: float | None = None) -> int:
        """Wait until all pushes are applied, and no holder of their partitions can lose them any more.

        Returns:
            The largest stamp of them in the servers' training model.

        Raises:
            NodeUnreachable: not all within `timeout`; they are still under way.
        """
        with self._alone():
            self._wait(lambda: self._asked.pushes == 0, "answer all pushes", timeout)
            return self._asked.stamp

    def rejoin(self) -> int:
        """Go on with the others after `WorkerDropped`, in a life of its own: where they are is where this worker goes on.

        Pushes without an answer are forgotten; they may count or not (`lost`). Pulls that were begun are given up, and
        gradients that sources have are forgotten, since they are of rows that have changed.

        Returns:
            The `clock`: the next batch to push is the one after it.

        Raises:
            ModelError: it was not dropped.
            NodeUnreachable: as when it was made; it may be called again.
        """
        with self._alone():
            if isinstance(self._asked.failure, WorkerDropped):
                self._lost += self._asked.rejoin(time.time_ns() // 1_000, time.monotonic())
                self._sources.discard()
            elif self._asked.failure is not None or self._asked.joined:
                raise self._asked.failure or ModelError(f"worker {self._worker} was not dropped: it can go on as it is")
            self._wait(lambda: self._asked.joined, "take this worker in")
            self._clock = self._asked.clock
            return self._clock

    # --- what all of these need ------------------------------------------------------------------------------------------

    def _keys(self, table: str, keys: ArrayLike) -> U64:
        if table not in self.tables:
            raise ModelError(
                f"unknown table {table!r}: the servers of model {self._model!r} have {', '.join(map(repr, self.tables))}"
            )
        return keys_of(table, keys)

    def _alone(self) -> threading.RLock:
        """The lock, of a client that can be used."""
        if self._closed:
            raise PublishError("this client is closed: make another one")
        if os.getpid() != self._pid:
            raise PublishError("this client was made in another process: make one after the fork, for a worker of its own")
        return self._lock

    def _check(self) -> None:
        """Raise where nothing can be asked of servers any more."""
        if self._asked.failure is not None:
            raise self._asked.failure
        if not self._asked.joined:
            raise ModelError(f"worker {self._worker} has not joined the servers again: call client.rejoin()")

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        self._exchange.until(condition, what, self._timeout_s if timeout_s is None else timeout_s)

    def close(self) -> None:
        """Leave the servers at once; pushes without an answer may or may not count. In a `with` block, `flush` comes first."""
        self._closed = True
        if os.getpid() != self._pid:
            return  # the sockets are the parent's
        self._exchange.closing()
        with self._lock:
            self._exchange.close()
            if self._beside is not None:
                self._beside.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an ekko.train.Client cannot be copied or pickled: make one in each process")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._closed:
                self.flush()
        finally:
            self.close()


def _check(endpoints: Sequence[str], worker: int, timeout: float, outstanding: int) -> None:
    if isinstance(endpoints, str) or not endpoints:
        raise ConfigError(f"endpoints are {endpoints!r}: expected a list with at least one server's tcp://HOST:PORT")
    if type(worker) is not int or not 0 <= worker < w.WORKERS_MAX:
        raise ConfigError(f"worker is {worker!r}: expected a whole number from 0 to {w.WORKERS_MAX - 1}")
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigError(f"timeout is {timeout!r}: expected seconds, more than 0")
    if type(outstanding) is not int or not 1 <= outstanding <= OUTSTANDING_MAX:
        raise ConfigError(f"outstanding is {outstanding!r}: expected 1 to {OUTSTANDING_MAX} pushes")


def _pairs_of(gradients: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Iterable[tuple[str, tuple[ArrayLike, ArrayLike]]]:
    if not isinstance(gradients, Mapping) or not all(
        isinstance(one, tuple | list) and len(one) == 2 for one in gradients.values()
    ):
        raise ModelError("a push of something else than a dict, table -> (keys, gradients)")
    return gradients.items()


def _check_rate(rate: float | None) -> None:
    if rate is not None and not (isinstance(rate, SupportsFloat) and math.isfinite(rate) and float(rate) >= 0):
        raise PublishError(f"rate is {rate!r}: expected a learning rate from 0, or None for that of the servers")
