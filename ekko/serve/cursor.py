"""How far a sink is: what a feed leaves with it, to go on from there in another life, and what follows from it.

Pure. A cursor says up to where the ring of changes was applied, and what the node knew by then (its vector): where the ring
does not reach back any more, rows above that vector are sent, which is a look at each row and no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from ekko.model import SHARDS_MAX
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

VERSION: Final = 1
BYTES_MAX: Final = 256 << 20  # of a cursor that is not junk: all writers of the most shards that there may be


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What the node knew of a model at a moment; all rows that it covers are in the sink.

    Args:
        vector: uint64[WRITERS_MAX, shards].
        incomplete: uint8[SHARDS_MAX // 8], as `ekko.store.images.FloorImage`.
    """

    vector: U64
    incomplete: U8


@dataclass(frozen=True, slots=True)
class Place:
    """A moment of a ring of changes, in the store that has it.

    Args:
        store: the store's prefix, which no other one has.
        model: the model's id, which no other incarnation has.
        breaks: of the ring; -1: there is none.
        position: entries before this one are in the sink.
    """

    store: str
    model: int
    breaks: int = -1
    position: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Cursor:
    """See the module.

    Args:
        place: up to where changes were applied.
        known: what the sink has anyway.
        tables: name -> (dim, incarnation) of the tables that were in the sink.
        sweep: it is still to be found what the sink has and the node has not.
    """

    place: Place
    known: Known
    tables: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sweep: bool = False


class Way(Enum):
    """How a feed begins."""

    FOLLOW = auto()  # the ring reaches back: only what changed since
    COMPARE = auto()  # it does not: rows above what is known, and what went meanwhile
    EVERYTHING = auto()  # nothing is known of this store: all rows, and what the sink has beside them


def way_from(cursor: Cursor | None, now: Place, capacity: int, shards: int) -> Way:
    """How to go on.

    Args:
        cursor: what the sink has; None: nothing.
        now: how it is at the node.
        capacity: entries that its ring holds.
        shards: of the model.
    """
    if cursor is None or (cursor.place.store, cursor.place.model) != (now.store, now.model):
        return Way.EVERYTHING
    if cursor.known.vector.shape[1] != shards:
        return Way.EVERYTHING
    behind = now.position - cursor.place.position
    if now.breaks < 0 or cursor.place.breaks != now.breaks or not 0 <= behind <= capacity:
        return Way.COMPARE
    return Way.FOLLOW


def encode(cursor: Cursor) -> bytes:
    """The bytes that a sink keeps."""
    place, known = cursor.place, cursor.known
    writers = np.flatnonzero(known.vector.any(axis=1)).astype("<u2")
    body = {
        "version": VERSION,
        "place": [place.store, place.model, place.breaks, place.position],
        "shards": known.vector.shape[1],
        "writers": writers.tobytes(),
        "vector": np.ascontiguousarray(known.vector[writers]).astype("<u8").tobytes(),
        "incomplete": known.incomplete.tobytes(),
        "tables": {name: list(what) for name, what in cursor.tables.items()},
        "sweep": cursor.sweep,
    }
    return bytes(msgpack.packb(body))


def decode(data: bytes | None) -> Cursor | None:
    """Understand what a sink gave back; None where there is nothing, or nothing of this version: then all rows are sent."""
    if not data or len(data) > BYTES_MAX:
        return None
    try:
        body: dict[str, Any] = msgpack.unpackb(data)
        if body["version"] != VERSION:
            return None
        store, model, breaks, position = body["place"]
        shards = int(body["shards"])
        writers = np.frombuffer(body["writers"], "<u2")
        incomplete = np.frombuffer(body["incomplete"], np.uint8).copy()
        if not 1 <= shards <= SHARDS_MAX or incomplete.size != SHARDS_MAX // 8:
            return None
        vector = np.zeros((WRITERS_MAX, shards), np.uint64)
        vector[writers] = np.frombuffer(body["vector"], "<u8").reshape(len(writers), shards)
        tables = {str(name): (int(dim), int(incarnation)) for name, (dim, incarnation) in body["tables"].items()}
        place = Place(str(store), int(model), int(breaks), int(position))
        return Cursor(place, Known(vector, incomplete), tables, bool(body["sweep"]))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, msgpack.UnpackException):
        return None
