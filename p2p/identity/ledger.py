"""What a node must remember beyond its process and its shared memory: a small durable record.

Granted writer ids and blocks of them, so that none is granted twice; the cluster it belongs to; when its last life began; and
whom it knew, so that a first node that comes back alone calls the others instead of believing that there are none.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import msgpack
import numpy as np
import xxhash

from p2p.errors import LocalProtocolError
from p2p.members.membership import MEMBERS_MAX
from p2p.messages import Expulsion, NodeId, Retired, WriterRecord
from p2p.messages.fences import LIFTED, Fence, Restorer, merged

# Lives that used our memory one after another. Others know of the last that they saw: it is far fewer lives ago.
LIVES_MAX = 1_024

# Fences that are kept of a family, the last ones, and of all of them together; the last one of a family counts.
FENCES_OF_FAMILY_MAX = 8
FENCES_MAX = 1_024

# Ids in a block, where a record does not say: it was written by a build of then.
FORMER_BLOCK_IDS = 16

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


@dataclass(frozen=True, slots=True)
class Absent:
    """A member that is away; `left`: on purpose."""

    node: NodeId
    boot: int
    boot_ms: int
    left: bool
    writers: tuple[WriterRecord, ...]


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
    block_ids: int = 0  # how many ids are in each of these blocks; 0: there are none yet
    clock_floor: int = 0  # no stamp of ours may be below: who gave us blocks had seen it
    lives: list[int] = field(default_factory=list)  # boots of the lives that used our memory as it is
    expelled: dict[int, Expulsion] = field(default_factory=dict)  # by boot
    retired: dict[tuple[int, int, int], Retired] = field(default_factory=dict)  # by (keyspace, writer, nonce)
    absent: dict[NodeId, Absent] = field(default_factory=dict)
    own: dict[tuple[int, int], int] = field(default_factory=dict)  # (keyspace, writer) -> nonce, of ours, former ones included
    fences: dict[tuple[int, int], Fence] = field(default_factory=dict)  # by (family, epoch)
    _stale: bool = False  # `peers` or `absent` changed since it was written down

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
                int(state.get("block_ids", FORMER_BLOCK_IDS)),
                int(state.get("clock_floor", 0)),
                [int(boot) for boot in state.get("lives", [])],
                {int(one[1]): Expulsion(str(one[0]), int(one[1]), int(one[2])) for one in state.get("expelled", [])},
                {(one[0], one[2], one[3]): _retired_of(one) for one in state.get("retired", [])},
                {str(one[0]): _absent_of(one) for one in state.get("absent", [])},
                {(int(keyspace), int(writer)): int(nonce) for keyspace, writer, nonce in state.get("own", [])},
                {(int(one[0]), int(one[1])): _fence_of(one) for one in state.get("fences", [])},
            )
        except Exception as error:
            raise LocalProtocolError(
                f"the record of granted writer ids is damaged ({error!r}): restore the file, or remove it to join as a new node"
            ) from error

    def save(self) -> None:
        """Write it down, durably."""
        granted = [[keyspace, writer, nonce] for (keyspace, writer), nonce in self.bindings.items()]
        own = [[keyspace, writer, nonce] for (keyspace, writer), nonce in self.own.items()]
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
            "block_ids": self.block_ids,
            "clock_floor": self.clock_floor,
            "lives": self.lives,
            "expelled": [[one.node, one.boot, one.boot_ms] for one in self.expelled.values()],
            "retired": [
                [one.keyspace, one.family, one.writer, one.nonce, one.stage, one.floor.tobytes()]
                for one in self.retired.values()
            ],
            "own": own,
            "fences": [_fence_list(one) for one in self.fences.values()],
            "absent": [
                [one.node, one.boot, one.boot_ms, one.left, [_writer_list(w) for w in one.writers]]
                for one in self.absent.values()
            ],
        }
        self.ledger.save(msgpack.packb(state))
        self._stale = False

    def split_blocks(self, block_ids: int) -> None:
        """Count in blocks of so many ids: a larger one is several, in the same hands as before (R12)."""
        parts = self.block_ids // block_ids
        if parts > 1:
            self.blocks = {block * parts + part: None for block in self.blocks for part in range(parts)}
            self.given = {block * parts + part: holder for block, holder in self.given.items() for part in range(parts)}
        self.block_ids = block_ids

    def note_change(self) -> None:
        """Something changed that may be written down with the next `save_peers`."""
        self._stale = True

    def save_peers(self) -> None:
        """Write down who was met, who parted and who is away since the last time; to be called now and then.

        A crash in between forgets the last of them; the first few, one of whom is enough to find the others, are written down
        at once. In a start of many, a write for each message that introduces somebody would take longer than all else.
        """
        if self._stale:
            self.save()

    def begin_life(self, boot: int, boot_ms: int, empty: bool) -> int:
        """Record a new life; returns its `boot_ms`, larger than that of every life before, whatever the clock says.

        Args:
            boot: its nonce.
            boot_ms: Unix milliseconds.
            empty: it begins without memory of those before.
        """
        self.lives = [boot] if empty else [*self.lives, boot][-LIVES_MAX:]
        self.boot_ms = max(boot_ms, self.boot_ms + 1)
        self.save()
        return self.boot_ms

    def is_expelled(self) -> bool:
        """Whether our memory was used by a life that was expelled."""
        return any(boot in self.expelled for boot in self.lives)

    def retired_digest(self) -> int:
        """64 bits over all expulsions, retirements and fences; 0 when there are none."""
        total = 0
        for boot in self.expelled:
            total ^= xxhash.xxh3_64_intdigest(f"expelled {boot}".encode())
        for retired in self.retired.values():
            total ^= xxhash.xxh3_64_intdigest(f"{retired.key} {retired.stage} ".encode() + retired.floor.tobytes())
        for fence in self.fences.values():
            total ^= xxhash.xxh3_64_intdigest(f"fence {_fence_list(fence)}".encode())
        return total

    def fence(self, family: int) -> Fence | None:
        """The fence of a family that counts: of the largest epoch."""
        return max((one for one in self.fences.values() if one.family == family), key=lambda one: one.epoch, default=None)

    def merge_fences(self, told: Iterable[Fence], families: Callable[[], set[int]]) -> list[tuple[Fence | None, Fence]]:
        """Learn of fences; returns those that are news and kept, each with what was known of it before.

        `families`: those that exist, for when there are too many.
        """
        before: dict[tuple[int, int], Fence | None] = {}
        for one in told:
            known = self.fences.get(one.key)
            more = one if known is None else merged(known, one)
            if more != known:
                before.setdefault(one.key, known)
                self.fences[one.key] = more
            if len(self.fences) > 2 * FENCES_MAX:
                self._trim_fences(families)
        self._trim_fences(families)
        return [(known, self.fences[key]) for key, known in before.items() if key in self.fences]

    def _trim_fences(self, families: Callable[[], set[int]]) -> None:
        """Keep what everybody keeps of too many (see below): the last ones of a family, and of all first those of families that
        exist, then those that stand. Else who tells of many that do not exist could have one forgotten that holds writers back.
        """
        if len(self.fences) <= FENCES_OF_FAMILY_MAX:
            return
        epochs: dict[int, list[int]] = {}
        for family, epoch in self.fences:
            epochs.setdefault(family, []).append(epoch)
        for family, known in epochs.items():
            for epoch in sorted(known)[:-FENCES_OF_FAMILY_MAX]:
                del self.fences[family, epoch]
        if len(self.fences) > FENCES_MAX:
            exist = families()
            order = sorted(
                self.fences.values(),
                key=lambda one: (
                    one.family not in exist,
                    one.stage == LIFTED,
                    xxhash.xxh3_64_intdigest(f"kept {one.key}".encode()),
                ),
            )
            self.fences = {one.key: one for one in order[:FENCES_MAX]}

    # Everybody keeps the same of the same, in whatever order it came: the first so many in a fixed order of what is named.

    def trim_expelled(self, count_max: int) -> list[Expulsion]:
        """Keep the lives that began last; returns the others. What they wrote is retired, so they may be forgotten."""
        if len(self.expelled) <= count_max:
            return []
        newest = sorted(self.expelled.values(), key=lambda one: (one.boot_ms, one.boot), reverse=True)
        for one in newest[count_max:]:
            del self.expelled[one.boot]
        return newest[count_max:]

    def trim_retired(self, count_max: int) -> list[Retired]:
        """Keep so many of the entries; returns the others."""
        if len(self.retired) <= count_max:
            return []
        order = sorted(self.retired.values(), key=lambda one: xxhash.xxh3_64_intdigest(f"kept {one.key}".encode()))
        for one in order[count_max:]:
            del self.retired[one.key]
        return order[count_max:]

    def drop_floors(self, keyspace: int, shards: int) -> bool:
        """Forget what was left of writers of a keyspace that was made anew with so many shards; True when there was some."""
        stale = [key for key, one in self.retired.items() if key[0] == keyspace and len(one.floor) not in (0, shards)]
        for key in stale:
            del self.retired[key]
        self._stale = self._stale or bool(stale)
        return bool(stale)

    def meet(self, peer: Peer) -> None:
        """Remember a peer, unless it is known so already."""
        if self.peers.get(peer.node) != peer and (peer.node in self.peers or len(self.peers) < MEMBERS_MAX):
            self.peers[peer.node] = peer
            self._stale = True
            if len(self.peers) <= FIRST_PEERS:
                self.save()

    def part(self, node: NodeId) -> None:
        """Forget a peer that left or was expelled; who is only silent, for however long, may be called again."""
        if self.peers.pop(node, None) is not None:
            self._stale = True


def _retired_of(saved: list[Any]) -> Retired:
    keyspace, family, writer, nonce, stage, floor = saved
    return Retired(int(keyspace), int(family), int(writer), int(nonce), int(stage), np.frombuffer(floor, np.uint64).copy())


def _fence_list(fence: Fence) -> list[Any]:
    restorers = [[one.writer, one.nonce, one.since] for one in fence.restorers]
    return [fence.family, fence.epoch, fence.stage, fence.stamp, fence.until, restorers, fence.note]


def _fence_of(saved: list[Any]) -> Fence:
    family, epoch, stage, stamp, until, restorers, note = saved
    who = tuple(Restorer(*map(int, one)) for one in restorers)
    return Fence(int(family), int(epoch), int(stage), int(stamp), int(until), who, str(note))


def _writer_list(writer: WriterRecord) -> list[int]:
    return [writer.keyspace, writer.writer, writer.nonce, writer.last_stamp]


def _absent_of(saved: list[Any]) -> Absent:
    node, boot, boot_ms, left, writers = saved
    return Absent(str(node), int(boot), int(boot_ms), left is True, tuple(WriterRecord(*map(int, one)) for one in writers))
