"""`track`: publish the rows that training changes, and load what a rollback took back."""

import atexit
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, Literal, Self, get_args

import numpy as np
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ekko.errors import ModelError, NodeUnreachable
from ekko.torch.capture import I64, TrackedTable
from ekko.torch.dense import DenseParameters
from ekko.torch.key_map import KeyMap, key_maps
from ekko.torch.modules import found_tables, renormalising, unwrapped
from ekko.torch.outbox import Choice, Counts, Outbox, StepPublisher
from ekko.torch.ranks import divided
from ekko.torch.reloading import Reloaded, Reloader, StateReader
from ekko.torch.sending import COPY_BYTES_MAX, RETRY_S, SHARE, Gate, Sender
from ekko.torch.steps import Round, hooked, watched

# `publish_all` cuts a table into steps of about this size: large enough that the cost of a step does not count, small enough
# that the node stays responsive to other publishers meanwhile.
PUBLISH_ALL_BYTES_MAX: Final = 4 << 20
# What so many steps have set aside is added up before rows are copied, so that the next step need not wait for it.
SETTLE_STEPS: Final = 16
FLUSH_S: Final = 30.0
CLOSE_S: Final = 10.0  # the same where the publisher is closed
Significance = Literal["gradient", "change"]


def track(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    publisher: StepPublisher,
    tables: Mapping[str, str],
    dense_every: int | str | None = None,
    significance: Significance = "gradient",
    reader: StateReader | None = None,
    *,
    background: bool = True,
    process_group: ProcessGroup | None = None,
    share: float = SHARE,
    keys: Mapping[str, KeyMap] | None = None,
) -> "Tracker":
    """Publish the embedding rows that training changes, whatever the optimizer: those that changed, exactly, and no others.

    In the background: a step notes what it changed, and a thread takes all that is due between two steps, so that a batch is
    the model as it was at one moment, and publishes it while training goes on. Batches come as fast as steps where steps are
    slow; else one has several steps, and a row that they changed several times is sent once, as it is then. A node that does
    not answer is tried again, while rows add up (`Tracker.counts`). What else fails raises out of the next step.

    Not in the background, each `optimizer.step()` publishes one batch. A step that could not be published raises out of
    `optimizer.step()`, after the parameters have changed; its rows go with the next one that can.

    Once the model was rolled back, a step loads what was restored into the tables, and is dropped with all that is not
    published yet (`Tracker.reload`). With `Publisher(admission=...)`, rows go out from the batch on that touches their key for
    the n-th time.

    Args:
        model: holds the tables; may be wrapped by `torch.compile` or `DistributedDataParallel`: names are those without it.
        optimizer: any; or several, in the order in which they step: their steps are one, which ends with the last one's. Name
            all: what one that is not named changes is not seen, and while it steps dense parameters may be copied. Where
            they move rows that have no gradient (momentum, weight decay, Adam with dense gradients, ...) changed rows are found
            by comparing the table with a copy of what was published last: it takes as much memory again.
        publisher: an `ekko.Publisher` of a model that has the tables.
        tables: module name (as in `model.named_modules()`) of an `nn.Embedding` or `nn.EmbeddingBag` -> table it is published
            to; the row index is the key. Modules that share one weight share one table.
        dense_every: publish all other parameters too, under their parameter names, and floating-point buffers that a state dict
            has, with every this many steps (8), or with a step at most so often ("2s"); None: never. They go in one batch with
            the rows of their step, and of each what changed since they went last.
        significance: "gradient": a row's is the L1 norm of its gradient, or their sum; "change": how far a row moves is what
            counts, as the node sees it, and as it always does for tables that are compared.
        reader: of the same model on this machine, to read dense parameters after a rollback, and rows that steps changed
            which it had refused; None: these stay as they are.
        background: see above.
        process_group: ranks that have the same weights after each step, of which each publishes a part (`ekko.torch.ranks`);
            None: those of a `DistributedDataParallel` model, else all is published here.
        share: of one core's time, that batches in the background may take: more share, more and smaller batches. They come four
            times a second at least.

        keys: module name -> its `ekko.torch.KeyMap`, where rows are numbered as keys come: what is published has these keys.

    Returns:
        The handle; `remove()` it, or use it in a `with` block, to publish what is still due and stop.

    Raises:
        ModelError: no such module or table, not an embedding, another width, or no optimizer trains it. Nothing is tracked.
    """
    return Tracker(
        model,
        optimizer,
        publisher,
        tables,
        dense_every,
        significance,
        reader,
        background=background,
        process_group=process_group,
        share=share,
        keys=keys,
    )


class Tracker:
    """Publishes a model's changes; made by `track`. Used by the thread that trains."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        publisher: StepPublisher,
        tables: Mapping[str, str],
        dense_every: int | str | None = None,
        significance: Significance = "gradient",
        reader: StateReader | None = None,
        *,
        background: bool = True,
        process_group: ProcessGroup | None = None,
        share: float = SHARE,
        keys: Mapping[str, KeyMap] | None = None,
    ) -> None:
        if significance not in get_args(Significance):
            raise ModelError(f"significance is {significance!r}: expected 'gradient' or 'change'")
        if not 0 < share <= 1:
            raise ModelError(f"share is {share!r}: expected a part of one core's time, above 0 and at most 1")
        if not tables and dense_every is None:
            raise ModelError("tables is empty: name an nn.Embedding and the table it is published to, or set dense_every")
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if not optimizers:
            raise ModelError("optimizer is an empty list: expected those that train the model, in the order in which they step")
        self.before_step: Callable[[], None] | None = None  # called before each step; `ekko.torch.checkpoint` sets it
        found = found_tables(model, tables, publisher.tables)
        maps = key_maps(keys or {}, tables, found)
        renormalise = {name: renormalising(model, module.weight) for name, module in found.items()}
        self._tables = {
            name: TrackedTable(name, module, optimizers, maps.get(name), renormalised=bool(renormalise[name]))
            for name, module in found.items()
        }
        weights = {name: table.weight for name, table in self._tables.items()}
        self._publisher: StepPublisher = divided(publisher, model, weights, process_group, maps)
        self._dense = DenseParameters(unwrapped(model), weights.values(), dense_every, time.monotonic())
        said = significance == "gradient"
        self._outbox = Outbox(list(self._tables.values()), self._dense, self._publisher, says_significance=said)
        self._reloader = Reloader(self._publisher, reader, optimizers, self._tables, self._dense, self._outbox)
        self._gate = Gate()
        self._steps = 0
        self._settled = 0  # up to which step what was set aside is added up
        self._background = background
        self._waited = False  # whether the thread waited for the end of a rollback, which the trainer is to load
        self._sender = Sender(self._send_some, lambda: self._outbox.is_due, share)
        for table in self._tables.values():
            if table.key_map is not None:
                if self._publisher is not publisher:
                    raise ModelError(
                        f"table {table.name!r} has a KeyMap: with several ranks rows would be numbered differently"
                    )
                table.key_map.attach(self._gate, table.drop)
        self._hooks: list[Any] = []
        self._round = Round(len(optimizers))
        for place, one in enumerate(optimizers):
            captured = [table for table in self._tables.values() if one in table.trainers]
            self._hooks += hooked(one, partial(self._begins, place), partial(self._stepped, captured, place))
        for name, modules in renormalise.items():
            for module in modules:
                self._hooks += watched(module, self._gate, self._tables[name].touch)
        self._stays_open: Callable[[], None] | None = None  # a publisher of yours need not know that
        if background:
            self._sender.start()
            self._process = os.getpid()
            atexit.register(self._at_exit)  # of a script that closes nothing
            if (before_close := getattr(publisher, "before_close", None)) is not None:
                self._stays_open = before_close(lambda: self.remove(CLOSE_S))

    @property
    def stamp(self) -> int:
        """The stamp of the last batch published; 0: none yet."""
        return self._outbox.stamp

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._outbox.counts(self._steps, self._gate.waited_s)

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
        reloaded = self._reloader.reload()
        self._waited = False
        return reloaded

    def remove(self, timeout: float = FLUSH_S) -> None:
        """Stop tracking; in the background, publish what is due before. What was published stays published.

        Raises:
            TimeoutError: it could not be published in time; it is not tracked any more all the same.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._gate.leave()
        atexit.unregister(self._at_exit)
        if self._stays_open is not None:
            self._stays_open()
        if self._sender.runs:
            self._sender.stop()
            self.flush(timeout)

    def _at_exit(self) -> None:
        if os.getpid() == self._process:  # and not in a child, which has this but no thread
            with suppress(Exception):  # there is nobody to tell
                self.remove(CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begins(self, place: int) -> None:
        if self.before_step is not None:
            self.before_step()
        self._gate.enter()
        self._round.begins(place)

    def _stepped(self, captured: list[TrackedTable], place: int, optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # a gradient scaler has the step change nothing then
        if skipped is None or not skipped.item():
            for table in captured:
                table.capture(optimizer)
        if not self._round.ends(place):
            return
        self._steps += 1
        self._dense.stepped(time.monotonic())
        self._gate.leave()
        if not self._background:
            with self._sender.sending:
                self._publish()
        elif self._waited or self._reloader.unfinished:
            self.reload()
        elif (error := self._sender.failed()) is None:
            self._sender.stepped()
        elif not isinstance(error, ModelError) or self.reload() == Reloaded({}):
            raise error

    @contextmanager
    def _alone(self, deadline: float | None = None) -> Iterator[None]:
        """Between two steps, and nobody else sends."""
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
        if self._steps - self._settled > SETTLE_STEPS:  # else it is as fast to do it while the rows are copied
            with self._gate.between_steps():
                self._settled = self._steps
                aside = [(table, *table.set_aside()) for table in self._tables.values()]
            for table, pending, norms in aside:
                table.add_up(pending, norms)
        with self._gate.between_steps():
            self._settled = self._steps
            batch = self._outbox.take(COPY_BYTES_MAX)
        if batch is None:
            return False
        self._outbox.send(batch)
        self._waited |= getattr(self._publisher, "has_restored", False)
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
