"""Frames in, frames out: the contract that `zmq` (sockets) and `memory` (same process) both fulfil.

A transport moves *messages* (a few frames each, best effort, in order while a connection lasts) between addresses. It
knows nothing of their content. Loss is allowed and is counted; a silent drop is not: `send` says at once when a message
was not taken.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

Buffer = bytes | bytearray | memoryview
Frames = Sequence[Buffer]


class Origin(NamedTuple):
    """Where a message came from, as far as the transport knows; not what the message says of itself."""

    source: str  # one name for all that comes from there, to count and to shut out; "" where nothing is known
    node: str | None = None  # the node whose key was proven, on an encrypted transport


Receive = Callable[[list[memoryview], Origin], None]

# A batch of 4,096 tables has at most 3 column frames a table, and a few for envelope, header and claims. A longer message is
# junk and is dropped before its frames are looked at.
FRAMES_MAX = 16_384


class Transport(Protocol):
    """One node's end of the network. Not thread-safe: used from one event loop."""

    @property
    def address(self) -> str:
        """The address that peers can dial, with the real port when 0 was asked for."""

    async def start(self, receive: Receive) -> None:
        """Bind, then call `receive(frames, origin)` for each message that arrives, until `close`.

        Raises:
            OSError: the address is taken or malformed.
        """

    def send(self, address: str, frames: Frames) -> bool:
        """Hand one message over without waiting; connects on first use.

        Returns:
            False when it was not taken: not connected yet, or the peer's queue is full. Nothing of it is then queued.
            Frames must not be changed by the caller afterwards: large ones are not copied.
        """

    def connected(self, address: str) -> bool:
        """Whether a connection to `address` is up now."""

    def disconnect(self, address: str) -> None:
        """Forget a peer: close its connection and drop what waits for it."""

    def set_delay(self, address: str, seconds: float) -> None:
        """Emulate a one-way delay towards `address` (order is kept); 0 removes it."""

    async def close(self) -> None:
        """Close all sockets; nothing is received afterwards."""
