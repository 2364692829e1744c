"""The ledger's file: what was saved last is there, whatever a crash cuts short."""

from pathlib import Path

import pytest

from ekko import file_ledger
from ekko.errors import StoreError
from ekko.file_ledger import FileLedger


def saved(folder: Path, *records: bytes) -> FileLedger:
    ledger = FileLedger(folder)
    for record in records:
        ledger.save(record)
    return ledger


def test_the_last_record_is_found_by_the_next_process(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path)
    assert ledger.load() is None
    for count in range(1, 6):
        ledger.save(bytes([count]) * 100 * count)
        ledger = FileLedger(tmp_path)
        assert ledger.load() == bytes([count]) * 100 * count


def test_a_save_writes_over_what_is_there(tmp_path: Path) -> None:
    ledger = saved(tmp_path, b"one")
    inode = (tmp_path / "ledger").stat().st_ino
    ledger.save(b"two")
    ledger.save(b"three")
    assert (tmp_path / "ledger").stat().st_ino == inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger"]


def test_a_record_that_has_outgrown_its_place_is_a_new_file(tmp_path: Path) -> None:
    ledger = saved(tmp_path, b"small", b"s" * 40_000)
    assert FileLedger(tmp_path).load() == b"s" * 40_000
    ledger.save(b"t" * 60_000)
    assert FileLedger(tmp_path).load() == b"t" * 60_000


@pytest.mark.parametrize("cut", [0, 1, 23, 24, 25, 500, 1_023])
def test_a_crash_in_the_middle_of_a_save_leaves_the_one_before(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = saved(tmp_path, b"a" * 900, b"b" * 900)
    write = file_ledger._write

    def torn(descriptor: int, data: bytes, offset: int) -> None:
        write(descriptor, data[:cut], offset)
        raise OSError(5, "the power is gone")

    monkeypatch.setattr(file_ledger, "_write", torn)
    with pytest.raises(StoreError, match="cannot be written"):
        ledger.save(b"c" * 1_000)
    again = FileLedger(tmp_path)
    assert again.load() == b"b" * 900
    monkeypatch.setattr(file_ledger, "_write", write)
    again.save(b"d")
    assert FileLedger(tmp_path).load() == b"d"


def test_a_file_of_a_release_before_is_read_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_bytes(b"as it was")
    ledger = FileLedger(tmp_path)
    assert ledger.load() == b"as it was"
    ledger.save(b"as it is")
    assert FileLedger(tmp_path).load() == b"as it is"


def test_a_file_of_which_nothing_is_whole_is_told(tmp_path: Path) -> None:
    saved(tmp_path, b"one", b"two")
    data = bytearray((tmp_path / "ledger").read_bytes())
    data[4_096:] = bytes(len(data) - 4_096)
    (tmp_path / "ledger").write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        FileLedger(tmp_path).load()
