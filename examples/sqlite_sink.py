"""A sink of one's own, whole: rows of a model in an SQLite file. Feed it with `ekko sink ctr sqlite_sink:make --config
node.toml`, or by target = "sqlite_sink:make" in [sinks.NAME] of a node. SINK_FILE in the environment says where it is.

Each row has its stamp beside it, and a deleted key keeps its stamp, so that a batch that comes again, or late, changes nothing.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence

import numpy as np

from ekko.errors import SinkError, SinkTakenError
from ekko.serve.sink import U64, Batch, Removed, Sink

TABLES = """
create table if not exists rows (name text, key blob, stamp blob, row blob, primary key (name, key)) without rowid;
create table if not exists feed (one integer primary key, life integer, cursor blob);
insert or ignore into feed values (1, 0, null);
update feed set life = life + 1;
"""
PUT = "insert into rows values (?, ?, ?, ?) on conflict do update set stamp = excluded.stamp, row = excluded.row"
NEWER = " where excluded.stamp > stamp"  # what is older, or here already, does not count


class SqliteSink(Sink):
    """One model in a file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._life = 0

    def open(self, model: str) -> bytes | None:
        try:
            self._file = sqlite3.connect(self._path, isolation_level=None)
            self._file.executescript(TABLES)
            self._life, cursor = self._file.execute("select life, cursor from feed").fetchone()
        except sqlite3.OperationalError as error:
            raise SinkError(f"{self._path}: {error}") from error
        return None if cursor is None else bytes(cursor)

    def _write(self, *steps: tuple[str, Sequence[tuple[object, ...]]]) -> None:
        """All of it or nothing, unless another feed has begun since."""
        try:
            with self._file:  # commits, or rolls back
                self._file.execute("begin immediate")
                if self._file.execute("select life from feed").fetchone()[0] != self._life:
                    raise SinkTakenError(f"{self._path}: another feed writes")
                for statement, rows in steps:
                    self._file.executemany(statement, rows)
        except sqlite3.OperationalError as error:
            raise SinkError(f"{self._path}: {error}") from error

    def add_table(self, table: str, dim: int) -> None:
        pass  # a row is as wide as it is

    def drop_table(self, table: str) -> None:
        self._write(("delete from rows where name = ?", [(table,)]))

    def apply(self, batch: Batch) -> None:
        deleted, live = batch.deleted, Removed(batch.keys, batch.stamps)
        self._write(
            ("delete from rows where name = ? and key = ? and stamp <= ?", named(batch.table, batch.forgotten)),
            (PUT + NEWER, [(*one, None) for one in named(batch.table, deleted)]),
            (PUT + NEWER, [(*one, row.tobytes()) for one, row in zip(named(batch.table, live), batch.rows, strict=True)]),
        )

    def held(self, table: str) -> Iterator[tuple[U64, U64]]:
        found = self._file.execute("select key, stamp from rows where name = ? and row is not null", (table,))
        while part := found.fetchmany(4096):
            keys, stamps = (np.frombuffer(b"".join(column), ">u8").astype(np.uint64) for column in zip(*part, strict=True))
            yield keys, stamps

    def commit(self, cursor: bytes) -> None:
        self._write(("update feed set cursor = ?", [(cursor,)]))


def named(table: str, keys: Removed) -> list[tuple[str, bytes, bytes]]:
    """Table, key and stamp of each; big-endian bytes compare as the numbers do, which SQLite has only with a sign."""
    big = (values.astype(">u8").tobytes() for values in (keys.keys, keys.stamps))
    return [(table, key, stamp) for key, stamp in zip(*(eights(column) for column in big), strict=True)]


def eights(column: bytes) -> list[bytes]:
    """Eight bytes each."""
    return [column[at : at + 8] for at in range(0, len(column), 8)]


def make() -> SqliteSink:
    """What a feed calls."""
    return SqliteSink(os.environ["SINK_FILE"])
