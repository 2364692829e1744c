"""What detectors say of streams whose truth is known: corrupted from when it began, healthy where that is proven."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from ekko.errors import ConfigError
from ekko.health.detectors import BEYOND_WINDOWS, Finding, Sequential, Settings, Watermarks, Window, make_detectors
from ekko.health.samples import Sample, sample_of

T = 1_700_000_000_000
LENGTH_MS = 10_000


def sample(rng: np.random.Generator, events: int, good: bool) -> Sample:
    label = (rng.random(events) < 0.3).astype(np.float32)
    told = label if good else 1 - label
    prediction = (1 / (1 + np.exp(1.0 - rng.normal(told * 1.5)))).astype(np.float32)
    return sample_of(prediction, label)


def window(number: int, online: Sample, baseline: Sample) -> Window:
    return Window(number, T + number * LENGTH_MS, T + (number + 1) * LENGTH_MS, (online, baseline))


def stream(bad: range, windows: int, seed: int = 0, online: int = 1_000) -> list[Window]:
    """Windows of 1,000 online events, whose labels are flipped in some, and 200 of the baseline."""
    rng = np.random.default_rng(seed)
    return [window(n, sample(rng, online, n not in bad), sample(rng, 200, True)) for n in range(windows)]


def told(name: str, windows: list[Window], settings: Settings) -> list[tuple[int, Finding]]:
    (detector,) = make_detectors([name], settings)
    return [(one.number, finding) for one in windows for finding in detector.observe(one)]


def test_a_corruption_is_found_dated_and_over() -> None:
    findings = told("sequential", stream(range(40, 50), 120), Settings(precision=0.05))
    corrupted = [(number, one) for number, one in findings if one.state == "corrupted"]
    assert corrupted[0][0] in (40, 41, 42)
    began = corrupted[0][1].from_ms
    assert T + 35 * LENGTH_MS <= began <= T + 40 * LENGTH_MS, "from when it began, or a few windows sooner"
    assert max(number for number, _ in corrupted) <= 50
    healthy = [one for _, one in findings if one.state == "healthy"]
    before, after = ([one for one in healthy if (one.until_ms <= began) == early] for early in (True, False))
    assert before
    assert after, "it is healthy again"
    assert min(one.from_ms for one in after) >= T + 50 * LENGTH_MS, "nothing of the bad stretch is found healthy"
    assert all(one.until_ms <= T + number * LENGTH_MS for number, one in findings if one.state == "healthy"), "a stretch late"


def test_a_healthy_model_is_never_corrupted_and_few_events_say_nothing() -> None:
    findings = told("sequential", stream(range(0), 150, seed=3), Settings(precision=0.05))
    assert {one.state for _, one in findings} <= {"healthy", "uncertain"}
    rng = np.random.default_rng(5)
    few = [window(n, sample(rng, 50, n < 5), sample(rng, 5, True)) for n in range(10)]
    assert told("sequential", few, Settings()) == []


def test_samples_that_waited_are_dated_from_where_they_began() -> None:
    rng = np.random.default_rng(6)
    # Three clicks of the baseline a window: some seven windows until there are enough.
    small = [window(n, sample(rng, 400, n < 30), sample(rng, 10, True)) for n in range(150)]
    corrupted = [one for _, one in told("sequential", small, Settings()) if one.state == "corrupted"]
    assert corrupted
    assert T + 15 * LENGTH_MS <= corrupted[0].from_ms <= T + 31 * LENGTH_MS


def test_evidence_that_comes_late_counts_and_is_dated_by_its_windows() -> None:
    settings, windows = Settings(precision=0.05), stream(range(20, 30), 60)
    # The baseline's half of windows 15 to 34 is told when window 59 is over: only then can anybody compare.
    cut = range(15, 35)
    halves = [replace(one, arms=(one.arms[0], Sample())) if one.number in cut else one for one in windows]
    rest = [replace(windows[number], arms=(Sample(), windows[number].arms[1]), late=True) for number in cut]
    (detector,) = make_detectors(["sequential"], settings)
    before = [finding for one in halves for finding in detector.observe(one)]
    assert not [one for one in before if one.state == "corrupted"]
    after = [finding for one in rest for finding in detector.observe(one)]
    (corrupted, *_) = [one for one in after if one.state == "corrupted"]
    assert T + 15 * LENGTH_MS <= corrupted.from_ms <= T + 20 * LENGTH_MS, "of what came since, the earliest"
    assert corrupted.until_ms == T + 60 * LENGTH_MS, "and nobody knows that it ended before what came last"
    again = [finding for one in stream(range(0), 90, seed=4)[60:] for finding in detector.observe(one)]
    assert [one for one in again if one.state == "healthy"], "it is found healthy again"
    assert min(one.from_ms for one in again if one.state == "healthy") >= T + 15 * LENGTH_MS


def test_bounds_are_uncertain_at_first_then_corrupted() -> None:
    settings = Settings(bounds={"auc": (0.6, None), "calibration": (0.2, 5.0)}, bounds_prove=True)
    findings = told("watermarks", stream(range(10, 20), 24), settings)
    states = [(number, one.state) for number, one in findings]
    assert states[:9] == [(number, "healthy") for number in range(1, 10)]
    assert [one for one in states if 10 <= one[0] < 20] == [
        (number, "uncertain" if number < 10 + BEYOND_WINDOWS - 1 else "corrupted") for number in range(10, 20)
    ]
    first = next(one for _, one in findings if one.state == "corrupted")
    assert first.from_ms == T + 9 * LENGTH_MS
    assert "auc is" in first.text
    assert states[-1] == (23, "healthy")
    assert all(one.until_ms <= T + number * LENGTH_MS for number, one in findings if one.state == "healthy")
    # A sequential test beside it has to prove what is healthy.
    quiet = told("watermarks", stream(range(0), 5), Settings(bounds=settings.bounds))
    assert quiet == []
    assert Watermarks(settings).observe(window(0, Sample(), Sample())) == []


@pytest.mark.skipif(importlib.util.find_spec("river") is None, reason="river is not installed")
@pytest.mark.parametrize("method", ["adwin", "page_hinkley", "kswin"])
def test_a_drift_makes_uncertain_and_never_corrupted(method: str) -> None:
    findings = told("drift", stream(range(120, 240), 240, online=200), Settings(drift_method=method))
    assert findings
    assert {one.state for _, one in findings} == {"uncertain"}
    assert findings[0][0] >= 120
    assert len(told("drift", stream(range(0), 40, seed=1, online=300), Settings(drift_method=method))) <= 1


def test_who_has_no_river_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "river", None)
    with pytest.raises(ConfigError, match=r"pip install 'ekko\[health\]'"):
        make_detectors(["drift"], Settings())


def test_an_unknown_detector_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no detector 'gut': there are 'sequential', 'watermarks', 'drift'"):
        make_detectors(["gut"], Settings())


def test_a_baseline_that_is_worse_is_no_alarm() -> None:
    rng = np.random.default_rng(8)
    swapped = [window(n, sample(rng, 1_000, True), sample(rng, 200, False)) for n in range(30)]
    assert not [one for _, one in told("sequential", swapped, Settings()) if one.state != "healthy"]
    assert isinstance(make_detectors(["sequential"], Settings())[0], Sequential)


@pytest.mark.parametrize("drop", [0.12, 0.25])
def test_nothing_of_a_fall_that_lasts_is_ever_healthy_however_coarse_the_precision(drop: float) -> None:
    """The demo's settings: stretches of some four windows, and a fall in the middle of one, below the precision or above it.

    A stretch of which half is bad can be within the precision on average; it is not said before the next one is, too.
    """
    settings = Settings("auc", 0.01, 1_800, 0.02, 0.15)
    for seed in range(6):
        rng, begin = np.random.default_rng(seed), 20 + seed
        distance = {0.0: 1.0, 0.12: 0.5, 0.25: 0.0}  # of clicks and others; an AUC of 0.76, 0.64, 0.5

        def arm(events: int, fallen: bool, rng: np.random.Generator = rng) -> Sample:
            label = (rng.random(events) < 0.25).astype(np.float32)
            odds = rng.normal(label * distance[drop if fallen else 0.0]) - 1.5  # noqa: B023
            return sample_of((1 / (1 + np.exp(-odds))).astype(np.float32), label)

        windows = [window(n, arm(420, n >= begin), arm(180, False)) for n in range(55)]
        healthy = [one for _, one in told("sequential", windows, settings) if one.state == "healthy"]
        assert healthy, "before it fell"
        assert max(one.until_ms for one in healthy) <= T + begin * LENGTH_MS
