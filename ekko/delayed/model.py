"""One model of a node in both of its states: the current one, the older one, and the part of the log that lies between them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ekko.delayed.columns import U64, up_to
from ekko.delayed.history import History, cut_of, unix_ms_of_cut
from ekko.delayed.log import Log
from ekko.delayed.records import DamagedError
from ekko.errors import StoreError
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import unix_ms_of

# What is known is written down when it has come so far; a kill costs that much of what may be known exactly.
NOTE_MS: Final = 250


class Keeper(Protocol):
    """Whoever writes down what comes to a model."""

    def write_down(self, model: "DelayedModel", columns: Sequence[RowColumns], stamp: int, newest: int) -> None:
        """Rows come; `newest` of their stamps."""

    def note_state(self, model: int | None = None) -> None:
        """What is known of a model has changed."""

    def lose(self, model: "DelayedModel", newest: int, why: str) -> None:
        """Versions up to this stamp may never have come, or are gone."""


@dataclass(slots=True, eq=False)
class DelayedModel:
    """See above. Fulfils `ekko.store.listening.Listener`."""

    keeper: Keeper
    log: Log
    current: ModelStore
    older: ModelStore
    history: History
    synced_until_ms: int = 0  # as the protocol said last
    noted: int = 0  # `complete` as it was written down last
    claimed: tuple[NDArray[np.int64], U64] | None = None  # writers, and their vector [w, shards] as an advance began
    comparing: Iterator[int] | None = None

    @property
    def id(self) -> int:
        """Of the model."""
        return self.current.spec.id

    # --- what comes

    def on_rows(self, columns: Sequence[RowColumns], stamp: int) -> None:
        newest = max([stamp if column.stamps is None else int(column.stamps.max()) for column in columns])
        self.history.note_rows(newest)
        self.keeper.write_down(self, columns, stamp, newest)

    def on_rows_gone(self, newest: int) -> None:
        self.history.note_rows(newest)  # as if the tombstones had come
        self.keeper.lose(self, newest, "rows went with an answer that brought their shards whole")
        self.keeper.note_state(self.id)

    def on_coalesced(self, since: Mapping[int, int]) -> None:
        self.history.note_coalesced(since)
        self.mark()
        self.keeper.note_state(self.id)

    def on_progress(self, synced_until_ms: int) -> None:
        self.synced_until_ms = synced_until_ms
        if self.history.is_due(synced_until_ms):
            self.mark()
            if unix_ms_of(self.history.complete) - unix_ms_of(self.noted) >= NOTE_MS:
                self.noted = self.history.complete
                self.keeper.note_state(self.id)

    def mark(self) -> None:
        """Take note of how far everything is here."""
        current = self.current
        self.history.mark(self.synced_until_ms, current.frontiers[list(current.hold)], current.newest_rows)

    # --- what lies between

    def read(self, record: np.void) -> RowColumns | None:
        """The rows of a record of the log; None: they are lost, and that is noted."""
        try:
            return self.log.read(record)
        except DamagedError as error:
            self.keeper.lose(self, self.history.newest, str(error))
            return None

    def pending(self, table: int, above: int, cut: int) -> Iterator[RowColumns]:
        """Rows of one table that the log has and that are not applied, with stamps above one cut and up to another."""
        pending = self.log.pending(self.id)
        if not len(pending):
            return
        wanted = (pending["table"] == table) & (pending["least"] <= np.uint64(cut)) & (pending["most"] > np.uint64(above))
        for index in np.flatnonzero(wanted).tolist():
            rows = self.read(pending[index])
            if rows is not None:
                yield up_to(rows, cut, above)

    # --- which moments

    @property
    def passed(self) -> int:
        """The cut up to where the older state has come, or is being brought: of nothing before can it be told how it was."""
        return max(self.history.until, self.history.target)

    def valid_cut(self, wanted_ms: int) -> int | None:
        """See `DelayedStore.valid_cut`."""
        self.mark()
        cut = self.history.valid_cut(cut_of(wanted_ms))
        while cut is not None and cut_of(unix_ms_of_cut(cut)) != cut:  # it ends within a millisecond
            cut = self.history.valid_cut(cut_of(unix_ms_of_cut(cut)))
        return None if cut is None else unix_ms_of_cut(cut)

    def checked(self, cut_ms: int) -> int:
        """The cut of a moment.

        Raises:
            StoreError: the older state has passed it.
        """
        cut = cut_of(cut_ms)
        if cut < self.passed:
            passed_ms = unix_ms_of_cut(self.passed)
            raise StoreError(
                f"the state of model {self.current.spec.name!r} at {cut_ms} ms is not kept any more: the older state is at "
                f"{passed_ms} ms; ask for that, or for a later one"
            )
        return cut

    @property
    def is_whole(self) -> bool:
        """See `DelayedStore.is_whole`."""
        history = self.history
        if history.target > history.until or history.compare_at is not None or not history.until:
            return False
        # Where nobody writes, or nobody has been heard of who does, there is no more to wait for than what is here.
        return not any(begin <= history.until < end for begin, end in history.blurs)
