"""What batches cost and how long they took, measured on the virtual network."""

from dataclasses import dataclass, field

from ekko.model import SHARDS_MAX
from p2p import messages as m
from sim_cluster.node import VirtualNode

# Messages with rows.
CARRIES_ROWS = (m.Batch, m.PullReply, m.ShardsReply, m.StateChunk)
WithRows = m.Batch | m.PullReply | m.ShardsReply | m.StateChunk


@dataclass(slots=True)
class Meter:
    """Filled when a cluster has one."""

    published_ms: dict[int, int] = field(default_factory=dict)  # stamp -> when
    delays_ms: list[int] = field(default_factory=list)  # of every batch applied at another node
    copies: int = 0  # batches with rows that were received, repeats included
    groups: int = 0  # of those, that several steps shared
    rows: int = 0  # received in batches and in answers to pulls, repeats included
    # (region, stamp, shard, part) -> times; shards of different keyspaces are different shards
    into_region: dict[tuple[str, int, int, int], int] = field(default_factory=dict)
    entries: dict[tuple[str, int], list[str]] = field(default_factory=dict)  # (region, shard) -> nodes at which it came in
    bytes_into: dict[str, int] = field(default_factory=dict)  # payload of batches that crossed into a region
    bytes_sent: dict[str, int] = field(default_factory=dict)  # payload of batches and answers sent, by node
    bytes_all: float = 0.0  # of all messages sent, encoded
    hops_max: int = 0

    def note_sent(self, sender: VirtualNode, message: WithRows) -> None:
        """Rows leave a node."""
        self.bytes_sent[sender.name] = self.bytes_sent.get(sender.name, 0) + message.payload_bytes

    def note_received(self, sender: VirtualNode, target: VirtualNode, hops: int, message: WithRows) -> None:
        """Rows come to a node."""
        self.rows += message.row_count
        if not message.columns or not isinstance(message, m.Batch):
            return
        self.copies += 1
        self.groups += message.steps is not None
        self.hops_max = max(self.hops_max, hops + 1)
        if sender.region != target.region:
            self._note_entry(target, message)

    def _note_entry(self, target: VirtualNode, batch: m.Batch) -> None:
        """A batch enters a region."""
        first = batch.keyspace * SHARDS_MAX
        place = (target.region, batch.stamp, first + int(batch.claims.shards[0]), int(batch.claims.part[0]))
        self.into_region[place] = self.into_region.get(place, 0) + 1
        for shard in batch.claims.shards.tolist():
            nodes = self.entries.setdefault((target.region, first + shard), [])
            if target.name not in nodes:
                nodes.append(target.name)
        self.bytes_into[target.region] = self.bytes_into.get(target.region, 0) + batch.payload_bytes

    def note_applied(self, stamp: int, now_ms: int) -> None:
        """A node has written the rows of a batch."""
        published_ms = self.published_ms.get(stamp, now_ms)
        if published_ms < now_ms:  # at its origin it is applied when it is published
            self.delays_ms.append(now_ms - published_ms)
