"""The threshold of a model: what share of its rows is significant, whatever their values look like."""

import numpy as np
import pytest

from ekko.priority.origin import class_of
from ekko.priority.threshold import COUNTED_TOGETHER, PARTS, Percentile, log2_of, threshold_of
from p2p import classes

F32 = np.float32
WINDOW_MS = 60_000


def share_of_significant(values: np.ndarray, percentile: Percentile) -> float:
    return float((class_of(log2_of(values), percentile.threshold)[0] >= classes.SIGNIFICANT).mean())


@pytest.mark.parametrize("k", [50.0, 90.0, 99.0, 99.9])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(lambda rng: rng.lognormal(0, 3, 100_000), id="lognormal"),
        pytest.param(lambda rng: rng.exponential(1e-12, 100_000), id="tiny"),
        pytest.param(lambda rng: rng.pareto(1.0, 100_000) * 1e9, id="heavy-tail"),
    ],
)
def test_the_share_of_significant_rows_is_what_was_asked_for(k, values) -> None:
    drawn = values(np.random.default_rng(1)).astype(F32)
    percentile = Percentile(k, 60)
    percentile.add(log2_of(drawn), 0)
    wanted = 1 - k / 100
    share = share_of_significant(drawn, percentile)
    # A bin is 2 % of its value: in the tails drawn here up to a tenth of the rows above.
    assert 0.88 * wanted <= share <= wanted
    assert threshold_of(percentile.histogram, wanted) == percentile.threshold


@pytest.mark.parametrize("value", [1.0, 0.37, 1e-30, 1e-38, 0.0])
def test_among_equals_nothing_stands_out(value: float) -> None:
    percentile = Percentile(99, 60)
    equal = np.full(10_000, value, F32)
    percentile.add(log2_of(equal), 0)
    assert share_of_significant(equal, percentile) == 0
    assert share_of_significant(np.full(1, max(value, 2.0**-60) * 2, F32), percentile) == 1


def test_too_few_rows_say_nothing() -> None:
    percentile = Percentile(99, 60)
    for second in range(199):
        percentile.add(log2_of(np.full(1, second + 1, F32)), second * 10)
    assert percentile.threshold is None
    assert class_of(log2_of(np.ones(3, F32)), None)[0].tolist() == [classes.NOT_KNOWN] * 3
    percentile.add(log2_of(np.full(1, 200, F32)), 2_000)
    assert percentile.threshold is not None


def test_one_row_batches_are_counted_together() -> None:
    one, many = Percentile(90, 60), Percentile(90, 60)
    values = np.random.default_rng(2).exponential(1, 4 * COUNTED_TOGETHER).astype(F32)
    for value in values:
        one.add(log2_of(value.reshape(1)), 0)
    many.add(log2_of(values), 0)
    one.add(log2_of(values[:0]), WINDOW_MS // PARTS - 1)
    assert (one.histogram == many.histogram).all()
    assert one.threshold == many.threshold


def test_the_window_forgets() -> None:
    percentile = Percentile(90, 60)
    percentile.add(log2_of(np.full(10_000, 1e6, F32)), 0)
    for now_ms in range(1_000, WINDOW_MS + 11_000, 1_000):
        percentile.add(log2_of(np.full(100, 1.0, F32)), now_ms)
    assert percentile.threshold == pytest.approx(0, abs=0.3)
    assert percentile.histogram.sum() <= 100 * 60


def test_an_idle_model_keeps_its_threshold_until_enough_was_seen_again() -> None:
    percentile = Percentile(90, 60)
    percentile.add(log2_of(np.full(1_000, 1e3, F32)), 0)
    before = percentile.threshold
    percentile.add(log2_of(np.full(5, 1.0, F32)), 10 * WINDOW_MS)
    assert percentile.threshold == before, "five rows say nothing about a model"
    percentile.add(log2_of(np.full(100, 1.0, F32)), 10 * WINDOW_MS + 1_000)
    assert percentile.threshold == pytest.approx(0, abs=0.3)


def test_histograms_add_up() -> None:
    rng = np.random.default_rng(3)
    halves = [rng.exponential(1, 10_000).astype(F32), rng.exponential(100, 10_000).astype(F32)]
    apart = [Percentile(99, 60) for _ in halves]
    whole = Percentile(99, 60)
    for percentile, values in zip(apart, halves, strict=True):
        percentile.add(log2_of(values), 0)
        whole.add(log2_of(values), 0)
    assert threshold_of(apart[0].histogram + apart[1].histogram, 0.01) == whole.threshold


def test_a_class_is_eight_steps_a_doubling() -> None:
    values = np.array([0, 1e-30, 0.5, 1, 2, 4, 1e30], F32)
    assert class_of(log2_of(values), 0.0)[0].tolist() == [1, 1, 120, 128, 136, 144, 254]
