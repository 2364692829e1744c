"""A node's part in judging models: takes its scorers' events, tells others of closed windows, judges, and divides requests.

Everything happens on the node's event loop, a few times a window, and nothing takes long: a report of the largest size, of
65,536 events, takes some milliseconds to count.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog
import xxhash

from ekko.config.sections import HealthSection
from ekko.errors import EkkoError, ModelError
from ekko.generations import Generation
from ekko.health.detectors import Settings, make_detectors
from ekko.health.judge import STAGGER_MS, Judge
from ekko.health.samples import OwnMetric, Sample, find_metric
from ekko.health.summaries import Summaries, Told
from ekko.health.traffic import ARMS, Traffic
from ekko.health.verdicts import Interval, Ruling, State, Verdicts
from ekko.health.windows import SAMPLES_OPEN_MAX, Windows
from ekko.health.wire import Report, Reported
from ekko.model import EXTRAS_SINCE, check_name
from ekko.rollback.facts import Rollbacks
from ekko.store import Store
from p2p.replica import SchemaEntry

# How often a node looks, at most.
TICK_S: Final = 0.25
# And judges, at most: every window of every node is looked at.
JUDGE_S: Final = 1.0
# A member that comes and goes, comes and goes, is told everything again so often at most.
TELL_AGAIN_MS: Final = 3_000
# Models that scorers report of, or that were judged, with state of their own here.
MODELS_MAX: Final = 256
# What becomes of events.
FATES: Final = ("taken", "late", "ahead", "refused")
# For people, of one model: the last ones.
INTERVALS_SHOWN: Final = 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """One model's health, for people and dashboards."""

    model: Generation
    state: State
    judged_until_ms: int | None
    healthy_until_ms: int | None
    intervals: tuple[Interval, ...]
    log: tuple[Ruling, ...]
    arms: Mapping[str, Mapping[str, float | None]]  # arm -> figures, of all nodes over the last windows
    segments: Mapping[str, Mapping[str, Mapping[str, float | None]]]  # segment -> arm -> figures of this node's last window
    traffic: Traffic
    why: Mapping[str, str]  # detector -> what it last said here
    events: Mapping[str, int]  # of scorers of this node, by `FATES`
    missed: int  # of all nodes: told of, and not judged here, since it was not heard of in time

    def to_json(self) -> dict[str, object]:
        """For `/status` and `ekko health --json`."""
        return {
            "state": self.state,
            "judged_until_ms": self.judged_until_ms,
            "healthy_until_ms": self.healthy_until_ms,
            "intervals": [[one.state, one.from_ms, one.until_ms] for one in self.intervals],
            "log": [
                {
                    "at_ms": one.stamp_ms,
                    "state": one.state,
                    "from_ms": one.from_ms,
                    "until_ms": one.until_ms,
                    "node": one.node,
                    "detector": one.detector,
                    "why": one.text,
                }
                for one in self.log
            ],
            "arms": {arm: dict(figures) for arm, figures in self.arms.items()},
            "segments": {name: {arm: dict(one) for arm, one in pair.items()} for name, pair in self.segments.items()},
            "baseline_share": round(self.traffic.baseline, 9),
            "serving_share": round(self.traffic.serving, 9),
            "why": dict(self.why),
            "events": dict(self.events),
            "missed": self.missed,
        }


class Health:
    """Of one node's life.

    Args:
        node: its id.
        section: `[health]`; None: it takes no events and does not judge, but knows what others found.
        store: its models, and what is known of them.
        submit: tells peers of changed entries.
        protocol_min: the oldest protocol version that a live member speaks.
        peers: the other nodes that are there, as far as this one can tell.
        clock_agrees: whether this node's clock is near those of the others.
        clock: Unix milliseconds.

    Raises:
        ConfigError: a detector or a metric that the configuration names is not there.
    """

    def __init__(
        self,
        node: str,
        section: HealthSection | None,
        store: Store,
        submit: Callable[[tuple[SchemaEntry, ...]], None],
        protocol_min: Callable[[], int],
        *,
        peers: Callable[[], tuple[str, ...]] = lambda: (),
        clock_agrees: Callable[[], bool] = lambda: True,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._node = node
        self._section = section
        self._store = store
        self._submit = submit
        self._protocol_min = protocol_min
        self._peers = peers
        self._clock_agrees = clock_agrees
        self._astray = False  # as last logged
        self._judged_ms: int | None = None
        self._told_again_ms = 0
        self._met: frozenset[str] = frozenset()  # peers that were there when we last looked
        self._clock = clock
        self._windows: dict[Generation, Windows] = {}
        self._judges: dict[Generation, Judge] = {}
        self._segments: dict[Generation, Mapping[str, tuple[Sample, Sample]]] = {}  # of the last closed window
        self._states: dict[Generation, State] = {}  # as last logged
        self._own: OwnMetric | None = None
        # What a rollback lets the online model answer, and who is told when a model's state has changed, on every node.
        self.serving: Callable[[Generation], float] = lambda model: store.facts.of(Rollbacks).share(model)
        self.on_state: Callable[[Generation, State], None] = lambda _model, _state: None
        if section is not None:
            make_detectors(section.detectors, settings_of(section))  # what cannot be made is found now
            if section.own_metric is not None:
                self._own = find_metric(section.own_metric)

    @property
    def verdicts(self) -> Verdicts:
        """What is known of all models."""
        return self._store.facts.of(Verdicts)

    # --- events

    def report(self, report: Report) -> Reported:
        """Count a scorer's events.

        Raises:
            ModelError: the node does not judge, or does not know the model.
        """
        if self._section is None:
            raise ModelError(f"node {self._node!r} takes no reports: add [health] to its configuration")
        model = self._generation(report.model)
        windows = self._windows.get(model)
        if windows is None:
            if len(self._windows) >= MODELS_MAX:
                raise ModelError(f"node {self._node!r} takes reports of {MODELS_MAX} models, and {model.name!r} is one more")
            windows = Windows(self._section.window_ms, self._section.lateness_ms, self._own)
            self._windows[model] = windows
        before = windows.taken, windows.late, windows.ahead
        windows.add(report.events, self._clock(), SAMPLES_OPEN_MAX - sum(one.samples for one in self._windows.values()))
        return Reported(windows.taken - before[0], windows.late - before[1], windows.ahead - before[2])

    def _generation(self, name: str) -> Generation:
        check_name("model", name)
        found = self._store.registers.resolve(name, self._clock()) or self._store.generation(name)
        if found is None:
            known = ", ".join(map(repr, self._store.models)) or "none"
            raise ModelError(f"unknown model {name!r} at node {self._node!r}: known: {known}")
        return found

    # --- the loop

    async def run(self) -> None:
        """Look at windows until cancelled."""
        period_s = TICK_S if self._section is None else min(TICK_S, self._section.window / 4)
        while True:
            await asyncio.sleep(period_s)
            try:
                self.tick()
            except EkkoError as error:  # peers could not be told; they are with the next window
                log.warning("health_not_told", reason=str(error))

    def tick(self) -> None:
        """Close windows, tell others, judge what is complete, and divide requests."""
        for model, store in self._store.models.items():
            baseline = 0.0 if self._section is None else self._section.baseline_share
            traffic = Traffic(baseline, min(1.0, max(0.0, self.serving(Generation(model, store.spec.incarnation)))))
            if store.traffic.bounds != traffic.bounds:
                store.set_traffic(traffic)
        if self._section is not None and self._protocol_min() >= EXTRAS_SINCE and self._has_time():
            self._tell()
            self._judge(self._section)
        self._log_changes()

    def _has_time(self) -> bool:
        """Whether windows of this node are those of the others: what it finds by a wrong clock is of another time."""
        astray = not self._clock_agrees()
        if astray != self._astray:
            self._astray = astray
            note = log.warning if astray else log.info
            note("health_clock", agrees=not astray, remedy="set the clock (NTP): until then this node does not judge")
        return not astray

    def _tell(self) -> None:
        """Sum closed windows up, for all nodes."""
        now_ms = self._clock()
        for about in (self._windows, self._segments, self._judges):
            for model in [model for model in about if not self._store.holds(model)]:
                about.pop(model)
        for model, windows in self._windows.items():
            for closed in windows.close(now_ms):
                if closed.segments:
                    self._segments[model] = closed.segments
                told = Told(closed.total, closed.arms)
                self._store.facts.note(Summaries.said(model, self._node, windows.window_ms, closed.window, told))
                known = self._store.facts.of(Summaries)
                self._submit(tuple(known.told(model, self._node, windows.window_ms, closed.window)))
        self._tell_again()

    def _tell_again(self) -> None:
        """To nodes that come, or come back: what they may not have heard, once. Who knows it does not pass it on."""
        there, now_ms = frozenset(self._peers()), self._clock()
        if there <= self._met:
            self._met = there
        elif not 0 <= now_ms - self._told_again_ms < TELL_AGAIN_MS:
            self._met, self._told_again_ms = there, now_ms
            if kept := self._store.facts.of(Summaries).told_again(self._node):
                self._submit(tuple(kept))

    def _judge(self, section: HealthSection) -> None:
        now_ms, summaries, before = self._clock(), self._store.facts.of(Summaries), self.verdicts
        pause_ms = min(1_000 * JUDGE_S, section.window_ms / 4)
        if self._judged_ms is not None and 0 <= now_ms - self._judged_ms < pause_ms:
            return
        self._judged_ms = now_ms
        after = before
        for model in summaries.models():
            if model not in self._judges and self._store.holds(model) and len(self._judges) < MODELS_MAX:
                self._judges[model] = self._new_judge(model, section)
            if model in self._judges:
                after = self._judges[model].judge(summaries, after, now_ms)
        if after is not before:
            told = self._store.facts.note(after)
            if told:
                self._submit(told)

    def _new_judge(self, model: Generation, section: HealthSection) -> Judge:
        stagger_ms = xxhash.xxh32_intdigest(f"{self._node}/{model.name}".encode()) % STAGGER_MS
        detectors = make_detectors(section.detectors, settings_of(section))
        return Judge(model, self._node, section.window_ms, section.lateness_ms, stagger_ms, detectors)

    def _log_changes(self) -> None:
        now_ms, verdicts = self._clock(), self.verdicts
        models = verdicts.models()
        self._states = {model: state for model, state in self._states.items() if model in models}
        for model in models:
            state = verdicts.state(model, now_ms)
            if self._states.get(model) == state:
                continue
            self._states[model] = state
            last = next(iter(reversed(verdicts.log(model))), None)
            fields = {} if last is None else {"detector": last.detector, "by": last.node, "why": last.text}
            note = log.warning if state == "corrupted" else log.info
            note("model_state", model=model.name, state=state, healthy_until_ms=verdicts.healthy_until(model, now_ms), **fields)
            self.on_state(model, state)

    # --- operators

    def overrule(self, model: str, state: State, from_ms: int | None, text: str) -> dict[str, object]:
        """An operator's word on a model, from a moment up to now, on all nodes.

        Raises:
            ModelError: there is no such model, or no such state, or the moment is to come.
        """
        generation, now_ms = self._generation(model), self._clock()
        if from_ms is not None and not 0 <= from_ms <= now_ms:
            raise ModelError(f"a word on model {model!r} from {from_ms} on: expected Unix milliseconds up to now, {now_ms}")
        verdicts = self.verdicts
        begin_ms = from_ms
        if begin_ms is None:  # the whole of what is in doubt
            doubted = [one for one in verdicts.intervals(generation) if one.state != "healthy"]
            begin_ms = doubted[-1].from_ms if doubted else now_ms - 1_000
        new = verdicts.overrule(generation, state, begin_ms, max(begin_ms, now_ms), now_ms=now_ms, node=self._node, text=text)
        told = self._store.facts.note(new)
        if told:
            self._submit(told)
        self._judges.pop(generation, None)  # what it was about to say was overruled
        log.warning("model_overruled", model=generation.name, state=state, from_ms=begin_ms, why=text)
        return {"model": generation.name, "state": state, "from_ms": begin_ms, "until_ms": now_ms}

    def pictures(self) -> tuple[ModelHealth, ...]:
        """Every model that is here, or of which anything was said."""
        now_ms, verdicts = self._clock(), self.verdicts
        here = [Generation.of(store.spec) for store in self._store.models.values()]
        return tuple(self._picture(model, verdicts, now_ms) for model in here)

    def _picture(self, model: Generation, verdicts: Verdicts, now_ms: int) -> ModelHealth:
        judge, windows = self._judges.get(model), self._windows.get(model)
        pair = (Sample(), Sample()) if judge is None else judge.recent()
        segments = {
            name: {arm: sample.figures() for arm, sample in zip(ARMS, one, strict=True)}
            for name, one in self._segments.get(model, {}).items()
        }
        counts = (windows.taken, windows.late, windows.ahead, windows.refused) if windows is not None else (0,) * len(FATES)
        return ModelHealth(
            model,
            verdicts.state(model, now_ms),
            verdicts.judged_until(model, now_ms),
            verdicts.healthy_until(model, now_ms),
            tuple(verdicts.intervals(model)[-INTERVALS_SHOWN:]),
            tuple(verdicts.log(model)),
            {arm: sample.figures() for arm, sample in zip(ARMS, pair, strict=True)},
            segments,
            self._store.models[model.name].traffic,
            {} if judge is None else judge.why(),
            dict(zip(FATES, counts, strict=True)),
            0 if judge is None else round(judge.missed),
        )


def settings_of(section: HealthSection) -> Settings:
    """What detectors are made from."""
    return Settings(
        section.metric,
        section.level,
        max(1, round(section.horizon / section.window)),
        section.tolerance,
        section.precision,
        {name: (bound.min, bound.max) for name, bound in section.watermarks.items()},
        section.drift_method,
        section.events_min,
        bounds_prove="sequential" not in section.detectors,
    )
