"""A publisher whose model is rolled back: its steps are refused, or wait; then it learns what was taken back.

A step that was worked out before a rollback and arrives after it would write the bad rows again. So the node refuses steps of
publishers that have not asked yet what was restored (`ekko.restored`). One that waits asks by itself: of its step it leaves out
the rows that were restored meanwhile, publishes the others, and keeps what was restored for `Publisher.restored`.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Literal

import numpy as np

from ekko.codec import decode
from ekko.errors import EkkoError, ModelError, PublishError
from ekko.local import FAILURES, FENCED, RESTORED, Answer, Failed, PublishStep
from ekko.model import DENSE_DIM, DENSE_TABLE, TENSOR_KEY_BITS, TensorSpec, table_id
from ekko.restored import Restored, RestoredAsk, RestoredPage
from p2p.placement import take
from p2p.replica import U64, RowColumns

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
        self.rows_left_out = 0
        try:
            self.epoch: int | None = self._page(RestoredAsk(model)).epoch
        except PublishError:
            self.epoch = None  # the node is of a release before, and refuses nobody for this

    @property
    def has_kept(self) -> bool:
        """Whether something is kept for `restored`."""
        return bool(self._kept)

    def retry(self, step: PublishStep, answer: Failed, dims: Mapping[int, tuple[str, int]], codec: str) -> PublishStep | None:
        """A step was refused; what to send instead, once that may be, or None: nothing is left of it.

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
            some = self._fetch(dims, codec)
            self._kept += some
        gone = {one.table: one for one in some}
        sections = [_left(section, gone.get(dims[section.table][0])) for section in step.columns]
        kept = [number for number, (section, _) in enumerate(sections) if len(section.keys)]
        self.rows_left_out += sum(len(section.keys) for section in step.columns) - sum(len(one.keys) for one, _ in sections)
        if not kept:
            return None
        weights = tuple(
            None if (weight := step.significance[number]) is None else weight[sections[number][1]] for number in kept
        )
        columns = tuple(sections[number][0] for number in kept)
        return PublishStep(
            step.model, columns, step.tensors, step.published_ns, step.codec, step.incarnation, weights, self.epoch
        )

    def restored(
        self, dims: Mapping[int, tuple[str, int]], codec: str, tensors: Mapping[str, TensorSpec]
    ) -> tuple[Restored, ...]:
        """What was restored since this was last called; from now on steps are taken again."""
        with self._lock:
            if self.epoch is None:
                return ()
            kept, self._kept = [*self._kept, *self._fetch(dims, codec)], []
        return tuple(_named(one, tensors) for one in kept)

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


def _left(section: RowColumns, gone: Restored | None) -> tuple[RowColumns, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """A section without the rows that were restored, and which those are that are left."""
    taken: U64 = np.empty(0, np.uint64) if gone is None else gone.keys
    if section.table == table_id(DENSE_TABLE):  # a tensor is taken back as a whole
        mask = np.isin(section.keys >> np.uint64(TENSOR_KEY_BITS), taken >> np.uint64(TENSOR_KEY_BITS))
    else:
        mask = np.isin(section.keys, taken)
    indices = np.flatnonzero(~mask)
    return take(section, indices), indices


def _named(one: Restored, tensors: Mapping[str, TensorSpec]) -> Restored:
    """Rows of dense tensors by the tensors' names."""
    if one.table != DENSE_TABLE:
        return one
    names = tuple(name for name, tensor in tensors.items() if np.isin(tensor.keys, one.keys).any())
    none = np.empty(0, np.uint64)
    return Restored(DENSE_TABLE, none, np.empty((0, DENSE_DIM), np.float32), np.empty(0, np.bool_), names)
