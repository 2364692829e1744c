"""Rows that changed here are due wherever their keyspace goes in state mode (R2); nobody else has to know of that.

Not to whom they came from: it has them. Two nodes may each be the other's parent, of different writers, or in different trees;
what one sent, the other would send back for ever.
"""

from collections.abc import Sequence

from p2p.core import Core, Keyspace
from p2p.replica import Applied, RowColumns


def note_rows(core: Core, keyspace: Keyspace, columns: Sequence[RowColumns], applied: Applied) -> None:
    """Call it once rows were applied. Where none of them was new, every child has its newer version, or that is due (T2)."""
    if not keyspace.backlogs or not applied.written:
        return
    others = [backlog for boot, backlog in keyspace.backlogs.items() if boot != core.source]
    for section in columns if others else ():
        if len(section.keys):
            places = keyspace.replica.places_of(section.table, section.keys)
            for backlog in others:
                backlog.note(section, places, core.now_ms)
