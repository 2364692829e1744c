"""What a rollback took back, as publishers of one machine hear of it: which rows of which tables are not what they wrote.

A model is fenced (`p2p.identity.fence`) while it is rolled back; its rows of before are written behind the fence, by writers
that the fence names. So what was restored since an epoch is what carries stamps of these writers, of that time. A publisher
remembers the epoch of the last rollback that it knows of; its node refuses its steps until it has asked what was restored
since, and may have loaded it into the model that it trains.
"""

from dataclasses import field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p.replica import U64
from p2p.values import dataclass

# Of one page of an answer; a client takes 4 MiB.
PAGE_BYTES_MAX: Final = 2 << 20
# Keys that one question may name.
KEYS_MAX: Final = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """Rows of one table that a rollback wrote, as they are now; of dense tensors only the names (`Reader.dense` reads them)."""

    table: str
    keys: U64  # [n]
    rows: NDArray[np.float32]  # [n, dim]; zeros where the row is deleted
    deleted: NDArray[np.bool_]  # [n]: the key did not exist then
    tensors: tuple[str, ...] = ()  # of the reserved table `_dense`


@dataclass(frozen=True, slots=True)
class RestoredAsk:
    """Which rows of a model did rollbacks write after epoch `since`? None: only say how things are, or how `rows` are now."""

    model: str
    since: int | None = None
    after: tuple[int, int] | None = None  # table id and key of the last row of the page before
    rows: tuple[int, bytes] | None = None  # table id and keys, uint64[n]; the answer has the first of them, as many as fit


@dataclass(frozen=True, slots=True, eq=False)
class RestoredPage:
    """Some of them, of one table; keys of live rows first, ascending by table and key from page to page."""

    epoch: int  # of the last rollback that is over; 0: there was none
    fenced: int  # the epoch of one that is under way; 0: there is none
    table: int = 0
    keys: U64 = field(default_factory=lambda: np.empty(0, np.uint64))  # [n]
    rows: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0), np.uint8))  # [live, row_bytes], as they are stored

    @property
    def last(self) -> tuple[int, int] | None:
        """What the next page begins after; None: this was the last one."""
        return (self.table, int(self.keys.max())) if len(self.keys) else None


def ask_body(ask: RestoredAsk) -> list[object]:
    """A question in a header."""
    after, rows = ask.after, ask.rows
    return ["restored", ask.model, ask.since, None if after is None else list(after), None if rows is None else list(rows)]


def ask_of(model: str, since: Any, after: Any, rows: Any) -> RestoredAsk:
    """A question from a header.

    Raises:
        ValueError: it is none.
    """
    numbers = [number for number in (since, *(after or ())) if number is not None]
    if any(type(number) is not int or not 0 <= number < 1 << 64 for number in numbers):
        raise ValueError("a restored that is out of range")
    asked = None if rows is None else (_uint32(rows[0]), bytes(rows[1]))
    if asked is not None and (len(asked[1]) % 8 or not 0 < len(asked[1]) <= 8 * KEYS_MAX):
        raise ValueError(f"a question for rows by {len(asked[1])} bytes of keys")
    return RestoredAsk(model, since, None if after is None else (int(after[0]), int(after[1])), asked)


def _uint32(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 32:
        raise ValueError("a table that is out of range")
    return number


def page_body(page: RestoredPage) -> list[object]:
    """An answer in a header."""
    rows = page.rows
    return ["restored", page.epoch, page.fenced, page.table, page.keys.tobytes(), list(rows.shape), rows.tobytes()]


def page_of(epoch: int, fenced: int, table: int, keys: bytes, shape: Any, rows: bytes) -> RestoredPage:
    """An answer from a header.

    Raises:
        ValueError: it is none.
    """
    values = np.frombuffer(rows, np.uint8).reshape([int(side) for side in shape])
    return RestoredPage(epoch, fenced, table, np.frombuffer(keys, np.uint64), values)
