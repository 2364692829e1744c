"""Leaves: nodes that hold what others hold, and do nothing for them (R22).

What a baseline or witness has is meant to be behind, or to be judged, so its time is its own. It is in no tree's line, leads
nobody, and is asked for rows only where no living holder says that it has them: what a training node told nobody else before it
died is not lost because the one who heard it is a leaf.
"""

from collections.abc import Callable

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.link.links import Link
from p2p.members.membership import HOLDER_ROLES, LEAF_ROLES
from p2p.placement import holds
from p2p.pulling.incomplete import complete_source

# A leaf that is merely behind has repaired itself within this, and has no rows any more that nobody seems to have.
GRACE_MS = 3_000
# Lives of leaves and keyspaces of which that is remembered.
NEWS_MAX = 4_096
# What a life of a member said last of a keyspace, if it said anything.
Told = Callable[[m.MemberRecord, int], m.KeyspaceSummary | None]


def is_leaf(core: Core, node: m.NodeId) -> bool:
    """Whether a member is one."""
    member = core.membership.members.get(node)
    return member is not None and member.record.role in LEAF_ROLES


def source_beside(core: Core, keyspace: Keyspace, link: Link, now: m.Now) -> Link:
    """Whom to catch up from rather than from a leaf: a holder, if one lives; who is none is asked itself."""
    return (complete_source(core, keyspace, now) if is_leaf(core, link.node) else None) or link


class LeafNews:
    """What leaves say of themselves that no holder says, and for how long.

    Args:
        core: shared state.
        told: what a life of a member said last of a keyspace.
    """

    def __init__(self, core: Core, told: Told) -> None:
        self._core = core
        self._told = told
        self._since: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}  # (boot, keyspace) -> digests, and since when

    def may_ask(self, keyspace: Keyspace, link: Link, summary: m.KeyspaceSummary, now: m.Now) -> bool:
        """Whether a peer may be pulled from: it is no leaf, or says for a while what no living holder does."""
        if not is_leaf(self._core, link.node):
            return True
        said, key = (summary.vector_digest, summary.stray_digest), (link.boot, summary.keyspace)
        if self._is_known(keyspace, summary, now):
            self._since.pop(key, None)
            return False
        before, since_ms = self._since.get(key, ((-1, -1), 0))
        if before != said:
            while len(self._since) >= NEWS_MAX:
                del self._since[next(iter(self._since))]
            self._since[key], since_ms = (said, now.monotonic_ms), now.monotonic_ms
        return now.monotonic_ms - since_ms >= GRACE_MS

    def _is_known(self, keyspace: Keyspace, summary: m.KeyspaceSummary, now: m.Now) -> bool:
        for record in self._core.membership.live(now.monotonic_ms):
            if record.role in HOLDER_ROLES and holds(record, keyspace.replica.place):
                theirs = self._told(record, summary.keyspace)
                if theirs is not None and _says_as_much(theirs, summary):
                    return True
        return False


def _says_as_much(one: m.KeyspaceSummary, other: m.KeyspaceSummary) -> bool:
    """Whether the first is equal to the second, or as far with every writer where the second has no strays."""
    if (one.vector_digest, one.stray_digest) == (other.vector_digest, other.stray_digest):
        return True
    reached = dict(one.frontier)
    return not other.stray_digest and all(reached.get(writer, 0) >= stamp for writer, stamp in other.frontier)
