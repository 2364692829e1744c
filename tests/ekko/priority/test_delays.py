"""Delays of significant and of ordinary rows, apart, as metrics and status say them."""

import numpy as np
import pytest

from ekko.metrics import DELAY_BUCKETS_S
from ekko.priority.delays import WINDOW_MS, RowDelays, _bin_of
from ekko.priority.threshold import BINS, BINS_PER_DOUBLING, DOUBLINGS, bins_of, log2_of
from p2p.classes import significant_by_step, significant_rows
from p2p.replica import RowColumns
from p2p.stamps import make_stamp


def test_both_kinds_are_counted_apart() -> None:
    delays = RowDelays()
    for _ in range(99):
        delays.add(1, 400.0, 100, 1, 0)
    delays.add(1, 2.0, 100, 100, 0)
    delays.add(2, 9_000.0, 7, 0, 0)
    picture = delays.picture((1,))
    assert (picture["ordinary"].rows, picture["significant"].rows) == (99 * 99, 199)
    assert picture["ordinary"].p50_ms == pytest.approx(400, rel=0.02)
    assert picture["significant"].p50_ms == pytest.approx(2, rel=0.02)
    assert picture["significant"].p99_ms == pytest.approx(400, rel=0.02)
    assert delays.picture((1, 2))["ordinary"].rows == 99 * 99 + 7, "partitions of one model"
    assert delays.picture((3,))["ordinary"].p50_ms is None
    counts, total_s = delays.buckets((1,), "significant", DELAY_BUCKETS_S)
    assert counts[DELAY_BUCKETS_S.index(0.005)] == 100
    assert counts[DELAY_BUCKETS_S.index(0.5)] == counts[-1] == 199
    assert total_s == pytest.approx(99 * 0.4 + 100 * 0.002, rel=0.02)


def test_what_was_lately_is_forgotten_and_the_total_is_not() -> None:
    delays = RowDelays()
    delays.add(1, 400.0, 10, 0, 1)
    delays.add(1, 3.0, 10, 0, WINDOW_MS + 1)
    assert delays.picture((1,))["ordinary"].p99_ms == pytest.approx(400, rel=0.02)
    delays.add(1, 3.0, 10, 0, 2 * WINDOW_MS + 2)
    assert delays.picture((1,))["ordinary"].p99_ms == pytest.approx(3, rel=0.02)
    assert delays.picture((1,))["ordinary"].rows == 30
    delays.add(1, 0.0, 1, 1, 9 * WINDOW_MS)
    assert delays.picture((1,))["ordinary"].p50_ms is None
    assert delays.picture((1,))["significant"].p50_ms == 0


def test_significant_rows_of_a_step_and_of_a_group() -> None:
    keys, rows = np.arange(4, dtype=np.uint64), np.zeros((4, 4), np.uint8)
    classes = np.array([0, 127, 128, 255], np.uint8)
    assert significant_rows([RowColumns(1, keys, rows, None, classes), RowColumns(2, keys, rows)]) == 2
    stamps = np.array([5, 7, 7, 9], np.uint64)
    group = [
        RowColumns(1, keys, rows, stamps, classes),
        RowColumns(2, keys, rows, stamps),
        RowColumns(3, keys, rows, stamps, classes),
    ]
    assert significant_by_step(group, np.array([5, 7, 9], np.uint64)) == [0, 2, 2]


def test_rows_of_a_backlog_are_as_late_as_their_stamps_say() -> None:
    delays, unix_ms = RowDelays(), 1_700_000_000_000
    stamps = np.array([make_stamp(unix_ms - late_ms, 0, 3) for late_ms in (10, 10, 5_000, 5_000)], np.uint64)
    delays.add_rows(1, stamps, np.array([128, 200, 127, 0], np.uint8), unix_ms, 0)
    delays.add_rows(1, stamps[2:], None, unix_ms, 0)
    picture = delays.picture((1,))
    assert (picture["significant"].rows, picture["ordinary"].rows) == (2, 4)
    assert picture["significant"].p99_ms == pytest.approx(10, rel=0.02)
    assert picture["ordinary"].p50_ms == pytest.approx(5_000, rel=0.02)


def test_one_delay_is_in_the_bin_in_which_arrays_of_them_would_be() -> None:
    rng = np.random.default_rng(3)
    edges = np.exp2(np.arange(BINS + 1) / BINS_PER_DOUBLING - DOUBLINGS).astype(np.float32)
    near = [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))]
    drawn = np.exp2(rng.uniform(-DOUBLINGS - 2, DOUBLINGS + 2, 20_000))
    delays_ms = np.concatenate([*near, drawn, [0.0, 1e300, 0.001, 1.0, 60_000.0]])
    with np.errstate(over="ignore"):
        wanted = bins_of(log2_of(delays_ms.astype(np.float32)))
        assert [_bin_of(one) for one in delays_ms.tolist()] == wanted.tolist()
