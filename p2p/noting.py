"""Rows that came here are due wherever their keyspace goes in state mode (R2); nobody else has to know of that."""

from collections.abc import Sequence

from p2p.core import Core, Keyspace
from p2p.replica import RowColumns


def note_rows(core: Core, keyspace: Keyspace, columns: Sequence[RowColumns]) -> None:
    """Call it once rows were applied, also with those that changed nothing: their newer version must reach the child, too."""
    if not keyspace.backlogs:
        return
    for section in columns:
        if len(section.keys):
            places = keyspace.replica.places_of(section.table, section.keys)
            for backlog in keyspace.backlogs.values():
                backlog.note(section, places, core.now_ms)
