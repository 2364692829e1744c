"""Corrupted feeds: what they change, what they leave alone, and that a model which learns them does get worse."""

import numpy as np
import pytest

from sim_cluster.demo import data
from sim_cluster.demo.data import Events
from sim_cluster.demo.evaluation import auc
from sim_cluster.demo.rollback.faults import EXPLOSION, Fault, Kind, corrupted
from sim_cluster.demo.rollback.plan import LONGER, STAGES, Plan, Stage, events_of, stream_start
from sim_cluster.demo.rollback.replay import unguarded_scores

KINDS: tuple[Kind, ...] = ("shuffled labels", "exploding gradients", "slow drift")


@pytest.fixture(scope="module")
def events() -> Events:
    return data.generate(0, "a test", count=6_000)


@pytest.mark.parametrize("kind", KINDS)
def test_only_labels_of_the_stretch_change(events: Events, kind: Kind) -> None:
    before = events.labels.copy()
    feed = corrupted(events, [Fault(kind, 1_000, 2_000)], seed=1)
    assert np.array_equal(events.labels, before)
    assert not np.array_equal(feed.labels[1_000:2_000], before[1_000:2_000])
    outside = np.r_[0:1_000, 2_000:6_000]
    assert np.array_equal(feed.labels[outside], before[outside])
    assert np.array_equal(feed.dense, events.dense)
    assert np.isfinite(feed.labels).all()
    again = corrupted(events, [Fault(kind, 1_000, 2_000)], seed=1)
    assert np.array_equal(again.labels, feed.labels)


def test_shuffled_labels_are_the_same_ones_in_another_order(events: Events) -> None:
    feed = corrupted(events, [Fault("shuffled labels", 0, 6_000)], seed=1)
    assert feed.labels.sum() == events.labels.sum()
    agree = float((feed.labels == events.labels).mean())
    share = float(events.labels.mean())
    assert agree == pytest.approx(share**2 + (1 - share) ** 2, abs=0.03)  # as often as chance has it


def test_labels_that_explode_grow_from_one_to_the_end(events: Events) -> None:
    feed = corrupted(events, [Fault("exploding gradients", 1_000, 2_000)], seed=1)
    positive = feed.labels[1_000:2_000][events.labels[1_000:2_000] > 0]
    assert (np.diff(positive) > 0).all()
    assert 1 <= positive[0] < 1.2
    assert EXPLOSION * 0.8 < positive[-1] <= EXPLOSION * 1.001
    assert set(feed.labels[1_000:2_000][events.labels[1_000:2_000] == 0]) == {0.0}


def test_a_drift_is_harmless_at_first_and_the_opposite_at_last(events: Events) -> None:
    feed = corrupted(events, [Fault("slow drift", 0, 6_000)], seed=1)
    wrong = (feed.labels != events.labels).reshape(6, 1_000).mean(axis=1)
    assert np.allclose(wrong, (np.arange(6) + 0.5) / 6, atol=0.06)


def test_faults_that_overlap_or_end_too_late_are_refused(events: Events) -> None:
    with pytest.raises(ValueError, match="overlap, or end beyond the 6000 events"):
        corrupted(events, [Fault("slow drift", 0, 6_001)], seed=1)
    with pytest.raises(ValueError, match="overlap"):
        corrupted(events, [Fault("slow drift", 100, 200), Fault("shuffled labels", 150, 300)], seed=1)
    with pytest.raises(ValueError, match="at least one event"):
        Fault("slow drift", 5, 5)


def test_a_stream_is_the_last_of_the_events_with_room_for_stages_that_take_longer() -> None:
    stages = (Stage("shuffled labels", 100, 50, 10), Stage("slow drift", 20, 30, 40))
    assert (events_of(stages), stream_start(1_000, stages)) == (325, 675)
    assert stream_start(100_000) == 100_000 - int(LONGER * sum(stage.events for stage in STAGES))
    plan = Plan(675, 325, 10.0, ())
    assert plan.seconds == 32.5
    with pytest.raises(ValueError, match="the stages need 208 events, and there are 100"):
        stream_start(100, (Stage("shuffled labels", 100, 50, 10),))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_learns_from_it_gets_worse(events: Events, kind: Kind) -> None:
    """Before the fault nothing differs, to the bit; at its end the model knows less than it did."""
    start, first = 2_500, 3_000
    clean = unguarded_scores(events, events, start, seed=0)
    bad = unguarded_scores(events, corrupted(events, [Fault(kind, first, 6_000)], seed=0), start, seed=0)
    assert np.array_equal(clean[: first - start], bad[: first - start])
    late = slice(2_000, 3_500)
    truth = events.labels[start:][late]
    assert auc(truth, bad[late]) < auc(truth, clean[late]) - 0.03
