"""The demo's stream, learnt once: what its trainer publishes, step by step, and the state that it begins with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

import ekko.torch
from ekko.torch import PublishStep
from sim_cluster.demo import data
from sim_cluster.demo.learning import DIM, STREAM_BATCH, Learner
from sim_cluster.demo.trainer import DENSE_EVERY

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]

START_FRACTION = 0.6  # of the events is learnt before the stream begins, as in the demo
SEED = 0


@dataclass(slots=True, eq=False)
class Step:
    """One published step; `stamp` is not known before it is replayed."""

    tables: dict[str, tuple[U64, F32, F32 | None]] = field(default_factory=dict)  # keys, rows, significance
    dense: dict[str, F32] = field(default_factory=dict)
    stamp: int = 0

    def publish(self, table: str, keys: U64, rows: F32, significance: F32 | None = None) -> None:
        """See `ekko.torch.PublishStep`; keys ascend, as the protocol wants them."""
        order = np.argsort(keys)
        self.tables[table] = keys[order].copy(), rows[order].copy(), None if significance is None else significance[order]

    def publish_dense(self, name: str, array: F32) -> None:
        """See `ekko.torch.PublishStep`."""
        self.dense[name] = array.copy()


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Events and what was learnt of them."""

    events: data.Events
    start: int  # the first event of the stream
    first: tuple[Step, ...]  # the state at its beginning
    steps: tuple[tuple[int, int, Step], ...]  # (first event, behind the last one, what learning them changed)


def learn() -> Stream:
    """Learn it; in a process of its own."""
    torch.set_num_threads(1)  # others run beside it
    events = data.load()
    start = int(START_FRACTION * len(events))
    learner, recorder = Learner(events, SEED), _Recorder(dict.fromkeys(events.rows, DIM))
    learner.train_offline(start)
    model = learner.model
    tracker = ekko.torch.track(model, learner.optimizer, recorder, model.tracked, dense_every=DENSE_EVERY, background=False)
    tracker.publish_all()
    first = tuple(recorder.take())
    steps = []
    for begin in range(start, len(events), STREAM_BATCH):
        end = min(begin + STREAM_BATCH, len(events))
        learner.learn(begin, end)
        (step,) = recorder.take()
        steps.append((begin, end, step))
    return Stream(events, start, first, tuple(steps))


class _Recorder:
    """A publisher (`ekko.torch.StepPublisher`) that only writes down what it is given."""

    def __init__(self, tables: dict[str, int]) -> None:
        self.tables = tables
        self._steps: list[Step] = []

    @contextmanager
    def step(self) -> Iterator[PublishStep]:
        step = Step()
        yield step
        self._steps.append(step)

    def take(self) -> list[Step]:
        """Those since the last time."""
        taken, self._steps = self._steps, []
        return taken
