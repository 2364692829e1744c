"""Reports that are honest and uneven raise no alarm: weights of all sizes, few of one label, nodes whose users differ."""

import numpy as np
import pytest

from ekko.health.detectors import Finding, Sequential, Settings, Window
from ekko.health.samples import Sample, sample_of

SETTINGS = Settings(level=0.01, horizon_windows=200, tolerance=0.005, precision=0.05)


def sample(rng: np.random.Generator, events: int, rate: float = 0.2, weights: str = "even") -> Sample:
    """Of a model of which both arms are the same: calibrated, AUC 0.76."""
    label = (rng.random(events) < rate).astype(np.float32)
    odds = rng.normal(label) - 0.5 + np.log(rate / (1 - rate))
    weight = np.ones(events)
    if weights == "wild":  # a few count as much as all others
        weight = np.where(rng.random(events) < 0.01, 500.0, 1.0)
    return sample_of((1 / (1 + np.exp(-odds))).astype(np.float32), label, weight.astype(np.float32))


def findings(arms: list[tuple[Sample, Sample]], settings: Settings = SETTINGS) -> list[Finding]:
    detector = Sequential(settings)
    windows = (Window(n, n * 10_000, (n + 1) * 10_000, pair) for n, pair in enumerate(arms))
    return [finding for window in windows for finding in detector.observe(window)]


def alarms(arms: list[tuple[Sample, Sample]], metric: str = "auc") -> int:
    settings = Settings(metric, SETTINGS.level, SETTINGS.horizon_windows, SETTINGS.tolerance, SETTINGS.precision)
    return sum(one.state == "corrupted" for one in findings(arms, settings))


@pytest.mark.parametrize("metric", ["auc", "log_loss", "ctr"])
def test_a_few_heavy_events_are_no_evidence(metric: str) -> None:
    found = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        found += alarms([(sample(rng, 1_000, weights="wild"), sample(rng, 200, weights="wild")) for _ in range(40)], metric)
    assert found == 0, "at a level of 0.01, one of twelve streams is allowed once in nine runs of this test"


@pytest.mark.parametrize("rate", [0.97, 0.99])
def test_few_of_the_other_label_are_no_evidence(rate: float) -> None:
    found = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        found += alarms([(sample(rng, 1_000, rate), sample(rng, 200, rate)) for _ in range(40)])
    assert found == 0


def test_nodes_whose_users_differ_are_compared_as_one() -> None:
    """Online answers at two nodes, one of whose users click six times as often; the baseline serves both kinds at one node."""
    rng = np.random.default_rng(7)
    arms = []
    for _ in range(60):
        online = sample(rng, 500, 0.05) + sample(rng, 500, 0.3)
        rates = np.repeat([0.05, 0.3], 150)
        label = (rng.random(300) < rates).astype(np.float32)
        odds = rng.normal(label) - 0.5 + np.log(rates / (1 - rates))
        arms.append((online, sample_of((1 / (1 + np.exp(-odds))).astype(np.float32), label)))
    assert alarms(arms) == 0
    online, baseline_all = (sum((pair[arm] for pair in arms), Sample()) for arm in range(2))
    assert online.figures()["auc"] == pytest.approx(baseline_all.figures()["auc"], abs=0.03)
