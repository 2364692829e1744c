"""Who may say that a model is bad, or good: detectors behind one interface, fed window by window.

- `sequential`: online against baseline (`ekko.health.sequential`). Corrupted, at the level of false alarms; uncertain, at a
  level fifty times as high; healthy, of a stretch over which online is surely not worse by more than `precision`.
- `watermarks`: fixed bounds of the online model's figures. Corrupted, beyond one for some windows in a row; uncertain, beyond
  one for the first; healthy, within all of them, where there is no sequential test to say so.
- `drift`: the online model's figure over time, by `river`. Uncertain: the world may have changed, and that is no fault.

What a detector says it says of an interval: corrupted from when it began, which is before anybody noticed; healthy up to where
it is proven. Whatever two of them say of one moment, the worse counts.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

from ekko.errors import ConfigError
from ekko.health.moments import Moments
from ekko.health.samples import Sample
from ekko.health.sequential import Detection, Difference, Stretch
from ekko.health.verdicts import State
from ekko.health.windows import Pair

ENTRY_POINTS: Final = "ekko.health.detectors"
# Evidence for this many times the level of false alarms makes a model uncertain.
UNCERTAIN_TIMES: Final = 50.0
# A healthy verdict is a claim on which a witness acts; one in a hundred may be early, and a later alarm takes it back.
HEALTHY_LEVEL: Final = 0.01
# Events of each arm, or of AUC its clicks and its others each, before a window says anything; fewer wait for the next.
SAMPLE_MIN: Final = 20.0
# Windows of which only one arm is known, and whose other one may come yet.
LONE_MAX: Final = 64
# Beginnings of windows that are remembered, to date a fall: a day of windows of 10 s.
STARTS_MAX: Final = 8_640
# Windows in a row beyond a fixed bound; one alone is uncertain.
BEYOND_WINDOWS: Final = 3


@dataclass(frozen=True, slots=True)
class Window:
    """One window of all nodes together."""

    number: int
    from_ms: int
    until_ms: int
    arms: Pair  # online, baseline
    late: bool = False  # windows after it were observed before: of nodes that had been cut off

    @property
    def length_ms(self) -> int:
        """Its length."""
        return self.until_ms - self.from_ms


@dataclass(frozen=True, slots=True)
class Finding:
    """What a detector has to say: a model was in a state from one moment up to another."""

    state: State
    from_ms: int
    until_ms: int
    text: str


class Detector(Protocol):
    """One opinion on one model. Windows come in order of time; empty ones do not come.

    One that has an attribute `takes_late`, which is true, also gets late windows, of times that it has observed already: what
    nodes tell that had been cut off. What one arm says, those nodes have judged themselves; it is comparisons that lack them.
    """

    name: str

    def observe(self, window: Window) -> list[Finding]:
        """What is to be said after this window."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What detectors are made from (`[health]`)."""

    metric: str = "auc"
    level: float = 0.001
    horizon_windows: int = 8_640
    tolerance: float = 0.005  # online may be worse than the baseline by so much
    precision: float = 0.02  # healthy: surely not worse by more than this
    bounds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)  # figure -> lowest, highest
    drift_method: str = "adwin"
    events_min: int = 100
    bounds_prove: bool = False  # whether to be within all bounds is enough to be healthy


class Sequential:
    """Online against baseline; see `ekko.health.sequential` for the guarantee.

    An alarm spends the evidence: the test begins anew, so that a model that recovers can be found healthy, and one that does
    not is found corrupted again. Healthy is said of a stretch one stretch late, when the next one has not put it in doubt: a
    drop in its last windows would not show in its mean.
    """

    name = "sequential"
    takes_late = True  # evidence adds up in any order, and the guarantee is of the order in which it comes

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._scale = Sample().quality(settings.metric)[1]
        self._difference = Difference(self._scale, SAMPLE_MIN)
        self._starts: deque[int] = deque(maxlen=STARTS_MAX)  # of what was judged lately: where each began
        self._taken = 0  # how many were ever judged
        self._until_ms = 0  # of the newest window
        self._lone: dict[int, Pair] = {}  # windows of which there was one arm only
        self._waiting_ms: int | None = None  # where what waits for more events began
        self._begin()

    def _begin(self) -> None:
        self._detection = Detection(self._settings.horizon_windows, self._scale, -self._settings.tolerance)
        self._doubted()

    def _doubted(self) -> None:
        """What was about to be found healthy is not."""
        self._stretch = Stretch(self._scale)
        self._stretch_ms: int | None = None
        self._proven: tuple[int, int] | None = None  # the stretch before this one

    def observe(self, window: Window) -> list[Finding]:
        """See `Detector`."""
        self._until_ms = max(self._until_ms, window.until_ms)
        both = self._both(window)
        if both is None:
            return []
        begin_ms = window.from_ms if self._waiting_ms is None else min(self._waiting_ms, window.from_ms)
        step = self._difference.take(*both)
        self._waiting_ms = begin_ms if step is None else None
        if step is None:
            return []
        self._starts.append(begin_ms)
        self._detection.add(self._taken, *step)
        self._taken += 1
        return self._bad(window) or self._good(window, begin_ms, step)

    def _both(self, window: Window) -> tuple[Moments, Moments] | None:
        """What both arms say of a window, with what came of it before; None: one of them is not there, and may come."""
        before = self._lone.pop(window.number, (Sample(), Sample()))
        arms = before[0] + window.arms[0], before[1] + window.arms[1]
        online, baseline = (arm.quality(self._settings.metric)[0] for arm in arms)
        if online.count and baseline.count:
            return online, baseline
        self._lone[window.number] = arms
        if len(self._lone) > LONE_MAX:
            del self._lone[min(self._lone)]
        return None

    def _bad(self, window: Window) -> list[Finding]:
        evidence, settings = self._detection.log_evidence, self._settings
        if evidence < -math.log(min(1.0, UNCERTAIN_TIMES * settings.level)):
            return []
        # Of what came since then the earliest, and a window before that: what is in that one may have begun at its end.
        since = list(self._starts)[-max(1, self._taken - max(0, self._detection.began)) :]
        began_ms = max(0, min(since) - window.length_ms)
        odds = f"evidence {math.exp(min(evidence, 100.0)):.3g} : 1"
        text = f"{settings.metric} of online is below the baseline's by more than {settings.tolerance:g}, {odds}"
        if evidence < -math.log(settings.level):
            self._doubted()
            return [Finding("uncertain", window.from_ms, window.until_ms, text)]
        self._begin()
        return [Finding("corrupted", began_ms, self._until_ms, text)]

    def _good(self, window: Window, begin_ms: int, step: tuple[float, float, float]) -> list[Finding]:
        self._stretch_ms = begin_ms if self._stretch_ms is None else min(self._stretch_ms, begin_ms)
        self._stretch.add(*step)
        mean, radius = self._stretch.mean, self._stretch.radius(HEALTHY_LEVEL)
        if mean - radius <= -self._settings.precision:
            return []
        proven, self._proven = self._proven, (self._stretch_ms, self._until_ms)
        self._stretch, self._stretch_ms = Stretch(self._scale), None
        if proven is None:
            return []
        return [
            Finding("healthy", *proven, f"{self._settings.metric} of online less the baseline's: {mean:+.4f} +- {radius:.4f}")
        ]


class Watermarks:
    """Fixed bounds: what no healthy model does, baseline or not."""

    name = "watermarks"

    def __init__(self, settings: Settings) -> None:
        self._bounds = settings.bounds
        self._prove = settings.bounds_prove and bool(settings.bounds)
        self._events_min = settings.events_min
        self._beyond: list[Window] = []  # in a row
        self._before: Window | None = None  # the last one within all bounds, that no later one has confirmed yet

    def observe(self, window: Window) -> list[Finding]:
        """See `Detector`."""
        online = window.arms[0]
        if online.events < self._events_min:
            return []
        broken = self._broken(online.figures())
        if broken:
            self._before = None
            self._beyond = [*self._beyond[-BEYOND_WINDOWS:], window]
            if len(self._beyond) < BEYOND_WINDOWS:
                return [Finding("uncertain", window.from_ms, window.until_ms, broken)]
            # The window before the first: what is in it may have begun at its end.
            began = self._beyond[0].from_ms - window.length_ms
            return [Finding("corrupted", began, window.until_ms, f"{broken} for {BEYOND_WINDOWS} windows or more")]
        self._beyond = []
        proven, self._before = self._before, window
        if proven is None or not self._prove:
            return []
        return [Finding("healthy", proven.from_ms, proven.until_ms, "within all bounds, and the window after it")]

    def _broken(self, figures: Mapping[str, float | None]) -> str:
        for name, (low, high) in self._bounds.items():
            value = figures.get(name)
            if value is None:
                continue
            if low is not None and value < low:
                return f"{name} is {value:.4f}, below {low:g}"
            if high is not None and value > high:
                return f"{name} is {value:.4f}, above {high:g}"
        return ""


class Drift:
    """`river`'s detectors on the online model's figure."""

    name = "drift"

    def __init__(self, settings: Settings) -> None:
        try:
            from river import drift
        except ImportError:
            raise ConfigError("health.detectors: 'drift' needs river: pip install 'ekko[health]'") from None
        methods: dict[str, Callable[[], Any]] = {
            "adwin": drift.ADWIN,
            "page_hinkley": drift.PageHinkley,
            "kswin": lambda: drift.KSWIN(seed=0),
        }
        self._settings = settings
        self._method = methods[settings.drift_method]()

    def observe(self, window: Window) -> list[Finding]:
        """See `Detector`."""
        sample, _ = window.arms[0].quality(self._settings.metric)
        if sample.size < SAMPLE_MIN:
            return []
        self._method.update(sample.mean)
        if not self._method.drift_detected:
            return []
        text = f"{self._settings.metric} of online has changed, now {sample.mean:.4f} ({self._settings.drift_method})"
        return [Finding("uncertain", window.from_ms, window.until_ms, text)]


BUILT_IN: Final[dict[str, Callable[[Settings], Detector]]] = {
    "sequential": Sequential,
    "watermarks": Watermarks,
    "drift": Drift,
}


def make_detectors(names: Sequence[str], settings: Settings) -> list[Detector]:
    """Detectors by name: ours, or a user's (entry-point group `ekko.health.detectors`: a callable that takes `Settings`).

    Raises:
        ConfigError: there is none of the name, it cannot be made, or a library is missing.
    """
    own = {one.name: one for one in entry_points(group=ENTRY_POINTS)}
    detectors: list[Detector] = []
    for name in names:
        if name in BUILT_IN:
            detectors.append(BUILT_IN[name](settings))
        elif name in own:
            try:
                detectors.append(own[name].load()(settings))
            except Exception as error:  # noqa: BLE001 - a user's module can fail in any way
                raise ConfigError(f"health.detectors: {name!r} cannot be made: {error!r}") from None
        else:
            known = ", ".join(map(repr, [*BUILT_IN, *own]))
            raise ConfigError(f"health.detectors: there is no detector {name!r}: there are {known}")
    return detectors
