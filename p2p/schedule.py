"""Regular pulls: every interval, from whom.

This is the paper's way of moving updates, where push has no part (`p2p.sync`). The first pull of a life comes after a random
part of the interval, so that nodes which start together do not all ask at the same moment for ever after.
"""

from p2p import messages as m
from p2p.core import Core
from p2p.pull import Pull


class Schedule:
    """The part of the machine that pulls whether or not anything seems to be missing."""

    def __init__(self, core: Core, pull: Pull) -> None:
        self._core = core
        self._pull = pull
        self._due_ms: int | None = None  # monotonic; None: there are no regular pulls

    def start(self, now: m.Now) -> None:
        """The node is up."""
        interval_ms = self._core.options.sync.interval_ms
        if interval_ms:
            self._due_ms = now.monotonic_ms + self._core.rng.randrange(interval_ms) + 1

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        return self._due_ms

    def on_timer(self, now: m.Now) -> None:
        """Pull every keyspace, when it is time."""
        core = self._core
        if self._due_ms is None or now.monotonic_ms < self._due_ms:
            return
        self._due_ms = now.monotonic_ms + core.options.sync.interval_ms
        for keyspace in core.keyspaces.values():
            holders = core.membership.holders(now.monotonic_ms, keyspace.replica.place)
            others = [holder.node for holder in holders if holder.node != core.options.node]
            # One that is still on its way is waited for: `Pull` has one of each keyspace at a time.
            link = core.link(core.rng.choice(others)) if others else None
            if link is not None:
                self._pull.ask(keyspace, link, now, "interval")
