"""Whose silence means something: phi-accrual suspicion over flat arrays, with a local-health correction.

Intuition. A friend who phones every evening and has not called for three days worries us; one who phones once a month does
not. So silence is measured in the friend's own rhythm. And if it was our phone that was switched off, nobody is to blame.

Model. `interval_ms` is the moving mean of the time between two advances of a member's heartbeat counter *as seen here*, over
whatever paths gossip takes. If arrivals were memoryless with that mean, a silence of t would be as rare as e^(-t / mean), and
`phi = -log10` of that rarity. A member is suspected where

    phi = silence / (expected * ln 10) >= PHI_MAX * (1 + health)

where `expected` is half the member's own interval and half the mean over all living ones, since a single member's is noisy and
in one cluster all should be alike. PHI_MAX = 3.5 is 8 intervals: 4 s where a counter advances with each beat of 500 ms, 5 to
8 s in a calm cluster of 100 nodes, 9 to 13 s of it where half of all messages are lost. Nobody is suspected sooner than 4 s,
since the mean is held above one beat. Real gossip has several paths, so its tail is far lighter than the exponential one,
which errs on the side of patience: `scripts/bench membership` looks for false suspicions in ten minutes with 20 % loss.

Local health (Lifeguard). Time in which this process did not run (its timer fired late) is no silence of the others: it is
added to what was heard last. Besides, each beat that came late, or in which nobody at all of several was heard, raises
`health` by one (to HEALTH_MAX), and a good beat lowers it: a sick node waits up to five times as long before it accuses.

Returns. A member that comes back from suspicion is alive at once. One that keeps doing so flaps, and each return costs all
trees a change; from the third within FLAP_FORGET_MS on it is held out of the trees, for twice as long each time.

Rejected. A fixed time-out (either slow at 6 nodes or wrong at 1,000, where a counter passes by only every few beats). A normal
distribution (Hayashibara's own): with steady beats its deviation goes to zero and a hiccup condemns, so it needs a floor that
then does all the work. SWIM's ping-req: a second protocol, where gossiped counters already are the indirect path.

Sources: Hayashibara et al., "The phi accrual failure detector", 2004; Cassandra's and chitchat's exponential variant of it;
Dadgar et al., "Lifeguard: local health awareness for more accurate failure detection", 2018.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p import loops
from p2p.replica import U64

# Each node counts its heartbeat up, and gossips, once an interval. Eight make a suspicion, so it takes seconds.
HEARTBEAT_MS: Final = 500
PHI_MAX: Final = 3.5
SILENCE_INTERVALS: Final = PHI_MAX * math.log(10)
# A mean beyond it is not believed: a member that we hear of every 6 s, in however large a cluster, is in trouble.
INTERVAL_MS_MAX: Final = 6_000
# The mean forgets with this many samples; a new member's prior counts for a few, so that one odd first gap is not the mean.
INTERVAL_SAMPLES: Final = 32
PRIOR_SAMPLES: Final = 4
# What others tell of a member may be so far ahead of what we know, heartbeats as well as changes of its record: nine hours of
# heartbeats, since a process may have stood still for long. More is a lie; the first counter of a life is believed as it is.
AHEAD_MAX: Final = 1 << 16
RHYTHM: Final = loops.Rhythm(HEARTBEAT_MS, INTERVAL_MS_MAX, INTERVAL_SAMPLES, PRIOR_SAMPLES, AHEAD_MAX)
# Who told us of itself so lately has neither left nor moved because others say so: the shortest silence that makes a suspicion.
DIRECT_MS: Final = int(HEARTBEAT_MS * SILENCE_INTERVALS)
HEALTH_MAX: Final = 4
# Re-examining every member is a handful of vector operations; deadlines are met within this, or within a beat where patience
# has shrunk since we last looked.
ASSESS_MS: Final = 100
_NEVER: Final = np.iinfo(np.int64).max
# A restart or two, or a short outage, is normal operation.
FREE_RETURNS: Final = 2
FLAP_HOLD_MS: Final = 5_000
FLAP_DOUBLINGS_MAX: Final = 4
FLAP_FORGET_MS: Final = 300_000
# What peers said of the time counts for so long. Two minutes of a bad crystal are 0.02 s, so old news is as good.
CLOCK_LIFE_MS: Final = 60_000
SLOTS_MIN: Final = 16

_FIELDS: Final[dict[str, Any]] = {
    "used": np.bool_,  # the slot belongs to a member
    "gone": np.bool_,  # it left on purpose
    "suspect": np.bool_,
    "deaf": np.bool_,  # it says that it hears nobody
    "near": np.bool_,  # it is in our region
    "place": np.uint64,  # in the rings
    "boot": np.uint64,
    "version": np.uint64,  # of its record
    "shape": np.uint8,  # the protocol version in whose shape its record was told
    "short": np.bool_,  # that shape leaves out what the record of this version says
    "beats": np.uint64,  # the largest heartbeat counter heard of
    "heard_ms": np.int64,  # monotonic; when that was, plus the time in which we did not run
    "interval_ms": np.float64,
    "samples": np.int32,
    "told": np.int32,  # how often we passed the counter on since it advanced
    "news": np.int32,  # how often the record is still to be told
    "returns": np.int32,  # from suspicion, lately
    "returned_ms": np.int64,  # the last of them
    "readmit_ms": np.int64,  # not in the trees before
    "clock_ms": np.int64,  # its wall clock minus our monotonic one
    "clock_heard_ms": np.int64,
    "direct_ms": np.int64,  # when this life last told us of itself, over its own link
}


class Suspicion:
    """One slot a member, one array a fact; a slot is reused when its member is forgotten."""

    used: NDArray[np.bool_]
    gone: NDArray[np.bool_]
    suspect: NDArray[np.bool_]
    deaf: NDArray[np.bool_]
    near: NDArray[np.bool_]
    place: U64
    boot: U64
    version: U64
    shape: NDArray[np.uint8]
    short: NDArray[np.bool_]
    beats: U64
    heard_ms: NDArray[np.int64]
    interval_ms: NDArray[np.float64]
    samples: NDArray[np.int32]
    told: NDArray[np.int32]
    news: NDArray[np.int32]
    returns: NDArray[np.int32]
    returned_ms: NDArray[np.int64]
    readmit_ms: NDArray[np.int64]
    clock_ms: NDArray[np.int64]
    clock_heard_ms: NDArray[np.int64]
    direct_ms: NDArray[np.int64]

    def __init__(self) -> None:
        for name, dtype in _FIELDS.items():
            setattr(self, name, np.zeros(SLOTS_MIN, dtype))
        self._free = list(range(SLOTS_MIN - 1, -1, -1))
        self.health = 0
        self.changed = True  # who is alive or may be in the trees has changed; the reader resets it
        self._assess_ms = 0
        self._assessed_ms = 0
        self._places: tuple[U64, NDArray[np.int64]] | None = None
        self._clock: tuple[int, int] = 0, 0  # the others' wall clock minus our monotonic one, and how many they are
        self._clock_until_ms = 0

    def take(self, boot: int, version: int, beats: int, prior_ms: float, now_ms: int) -> int:
        """A slot for a new member, heard of now."""
        if not self._free:
            size = len(self.used)
            for name in _FIELDS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
            self._free = list(range(2 * size - 1, size - 1, -1))
        slot = self._free.pop()
        self.used[slot] = True
        self.clock_heard_ms[slot] = -CLOCK_LIFE_MS
        self.renew(slot, boot, version, beats, prior_ms, now_ms)
        return slot

    def renew(self, slot: int, boot: int, version: int, beats: int, prior_ms: float, now_ms: int) -> None:
        """The member began a life. That counts as a return: a node that restarts all the time flaps too."""
        if self.samples[slot] or self.suspect[slot]:
            self._note_returns(np.array([slot]), now_ms)
        self.boot[slot], self.version[slot], self.beats[slot] = boot, version, beats
        self.gone[slot] = self.suspect[slot] = self.deaf[slot] = False
        self.heard_ms[slot], self.interval_ms[slot] = now_ms, min(max(prior_ms, HEARTBEAT_MS), INTERVAL_MS_MAX)
        self.samples[slot] = self.told[slot] = 0
        self.direct_ms[slot] = -_NEVER
        self._places = None
        self.changed = True

    def drop(self, slot: int) -> None:
        """Forget a member."""
        for name in _FIELDS:
            getattr(self, name)[slot] = 0
        self._free.append(slot)
        self._places = None
        self.changed = True

    @property
    def alive(self) -> NDArray[np.bool_]:
        """bool[slots]: members that are neither suspected nor gone."""
        mask: NDArray[np.bool_] = self.used & ~self.gone & ~self.suspect
        return mask

    def slots_of(self, boots: U64) -> NDArray[np.int64]:
        """int64[n]: the slot of each life, -1 for one that is not known."""
        if self._places is None:
            slots = np.flatnonzero(self.used)
            order = np.argsort(self.boot[slots])
            self._places = self.boot[slots][order], slots[order]
        known, slots = self._places
        if not len(known):
            return np.full(len(boots), -1, np.int64)
        places = np.minimum(np.searchsorted(known, boots), len(known) - 1)
        return np.where(known[places] == boots, slots[places], -1)

    def hear(self, slots: NDArray[np.int64], beats: U64, now_ms: int) -> None:
        """Counters came, directly or by hearsay; those that advanced prove life.

        Args:
            slots: int64[n], of members; -1: of nobody that we know.
            beats: uint64[n].
            now_ms: monotonic.
        """
        if self._take_counters(slots, beats, now_ms):
            return
        returned = (slots >= 0) & (beats > self.beats[slots]) & ~self.gone[slots] & self.suspect[slots]
        returned &= (beats - self.beats[slots] <= AHEAD_MAX) | (self.samples[slots] == 0)
        back = slots[returned]
        # The rhythm is that of a living member: the gap of an outage is not part of it.
        self.beats[back] = beats[returned]
        self.heard_ms[back] = now_ms
        self.told[back] = 0
        self.suspect[back] = False
        self.changed = True
        if not self.health:  # else it may be we who were away
            self._note_returns(back, now_ms)
        self._take_counters(slots[~returned], beats[~returned], now_ms)

    def _take_counters(self, slots: NDArray[np.int64], beats: U64, now_ms: int) -> bool:
        """Take those of members that are not suspected; False, and nothing done, when one is."""
        return loops.used.hear(
            slots,
            beats,
            now_ms,
            RHYTHM,
            self.beats,
            self.gone,
            self.suspect,
            self.samples,
            self.interval_ms,
            self.heard_ms,
            self.told,
        )

    def hear_one(self, slot: int, beat: int, now_ms: int) -> None:
        """`hear` of one member: each heartbeat brings its sender's own counter, and a vector of one costs ten times as much."""
        if beat <= self.beats[slot] or self.gone[slot]:
            return
        if beat - int(self.beats[slot]) > AHEAD_MAX and self.samples[slot]:
            return  # a lie
        if self.suspect[slot]:
            self.hear(np.array([slot]), np.array([beat], np.uint64), now_ms)
            return
        samples, mean = int(self.samples[slot]), float(self.interval_ms[slot])
        gap = min(now_ms - int(self.heard_ms[slot]), INTERVAL_MS_MAX)
        mean += 1.0 / min(samples + PRIOR_SAMPLES, INTERVAL_SAMPLES) * (gap - mean)
        self.interval_ms[slot] = min(max(mean, HEARTBEAT_MS), INTERVAL_MS_MAX)
        self.samples[slot] = samples + 1
        self.beats[slot], self.heard_ms[slot], self.told[slot] = beat, now_ms, 0

    def hear_directly(self, slot: int, beat: int, now_ms: int) -> None:
        """A member told us of itself: its own word counts, whatever impossible counter others have told us."""
        self.direct_ms[slot] = now_ms
        if abs(int(self.beats[slot]) - beat) > AHEAD_MAX:
            self.beats[slot] = max(beat - 1, 0)

    def ever_direct(self, slot: int) -> bool:
        """Whether this life has told us of itself."""
        return int(self.direct_ms[slot]) > -_NEVER

    def come_back(self, slot: int, now_ms: int) -> None:
        """A member had not left after all."""
        self.gone[slot] = self.suspect[slot] = False
        self.heard_ms[slot] = now_ms
        self.changed = True

    def heard_directly(self, slot: int, now_ms: int) -> bool:
        """Whether this life has told us of itself so lately that others cannot know better."""
        return now_ms - int(self.direct_ms[slot]) < DIRECT_MS

    def _note_returns(self, slots: NDArray[np.int64], now_ms: int) -> None:
        stale = now_ms - self.returned_ms[slots] >= FLAP_FORGET_MS
        self.returns[slots] = np.where(stale, 1, self.returns[slots] + 1)
        self.returned_ms[slots] = now_ms
        over = self.returns[slots] - FREE_RETURNS
        hold = FLAP_HOLD_MS << np.clip(over - 1, 0, FLAP_DOUBLINGS_MAX)
        self.readmit_ms[slots] = np.where(over > 0, now_ms + hold, 0)

    def excuse(self, late_ms: int) -> None:
        """We did not run for so long: nobody's silence."""
        self.heard_ms += late_ms
        self.health = min(self.health + 1, HEALTH_MAX)

    def judge(self, good: bool) -> None:
        """A beat of ours ended: did it go as it should?"""
        self.health = max(self.health - 1, 0) if good else min(self.health + 1, HEALTH_MAX)

    def assess(self, now_ms: int) -> None:
        """Suspect who has been silent too long. Cheap to call often."""
        if now_ms < self._assess_ms:
            return
        due_ms, alive = self.heard_ms + self.patience_ms(), self.alive
        late = alive & (due_ms <= now_ms)
        if late.any():
            self.suspect |= late
            self.changed = True
        held = self.used & (self.readmit_ms > self._assessed_ms)
        if (held & (self.readmit_ms <= now_ms)).any():
            self.changed = True
        self._assessed_ms = now_ms
        # Nobody is late before the first of these moments, as long as patience does not shrink: soon enough to look again.
        readmit_ms = self.readmit_ms[held & (self.readmit_ms > now_ms)].min(initial=_NEVER)
        next_ms = min(due_ms[alive & ~late].min(initial=np.inf), float(readmit_ms))
        self._assess_ms = now_ms + int(min(max(next_ms - now_ms, ASSESS_MS), HEARTBEAT_MS))

    def silence_max(self, now_ms: int) -> float:
        """The longest silence among the living, as a fraction of what makes a suspicion."""
        return float(((now_ms - self.heard_ms) / self.patience_ms())[self.alive].max(initial=0.0))

    def patience_ms(self) -> NDArray[np.float64]:
        """float64[slots]: the silence at which each member is suspected."""
        alive = self.alive
        pool = float(self.interval_ms[alive].mean()) if alive.any() else HEARTBEAT_MS
        expected: NDArray[np.float64] = (self.interval_ms + pool) * (SILENCE_INTERVALS * (1 + self.health) / 2)
        return expected

    def in_trees(self, now_ms: int) -> NDArray[np.bool_]:
        """bool[slots]: alive, hearing, and not held out for flapping."""
        mask: NDArray[np.bool_] = self.alive & ~self.deaf & (self.readmit_ms <= now_ms)
        return mask

    def counters(self, count_max: int, rotation: int) -> tuple[U64, U64]:
        """Counters to pass on: of living members, those first that were passed on the least since they advanced.

        Args:
            count_max: how many at most.
            rotation: breaks ties; draw it anew each time.

        Returns:
            boots uint64[n] and counters uint64[n].
        """
        slots = np.flatnonzero(self.alive)
        if len(slots) > count_max:
            rank = self.told[slots].astype(np.int64) * len(slots) + (np.arange(len(slots)) + rotation) % len(slots)
            slots = np.sort(slots[np.argpartition(rank, count_max)[:count_max]])
        self.told[slots] += 1
        return self.boot[slots], self.beats[slots]

    def versions_held(self) -> U64:
        """uint64 by slot: up to which version we have all of a record; of one that came short, the one before its own.

        Digests are to differ from those of who has all of it, or nobody would tell us the rest.
        """
        return self.version - self.short

    def digest(self) -> int:
        """64 bits over (boot, version held) of the living; nodes with equal registers have equal ones."""
        alive = self.alive
        return int(np.bitwise_xor.reduce(mix(self.boot[alive], self.versions_held()[alive]), initial=np.uint64(0)))

    def note_clock(self, slot: int, unix_ms: int, now_ms: int) -> None:
        """A member said what time it is."""
        self.clock_ms[slot] = unix_ms - now_ms
        self.clock_heard_ms[slot] = now_ms
        self._clock_until_ms = now_ms

    def clock_error_ms(self, unix_ms: int, now_ms: int) -> tuple[int, int]:
        """How far our wall clock is ahead of the median of those who told us theirs lately, and how many they are (R14).

        Theirs are kept against our monotonic clock, so a step of our own wall clock shows at once.
        """
        if now_ms >= self._clock_until_ms:  # asked at every publish, and a median takes 76 us
            clocks = self.clock_ms[self.used & (now_ms - self.clock_heard_ms < CLOCK_LIFE_MS)]
            self._clock = (int(np.median(clocks)), len(clocks)) if len(clocks) else (0, 0)
            self._clock_until_ms = now_ms + HEARTBEAT_MS
        offset_ms, count = self._clock
        return (unix_ms - (offset_ms + now_ms) if count else 0), count


def mix(boots: U64, versions: U64) -> U64:
    """uint64[n]: a hash of each pair (the Murmur3 finaliser; overflow wraps, as it should)."""
    value = boots ^ (versions * np.uint64(0x9E3779B97F4A7C15))
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        value = value ^ (value >> np.uint64(shift))
        value = value * np.uint64(factor)
    mixed: U64 = value ^ (value >> np.uint64(33))
    return mixed
