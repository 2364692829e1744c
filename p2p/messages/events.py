"""What enters the machine: messages, the timer, local requests."""

from enum import IntEnum

from p2p.messages.ceilings import AboveRequested
from p2p.messages.envelope import Envelope, NodeId
from p2p.messages.fences import FenceRequested, LiftRequested
from p2p.messages.message import Message
from p2p.messages.pushing import Batch
from p2p.replica import RowColumns, SchemaEntry
from p2p.values import dataclass


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
    | AboveRequested
    | ExpelRequested
    | FenceRequested
    | LiftRequested
    | SchemaChanged
    | RateChanged
    | SentSmaller
    | Leaving
)
