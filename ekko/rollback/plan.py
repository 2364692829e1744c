"""The plan of a rollback: what is written back, durable and whole before the first row is.

A witness that dies while it writes finds the plan again and goes on with it; what was written already is found to be there and
is left out (R15). So a plan may be carried out any number of times, and comes to the same.

A plan is one file: a header, batches of rows of one table each, the rows at risk, and an end that says how many of all these
there are. Each of them has a length and a checksum. It is written under another name, synced, and renamed: who finds it finds
all of it.
"""

import os
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from glob import escape as glob_escape
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from ekko.errors import StoreError
from ekko.generations import Generation
from ekko.model import label_of

U64 = NDArray[np.uint64]

MAGIC: Final = b"ekkoRB01"
# One step of the write-back: large beside its headers, and small beside what a link carries in the time that the whole takes,
# since a node forwards and applies it when all of it has come: 20 ms at 100 Mbps.
BATCH_ROWS_MAX: Final = 4_096
BATCH_BYTES_MAX: Final = 1 << 18
# Of the rows at risk so many are named; beyond, they are counted.
AT_RISK_NAMED_MAX: Final = 65_536
PART_BYTES_MAX: Final = 1 << 28
SUFFIX: Final = ".plan"
# What reading may raise: the disk's errors, and those of a part that is not as it was written.
READ_ERRORS: Final = (OSError, ValueError, TypeError, KeyError, EOFError, msgpack.UnpackException)


@dataclass(frozen=True, slots=True, eq=False)
class PlanBatch:
    """Rows of one table to be written back: the first `len(rows)` keys are live rows, those after them deletions."""

    table: int
    keys: U64  # [n]
    rows: NDArray[np.uint8]  # [live, row_bytes], live <= n, as the model's codec encodes them
    expected: U64  # [n]: the stamp that each had when the plan was made; 0: it was absent
    others: int = 0  # of these, as a writer that is not meant left them after the cut (`Scope.writer`)

    @property
    def payload_bytes(self) -> int:
        """Keys and values, as a message carries them."""
        return self.keys.nbytes + self.rows.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class RowsAtRisk:
    """Good rows of one table that go with the bad ones: written after the mark that was found, and not after the moment
    that was wanted; or that may, since nobody knows whether a writer that is not meant has written them (`Past.under`).
    """

    table: int
    keys: U64  # [n]
    stamps: U64  # [n] of the versions that are lost; 0: that is not known


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in figures."""

    cut_ms: int  # Unix
    batches: int = 0
    rows: int = 0
    deletions: int = 0
    payload_bytes: int = 0
    at_risk: int = 0
    others: int = 0


@dataclass(slots=True)
class Plan:
    """A plan that is whole. Batches are read when they are asked for."""

    model: Generation
    epoch: int
    fact: bytes  # what is to be done, as nodes tell it each other: a node that has forgotten it finds it here
    summary: Summary
    at_risk: list[RowsAtRisk]
    file: BinaryIO = field(repr=False)
    places: list[int] = field(default_factory=list, repr=False)  # where each batch begins in it

    def batch(self, index: int) -> PlanBatch:
        """The `index`-th."""
        self.file.seek(self.places[index])
        part = _read_part(self.file)
        table, live, keys, rows, expected, others = part[1:]
        data = np.frombuffer(rows, np.uint8)
        return PlanBatch(
            table,
            np.frombuffer(keys, np.uint64),
            data.reshape(live, -1) if live else np.empty((0, 0), np.uint8),
            np.frombuffer(expected, np.uint64),
            others,
        )

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


class Plans(Protocol):
    """Where a node keeps its plans."""

    def begin(self, model: Generation) -> BinaryIO:
        """A file for a new plan of a model; nobody finds it before `commit`."""

    def give_up(self, model: Generation, file: BinaryIO) -> None:
        """Let go of a file, and of what it takes if it was not committed."""

    def settle(self, file: BinaryIO) -> None:
        """Begin to make durable what is in a file so far, without waiting for it."""

    def commit(self, model: Generation, file: BinaryIO) -> None:
        """Let it take the place of the one before, durably.

        Raises:
            StoreError: it cannot be written; the one before is still there.
        """

    def open(self, model: Generation) -> BinaryIO | None:
        """The plan that was committed last; None: there is none."""

    def drop(self, model: Generation) -> None:
        """It is carried out, or void."""

    def keep(self, model: Generation, epoch: int, record: bytes, count_max: int) -> None:
        """What stays of a rollback that is over, of the last `count_max` of a model.

        Raises:
            OSError: it cannot be written.
        """

    def kept(self, model: Generation, epoch: int) -> bytes | None:
        """What was kept of a rollback; None: nothing was, or it has gone since."""


class PlanWriter:
    """A plan on its way to the disk, piece by piece; nobody finds it before `commit`.

    Args:
        plans: where to.
        model: of which it is.
        epoch: of the rollback.
        cut_ms: the moment that it goes back to.
        fact: see `Plan`.

    Raises:
        StoreError: as all of its methods do: it cannot be written.
    """

    def __init__(self, plans: Plans, model: Generation, epoch: int, cut_ms: int, fact: bytes = b"") -> None:
        self.summary = Summary(cut_ms)
        self.keys: dict[int, list[U64]] = {}  # by table, of all batches so far
        self._plans = plans
        self._model = model
        self._named = 0  # rows at risk
        self._open = True
        with _told():
            self._file = plans.begin(model)
            try:
                self._file.write(MAGIC)
                _write_part(self._file, ["head", model.name, model.incarnation, epoch, cut_ms, fact])
            except OSError:
                self.close()
                raise

    def add(self, one: PlanBatch | RowsAtRisk) -> None:
        """Write a piece."""
        with _told():
            match one:
                case PlanBatch():
                    body = [len(one.rows), one.keys.tobytes(), one.rows.tobytes(), one.expected.tobytes(), one.others]
                    _write_part(self._file, ["rows", one.table, *body])
                    self.summary = _counted(self.summary, one)
                    self.keys.setdefault(one.table, []).append(one.keys)
                case RowsAtRisk():
                    kept = one.keys[: AT_RISK_NAMED_MAX - self._named]
                    self._named += len(kept)
                    stamps = one.stamps[: len(kept)]
                    _write_part(self._file, ["risk", one.table, len(one.keys), kept.tobytes(), stamps.tobytes()])
                    self.summary = _with_risk(self.summary, len(one.keys))

    def settle(self) -> None:
        """Let the disk begin with what is there, so that less is left to it at the end."""
        with _told():
            self._plans.settle(self._file)

    def commit(self) -> Summary:
        """It is whole: have it durable."""
        summary = self.summary
        with _told():
            _write_part(self._file, ["end", summary.batches, summary.rows, summary.at_risk])
            self._plans.commit(self._model, self._file)
        self.close()
        return summary

    def close(self) -> None:
        """Let go of it, and of what it takes if it was not committed."""
        if self._open:
            self._open = False
            self._plans.give_up(self._model, self._file)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"the plan of a rollback cannot be written: {error.strerror}: free some room on the disk") from None


def write_plan(writer: PlanWriter, batches: Iterable[PlanBatch | RowsAtRisk | None]) -> Generator[Summary | None, None, None]:
    """Write a plan, a piece at each step of the iterator; the last one gives its figures, and the plan is durable then.

    Args:
        writer: of it; pieces may have been written before.
        batches: what is in it; None: nothing yet, let others have their turn.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        for one in batches:
            if one is not None:
                writer.add(one)
            yield None
        summary = writer.commit()
    finally:
        writer.close()
    yield summary


def read_plan(plans: Plans, model: Generation) -> Plan | None:
    """The plan of a model, checked from end to end; None: there is none, or it is damaged, which is as good as none."""
    file: BinaryIO | None = None
    try:
        file = plans.open(model)
        return None if file is None else _read(file, model)
    except READ_ERRORS:
        if file is not None:
            file.close()
        return None


def _read(file: BinaryIO, model: Generation) -> Plan:
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("no plan")
    kind, name, incarnation, epoch, cut_ms, fact = _read_part(file)
    if kind != "head" or Generation(name, incarnation) != model:
        raise ValueError("of another model")
    plan = Plan(model, int(epoch), bytes(fact), Summary(int(cut_ms)), [], file)
    while True:
        place = file.tell()
        part = _read_part(file)
        match part:
            case ["rows", _, _, _, _, _, _]:
                plan.places.append(place)
                plan.summary = _counted(plan.summary, plan.batch(len(plan.places) - 1))
            case ["risk", table, count, keys, stamps]:
                rows = RowsAtRisk(table, np.frombuffer(keys, np.uint64), np.frombuffer(stamps, np.uint64))
                plan.at_risk.append(rows)
                plan.summary = _with_risk(plan.summary, int(count))
            case ["end", batches, rows_count, at_risk]:
                found = plan.summary
                if (batches, rows_count, at_risk) != (found.batches, found.rows, found.at_risk):
                    raise ValueError("parts are missing")
                return plan
            case _:
                raise ValueError(f"a part that is none: {part[:1]}")


def _counted(summary: Summary, batch: PlanBatch) -> Summary:
    return Summary(
        summary.cut_ms,
        summary.batches + 1,
        summary.rows + len(batch.keys),
        summary.deletions + len(batch.keys) - len(batch.rows),
        summary.payload_bytes + batch.payload_bytes,
        summary.at_risk,
        summary.others + batch.others,
    )


def _with_risk(summary: Summary, count: int) -> Summary:
    return replace(summary, at_risk=summary.at_risk + count)


def _write_part(file: BinaryIO, part: list[object]) -> None:
    data = bytes(msgpack.packb(part))
    file.write(len(data).to_bytes(4, "little") + xxhash.xxh64_digest(data) + data)


def _read_part(file: BinaryIO) -> list[Any]:
    head = file.read(12)
    if len(head) < 12 or (size := int.from_bytes(head[:4], "little")) > PART_BYTES_MAX:
        raise EOFError
    data = file.read(size)
    if len(data) != size or xxhash.xxh64_digest(data) != head[4:]:
        raise ValueError("a part is damaged")
    part: list[Any] = msgpack.unpackb(data, max_bin_len=PART_BYTES_MAX)
    return part


class FilePlans:
    """Plans in a folder; made when the first one is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._settling: threading.Thread | None = None

    def begin(self, model: Generation) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._path(model, ".new").open("w+b")

    def settle(self, file: BinaryIO) -> None:
        if self._settling is not None and self._settling.is_alive():
            return  # one at a time; the next one has the rest
        file.flush()
        descriptor = os.dup(file.fileno())

        def sync() -> None:
            try:
                with suppress(OSError):  # `commit` hears of it again
                    os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

        self._settling = threading.Thread(target=sync, name="plan", daemon=True)
        self._settling.start()

    def commit(self, model: Generation, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._path(model, ".new").replace(self._path(model))
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the new name, too, must survive
        finally:
            os.close(folder)

    def give_up(self, model: Generation, file: BinaryIO) -> None:
        with suppress(OSError):  # what is still to be written finds no room either
            file.close()
        with suppress(OSError):
            self._path(model, ".new").unlink(missing_ok=True)

    def open(self, model: Generation) -> BinaryIO | None:
        try:
            return self._path(model).open("rb")
        except FileNotFoundError:
            return None

    def drop(self, model: Generation) -> None:
        with suppress(OSError):  # on a disk that takes nothing any more; it is void all the same, by its epoch
            self._path(model).unlink(missing_ok=True)

    def keep(self, model: Generation, epoch: int, record: bytes, count_max: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path, new = self._path(model, f".{epoch:016x}.kept"), self._path(model, ".new")
        new.write_bytes(record)
        new.replace(path)
        for old in sorted(self._folder.glob(f"{glob_escape(path.name.rsplit('.', 2)[0])}.*.kept"))[:-count_max]:
            old.unlink(missing_ok=True)

    def kept(self, model: Generation, epoch: int) -> bytes | None:
        try:
            return self._path(model, f".{epoch:016x}.kept").read_bytes()
        except OSError:
            return None

    def _path(self, model: Generation, more: str = "") -> Path:
        return self._folder / f"{label_of(model.name, model.incarnation)}{SUFFIX}{more}"


class MemoryPlans:
    """The same, in memory, for simulation: a crash of a node's process leaves what was committed."""

    def __init__(self) -> None:
        self.committed: dict[Generation, bytes] = {}
        self._kept: dict[tuple[Generation, int], bytes] = {}

    def begin(self, model: Generation) -> BinaryIO:
        return BytesIO()

    def settle(self, file: BinaryIO) -> None:
        pass

    def commit(self, model: Generation, file: BinaryIO) -> None:
        assert isinstance(file, BytesIO)
        self.committed[model] = file.getvalue()
        file.close()

    def give_up(self, model: Generation, file: BinaryIO) -> None:
        file.close()

    def open(self, model: Generation) -> BinaryIO | None:
        data = self.committed.get(model)
        return None if data is None else BytesIO(data)

    def drop(self, model: Generation) -> None:
        self.committed.pop(model, None)

    def keep(self, model: Generation, epoch: int, record: bytes, count_max: int) -> None:
        self._kept[model, epoch] = record
        for old in sorted(key for key in self._kept if key[0] == model)[:-count_max]:
            del self._kept[old]

    def kept(self, model: Generation, epoch: int) -> bytes | None:
        return self._kept.get((model, epoch))
