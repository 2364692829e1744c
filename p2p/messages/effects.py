"""What the machine wants done."""

from p2p.messages.ceilings import AboveTold
from p2p.messages.envelope import Envelope, NodeId
from p2p.messages.events import Event
from p2p.messages.fences import Fenced, FenceWaits, Lifted
from p2p.messages.message import Message
from p2p.replica import RowColumns
from p2p.values import dataclass


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


Reply = Published | Refused | WaitEnded | AboveTold | Expelled | Fenced | FenceWaits | Lifted
Effect = (
    Send
    | Dial
    | Forget
    | Continue
    | Unwanted
    | Published
    | Refused
    | WaitEnded
    | AboveTold
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
