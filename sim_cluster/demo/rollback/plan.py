"""The chapter's stream, its three faults, and how its nodes judge the model meanwhile; `schedule` says when a fault begins.

Everything takes minutes that would take hours or days: requests are some hundreds a second where a service has tens of
thousands, so windows are of seconds, the baseline is half a minute old and gets a large share of the requests. Bounds and
precision were chosen on the stream without faults, on which nothing may be called corrupted.
"""

from dataclasses import dataclass
from typing import Final

from sim_cluster.demo.rollback.faults import Fault, Kind

RATE: Final = 300.0  # events per second
BASELINE_SHARE: Final = 0.3
BASELINE_DELAY_S: Final = 45.0  # longer than the slowest fault takes from its first bad row until it is taken back
WITNESS_DELAY_S: Final = 1.0
WINDOW_S: Final = 2.0
ROLLBACK_EVERY_S: Final = 10.0
PROBE_SHARE: Final = 0.3
LATENESS_S: Final = 1.0  # how long after an answer its label may come
LABEL_DELAY_S: Final = 0.4  # and when it does
AUC_MIN: Final = 0.6  # the stream without faults has windows of 0.62
LEVEL: Final = 0.01  # of a false alarm by the sequential test, within an hour
TOLERANCE: Final = 0.02
PRECISION: Final = 0.15


@dataclass(frozen=True, slots=True)
class Stage:
    """A fault, and the clean events before it and after its end, by which one sees that the model is well; at least so many."""

    kind: Kind
    before: int
    bad: int
    after: int

    @property
    def events(self) -> int:
        """Of all of it."""
        return self.before + self.bad + self.after


STAGES: Final = (
    Stage("shuffled labels", 4_000, 9_000, 2_000),
    Stage("exploding gradients", 3_000, 5_000, 2_000),
    Stage("slow drift", 3_000, 9_000, 3_000),
)
QUICK_STAGES: Final = (Stage("exploding gradients", 4_000, 5_000, 3_000),)
# A stage goes on until its rollback is over, so the stream may get longer than its stages by this factor.
LONGER: Final = 1.3


@dataclass(frozen=True, slots=True)
class Plan:
    """What was streamed.

    Args:
        start: index of the stream's first event; all before it are learnt offline.
        events: of the stream.
        rate: events per second.
        faults: by index of the event, counted from the first of all.
    """

    start: int
    events: int
    rate: float
    faults: tuple[Fault, ...]

    @property
    def seconds(self) -> float:
        """How long the stream takes."""
        return self.events / self.rate


def events_of(stages: tuple[Stage, ...]) -> int:
    """The longest that the stream gets."""
    return int(LONGER * sum(stage.events for stage in stages))


def stream_start(events: int, stages: tuple[Stage, ...] = STAGES) -> int:
    """Index of the stream's first event; the last of `events` are streamed, as many of them as the stages come to need.

    Raises:
        ValueError: they are fewer than the stages need at most.
    """
    if (stream := events_of(stages)) > events:
        raise ValueError(f"the stages need {stream} events, and there are {events}")
    return events - stream
