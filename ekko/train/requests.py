"""What a worker asks of servers, while it is under way: pulls, pushes, and the requests that they are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ekko.errors import EkkoError
from ekko.train.routing import Places
from ekko.train.server import wire as w
from ekko.train.server.wire import F32, U64

# A request without an answer is sent again after this, then after twice as long, and so on. Pulls may have to wait for other
# workers, which is no reason to send many of them; a server that is gone is found by the first one.
RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 10.0
# A server that is busy, or not a primary while no other one is known, is left alone for this, then twice as long, and so on.
PAUSE_S: Final = 0.02
PAUSE_S_MAX: Final = 1.0
# Columns of one message; the rest is for its header.
COLUMN_BYTES_MAX: Final = w.MESSAGE_BYTES_MAX - w.HEADER_BYTES_MAX

Columns = Mapping[str, tuple[U64, F32]]


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Send this request to this server. Best effort: what is lost is sent again."""

    endpoint: str
    number: int
    request: w.Request


@dataclass(slots=True, eq=False)
class Pulling:
    """A pull under way. `keys`: uint64[n] by table; `rows`: float32[n, dim] by table, complete when `missing` is 0."""

    keys: Mapping[str, U64]
    clock: int
    dims: Mapping[str, int]
    rows: dict[str, F32] = field(default_factory=dict)
    missing: int = 0  # keys without an answer
    failure: EkkoError | None = None
    unsent: dict[str, Places] = field(default_factory=dict)  # keys that are not with a server

    def __post_init__(self) -> None:
        for table, wanted in self.keys.items():
            if len(wanted):
                self.unsent[table] = None
                self.missing += len(wanted)
            else:
                self.rows[table] = np.empty((0, self.dims[table]), np.float32)

    @property
    def done(self) -> bool:
        return self.missing == 0 or self.failure is not None

    def arrived(self, places: Mapping[str, Places], tables: Mapping[str, F32]) -> bool:
        """Rows came for the keys at these places; False, and nothing is changed, if they are not what was asked for."""
        if list(tables) != list(places):
            return False
        counts = {table: len(self.keys[table]) if at is None else len(at) for table, at in places.items()}
        if any(rows.shape != (counts[table], self.dims[table]) for table, rows in tables.items()):
            return False
        for table, rows in tables.items():
            at = places[table]
            if at is None:
                self.rows[table] = rows
                continue
            if table not in self.rows:
                self.rows[table] = np.empty((len(self.keys[table]), self.dims[table]), np.float32)
            self.rows[table][at] = rows
        self.missing -= sum(counts.values())
        return True

    def again(self, table: str, places: Places) -> None:
        """Some of a table's keys are to be sent; none of them is among those that are so already."""
        there = self.unsent.get(table)
        self.unsent[table] = places if there is None or places is None else np.concatenate([there, places])

    def keys_at(self, table: str, places: Places) -> U64:
        return self.keys[table] if places is None else self.keys[table][places]

    def chunks(self, places: dict[str, Places]) -> Sequence[dict[str, Places]]:
        """What is asked of one server as messages whose answers are not too large."""
        counts = {table: len(self.keys[table]) if at is None else len(at) for table, at in places.items()}
        answer_bytes = sum(count * 4 * self.dims[table] for table, count in counts.items())
        if answer_bytes <= COLUMN_BYTES_MAX and sum(counts.values()) <= w.KEYS_MAX:
            return [places]
        chunks: list[dict[str, Places]] = []
        for table, at in places.items():
            every = np.arange(len(self.keys[table])) if at is None else at
            size = min(w.KEYS_MAX, COLUMN_BYTES_MAX // (4 * self.dims[table]))
            chunks += [{table: every[begin : begin + size]} for begin in range(0, len(every), size)]
        return chunks


@dataclass(slots=True, eq=False)
class Pushing:
    """A push under way. `columns`: uint64[n] and float32[n, dim] by table; they must not change any more."""

    number: int
    columns: Columns
    rate: float
    pending: set[int]  # partitions without an answer
    flying: set[int] = field(default_factory=set)  # of these, those that are with a server


@dataclass(slots=True, eq=False)
class Part:
    """One request that is with a server: of a pull its keys at some places, of a push some partitions, or a hello."""

    endpoint: str
    due_s: float
    pulling: Pulling | None = None
    places: Mapping[str, Places] = field(default_factory=dict)
    pushing: Pushing | None = None
    partitions: tuple[int, ...] = ()

    @property
    def is_hello(self) -> bool:
        return self.pulling is None and self.pushing is None


@dataclass(slots=True)
class Server:
    """What we know of one server."""

    greeted: bool = False
    greeting: bool = False  # a hello is under way
    not_before_s: float = 0.0
    pauses: int = 0  # one after the other
    silences: int = 0  # the same
    reason: str = ""  # why it refused what was asked last

    @property
    def retry_s(self) -> float:
        """How long its answer is waited for."""
        return float(min(RETRY_S_MAX, RETRY_S * 2 ** min(self.silences, 16)))

    def served(self) -> None:
        """It did what it was asked for."""
        self.pauses, self.reason = 0, ""

    def pause(self, now_s: float) -> None:
        """Leave it alone for a moment."""
        self.not_before_s = now_s + min(PAUSE_S_MAX, PAUSE_S * 2 ** min(self.pauses, 16))
        self.pauses += 1


def is_large(columns: Columns) -> bool:
    """Whether these gradients are more than one message may have."""
    return columns_bytes(columns) > COLUMN_BYTES_MAX or sum(len(keys) for keys, _ in columns.values()) > w.KEYS_MAX


def columns_bytes(columns: Columns) -> int:
    """Of keys and gradients."""
    return sum(keys.nbytes + values.nbytes for keys, values in columns.values())
