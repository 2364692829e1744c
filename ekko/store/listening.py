"""Who else wants to know of all that comes to a model: a node that keeps what was (`ekko.delayed`); nobody, as a rule."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from p2p.replica import U64, RowColumns


class Changes(Protocol):
    """Told by one model which rows are others now, in the thread that writes it; called before the batch counts as applied."""

    def note(self, table: int, keys: U64) -> None:
        """Rows of these keys were written, or may have been. The array is the caller's."""

    def note_gone(self, table: int, keys: U64) -> None:
        """Rows of these keys were dropped for good; one may come back in the version that it had, or in an older one."""


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
