"""64-bit hybrid-clock stamps, and the clock that mints them.

A stamp is `milliseconds since 2020-01-01 UTC (42 bits) | counter (10 bits) | writer (12 bits)`. Time comes first, so that
stamps of different writers are totally ordered by time and then by writer; the larger stamp wins a row (last writer wins).
The update-cache argument of the paper (section 4.4) needs time to come first.

Milliseconds and counter are minted as one 52-bit integer, the *tick*. That makes the two awkward cases vanish: a counter
that overflows carries into the milliseconds, and a wall clock that steps back simply stops mattering until it catches up.
"""

from p2p.errors import AheadError

WRITER_BITS = 12
COUNTER_BITS = 10
WRITERS_MAX = 1 << WRITER_BITS
WRITER_MASK = WRITERS_MAX - 1
EPOCH_MS = 1_577_836_800_000  # 2020-01-01T00:00:00Z, in Unix milliseconds
TICK_MAX = (1 << 52) - 1

# A stamp further ahead of our wall clock than this is refused before it can touch our clock (R14): one node with a broken
# clock would otherwise drag every clock of the cluster into the future for good.
AHEAD_MS_MAX = 60_000


def writer_of(stamp: int) -> int:
    """The 12-bit writer id inside a stamp."""
    return stamp & WRITER_MASK


def unix_ms_of(stamp: int) -> int:
    """The wall-clock milliseconds (Unix) inside a stamp."""
    return (stamp >> (WRITER_BITS + COUNTER_BITS)) + EPOCH_MS


def make_stamp(unix_ms: int, counter: int, writer: int) -> int:
    """Compose a stamp; the inverse of the accessors above."""
    return ((((unix_ms - EPOCH_MS) << COUNTER_BITS) | counter) << WRITER_BITS) | writer


class StampClock:
    """Mints strictly increasing stamps that never run behind a stamp seen anywhere.

    Pure: the wall clock is an argument. One clock serves all writers of a node.
    """

    def __init__(self, last_stamp: int = 0) -> None:
        self._tick = last_stamp >> WRITER_BITS

    def mint(self, now_ms: int, writer: int) -> int:
        """The next stamp of `writer` at Unix time `now_ms`; greater than any minted or observed before."""
        self._tick = max((now_ms - EPOCH_MS) << COUNTER_BITS, self._tick + 1)
        assert 0 < self._tick <= TICK_MAX, f"clock out of range: {now_ms}"
        return (self._tick << WRITER_BITS) | writer

    @property
    def last(self) -> int:
        """The largest stamp minted or observed, with writer 0."""
        return self._tick << WRITER_BITS

    def observe(self, stamp: int) -> None:
        """Take note of a stamp; later ones minted here are greater."""
        self._tick = max(self._tick, stamp >> WRITER_BITS)


def check_not_ahead(stamp: int, now_ms: int, ahead_ms_max: int = AHEAD_MS_MAX) -> None:
    """Refuse a peer's stamp that lies too far in our future (R14).

    Raises:
        AheadError: the stamp is more than `ahead_ms_max` milliseconds ahead of `now_ms`.
    """
    ahead_ms = unix_ms_of(stamp) - now_ms
    if ahead_ms > ahead_ms_max:
        raise AheadError(f"stamp {stamp} is {ahead_ms} ms ahead of our clock, limit {ahead_ms_max}")
