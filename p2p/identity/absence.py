"""Who is away, and when an absence is long enough to let go of a member without an operator (R13).

Think of a lifeboat that has lost sight of the fleet: it must not strike the fleet off the register. From inside, "they are
gone" and "I am gone" look the same, so only one who sees most of the register may say who is gone, and only of those whom he
missed himself all the time.

A member is let go of by the *coordinator*, the first of the living by name, so that one decision is told and not a hundred; and
only when in each heartbeat of `expel_after`, without a break, within this life of the coordinator,

- the member was away, and had not said goodbye: who left on purpose may stay away,
- the coordinator had caught up, was not deaf, and saw a strict majority of all nodes that it knows: itself and the living,
  against the silent and those of a former life that it has not heard in this one. Who left does not count.

So a node alone, a node just started, either half of an even split, and either of two nodes never let go of anybody by
themselves. Time is counted in our own heartbeats: a wall clock that jumps, or a process that did not run, adds nothing (R14).
"""

from p2p import messages as m
from p2p.core import Core
from p2p.identity.ledger import Absent
from p2p.members.membership import HEARTBEAT_MS, HOLDER_ROLES, MEMBERS_MAX


class Absence:
    """The part of the machine that keeps the list of those who are away."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._beats: dict[int, int] = {}  # by boot: how many of our last heartbeats, without a break, witnessed that it is away

    def on_beat(self, now: m.Now) -> list[Absent]:
        """Called at every heartbeat; returns who has been away too long by now, for us to expel."""
        self._note(now)
        core = self._core
        silent = [absent for absent in core.record.absent.values() if not absent.left]
        if not silent or not core.options.expel_after_ms or not self._may_judge(now):
            self._beats.clear()
            return []
        self._beats = {absent.boot: self._beats.get(absent.boot, 0) + 1 for absent in silent}
        live = core.membership.live(now.monotonic_ms)
        # Leaves lead nobody, unless there are only leaves (R22).
        leads = [record.node for record in live if record.role in HOLDER_ROLES]
        if core.options.role not in HOLDER_ROLES:
            first = "" if leads else min((record.node for record in live), default=core.options.node)
        else:
            first = min(leads, default=core.options.node)
        if first < core.options.node:
            return []
        return [absent for absent in silent if self._beats[absent.boot] * HEARTBEAT_MS > core.options.expel_after_ms]

    def _may_judge(self, now: m.Now) -> bool:
        """Whether what we miss is more likely gone than we are."""
        core = self._core
        if core.deaf or not all(keyspace.synced for keyspace in core.keyspaces.values()):
            return False
        if core.membership.protocol_min_known() < 2:
            return False  # they could not be told
        live = core.membership.live_nodes(now.monotonic_ms)
        silent = {node for node, absent in core.record.absent.items() if not absent.left}
        missing = silent.union(core.record.peers).difference(live)
        return 1 + len(live) > len(missing)

    def _note(self, now: m.Now) -> None:
        """Remember who is away, beyond our own life."""
        register, record = self._core.membership, self._core.record
        changed = False
        for left, nodes in ((False, register.suspects()), (True, register.left())):
            for node in nodes:
                absent, known = absent_of(register.members[node].record, left), record.absent.get(node)
                if known is None and len(record.absent) >= MEMBERS_MAX:
                    continue
                if known is None or (known.boot, known.left) != (absent.boot, left):
                    record.absent[node] = absent
                    changed = True
        for node in [node for node in record.absent if register.alive(node, now.monotonic_ms)]:
            del record.absent[node]
            changed = True
        if changed:
            record.note_change()


def absent_of(record: m.MemberRecord, left: bool) -> Absent:
    """What is remembered of a member that is away."""
    return Absent(record.node, record.boot, record.boot_ms, left, record.writers)
