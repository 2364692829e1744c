"""Steps of an optimizer, each noted once, when it begins and when it has ended; and forward passes that change rows."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from ekko.torch.sending import Gate

# The last of several optimizers is waited for while the others begin anew so often; then it counts as not stepping any more.
REPEATS_MAX: Final = 16


class Round:
    """Steps of several optimizers that are one, which ends with the last one's, and which one that is: one that is not called
    any more, its parameters being frozen by now, must not keep the others' steps from ever being published.

    Args:
        count: how many optimizers there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._last = count - 1
        self._at = self._top = -1  # the newest one that stepped in this round, and the last of the list that did
        self._repeats = 0

    def begins(self, place: int) -> None:
        """A step of the so many-th one begins."""
        if place <= self._at:
            self._at = -1
            self._repeats += 1
            if self._repeats >= REPEATS_MAX:
                self._last = self._top

    def ends(self, place: int) -> bool:
        """A step of it has ended; whether all of them have."""
        self._at, self._top = place, max(place, self._top)
        if place < self._last:
            return False
        self._last = place
        self._at = self._top = -1
        self._repeats = 0
        return True


def hooked(optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> list[Any]:
    """Have two functions called before and after each step, each with the optimizer first; handles to remove that with.

    Where a step raises, the second one is not called.
    """
    if sum("step" in vars(kind) for kind in type(optimizer).__mro__) > 2:  # its own, and that of all
        before, after = _outermost(before, after)
    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def watched(module: nn.Module, gate: Gate, touch: Callable[[], None]) -> list[Any]:
    """Rows of a table with `max_norm` change in its forward passes: keep these apart from copies, and say so."""
    entered: list[bool] = []

    def before(*_: object) -> None:
        entered.append(gate.enter())
        touch()

    def after(*_: object) -> None:
        if entered.pop():
            gate.leave()

    # Locks are nothing for a compiler.
    first, last = (torch.compiler.disable(hook) for hook in (before, after))  # type: ignore[no-untyped-call]
    return [module.register_forward_pre_hook(first), module.register_forward_hook(last, always_call=True)]


def _outermost(before: Callable[..., None], after: Callable[..., None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """For a subclass whose `step` may call its parent's, which has hooks, too: only the outer call counts."""
    call: FrameType | None = None  # torch's wrapper of the step that is under way, or that has raised

    def first(*arguments: object) -> None:
        nonlocal call
        wrapper = sys._getframe(1)  # noqa: SLF001
        if call is None or not _is_within(wrapper, call):
            call = wrapper
            before(*arguments)

    def last(*arguments: object) -> None:
        nonlocal call
        if sys._getframe(1) is call:  # noqa: SLF001
            call = None
            after(*arguments)

    return first, last


def _is_within(call: FrameType, outer: FrameType) -> bool:
    """Whether a call is made, through others, by an outer one that is still under way."""
    caller = call.f_back
    while caller is not None and caller is not outer:
        caller = caller.f_back
    return caller is not None
