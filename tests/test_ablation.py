"""What the ablation measures with: delays of updates, the scaled test-bed, and the baselines on it."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.ablation import SYSTEMS
from benchmarks.wan.delays import Delays
from benchmarks.wan.replay import Window, replay
from benchmarks.wan.testbed import MODEL_BYTES, ROW_BYTES, TABLE, Bed, nodes
from sim_cluster.costs import COSTS, CostTable
from sim_cluster.traces import skewed

T = TABLE.id


def keys(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def test_the_slowest_replica_counts() -> None:
    delays = Delays("a", ["b", "c"], 10)
    delays.observe("a", T, keys(1, 2), 100, 0.0)
    delays.observe("b", T, keys(1, 2), 100, 5.0)
    assert delays.waiting() == 2
    delays.observe("c", T, keys(2), 100, 7.0)
    assert delays.waiting() == 1
    delays.observe("c", T, keys(1), 100, 11.0)
    delays.observe("c", T, keys(1), 100, 99.0)  # a repeat shows nothing new
    summary = delays.summary(0, 1, 200)
    assert (summary.updates, summary.missing) == (2, 0)
    assert summary.mean_ms == pytest.approx((11 + 7) / 2)
    assert summary.max_ms == 11


def test_a_newer_version_shows_the_older_ones_too() -> None:
    delays = Delays("a", ["b"], 10)
    for stamp, at_ms in ((100, 0.0), (200, 10.0), (300, 20.0)):
        delays.observe("a", T, keys(4), stamp, at_ms)
    delays.observe("b", T, keys(4), np.array([200], np.uint64), 25.0)  # skips the first, as a pull does
    assert delays.waiting() == 1
    delays.observe("b", T, keys(4), 100, 30.0)  # late: it was visible by the second
    delays.observe("b", T, keys(4), 300, 50.0)
    summary = delays.summary(0, 100, 100)
    assert summary.missing == 0
    assert summary.mean_ms == pytest.approx((25 + 15 + 30) / 3)


def test_what_never_came_counts_with_the_time_that_passed() -> None:
    delays = Delays("a", ["b"], 10)
    delays.observe("a", T, keys(1), 100, 10.0)
    summary = delays.summary(0, 100, 1_000)
    assert (summary.missing, summary.max_ms) == (1, 990)


def test_the_test_bed_keeps_the_paper_s_proportions() -> None:
    for rows in (4_000, 200_000):
        bed = Bed(rows)
        seconds = rows * ROW_BYTES / bed.wan().links["r0/r5"].shared_bytes_per_ms / 1_000
        assert seconds == pytest.approx(MODEL_BYTES / 600e6, rel=1e-6)  # the whole model over one link
        assert bed.wan(5).links["r0/r5"].shared_bytes_per_ms * 2 == pytest.approx(bed.wan().links["r0/r5"].shared_bytes_per_ms)
    assert len(nodes()) == 30


# `push` is in the bench at its tiny size; under this load it would take half a minute.
@pytest.mark.parametrize("name", ["primary_push", "log_tree", "checkpoint"])
def test_every_update_reaches_every_replica(name: str) -> None:
    bed = Bed(2_000)
    costs = CostTable(**dict.fromkeys(COSTS, 1.0))
    trace = skewed(bed.rows, 100 * bed.updates_per_s, duration_s=10)
    with bed.limits():
        outcome = replay(replace(SYSTEMS[name], drain_s=3_600), trace, Window(0, 1, 4, 3_600), bed, costs, bed.wan())
    assert outcome.delays.updates > 50
    assert outcome.delays.missing == 0
    assert outcome.delays.mean_ms > 90  # the farthest region is that far away
    assert outcome.bytes_cross > 9 * 144  # one copy of each row into each other region


def test_primary_push_sends_three_copies_into_a_region_and_the_tree_one() -> None:
    bed = Bed(2_000)
    costs = CostTable(**dict.fromkeys(COSTS, 1.0))
    trace = skewed(bed.rows, 100 * bed.updates_per_s, duration_s=10)
    with bed.limits():
        star, tree = (
            replay(replace(SYSTEMS[name], drain_s=3_600), trace, Window(0, 1, 4, 3_600), bed, costs, bed.wan())
            for name in ("primary_push", "log_tree")
        )
    assert star.bytes_cross / tree.bytes_cross == pytest.approx(3, rel=0.1)
