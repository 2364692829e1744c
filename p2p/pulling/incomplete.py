"""Who has dropped live rows, and is therefore not asked for what it may lack (R11).

A node with a bound on its memory evicts rows, or takes some in no more. Their stamps are in its loss floor, which is marked
incomplete: what it claims is true, and what it holds is not all of it. So it answers no asker below its floor; it says so, and
the asker turns to somebody else. It says it with each heartbeat, too (`LACKS`), so that it is not asked in vain and does not
lead others in rounds. And who would drop rows counts only on those who keep all that they have (`KEEPS`), and only for what
these said that they have.

It forwards batches like everybody, since it does that before it applies them, and its vector is as true as any, so that what it
reports of it counts. But that a key is absent at an incomplete node says nothing of it: it never sends a shard whole.

Nothing is ever complete again in the same life; at its start a node may begin such shards anew (`ekko.store`).
"""

from collections.abc import Callable, Sequence

import numpy as np

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.link.links import Link
from p2p.members.membership import HOLDER_ROLES
from p2p.placement import holds
from p2p.stamps import WRITERS_MAX

# Lives and keyspaces that said so; beyond it the oldest are forgotten, and asked in vain once more.
INCOMPLETE_MAX = 65_536

ABOVE_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def is_incomplete(core: Core, boot: int, keyspace: int) -> bool:
    """Whether a life said that it lacks live rows of a keyspace."""
    return (boot, keyspace) in core.incomplete


def note_incomplete(core: Core, boot: int, keyspace: int) -> None:
    """A life said so."""
    while len(core.incomplete) >= INCOMPLETE_MAX:
        del core.incomplete[next(iter(core.incomplete))]
    core.incomplete[boot, keyspace] = None


def note_standing(core: Core, boot: int, keyspace: int, standing: int) -> None:
    """A life said how it stands to a keyspace."""
    if standing & m.LACKS and keyspace in core.keyspaces:
        note_incomplete(core, boot, keyspace)
    else:
        core.incomplete.pop((boot, keyspace), None)


def standing_of(keyspace: Keyspace) -> int:
    """How we stand to it, as each heartbeat says beside the summary."""
    replica = keyspace.replica
    if replica.incomplete.any():
        return m.LACKS
    return m.KEEPS if keyspace.synced and not replica.evicts else 0


def complete_source(core: Core, keyspace: Keyspace, now: m.Now, in_vain: Sequence[int] = ()) -> Link | None:
    """Somebody alive who holds a keyspace whole as far as we know; of our region, if there is one.

    `in_vain`: lives that had nothing for us lately, the last one last. Others are preferred, of whatever region, and then who
    was asked longest ago: nodes of a region may all lack the same, and most others a node does not hear itself.
    """
    options, number, place = core.options, keyspace.replica.keyspace, keyspace.replica.place
    whole = [
        record
        for record in core.membership.live(now.monotonic_ms)
        if record.role in HOLDER_ROLES and holds(record, place) and not is_incomplete(core, record.boot, number)
    ]
    if whole and all(record.boot in in_vain for record in whole):
        return core.link(min(whole, key=lambda record: in_vain.index(record.boot)).node)
    whole = [record for record in whole if record.boot not in in_vain]
    near = [record for record in whole if record.region == options.region] or whole
    return core.link(core.rng.choice(near).node) if near else None


def note_backing(core: Core, kept_by: Callable[[m.MemberRecord, int], m.KeyspaceSummary | None], now: m.Now) -> None:
    """With each heartbeat: tell the stores that may drop what they hold how much of it somebody else keeps.

    `kept_by`: what a life said that it has of a keyspace, and keeps. Who may drop rows itself does not count: two such nodes
    might drop the same row at the same moment. Nor does who has not caught up yet, however new.
    """
    for number, keyspace in core.keyspaces.items():
        if not keyspace.replica.evicts:
            continue
        until, backed = np.zeros(WRITERS_MAX, np.uint64), False
        for record in core.membership.live(now.monotonic_ms):
            if record.role not in HOLDER_ROLES or not holds(record, keyspace.replica.place):
                continue
            if (summary := kept_by(record, number)) is not None:
                backed = True
                for writer, stamp in summary.frontier:
                    until[writer] = max(int(until[writer]), stamp)
        if backed:
            # Whoever has caught up has all of them, and tells no more of it (R13).
            until[[writer for writer in keyspace.knowledge.settled if keyspace.knowledge.is_settled(writer)]] = ABOVE_ALL
        keyspace.replica.note_backed(until)
