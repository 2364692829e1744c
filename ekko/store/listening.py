"""Who else wants to know of all that comes to a model: a node that keeps what was (`ekko.delayed`); nobody, as a rule."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from p2p.replica import RowColumns


class Listener(Protocol):
    """Told by one model, in the thread that writes it."""

    def on_rows(self, columns: Sequence[RowColumns], stamp: int) -> None:
        """These rows are about to be applied, whatever way they came; some may be superseded already. `stamp` is that of
        columns without stamps of their own. The arrays are the caller's.
        """

    def on_rows_gone(self, newest: int) -> None:
        """Rows are about to go that others deleted, up to this stamp, and forgot: no version comes in their place (R5)."""

    def on_coalesced(self, since: Mapping[int, int]) -> None:
        """See `p2p.replica.Replica.note_coalesced`."""

    def on_progress(self, synced_until_ms: int) -> None:
        """See `p2p.replica.Replica.set_synced_until`: of all partitions that are held."""
