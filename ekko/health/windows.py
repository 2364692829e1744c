"""From events to windows of event time: what belongs together, when it is complete, and what came too late.

An event is of the moment at which the model answered, whenever its label came. The *watermark* is the moment before which
nothing is expected any more (the Dataflow model): the newest event so far, less `lateness`. It stands still while labels
stall, for at most `PATIENCE_MS` beyond that; then the clock moves it, so that a quiet model is not waited for. A window
that the watermark has passed is closed and summed up; an event of a closed window is late: counted, and not looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.health.samples import OwnMetric, Sample, own_values, samples_of
from ekko.health.traffic import ARMS

# How long a stall of the labels is waited for.
PATIENCE_MS: Final = 60_000
# A scorer's clock may be ahead of the node's by so much; beyond it, its events are refused, or they would push the watermark.
AHEAD_MS_MAX: Final = 5_000
# Open at once. With windows of 10 s and a lateness of an hour, the most that is sensible, there are 366.
WINDOWS_OPEN_MAX: Final = 512
# Samples of open windows that one node has, of all models: 268 MB. Those of an hour by 10 s of one model with all segments fit.
SAMPLES_OPEN_MAX: Final = 32_768
# Segments of one model; further ones count as `OTHER`, so that an id in the place of a segment costs no memory.
SEGMENTS_MAX: Final = 32
OTHER: Final = "other"

F32 = NDArray[np.float32]
Pair = tuple[Sample, Sample]  # online, baseline
Key = tuple[int, str]  # arm, segment


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """Answers of a model with their labels, as columns; those of one segment."""

    at_ms: NDArray[np.int64]  # [n], Unix milliseconds of the answer
    prediction: F32  # [n], from 0 to 1
    label: F32  # [n], from 0 to 1
    weight: F32  # [n], above 0
    arm: NDArray[np.uint8]  # [n], `ekko.health.traffic.ONLINE` or `BASELINE`
    segment: str = ""  # empty: in none

    def __len__(self) -> int:
        return len(self.at_ms)

    def chosen(self, which: NDArray[np.bool_]) -> "Events":
        """Some of them."""
        values = self.prediction[which], self.label[which], self.weight[which]
        return Events(self.at_ms[which], *values, self.arm[which], self.segment)


@dataclass(frozen=True, slots=True)
class Closed:
    """One window that is complete on this node."""

    window: int  # it begins at window * window_ms
    arms: Pair
    total: float  # events of the windows that were closed up to this one
    segments: Mapping[str, Pair]


@dataclass(slots=True)
class Windows:
    """Windows of one model on one node.

    Args:
        window_ms: how long one is.
        lateness_ms: how long after the answer a label may come.
        own: the user's own metric.
    """

    window_ms: int
    lateness_ms: int
    own: OwnMetric | None = None
    late: int = 0  # events of closed windows
    ahead: int = 0  # of the future
    taken: int = 0
    refused: int = 0  # the user's metric failed, or there was no room
    samples: int = 0  # of open windows
    _open: dict[int, dict[Key, Sample]] = field(default_factory=dict)
    _newest_ms: int = 0  # event so far
    _closed: float = 0.0  # events of closed windows
    _next: int = 0  # no window below it is open any more
    _segments: dict[str, int] = field(default_factory=dict)  # the newest window that has each

    @property
    def open(self) -> int:
        """How many windows are open."""
        return len(self._open)

    def add(self, events: Events, now_ms: int, room: int = SAMPLES_OPEN_MAX) -> None:
        """Take events, Unix milliseconds now; `room`: for how many samples more there is memory.

        Raises:
            ModelError: the user's metric fails, or there is no room; nothing is taken.
        """
        good = events.at_ms <= now_ms + AHEAD_MS_MAX
        windows = events.at_ms // self.window_ms
        in_time = windows >= max(self._next, (now_ms - self.lateness_ms) // self.window_ms + 1 - WINDOWS_OPEN_MAX)
        ahead, late = int((~good).sum()), int((good & ~in_time).sum())
        good &= in_time
        if good.any():
            try:
                self._take(events.chosen(good), windows[good], now_ms, room)
            except ModelError:
                self.refused += len(events)
                raise
        self.ahead += ahead
        self.late += late

    def _take(self, events: Events, windows: NDArray[np.int64], now_ms: int, room: int) -> None:
        found, group = np.unique(windows * len(ARMS) + events.arm, return_inverse=True)
        places = [divmod(place, len(ARMS)) for place in found.tolist()]  # window, arm
        new = sum((arm, "") not in self._open.get(window, {}) for window, arm in places)
        if new > room:
            raise ModelError(
                f"there is no room for {new} open windows more: have labels come sooner, or make health.window longer or "
                "health.lateness shorter"
            )
        own = None if self.own is None else own_values(self.own, events.prediction, events.label, events.weight)
        columns = events.prediction, events.label, events.weight
        segment, opened = self._known(events.segment, places[-1][0]), 0
        for (window, arm), sample in zip(places, samples_of(*columns, own, group, len(places)), strict=True):
            samples = self._open.setdefault(window, {})
            for name in ("", segment) if segment else ("",):
                before = samples.get((arm, name))
                if before is None:
                    if name and opened >= room:
                        continue  # what segments are like is not judged
                    self.samples, opened = self.samples + 1, opened + 1
                samples[arm, name] = sample if before is None else before + sample
        self.taken += len(events)
        # An event of the future, by another clock, must not close the windows of the present for all others.
        self._newest_ms = max(self._newest_ms, min(now_ms, int(events.at_ms.max())))

    def watermark_ms(self, now_ms: int) -> int:
        """Nothing is expected of before this moment."""
        return max(self._newest_ms - self.lateness_ms, now_ms - self.lateness_ms - PATIENCE_MS)

    def close(self, now_ms: int) -> list[Closed]:
        """The windows that the watermark has passed since the last call, in order of time."""
        end = self.watermark_ms(now_ms) // self.window_ms
        ready = sorted(window for window in self._open if window < end)
        # Whatever clocks do, no more than so many stay open.
        over = sorted(self._open)[: max(0, len(self._open) - WINDOWS_OPEN_MAX)]
        closed = []
        for window in sorted({*ready, *over}):
            samples = self._open.pop(window)
            self.samples -= len(samples)
            names = dict.fromkeys(name for _, name in samples)
            pairs = {name: self._pair(samples, name) for name in names}
            arms = pairs.pop("")
            self._closed += arms[0].events + arms[1].events
            closed.append(Closed(window, arms, self._closed, pairs))
        self._next = max([self._next, end, *(one.window + 1 for one in closed)])
        return closed

    @staticmethod
    def _pair(samples: Mapping[Key, Sample], segment: str) -> Pair:
        online, baseline = (samples.get((arm, segment), Sample()) for arm in range(len(ARMS)))
        return online, baseline

    def _known(self, segment: str, window: int) -> str:
        if not segment:
            return segment
        if segment not in self._segments and len(self._segments) >= SEGMENTS_MAX:
            # Of those that no open window has, others may take the place.
            self._segments = {name: newest for name, newest in self._segments.items() if newest >= self._next}
            if len(self._segments) >= SEGMENTS_MAX:
                return OTHER
        self._segments[segment] = max(window, self._segments.get(segment, 0))
        return segment
