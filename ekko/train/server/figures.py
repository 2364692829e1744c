"""What a model's server has done, and whom it waits for, in figures for operators."""

import time
from collections import Counter, deque
from collections.abc import Set
from typing import Final

import structlog

from ekko.train.server import wire as w

LATENCIES_MAX: Final = 1_024
LATE_S: Final = 10.0  # a worker that is waited for so long is logged

log = structlog.get_logger(__name__)


class Figures:
    """Of one model."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._asks: dict[int, tuple[int, int]] = {}  # pushes that wait for an answer: worker, number
        self._since: dict[tuple[int, int], float] = {}  # when each of them came first
        self._times: Counter[tuple[int, int]] = Counter()  # how often it waits: it is asked again before it is answered
        self._latencies: deque[float] = deque(maxlen=LATENCIES_MAX)  # of pushes, seconds
        self._late: dict[int, float] = {}  # workers that others wait for -> since when
        self._told: set[int] = set()  # of these, those that were logged
        self.pulls = self.pushes = self.refused = self.busy = 0

    def push_came(self, ask: int, push: w.Push) -> None:
        """A push was taken to the machine, maybe once more."""
        self.pushes += 1
        self._asks[ask] = one = push.worker, push.number
        self._times[one] += 1
        self._since.setdefault(one, time.monotonic())

    def answered(self, ask: int, answer: w.Answer) -> None:
        """A request has its answer."""
        if (one := self._asks.pop(ask, None)) is not None:
            self._times[one] -= 1
            if isinstance(answer, w.Pushed):
                self._latencies.append(time.monotonic() - self._since[one])
            if not self._times[one]:
                del self._times[one], self._since[one]
        self.busy += isinstance(answer, w.Failed) and answer.kind == w.BUSY

    def waits_for(self, late: Set[int], now_s: float) -> dict[int, float]:
        """Note which workers others wait for, and log who is for long: worker -> seconds."""
        self._late = {worker: self._late.get(worker, now_s) for worker in sorted(late)}
        for worker, since_s in self._late.items():
            if now_s >= since_s + LATE_S and worker not in self._told:
                self._told.add(worker)
                log.warning("worker_late", model=self._model, worker=worker, waited_s=round(now_s - since_s))
        for worker in sorted(self._told - late):
            self._told.discard(worker)
            log.info("worker_not_late", model=self._model, worker=worker)
        return {worker: round(now_s - since_s, 1) for worker, since_s in self._late.items()}

    def oldest_push_s(self, now_s: float) -> float:
        """Since when the oldest push that has no answer waits for it; 0: none does."""
        return round(now_s - min(self._since.values(), default=now_s), 3)

    def ack_ms(self) -> list[float]:
        """From a push to its answer, of the last ones: median and 99th percentile."""
        ordered = sorted(self._latencies)
        return [round(1_000 * _quantile(ordered, share), 3) for share in (0.5, 0.99)]

    def counts(self) -> dict[str, int]:
        """Requests so far."""
        return {"pulls": self.pulls, "pushes": self.pushes, "refused": self.refused, "busy": self.busy}


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
