"""What a foreign store is to ekko: a `Sink`, which gets what changed on a node in ordered batches of the newest rows.

A team with a serving stack of its own takes the overlay alone: a feed (`ekko.serve.feed`) beside a node reads which rows
changed from the node's shared memory and hands them over. Sinks for a `torch.nn.Embedding`, an FBGEMM inference table and
Redis are in `ekko.sinks`; `ekko.serve.sink_conformance` tests one of yours. See docs/reference/sinks.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

# Rows in a batch, and bytes of its rows: whichever is less. A batch is what is lost by a kill and sent again.
BATCH_ROWS_MAX: Final = 8_192
BATCH_BYTES_MAX: Final = 4 << 20
# Keys that `Sink.held` may give at once.
HELD_KEYS_MAX: Final = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Removed:
    """Keys that have no row any more.

    Args:
        keys: uint64[n], each once.
        stamps: uint64[n].
    """

    keys: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    stamps: U64 = field(default_factory=lambda: np.empty(0, np.uint64))


NOTHING: Final = Removed()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What became of some keys of one table. To be applied in this order: `forgotten`, `deleted`, rows.

    Of each key there is the newest that the node has: what was superseded while it waited is not sent. A batch may repeat what
    the sink has, wholly or in part, after a restart of the feed.

    Args:
        table: its name.
        keys: uint64[n], each once. Of those only `forgotten` may have some, too.
        rows: float32[n, dim], decoded. The caller's: valid until `apply` returns.
        stamps: uint64[n], each row's version. A row counts if the sink has nothing of the key, or of a smaller stamp.
        deleted: keys that were deleted, at that stamp: nothing older may come back. It counts as a row does.
        forgotten: keys that the node does not have any more (expired, evicted, collected): what the sink has goes unless its
            stamp is larger than this one, and nothing stays behind: the key may come back in the version that it had.
    """

    table: str
    keys: U64
    rows: F32
    stamps: U64
    deleted: Removed = NOTHING
    forgotten: Removed = NOTHING

    @property
    def size(self) -> int:
        """Keys in it."""
        return self.keys.size + self.deleted.keys.size + self.forgotten.keys.size


class Sink(ABC):
    """One foreign store, or the part of it that takes one model. Used by one thread at a time.

    The feed calls `open`, `add_table` for each table, and then the others in any order. A batch counts as applied when `apply`
    has returned; the same rows may come again, and never an older version of a row than the feed has sent before, as long as
    one feed is there. Where an earlier one may still be writing (it was stopped, its packets are under way), the stamps decide.

    Every method may raise `SinkError` when the store cannot be reached or has lost what was in it: the feed opens the sink
    again after a moment and goes on from its cursor. Any other exception ends the feed; `SinkTakenError` where another
    feed has opened the same store since.
    """

    @abstractmethod
    def open(self, model: str) -> bytes | None:
        """Begin to take what a feed brings, or begin again after an error; what earlier feeds write counts no more.

        Args:
            model: its name.

        Returns:
            What `commit` was given last, if the rows that had come by then are here; None: begin with all rows.

        Raises:
            SinkError: see the class.
            ModelError: it is not made for this model.
        """

    @abstractmethod
    def add_table(self, table: str, dim: int) -> None:
        """Be ready for rows float32[n, dim] of this table; called again for one that is here.

        Raises:
            ModelError: it has no room for such a table; ends the feed.
        """

    @abstractmethod
    def drop_table(self, table: str) -> None:
        """The table was dropped: so are its rows here. Nothing happens where there is none."""

    @abstractmethod
    def apply(self, batch: Batch) -> None:
        """Take a batch; see `Batch` for what counts."""

    def apply_dense(self, name: str, values: NDArray[Any], stamp: int) -> None:  # noqa: B027 - most sinks take rows only
        """Take a dense tensor, whole, of this version or newer. Does nothing unless a sink says otherwise."""

    @abstractmethod
    def held(self, table: str) -> Iterator[tuple[U64, U64]]:
        """All keys of which there are rows, and their stamps: uint64[n] and uint64[n], n up to `HELD_KEYS_MAX` at once.

        Nothing of a table that is not there. Asked for after something was lost sight of, to find what the node does not have
        any more. Batches are applied while it is followed; of keys that come or go meanwhile either may be told.
        """

    @abstractmethod
    def commit(self, cursor: bytes) -> None:
        """Keep this where `open` finds it, no sooner than what was applied before it is kept."""

    def close(self) -> None:  # noqa: B027 - not every store is to be let go of
        """Let go of it. Nothing is called afterwards but `open`."""


def rows_at_once(dim: int) -> int:
    """How many rows of this width come in one batch at most."""
    return max(1, min(BATCH_ROWS_MAX, BATCH_BYTES_MAX // (4 * dim)))
