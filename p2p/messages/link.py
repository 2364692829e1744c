"""What two ends of a link say of it (`p2p.link`)."""

from p2p.values import dataclass


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
class Wants:
    """So many bytes a second I want to send to these regions (`p2p.link.budget.ALL`: as many as I can get); said within a
    region.

    Since protocol version 2 (`p2p.link.sharing`).
    """

    regions: tuple[tuple[str, int], ...]
