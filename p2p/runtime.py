"""The shell around the machine: bytes, timers and local requests in, effects out. All on one asyncio loop.

Order is the whole point. The machine's state is ahead of the world by the effects it has returned; they are carried out
first in, first out, so messages leave in the order in which the machine numbered them, whatever an effect sets off: an event
that arises while effects are carried out (`Continue`, a refused send, a reply that submits something) is handled at once or in
its turn, and its effects go to the end of the line.

The transport hands messages over for a bounded time per turn of the loop, so a flood of them delays timers and local
requests by one turn and never starves them. A source that sends junk or floods is shut out (`p2p.link.conduct`). Cancelling
`run` is the only way to stop: it says goodbye, flushes and closes.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from p2p import wire
from p2p.errors import BlamelessError, LocalProtocolError, RemoteProtocolError
from p2p.link.compression import Mode
from p2p.link.conduct import Conduct
from p2p.link.outgoing import Outgoing
from p2p.link.wrapping import unwrap
from p2p.messages import (
    Ack,
    Batch,
    Continue,
    Dial,
    Effect,
    Envelope,
    Event,
    Fatal,
    Forget,
    Hello,
    Leaving,
    MessageReceived,
    Note,
    Now,
    Send,
    SendFailed,
    SentSmaller,
    Started,
    StartOver,
    TimerFired,
    Unwanted,
)
from p2p.transport import Origin, Transport

# Effects of one event, and of all that it sets off. A full pull reply to each of 1,000 peers is far below; more is a loop.
EFFECTS_MAX: Final = 1 << 17
# A deadline that is past comes up again at most this often: a machine that never moves it must not take the whole loop.
TIMER_FLOOR_S: Final = 0.001
# Senders whose rejected messages are counted apart; the rest is counted together.
REJECTED_SENDERS_MAX: Final = 1_024
REJECTED_OTHERS: Final = "others"
REJECTED_UNREADABLE: Final = "unreadable"
# Addresses of nobody that we have a link with: seeds, and what strangers say of themselves. The one used longest ago is let go.
STRANGERS_MAX: Final = 256
# What a link's credit limits; everything else counts as a call. Chunks and acknowledgements are far fewer than batches, and
# unasked ones cost no credit.
_BOUND_BY_CREDIT: Final = Batch


class Handler(Protocol):
    """What the runtime needs of `p2p.machine.Machine`."""

    @property
    def deadline_ms(self) -> int:
        """Monotonic milliseconds at which `TimerFired` is due."""

    def handle(self, event: Event, now: Now) -> list[Effect]:
        """Advance by one event; returns effects to carry out in order."""


class NodeStopped(Exception):  # noqa: N818 - not always an error: another node may rightly own our id
    """The machine asked for the node to stop (`Fatal`): going on would break an invariant."""


class NodeExpelled(NodeStopped):
    """The node must drop its rows and begin a new life (`StartOver`)."""


def read_clock() -> Now:
    """Both clocks of this process."""
    return Now(time.monotonic_ns() // 1_000_000, time.time_ns() // 1_000_000)


def no_delay(address: str) -> float:
    """Seconds of emulated delay towards `address`: none."""
    return 0.0


class Runtime:
    """Drives one machine over one transport.

    Args:
        machine: the protocol.
        transport: not started yet; `run` starts and closes it.
        on_effect: called for every effect that is not the runtime's own (replies, notes, metrics). It may call `submit`.
        delay_s: emulated one-way delay towards an address, seconds; asked at each send, since regions become known late.
        clock: reads both clocks.
        compression: what is compressed on links between regions.
        crosses: whether an address is in another region.
    """

    def __init__(
        self,
        machine: Handler,
        transport: Transport,
        *,
        on_effect: Callable[[Effect], None],
        delay_s: Callable[[str], float] = no_delay,
        clock: Callable[[], Now] = read_clock,
        compression: Mode = Mode.NEVER,
        crosses: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.started = asyncio.Event()  # the transport is bound and the machine has begun
        self.rejected: dict[str, int] = {}  # sender -> messages dropped as malformed or out of place
        self.conduct = Conduct()
        self.outgoing = Outgoing(transport, compression, crosses, self._fail, self._on_saved)
        self._machine = machine
        self._transport = transport
        self._on_effect = on_effect
        self._delay_s = delay_s
        self._clock = clock
        self._source = ""  # of the message that is handled now
        self._linked: set[str] = set()  # addresses that were dialled for a link, and not forgotten
        self._strangers: dict[str, None] = {}  # the others that we sent to, the one used last at the end
        self._effects: deque[Effect] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0  # for which deadline `_timer` is armed
        self._turn_end: asyncio.Handle | None = None  # after the messages of this turn of the loop
        self._stopped: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            OSError: the transport cannot listen.
            NodeStopped: the machine returned `Fatal`.
            Exception: the machine or `on_effect` failed; its state cannot be trusted any more.
        """
        self._stopped = asyncio.get_running_loop().create_future()
        await self._transport.start(self._on_message)
        try:
            self.submit(Started(self._transport.address))
            self.started.set()
            await self._stopped
        finally:
            failed = self._stopped.done() and not self._stopped.cancelled()
            if not failed:
                # Peers would find out by themselves; a farewell that cannot be said must not hide why we stop.
                with contextlib.suppress(LocalProtocolError):
                    self._handle(Leaving())
            self._stopped.cancel()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            await self.outgoing.close()
            await self._transport.close()

    def submit(self, event: Event) -> None:
        """Handle a local event now, and carry out its effects. From the loop's own thread.

        Raises:
            LocalProtocolError: the machine refuses it; nothing has changed.
        """
        self._handle(event)
        self._arm_timer()

    def _on_message(self, frames: list[memoryview], origin: Origin) -> None:
        """One message from the transport. Never raises: what is not the peer's fault stops the node."""
        if self._stopped is None or self._stopped.done():
            return
        source = origin.source
        now = self._clock()
        if source and not self.conduct.admits(source, now.monotonic_ms):
            return
        self._source = source
        if self._turn_end is None:  # when the timer is wanted next is worked out once for all messages of a turn
            self._turn_end = asyncio.get_running_loop().call_soon(self._end_turn)
        sender = REJECTED_UNREADABLE
        try:
            envelope, message = wire.decode(unwrap(frames))
            sender = f"{envelope.sender_boot:016x}"
            if isinstance(message, Hello) and origin.node is not None and message.member.node != origin.node:
                raise RemoteProtocolError(f"hello of {message.member.node!r} from the owner of {origin.node!r}'s key")
            self._handle(MessageReceived(envelope, message, origin.node), now)
            if isinstance(message, Ack):  # after the machine: it knows whether the sender is who it says
                self.outgoing.on_ack(envelope.sender_boot, message)
        except RemoteProtocolError as error:
            self._reject(sender, error)
        except Exception as error:  # noqa: BLE001 - a bug: the state may be half changed, so the node ends with it
            self._fail(error)
        else:
            if source and not isinstance(message, _BOUND_BY_CREDIT):
                self._note_shut_out(self.conduct.note_call(source, now.monotonic_ms), "a flood of calls")
        finally:
            self._source = ""

    def _note_shut_out(self, length_ms: int, reason: str) -> None:
        if length_ms:
            self._on_effect(Note("peer_shut_out", (("peer", self._source), ("ms", length_ms), ("reason", reason)), alarm=True))

    def _end_turn(self) -> None:
        self._turn_end = None
        self._arm_timer()

    def _on_timer(self) -> None:
        self._timer = None
        if self._stopped is None or self._stopped.done():
            return
        try:
            # The deadline may have moved since the timer was armed: then there is nothing to do yet.
            if self._clock().monotonic_ms >= self._machine.deadline_ms:
                self._handle(TimerFired())
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
        else:
            self._arm_timer()

    def _arm_timer(self) -> None:
        """Have the timer fire no later than the machine's deadline. One that fires too early only looks again."""
        deadline_ms = self._machine.deadline_ms
        if self._stopped is None or self._stopped.done() or (self._timer is not None and self._timer_ms <= deadline_ms):
            return
        if self._timer is not None:
            self._timer.cancel()
        seconds = max(TIMER_FLOOR_S, (deadline_ms - self._clock().monotonic_ms) / 1000)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)
        self._timer_ms = deadline_ms

    def _handle(self, event: Event, now: Now | None = None) -> None:
        """Let the machine handle `event`, then carry out effects until none is left, unless that is going on already."""
        self._effects.extend(self._machine.handle(event, now or self._clock()))
        if self._draining:
            return
        self._draining = True
        count = 0
        try:
            while self._effects:
                count += 1
                if count + len(self._effects) > EFFECTS_MAX:
                    raise RuntimeError(f"{type(event).__name__} set off more than {EFFECTS_MAX} effects")
                self._perform(self._effects.popleft())
        finally:
            self._draining = False

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Continue(event):
                self._continue(event)
            case Unwanted():
                if self._source:
                    self._note_shut_out(self.conduct.note_call(self._source, self._clock().monotonic_ms), "a flood of repeats")
            case Dial(address):
                self._linked.add(address)
                self._strangers.pop(address, None)
                self._transport.set_delay(address, self._delay_s(address))  # connects on first use
            case Forget(address):
                self._linked.discard(address)
                self._strangers.pop(address, None)
                self._hang_up(address)
            case StartOver(reason):
                self._on_effect(effect)
                self._fail(NodeExpelled(reason))
            case Fatal(reason):
                self._on_effect(effect)
                self._fail(NodeStopped(reason))
            case _:
                self._on_effect(effect)

    def _hang_up(self, address: str) -> None:
        self.outgoing.forget(address)
        self._transport.disconnect(address)

    def _note_stranger(self, address: str) -> None:
        """Nobody will ever say `Forget` of it, so it takes the place of another one."""
        self._strangers.pop(address, None)
        self._strangers[address] = None
        if len(self._strangers) > STRANGERS_MAX:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self._hang_up(oldest)

    def _send(self, send: Send) -> None:
        if send.address not in self._linked:
            self._note_stranger(send.address)
        if self._delay_s is not no_delay:
            self._transport.set_delay(send.address, self._delay_s(send.address))
        if not self.outgoing.send(send.address, send.envelope, send.message):
            self._handle(SendFailed(send.address, send.envelope))

    def _continue(self, event: Event) -> None:
        """The second half of a peer's message; only now may it turn out that the peer is at fault."""
        try:
            self._handle(event)
        except RemoteProtocolError as error:
            envelope: Envelope | None = getattr(event, "envelope", None)
            self._reject(REJECTED_UNREADABLE if envelope is None else f"{envelope.sender_boot:016x}", error)

    def _on_saved(self, receiver_boot: int, bytes_saved: int) -> None:
        """Budgets are charged for what is on the wire; known now, or later when a thread compresses."""
        self._handle(SentSmaller(receiver_boot, bytes_saved))
        if not self._draining:
            self._arm_timer()

    def _reject(self, sender: str, error: RemoteProtocolError) -> None:
        if sender not in self.rejected and len(self.rejected) >= REJECTED_SENDERS_MAX:
            sender = REJECTED_OTHERS
        count = self.rejected[sender] = self.rejected.get(sender, 0) + 1
        # At 1, 2, 4, 8, ...: a flood must not fill the log.
        if count & (count - 1) == 0:
            self._on_effect(Note("frame_rejected", (("sender", sender), ("count", count), ("reason", str(error)))))
        if self._source:
            note = self.conduct.note_call if isinstance(error, BlamelessError) else self.conduct.note_rejected
            self._note_shut_out(note(self._source, self._clock().monotonic_ms), str(error))

    def _fail(self, error: Exception) -> None:
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_exception(error)
