"""What a node must remember beyond its process and its shared memory: a small durable record.

Granted writer ids and blocks of them, so that none is granted twice; the cluster it belongs to; when its last life began; and
whom it knew, so that a first node that comes back alone calls the others instead of believing that there are none.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import msgpack

from p2p.errors import LocalProtocolError
from p2p.membership import MEMBERS_MAX
from p2p.messages import NodeId

# Peers that are written down as soon as they are met.
FIRST_PEERS = 16


class Ledger(Protocol):
    """Where the record is kept; `save` returns once it would survive a crash of the machine."""

    def load(self) -> bytes | None:
        """What was saved last, or None."""

    def save(self, record: bytes) -> None:
        """Replace the record, atomically."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that we were linked to."""

    node: NodeId
    region: str
    role: str
    address: str


@dataclass(slots=True, eq=False)
class NodeRecord:
    """The record in use; change it, then `save`."""

    ledger: Ledger
    cluster: int = 0  # 64-bit cluster nonce (R12); 0: none yet
    boot_ms: int = 0
    bindings: dict[tuple[int, int], int] = field(default_factory=dict)  # (keyspace, writer) -> nonce
    peers: dict[NodeId, Peer] = field(default_factory=dict)
    founded: bool = False  # a cluster of version 1 whose writer ids are in blocks by now
    holder: int = 0  # the nonce under which others give us blocks of writer ids
    blocks: dict[int, None] = field(default_factory=dict)  # ours
    given: dict[int, int] = field(default_factory=dict)  # block -> the holder that we gave it to
    clock_floor: int = 0  # no stamp of ours may be below: who gave us blocks had seen it
    _stale: bool = False  # `peers` changed since it was written down

    @classmethod
    def load(cls, ledger: Ledger) -> Self:
        """Read the record, or begin an empty one.

        Raises:
            LocalProtocolError: it is damaged.
        """
        saved = ledger.load()
        if saved is None:
            return cls(ledger)
        try:
            state: dict[str, Any] = msgpack.unpackb(saved)
            return cls(
                ledger,
                int(state["cluster"]),
                int(state["boot_ms"]),
                {(int(keyspace), int(writer)): int(nonce) for keyspace, writer, nonce in state["granted"]},
                {str(peer[0]): Peer(*map(str, peer)) for peer in state.get("peers", [])},
                bool(state.get("founded", False)),
                int(state.get("holder", 0)),
                {int(block): None for block in state.get("blocks", [])},
                {int(block): int(holder) for block, holder in state.get("given", [])},
                int(state.get("clock_floor", 0)),
            )
        except Exception as error:
            raise LocalProtocolError(
                f"the record of granted writer ids is damaged ({error!r}): restore the file, or remove it to join as a new node"
            ) from error

    def save(self) -> None:
        """Write it down, durably."""
        granted = [[keyspace, writer, nonce] for (keyspace, writer), nonce in self.bindings.items()]
        peers = [[peer.node, peer.region, peer.role, peer.address] for peer in self.peers.values()]
        state = {
            "cluster": self.cluster,
            "boot_ms": self.boot_ms,
            "granted": granted,
            "peers": peers,
            "founded": self.founded,
            "holder": self.holder,
            "blocks": list(self.blocks),
            "given": list(self.given.items()),
            "clock_floor": self.clock_floor,
        }
        self.ledger.save(msgpack.packb(state))
        self._stale = False

    def save_peers(self) -> None:
        """Write down who was met and who parted since the last time; to be called now and then.

        A crash in between forgets the last of them; the first few, one of whom is enough to find the others, are written down
        at once. In a start of many, a write for each message that introduces somebody would take longer than all else.
        """
        if self._stale:
            self.save()

    def begin_life(self, boot_ms: int) -> int:
        """Record a new life; returns its `boot_ms`, larger than that of every life before, whatever the clock says."""
        self.boot_ms = max(boot_ms, self.boot_ms + 1)
        self.save()
        return self.boot_ms

    def meet(self, peer: Peer) -> None:
        """Remember a peer, unless it is known so already."""
        if self.peers.get(peer.node) != peer and (peer.node in self.peers or len(self.peers) < MEMBERS_MAX):
            self.peers[peer.node] = peer
            self._stale = True
            if len(self.peers) <= FIRST_PEERS:
                self.save()

    def part(self, node: NodeId) -> None:
        """Forget a peer that left, or was silent for too long."""
        if self.peers.pop(node, None) is not None:
            self._stale = True
