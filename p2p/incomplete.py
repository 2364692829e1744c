"""Who has dropped live rows, and is therefore not asked for what it may lack (R11).

A node with a bound on its memory evicts rows, or takes some in no more. Their stamps are in its loss floor, which is marked
incomplete: what it claims is true, and what it holds is not all of it. So it answers no asker below its floor; it says so, and
the asker turns to somebody else. It says it with each heartbeat, too, so that it is not asked in vain, does not lead others in
rounds, and is not counted on by those who would drop rows themselves: `backed` tells a store whether somebody else holds all.

It forwards batches like everybody, since it does that before it applies them, and its vector is as true as any, so that what it
reports of it counts. But that a key is absent at an incomplete node says nothing of it: it never sends a shard whole.

Nothing is ever complete again in the same life.
"""

from collections.abc import Callable

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.links import Link
from p2p.membership import HOLDER_ROLES
from p2p.placement import holds

# Lives and keyspaces that said so; beyond it the oldest are forgotten, and asked in vain once more.
INCOMPLETE_MAX = 65_536


def is_incomplete(core: Core, boot: int, keyspace: int) -> bool:
    """Whether a life said that it lacks live rows of a keyspace."""
    return (boot, keyspace) in core.incomplete


def note_incomplete(core: Core, boot: int, keyspace: int) -> None:
    """A life said so."""
    while len(core.incomplete) >= INCOMPLETE_MAX:
        del core.incomplete[next(iter(core.incomplete))]
    core.incomplete[boot, keyspace] = None


def complete_source(core: Core, keyspace: Keyspace, now: m.Now) -> Link | None:
    """Somebody alive who holds a keyspace whole as far as we know; of our region, if there is one."""
    options, number, place = core.options, keyspace.replica.keyspace, keyspace.replica.place
    whole = [
        record
        for record in core.membership.live(now.monotonic_ms)
        if record.role in HOLDER_ROLES and holds(record, place) and not is_incomplete(core, record.boot, number)
    ]
    near = [record for record in whole if record.region == options.region] or whole
    return core.link(core.rng.choice(near).node) if near else None


def tell(core: Core, heard: Callable[[m.MemberRecord, int], bool], now: m.Now) -> None:
    """With each heartbeat: say what we lack rows of, and tell the stores whether somebody else has them.

    `heard`: whether a life has told us of a keyspace. Of whom we heard nothing we do not know that it is complete.
    """
    for number, keyspace in core.keyspaces.items():
        if keyspace.replica.incomplete.any():
            for link in core.neighbours(now):
                core.send(link, m.Incomplete(number, 0))
        if keyspace.replica.limited:
            place = keyspace.replica.place
            backed = any(
                record.role in HOLDER_ROLES
                and holds(record, place)
                and heard(record, number)
                and not is_incomplete(core, record.boot, number)
                for record in core.membership.live(now.monotonic_ms)
            )
            keyspace.replica.note_backed(backed)
