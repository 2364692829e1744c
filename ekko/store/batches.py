"""Where batches begin and end, for readers that want an answer from between two of them (R19): the writer's side.

Two words in the model's header. `batch_epoch` is odd while a batch is being applied: a look-up that finds the same even number
before and after saw none of it change. `unsettled` says that what is here is half of something even while nothing is applied:
some row is newer than what its writer's frontier covers. The frontier is the one thing that says *everything* of a writer is
here up to a stamp, in all shards, whatever way it came; so that one comparison covers steps of which parts are missing, steps
whose shards come along several trees, steps above a gap, answers to a pull of which a part has come, rows that a link in state
mode brings by priority, and strays that stay.

Rows that go are marked as rows that come are: to a reader, what is evicted, or dropped after an answer that did not bring it,
changes as much. Whoever removes rows of several tables for one reason marks it once, around all of them.

`unsettled` is set before such rows can be seen, and cleared after the frontier has passed them; for that the protocol machine
tells us when a frontier may have moved. What is compared is the newest stamp that came of each writer, kept in this process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels import batches
from ekko.store.kernels.atomics import publish_word
from ekko.store.memory import Mapping
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX, writer_of

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

UNSETTLED_AHEAD = 1  # rows of steps that are not here as a whole
_EPOCH = layout.MODEL.offset("batch_epoch")
_UNSETTLED = layout.MODEL.offset("unsettled")


class BatchMarks:
    """The words of one model. For the thread that writes it.

    Args:
        header: the model's header file.
        covered: of writers, int64[n]: uint64[n], up to where everything of each is here.
    """

    def __init__(self, header: Mapping, covered: Callable[[I64], U64]) -> None:
        self._header = header  # keeps the addresses valid
        self._epoch = header.address + _EPOCH
        self._unsettled = header.address + _UNSETTLED
        self._covered = covered
        self._newest = np.zeros(WRITERS_MAX, np.uint64)  # of the rows that came of each writer
        self._heard: I64 = np.empty(0, np.int64)  # of whom some came, ascending: mostly few of all there may be
        self._ahead: set[int] = set()  # writers of whom there is more than is covered
        self._removing = 0  # blocks of `removing` that lie in each other

    @property
    def settled(self) -> bool:
        """Whether nothing here is half of something."""
        return not self._ahead

    @property
    def newest(self) -> U64:
        """Live uint64[WRITERS_MAX]: the newest row of each writer that came."""
        return self._newest

    def begin(self, columns: list[RowColumns], stamp: int) -> None:
        """A batch is about to be applied: readers are told, and that it is not settled if it is not."""
        new = False
        if any(column.stamps is None for column in columns):
            writer = writer_of(stamp)
            before = int(self._newest[writer])
            self._newest[writer] = max(before, stamp)
            new = not before
        for column in columns:
            if column.stamps is not None:
                new |= batches.note_newest(np.require(column.stamps, np.uint64, ["C", "A"]), self._newest)
        if new:
            self._heard = np.flatnonzero(self._newest)
        self._ahead = self._find_ahead()
        batches.begin(self._epoch, self._unsettled, UNSETTLED_AHEAD if self._ahead else 0)

    def _publish(self) -> None:
        publish_word(self._unsettled, UNSETTLED_AHEAD if self._ahead else 0)

    def end(self) -> None:
        """It is applied, or as much of it as there was room for."""
        batches.end(self._epoch)

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Rows go, within this block; blocks may lie in each other."""
        if not self._removing:
            batches.begin(self._epoch, self._unsettled, 0)
        self._removing += 1
        try:
            yield
        finally:
            self._removing -= 1
            if not self._removing:
                batches.end(self._epoch)

    def expect(self, claimed: U64) -> None:
        """What is here comes to be as of uint64[WRITERS_MAX], though some of that was rows that went, not rows that came."""
        self._newest = np.maximum(self._newest, claimed)
        self._heard = np.flatnonzero(self._newest)
        self._ahead = self._find_ahead()
        if self._ahead:
            self._publish()

    def settle(self) -> None:
        """A frontier may have moved."""
        if self._ahead:
            self._ahead = self._find_ahead()
            if not self._ahead:
                self._publish()

    def attach(self, newest: U64) -> None:
        """Take over what another process left, with `newest` uint64[WRITERS_MAX] of the rows that are here."""
        self._newest, self._heard = newest, np.flatnonzero(newest)
        self._ahead = self._find_ahead()
        self._publish()
        batches.end(self._epoch)

    def _find_ahead(self) -> set[int]:
        heard = self._heard
        return set(heard[self._newest[heard] > self._covered(heard)].tolist())
