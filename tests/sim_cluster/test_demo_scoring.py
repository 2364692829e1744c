"""The demo's figures against their definitions, and a replay against the model that was trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ekko.torch
from sim_cluster.demo import data, evaluation
from sim_cluster.demo.data import Events
from sim_cluster.demo.history import FROZEN, Batch, History, Recorder, Replay, replay_scores
from sim_cluster.demo.learning import STREAM_BATCH, Learner
from sim_cluster.demo.scoring import Scorer

START = 2_000


class Sink:
    """A publisher that forgets."""

    def __init__(self, events: Events) -> None:
        self.tables = dict.fromkeys(events.rows, 16)
        self.stamp = 0

    @contextmanager
    def step(self) -> Iterator["Sink"]:
        yield self

    def publish(self, *_: object) -> None:
        self.stamp += 1

    def publish_dense(self, *_: object) -> None:
        self.stamp += 1


def trained(count: int) -> tuple[Events, Learner, History]:
    """A stream of `count` events after `START`, learnt, and what was published meanwhile; dense with every third step."""
    events = data.generate(1, "test", count=START + count)
    learner = Learner(events, seed=1)
    learner.train_offline(START)
    recorder = Recorder(Sink(events))
    tables = {name: table.weight.detach().numpy().copy() for name, table in learner.model.tables.items()}
    tracker = ekko.torch.track(
        learner.model, learner.optimizer, recorder, learner.model.tracked, dense_every=3, background=False
    )
    tensors = {name: learner.model.get_parameter(name).detach().numpy().copy() for name in tracker.dense_names}
    learnt = []
    for first in range(START, len(events), STREAM_BATCH):
        last = min(first + STREAM_BATCH, len(events))
        learner.learn(first, last)
        learnt.append(last - START)
    tracker.publish_dense()
    return events, learner, History.of(tables, tensors, recorder.batches, [*learnt, learnt[-1]])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40))
def test_auc_is_the_share_of_pairs_ranked_right(events: list[tuple[bool, int]]) -> None:
    labels = np.array([label for label, _ in events], np.float32)
    scores = np.array([score for _, score in events], np.float32) / 5
    pairs = [(p, n) for p in scores[labels > 0] for n in scores[labels == 0]]
    value = evaluation.auc(labels, scores)
    if pairs:
        assert value == pytest.approx(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))
    else:
        assert np.isnan(value)


def test_log_loss_by_hand_and_bounded_where_a_certain_prediction_is_wrong() -> None:
    labels, scores = np.array([1, 0], np.float32), np.array([0.25, 0.5], np.float32)
    assert evaluation.log_loss(labels, scores) == pytest.approx((np.log(4) + np.log(2)) / 2)
    assert evaluation.log_loss(labels, np.array([0, 1], np.float32)) == pytest.approx(np.log(1e6))


def test_bootstrap_interval_has_the_width_that_theory_gives() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(4_000) < 0.5).astype(np.float32)
    good, noise = (labels + rng.normal(size=4_000)).astype(np.float32), rng.random(4_000).astype(np.float32)
    values = evaluation.resampled_aucs(labels, np.stack([good, noise, good]), np.arange(4_000), seed=0)
    gain, itself = evaluation.gain(values[:, 0], values[:, 1]), evaluation.gain(values[:, 0], values[:, 2])
    difference = evaluation.auc(labels, good) - evaluation.auc(labels, noise)
    assert gain.mean == pytest.approx(difference, abs=0.002)
    # Hanley and McNeil's standard errors of both AUCs, 0.0068 and 0.0091, hardly correlated: 1.96 * 0.0114 each way.
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * 0.0114, rel=0.1)
    assert (itself.low, itself.high) == (0, 0)


def test_bootstrap_by_group_is_wider_where_events_of_a_group_agree() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 20)
    labels = (rng.random(100)[groups] < 0.5).astype(np.float32)
    scores, other = (rng.random(100)[groups].astype(np.float32) for _ in range(2))
    single, together = (
        evaluation.gain(*evaluation.resampled_aucs(labels, np.stack([scores, other]), drawn, seed=0).T)
        for drawn in (np.arange(2_000), groups)
    )
    assert together.high - together.low > 3 * (single.high - single.low)


def test_auc_over_time_ends_with_the_last_window() -> None:
    rng = np.random.default_rng(0)
    labels, scores = (rng.random(500) < 0.5).astype(np.float32), rng.random(500).astype(np.float32)
    ends, values = evaluation.auc_over_time(labels, scores, window=100, points=5)
    assert ends.tolist() == [100, 200, 300, 400, 500]
    assert values[-1] == evaluation.auc(labels[400:], scores[400:])


def test_a_replay_ends_with_the_trained_model() -> None:
    _, learner, history = trained(500)
    replay = Replay(history)
    replay.advance(len(history.learnt))
    for name, table in learner.model.tables.items():
        keys = np.arange(table.num_embeddings, dtype=np.uint64)
        np.testing.assert_array_equal(replay.lookup(name, keys), table.weight.detach().numpy())
    for name in history.tensors:
        np.testing.assert_array_equal(replay.dense(name), learner.model.get_parameter(name).detach().numpy())


def test_replay_in_steps_and_at_once_agree() -> None:
    _, _, history = trained(500)
    once, stepwise = Replay(history), Replay(history)
    once.advance(20)
    for batch in range(21):
        stepwise.advance(batch)
    for name, table in history.tables.items():
        keys = np.arange(len(table.start), dtype=np.uint64)
        np.testing.assert_array_equal(once.lookup(name, keys), stepwise.lookup(name, keys))
    for name in history.tensors:
        np.testing.assert_array_equal(once.dense(name), stepwise.dense(name))


def test_delayed_scores_are_those_of_a_model_that_far_behind() -> None:
    events, _, history = trained(400)
    delay = 3 * STREAM_BATCH
    scores = replay_scores(events, history, START, delay)
    behind = Learner(events, seed=1)
    behind.train_offline(START)
    server = Scorer(events, ModelSource(behind))
    dense = {name: tensor.start for name, tensor in history.tensors.items()}  # lags too: comes with every third batch
    for batch, first in enumerate(range(0, 400, STREAM_BATCH)):
        known = max(0, batch - 3)
        if known:
            behind.learn(START + first - delay - STREAM_BATCH, START + first - delay)
        if known and known % 3 == 0:
            dense = {name: behind.model.get_parameter(name).detach().numpy().copy() for name in dense}
        server._source.values = dense
        np.testing.assert_allclose(
            scores[first : first + STREAM_BATCH], server.score(START + first, START + first + STREAM_BATCH)
        )


class ModelSource:
    """Rows of a model in this process, with dense values from elsewhere."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.values: dict[str, np.ndarray] = {}

    def lookup(self, table: str, keys: np.ndarray) -> np.ndarray:
        return self._learner.model.tables[table].weight.detach().numpy()[keys.astype(np.int64)]

    def dense(self, name: str) -> np.ndarray:
        return self.values[name]


def test_frozen_scores_are_those_of_the_model_at_the_start() -> None:
    events, _, history = trained(400)
    learner = Learner(events, seed=1)
    learner.train_offline(START)
    with torch.no_grad():
        ids = {name: torch.from_numpy(ids[START:]) for name, ids in events.ids.items()}
        expected = torch.sigmoid(learner.model(torch.from_numpy(events.dense[START:]), ids))
    np.testing.assert_allclose(replay_scores(events, history, START, FROZEN), expected.numpy(), rtol=1e-5)


def test_history_survives_a_file(tmp_path: Path) -> None:
    events, _, history = trained(300)
    history.save(tmp_path / "history.npz")
    again = History.load(tmp_path / "history.npz")
    assert np.array_equal(again.learnt, history.learnt)
    assert np.array_equal(replay_scores(events, again, START, 64), replay_scores(events, history, START, 64))


def test_recorder_keeps_only_what_was_published() -> None:
    events = data.generate(1, "test", count=50)
    recorder = Recorder(Sink(events))
    rows = np.ones((2, 16), np.float32)
    with recorder.step() as step:
        step.publish("item", np.array([1, 2], np.uint64), rows)
        step.publish_dense("top", rows)

    def fail() -> None:
        with recorder.step() as step:
            step.publish("item", np.array([3], np.uint64), rows[:1])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    [batch] = recorder.batches
    assert isinstance(batch, Batch)
    assert (batch.row_count, batch.payload_bytes) == (2, 16 + 128 + 128)
