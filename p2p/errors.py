"""What can go wrong in the protocol, by who is at fault.

`LocalProtocolError`: our own caller misused the machine; it propagates to that caller. `RemoteProtocolError`: bytes of a
peer are at fault. It is the only exception that a peer's bytes can raise; whoever catches it drops the message and counts
the peer, and the state is as it was before the message.

`FullError`: nobody is at fault but this node's memory. It is caught wherever it can arise, and ends nothing.
"""


class ProtocolError(Exception):
    """Base of all; never raised itself."""


class LocalProtocolError(ProtocolError):
    """We misused the machine: the call is refused and the state is unchanged."""


class FullError(ProtocolError):
    """Our own memory has no room for what came: all of it is refused, and the state is unchanged."""


class NotYetError(LocalProtocolError):
    """What was asked for needs an answer of another node first; asked again in a moment, it may be done."""


class FencedError(LocalProtocolError):
    """The family is fenced (`p2p.identity.fence`): its writers are stopped for now. `epoch`: of the fence."""

    def __init__(self, reason: str, epoch: int) -> None:
        super().__init__(reason)
        self.epoch = epoch


class RemoteProtocolError(ProtocolError):
    """A peer misbehaved: its message is dropped and the state is unchanged."""


class BlamelessError(RemoteProtocolError):
    """The message cannot be taken here, and that may be our own fault: it is dropped and counted as a call, not as junk."""


class AheadError(BlamelessError):
    """A stamp lies too far ahead of our clock; one of the two clocks is wrong."""


class UnknownTableError(BlamelessError):
    """Rows of a table that the sender knows and we do not know yet: the schema is on its way."""


class SchemaClashError(RemoteProtocolError):
    """A peer's schema contradicts ours: same name, other shape."""
