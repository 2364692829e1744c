"""How many bytes a second of updates may go from our region to another: a token bucket for each pair, shared fairly.

Intuition. Whoever is in a data centre uses the same cable to the next one. A *rate* says how much of it updates may have; what
is left is for everybody else, inference first, whose packets never wait behind ours. A bucket gets as many tokens a second and
holds those of `BURST_MS`; a message may leave while the bucket is not empty, and takes as many tokens as it has bytes. It may
take more than there are: then nothing leaves until the debt is paid, so a message of any size passes, and the rate holds over
any stretch of time but for one message and the burst.

The rate is the pair's, each way, whoever sends. Several nodes of a region that want to send over it share it by demand
(`p2p.link.sharing` tells them of each other): who wants less than an equal share gets what it wants, and what that leaves is
divided among the others in the same way (max-min fairness). Who sends alone has all of it.

Charged is what travels in sessions: batches, answers to pulls and rounds, state chunks, rows fetched by key. Not charged are
heartbeats, acknowledgements, questions and gossip: small, of bounded rate, and without them nobody would know who lives. The
network carries compressed messages, but how small one gets is known only when it is sent: it is charged in full, and what was
saved comes back then (`messages.SentSmaller`). So the rate is that of bytes on the wire, never exceeded meanwhile.

Pure: time is an argument, and moves with `Budgets.advance` once an event.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

# Tokens that a bucket may save up: what an event loop that is late by so much would have sent.
BURST_MS: Final = 50
# What a message has besides keys, values and stamps: envelope, header, names. TCP's and the cipher's own are not counted.
MESSAGE_BYTES: Final = 256
# For each shard that a batch touches: number, previous stamp, part and parts.
CLAIM_BYTES: Final = 16
# The slowest and the fastest rate of a pair, bytes a second: 8 kbit/s and 8 Tbit/s.
RATE_MIN: Final = 1_000.0
RATE_MAX: Final = 1e12
# Pairs with our region for which a rate is set.
REGIONS_MAX: Final = 4_096
# Bytes a second that a node wants that was refused something: as many as it can get.
ALL: Final = (1 << 64) - 1
# Who does not need all of its share may find that it does: it keeps so many times what it used last.
HEADROOM: Final = 1.25


@dataclass(slots=True, eq=False)
class Bucket:
    """Our part of what updates may use from our region to another one. Rates are bytes a millisecond."""

    region: str
    pair_rate: float
    rate: float  # our share of it
    at_ms: int
    level: float = 0.0  # tokens; below 0 a debt
    wanted: bool = False  # something found no tokens, since `Budgets.take_refilled` said last that there are some
    refused: bool = False  # the same, since the shares were worked out last
    used: int = 0  # bytes charged so far
    waits: int = 0  # how often something found no tokens
    used_before: int = 0  # as of when the shares were worked out last

    @property
    def burst(self) -> float:
        """The most tokens it holds."""
        return self.rate * BURST_MS

    def advance(self, now_ms: int) -> None:
        """Time has passed."""
        if now_ms > self.at_ms:
            self.level = min(self.burst, self.level + self.rate * (now_ms - self.at_ms))
            self.at_ms = now_ms

    def has_tokens(self) -> bool:
        """Whether a message may leave; remembers that one wanted to, if not."""
        if self.level > 0:
            return True
        if not self.wanted:
            self.wanted = True
            self.waits += 1
        self.refused = True
        return False

    def take(self, count: int) -> None:
        """A message leaves."""
        self.level -= count
        self.used += count

    def give_back(self, count: int) -> None:
        """It turned out smaller by so much."""
        self.level = min(self.burst, self.level + count)
        self.used -= count

    @property
    def ready_ms(self) -> int:
        """When there are tokens."""
        return self.at_ms if self.level > 0 else self.at_ms + int(-self.level / self.rate) + 1

    def share(self, rate: float) -> None:
        """Our share is another one from now on."""
        self.rate = rate
        self.level = min(self.burst, self.level)


@dataclass(slots=True, eq=False)
class Budgets:
    """All buckets of a node, by the other region. Without a rate for a pair there is none, and no limit."""

    region: str
    buckets: dict[str, Bucket] = field(default_factory=dict)

    def set_rate(self, region: str, bytes_per_s: float | None, now_ms: int) -> bool:
        """Have another rate from now on; None: no limit. True when there is a bucket now that was not, or none where one was.

        A debt stays, and is paid at the new rate: who sets a rate again and again gains nothing.
        """
        bucket = self.buckets.get(region)
        if bytes_per_s is None or region == self.region:
            return self.buckets.pop(region, None) is not None
        rate = min(max(bytes_per_s, RATE_MIN), RATE_MAX) / 1_000
        if bucket is None:
            if len(self.buckets) >= REGIONS_MAX:
                return False
            self.buckets[region] = Bucket(region, rate, rate, now_ms, rate * BURST_MS)
            return True
        bucket.advance(now_ms)
        bucket.share(rate * bucket.rate / bucket.pair_rate)
        bucket.pair_rate = rate
        return False

    def advance(self, now_ms: int) -> None:
        """Time has passed; once for each event."""
        for bucket in self.buckets.values():
            bucket.advance(now_ms)

    def next_ms(self) -> int | None:
        """When there are tokens for something that found none."""
        if not self.buckets:  # as a rule; asked after every event
            return None
        waits = [bucket.ready_ms for bucket in self.buckets.values() if bucket.wanted]
        return min(waits) if waits else None

    def take_refilled(self) -> list[Bucket]:
        """Buckets that have tokens again for what found none."""
        if not self.buckets:
            return []
        refilled = [bucket for bucket in self.buckets.values() if bucket.wanted and bucket.level > 0]
        for bucket in refilled:
            bucket.wanted = False
        return refilled


def demand(bucket: Bucket, passed_ms: int) -> int:
    """Bytes a second that we want since this was asked last, `passed_ms` ago."""
    used, refused = bucket.used - bucket.used_before, bucket.refused
    bucket.used_before, bucket.refused = bucket.used, False
    return ALL if refused else max(0, int(used * HEADROOM * 1_000 / max(1, passed_ms)))


def fair_share(rate: float, others: Iterable[int]) -> float:
    """What is ours of a rate of which others want so much each: an equal part, and what is left of the parts of the others.

    All in bytes a second.
    """
    wanted = sorted(others)
    left = rate
    for number, want in enumerate(wanted):
        equal = left / (len(wanted) - number + 1)
        if want >= equal:
            return equal
        left -= want
    return left


def initial(region: str, rates: Mapping[str, float]) -> Budgets:
    """Those of a node that begins, with its configured rates: other region -> bytes a second."""
    budgets = Budgets(region)
    for other, bytes_per_s in rates.items():
        budgets.set_rate(other, bytes_per_s, 0)
    return budgets
