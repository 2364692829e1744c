"""Answers from between two batches, never from half of one (R19): the reader's side. `ekko.store.batches` has the writer's."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

from ekko.errors import StoreError
from ekko.store import layout
from ekko.store.batches import UNSETTLED_AHEAD, UNSETTLED_FED
from ekko.store.kernels.atomics import watch_word
from ekko.store.kernels.batches import unchanged

T = TypeVar("T")

# How long a look-up tries. A batch of 4 MiB is applied in some milliseconds; who waits longer than this is better told.
DEADLINE_S: Final = 0.25
# The first attempts follow each other at once: most batches are applied in less time than it takes to give the processor away.
ATTEMPTS_AT_ONCE: Final = 8
PAUSE_S: Final = 0.0001

_EPOCH = layout.MODEL.offset("batch_epoch")
_UNSETTLED = layout.MODEL.offset("unsettled")
_REASONS = {
    UNSETTLED_AHEAD: "it has rows of steps that have not arrived as a whole",
    UNSETTLED_FED: "a link towards it is congested, so that rows come in order of priority",
}


def between_batches(model: str, header: int, gather: Callable[[], T]) -> T:
    """Call `gather` until no batch was applied meanwhile, and nothing was there of which a part is missing.

    Args:
        model: its name, for the error.
        header: address of the model's header.
        gather: copies rows out; called any number of times.

    Raises:
        StoreError: the node is catching up, or applies batches without a pause that is long enough. After `DEADLINE_S`.
    """
    deadline = 0.0
    attempts = 0
    while True:
        epoch = watch_word(header + _EPOCH)
        unsettled = watch_word(header + _UNSETTLED)
        if not epoch & 1 and not unsettled:
            answer = gather()
            if unchanged(header + _EPOCH, epoch):
                return answer
        attempts += 1
        now = time.monotonic()
        deadline = deadline or now + DEADLINE_S
        if now > deadline:
            raise StoreError(f"no consistent look-up in model {model!r} within {DEADLINE_S} s: {_reason(epoch, unsettled)}")
        if attempts > ATTEMPTS_AT_ONCE:
            time.sleep(PAUSE_S)


def _reason(epoch: int, unsettled: int) -> str:
    """What was in the way at the last attempt: a node that was killed may leave both words behind."""
    found = []
    if epoch & 1:
        found.append("a batch is being applied all the time, or the node was killed in the middle of one: see that it runs")
    if unsettled:
        reasons = [text for bit, text in _REASONS.items() if unsettled & bit] or [f"reasons {unsettled:#x}"]
        found.append(f"the node is catching up: {', '.join(reasons)}: try again, or look up without consistent=True")
    if not found:
        return "batches follow each other faster than these keys are looked up: ask for fewer at once, or try again"
    return "; ".join(found)
