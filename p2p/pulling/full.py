"""What becomes of rows when this node's memory has no room for them (decision 0036).

A message that does not fit is refused whole: nothing of it is stored, and nothing is claimed, so that the node lacks it as if
it had never come, and pulls it. While pulls find no room either, they pause, for twice as long each time. What changes rows
that are there goes on, as do look-ups, forwarding and everything else.
"""

from collections.abc import Sequence

import numpy as np

from p2p import messages as m
from p2p.core import Core, Full, Keyspace
from p2p.errors import FullError
from p2p.link.links import Link
from p2p.placement import take
from p2p.replica import RowColumns

# After a refusal the first pull waits for so long, then for twice as long, and so on: an answer that finds no room costs its
# answerer a selection, and the network what was on its way.
PAUSE_MS = 1_000
PAUSE_MS_MAX = 32_000
# A person is told so often.
TOLD_EVERY_MS = 60_000


def reserve_batch(core: Core, keyspace: Keyspace, batch: m.Batch, now: m.Now) -> bool:
    """Whether there is room for a batch, which is to be applied at once."""
    try:
        keyspace.replica.reserve(batch.columns)
    except FullError as error:
        note_refused_batch(core, keyspace, error, now)
        return False
    return True


def note_refused_batch(core: Core, keyspace: Keyspace, error: FullError, now: m.Now) -> None:
    """A batch found no room."""
    core.counters.batches_refused_full += 1
    _note_full(core, keyspace, error, now).batch_ms = now.monotonic_ms


def note_refused_answer(core: Core, keyspace: Keyspace, error: FullError, now: m.Now) -> None:
    """An answer found no room: the next one is asked for later."""
    core.counters.answers_refused_full += 1
    full = _note_full(core, keyspace, error, now)
    full.until_ms = now.monotonic_ms + full.pause_ms
    full.pause_ms = min(2 * full.pause_ms, PAUSE_MS_MAX)


def call_off(core: Core, link: Link, *, last: bool) -> None:
    """Spare the network the rest of an answer that finds no room: who is told of a broken session drops what it streams."""
    if not last:
        core.send(link, m.SessionBroken(link.session_in))


def held(keyspace: Keyspace, columns: Sequence[RowColumns]) -> tuple[RowColumns, ...]:
    """The rows of keys that are here: they need no room."""
    left = []
    for column in columns:
        here = np.flatnonzero(keyspace.replica.places_of(column.table, column.keys) >= 0)
        if here.size:
            left.append(column if here.size == len(column.keys) else take(column, here))
    return tuple(left)


def pauses(keyspace: Keyspace, now: m.Now) -> bool:
    """Whether it is too soon to ask for rows again."""
    return keyspace.full is not None and now.monotonic_ms < keyspace.full.until_ms


def note_room(core: Core, keyspace: Keyspace, now: m.Now) -> None:
    """What was lacking is here."""
    if keyspace.full is not None:
        core.note("memory_has_room", keyspace=keyspace.replica.keyspace, ms=now.monotonic_ms - keyspace.full.since_ms)
        keyspace.full = None


def _note_full(core: Core, keyspace: Keyspace, error: FullError, now: m.Now) -> Full:
    full = keyspace.full
    if full is None:
        full = keyspace.full = Full(now.monotonic_ms, now.monotonic_ms + PAUSE_MS, PAUSE_MS)
    if full.told_ms is None or now.monotonic_ms - full.told_ms >= TOLD_EVERY_MS:
        full.told_ms = now.monotonic_ms
        core.note("memory_full", alarm=True, keyspace=keyspace.replica.keyspace, reason=str(error))
    return full
