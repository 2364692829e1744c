"""What goes on while a model is tracked: steps are noted, what is due is published, what a rollback took back is loaded."""

import atexit
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Self

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from ekko.errors import ModelError, NodeUnreachable
from ekko.torch.capture import I64, TrackedTable
from ekko.torch.dense import DenseParameters
from ekko.torch.modules import Table
from ekko.torch.noting import Capture
from ekko.torch.outbox import Choice, Counts, Outbox, StepPublisher
from ekko.torch.reloading import Reloaded, Reloader, StateReader
from ekko.torch.sending import COPY_BYTES_MAX, RETRY_S, Gate, Sender
from ekko.torch.steps import Round, hooked, watched

log = logging.getLogger(__name__)

# `publish_all` cuts a table into steps of about this size: large enough that the cost of a step does not count, small enough
# that the node stays responsive to other publishers meanwhile.
PUBLISH_ALL_BYTES_MAX: Final = 4 << 20
# What so many steps have set aside is added up before rows are copied, so that the next step need not wait for it.
SETTLE_STEPS: Final = 16
FLUSH_S: Final = 30.0
CLOSE_S: Final = 10.0  # the same where the publisher is closed
FORKED: Final = (
    "this process was forked from one that tracks a model, and publishes nothing of what it trains: call ekko.torch.track() in "
    "it, with a publisher of its own"
)


class Tracker:
    """Publishes a model's changes; made by `track`, which says what of. Used by the thread that trains."""

    def __init__(
        self,
        publisher: StepPublisher,
        optimizers: Sequence[Optimizer],
        tables: Mapping[str, TrackedTable],
        renormalised: Mapping[str, Sequence[Table]],
        dense: DenseParameters,
        outbox: Outbox,
        reloader: Reloader,
        share: float | None,
    ) -> None:
        self.before_step: Callable[[], None] | None = None  # called before each step; `ekko.torch.checkpoint` sets it
        self._publisher = publisher
        self._optimizers = optimizers
        self._tables = tables
        self._dense = dense
        self._outbox = outbox
        self._reloader = reloader
        self._gate = Gate()
        self._settled = 0  # up to which step what was set aside is added up
        self._background = share is not None
        self._waited = False  # whether the thread waited for the end of a rollback, which the trainer is to load
        self._forked = False  # whether this is a copy, in a child of the process that tracks
        self._told = False  # and whether it has said so
        self._sender = Sender(self._send_some, lambda: self._outbox.is_due, share or 1.0)
        for table in tables.values():
            if table.key_map is not None:
                table.key_map.attach(self._gate, table.drop)
        self._hooks: list[Any] = []
        self._stays_open: Callable[[], None] | None = None
        steps = Round(len(optimizers))
        for place, one in enumerate(optimizers):
            self._hooks += hooked(one, *self._around(one, place, steps))
        for name, modules in renormalised.items():
            for module in modules:
                self._hooks += watched(module, self._gate, tables[name].touch)

    def begin(self, before_close: Callable[[Callable[[], object]], Callable[[], None]] | None) -> None:
        """Begin; `before_close` has a function called before the publisher is closed, and returns what takes that back."""
        _living.add(self)
        if self._background:
            self._sender.start()
            atexit.register(self._at_exit)  # of a script that closes nothing
            if before_close is not None:
                self._stays_open = before_close(lambda: self.remove(CLOSE_S))

    @property
    def stamp(self) -> int:
        """The stamp of the last batch published; 0: none yet."""
        return self._outbox.stamp

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._outbox.counts(self._dense.steps, self._gate.waited_s)

    @property
    def publisher(self) -> StepPublisher:
        """What it publishes with; with several ranks, of their parts only this one's."""
        return self._publisher

    @property
    def reader(self) -> StateReader | None:
        """What it reads the node's state with."""
        return self._reloader.reader

    def dense_tensor(self, name: str) -> Tensor:
        """A dense parameter or buffer of the model."""
        return self._dense.tensor(name)

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names under which the dense parameters are published."""
        return self._dense.names

    def publish_all(self) -> int:
        """Publish every row of every table and all dense parameters, as a first state or after loading a checkpoint.

        Returns:
            The last stamp: once it is visible somewhere, so is the rest.
        """
        with self._alone():
            self._outbox.publish_all(PUBLISH_ALL_BYTES_MAX)
            return self._publish_dense()

    def publish_chosen(self, choice: Choice) -> int:
        """Publish the rows of all tables that are chosen, and dense parameters where they are published at all.

        All rows as they are now count as published afterwards: for who loaded another state, and knows which of it is new.

        Returns:
            The stamp of the last batch.
        """
        with self._alone():
            self._outbox.publish_all(PUBLISH_ALL_BYTES_MAX, choice)
            return self._publish_dense() if self._dense.periodic else self._outbox.stamp

    def publish_dense(self) -> int:
        """Publish all dense parameters now, and what else is due; returns the stamp."""
        with self._alone():
            return self._publish_dense()

    def _publish_dense(self) -> int:
        self._dense.demand()
        return self._publish()

    def mark(self, table: str, ids: I64) -> None:
        """Rows of a table, int64[n], were changed by somebody else than the optimizers: they go with the next batch."""
        with self._alone():
            self._tables[table].mark(np.asarray(ids, np.int64))

    def flush(self, timeout: float = FLUSH_S) -> int:
        """Publish all that is due, and dense parameters where they are published at all; call it between two steps.

        Args:
            timeout: seconds to try again for where the node does not answer; a call that is under way then may end later.

        Returns:
            The stamp of the last batch.

        Raises:
            TimeoutError: the node did not answer in time. What is due stays due.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                with self._alone(deadline):
                    if self._dense.periodic and self._dense.unsent:
                        self._dense.demand()
                    return self._publish()
            except NodeUnreachable as error:
                if time.monotonic() + RETRY_S >= deadline:
                    raise TimeoutError(f"what is due is not published after {timeout:g} s: {error}") from error
                time.sleep(RETRY_S)

    def reload(self) -> Reloaded:
        """Load what rollbacks restored since this was last called, and forget what the optimizer remembers of it.

        What is not published yet is dropped, of rows that were not restored, too: it was worked out from a model that is not
        there any more. Where there is a reader, such rows and all dense parameters become what the node has. Called by itself
        where a step is refused since the model was rolled back, or had to wait for that; call it to go on from the restored
        rows before the next step.
        """
        with self._alone():
            return self._load_restored()

    def _load_restored(self) -> Reloaded:
        self._sender.calls = True  # where this fails the next step tries again
        reloaded = self._reloader.reload()
        self._waited = False
        if reloaded != Reloaded({}) and isinstance(self._sender.error, ModelError):
            self._sender.error = None  # a refusal that is seen to
        return reloaded

    def remove(self, timeout: float = FLUSH_S) -> None:
        """Stop tracking; in the background, publish what is due before. What was published stays published.

        Raises:
            TimeoutError: it could not be published in time; it is not tracked any more all the same.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        _living.discard(self)
        self._gate.leave()
        atexit.unregister(self._at_exit)
        if self._stays_open is not None:
            self._stays_open()
        if self._sender.runs and not self._forked:
            deadline = time.monotonic() + timeout
            self._sender.stop(timeout)
            self.flush(max(0.0, deadline - time.monotonic()))

    def _at_exit(self) -> None:
        with suppress(Exception):  # there is nobody to tell
            self.remove(CLOSE_S)

    def tracks(self, optimizer: Optimizer) -> bool:
        """Whether it publishes what an optimizer changes."""
        return optimizer in self._optimizers and not self._forked

    def in_child(self) -> None:
        """This is a copy in a process that was forked off: it has no thread that sends, and locks that nobody will release. It
        does nothing any more, and says so when a step is made.
        """
        for hook in self._hooks:
            hook.remove()
        self._forked = True
        self._gate.begin_anew()
        self._hooks = [one.register_step_pre_hook(self._say_forked) for one in self._optimizers]
        for table in self._tables.values():
            if table.key_map is not None:
                table.key_map.attach(self._gate, lambda _: None)

    def _say_forked(self, optimizer: Optimizer, *_: object) -> None:
        # The hook stays, since it is called while torch goes through hooks.
        if not self._told and not any(other.tracks(optimizer) for other in _living):  # else it was done as this says
            log.warning("%s", FORKED)
        self._told = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _around(self, optimizer: Optimizer, place: int, steps: Round) -> tuple[Callable[..., None], Callable[..., None]]:
        """What is called before and after each step of the so many-th optimizer: what it takes is a part of each step."""
        enter = self._gate.enter
        captured = Capture(optimizer, [one for one in self._tables.values() if optimizer in one.trainers])
        stepped, ended = captured.stepped, self._stepped
        several = steps.count > 1

        def before(*_: object) -> None:
            if self.before_step is not None:
                self.before_step()
            enter()
            if several:
                steps.begins(place)

        def after(optimizer: Optimizer, *_: object) -> None:
            skipped = getattr(optimizer, "found_inf", None)  # a gradient scaler has the step change nothing then
            if skipped is None or not skipped.item():
                stepped()
            if not several or steps.ends(place):
                ended()

        return before, after

    def _stepped(self) -> None:
        """A step has ended, of all optimizers."""
        self._dense.steps += 1
        self._gate.leave()
        if self._sender.calls:
            self._attend()

    def _attend(self) -> None:
        """Do at the end of a step what is to be done then: mostly there is nothing."""
        sender = self._sender
        if not self._background:
            with sender.sending:
                self._publish()
            return
        sender.calls = False  # before looking, so that what comes meanwhile is found after the next step
        try:
            if self._waited or self._reloader.unfinished:
                self.reload()
            elif (error := sender.error) is not None:
                if not isinstance(error, ModelError) or self.reload() == Reloaded({}):
                    sender.error = None  # told once, and then tried again
                    raise error
            elif sender.waits:
                sender.wake()
        finally:
            if self._waited or self._reloader.unfinished or sender.error is not None or sender.waits:
                sender.calls = True

    @contextmanager
    def _alone(self, deadline: float | None = None) -> Iterator[None]:
        """Between two steps, and nobody else sends."""
        if self._forked:
            raise ModelError(FORKED)
        self._gate.leave()
        timeout = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._sender.sending.acquire(timeout=timeout):
            raise TimeoutError(f"the batch before this one is still on its way: {self._sender.trouble or 'the node is slow'}")
        try:
            yield
        finally:
            self._sender.sending.release()

    def _send_some(self) -> bool:
        """Send a bounded part of what is due; False: nothing was."""
        if self._waited or self._reloader.unfinished:
            return False  # what is due was worked out from a model that is gone, until the trainer has loaded what was restored
        if self._dense.steps - self._settled > SETTLE_STEPS:  # else it is as fast to do it while the rows are copied
            with self._gate.between_steps():
                self._settled = self._dense.steps
                aside = [(table, *table.set_aside()) for table in self._tables.values()]
            for table, pending, norms in aside:
                table.add_up(pending, norms)
        with self._gate.between_steps():
            self._settled = self._dense.steps
            batch = self._outbox.take(COPY_BYTES_MAX)
        if batch is None:
            return False
        self._outbox.send(batch)
        if getattr(self._publisher, "has_restored", False):
            self._waited = self._sender.calls = True
        return True

    def _publish(self) -> int:
        """Publish all that is due, after what was restored is loaded."""
        if self._waited or self._reloader.unfinished:
            self._load_restored()
        try:
            self._publish_due()
        except ModelError:
            if self._load_restored() == Reloaded({}):
                raise  # it is refused for another reason, or the rollback is not over
            self._publish_due()
        return self._outbox.stamp

    def _publish_due(self) -> None:
        limit = COPY_BYTES_MAX if self._background else None
        while self._outbox.is_due:
            if (batch := self._outbox.take(limit)) is not None:
                self._outbox.send(batch)
                if getattr(self._publisher, "has_restored", False):  # it waited for the end of a rollback; nothing is due then
                    self._load_restored()


# Of this process, for a child that is forked off.
_living: "weakref.WeakSet[Tracker]" = weakref.WeakSet()


def _in_child() -> None:
    for tracker in list(_living):
        tracker.in_child()


os.register_at_fork(after_in_child=_in_child)
