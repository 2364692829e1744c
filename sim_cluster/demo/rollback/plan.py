"""When the feed is bad: the chapter's stream, its three faults, and how its nodes judge the model meanwhile.

Everything takes minutes that would take hours or days: requests are some hundreds a second where a service has tens of
thousands, so windows are of seconds, the baseline is half a minute old and gets a large share of the requests. Bounds and
precision were chosen on the stream without faults, on which nothing may be called corrupted.
"""

from dataclasses import dataclass
from typing import Final

from sim_cluster.demo.rollback.faults import Fault, Kind

RATE: Final = 300.0  # events per second
BASELINE_SHARE: Final = 0.3
BASELINE_DELAY_S: Final = 30.0  # longer than the slowest fault takes from its first bad row until it is taken back
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
    """A fault, and the clean events before and after it, by which one sees that the model is well again."""

    kind: Kind
    before: int
    bad: int
    after: int

    @property
    def events(self) -> int:
        """Of all of it."""
        return self.before + self.bad + self.after


STAGES: Final = (
    Stage("shuffled labels", 6_000, 10_000, 4_000),
    Stage("exploding gradients", 4_000, 6_000, 4_000),
    Stage("slow drift", 4_000, 9_000, 5_000),
)
QUICK_STAGES: Final = (Stage("exploding gradients", 5_000, 5_000, 4_000),)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is streamed.

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

    def second_of(self, event: int) -> float:
        """When an event comes, counted from the start of the stream; `event` counts from the first of all."""
        return (event - self.start) / self.rate


def make_plan(events: int, stages: tuple[Stage, ...] = STAGES, rate: float = RATE) -> Plan:
    """The last of `events` are streamed, stage by stage.

    Raises:
        ValueError: they are fewer than the stages need.
    """
    stream = sum(stage.events for stage in stages)
    if stream > events:
        raise ValueError(f"the stages need {stream} events, and there are {events}")
    faults, at = [], events - stream
    for stage in stages:
        faults.append(Fault(stage.kind, at + stage.before, at + stage.before + stage.bad))
        at += stage.events
    return Plan(events - stream, stream, rate, tuple(faults))
