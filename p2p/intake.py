"""Rows of an answer come in: checked first, then applied. They claim nothing; who asked merges claims when all is here.

Shared by pulls by vector (`p2p.pull`) and rounds by shard versions (`p2p.rounds`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import BlamelessError, RemoteProtocolError
from p2p.replica import U64, RowColumns
from p2p.stamps import check_not_ahead


def check_rows(keyspace: Keyspace, columns: Sequence[RowColumns], stamps: Sequence[U64], now: m.Now) -> None:
    """Refuse a chunk before it touches anything.

    Args:
        keyspace: where the rows belong.
        columns: with stamps.
        stamps: others of the same message: vectors, frontiers.
        now: stamps may not be too far ahead of it (R14).

    Raises:
        RemoteProtocolError: rows that do not fit, or stamps from the future.
    """
    keyspace.replica.check(columns)
    own = [section.stamps for section in columns if section.stamps is not None and len(section.stamps)]
    if not all(column.all() for column in own):
        raise RemoteProtocolError("a row without a stamp")
    check_not_ahead(max((int(array.max()) for array in (*own, *stamps) if array.size), default=0), now.unix_ms)


def check_writers(keyspace: Keyspace, writers: NDArray[np.uint16]) -> None:
    """Refuse knowledge about more writers than we could pass on.

    Raises:
        BlamelessError: the vector has no room for them; the sender may have met fewer others than we.
    """
    if not keyspace.knowledge.has_room_for(writers.tolist()):
        raise BlamelessError(f"{len(writers)} writers of {keyspace.knowledge.shards} shards: our vector has no room for them")


def take_rows(core: Core, keyspace: Keyspace, columns: Sequence[RowColumns]) -> int:
    """Apply the rows of a checked chunk; returns how many of them were new here."""
    for section in columns:
        if section.stamps is not None and len(section.stamps):
            core.clock.observe(int(section.stamps.max()))
    applied = keyspace.replica.apply(columns, 0)
    keyspace.strays_possible = True
    core.counters.rows_written += applied.written
    core.counters.rows_stale += applied.stale
    core.counters.pull_rows_received += sum(len(section.keys) for section in columns)
    return applied.written


def bindings_of(core: Core, keyspace: Keyspace) -> tuple[NDArray[np.uint16], U64]:
    """Writers of a keyspace whose nonces we know, uint16[b], and the nonces, uint64[b]: who is answered compares them (R12)."""
    family = keyspace.replica.place.family
    known = [(writer, core.writers.nonce_of(family, writer)) for writer in keyspace.knowledge.writers.tolist()]
    bound = np.array([writer for writer, nonce in known if nonce], np.uint16)
    return bound, np.array([nonce for _, nonce in known if nonce], np.uint64)
