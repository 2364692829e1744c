"""A publisher whose model is rolled back: its steps are refused, or wait; then it learns what was taken back.

A step that was worked out before a rollback and arrives after it would write the bad rows again. So the node refuses steps of
publishers that have not asked yet what was restored (`ekko.restored`). One that waits asks by itself, and drops its step as a
whole: also rows that were not restored were worked out from ones that were, since gradients go through all that they meet. What
it dropped `Publisher.restored` names beside what was restored, as these rows are served: who loads that trains what is served.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Literal

import numpy as np

from ekko.codec import decode
from ekko.errors import EkkoError, ModelError, PublishError
from ekko.local import FAILURES, FENCED, RESTORED, Answer, Failed, PublishStep
from ekko.model import DENSE_DIM, DENSE_TABLE, TensorSpec
from ekko.restored import KEYS_MAX, Restored, RestoredAsk, RestoredPage
from p2p.replica import U64

# How often a publisher that waits looks whether it may go on, at first and at last.
LOOK_S: Final = 0.02
LOOK_S_MAX: Final = 0.5

WhileFenced = Literal["raise", "wait"]


class Pause:
    """What one publisher knows of rollbacks of its model. Safe for threads.

    Args:
        model: its name.
        ask: sends a request to the node.
        wait_s: how long a step waits for the end of a rollback; None: it is refused at once.
    """

    def __init__(self, model: str, ask: Callable[[RestoredAsk], Answer], wait_s: float | None) -> None:
        self._model = model
        self._ask = ask
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._kept: list[Restored] = []  # to be handed out
        self._dropped: dict[int, U64] = {}  # by table id: keys of steps that were dropped, ascending
        self.rows_left_out = 0
        try:
            self.epoch: int | None = self._page(RestoredAsk(model)).epoch
        except PublishError:
            self.epoch = None  # the node is of a release before, and refuses nobody for this

    def look_back(self, epoch: int) -> None:
        """Know of no rollback after this one, so that `restored` tells what later ones wrote."""
        with self._lock:
            if self.epoch is not None:
                self.epoch = min(self.epoch, epoch)

    @property
    def has_kept(self) -> bool:
        """Whether something is kept for `restored`."""
        return bool(self._kept or self._dropped)

    def retry(self, step: PublishStep, answer: Failed, dims: Mapping[int, tuple[str, int]], codec: str) -> PublishStep | None:
        """A step was refused; what to send instead, once that may be, or None: it is dropped, since rows were restored.

        Args:
            step: as it was refused.
            answer: why.
            dims: table id -> name and width.
            codec: of the model.

        Raises:
            ModelError: it is refused for good, or the rollback takes too long.
        """
        if self._wait_s is None:
            raise FAILURES[answer.kind](f"model {self._model!r}: {answer.reason}")
        if answer.kind == FENCED:
            self._await_end(answer.reason)
        with self._lock:
            self._kept += self._fetch(dims, codec)
            # Another thread's step may have learned of the rollback before: it is the step's own epoch that counts.
            if step.epoch is not None and self.epoch is not None and step.epoch >= self.epoch:
                return step  # nothing was written behind that fence
            for section in step.columns:
                before = self._dropped.get(section.table, np.empty(0, np.uint64))
                self._dropped[section.table] = np.union1d(before, section.keys)
        self.rows_left_out += sum(len(section.keys) for section in step.columns)
        return None

    def restored(
        self, dims: Mapping[int, tuple[str, int]], codec: str, tensors: Mapping[str, TensorSpec]
    ) -> tuple[Restored, ...]:
        """What was restored since this was last called; from now on steps are taken again."""
        with self._lock:
            if self.epoch is None:
                return ()
            kept = [*self._kept, *self._fetch(dims, codec)]
            for table, keys in self._dropped.items():
                named = [one.keys for one in kept if table in dims and one.table == dims[table][0]]
                kept += self._served(table, np.setdiff1d(keys, np.concatenate(named)) if named else keys, dims, codec)
            self._kept, self._dropped = [], {}
        return tuple(_named(one, tensors) for one in kept)

    def _served(self, table: int, keys: U64, dims: Mapping[int, tuple[str, int]], codec: str) -> list[Restored]:
        """How rows of a table are at the node now; nothing of a table that was dropped."""
        pages: list[RestoredPage] = []
        while len(keys) and table in dims:
            page = self._page(RestoredAsk(self._model, rows=(table, keys[:KEYS_MAX].tobytes())))
            pages.append(page)
            keys = keys[len(page.keys) :]  # the first of them, ascending
        return [_rows_of(pages, *dims[table], codec)] if pages else []

    def _await_end(self, reason: str) -> None:
        assert self._wait_s is not None
        deadline, pause_s = time.monotonic() + self._wait_s, LOOK_S
        while self._page(RestoredAsk(self._model)).fenced:
            if time.monotonic() + pause_s > deadline:
                raise ModelError(f"model {self._model!r}: after {self._wait_s:g} s {reason}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_S_MAX)

    def _fetch(self, dims: Mapping[int, tuple[str, int]], codec: str) -> list[Restored]:
        pages: dict[int, list[RestoredPage]] = {}
        page = self._page(RestoredAsk(self._model, self.epoch))
        epoch = page.epoch
        while page.last is not None:
            pages.setdefault(page.table, []).append(page)
            page = self._page(RestoredAsk(self._model, self.epoch, page.last))
        self.epoch = max(epoch, self.epoch or 0)
        return [_rows_of(some, *dims[table], codec) for table, some in pages.items() if table in dims]

    def _page(self, ask: RestoredAsk) -> RestoredPage:
        answer = self._ask(ask)
        if isinstance(answer, Failed):
            raise FAILURES.get(answer.kind, EkkoError)(answer.reason)
        assert isinstance(answer, RestoredPage), answer
        return answer


def is_pause(answer: Answer) -> bool:
    """Whether a step was refused since its model is rolled back, or was."""
    return isinstance(answer, Failed) and answer.kind in (FENCED, RESTORED)


def _rows_of(pages: list[RestoredPage], table: str, dim: int, codec: str) -> Restored:
    """One table's pages, live rows first in each."""
    keys = np.concatenate([page.keys for page in pages])
    deleted = np.concatenate([np.arange(len(page.keys)) >= len(page.rows) for page in pages])
    rows = np.zeros((len(keys), dim), np.float32)
    for page, begin in zip(pages, np.cumsum([0, *(len(page.keys) for page in pages)]).tolist(), strict=False):
        if len(page.rows):
            rows[begin : begin + len(page.rows)] = decode("float32" if table == DENSE_TABLE else codec, page.rows, dim)
    return Restored(table, keys, rows, deleted)


def _named(one: Restored, tensors: Mapping[str, TensorSpec]) -> Restored:
    """Rows of dense tensors by the tensors' names."""
    if one.table != DENSE_TABLE:
        return one
    names = tuple(name for name, tensor in tensors.items() if np.isin(tensor.keys, one.keys).any())
    none = np.empty(0, np.uint64)
    return Restored(DENSE_TABLE, none, np.empty((0, DENSE_DIM), np.float32), np.empty(0, np.bool_), names)
