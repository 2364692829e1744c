"""The small durable record of a node (`p2p.identity.ledger`) in a file of its `run_dir`.

A fence writes it down half a dozen times, each node after the other, before anybody may go on: what one save takes is most of
what stopping the writers of a model takes. A new file under the old one's name is two writes of the disk's journal, 12 to 16 ms
where writing over what is there is 2 to 4. So the file has two places, which are written in turn:

    0         magic, bytes of a place
    4,096     the first place: number of the save, bytes, checksum, the record
    and behind it the second one

A crash in the middle of a save spoils the place that was written; the other one has what was saved before. A record that has
outgrown its place, or comes after one of a release before, is written as a new file.
"""

import os
import struct
from pathlib import Path
from typing import Final

import xxhash

from ekko.errors import StoreError

LEDGER_NAME = "ledger"
LEDGER_BYTES_MAX = 16 << 20  # 4,096 ids for each of some models are a few hundred KiB
PLACE_BYTES_MIN: Final = 32 << 10
MAGIC: Final = b"ekkoLED2"
_HEAD: Final = struct.Struct("<8sQ")
_PLACE: Final = struct.Struct("<QQQ")
_PLACES_AT: Final = 4_096
_FILE_BYTES_MAX: Final = _PLACES_AT + 4 * (LEDGER_BYTES_MAX + _PLACE.size)  # a place is less than twice what it was made for
# Another process may read while we write: whatever it finds spoilt is whole when it looks again.
_LOOKS_MAX: Final = 3


class FileLedger:
    """Fulfils `p2p.identity.ledger.Ledger`. One process writes it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LEDGER_NAME
        self._saves = 0  # of the record that is in the file

    def load(self) -> bytes | None:
        """What was saved last, or None.

        Raises:
            StoreError: the file is there, and cannot be read or is damaged.
        """
        try:
            for _ in range(_LOOKS_MAX):
                if self._path.stat().st_size > _FILE_BYTES_MAX:
                    raise StoreError(
                        f"{self._path} is larger than {_FILE_BYTES_MAX} bytes: it is not a ledger; restore it from a copy"
                    )
                data = self._path.read_bytes()
                if not data.startswith(MAGIC):
                    return data  # of a release before
                places = _read_places(data)
                if places:
                    self._saves = max(places)
                    return places[self._saves]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}") from None
        raise StoreError(f"{self._path} is damaged: restore the file, or remove it to join as a new node")

    def save(self, record: bytes) -> None:
        """Replace the record; on return it survives a crash of the machine.

        Raises:
            StoreError: it could not be written; the record of before is still there.
        """
        try:
            if not self._save_in_place(record):
                self._save_anew(record)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}") from None
        self._saves += 1

    def _save_in_place(self, record: bytes) -> bool:
        """Over the older one of the two; False: there is no file, or no room in it."""
        if not self._saves:
            return False  # what is there is not known
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            place_bytes = _place_bytes(os.pread(descriptor, _HEAD.size, 0))
            if _PLACE.size + len(record) > place_bytes:
                return False
            number = self._saves + 1
            _write(descriptor, _placed(number, record), _PLACES_AT + number % 2 * place_bytes)
            os.fdatasync(descriptor)  # neither its size nor where its blocks are has changed
        finally:
            os.close(descriptor)
        return True

    def _save_anew(self, record: bytes) -> None:
        place_bytes = PLACE_BYTES_MIN
        while place_bytes < _PLACE.size + len(record):
            place_bytes *= 2
        fresh = self._path.with_name(f"{LEDGER_NAME}.new")
        # All of it is written, zeros too: a block that is written for the first time costs the journal as much as a new file.
        data = bytearray(_PLACES_AT + 2 * place_bytes)
        data[: _HEAD.size] = _HEAD.pack(MAGIC, place_bytes)
        begin, number = _PLACES_AT + (self._saves + 1) % 2 * place_bytes, self._saves + 1
        data[begin : begin + _PLACE.size + len(record)] = _placed(number, record)
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the new name, too, must survive
        finally:
            os.close(folder)


def _placed(number: int, record: bytes) -> bytes:
    return _PLACE.pack(number, len(record), _checksum(number, record)) + record


def _checksum(number: int, record: bytes) -> int:
    return xxhash.xxh3_64_intdigest(record, number & 0xFFFFFFFF)


def _place_bytes(head: bytes) -> int:
    """0: there are no places."""
    if len(head) < _HEAD.size:
        return 0
    magic, place_bytes = _HEAD.unpack_from(head)
    return int(place_bytes) if magic == MAGIC else 0


def _read_places(data: bytes) -> dict[int, bytes]:
    """By number of the save, what is whole."""
    found: dict[int, bytes] = {}
    place_bytes = _place_bytes(data)
    for index in range(2):
        begin = _PLACES_AT + index * place_bytes
        if begin + _PLACE.size > len(data):
            break
        number, size, checksum = _PLACE.unpack_from(data, begin)
        record = data[begin + _PLACE.size : begin + _PLACE.size + size]
        if number and len(record) == size and checksum == _checksum(number, record):
            found[number] = record
    return found


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
