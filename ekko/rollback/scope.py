"""What of a model is written back: all of it, or one table, one writer's rows, a range of keys.

A scope narrower than a model fences the whole model all the same (R13), and narrows only what is written.
"""

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ConfigError
from p2p.stamps import WRITER_MASK

U64 = NDArray[np.uint64]

KEY_END: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class Scope:
    """Rows have to fulfil all of it."""

    tables: tuple[str, ...] = ()  # none: all
    writer: str = ""  # the node whose rows it is about; empty: everybody's
    writers: tuple[int, ...] = ()  # the ids that this node has written under
    key_first: int = 0
    key_end: int = KEY_END  # the first that is not meant any more

    @property
    def whole(self) -> bool:
        """Whether it is all of a model."""
        return self == WHOLE

    def has_table(self, name: str) -> bool:
        """Whether a table is meant."""
        return not self.tables or name in self.tables

    def mask(self, keys: U64, stamps: U64) -> NDArray[np.bool_]:
        """bool[n]: which rows are meant, of keys uint64[n] with the stamps uint64[n] that they have now.

        A row that somebody else has overwritten since is not the writer's any more, and stays.
        """
        meant: NDArray[np.bool_] = keys >= np.uint64(self.key_first)
        if self.key_end < KEY_END:
            meant &= keys < np.uint64(self.key_end)
        if self.writer:
            # Of what is absent, and has no stamp, nobody knows who deleted it.
            meant &= np.isin(stamps & np.uint64(WRITER_MASK), np.array(self.writers, np.uint64)) & (stamps > 0)
        return meant

    def __str__(self) -> str:
        parts = [f"table {table}" for table in self.tables]
        parts += [f"writer {self.writer}"] if self.writer else []
        if (self.key_first, self.key_end) != (0, KEY_END):
            parts.append(f"keys {self.key_first}:{'' if self.key_end == KEY_END else self.key_end}")
        return ", ".join(parts) or "the whole model"


WHOLE: Final = Scope()


def parse_keys(text: str) -> tuple[int, int]:
    """The range that "A:B" means: from A on, up to B, which is left out; either may be missing.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d{0,20}):(\d{0,20})", text)
    first, end = (int(found[1] or 0), int(found[2] or KEY_END)) if found else (0, 0)
    if not 0 <= first < end <= KEY_END:
        raise ConfigError(f"--keys {text}: expected A:B with 0 <= A < B <= 2**64, such as 1000:2000, 1000: or :2000")
    return first, end
