"""The transport contract inside one process, for tests: same queues, same refusals, no sockets.

Frames are handed over as read-only views of the sender's buffers, so a receiver that writes into them fails here too.
"""

import asyncio
import errno
import itertools
import time
from collections import deque
from typing import Final

from p2p.transport import FRAMES_MAX, Frames, Origin, Receive
from p2p.transport.shared import (
    CLOSE_FLUSH_S,
    FRAME_BYTES_MAX,
    WAKE_BUDGET_S,
    DelayLine,
    TransportCounters,
    byte_view,
    check_frames,
)

# Messages that wait at one receiver; beyond it `send` says False.
QUEUE_MESSAGES_MAX: Final = 256


class MemoryNetwork:
    """The ends that can reach one another, by address."""

    def __init__(self) -> None:
        self._ends: dict[str, MemoryTransport] = {}
        self._numbers = itertools.count(1)

    def bind(self, end: "MemoryTransport", address: str) -> str:
        """Register `end`; an address that ends in `:0` gets a number of its own. Returns the address."""
        if address.endswith(":0"):
            address = f"{address[:-1]}{next(self._numbers)}"
        if address in self._ends:
            raise OSError(errno.EADDRINUSE, f"cannot listen on {address}: the address is already in use")
        self._ends[address] = end
        return address

    def unbind(self, end: "MemoryTransport") -> None:
        """Remove `end`, if it is there."""
        if self._ends.get(end.address) is end:
            del self._ends[end.address]

    def find(self, address: str) -> "MemoryTransport | None":
        """Who listens at `address` now."""
        return self._ends.get(address)

    def inject(self, address: str, frames: Frames, source: str = "") -> bool:
        """Put any frames into a receiver's queue, unchecked, as a stranger with a raw socket could."""
        end = self.find(address)
        return end is not None and end.accept(frames, source)


class MemoryTransport:
    """One end of a `MemoryNetwork`; fulfils `p2p.transport.Transport`."""

    def __init__(self, network: MemoryNetwork, address: str = "memory:0") -> None:
        self.counters = TransportCounters()
        self._network = network
        self._address = address
        self._receive: Receive | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: deque[tuple[Frames, str]] = deque()  # with the sender's address
        self._lines: dict[str, DelayLine] = {}  # an entry for each address that was dialled
        self._waking = False

    @property
    def address(self) -> str:
        return self._address

    async def start(self, receive: Receive) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = self._network.bind(self, self._address)
        self._receive = receive

    def send(self, address: str, frames: Frames) -> bool:
        size = check_frames(frames)
        line = self._line(address)
        if line.direct:
            taken = self._network.inject(address, frames, self._address)
        else:
            taken = self._network.find(address) is not None and line.offer(tuple(frames), size)
        if taken:
            self.counters.messages_out += 1
            self.counters.bytes_out += size
        else:
            self.counters.refused += 1
        return taken

    def connected(self, address: str) -> bool:
        return address in self._lines and self._network.find(address) is not None

    def disconnect(self, address: str) -> None:
        line = self._lines.pop(address, None)
        if line is not None:
            line.clear()

    def set_delay(self, address: str, seconds: float) -> None:
        self._line(address).seconds = seconds

    async def close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_FLUSH_S):
                for line in list(self._lines.values()):
                    await line.emptied.wait()
        except TimeoutError:
            pass
        finally:
            self._receive = None
            self._network.unbind(self)
            for address in list(self._lines):
                self.disconnect(address)
            self._inbox.clear()

    def _line(self, address: str) -> DelayLine:
        line = self._lines.get(address)
        if line is None:
            line = self._lines[address] = DelayLine(lambda frames: self._deliver_delayed(address, frames))
        return line

    def _deliver_delayed(self, address: str, frames: Frames) -> bool:
        if self._network.find(address) is None:
            self.counters.delayed_lost += self._lines[address].clear()
            return False
        return self._network.inject(address, frames, self._address)

    def accept(self, frames: Frames, source: str) -> bool:
        """Queue a message that somebody sent here; False when the queue is full."""
        if len(self._inbox) >= QUEUE_MESSAGES_MAX:
            return False
        self._inbox.append((tuple(frames), source))
        self._wake_soon()
        return True

    def _wake_soon(self) -> None:
        if not self._waking and self._loop is not None:
            self._waking = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        """Hand over what waits, for a bounded time; then let timers and others run."""
        self._waking = False
        stop = time.monotonic() + WAKE_BUDGET_S
        try:
            while self._inbox and self._receive is not None:
                self._hand_up(*self._inbox.popleft(), self._receive)
                if time.monotonic() > stop:
                    break
        finally:
            if self._inbox:
                self._wake_soon()

    def _hand_up(self, frames: Frames, source: str, receive: Receive) -> None:
        views = [byte_view(frame) for frame in frames[: FRAMES_MAX + 1]]
        if not 1 <= len(views) <= FRAMES_MAX or max(view.nbytes for view in views) > FRAME_BYTES_MAX:
            self.counters.junk += 1
            return
        self.counters.messages_in += 1
        self.counters.bytes_in += sum(view.nbytes for view in views)
        receive(views, Origin(source))
