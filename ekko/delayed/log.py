"""The log: every version of a row that came to this node, in the order in which it came, in files on a disk.

It is written before the rows are, with one call for a batch, so that whatever ends the process, the store has nothing that the
log has not; what a kill cuts short is the last record, whose rows are not in the store either. Nothing is synced: a machine
that ends takes the store with it, and the log is of no use then.

It has a bound. A disk that is slow holds the writer up in the call, and with it, by acknowledgements that come later, whoever
sends: nothing is left out (R15). Where the bound is reached, or the disk is full, the oldest file is given up, which is
counted, and whoever asked is told of which models (`lose`).

A *pending* record has rows that have not been applied to the older state yet. Files without pending records are removed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from ekko.delayed import records
from ekko.delayed.records import DamagedError, Header, Part
from ekko.errors import StoreError
from p2p.replica import RowColumns

# What is given up at once, at least: a sixteenth of the bound, but not more than one reads in a moment.
SEGMENT_BYTES_MAX: Final = 64 << 20
SEGMENTS_MIN: Final = 16
_SUFFIX: Final = ".log"
_IOV_MAX: Final = 1_024
_PENDING: Final = np.dtype(
    [
        ("segment", "u4"),
        ("table", "u4"),
        ("offset", "u8"),
        ("bytes", "u8"),
        ("rows", "u4"),
        ("least", "u8"),  # stamps of what is not applied yet lie between these
        ("most", "u8"),
    ]
)
Pending = np.ndarray[tuple[int], np.dtype[np.void]]
DEAD: Final = np.uint64(0xFFFFFFFFFFFFFFFF)  # `least` of a record that is applied

log = structlog.get_logger(__name__)


class LogFullError(StoreError):
    """Nothing can be written, though all that may be given up was."""


@dataclass(slots=True)
class LogCounters:
    """What happened to one log in this life."""

    records: int = 0
    rows: int = 0
    bytes: int = 0  # written
    given_up: int = 0  # files, for want of room
    damaged: int = 0  # files that were cut off at a record that was not as it was written


@dataclass(slots=True, eq=False)
class _Segment:
    number: int
    path: Path
    descriptor: int
    size: int = 0

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)


class _Records:
    """Pending records of one model, in the order in which they came."""

    def __init__(self) -> None:
        self._array: Pending = np.empty(64, _PENDING)
        self.count = 0

    @property
    def array(self) -> Pending:
        """Live."""
        return self._array[: self.count]

    def add(self, record: tuple[int, ...]) -> None:
        if self.count == len(self._array):
            grown = np.empty(2 * self.count, _PENDING)
            grown[: self.count] = self._array
            self._array = grown
        self._array[self.count] = record
        self.count += 1

    def keep(self, which: NDArray[np.bool_]) -> None:
        kept = self.array[which]
        self._array[: len(kept)] = kept
        self.count = len(kept)


class Log:
    """Of one node. Use `open`; one thread writes and reads it.

    Args:
        folder: of its files.
        bytes_max: how much they may take together.
        identity: of the store beside which it is written.
    """

    def __init__(self, folder: Path, bytes_max: int, identity: str) -> None:
        self.counters = LogCounters()
        self.state: dict[str, Any] | None = None  # as it was written last; None: this log begins
        self.replayed: dict[int, int] = {}  # model -> newest stamp that was written after that
        self.complete = True  # all that was written is here
        # Whoever has the log sets these before anything is written.
        self.describe: Callable[[int | None], dict[str, Any]] = lambda model: {}  # what is known now, of one model or of all
        self.lose: Callable[[list[int], str], None] = lambda models, why: None
        self._folder = folder
        self._bytes_max = bytes_max
        self._segment_bytes = min(SEGMENT_BYTES_MAX, bytes_max // SEGMENTS_MIN)
        self._identity = identity
        self._segments: dict[int, _Segment] = {}  # by number; the last one is written
        self._pending: dict[int, _Records] = {}  # by model
        self._idle: set[int] = set()  # files that are about to be removed, and are not named any more
        self._bytes = 0

    @classmethod
    def open(cls, folder: Path, bytes_max: int, identity: str) -> "Log":
        """Find what a process before this one wrote beside the same store; what is of another one is removed.

        Raises:
            StoreError: the folder cannot be used.
        """
        found = cls(folder, bytes_max, identity)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = sorted(path for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdigit())
            for path in paths:
                found._find(path)
        except OSError as error:
            raise StoreError(f"{folder} cannot be used for the log: {error.strerror or error}") from error
        if found.state is not None and not set(found.state["segments"]) <= set(found._segments):
            found.complete = False
        return found

    # --- what was left

    def _find(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        segment = _Segment(int(path.stem), path, descriptor, os.fstat(descriptor).st_size)
        try:
            for offset, header in self._walk(segment):
                if not offset and header.kind != records.STATE:
                    raise DamagedError("a file of the log does not begin as one")
                if header.kind == records.STATE:
                    state = self._state_at(segment, offset, header)
                    if state["identity"] != self._identity:
                        segment.remove()
                        return
                    self._take(state)
                else:
                    self._note(segment.number, offset, header)
        except DamagedError as error:
            self._cut(segment, error)
        if not segment.size:
            segment.remove()
            return
        self._segments[segment.number] = segment
        self._bytes += segment.size

    def _take(self, state: dict[str, Any]) -> None:
        """What was known at a point: of all models at the beginning of a file, else of some."""
        before = {} if self.state is None or state["whole"] else self.state["models"]
        self.state = {**state, "models": {**before, **state["models"]}}
        for number in state["models"]:
            self.replayed.pop(int(number), None)

    def _state_at(self, segment: _Segment, offset: int, header: Header) -> dict[str, Any]:
        body = os.pread(segment.descriptor, header.body_bytes, offset + records.HEADER_BYTES)
        try:
            records.check_body(header, body)
            state = records.decode_state(body)
            if not isinstance(state, dict) or not {"identity", "segments", "whole", "models"} <= state.keys():
                raise DamagedError("a record of the log is no description of it")
        except DamagedError:
            segment.size = offset
            raise
        return state

    def _walk(self, segment: _Segment) -> Iterator[tuple[int, Header]]:
        """Headers of a file with their offsets; bodies are looked at when they are read, but for the last one."""
        offset, end = 0, segment.size
        while offset < end:
            segment.size = offset  # up to here it is right
            header = records.decode_header(os.pread(segment.descriptor, records.HEADER_BYTES, offset))
            if offset + header.bytes > end:
                raise DamagedError("a record of the log is cut short")
            if offset + header.bytes == end:
                records.check_body(header, os.pread(segment.descriptor, header.body_bytes, offset + records.HEADER_BYTES))
            segment.size = offset + header.bytes
            yield offset, header
            offset += header.bytes
        segment.size = offset

    def _cut(self, segment: _Segment, error: DamagedError) -> None:
        """A kill leaves the last record of the last file half written, and nothing of it in the store; any other is a loss."""
        left = os.fstat(segment.descriptor).st_size - segment.size
        whole = segment.size
        later = any(int(path.stem) > segment.number for path in self._folder.glob(f"*{_SUFFIX}") if path.stem.isdigit())
        try:
            header = records.decode_header(os.pread(segment.descriptor, records.HEADER_BYTES, whole))
            torn = header.bytes >= left
        except DamagedError:
            torn = left < records.HEADER_BYTES
        self.counters.damaged += 1
        self.complete = self.complete and torn and not later
        log.warning("log_cut", file=segment.path.name, bytes=left, reason=str(error), torn=torn and not later)
        os.ftruncate(segment.descriptor, whole)

    def _note(self, segment: int, offset: int, header: Header) -> None:
        self.replayed[header.model] = max(self.replayed.get(header.model, 0), header.stamp_max)
        self._add(segment, offset, header)

    def _add(self, segment: int, offset: int, header: Header) -> None:
        model = self._pending.get(header.model)
        if model is None:
            model = self._pending[header.model] = _Records()
        model.add((segment, header.table, offset, header.bytes, header.rows, header.stamp_min, header.stamp_max))

    def clear(self) -> None:
        """Begin anew."""
        for segment in self._segments.values():
            segment.remove()
        self._segments.clear()
        self._pending.clear()
        self._bytes, self.state, self.complete, self.replayed = 0, None, True, {}

    def close(self) -> None:
        """Let go of the files; they stay."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()

    # --- writing

    @property
    def bytes(self) -> int:
        """Of all files."""
        return self._bytes

    @property
    def bytes_max(self) -> int:
        """What they may be."""
        return self._bytes_max

    @property
    def segments(self) -> list[int]:
        """Numbers of the files, ascending."""
        return list(self._segments)

    def append(self, model: int, columns: Sequence[RowColumns], stamp: int) -> None:
        """Write down rows that come, at least one in each column; `stamp` is that of columns without stamps of their own.

        Raises:
            LogFullError: nothing can be written.
        """
        for column in columns:
            header, parts = records.encode_rows(model, column, stamp)
            segment, offset = self._write(header, parts)
            self._add(segment, offset, header)
            self.counters.records += 1
            self.counters.rows += header.rows

    def note_state(self, model: int | None = None) -> None:
        """Write down what is known now, of one model or of all.

        Raises:
            LogFullError: nothing can be written.
        """
        if not self._segments:
            return  # the first file will begin with it
        self._write(*records.encode_state(self._described(model)))

    def _described(self, model: int | None = None) -> dict[str, Any]:
        # The file that begins with this is not among them: who reads it has found it.
        named = [number for number in self._segments if number not in self._idle]
        about = {"identity": self._identity, "segments": named, "whole": model is None}
        return {**about, "models": self.describe(model)}

    def _write(self, header: Header, parts: list[Part]) -> tuple[int, int]:
        """Append a record; returns in which file, and where."""
        while True:
            begins = not self._fits(header.bytes)
            first, state = records.encode_state(self._described()) if begins else (None, [])
            self._make_room(header.bytes + (0 if first is None else first.bytes))
            try:
                tail = self._begin(state) if begins else self._segments[self._last]
                offset = self._put(tail, parts)
            except OSError as error:
                if not self._give_up_oldest(f"the log cannot be written: {error.strerror or error}"):
                    raise LogFullError(f"the log in {self._folder} cannot be written: {error.strerror or error}") from error
                continue
            return tail.number, offset

    def _make_room(self, more: int) -> None:
        while self._bytes + more > self._bytes_max:
            if not self._give_up_oldest(f"the log has reached {self._bytes_max} bytes"):
                break

    @property
    def _last(self) -> int:
        """Number of the file that is written; 0: there is none."""
        return next(reversed(self._segments), 0)

    def _fits(self, more: int) -> bool:
        """Whether so many bytes go into the file that is written."""
        return bool(self._segments) and self._segments[self._last].size + more <= self._segment_bytes

    def _begin(self, state: list[Part]) -> _Segment:
        """A new file, which begins with what is known."""
        number = self._last + 1
        path = self._folder / f"{number:012d}{_SUFFIX}"
        segment = _Segment(number, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        self._segments[number] = segment
        try:
            self._put(segment, state)
        except OSError:
            del self._segments[number]
            segment.remove()
            raise
        return segment

    def _put(self, segment: _Segment, parts: list[Part]) -> int:
        """Write behind the last record, all of it or nothing; returns where.

        Raises:
            OSError: it cannot be written.
        """
        begin, offset = segment.size, segment.size
        left = [memoryview(part) for part in parts if len(part)]
        try:
            while left:
                count = os.pwritev(segment.descriptor, left[:_IOV_MAX], offset)
                offset += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]
        except OSError:
            with suppress(OSError):
                os.ftruncate(segment.descriptor, begin)
            raise
        segment.size = offset
        self._bytes += offset - begin
        self.counters.bytes += offset - begin
        return begin

    def _give_up_oldest(self, why: str) -> bool:
        """Remove the oldest file though it has pending records; False: there is none but the one that is written."""
        if len(self._segments) < 2:
            return False
        number = next(iter(self._segments))
        models = []
        for model, pending in self._pending.items():
            gone = pending.array["segment"] == number
            if gone.any():
                models.append(model)
                pending.keep(~gone)
        self._unlink(self._segments.pop(number))
        if models:
            self.counters.given_up += 1
            log.warning("log_given_up", file=f"{number:012d}", reason=why)
            self.lose(models, why)
        return True

    # --- reading

    def pending(self, model: int) -> Pending:
        """Live: records of a model with rows that are not applied yet, in the order in which they came."""
        records_ = self._pending.get(model)
        return np.empty(0, _PENDING) if records_ is None else records_.array

    @property
    def pending_rows(self) -> int:
        """Of all models."""
        return sum(int(one.array["rows"].sum()) for one in self._pending.values())

    def read(self, record: np.void) -> RowColumns:
        """The rows of a pending record, with stamps; read-only.

        Raises:
            DamagedError: they are not as they were written.
        """
        segment, offset = self._segments[int(record["segment"])], int(record["offset"])
        try:
            data = os.pread(segment.descriptor, int(record["bytes"]), offset)
        except OSError as error:
            raise DamagedError(f"{segment.path} cannot be read: {error.strerror}") from None
        header = records.decode_header(data[: records.HEADER_BYTES])
        body = data[records.HEADER_BYTES : records.HEADER_BYTES + header.body_bytes]
        records.check_body(header, body)
        return records.decode_rows(header, body)

    def release(self, model: int) -> None:
        """Forget the records of a model that are applied (`least` is DEAD)."""
        records_ = self._pending.get(model)
        if records_ is not None:
            records_.keep(records_.array["least"] != DEAD)

    def forget(self, model: int) -> None:
        """Its records are of no use any more."""
        self._pending.pop(model, None)

    @property
    def models(self) -> list[int]:
        """Those with pending records."""
        return [model for model, pending in self._pending.items() if pending.count]

    def sweep(self) -> None:
        """Remove files without pending records, but the one that is written.

        Raises:
            LogFullError: that cannot be written down.
        """
        used = {int(number) for pending in self._pending.values() for number in np.unique(pending.array["segment"])}
        self._idle = {number for number in list(self._segments)[:-1] if number not in used}
        try:
            if self._idle:
                # First: files that are named and not there would be taken for a loss. One more than is named does no harm.
                # Should there be no room for it, these files are the first that are given up.
                self.note_state()
            for number in sorted(self._idle & self._segments.keys()):
                self._unlink(self._segments.pop(number))
        finally:
            self._idle = set()

    def _unlink(self, segment: _Segment) -> None:
        self._bytes -= segment.size
        with suppress(OSError):
            segment.remove()
