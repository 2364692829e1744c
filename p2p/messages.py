"""Everything that crosses the machine's edge: messages between nodes, input events, and effects.

The machine performs no I/O. Its owner turns sockets, timers and local requests into `Event`s, calls `Machine.handle`, and
carries out every returned `Effect` in order.
"""

from dataclasses import field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from p2p.busy.backlog_messages import Backlogged as Backlogged
from p2p.busy.backlog_messages import Rows
from p2p.busy.backlog_messages import StateChunk as StateChunk
from p2p.identity.fence_messages import Fence as Fence
from p2p.identity.fence_messages import Fenced as Fenced
from p2p.identity.fence_messages import FenceReport as FenceReport
from p2p.identity.fence_messages import FenceRequested as FenceRequested
from p2p.identity.fence_messages import FenceWaits as FenceWaits
from p2p.identity.fence_messages import Lifted as Lifted
from p2p.identity.fence_messages import LiftRequested as LiftRequested
from p2p.replica import NO_STEPS, U64, KnownSteps, RowColumns, SchemaEntry, TableKeys
from p2p.transport import Buffer
from p2p.values import dataclass
from p2p.versions import FIRST_VERSION, PROTOCOL_VERSION, protocol_of

NodeId = str


@dataclass(frozen=True, slots=True)
class Now:
    """One reading of both clocks. Time-outs use the monotonic one, stamps the wall clock (R14)."""

    monotonic_ms: int
    unix_ms: int


# --- messages between nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every message between nodes carries (R3), rewritten at each hop; the body below it is not."""

    sender_boot: int  # nonce of the sender's process life
    receiver_boot: int  # the receiver's, as the sender knows it; 0 when it does not know yet
    session: int = 0  # counts the sender's sessions on this link; 0: the message is outside any session
    sequence: int = 0  # 1, 2, ... within the session
    hops: int = 0
    version: int = FIRST_VERSION  # in which the message is encoded: what the link speaks, and the first for a handshake


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


def _no_numbers() -> U64:
    return np.empty(0, np.uint64)


def _no_shards() -> NDArray[np.uint32]:
    return np.empty(0, np.uint32)


def _no_writers() -> NDArray[np.uint16]:
    return np.empty(0, np.uint16)


@dataclass(frozen=True, slots=True, eq=False)
class Heartbeat(_Told):
    """Sent to a few members each interval."""

    member: MemberRecord  # the sender
    members: tuple[MemberRecord, ...]  # records that changed lately
    schema_digest: int
    unix_ms: int
    summaries: tuple[KeyspaceSummary, ...]
    register_digest: int = 0  # over the lives and versions of all that the sender takes for alive
    boots: U64 = field(default_factory=_no_numbers)  # [n] lives of some members
    counters: U64 = field(default_factory=_no_numbers)  # [n] and their heartbeat counters
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


@dataclass(frozen=True, slots=True, eq=False)
class ShardClaims:
    """Per touched shard: `rows up to the batch's stamp follow directly on prev` (R6), and which part this is (R7)."""

    shards: NDArray[np.uint32]  # [k], ascending, no repeats
    prev: U64  # [k], the writer's previous stamp in that shard; 0: none
    part: NDArray[np.uint16]  # [k], 0-based
    parts: NDArray[np.uint16]  # [k], >= 1
    until: U64 | None = None  # [k], of a group: the stamp of its last step that touched the shard; None: the batch's stamp


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Which steps of one writer share a message, when they are several (`p2p.pushing.groups`). Since protocol version 2."""

    stamps: U64  # [s], ascending; the last one is the stamp of the message
    published_ns: U64  # [s], as in `Batch`
    rows: NDArray[np.int64]  # [s]: how many of the message's rows are of each


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Rows):
    """One optimiser step of one writer, or a part of it, under one stamp; or a *group*, several steps that follow each other.

    A group is like one large step: `stamp` and `published_ns` are its last one's, `writer_prev` is what the first one follows.
    Its claims say for each shard how far they reach, and its `columns` have stamps; those of a single step have none.

    A batch without shards and rows moves only the frontier: an idle writer says "nothing since".
    """

    keyspace: int
    origin: NodeId
    origin_region: str
    writer: int
    nonce: int
    stamp: int
    writer_prev: int  # the stamp of the writer's previous step, in any shard
    shards_touched: int  # by the whole step, over all its messages (R7)
    claims: ShardClaims
    columns: tuple[RowColumns, ...]
    published_ns: int = 0  # CLOCK_MONOTONIC at the entry of `publish`; 0: not measured
    machine: int = 0  # hash of the machine whose clock that is; the difference means something only there
    priority_class: int = 0
    trees: int = 1  # over how many trees the origin spread the step; all shards of one message belong to one of them (R1)
    steps: Steps | None = None  # of a group
    body: tuple[Buffer, ...] = field(default=(), repr=False)  # the frames it came in, forwarded unchanged (R17)
    checksum: int = field(default=0, repr=False)
    body_version: int = field(default=0, repr=False)  # the version in which `body` is encoded

    def __post_init__(self) -> None:
        self._count(self.columns)

    @property
    def tree(self) -> int:
        """The index of its tree: a function of the shard."""
        return int(self.claims.shards[0]) % self.trees if len(self.claims.shards) else 0

    @property
    def step_count(self) -> int:
        """How many steps, or parts of steps, it is."""
        return 1 if self.steps is None else len(self.steps.stamps)


@dataclass(frozen=True, slots=True, eq=False)
class PullRequest:
    """Send me everything above this vector."""

    keyspace: int
    request: int
    writers: NDArray[np.uint16]  # [w] columns of `vector`, ascending
    vector: U64  # [shards, w]
    frontier: U64  # [w], the asker's
    shards: int
    nonces: U64 = field(default_factory=_no_numbers)  # [w] or empty: to which the asker knows them bound; 0: unknown
    retired_digest: int = 0  # as in `Heartbeat`: writers whose retirement is done are left out where all of it is reached
    known: KnownSteps = NO_STEPS  # above the vector: their rows need not be sent again; since protocol version 2
    backlog: bool = False  # it answers `Backlogged`: the rows are to come in order of priority (`StateChunk`)


@dataclass(frozen=True, slots=True, eq=False)
class Floor:
    """What the sender has dropped for good of some shards (R5)."""

    shards: NDArray[np.uint32]  # [j], ascending, no repeats
    writers: NDArray[np.uint16]  # [f], ascending
    stamps: U64  # [j, f]


@dataclass(frozen=True, slots=True, eq=False)
class PullReply(Rows):
    """One chunk of the answer. Rows claim nothing; the claims ride in the last chunk and count only if all chunks came."""

    keyspace: int
    request: int
    chunk: int  # 0-based
    last: bool
    columns: tuple[RowColumns, ...]  # with stamps
    writers: NDArray[np.uint16]  # [w]; empty unless last
    vector: U64  # [shards, w]; the answerer's vector, read before it selected the rows
    frontier: U64  # [w]
    bound: NDArray[np.uint16] = field(default_factory=_no_writers)  # [b] in the first chunk: writers whose nonces are known
    nonces: U64 = field(default_factory=_no_numbers)  # [b]
    whole: NDArray[np.uint32] = field(default_factory=_no_shards)  # ascending: from this chunk on all of their rows come (R5)
    floor: "Floor | None" = None  # in the last chunks, of shards that came whole, in the end of all; since protocol version 2

    def __post_init__(self) -> None:
        self._count(self.columns)


@dataclass(frozen=True, slots=True)
class Adopt:
    """From now on, forward my batches that go down this tree to these nodes, too; it replaces what I said before.

    Since protocol version 2 (`p2p.pushing.adoption`).
    """

    keyspace: int
    tree: int
    children: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Wants:
    """So many bytes a second I want to send to these regions (`p2p.link.budget.ALL`: as many as I can get); said within a
    region.

    Since protocol version 2 (`p2p.link.sharing`).
    """

    regions: tuple[tuple[str, int], ...]


# The four messages of a round by shard versions (`p2p.paper.rounds`), since protocol version 2.


@dataclass(frozen=True, slots=True)
class VersionsWanted:
    """1: which shard versions of yours have changed?"""

    keyspace: int
    request: int
    since: int  # a mark that the receiver gave in this life; 0: tell me all
    retired_digest: int = 0  # as in `PullRequest`


@dataclass(frozen=True, slots=True, eq=False)
class VersionList:
    """2: these have."""

    keyspace: int
    request: int
    mark: int  # what to ask with next time
    shards: NDArray[np.uint32]  # [k], ascending, no repeats
    versions: U64  # [k]
    writers: NDArray[np.uint16]  # [w] of `frontier`, ascending
    frontier: U64  # [w], the sender's when it read its versions


@dataclass(frozen=True, slots=True, eq=False)
class ShardsWanted:
    """3: send me everything above these vectors in those shards."""

    keyspace: int
    request: int
    shards: NDArray[np.uint32]  # [k], ascending, no repeats, not empty
    writers: NDArray[np.uint16]  # [w] columns of `vectors`, ascending
    vectors: U64  # [k, w], the asker's
    retired_digest: int = 0  # as in `PullRequest`


@dataclass(frozen=True, slots=True, eq=False)
class ShardsReply(Rows):
    """4: one chunk of the answer. Rows claim nothing; vectors and versions are in the last one and count only if all came."""

    keyspace: int
    request: int
    chunk: int  # 0-based
    last: bool
    columns: tuple[RowColumns, ...]  # with stamps
    shards: NDArray[np.uint32]  # [k], as asked; empty unless last, as all that follows
    versions: U64  # [k]
    writers: NDArray[np.uint16]  # [w]
    vectors: U64  # [k, w]; the answerer's, read before it selected the rows
    bound: NDArray[np.uint16] = field(default_factory=_no_writers)  # [b] in the first chunk: writers whose nonces are known
    nonces: U64 = field(default_factory=_no_numbers)  # [b]
    whole: NDArray[np.uint32] = field(default_factory=_no_shards)  # as in `PullReply`
    floor: "Floor | None" = None

    def __post_init__(self) -> None:
        self._count(self.columns)


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything of the peer's session up to `sequence` is applied."""

    session: int
    sequence: int


@dataclass(frozen=True, slots=True)
class SessionBroken:
    """A hole or a stranger's message in the peer's session: start a new one (R3)."""

    session: int


@dataclass(frozen=True, slots=True)
class ReachQuery:
    """Tell me when everything that the stamp's writer wrote up to `stamp` is visible at your node."""

    keyspace: int
    query: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Reached:
    """It does now, in this boot."""

    query: int


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Give me writer ids (R12)."""

    cluster: int  # as in `Hello`
    holder: int  # nonce of the asker's ledger
    held: tuple[int, ...]  # blocks that it has


@dataclass(frozen=True, slots=True)
class BlockGrant:
    """These blocks of writer ids are yours, and no longer mine; none when I have none to spare."""

    cluster: int
    holder: int
    blocks: tuple[int, ...]
    clock_floor: int  # the newest stamp that the sender has seen: new writers write above it (R5)
    founded: bool  # whether the sender knows that the cluster's ids are in blocks


# Stages of a writer's retirement (R13), see `p2p.identity.retirement`.
FROZEN, FLOORED, DONE = range(3)


@dataclass(frozen=True, slots=True)
class Expulsion:
    """A life of a node that is no member any more, for ever."""

    node: NodeId
    boot: int
    boot_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class Retired:
    """How far the retirement of a writer has come in one keyspace."""

    keyspace: int
    family: int
    writer: int
    nonce: int
    stage: int
    floor: U64 = field(default_factory=_no_numbers)  # [shards] from stage `FLOORED` on: all that there is of it; empty before

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it apart from others."""
        return self.keyspace, self.writer, self.nonce


@dataclass(frozen=True, slots=True, eq=False)
class Retirements:
    """Who was expelled, which writers are retired, and which families are fenced: some of it, or all."""

    expulsions: tuple[Expulsion, ...]
    retired: tuple[Retired, ...]
    fences: tuple[Fence, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RetireReport:
    """What the sender holds of a writer at this stage of its retirement; it takes nothing more of it."""

    keyspace: int
    writer: int
    nonce: int
    stage: int
    column: U64  # [shards]


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The sender has dropped live rows of this keyspace (R11): ask somebody else. Since protocol version 2."""

    keyspace: int
    request: int  # the pull that this answers; 0: none


# How rows that were dropped for want of room come back (`p2p.pulling.fetching`), since protocol version 2.


@dataclass(frozen=True, slots=True, eq=False)
class KeysWanted:
    """Send me the live rows of these keys, which I dropped, if your vector covers my loss floor."""

    keyspace: int
    request: int
    floor: Floor  # of the shards of these keys
    keys: tuple[TableKeys, ...]
    retired_digest: int = 0  # as in `PullRequest`


@dataclass(frozen=True, slots=True, eq=False)
class KeysFound(Rows):
    """Some of these rows. They claim nothing."""

    keyspace: int
    request: int
    columns: tuple[RowColumns, ...]  # with stamps, live rows only
    bound: NDArray[np.uint16] = field(default_factory=_no_writers)  # [b]: writers whose nonces are known
    nonces: U64 = field(default_factory=_no_numbers)  # [b]

    def __post_init__(self) -> None:
        self._count(self.columns)


# How it is learned what may be dropped for good (`p2p.collection`), since protocol version 2.


@dataclass(frozen=True, slots=True)
class StableAsk:
    """Report how far you have everything: some holder keeps tombstones."""

    keyspace: int


@dataclass(frozen=True, slots=True, eq=False)
class StableReport:
    """So far the sender's life has everything of each writer that it knows of, in all shards."""

    keyspace: int
    waiting: bool  # it keeps rows that might be dropped
    writers: NDArray[np.uint16]  # [w], ascending
    reached: U64  # [w]; 0: nothing yet
    boots: U64  # [b]: lives of holders that the sender knows of, away ones included


@dataclass(frozen=True, slots=True, eq=False)
class Stable:
    """Every member that is not expelled has everything of each writer up to here; writers that somebody knows of are named."""

    keyspace: int
    writers: NDArray[np.uint16]  # [w], ascending; none while somebody has not reported
    reached: U64  # [w]
    held_up_by: tuple[str, ...]  # who has not


Message = (
    Hello
    | Refusal
    | Heartbeat
    | SchemaUpdate
    | Leave
    | Batch
    | PullRequest
    | PullReply
    | Ack
    | SessionBroken
    | ReachQuery
    | Reached
    | RegisterIndex
    | MemberNews
    | BlockRequest
    | BlockGrant
    | VersionsWanted
    | VersionList
    | ShardsWanted
    | ShardsReply
    | Retirements
    | RetireReport
    | Adopt
    | Wants
    | StableAsk
    | StableReport
    | Stable
    | Incomplete
    | KeysWanted
    | KeysFound
    | FenceReport
    | Backlogged
    | StateChunk
)


# --- input events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The transport is bound, and peers can dial us at `address`."""

    address: str


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A decoded message of a peer.

    `node` is whose key was proven where it came from, None without keys: what a message says of its sender is only a claim.
    """

    envelope: Envelope
    message: Message
    node: NodeId | None = None


@dataclass(frozen=True, slots=True)
class SendFailed:
    """The transport did not take a message of this link (see `Send`)."""

    address: str
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class TimerFired:
    """`Machine.deadline_ms` has come."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchReady:
    """A batch that was forwarded and is now to be applied; comes back through `Continue`."""

    sender_boot: int
    envelope: Envelope
    batch: Batch


@dataclass(frozen=True, slots=True, eq=False)
class PublishRequested:
    """A local publisher's step. `columns` are checked by the caller against the schema; keys within one are unique."""

    request: int
    keyspace: int  # the family
    columns: tuple[RowColumns, ...]
    published_ns: int = 0
    quiet: bool = False  # stored and claimed, and sent to nobody: who lacks it pulls it, as if it had been lost
    through_fence: int = 0  # the epoch of the fence behind which it is written, by who restores the family; 0: an ordinary step


class Scope(IntEnum):
    """How far `wait` looks."""

    LOCAL = 0
    REGION = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class WaitRequested:
    """Answer when `stamp` is visible at every live holder in scope, or name who lags after `timeout_ms`."""

    request: int
    keyspace: int  # the family
    stamp: int
    scope: Scope
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class ExpelRequested:
    """The operator says that a node will not come back as it was."""

    request: int
    node: NodeId


@dataclass(frozen=True, slots=True)
class CaughtUpRequested:
    """Who of the live holders of a family has everything of it that is here? Answered like a wait, with `WaitEnded`."""

    request: int
    family: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class SchemaChanged:
    """The local node added schema entries, or dropped keyspaces; peers hear of it now: of these entries, or of all (None)."""

    entries: tuple[SchemaEntry, ...] | None = None


@dataclass(frozen=True, slots=True)
class RateChanged:
    """From now on, updates from our region to this one, of all nodes together, may use so much; None: as much as they want."""

    region: str
    bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class SentSmaller:
    """A message to this life of a peer took so many bytes less on the wire than it has: it was compressed."""

    receiver_boot: int
    bytes_saved: int


@dataclass(frozen=True, slots=True)
class Leaving:
    """The node shuts down; tell the peers."""


Event = (
    Started
    | MessageReceived
    | SendFailed
    | TimerFired
    | BatchReady
    | PublishRequested
    | WaitRequested
    | CaughtUpRequested
    | ExpelRequested
    | FenceRequested
    | LiftRequested
    | SchemaChanged
    | RateChanged
    | SentSmaller
    | Leaving
)


# --- effects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Encode and send. When the transport refuses it, feed `SendFailed` back."""

    address: str
    envelope: Envelope
    message: Message


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect to this address: something will be sent to it, and should find a connection."""

    address: str


@dataclass(frozen=True, slots=True)
class Unwanted:
    """The message at hand brought what is known, which no credit bounds: it counts as a call of its source."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Close the connection to this address."""

    address: str


@dataclass(frozen=True, slots=True, eq=False)
class Continue:
    """Feed this event back once the effects before it are carried out: forward first, then apply (R17)."""

    event: Event


@dataclass(frozen=True, slots=True)
class Published:
    """Answer to `PublishRequested`: the step is stored on this node."""

    request: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer to a local request that cannot be done; nothing happened. `reason` is one line with the remedy."""

    request: int
    reason: str
    fenced: int = 0  # the epoch of the fence that refused a step; 0: it was something else


@dataclass(frozen=True, slots=True)
class Expelled:
    """Answer to `ExpelRequested`: it is decided, durably, and told."""

    request: int
    node: NodeId
    writers: int  # that are retired with it


@dataclass(frozen=True, slots=True)
class WaitEnded:
    """Answer to `WaitRequested`: `lagging` is empty when it is visible at every live holder in scope, else names who lags.

    `silent` are the holders in scope that nobody waited for, since they were not heard when the wait began (R21).
    """

    request: int
    lagging: tuple[NodeId, ...]
    silent: tuple[NodeId, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchApplied:
    """The last row of a batch (or part) was applied here; for delay metrics."""

    keyspace: int
    origin_region: str
    stamp: int
    published_ns: int
    machine: int
    rows: int
    significant: int = 0  # of them, as far as their origin said (`p2p.classes`)


@dataclass(frozen=True, slots=True, eq=False)
class RowsApplied:
    """Rows that came from a backlog were applied here, with stamps of their own; for delay metrics."""

    keyspace: int
    columns: tuple[RowColumns, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the log: `name` is a stable event name, `fields` its details; `alarm` marks what a person must see."""

    name: str
    fields: tuple[tuple[str, object], ...] = ()
    alarm: bool = False


@dataclass(frozen=True, slots=True)
class Fatal:
    """The node must stop: going on would break an invariant (two live nodes with one id)."""

    reason: str


@dataclass(frozen=True, slots=True)
class StartOver:
    """The node must drop its rows and begin a new life: what it knows does not belong to the cluster any more (R13)."""

    reason: str
    rows_lost: int  # that it wrote itself, and nobody else is known to have


Reply = Published | Refused | WaitEnded | Expelled | Fenced | FenceWaits | Lifted
Effect = (
    Send
    | Dial
    | Forget
    | Continue
    | Unwanted
    | Published
    | Refused
    | WaitEnded
    | Expelled
    | Fenced
    | FenceWaits
    | Lifted
    | BatchApplied
    | RowsApplied
    | Note
    | Fatal
    | StartOver
)
