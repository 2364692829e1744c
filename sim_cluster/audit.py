"""Invariant 8, on the way: a message that a node refuses has changed nothing there."""

from p2p import messages as m
from sim_cluster.meter import CARRIES_ROWS
from sim_cluster.node import VirtualNode

# Every so many batches and pull chunks, the receiver's state is compared before and after when it refuses one.
AUDIT_EVERY = 16

# Of each model: newest stamp, sum of the vector, sum of the frontiers.
Fingerprint = list[tuple[int, int, int]]


class Audit:
    """Looks at some messages with rows; at all of them while `every` says so."""

    def __init__(self) -> None:
        self.thorough = False  # where clocks are so far apart that many will be refused
        self._audited = 0

    def before(self, node: VirtualNode, event: m.Event) -> Fingerprint | None:
        """Rows and knowledge of a node that is about to handle an event; None when this one is not looked at."""
        if not isinstance(event, m.MessageReceived) or not isinstance(event.message, CARRIES_ROWS):
            return None
        self._audited += 1
        return fingerprint(node) if self.thorough or self._audited % AUDIT_EVERY == 0 else None


def fingerprint(node: VirtualNode) -> Fingerprint:
    """Rows and knowledge, which a refused message may not change."""
    replicas = node.store.models.values()
    return [(replica.stamp_max, int(replica.vector.sum()), int(replica.frontiers.sum())) for replica in replicas]
