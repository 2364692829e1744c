"""Pushes that come: taken once, in their order, within bounds.

A push is taken in a partition if its number is the successor of the last one there. What was taken before is not taken again,
and answered together with the first one; what comes too early, since one before it was refused, is refused as well.
"""

from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.core import Core
from ekko.train.server.pending import ANSWERS_MAX, Push, Waiter
from ekko.train.server.tracks import Partition, Track


class Pushes:
    """The part of the machine that takes pushes in."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def on_push(self, asked: e.PushAsked) -> None:
        """A push is taken, or refused and discarded."""
        core, pending = self._core, self._core.pending
        left = self._new_in(asked)
        if left:
            for number in left:
                core.partitions[number].track(asked.worker).accepted = asked.number
            shares = len(asked.partitions)
            pending.add_push(Push(asked.ask, asked.worker, asked.life, asked.number, asked.bytes, shares, left, core.now_ms))
        else:
            core.emit(e.Discard(asked.ask))
        if left is None:
            return
        for waiter in pending.waiters_of(asked.worker):
            if waiter.number == asked.number and waiter.left <= set(asked.partitions):
                pending.drop_waiter(waiter)  # nobody listens for the answer to the first question any more
                core.fail(waiter.ask, w.BUSY, "asked again")
        waiter = Waiter(asked.ask, asked.worker, asked.number, set(asked.partitions))
        pending.add_waiter(waiter)
        core.answer_if_settled(waiter)

    def _new_in(self, asked: e.PushAsked) -> set[int] | None:
        """The partitions in which a push was not taken yet; None: it is refused, and answered."""
        core, worker = self._core, asked.worker
        if core.refuses(asked.ask, asked.partitions) or core.is_stranger(asked.ask, worker, asked.life):
            return None
        parts = [core.partitions[number] for number in asked.partitions]
        if core.is_dropped(asked.ask, worker, parts):
            return None
        if not all(self._is_of_life(part, asked) for part in parts):
            core.fail(asked.ask, w.HELLO, f"worker {worker} has not said hello for these partitions")
            return None
        left = {part.number for part in parts if self._is_new(part.track(worker), asked.number)}
        if not all(self._is_next(core.partitions[number].track(worker), asked.number) for number in left):
            core.fail(asked.ask, w.GAP, f"push {asked.number} of worker {worker} is not the next one")
            return None
        crowded = len(core.pending.waiters_of(worker)) >= ANSWERS_MAX
        if crowded or (left and not core.pending.has_room(worker, asked.bytes)):
            core.fail(asked.ask, w.BUSY, f"too much of worker {worker}, or of all, waits here: send it again in a moment")
            return None
        return left

    def _is_of_life(self, partition: Partition, asked: e.PushAsked) -> bool:
        """Whether the life of its worker is recorded where the push goes."""
        return partition.life_of(asked.worker) == asked.life

    def _is_next(self, track: Track, number: int) -> bool:
        return number == track.accepted + 1

    def _is_new(self, track: Track, number: int) -> bool:
        return number > track.accepted
