"""Which lives of other nodes there are, and which are over for good: what somebody asks who takes over the work of another.

A life is over for good for a family of keyspaces (`gone`) when it was expelled and the writers that it had there are retired in
every partition that is here: until then rows that it wrote and that a third node holds may still arrive.
"""

from p2p.core import Core
from p2p.members.membership import HOLDER_ROLES
from p2p.messages import DONE, MemberRecord, NodeId, Now
from p2p.placement import is_short
from p2p.values import dataclass


@dataclass(frozen=True, slots=True)
class NodeLife:
    """The latest life of a node that is known here.

    `boot`, `boot_ms`: 0 where a peer of former times has not been met in this life of ours. `holds`: partitions of the family;
    None: that is not known.
    """

    node: NodeId
    boot_ms: int
    boot: int
    holds: tuple[int, ...] | None
    alive: bool
    left: bool = False
    expelled: bool = False
    gone: bool = False


def lives_of(core: Core, family: int, now: Now) -> tuple[NodeLife, ...]:
    """The latest life of every node that may hold rows, our own included, by node.

    Args:
        core: of the node that is asked.
        family: whose holders are wanted; of several partitions.
        now: to tell who is alive.
    """
    record, members = core.record, core.membership.members
    open_ = (one for one in record.retired.values() if one.family == family and one.stage != DONE)
    settled = not any(one.keyspace in core.keyspaces for one in open_)
    lives: dict[NodeId, NodeLife] = {}
    for one in record.expelled.values():
        known = lives.get(one.node)
        if known is None or (known.boot_ms, known.boot) < (one.boot_ms, one.boot):
            lives[one.node] = NodeLife(one.node, one.boot_ms, one.boot, (), False, False, True, settled)
    for peer in record.peers.values():  # met in a former life of ours, maybe; neither left nor expelled
        if peer.role in HOLDER_ROLES and peer.node not in lives:
            lives[peer.node] = NodeLife(peer.node, 0, 0, None, False)
    for away in record.absent.values():
        if away.boot not in record.expelled:
            lives[away.node] = NodeLife(away.node, away.boot_ms, away.boot, None, False, away.left)
    for node, member in members.items():
        told = member.record
        if told.role in HOLDER_ROLES and told.boot not in record.expelled:
            alive = core.membership.alive(node, now.monotonic_ms)
            lives[node] = NodeLife(node, told.boot_ms, told.boot, _held(told, family), alive, told.left)
    own = core.membership.own
    lives[own.node] = NodeLife(own.node, own.boot_ms, own.boot, _held(own, family), True)
    return tuple(lives[node] for node in sorted(lives))


def _held(record: MemberRecord, family: int) -> tuple[int, ...] | None:
    """Which partitions a member holds; None where it has not told yet."""
    if is_short(record):
        return None
    return next((holding.held for holding in record.holds if holding.family == family), ())
