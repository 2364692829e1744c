"""Messages between the nodes of a virtual cluster, from a sender's effect to the receiver's event.

They are encoded and decoded on their way, so the codec is exercised too; receivers of one message share the work and what came
of it. When a message arrives, and whether it does, `sim_cluster.network` says; this file knows of processes that end meanwhile,
are stopped or cut off, and of bits that flip.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from p2p import messages as m
from p2p import wire
from p2p.errors import RemoteProtocolError
from p2p.machine import Machine
from sim_cluster.meter import CARRIES_ROWS
from sim_cluster.network import Network
from sim_cluster.node import VirtualNode, name_of

if TYPE_CHECKING:
    from sim_cluster.virtual import VirtualCluster

# Batches whose frames are kept for their next receivers: one waits a hop until it is forwarded. Dropping costs speed.
SHARED_MAX = 256


@dataclass(slots=True, eq=False)
class _Shared:
    """A message on its way to one or more receivers: encoded once, decoded once."""

    message: m.Message  # kept, so that its id stays its own
    envelope: m.Envelope
    frames: list[bytes]
    size: float
    digest: int
    decoded: m.Message | None = None


# An object without a reference to itself, which a closure that may wait again would have: a hundred thousand of them are on
# their way, and the collector of cycles would look at all of them over and over.
@dataclass(slots=True, eq=False)
class _Delivery:
    """A message that arrives."""

    post: "Post"
    sender: VirtualNode
    target: VirtualNode
    envelope: m.Envelope
    shared: _Shared
    machine: Machine | None  # the process it was sent to; None: it waits for the next one
    sending: Machine | None  # the process that sent it
    corrupt: bool

    def __call__(self) -> None:
        self.post.deliver(self)


class Post:
    """Carries messages.

    Args:
        cluster: between whose nodes; its faults, cuts and meter are looked up with each message, since they change.
        rng: the only source of randomness.
    """

    def __init__(self, cluster: "VirtualCluster", rng: random.Random) -> None:
        self.network = Network(rng)
        self.delivered = 0
        self._cluster = cluster
        self._rng = rng
        self._batches: dict[tuple[int, int], _Shared] = {}  # by id of the message and protocol version
        self._others: dict[tuple[int, int], _Shared] = {}  # other messages, of the event at hand
        self._trace = hashlib.sha256()

    @property
    def trace(self) -> str:
        """Hash of everything delivered so far."""
        return self._trace.hexdigest()

    # --- sending

    def transmit(self, sender: VirtualNode, address: str, envelope: m.Envelope, message: m.Message) -> bool:
        """A node sends a message; False when its socket does not take it."""
        cluster = self._cluster
        target = cluster.nodes.get(name_of(address))
        if target is None or (target.machine is None and not self._outlives()):
            return False
        link, regions = (sender.name, target.name), (sender.region, target.region)
        if link in cluster.cut:
            return True  # lost on the way, which the sender cannot know
        shared = self._share(envelope, message)
        leaves_ms = cluster.now_ms if cluster.cpu is None else cluster.cpu.ends_ms
        arrivals = self.network.arrivals(cluster.options, link, regions, shared.size, leaves_ms)
        if arrivals is None:
            return False
        if cluster.meter is not None:
            cluster.meter.bytes_all += shared.size
            if isinstance(message, CARRIES_ROWS):
                cluster.meter.note_sent(sender, message)
        for arrival_ms in arrivals:
            self.schedule(arrival_ms, sender, target, envelope, shared)
        return True

    def schedule(
        self, arrival_ms: int, sender: VirtualNode, target: VirtualNode, envelope: m.Envelope, shared: _Shared
    ) -> None:
        """A copy of a message will arrive."""
        chance = self._cluster.options.corrupt_probability
        corrupt = chance > 0 and self._rng.random() < chance
        delivery = _Delivery(self, sender, target, envelope, shared, target.machine, sender.machine, corrupt)
        self._cluster.timeline.at(arrival_ms, delivery)

    def end_event(self) -> None:
        """What one event set off is sent: nobody else is sent these very messages, but for batches."""
        self._others.clear()

    def _outlives(self) -> bool:
        """Whether a message outlives the process that it was meant for, in its sender's socket, and reaches the next one."""
        chance = self._cluster.options.afterlife_probability
        return chance > 0 and self._rng.random() < chance

    def _share(self, envelope: m.Envelope, message: m.Message) -> _Shared:
        """The message's frames, made once for all of its receivers; a forwarded batch is the very message that was decoded."""
        kept = self._batches if isinstance(message, m.Batch) else self._others
        shared = kept.get((id(message), envelope.version))
        if shared is None:
            frames = [bytes(frame) for frame in wire.encode(envelope, message)]
            digest = xxhash.xxh3_64()
            for frame in frames[1:]:
                digest.update(frame)
            cpu = self._cluster.cpu
            size = sum(map(len, frames)) if cpu is None else cpu.bytes_of(message, frames)
            shared = _Shared(message, envelope, frames, size, digest.intdigest())
            self._remember(message, shared)
        return shared

    def _remember(self, message: m.Message, shared: _Shared) -> None:
        kept = self._batches if isinstance(message, m.Batch) else self._others
        while len(kept) >= SHARED_MAX:
            del kept[next(iter(kept))]
        kept[id(message), shared.envelope.version] = shared

    # --- arriving

    def deliver(self, delivery: "_Delivery") -> None:
        """A message arrives, or waits for who is to get it."""
        cluster = self._cluster
        sender, target, envelope, shared = delivery.sender, delivery.target, delivery.envelope, delivery.shared
        if delivery.machine is None and sender.machine is not delivery.sending:
            return  # so is the process in whose socket it was
        if target.machine is not delivery.machine:  # the process it was sent to is gone
            if delivery.machine is not None and not self._outlives():
                return
            delivery.machine = target.machine
        if delivery.machine is None:
            target.queued.append(delivery)
            return
        if target.paused:
            target.held.append(delivery)
            return
        self.delivered += 1
        place = f"{cluster.now_ms} {sender.name} {target.name} {envelope.session} {envelope.sequence} {shared.digest:x}\n"
        self._trace.update(place.encode())
        if delivery.corrupt:
            self._deliver_corrupt(target, shared)
            return
        if cluster.meter is not None and isinstance(shared.message, CARRIES_ROWS):
            cluster.meter.note_received(sender, target, envelope.hops, shared.message)
        try:
            message = self._decode(shared)
        except RemoteProtocolError as error:
            target.rejected.append(str(error))
            return
        cluster.feed(target, delivery.machine, m.MessageReceived(envelope, message))

    def _decode(self, shared: _Shared) -> m.Message:
        if shared.decoded is None:
            envelope, shared.decoded = wire.decode([memoryview(frame) for frame in shared.frames])
            assert envelope == shared.envelope, "an envelope changed on its way"
            if isinstance(shared.decoded, m.Batch):  # its receivers forward it as it is
                self._remember(shared.decoded, _Shared(shared.decoded, envelope, shared.frames, shared.size, shared.digest))
                self._batches[id(shared.decoded), envelope.version].decoded = shared.decoded
        return shared.decoded

    def _deliver_corrupt(self, target: VirtualNode, shared: _Shared) -> None:
        frames = [bytearray(frame) for frame in shared.frames]
        frame = self._rng.choice([frame for frame in frames[1:] if frame])
        place = self._rng.randrange(8 * len(frame))
        frame[place // 8] ^= 1 << place % 8
        try:
            wire.decode([memoryview(frame) for frame in frames])
        except RemoteProtocolError as error:
            target.rejected.append(str(error))
            return
        self._cluster.violations.append(f"{target.name} took a corrupt message")
