"""What the messages that carry rows have in common."""

from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from p2p.replica import U64, RowColumns
from p2p.values import dataclass


def no_numbers() -> U64:
    """A column without entries, as a default."""
    return np.empty(0, np.uint64)


def no_shards() -> NDArray[np.uint32]:
    """A column without entries, as a default."""
    return np.empty(0, np.uint32)


def no_writers() -> NDArray[np.uint16]:
    """A column without entries, as a default."""
    return np.empty(0, np.uint16)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What the messages that carry rows have in common; counted once, and asked for by everybody who handles them."""

    payload_bytes: int = field(init=False, repr=False)  # keys, values and stamps
    row_count: int = field(init=False, repr=False)

    def _count(self, columns: tuple[RowColumns, ...]) -> None:
        object.__setattr__(self, "payload_bytes", sum([section.payload_bytes for section in columns]))
        object.__setattr__(self, "row_count", sum([len(section.keys) for section in columns]))


@dataclass(frozen=True, slots=True, eq=False)
class Floor:
    """What the sender has dropped for good of some shards (R5)."""

    shards: NDArray[np.uint32]  # [j], ascending, no repeats
    writers: NDArray[np.uint16]  # [f], ascending
    stamps: U64  # [j, f]
