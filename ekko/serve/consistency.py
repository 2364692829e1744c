"""Answers from between two batches, never from half of one (R19): the reader's side. `ekko.store.batches` has the writer's."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

from ekko.errors import StoreError
from ekko.store import layout
from ekko.store.batches import UNSETTLED_AHEAD
from ekko.store.kernels.atomics import watch_word
from ekko.store.kernels.batches import unchanged

T = TypeVar("T")
A = TypeVar("A")

# How long a look-up tries. A batch of 4 MiB is applied in some milliseconds; who waits longer than this is better told.
DEADLINE_S: Final = 0.25
# The first attempts follow each other at once: most batches are applied in less time than it takes to give the processor away.
ATTEMPTS_AT_ONCE: Final = 8
PAUSE_S: Final = 0.0001

# Why an attempt ended: a batch was applied.
BATCH: Final = "a batch"

_EPOCH = layout.MODEL.offset("batch_epoch")
_UNSETTLED = layout.MODEL.offset("unsettled")
_REASONS = {UNSETTLED_AHEAD: "it has rows of steps that have not arrived as a whole"}


class MovedOnError(Exception):
    """What was read is not of the moment that the attempt began with; ends it, and the next one begins. Users never see it."""


class Moment:
    """One moment of a model, between two batches, at which everything that is here is whole.

    Args:
        header: address of the model's header.
        epoch: what `batch_epoch` said.
    """

    __slots__ = ("_epoch", "_header")

    def __init__(self, header: int, epoch: int) -> None:
        self._header = header
        self._epoch = epoch

    def check(self) -> None:
        """Call after each copy: what was copied is of this moment, and may be shown.

        Raises:
            MovedOnError: it may not be.
        """
        if not unchanged(self._header + _EPOCH, self._epoch):
            raise MovedOnError(BATCH)


def at_one_moment(model: str, attach: Callable[[], tuple[int, A]], read: Callable[[A, Moment], T], timeout: float) -> T:
    """Call `read` until it comes to its end without a `MovedOnError`.

    Args:
        model: its name, for the error.
        attach: called for each attempt; returns the address of the model's header, and what `read` is given.
        read: copies out what it wants, and has the moment checked after each copy.
        timeout: seconds after which no attempt is begun.

    Raises:
        StoreError: the node is catching up, applies batches without a pause that is long enough, or what `read` itself demands
            of a moment did not come to be.
    """
    deadline = 0.0
    attempts = 0
    while True:
        header, attached = attach()
        why = ""
        epoch = watch_word(header + _EPOCH)
        unsettled = watch_word(header + _UNSETTLED)
        if not epoch & 1 and not unsettled:
            try:
                return read(attached, Moment(header, epoch))
            except MovedOnError as moved:
                why = str(moved)
        attempts += 1
        now = time.monotonic()
        deadline = deadline or now + timeout
        if now > deadline:
            raise StoreError(f"no consistent look-up in model {model!r} within {timeout:g} s: {_reason(epoch, unsettled, why)}")
        if attempts > ATTEMPTS_AT_ONCE:
            time.sleep(PAUSE_S)


def between_batches(model: str, header: int, gather: Callable[[], T]) -> T:
    """Call `gather` until no batch was applied meanwhile, and nothing was there of which a part is missing.

    Args:
        model: its name, for the error.
        header: address of the model's header.
        gather: copies rows out; called any number of times.

    Raises:
        StoreError: the node is catching up, or applies batches without a pause that is long enough. After `DEADLINE_S`.
    """

    def read(_: None, moment: Moment) -> T:
        answer = gather()
        moment.check()
        return answer

    return at_one_moment(model, lambda: (header, None), read, DEADLINE_S)


def mostly_between_batches(header: int, gather: Callable[[], None]) -> None:
    """Call `gather` until no batch was applied meanwhile, a few times at most: then what it copied stays as it is."""
    for _ in range(ATTEMPTS_AT_ONCE):
        epoch = watch_word(header + _EPOCH)
        gather()
        if not epoch & 1 and unchanged(header + _EPOCH, epoch):
            break
        time.sleep(0)


def _reason(epoch: int, unsettled: int, moved_on: str) -> str:
    """What was in the way at the last attempt: a node that was killed may leave both words behind."""
    found = []
    if epoch & 1:
        found.append("a batch is being applied all the time, or the node was killed in the middle of one: see that it runs")
    if unsettled:
        reasons = [text for bit, text in _REASONS.items() if unsettled & bit] or [f"reasons {unsettled:#x}"]
        found.append(f"the node is catching up: {', '.join(reasons)}: try again, or look up without consistent=True")
    if not found:
        found.append(
            moved_on
            if moved_on != BATCH
            else "batches follow each other faster than these keys are looked up: ask for fewer at once, or try again"
        )
    return "; ".join(found)
