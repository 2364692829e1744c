"""The sink of the examples passes the suite; two ways in which it might lose rows with its process are noticed."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sqlite_sink import SqliteSink, named

from ekko.serve import sink_conformance
from ekko.serve.sink import Batch, Removed, Sink
from ekko.serve.sink_conformance import Case, Subject, batches, kills
from ekko.serve.sink_conformance.subject import F32, U64

QUICK = [case for case in sink_conformance.CASES if case.__module__ in (batches.__name__, kills.__name__)]
SLOW = [pytest.param(case, marks=pytest.mark.long) for case in sink_conformance.CASES if case not in QUICK]


class SqliteSubject(Subject):
    def __init__(self, folder: Path, kind: type[SqliteSink] = SqliteSink) -> None:
        self._path = folder / "sink.db"
        self._kind = kind

    def sink(self) -> Sink:
        return self._kind(str(self._path))

    def rows(self, table: str, keys: U64) -> F32:
        found = np.zeros((keys.size, self.tables[table]), np.float32)
        with closing(sqlite3.connect(self._path)) as file:
            for place, key in enumerate(keys.tolist()):
                asked = file.execute("select row from rows where name = ? and key = ?", (table, key.to_bytes(8, "big")))
                if (row := asked.fetchone()) is not None and row[0] is not None:
                    found[place] = np.frombuffer(row[0], "<f4")
        return found


@pytest.mark.parametrize("case", [*QUICK, *SLOW], ids=lambda case: case.__name__)
def test_the_sink_of_the_examples(case: Case, tmp_path: Path) -> None:
    case(SqliteSubject(tmp_path))


class Forgetful(SqliteSink):
    """Its cursor is kept sooner than what was applied before it."""

    waiting: list[Batch]

    def open(self, model: str) -> bytes | None:
        self.waiting = []
        return super().open(model)

    def apply(self, batch: Batch) -> None:
        self.waiting.append(batch)


class Torn(SqliteSink):
    """Keeps stamps in one step, and their rows in another one."""

    def apply(self, batch: Batch) -> None:
        live = named(batch.table, Removed(batch.keys, batch.stamps))
        here = "select 1 from rows where name = ? and key = ? and stamp >= ?"
        newer = [self._file.execute(here, one).fetchone() is None for one in live]
        super().apply(Batch(batch.table, batch.keys, 0 * batch.rows, batch.stamps, batch.deleted, batch.forgotten))
        rows = [(row.tobytes(), *one) for one, row, counts in zip(live, batch.rows, newer, strict=True) if counts]
        self._write(("update rows set row = ? where name = ? and key = ? and stamp = ?", rows))


@pytest.mark.parametrize(
    ("kind", "case"),
    [(Forgetful, kills.what_was_committed_outlives_a_kill), (Torn, kills.a_batch_that_was_cut_short_comes_again)],
)
def test_what_is_lost_with_a_process_is_noticed(kind: type[SqliteSink], case: Case, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="killed"):
        case(SqliteSubject(tmp_path, kind))
