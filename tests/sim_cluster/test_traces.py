"""Traces are what they say: the published shares of rows change, again and again, and a file holds all of it."""

from pathlib import Path

import numpy as np
import pytest

from sim_cluster.traces import TraceOptions, expected_share, hostile, record, skewed

ROWS = 20_000


def test_the_skewed_trace_changes_the_published_shares() -> None:
    trace = skewed(ROWS, updates_per_s=5.0)
    for begin_s in range(0, 3_600, 600):  # in every ten minutes of the hour: the set drifts, the share stays
        assert trace.share_changed(begin_s, begin_s + 600) == pytest.approx(0.043, rel=0.08)
    assert trace.share_changed(0, 3_600) == pytest.approx(0.10, rel=0.08)


def test_the_hostile_trace_changes_most_rows() -> None:
    trace = hostile(ROWS, duration_s=1_200)
    assert trace.share_changed(0, 600) == pytest.approx(0.58, rel=0.05)
    assert trace.share_changed(600, 1_200) == pytest.approx(0.58, rel=0.05)


def test_updates_are_skewed_and_drift() -> None:
    trace = skewed(ROWS, updates_per_s=5.0)
    counts = np.sort(np.bincount(trace.keys, minlength=ROWS))[::-1]
    assert counts[: ROWS // 100].sum() > 0.3 * counts.sum()  # 1 % of the rows get a third of the updates, over the hour
    first, last = (np.bincount(trace.keys[: len(trace.keys) // 10]), np.bincount(trace.keys[-len(trace.keys) // 10 :]))
    hottest_first, hottest_last = (set(np.argsort(part)[-200:].tolist()) for part in (first, last))
    assert hottest_first - hottest_last
    assert hottest_first & hottest_last


def test_the_expected_share_is_what_is_drawn() -> None:
    for swaps_per_s in (0.0, 1e-3):
        options = TraceOptions(ROWS, 3, 20.0, 4_000, 1.1, swaps_per_s, duration_s=900)
        assert record(options).share_changed(0, 900) == pytest.approx(expected_share(options, 900), rel=0.04)


def test_too_few_updates_are_refused() -> None:
    with pytest.raises(ValueError, match="ask for more"):
        skewed(ROWS, updates_per_s=1.0)


def test_a_window_has_the_steps_of_its_part() -> None:
    trace = skewed(ROWS, updates_per_s=10.0, duration_s=60)
    parts = [keys for begin_s in (0, 20, 40) for _, keys in trace.window(begin_s, begin_s + 20)]
    assert np.array_equal(np.concatenate(parts), trace.keys)
    moments = [at_ms for at_ms, _ in trace.window(20, 40)]
    assert moments == sorted(moments)
    assert 0 <= moments[0] <= moments[-1] < 20_000
    for _, keys in trace.window(0, 60):
        assert len(np.unique(keys)) == len(keys)  # a row once in a step: one stamp, one version
        assert keys.max() < ROWS


def test_a_typical_part_has_the_rate_of_the_whole() -> None:
    trace = skewed(ROWS, updates_per_s=20.0, duration_s=600)
    begin_s = trace.typical_s(30, after_s=100)
    assert 100 <= begin_s <= 570
    updates = sum(len(keys) for _, keys in trace.window(begin_s, begin_s + 30))
    assert updates / 30 == pytest.approx(len(trace.keys) / 600, rel=0.02)


def test_a_seed_gives_one_trace_and_a_file_keeps_it(tmp_path: Path) -> None:
    trace, again, other = (skewed(ROWS, 10.0, seed, duration_s=60) for seed in (1, 1, 2))
    assert np.array_equal(trace.keys, again.keys)
    assert not np.array_equal(trace.keys[:100], other.keys[:100])
    trace.save(tmp_path / "trace.npz")
    loaded = type(trace).load(tmp_path / "trace.npz")
    assert loaded.options == trace.options
    assert np.array_equal(loaded.keys, trace.keys)
    assert np.array_equal(loaded.starts, trace.starts)
