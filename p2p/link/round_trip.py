"""How long a message takes to a peer and its acknowledgement back: the shortest time of the last minute or two.

The shortest, since all others contain how long they waited behind what we sent ourselves: credit that follows those would let
more wait, and so grow without end. Pure: times are arguments.
"""

from dataclasses import dataclass
from typing import Final

# A round trip, as acknowledgements measure it: never taken for less than lets those keep up, nor for more than it can be.
RTT_MS_MIN: Final = 40
RTT_MS_MAX: Final = 1_000
RTT_MS_ASSUMED: Final = 200  # before the first one
# The shortest of so long counts: others were waiting behind what we sent ourselves.
RTT_WINDOW_MS: Final = 60_000


@dataclass(slots=True)
class RoundTrip:
    """The shortest time from a message to its acknowledgement, of the last minute or two. One message at a time is timed."""

    shortest_ms: int | None = None  # of the stretch before this one
    _newest_ms: int | None = None  # of this one
    _since_ms: int = 0
    _timed: tuple[int, int, int] | None = None  # (session, sequence, when)

    @property
    def ms(self) -> int:
        """What to count with."""
        known = [ms for ms in (self.shortest_ms, self._newest_ms) if ms is not None]
        return min(max(min(known), RTT_MS_MIN), RTT_MS_MAX) if known else RTT_MS_ASSUMED

    def on_sent(self, session: int, sequence: int, now_ms: int) -> None:
        """A message left."""
        if self._timed is None or self._timed[0] != session:
            self._timed = session, sequence, now_ms

    def on_ack(self, session: int, sequence: int, now_ms: int) -> None:
        """Everything of the session up to `sequence` was acknowledged."""
        if self._timed is None or self._timed[0] != session or sequence < self._timed[1]:
            return
        taken_ms = now_ms - self._timed[2]
        self._timed = None
        if now_ms - self._since_ms >= RTT_WINDOW_MS:
            self.shortest_ms, self._newest_ms, self._since_ms = self._newest_ms, None, now_ms
        self._newest_ms = taken_ms if self._newest_ms is None else min(self._newest_ms, taken_ms)
