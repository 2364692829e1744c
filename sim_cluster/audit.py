"""Invariant 8, on the way: a message that a node refuses has changed nothing there."""

from collections.abc import Sized

from p2p import messages as m
from sim_cluster.meter import CARRIES_ROWS
from sim_cluster.node import VirtualNode

# Every so many batches and pull chunks, the receiver's state is compared before and after when it refuses one; rarer in a
# large cluster, where reading a whole vector for one node's sake is a look into memory that nobody else needs.
AUDIT_EVERY = 16

# Of each model: newest stamp, sum of the vector, sum of the frontiers.
Fingerprint = list[tuple[int, int, int]]


class Audit:
    """Looks at some messages with rows.

    Args:
        nodes: live view of those whose messages they are.
    """

    def __init__(self, nodes: Sized) -> None:
        self._nodes = nodes
        self.thorough = False  # where clocks are so far apart that many will be refused
        self._audited = 0

    def before(self, node: VirtualNode, event: m.Event) -> Fingerprint | None:
        """Rows and knowledge of a node that is about to handle an event; None when this one is not looked at."""
        if not isinstance(event, m.MessageReceived) or not isinstance(event.message, CARRIES_ROWS):
            return None
        self._audited += 1
        due = self.thorough or self._audited % max(AUDIT_EVERY, len(self._nodes)) == 0
        return fingerprint(node) if due else None


def fingerprint(node: VirtualNode) -> Fingerprint:
    """Rows and knowledge, which a refused message may not change."""
    replicas = node.store.models.values()
    return [(replica.stamp_max, int(replica.vector.sum()), int(replica.frontiers.sum())) for replica in replicas]
