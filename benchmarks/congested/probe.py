"""A process that looks rows up in a node's memory until it sees what was published, and says how long each took."""

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

import ekko

F64 = NDArray[np.float64]
POLL_S = 0.002
ANSWER_S_MAX = 600.0


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """Rows of one step: `number` is in their first column, and larger in every later one."""

    number: int
    keys: NDArray[np.uint64]
    significant: NDArray[np.bool_]
    published_s: float  # CLOCK_MONOTONIC


class Probe:
    """Looks at one node. Use as a context manager."""

    def __init__(self, run_dir: Path, model: str, table: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_look, args=(theirs, run_dir, model, table), daemon=True)
        self._process.start()
        theirs.close()

    def expect(self, expected: Expected) -> None:
        """These were just published."""
        self._pipe.send(expected)

    def finish(self, drain_s: float) -> tuple[F64, F64]:
        """(delays of significant rows, of the others), ms, once all were seen; those not within `drain_s` with what passed."""
        self._pipe.send(drain_s)
        if not self._pipe.poll(drain_s + ANSWER_S_MAX):
            raise RuntimeError("the process that looks rows up does not answer")
        significant, ordinary = self._pipe.recv()
        return significant, ordinary

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join(2.0)
        self._process.kill()


class _Pending:
    """Rows that were not seen yet, and the delays of those that were."""

    def __init__(self) -> None:
        self.keys = np.empty(0, np.uint64)
        self.numbers = np.empty(0)
        self.published_s = np.empty(0)
        self.significant = np.empty(0, np.bool_)
        self.delays: list[F64] = [np.empty(0)]
        self.kinds: list[NDArray[np.bool_]] = [np.empty(0, np.bool_)]

    def add(self, expected: Expected) -> None:
        count = len(expected.keys)
        self.keys = np.concatenate([self.keys, expected.keys])
        self.numbers = np.concatenate([self.numbers, np.full(count, float(expected.number))])
        self.published_s = np.concatenate([self.published_s, np.full(count, expected.published_s)])
        self.significant = np.concatenate([self.significant, expected.significant])

    def take(self, seen: NDArray[np.bool_], now_s: float) -> None:
        self.delays.append((now_s - self.published_s[seen]) * 1_000)
        self.kinds.append(self.significant[seen])
        for name in ("keys", "numbers", "published_s", "significant"):
            setattr(self, name, getattr(self, name)[~seen])

    def result(self) -> tuple[F64, F64]:
        delays, kinds = np.concatenate(self.delays), np.concatenate(self.kinds)
        return delays[kinds], delays[~kinds]


def _look(pipe: Connection, run_dir: Path, model: str, table: str) -> None:
    """Until the other end hangs up: rows to look for, and a number of seconds when there are no more of a measurement."""
    with ekko.Reader(model, run_dir=run_dir, wait=60.0) as reader:
        pending, until_s = _Pending(), float("inf")
        while True:
            try:
                while pipe.poll(0 if len(pending.keys) or until_s < float("inf") else None):
                    told = pipe.recv()
                    if isinstance(told, Expected):
                        pending.add(told)
                    else:
                        until_s = time.monotonic() + told
            except EOFError:
                return
            if len(pending.keys):
                rows = reader.lookup(table, pending.keys)
                pending.take(rows[:, 0] >= pending.numbers, time.monotonic())
            now_s = time.monotonic()
            if until_s < float("inf") and (not len(pending.keys) or now_s >= until_s):
                pending.take(np.ones(len(pending.keys), np.bool_), now_s)
                pipe.send(pending.result())
                pending, until_s = _Pending(), float("inf")
            time.sleep(POLL_S)
