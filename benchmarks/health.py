"""How often the sequential test cries wolf, and how long it takes to notice: `scripts/bench health`.

Streams of windows with the events of two arms, five times as many online as of the baseline, a fifth of them clicks, AUC 0.76.
Null streams have no difference: the share of them with an alarm at any of their windows may not exceed the level. In the others
the online model loses 1, 2 or 5 % of AUC from the first window on; how many events of the baseline pass before the alarm is
what counts, since they are the few. All at the same level and horizon.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Figure
from ekko.config.sections import HealthSection
from ekko.health.detectors import Sequential, Window
from ekko.health.judge import SETTLE_MS
from ekko.health.samples import LOSS_MAX, Sample, sample_of
from ekko.health.sequential import Detection, Difference
from ekko.health.service import settings_of

TARGETS = {"false_alarms_auc": "<= 0.05", "false_alarms_log_loss": "<= 0.05"}

LEVEL: Final = 0.05
METRICS: Final = {"auc": 1.0, "log_loss": LOSS_MAX}
CLICKS: Final = 0.2
ONLINE_TO_BASELINE: Final = 5
# How far apart the normal scores of clicks and others are, for an AUC of 0.76 (its Phi of distance / sqrt 2) and below.
DISTANCES: Final = {0.0: 0.99889, 0.01: 0.95367, 0.02: 0.90954, 0.05: 0.78204}
# What a delay of so many baseline events is in time: 10,000 requests a second, 0.5 % of them the baseline's.
BASELINE_PER_S: Final = 50


def run(quick: bool) -> dict[str, Figure]:
    """False alarms of a thousand null streams, and delays."""
    streams, windows, drops, per_window = (20, 20, 2, 100) if quick else (1_000, 500, 100, 100)
    alarms = dict.fromkeys(METRICS, 0)
    for seed in range(streams):
        found = _first_alarms(np.random.default_rng(seed), 0.0, windows, per_window, windows)
        for metric in METRICS:
            alarms[metric] += found[metric] is not None
    figures: dict[str, Figure] = {f"false_alarms_{metric}": count / streams for metric, count in alarms.items()}
    figures |= {"level": LEVEL, "streams": streams, "windows": windows}
    cells: list[dict[str, float | int | str]] = []
    for drop in (0.05, 0.02, 0.01):
        # Fewer and larger windows for what takes long: the test adds up events, wherever they are cut.
        size = per_window if drop == 0.05 else 4 * per_window
        found_all = [_first_alarms(np.random.default_rng(seed), drop, windows, size, windows) for seed in range(drops)]
        for metric in METRICS:
            delays = [(one[metric] + 1) * size if (one := found)[metric] is not None else math.inf for found in found_all]
            median, p90 = np.quantile(delays, [0.5, 0.9], method="higher")
            cells.append(
                {
                    "auc_drop": drop,
                    "metric": metric,
                    "found": sum(math.isfinite(delay) for delay in delays) / drops,
                    # -1: not found within the stream.
                    "baseline_events_p50": float(median) if math.isfinite(median) else -1,
                    "baseline_events_p90": float(p90) if math.isfinite(p90) else -1,
                    "seconds_p50": float(median) / BASELINE_PER_S if math.isfinite(median) else -1,
                }
            )
    return figures | {"delays": cells}


def noticing(quick: bool) -> dict[str, Figure]:
    """How long the detector that is the default, with the settings that are, takes to find a model corrupted, and how often it
    finds one so that is not: in virtual time, at `BASELINE_PER_S`. `detect_s`: from the first bad answer, which comes at the
    beginning of a window, through the lateness of labels and the wait for other nodes' windows, to the verdict; the median of a
    loss of 5 % of AUC. `false_alarms`: corrupted verdicts in `healthy_hours` without any loss.
    """
    section = HealthSection()
    streams, windows, drops = (2, 60, 3) if quick else (100, 360, 100)
    size = round(section.window * BASELINE_PER_S)
    wait_s = section.lateness + SETTLE_MS / 1_000
    alarms = sum(_verdict_windows(section, seed, 0.0, windows, size, stop=False)[0] for seed in range(streams))
    after = [_verdict_windows(section, 10_000 + seed, 0.05, windows, size, stop=True) for seed in range(drops)]
    found = [count * section.window + wait_s for alarm, count in after if alarm]
    median_s = float(np.quantile([*found, *[math.inf] * (drops - len(found))], 0.5, method="higher"))
    return {
        "detect_s": median_s if math.isfinite(median_s) else -1,  # -1: not found within the stream
        "detected": len(found) / drops,
        "false_alarms": alarms,
        "healthy_hours": streams * windows * section.window / 3_600,
    }


def _verdict_windows(section: HealthSection, seed: int, drop: float, windows: int, size: int, *, stop: bool) -> tuple[int, int]:
    """Corrupted verdicts on one stream, and how many windows were looked at."""
    rng, window_ms, alarms = np.random.default_rng(seed), section.window_ms, 0
    detector = Sequential(settings_of(section))
    for number in range(windows):
        arms = _sample(rng, ONLINE_TO_BASELINE * size, drop), _sample(rng, size, 0.0)
        found = detector.observe(Window(number, number * window_ms, (number + 1) * window_ms, arms))
        alarms += sum(one.state == "corrupted" for one in found)
        if stop and alarms:
            return alarms, number + 1
    return alarms, windows


def _first_alarms(rng: np.random.Generator, drop: float, windows: int, size: int, horizon: int) -> dict[str, int | None]:
    """The first window with an alarm, for each metric; both see the same events."""
    tests = {name: (Detection(horizon, scale, 0.0), Difference(scale, 20.0)) for name, scale in METRICS.items()}
    found: dict[str, int | None] = dict.fromkeys(METRICS)
    for window in range(windows):
        online, baseline = _sample(rng, ONLINE_TO_BASELINE * size, drop), _sample(rng, size, 0.0)
        for metric, (detection, difference) in tests.items():
            step = difference.take(online.quality(metric)[0], baseline.quality(metric)[0])
            if step is not None:
                detection.add(window, *step)
            if found[metric] is None and detection.log_evidence >= -math.log(LEVEL):
                found[metric] = window
        if all(one is not None for one in found.values()):
            break
    return found


def _sample(rng: np.random.Generator, events: int, drop: float) -> Sample:
    """Calibrated predictions for the baseline's distance; the worse model spreads clicks and others less, as if calibrated."""
    distance = DISTANCES[drop]
    label = (rng.random(events) < CLICKS).astype(np.float32)
    score = rng.standard_normal(events) + distance * label
    # Bayes: the log-odds of a click given the score, by what the model believes, which is the good distance.
    believed = DISTANCES[0.0]
    odds = math.log(CLICKS / (1 - CLICKS)) + believed * score - believed**2 / 2
    return sample_of(_sigmoid(odds), label)


def _sigmoid(odds: NDArray[np.float64]) -> NDArray[np.float32]:
    return (1 / (1 + np.exp(-odds))).astype(np.float32)
