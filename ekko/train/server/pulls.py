"""Pulls: answered at once, or when the clocks of all workers have come far enough.

Clocks are of what is durable. Otherwise a step that is lost with this server could have been seen by one worker, and be another
one when it is done again.
"""

from collections.abc import Iterable

from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.core import Core
from ekko.train.server.pending import Pull

# A pull that waits longer is refused as busy, since who asked for it may be gone; who is not, asks again.
PULL_WAIT_MS_MAX = 30_000


class Pulls:
    """The part of the machine that answers pulls."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # Longer than the time after which a silent worker is dropped, so that who waits for one outlasts it.
        self._wait_ms = max(PULL_WAIT_MS_MAX, 2 * core.worker_timeout_ms)

    def on_pull(self, asked: e.PullAsked) -> None:
        """Answer it, refuse it, or let it wait."""
        core = self._core
        if core.refuses(asked.ask, asked.partitions):
            return
        if asked.worker == w.OBSERVER:
            self._answer(asked.ask, asked.partitions)
            return
        if core.is_stranger(asked.ask, asked.worker, asked.life):
            return
        pull = Pull(asked.ask, asked.worker, asked.clock, asked.partitions, asked.bytes, core.now_ms)
        if self._is_due(pull):
            self._answer(pull.ask, pull.partitions)
        elif core.pending.has_room_for_pull(asked.worker, asked.bytes):
            core.pending.add_pull(pull)
        else:
            reason = f"too many pulls of worker {asked.worker}, or too large ones of all, wait here: ask again in a moment"
            core.fail(asked.ask, w.BUSY, reason)

    def answer_due(self) -> None:
        """Answer all that need not wait any more."""
        if not self._core.clocks_moved:
            return
        self._core.clocks_moved = False
        for pull in list(self._core.pending.pulls.values()):
            if self._is_due(pull):
                self._core.pending.drop_pull(pull.ask)
                self._answer(pull.ask, pull.partitions)

    def _is_due(self, pull: Pull) -> bool:
        return all(self._core.partitions[number].may_pull(pull.clock) for number in pull.partitions)

    def _answer(self, ask: int, partitions: Iterable[int]) -> None:
        self._core.emit(e.AnswerPull(ask, min(self._core.partitions[number].clock() for number in partitions)))

    def send_away(self, partition: int) -> None:
        """We do not act for a partition any more."""
        for pull in list(self._core.pending.pulls.values()):
            if partition in pull.partitions:
                self._core.pending.drop_pull(pull.ask)
                self._core.emit(e.Answer(pull.ask, w.NotPrimary(self._core.serving())))

    def next_ms(self) -> int | None:
        """When the first one has waited too long."""
        return min((pull.since_ms + self._wait_ms for pull in self._core.pending.pulls.values()), default=None)

    def expire(self) -> None:
        """Refuse what has waited too long."""
        for pull in list(self._core.pending.pulls.values()):
            if self._core.now_ms >= pull.since_ms + self._wait_ms:
                self._core.pending.drop_pull(pull.ask)
                late = sorted(set().union(*(self._core.partitions[n].behind(pull.clock) for n in pull.partitions)))
                names = ", ".join(map(str, late[:8]))
                self._core.fail(pull.ask, w.BUSY, f"workers {names} have not pushed what this pull waits for: ask again")
