"""What predictions are worth that are made behind a narrow link: the demo's stream, in virtual time.

The trainer's steps are recorded once (`benchmarks.congested.stream`) and published in a virtual cluster, with the classes that
their origin gives them. A replica 90 ms away predicts each step's events with the rows that it holds at the moment they
happen; then they are learnt. So the outboxes differ in nothing but the age of the rows.

Two thousand events a second, four times the demo's pace, so that what the nodes tell of each other is little of what passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from benchmarks.congested.stream import START_FRACTION, Step, Stream, learn
from benchmarks.congested.virtual import BUDGET_SHARE, HOME, TRAINER, Crossed, machine_with, pipes
from ekko.codec import decode, encode
from ekko.model import DENSE_DIM, DENSE_SPEC, ModelSpec, TableSpec, TensorSpec
from ekko.priority.origin import Priorities
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.replica import RowColumns
from sim_cluster.demo.evaluation import auc
from sim_cluster.demo.learning import DIM
from sim_cluster.demo.scoring import Scorer
from sim_cluster.virtual import VirtualCluster

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]

AWAY, SCORING = "ap", "ap-0"
EVENTS_PER_S = 2_000
SEED = 6
WAIT_MS_MAX = 600_000
OUTBOXES = ("state", "fifo", "none")


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One run of the stream."""

    scores: F32
    crossed_bytes_per_s: float
    equal: bool  # both nodes hold the same once the link is wide again


def figures(share: int) -> dict[str, object]:
    """AUC at `share` percent of the bandwidth that the stream needs: with each outbox, uncongested, and of the state before."""
    stream = learn()
    labels = stream.events.labels[stream.start :]
    calm, frozen = _play(stream, "state", None)
    aucs = {"uncongested": auc(labels, calm.scores), "frozen": auc(labels, frozen)}
    equal = calm.equal
    for outbox in OUTBOXES:
        done, _ = _play(stream, outbox, calm.crossed_bytes_per_s * share / 100)
        aucs[outbox] = auc(labels, done.scores)
        equal = equal and done.equal
    about = {"dataset": stream.events.name, "events": len(labels), "learnt_before": START_FRACTION, "equal": int(equal)}
    return {f"auc_at_{share}_percent": aucs, f"auc_at_{share}_percent_of": about}


def _play(stream: Stream, outbox: str, rate_bytes_per_s: float | None) -> tuple[Served, F32]:
    """Publish everything through a link of this rate; the scores of the far replica, and those of the state it began with."""
    model = _model_of(stream)
    cluster = VirtualCluster(SEED, pipes(None), model, make_machine=machine_with(outbox), capacity_rows=4_096)
    cluster.add(TRAINER, HOME, "train")
    cluster.add(SCORING, AWAY, "serve", [TRAINER])
    publishing = _Publishing(cluster, model)
    for step in stream.first:
        publishing.publish(step)
    _until(cluster, lambda: _are_equal(cluster))
    publishing.begin_anew()
    scorer = Scorer(stream.events, _Replica(cluster, model))
    frozen = scorer.score(stream.start, len(stream.events))
    crossed, begin_ms = Crossed(cluster), cluster.now_ms
    cluster.options = pipes(rate_bytes_per_s)
    cluster.set_rate(HOME, AWAY, None if rate_bytes_per_s is None else rate_bytes_per_s * BUDGET_SHARE)
    scores = []
    for first, last, step in stream.steps:
        cluster.run(begin_ms + (last - stream.start) * 1_000 // EVENTS_PER_S - cluster.now_ms)
        scores.append(scorer.score(first, last))
        publishing.publish(step)
    rate = crossed.bytes * 1_000 / (cluster.now_ms - begin_ms)
    cluster.options = pipes(None)
    cluster.set_rate(HOME, AWAY, None)
    _until(cluster, lambda: _are_equal(cluster))
    return Served(np.concatenate(scores), rate, _are_equal(cluster)), frozen


def _model_of(stream: Stream) -> ModelSpec:
    tensors = {name: TensorSpec(name, array.shape, "float32") for step in stream.first for name, array in step.dense.items()}
    return ModelSpec("demo", tables={name: TableSpec(name, DIM) for name in stream.events.rows}, tensors=tensors)


class _Publishing:
    """The trainer's node: gives rows their classes, as it does for any publisher, and publishes them."""

    def __init__(self, cluster: VirtualCluster, model: ModelSpec) -> None:
        self._cluster, self._model = cluster, model
        self._store = cluster.nodes[TRAINER].store.models[model.name]
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget how much what was published until now mattered: a whole state, row by row, is no part of a stream."""
        self._priorities = Priorities({self._model.name: self._store})

    def publish(self, step: Step) -> None:
        columns, significance = [], list[F32 | None]()
        for table, (keys, rows, weights) in step.tables.items():
            spec = self._model.tables[table]
            columns.append(RowColumns(spec.id, keys, encode(spec.codec, rows)))
            significance.append(weights)
        if step.dense:
            columns.append(_dense_columns(self._model, step.dense))
            significance.append(None)
        classified = self._priorities.classify(self._store, columns, significance, self._cluster.now())
        self._cluster.ask(TRAINER, lambda request: m.PublishRequested(request, self._model.id, classified))


def _dense_columns(model: ModelSpec, dense: dict[str, F32]) -> RowColumns:
    keys, rows = [], []
    for name, array in dense.items():
        spec = model.tensors[name]
        padded = np.zeros((spec.rows, DENSE_DIM), np.float32)
        padded.reshape(-1)[: array.size] = array.reshape(-1)
        keys.append(spec.keys)
        rows.append(padded)
    every, values = np.concatenate(keys), np.concatenate(rows)
    order = np.argsort(every)
    return RowColumns(DENSE_SPEC.id, every[order], encode(DENSE_SPEC.codec, values[order]))


class _Replica:
    """Rows of the far replica at the moment of the call (`sim_cluster.demo.scoring.Source`)."""

    def __init__(self, cluster: VirtualCluster, model: ModelSpec) -> None:
        self._store, self._model = cluster.nodes[SCORING].store.models[model.name], model

    def lookup(self, table: str, keys: U64) -> F32:
        """float32[n, dim]; zeros for absent keys."""
        spec = self._model.tables[table]
        return _values(self._store, spec, keys)

    def dense(self, name: str) -> F32:
        """Of the newest version of each of its rows."""
        spec = self._model.tensors[name]
        return _values(self._store, DENSE_SPEC, spec.keys).reshape(-1)[: prod(spec.shape)].reshape(spec.shape)


def _values(store: ModelStore, spec: TableSpec, keys: U64) -> F32:
    unique, inverse = np.unique(keys, return_inverse=True)
    places = store.places_of(spec.id, unique)
    held = store.read(spec.id, np.sort(places[places >= 0]))
    values = np.zeros((len(unique), spec.dim), np.float32)
    values[np.searchsorted(unique, held.keys)] = decode(spec.codec, held.rows, spec.dim)
    chosen: F32 = values[inverse]
    return chosen


def _are_equal(cluster: VirtualCluster) -> bool:
    """Whether the far replica holds the trainer's rows under the same stamps."""
    near, far = (_stamps(cluster, name) for name in (TRAINER, SCORING))
    return near == far


def _stamps(cluster: VirtualCluster, name: str) -> dict[tuple[int, int], int]:
    store = cluster.nodes[name].store.models[cluster.model.name]
    stamps: dict[tuple[int, int], int] = {}
    for selection in store.scan_since(np.zeros((store.shards, 4_096), np.uint64)):
        columns = store.read(selection.table, selection.slots)
        assert columns.stamps is not None
        keys = zip([selection.table] * len(columns.keys), columns.keys.tolist(), strict=True)
        stamps |= dict(zip(keys, columns.stamps.tolist(), strict=True))
    return stamps


def _until(cluster: VirtualCluster, condition: Callable[[], bool]) -> None:
    cluster.run_until(condition, WAIT_MS_MAX, 500)
