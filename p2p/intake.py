"""Rows of an answer come in: checked first, then applied. They claim nothing; who asked merges claims when all is here."""

from collections.abc import Sequence

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import RemoteProtocolError
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


def take_rows(core: Core, keyspace: Keyspace, columns: Sequence[RowColumns]) -> None:
    """Apply the rows of a checked chunk."""
    for section in columns:
        if section.stamps is not None and len(section.stamps):
            core.clock.observe(int(section.stamps.max()))
    applied = keyspace.replica.apply(columns, 0)
    keyspace.strays_possible = True
    core.counters.rows_written += applied.written
    core.counters.rows_stale += applied.stale
    core.counters.pull_rows_received += sum(len(section.keys) for section in columns)
