"""What both transports have in common: counters, the limits on a message, pacing, and the emulated delay.

The delay line stands where the wire of a long link would be: first in, first out, each message leaving when its time has
come. It is bounded like everything else; a message that finds it full is refused at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from p2p.errors import LocalProtocolError
from p2p.transport import FRAMES_MAX, Buffer, Frames

# One frame: as large as the largest message of `p2p.wire` (a test compares them). Peers that send more are cut off.
FRAME_BYTES_MAX: Final = 16 << 20

# How long one wake-up of the event loop may hand over messages before timers and local requests get their turn. Handling a
# large batch takes about as long, so in practice a flood costs the others one batch.
WAKE_BUDGET_S: Final = 0.002

# Bounds of one delay line. 256 MiB is 200 ms of a 10 Gbit/s link.
DELAYED_MESSAGES_MAX: Final = 65_536
DELAYED_BYTES_MAX: Final = 256 << 20
# A due message that its peer's full queue refuses is offered again after this long; order is kept.
DELAY_RETRY_S: Final = 0.001
# How long `close` waits for messages that are still on their emulated way (a farewell, mostly).
CLOSE_FLUSH_S: Final = 0.25


@dataclass(slots=True)
class TransportCounters:
    """What went through one end of the network since it started."""

    messages_in: int = 0
    bytes_in: int = 0
    messages_out: int = 0
    bytes_out: int = 0
    refused: int = 0  # `send` said False
    junk: int = 0  # messages dropped on arrival: no frame, too many frames, a frame over the limit
    handshakes_failed: int = 0  # connections that never spoke our protocol, or did not prove an allowed key
    strangers: int = 0  # connections refused for their key
    revoked: int = 0  # messages dropped unread: their sender's key is not allowed any more
    connections_lost: int = 0  # connections that ended, in either direction; oversize senders are cut off and end up here
    delayed_lost: int = 0  # messages on their emulated way when the connection broke


def check_frames(frames: Frames) -> int:
    """Bytes of a message that is about to be sent.

    Raises:
        LocalProtocolError: no receiver would accept it, so sending it again would never help.
    """
    if not 1 <= len(frames) <= FRAMES_MAX:
        raise LocalProtocolError(f"message of {len(frames)} frames, expected 1 to {FRAMES_MAX}")
    total = 0
    for frame in frames:
        size = frame.nbytes if isinstance(frame, memoryview) else len(frame)
        if size > FRAME_BYTES_MAX:
            raise LocalProtocolError(f"frame of {size} bytes, limit {FRAME_BYTES_MAX}: split the message")
        total += size
    return total


def byte_view(frame: Buffer) -> memoryview:
    """A read-only flat view of a frame's bytes; nothing is copied."""
    view = memoryview(frame)
    # `cast` refuses views without elements (a table's empty column).
    return view.cast("B").toreadonly() if view.nbytes else memoryview(b"")


class DelayLine:
    """Messages on their way to one peer. `deliver(frames)` hands one over and returns False to be asked again later.

    Only the first message is ever looked at, so a delay that shrinks does not reorder.
    """

    def __init__(self, deliver: Callable[[Frames], bool]) -> None:
        self.seconds = 0.0
        self.emptied = asyncio.Event()
        self.emptied.set()
        self._deliver = deliver
        self._waiting: deque[tuple[float, int, Frames]] = deque()  # due (time.monotonic), bytes, frames
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def direct(self) -> bool:
        """No delay is set and nothing waits: messages need not pass through here."""
        return not self._waiting and self.seconds <= 0

    def offer(self, frames: Frames, size: int) -> bool:
        """Take a message of `size` bytes; False when the line is full."""
        if len(self._waiting) >= DELAYED_MESSAGES_MAX or self._bytes + size > DELAYED_BYTES_MAX:
            return False
        # The loop's own clock may be cached since the iteration began; the emulated time would come out too short.
        due = time.monotonic() + self.seconds
        self._waiting.append((due, size, frames))
        self._bytes += size
        self.emptied.clear()
        if self._timer is None:
            self._arm(due - time.monotonic())
        return True

    def clear(self) -> int:
        """Drop everything that waits; returns how many messages that was."""
        count = len(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        self.emptied.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return count

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        stop = time.monotonic() + WAKE_BUDGET_S
        while self._waiting:
            due, size, frames = self._waiting[0]
            now = time.monotonic()
            if due > now or now > stop:
                self._arm(due - now)
                return
            if not self._deliver(frames):
                # Delivery may have found the connection broken and cleared the line.
                if self._waiting:
                    self._arm(DELAY_RETRY_S)
                return
            self._waiting.popleft()
            self._bytes -= size
        self.emptied.set()
