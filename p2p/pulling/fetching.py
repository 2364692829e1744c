"""Rows that were dropped here for want of memory, and that somebody asks for: by key, from a node that has them (R11).

Every heartbeat the store tells which keys readers asked for in vain, a bounded number, and one question goes to somebody who
holds the keyspace whole. Its answer is rows, which claim nothing; they are older than what our vector covers, so the ghost rule
(T6) would drop them, and it is passed by for exactly these keys. That is sound since

- the answerer's vector covers our loss floor in the shards of these keys, as it was when we asked. So of each key it has the
  newest version that was ever dropped here, or one that is newer; what it has not is deleted;
- of keys that are dropped once more after we asked the store lets nothing in (`Replica.take_back`);
- an answer counts for `SILENCE_MS` only, which is shorter than it takes to delete a row everywhere and to collect it.

Both messages may be lost: who is asked for a key again asks again. An answer is one message of a session, sent only where there
is credit for repairs; what does not fit into it is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from p2p import messages as m
from p2p import wire
from p2p.core import Core, Keyspace
from p2p.errors import FullError, RemoteProtocolError
from p2p.link.links import Link
from p2p.pulling.incomplete import complete_source
from p2p.pulling.intake import bindings_of, check_rows
from p2p.pulling.whole import floor_of
from p2p.replica import RowColumns, TableKeys

# Keys in one question, of all tables, and bytes of the floor that goes with them.
KEYS_MAX = wire.WANTED_KEYS_MAX
FLOOR_BYTES_MAX = 1 << 20
# Rows of one answer.
ANSWER_BYTES_MAX = wire.BATCH_BYTES_MAX
# An answer that takes longer is not taken any more.
SILENCE_MS = 3_000


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question on its way."""

    boot: int
    request: int
    keys: tuple[TableKeys, ...]
    deadline_ms: int


class Fetching:
    """The part of the machine that gets single rows back, and gives them to others."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._asked: dict[int, _Asked] = {}  # by keyspace: one at a time
        self._requests = 0

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._asked.pop(keyspace, None)

    # --- asking

    def on_beat(self, now: m.Now) -> None:
        """With each heartbeat: ask for what was asked for here in vain."""
        for number, keyspace in self._core.keyspaces.items():
            asked = self._asked.get(number)
            if asked is not None and now.monotonic_ms < asked.deadline_ms:
                continue
            self._asked.pop(number, None)
            if keyspace.replica.incomplete.any():
                self._ask(keyspace, now)

    def _ask(self, keyspace: Keyspace, now: m.Now) -> None:
        core, replica = self._core, keyspace.replica
        link = complete_source(core, keyspace, now)
        if link is None or link.version < wire.since(m.KeysWanted):
            return
        shards_max = max(1, FLOOR_BYTES_MAX // (8 * max(1, len(replica.floor_writers))))
        wanted = replica.take_wanted(min(KEYS_MAX, shards_max))
        if not wanted:
            return
        shards = np.unique(np.concatenate([replica.shards_of(one.keys) for one in wanted])).astype(np.uint32)
        floor = floor_of(keyspace, shards)
        assert floor is not None, "some shard is wanted"
        self._requests += 1
        self._asked[replica.keyspace] = _Asked(link.boot, self._requests, wanted, now.monotonic_ms + SILENCE_MS)
        core.counters.keys_wanted += sum(len(one.keys) for one in wanted)
        core.send(link, m.KeysWanted(replica.keyspace, self._requests, floor, wanted, core.retired_digest))

    def on_found(self, link: Link, found: m.KeysFound, now: m.Now) -> None:
        """Rows came that were asked for.

        Raises:
            RemoteProtocolError: rows that do not fit, or that nobody asked for. Nothing is changed.
        """
        core = self._core
        asked = self._asked.get(found.keyspace)
        if asked is None or (asked.boot, asked.request) != (link.boot, found.request) or now.monotonic_ms >= asked.deadline_ms:
            return
        del self._asked[found.keyspace]
        keyspace = core.keyspaces[found.keyspace]
        _check_asked(asked.keys, found.columns)
        check_rows(keyspace, found.columns, (), now)
        if not core.same_writers(link.node, keyspace.replica.place.family, found.bound.tolist(), found.nonces.tolist()):
            return
        for section in found.columns:
            if section.stamps is not None and len(section.stamps):
                core.clock.observe(int(section.stamps.max()))
        try:
            written = keyspace.replica.take_back(found.columns).written
        except FullError:
            return  # those that are here serve on
        keyspace.strays_possible = True
        core.counters.rows_fetched += written

    # --- answering

    def on_wanted(self, link: Link, wanted: m.KeysWanted) -> None:
        """Somebody lacks rows that it dropped.

        Raises:
            RemoteProtocolError: keys or shards that are not of this keyspace. Nothing is sent.
        """
        core = self._core
        keyspace = core.keyspaces.get(wanted.keyspace)
        if keyspace is None:
            core.counters.fetches_refused += 1
            return
        replica, floor = keyspace.replica, wanted.floor
        _check_wanted(keyspace, wanted)
        if replica.incomplete[floor.shards].any():
            core.counters.fetches_refused += 1
            core.send(link, m.Incomplete(wanted.keyspace, 0))
            return
        if not covers(keyspace, floor) or not link.has_credit_for_repairs():
            core.counters.fetches_refused += 1
            return
        columns, room = [], ANSWER_BYTES_MAX
        for one in wanted.keys:
            section = replica.read_keys(one.table, one.keys)
            if 0 < section.payload_bytes <= room:  # a table of the widest rows: 64 of them
                columns.append(section)
                room -= section.payload_bytes
            elif section.payload_bytes:
                count = max(0, room // (16 + section.rows.shape[1]))
                assert section.stamps is not None
                columns.append(RowColumns(one.table, section.keys[:count], section.rows[:count], section.stamps[:count]))
                break
        found = m.KeysFound(wanted.keyspace, wanted.request, tuple(columns), *bindings_of(core, keyspace))
        core.emit(m.Send(link.address, link.next_envelope(found.payload_bytes), found))
        link.traffic.rows_out += found.row_count
        link.traffic.bytes_out += found.payload_bytes
        core.counters.fetches_served += 1


def covers(keyspace: Keyspace, floor: m.Floor) -> bool:
    """Whether our vector covers it: else what was dropped there may be newer than what we have."""
    return bool((keyspace.knowledge.vector[np.ix_(floor.shards, floor.writers)] >= floor.stamps).all())


def _check_wanted(keyspace: Keyspace, wanted: m.KeysWanted) -> None:
    """Refuse a question that contradicts itself, or this keyspace."""
    replica, shards = keyspace.replica, wanted.floor.shards
    if int(shards[-1]) >= replica.shards:
        raise RemoteProtocolError(f"keys of shard {int(shards[-1])}, the keyspace has {replica.shards}")
    for one in wanted.keys:
        if (replica.partition_of(one.keys) != replica.place.partition).any():
            raise RemoteProtocolError("keys of another partition")
        if not np.isin(replica.shards_of(one.keys), shards).all():
            raise RemoteProtocolError("keys of shards whose floor is not told")


def _check_asked(asked: Sequence[TableKeys], columns: Sequence[RowColumns]) -> None:
    """Refuse what nobody asked for."""
    keys = {one.table: one.keys for one in asked}
    for section in columns:
        if len(section.rows) != len(section.keys):
            raise RemoteProtocolError("a deleted row among those that were asked for")
        if not np.isin(section.keys, keys.get(section.table, ())).all():
            raise RemoteProtocolError("a row that nobody asked for")
