"""The sequential test keeps its level over long streams, at any look, and finds drops; its sums are what they say."""

import itertools
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.health.moments import Moments
from ekko.health.samples import FIELDS, LOSS_MAX, Sample, own_values, sample_of
from ekko.health.sequential import GRID, Detection, Difference, Stretch, _psi
from sim_cluster.demo.evaluation import auc as exact_auc

values = st.lists(st.floats(0, 1), max_size=8)


def moments(sample: list[float]) -> Moments:
    if not sample:
        return Moments()
    return Moments(len(sample), math.fsum(sample), len(sample) * float(np.var(sample)))


@given(values, values)
def test_moments_of_two_samples_are_those_of_both(one: list[float], other: list[float]) -> None:
    together = moments(one) + moments(other)
    whole = moments(one + other)
    for left, right in zip((together.count, together.total, together.spread), (whole.count, whole.total, whole.spread)):  # noqa: B905
        assert left == pytest.approx(right, abs=1e-9)
    assert together.squares_about(0.3) == pytest.approx(sum((x - 0.3) ** 2 for x in one + other), abs=1e-9)


def test_a_sample_is_that_of_its_events_and_survives_the_wire() -> None:
    rng = np.random.default_rng(1)
    label = (rng.random(4_000) < 0.2).astype(np.float32)
    prediction = (1 / (1 + np.exp(-rng.normal(label * 1.2 - 1.5)))).astype(np.float32)
    own = own_values(lambda p, y, _: 1 - np.abs(p - y), prediction, label, np.ones(4_000, np.float32))
    sample = sample_of(prediction, label, None, own)
    one, other = (sample_of(prediction[half], label[half]) for half in (slice(0, 1_000), slice(1_000, 4_000)))
    added = one + other
    assert sample.auc.mean == pytest.approx(exact_auc(label.astype(float), prediction.astype(float)), abs=4e-4)
    p = prediction.astype(np.float64)
    assert sample.loss.mean == pytest.approx(float(-(label * np.log(p) + (1 - label) * np.log1p(-p)).mean()), rel=1e-6)
    assert sample.ctr.mean == pytest.approx(label.mean(), rel=1e-6)
    assert sample.calibration == pytest.approx(p.sum() / label.sum(), rel=1e-5)
    assert sample.own.mean == pytest.approx(1 - np.abs(p - label).mean(), rel=1e-6)
    assert (added.loss.mean, added.loss.spread) == pytest.approx((sample.loss.mean, sample.loss.spread), rel=1e-9)
    assert added.auc.mean == pytest.approx(sample.auc.mean, rel=1e-9), "pairs of two nodes count, too"
    assert len(sample.to_bytes()) < 900
    back = Sample.from_bytes(sample.to_bytes())
    assert back.auc.mean == pytest.approx(sample.auc.mean, rel=1e-9), "counts are exact"
    assert back.events == 4_000
    # The spread says how far a window's AUC is from the truth.
    aucs = [tally_of(np.random.default_rng(seed), 400, 0.0).auc for seed in range(120)]
    said = np.mean([one.spread / one.count**2 for one in aucs])
    assert float(np.var([one.mean for one in aucs])) == pytest.approx(float(said), rel=0.4)


def test_a_weight_counts_as_so_many_events() -> None:
    prediction, label = np.array([0.2, 0.7, 0.9, 0.4], np.float32), np.array([0, 1, 0, 1], np.float32)
    weight = np.array([1, 3, 2, 1], np.float32)
    times = weight.astype(int)
    one, other = sample_of(prediction, label, weight), sample_of(np.repeat(prediction, times), np.repeat(label, times))
    assert (one.auc.mean, one.loss.mean, one.ctr.mean) == pytest.approx((other.auc.mean, other.loss.mean, other.ctr.mean))
    assert one.events == 4


def test_odd_weights_survive_the_wire_and_sums_that_no_events_have_are_refused() -> None:
    rng = np.random.default_rng(2)
    label, prediction = (rng.random(500) < 0.3).astype(np.float32), rng.random(500).astype(np.float32)
    for weight in (rng.lognormal(0, 3, 500).clip(1e-6, 1e3), np.full(500, 1e-6), np.full(500, 1e3)):
        sample = sample_of(prediction, label, weight.astype(np.float32))
        back = Sample.from_bytes(sample.to_bytes())
        assert back.auc.mean == pytest.approx(sample.auc.mean, abs=1e-3)
        assert back.auc.size == pytest.approx(sample.auc.size, rel=1e-2)
    packed = sample.to_bytes()
    assert Sample.from_bytes(b"") == Sample()
    values = np.frombuffer(packed[: 4 * FIELDS], np.float32)
    for at, value in ((0, 0.0), (0, np.nan), (3, 0.0), (3, 1e4), (5, 1e9), (6, np.inf), (2, -1.0)):
        junk = values.copy()
        junk[at] = value
        with pytest.raises(ValueError, match="no"):
            Sample.from_bytes(junk.tobytes() + packed[4 * FIELDS :])
    for junk_bytes in (packed[:-1], packed + b"x", packed[: 4 * FIELDS] + b"\xff" * 8 + packed[4 * FIELDS + 8 :]):
        with pytest.raises((ValueError, struct.error)):
            Sample.from_bytes(junk_bytes)


def tally_of(rng: np.random.Generator, events: int, drop: float, rate: float = 0.2) -> Sample:
    """A window's events of a model with AUC 0.76, less `drop`."""
    label = (rng.random(events) < rate).astype(np.float32)
    # Two normals at distance d have an AUC of Phi(d / sqrt 2).
    distance = {0.0: 1.0, 0.05: 0.787}[drop]
    prediction = (1 / (1 + np.exp(2.0 - rng.normal(label * distance)))).astype(np.float32)
    return sample_of(prediction, label)


def first_alarm(rng: np.random.Generator, metric: str, windows: int, level: float, drop_from: int, horizon: int = 0) -> int:
    """The window of the first alarm, or -1; 400 online and 100 baseline events a window."""
    scale = LOSS_MAX if metric == "log_loss" else 1.0
    detection, difference = Detection(horizon or windows, scale, 0.0), Difference(scale, 20)
    for window in range(windows):
        online = tally_of(rng, 400, 0.05 if window >= drop_from else 0.0)
        step = difference.take(online.quality(metric)[0], tally_of(rng, 100, 0.0).quality(metric)[0])
        if step is not None:
            detection.add(window, *step)
            if detection.log_evidence >= -math.log(level):
                return window
    return -1


@pytest.mark.parametrize("metric", ["auc", "log_loss"])
def test_false_alarms_stay_below_the_level(metric: str) -> None:
    """A few streams here; a thousand long ones in `scripts/bench health`."""
    alarms = sum(first_alarm(np.random.default_rng(seed), metric, 40, 0.1, 40) >= 0 for seed in range(25))
    assert alarms <= 6  # of 25 at 0.1 each: more with a chance below 1 %


def test_a_drop_is_found_and_dated() -> None:
    found = [first_alarm(np.random.default_rng(seed), "auc", 400, 0.01, 100) for seed in range(3)]
    assert all(100 <= window < 400 for window in found), found


def test_evidence_is_a_supermartingale_at_the_bound() -> None:
    """Without a difference its mean does not exceed what has begun: checked on streams of coin tosses."""
    rng = np.random.default_rng(3)
    evidence = []
    for _ in range(250):
        detection, difference = Detection(10, 1.0, 0.0), Difference(1.0, 1)
        for window in range(10):
            online, baseline = (moments(list(map(float, rng.integers(0, 2, 30)))) for _ in range(2))
            step = difference.take(online, baseline)
            assert step is not None
            detection.add(window, *step)
        evidence.append(math.exp(detection.log_evidence))
    assert np.mean(evidence) <= 1 + 4 * np.std(evidence) / math.sqrt(len(evidence))


def test_the_inequality_behind_it_holds_for_every_value() -> None:
    """Fan's: exp(l e - psi(l) e^2) <= 1 + l e for every error e from -1 on, where l < 1; at -1 the two are the same."""
    error = np.linspace(-1.0, 1.0, 2_001)[:, None]
    bound = 1 + GRID * error
    assert (np.exp(GRID * error - _psi(GRID) * error**2) <= bound * (1 + 1e-12)).all()
    assert np.exp(-GRID - _psi(GRID)) == pytest.approx(bound[0], rel=1e-12)


@pytest.mark.parametrize(("scale", "rate"), [(1.0, 0.5), (0.5, 0.5), (2.0, 0.1)])
def test_the_mean_of_the_evidence_over_all_outcomes_is_what_has_begun_at_most(scale: float, rate: float) -> None:
    """Two events of each arm, of two windows, each 0 or the most there is: all 81 counts of them, without any chance."""
    horizon, mean = 10, 0.0
    chance = [(1 - rate) ** 2, 2 * rate * (1 - rate), rate**2]
    for counts in itertools.product(range(3), repeat=4):
        detection, difference = Detection(horizon, scale, 0.0), Difference(scale, 1)
        for window in range(2):
            online, baseline = (moments([scale] * count + [0.0] * (2 - count)) for count in counts[2 * window : 2 * window + 2])
            step = difference.take(online, baseline)
            assert step is not None
            detection.add(window, *step)
        mean += math.prod(chance[count] for count in counts) * math.exp(detection.log_evidence)
    assert mean <= 2 / horizon
    assert mean > 0.5 / horizon, "it is not spent for nothing"


def test_units_do_not_matter() -> None:
    one, other = Detection(10, 1.0, -0.1), Detection(10, 8.0, -0.8)
    near, far = Stretch(1.0), Stretch(8.0)
    for window in range(5):
        one.add(window, 10, -2.0, 3.0)
        other.add(window, 10, 8 * -2.0, 8**2 * 3.0)
        near.add(10, -2.0, 3.0)
        far.add(10, 8 * -2.0, 8**2 * 3.0)
    assert one.log_evidence == pytest.approx(other.log_evidence)
    assert 8 * near.radius(0.1) == pytest.approx(far.radius(0.1))


def test_the_confidence_sequence_holds_the_truth_at_all_windows_at_once() -> None:
    rng, missed, level = np.random.default_rng(4), 0, 0.1
    for _ in range(30):
        stretch, difference = Stretch(1.0), Difference(1.0, 1)
        for _ in range(50):
            online = moments(list(map(float, rng.random(40) < 0.5)))
            step = difference.take(online, moments(list(map(float, rng.random(20) < 0.4))))
            assert step is not None
            stretch.add(*step)
            if stretch.mean - stretch.radius(level) > 0.1:
                missed += 1
                break
    assert missed <= 8  # 3 are allowed on average; more than 8 with a chance below 1 %
    assert stretch.radius(level) < 0.15
    assert Stretch(1.0).radius(level) == math.inf


def test_small_samples_wait() -> None:
    difference = Difference(1.0, 10)
    assert difference.take(Moments(100, 50, 25), Moments(5, 2, 1)) is None
    step = difference.take(Moments(100, 50, 25), Moments(5, 3, 1))
    assert step is not None
    size, total, variance = step
    assert (size, total) == (10, pytest.approx(0.0))
    # Nothing was known before, so that squares are about the middle of the range.
    assert variance == pytest.approx((10 / 200) ** 2 * 50 + Moments(10, 5, 2.1).squares_about(0.5))
    assert GRID.max() < 1
    # An arm without events says nothing of the difference, and the other arm's hours without it do not enter.
    assert difference.take(Moments(1_000, 900, 90), Moments()) is None
    again = difference.take(Moments(100, 50, 25), Moments(10, 5, 2))
    assert again is not None
    assert again[1] == pytest.approx(0.0)
