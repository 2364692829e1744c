"""What a store must offer for the protocol machine to replicate it.

The machine deals in *keyspaces*: a set of rows with its own shards and vectors, which a node holds whole or not at all (in
ekko, one partition of one model). Keyspaces of one *family* (the partitions of one model) share their writers: a step has one
stamp, whichever of them it touches. Inside a keyspace, rows belong to tables, which the machine knows only as a number and a
row width. All arrays are columns, one entry a row; nothing here is called once per row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2p.values import dataclass
from p2p.versions import FIRST_VERSION

U64 = NDArray[np.uint64]

# What a store knows a row by (`Selection.slots`) has the number of the row's slot in its low bits, and which of the slot's
# lives it is above them (R18): who keeps a byte for each slot needs the number.
SLOT_MASK = (1 << 32) - 1
# Of one family. A partition costs every heartbeat a summary and every idle writer five small messages a second.
PARTITIONS_MAX = 64


@dataclass(frozen=True, slots=True, eq=False)
class RowColumns:
    """Versions of rows of one table, as columns.

    The first `len(rows)` keys are live rows; the keys after them are tombstones, which have no value.
    """

    table: int
    keys: U64  # [n]
    rows: NDArray[np.uint8]  # [live, row_bytes], live <= n, as the table's codec encodes them
    stamps: U64 | None = None  # [n]; None: all rows carry the stamp of the batch
    priority: NDArray[np.uint8] | None = None  # [n]; how urgent each row is (`p2p.classes`); None: not known

    @property
    def payload_bytes(self) -> int:
        """Bytes of keys, values and stamps: what a message carries for these rows."""
        return self.keys.nbytes + self.rows.nbytes + (0 if self.stamps is None else self.stamps.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class TableKeys:
    """Keys of one table."""

    table: int
    keys: U64  # [n], no repeats


@dataclass(frozen=True, slots=True)
class Applied:
    """What one `Replica.apply` did, in rows."""

    written: int = 0  # the row's version advanced, new rows included
    inserted: int = 0  # of those, rows whose key was absent
    stale: int = 0  # an equal or newer version was there already: nothing changed
    ghosts: int = 0  # the key is absent and the vector covers the stamp: a tombstone of it was collected (T6), nothing changed


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Rows chosen to be sent: slots, not values; `Replica.read` fetches the newest value when it is sent.

    A slot here is whatever number the store knows the row by, also when the row's memory was given to another key since (R18).
    """

    table: int
    row_bytes: int
    slots: NDArray[np.int64]  # [n]


@dataclass(frozen=True, slots=True, eq=False)
class KnownSteps:
    """Steps of which somebody has all rows in some shards, or newer versions of them, though its vector is below them there."""

    stamps: U64  # [k], ascending
    shards: NDArray[np.uint8]  # [k, (shards + 7) // 8]: bit S % 8, from the lowest, of byte S // 8 says so of shard S


NO_STEPS = KnownSteps(np.empty(0, np.uint64), np.empty((0, 0), np.uint8))


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of its family a keyspace is: partition p of P holds the rows with `partition_of(key) == p`."""

    family: int  # uint32; writer ids are bound to it
    partition: int = 0
    partitions: int = 1


@dataclass(frozen=True, slots=True)
class WriterIdentity:
    """A writer id bound to its nonce (R12), with the last stamp it minted (0: none yet)."""

    writer: int
    nonce: int
    last_stamp: int = 0


@dataclass(frozen=True, slots=True)
class SchemaEntry:
    """One fact of the schema; `body` is opaque here and byte-equal on all nodes.

    Facts are only ever added, or replaced by later ones in an order that the host knows: the order in which nodes hear of them
    makes no difference. A fact may say that a keyspace is dropped; then it is gone on whoever has heard, whatever comes later.

    `since` is the first protocol version whose nodes understand it; known of our own entries, and not sent.
    """

    keyspace: int
    name: str
    body: bytes
    since: int = field(default=FIRST_VERSION, compare=False)


class Arrivals(Protocol):
    """What an answer has brought of shards that are sent whole (R5); it is told of each chunk, and drops what did not come."""

    def begin(self, shards: NDArray[np.uint32]) -> None:
        """From now on these shards come whole, too."""

    def note(self, columns: Sequence[RowColumns]) -> None:
        """These rows came and are applied."""

    def drop_absent(self, writers: NDArray[np.uint16], vector: U64) -> int:
        """Drop the rows of the whole shards that the answerer's vector, uint64[shards, w], covers and that did not come.

        Returns:
            How many. Rows that came and were dropped meanwhile for another reason do not matter.

        Raises:
            FullError: there is no memory for the floor. What was dropped already may stay so.
        """


@dataclass(frozen=True, slots=True)
class Collected:
    """What one `Replica.collect` did."""

    rows: int
    done: bool  # the last table was looked at to its end; the next call begins anew


class Replica(Protocol):
    """The rows and the knowledge of one keyspace on this node."""

    @property
    def keyspace(self) -> int:
        """The keyspace's id, uint32."""

    @property
    def place(self) -> Place:
        """Which part of its family it is; a family of one partition has the keyspace's own id."""

    @property
    def shards(self) -> int:
        """How many shards its keys are spread over; fixed for the life of the keyspace."""

    @property
    def vector(self) -> U64:
        """Live uint64[shards, WRITERS_MAX]: V of protocol.md, a stamp per shard and writer. Written only through
        `p2p.knowledge`. It lives where the rows live (shared memory), and is written after them (R4).
        """

    @property
    def frontier(self) -> U64:
        """Live uint64[WRITERS_MAX]: everything that writer wrote up to this stamp, in any shard, is here."""

    @property
    def writer(self) -> WriterIdentity | None:
        """The writer id this node may resume (only on intact memory, R4), or None; the same in all keyspaces of a family."""

    @property
    def stamp_max(self) -> int:
        """The largest stamp of any row or vector entry held here; 0 when empty. The clock starts above it."""

    def set_writer(self, identity: WriterIdentity | None) -> None:
        """Bind this node's writer id in the whole family, durably, before its first stamp is minted; None: it writes no more
        under the one that it has.
        """

    def begin_step(self, stamp: int, shards: Mapping[int, NDArray[np.int64]]) -> None:
        """Record a local step as pending before any of its rows is applied (R4): its stamp, and by partition of the family the
        shards that it touches.
        """

    @property
    def loss_floor(self) -> U64:
        """Live uint64[shards, WRITERS_MAX]: L of protocol.md, the largest stamp of a row that was dropped for good (R5).

        Only the columns of `floor_writers` are worth a look.
        """

    @property
    def floor_writers(self) -> NDArray[np.uint16]:
        """uint16[f], ascending: whose column of the loss floor is not empty."""

    @property
    def incomplete(self) -> NDArray[np.bool_]:
        """bool[shards]: live rows were dropped there, too (R11)."""

    @property
    def evicts(self) -> bool:
        """Whether it may drop live rows that it holds, to make room for others (R11)."""

    def note_backed(self, until: U64) -> None:
        """Rows of each writer that may be dropped, uint64[WRITERS_MAX]: others keep them up to these stamps."""

    def take_wanted(self, keys_max: int) -> tuple[TableKeys, ...]:
        """Keys that were asked for here and are absent in an incomplete shard, at most so many; each is told once in a while.

        An answer that `take_back` is given must be to the last of these calls, of a node that covers the loss floor as it is
        now in the shards of these keys, and soon.
        """

    def read_keys(self, table: int, keys: U64) -> RowColumns:
        """The live rows of these keys that are here, with stamps; none of an unknown table. Copies."""

    def take_back(self, columns: Sequence[RowColumns]) -> Applied:
        """Write live rows that were asked for by key, though they may be older than what the vector covers (R11).

        Those of keys that were dropped once more since they were asked for, or that find no room, are left out.

        Raises:
            FullError: as `reserve`. No row is changed.
        """

    @property
    def collectable(self) -> int:
        """Tombstones of the family held here, and rows that may have expired; 0: `collect` has nothing to look for."""

    def collect(self, until: U64, unix_ms: int, rows_max: int) -> Collected:
        """Drop some tombstones and expired rows, after their stamps were merged into the loss floor.

        A bounded amount of work; the next call goes on where this one ended.

        Args:
            until: uint64[WRITERS_MAX]; only rows of a writer w with a stamp of at most `until[w]`: these are stable.
            unix_ms: now, for what expires.
            rows_max: to be dropped at most.

        Raises:
            FullError: there is no memory for the floor; nothing is dropped.
        """

    def merge_floor(self, shards: NDArray[np.uint32], writers: NDArray[np.uint16], floor: U64) -> None:
        """Take over what somebody dropped: uint64[k, f] of these shards and writers.

        Raises:
            FullError: there is no memory for it; nothing is changed.
        """

    def arrivals(self) -> Arrivals:
        """For an answer that brings shards whole."""

    def shards_of(self, keys: U64) -> NDArray[np.int64]:
        """int64[n]: the shard of each key of this keyspace, a function of the key alone."""

    def partition_of(self, keys: U64) -> NDArray[np.int64]:
        """int64[n]: in which partition of the family each key, of whatever partition, belongs."""

    def check(self, columns: Sequence[RowColumns], shards: NDArray[np.uint32] | None = None) -> None:
        """Refuse rows that do not fit the schema, or lie outside `shards` (ascending, each below `self.shards`; None: any).

        Raises:
            RemoteProtocolError: an unknown table, another row width, or keys of another partition or shard. Nothing is changed.
        """

    def reserve(self, columns: Sequence[RowColumns]) -> None:
        """Have memory for all of these rows, of whichever partitions of the family: after this `apply` finds room for them.

        Raises:
            FullError: with the remedy. No row is changed.
        """

    def apply(self, columns: Sequence[RowColumns], stamp: int) -> Applied:
        """Write each row whose stamp is newer than what is held (last writer wins); rows of any partitions of the family that
        are held here.

        `stamp` counts for columns without stamps of their own; in those with stamps a key may come again. Rows are visible
        to readers at once. Idempotent and commutative (theorem T3).
        """

    def changed_since(self, base: U64) -> list[Selection]:
        """Every row (tombstones too) whose stamp exceeds `base[shard, writer]`; base: uint64[shards, WRITERS_MAX]."""

    def scan_since(self, base: U64) -> list[Selection]:
        """What `changed_since` selects, by looking at every row: the paper's base protocol."""

    def without(self, selections: Sequence[Selection], known: KnownSteps) -> list[Selection]:
        """The same, but rows that are a known step's and lie in a shard for which that is said. `known.shards` is as wide as
        this keyspace needs.
        """

    def row_bytes_of(self, table: int) -> int:
        """Width of an encoded row of this table; 0: there is no such table any more."""

    def places_of(self, table: int, keys: U64) -> NDArray[np.int64]:
        """int64[n]: by which number the store knows the row of each key, as in `Selection.slots`; -1 where it is absent."""

    def read(self, table: int, slots: NDArray[np.int64]) -> RowColumns:
        """The newest version of each slot, with stamps; tombstones sorted to the end. Rows that were removed since they were
        selected are left out: the answer is shorter. Copies.
        """

    def stray_digest(self) -> int:
        """128-bit digest over (table, key, stamp) of all rows held above the vector (R8), in no particular order;
        0 when there are none. May scan.
        """

    def note_coalesced(self, since: Mapping[int, int]) -> None:
        """Claims were merged that came without their steps: writer -> up to where all of it was here before. Versions above
        that may never come, since newer ones took their place at whoever sent these. Called before `set_synced_until`.
        """

    def set_synced_until(self, unix_ms: int) -> None:
        """Publish to readers the newest moment up to which this node has everything; 0: unknown.

        Called whenever the frontier may have moved, so that readers may also be told whether all that is here is whole (R19).
        """


class Host(Protocol):
    """All keyspaces of one node, and the schema they come from."""

    @property
    def replicas(self) -> Mapping[int, Replica]:
        """Live view: keyspace id -> replica, in the order they were created. One that is dropped never comes back."""

    def schema(self) -> list[SchemaEntry]:
        """Every entry known, sorted by (keyspace, name)."""

    def adopt(self, entries: Sequence[SchemaEntry]) -> bool:
        """Merge a peer's entries; new keyspaces and tables exist afterwards, dropped ones do not. True when something was new.

        What is soon outdated need not become part of the schema: it is passed on once, and not repaired where it is lost.

        Raises:
            SchemaClashError: an entry contradicts one held. Nothing is changed.
            RemoteProtocolError: an entry cannot be understood. Nothing is changed.
        """
