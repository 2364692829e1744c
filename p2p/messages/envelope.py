"""What stands on every message, and what all of them speak of."""

from p2p.values import dataclass
from p2p.versions import FIRST_VERSION

NodeId = str


@dataclass(frozen=True, slots=True)
class Now:
    """One reading of both clocks. Time-outs use the monotonic one, stamps the wall clock (R14)."""

    monotonic_ms: int
    unix_ms: int


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every message between nodes carries (R3), rewritten at each hop; the body below it is not."""

    sender_boot: int  # nonce of the sender's process life
    receiver_boot: int  # the receiver's, as the sender knows it; 0 when it does not know yet
    session: int = 0  # counts the sender's sessions on this link; 0: the message is outside any session
    sequence: int = 0  # 1, 2, ... within the session
    hops: int = 0
    version: int = FIRST_VERSION  # in which the message is encoded: what the link speaks, and the first for a handshake
    asks: bool = False  # to be acknowledged once it is applied, and not when there is more (`p2p.link.window`)
