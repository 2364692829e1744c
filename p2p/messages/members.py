"""Who is there: records of members, hellos, heartbeats, schema (`p2p.members`)."""

from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from p2p.messages.envelope import NodeId
from p2p.messages.rows import no_numbers
from p2p.replica import U64, SchemaEntry
from p2p.values import dataclass
from p2p.versions import PROTOCOL_VERSION, protocol_of


@dataclass(frozen=True, slots=True)
class WriterRecord:
    """A writer id in use: who writes with it in which family of keyspaces, and how far it has come."""

    keyspace: int  # the family
    writer: int
    nonce: int
    last_stamp: int


@dataclass(frozen=True, slots=True)
class Holding:
    """Which partitions a node holds of a family that has several."""

    family: int
    partitions: int  # how many there are
    held: tuple[int, ...]  # ascending


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """One node as the gossip tells it. A larger (boot_ms, version) says something new, a larger heartbeat that it lives."""

    node: NodeId
    boot: int
    boot_ms: int  # Unix milliseconds at which that life began; orders the lives of one node
    region: str
    role: str
    address: str
    heartbeat: int
    left: bool = False
    writers: tuple[WriterRecord, ...] = ()
    version: int = 0  # counts the changes of this record in this life, `heartbeat` and `last_stamp` left out
    deaf: bool = False  # it hears nobody, so nothing should be sent through it
    holds: tuple[Holding, ...] = ()  # of families of several partitions; the others everybody holds whole
    told: int = field(default=PROTOCOL_VERSION, compare=False)  # the version in whose shape it came; later fields are unknown

    @property
    def protocol(self) -> int:
        """The protocol version of the node, whoever told us of it."""
        return protocol_of(self.version)


@dataclass(frozen=True, slots=True, eq=False)
class RecordColumns:
    """What tells of many records at once whether they say anything new."""

    boots: U64  # [n]
    versions: U64  # [n]
    beats: U64  # [n]
    told: NDArray[np.uint8]  # [n]
    left: NDArray[np.bool_]  # [n]
    plain: NDArray[np.bool_]  # [n]: they name no writers

    @classmethod
    def of(cls, records: tuple[MemberRecord, ...]) -> "RecordColumns":
        """The columns of these records."""
        return cls(
            np.array([record.boot for record in records], np.uint64),
            np.array([record.version for record in records], np.uint64),
            np.array([record.heartbeat for record in records], np.uint64),
            np.array([record.told for record in records], np.uint8),
            np.array([record.left for record in records], np.bool_),
            np.array([not record.writers for record in records], np.bool_),
        )


# Records that come together are compared as columns from so many on; fewer cost less one by one.
MANY_RECORDS = 8


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """What the messages that tell of members have in common."""

    _columns: RecordColumns | None = field(default=None, init=False, repr=False)

    def _columns_of(self, members: tuple[MemberRecord, ...]) -> RecordColumns | None:
        """The records as columns, made when they are asked for; None where there are few."""
        if self._columns is None and len(members) >= MANY_RECORDS:
            object.__setattr__(self, "_columns", RecordColumns.of(members))
        return self._columns


# How a node stands to the rows of a keyspace (`p2p.pulling.incomplete`).
LACKS = 1  # it dropped live ones, and may not be asked by who lacks them, too
KEEPS = 2  # it has caught up, and drops none: others may drop what it has


@dataclass(frozen=True, slots=True)
class KeyspaceSummary:
    """What one node holds of a keyspace, small enough for every heartbeat."""

    keyspace: int
    vector_digest: int  # 128 bits over the vector
    stray_digest: int  # 128 bits over the rows held above it (R8)
    frontier: tuple[tuple[int, int], ...]  # (writer, stamp): everything of it up to there is held


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens a link, and answers one: who we are and what we know of schema and members."""

    protocol_version: int  # the lowest that the sender speaks; the highest is in its record
    cluster: int  # 64-bit cluster nonce (R12); 0: none yet
    constants: tuple[int, ...]  # what all nodes must agree on for the trees to be equal
    member: MemberRecord
    members: tuple[MemberRecord, ...]
    schema: tuple[SchemaEntry, ...]
    answer_wanted: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """We will not talk to this peer, and why, in one line for its log."""

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Heartbeat(_Told):
    """Sent to a few members each interval."""

    member: MemberRecord  # the sender
    members: tuple[MemberRecord, ...]  # records that changed lately
    schema_digest: int
    unix_ms: int
    summaries: tuple[KeyspaceSummary, ...]
    register_digest: int = 0  # over the lives and versions of all that the sender takes for alive
    boots: U64 = field(default_factory=no_numbers)  # [n] lives of some members
    counters: U64 = field(default_factory=no_numbers)  # [n] and their heartbeat counters
    cluster: int = 0  # the cluster nonce (R12); 0: none yet, or not told
    retired_digest: int = 0  # over all that the sender knows of expulsions and retirements (R13)
    standing: tuple[int, ...] = ()  # one a summary: `LACKS`, `KEEPS` (R11); empty: the sender's version does not tell

    @property
    def columns(self) -> RecordColumns | None:
        """Of `members`."""
        return self._columns_of(self.members)


@dataclass(frozen=True, slots=True, eq=False)
class RegisterIndex:
    """What the sender's register digest is over: send me the records that I lack."""

    boots: U64  # [n]
    versions: U64  # [n]
    answer_wanted: bool  # send me your index, too, if I hold something that you lack


@dataclass(frozen=True, slots=True, eq=False)
class MemberNews(_Told):
    """Records that changed, or that the receiver lacks."""

    members: tuple[MemberRecord, ...]

    @property
    def columns(self) -> RecordColumns | None:
        """Of `members`."""
        return self._columns_of(self.members)


@dataclass(frozen=True, slots=True)
class SchemaUpdate:
    """New schema entries."""

    entries: tuple[SchemaEntry, ...]


@dataclass(frozen=True, slots=True)
class Leave:
    """The sender is going away on purpose."""

    node: NodeId
    version: int = 0  # of its last record, which nobody is to take for its return; 0: not told
