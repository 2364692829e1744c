"""The node's half of `ekko.restored`: which rows of a model were restored behind fences since an epoch."""

from collections.abc import Callable, Sequence

import numpy as np

from ekko.errors import ModelError
from ekko.restored import PAGE_BYTES_MAX, RestoredAsk, RestoredPage
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.messages.fences import LIFTED
from p2p.replica import U64
from p2p.stamps import WRITER_MASK, WRITERS_MAX

# Rows whose headers are read at once.
READ_AT_ONCE = 65_536


class RestoredRows:
    """Answers for all models of a node.

    Args:
        fences: of a family, by epoch, ascending.
        spans: (id, low, high) of who restored a family after an epoch: it wrote with stamps above low, up to high.
    """

    def __init__(
        self,
        fences: Callable[[int], Sequence[m.Fence]],
        spans: Callable[[int, int], Sequence[tuple[int, int, int]]],
    ) -> None:
        self._fences = fences
        self._spans = spans
        self._found: tuple[tuple[int, int, int], dict[int, U64]] | None = None  # the last question's (family, since, epoch)

    def epoch(self, model: ModelStore) -> int:
        """Of the last rollback that is over and has written something; 0: none."""
        over = [one.epoch for one in self._fences(model.keyspace) if one.stage == LIFTED and one.restorers]
        return max(over, default=0)

    def fence(self, model: ModelStore) -> m.Fence | None:
        """The fence that stands."""
        last = self._fences(model.keyspace)[-1:]
        return last[0] if last and last[0].stage != LIFTED else None

    def page(self, model: ModelStore, ask: RestoredAsk) -> RestoredPage:
        """Answer one question.

        Raises:
            ModelError: the cursor names no table.
        """
        epoch, fence = self.epoch(model), self.fence(model)
        empty = RestoredPage(epoch, 0 if fence is None else fence.epoch)
        if ask.rows is not None:
            return self._rows(model, empty, ask.rows[0], np.unique(np.frombuffer(ask.rows[1], np.uint64)))
        if ask.since is None or ask.since >= epoch:
            return empty
        which = (model.spec.id, ask.since, epoch)
        if ask.after is None or self._found is None or self._found[0] != which:
            self._found = which, self._find(model, ask.since)
        found, (table, key) = self._found[1], ask.after or (-1, 0)
        here = found.get(table, np.empty(0, np.uint64))
        keys = here[np.searchsorted(here, np.uint64(key), "right") :] if ask.after is not None else here
        if not len(keys):
            following = min((number for number in found if number > table), default=None)
            if following is None:
                return empty
            table, keys = following, found[following]
        return self._rows(model, empty, table, keys)

    @staticmethod
    def _rows(model: ModelStore, empty: RestoredPage, table: int, keys: U64) -> RestoredPage:
        """How the first of these keys, ascending, are now, as many as a page has room for."""
        try:
            held = model.tables_by_id[table]
        except KeyError:
            raise ModelError(f"a table of model {model.spec.name!r} was dropped while it was asked for") from None
        count = max(1, PAGE_BYTES_MAX // (8 + held.row_bytes))
        live = model.read_keys(table, keys[:count])
        gone = np.setdiff1d(keys[:count], live.keys)
        return RestoredPage(empty.epoch, empty.fenced, table, np.concatenate([live.keys, gone]), live.rows)

    def _find(self, model: ModelStore, since: int) -> dict[int, U64]:
        """Table -> uint64[n], ascending: keys whose newest version a restorer wrote after that epoch."""
        spans = self._spans(model.spec.id, since)
        base = np.full((model.shards, WRITERS_MAX), np.iinfo(np.uint64).max, np.uint64)
        for writer, begin, _ in spans:
            base[:, writer] = np.minimum(base[:, writer], np.uint64(begin))
        found: dict[int, list[U64]] = {}
        for selection in model.scan_since(base):
            for begin in range(0, len(selection.slots), READ_AT_ONCE):
                rows = model.read(selection.table, selection.slots[begin : begin + READ_AT_ONCE])
                assert rows.stamps is not None
                writers, theirs = rows.stamps & np.uint64(WRITER_MASK), np.zeros(len(rows.keys), np.bool_)
                for writer, low, high in spans:
                    theirs |= (writers == writer) & (rows.stamps > np.uint64(low)) & (rows.stamps <= np.uint64(high))
                found.setdefault(selection.table, []).append(rows.keys[theirs])
        keys = {table: np.unique(np.concatenate(parts)) for table, parts in found.items()}
        return {table: some for table, some in sorted(keys.items()) if len(some)}
