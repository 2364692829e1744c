"""The ring of changes: what is read was noted, or is known to be missing, whoever writes meanwhile."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import MemoryFullError, StoreError
from ekko.store import layout
from ekko.store.changes import GONE, ChangeRing, ChangesView
from ekko.store.kernels.atomics import publish_word
from ekko.store.manifest import changes_name
from ekko.store.memory import AnonymousMemory, Mapping, TmpfsMemory

CAPACITY = 1 << layout.CHANGES_LOG2
MODEL = 7


@pytest.fixture
def memory(tmp_path: Path) -> TmpfsMemory:
    return TmpfsMemory(tmp_path, "ring")


def attached(memory: TmpfsMemory) -> ChangeRing:
    header = memory.open("header") if memory.path("header").exists() else memory.create("header", 4096)
    ring = ChangeRing.attach(MODEL, memory, header)
    assert ring is not None
    return ring


def view_of(memory: TmpfsMemory) -> ChangesView:
    return ChangesView(Mapping.open_to_read(memory.path(changes_name(MODEL))))


def keys(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, np.uint64)


def test_what_is_noted_is_read_in_order(memory: TmpfsMemory) -> None:
    ring, view = attached(memory), view_of(memory)
    begin, out = view.head, np.empty((10, 2), np.uint64)
    ring.note(5, keys(1, 2**64 - 1))
    ring.note_gone(5, keys(3))
    ring.note(2**32 - 1, keys(0)[::-1])
    ring.note(5, keys())
    assert view.read(begin, out) == 4
    assert out[:4].tolist() == [[1, 5], [2**64 - 1, 5], [3, 5 | GONE], [0, 2**32 - 1]]
    assert view.read(begin + 3, out) == 1
    assert view.read(begin + 4, out) == 0
    assert view.read(begin, out[:2]) == 2


def test_what_was_overwritten_is_known_to_be_missing(memory: TmpfsMemory) -> None:
    ring, view = attached(memory), view_of(memory)
    ring.note(1, np.arange(CAPACITY, dtype=np.uint64))
    out = np.empty((CAPACITY, 2), np.uint64)
    assert view.read(0, out) == CAPACITY
    ring.note(1, keys(7))
    assert view.read(0, out) is None
    assert view.read(1, out) == CAPACITY
    assert out[-1, 0] == 7
    ring.note(1, np.arange(3 * CAPACITY + 5, dtype=np.uint64))  # more at once than it holds
    assert view.read(CAPACITY + 1, out) is None
    assert view.read(view.head - CAPACITY, out) == CAPACITY
    assert (out[:, 0] == np.arange(2 * CAPACITY + 5, 3 * CAPACITY + 5)).all()
    assert view.read(view.head + 1, out) is None  # of a ring that began anew


def test_a_reader_is_told_before_an_entry_is_overwritten(memory: TmpfsMemory) -> None:
    """As if the writer were killed between its two words."""
    ring, view = attached(memory), view_of(memory)
    ring.note(1, np.arange(CAPACITY, dtype=np.uint64))
    out = np.empty((CAPACITY, 2), np.uint64)
    words = memory.open(changes_name(MODEL))
    publish_word(words.address + layout.CHANGES.offset("reserved"), CAPACITY + 10)
    assert view.read(0, out) is None
    assert view.read(9, out) is None
    assert view.read(10, out) == CAPACITY - 10


def test_readers_meet_no_entry_of_another_round(memory: TmpfsMemory) -> None:
    ring, view = attached(memory), view_of(memory)
    stop, ahead = threading.Event(), threading.Event()
    total, read_to = 20 * CAPACITY, [0]

    def write() -> None:
        done = 0
        while done < total and not stop.is_set():
            if done - read_to[0] > 3 * CAPACITY // 2:  # as far ahead as it may be for the reader to meet it
                ahead.set()
                time.sleep(0)
                continue
            count = min(3_001, total - done)
            ring.note(1, np.arange(done, done + count, dtype=np.uint64))
            done += count

    writer = threading.Thread(target=write)
    writer.start()
    assert ahead.wait(60)  # else whoever reads may keep up, and meet nothing
    position, seen, lost = 0, 0, 0
    out = np.empty((8_192, 2), np.uint64)
    try:
        while position < total:
            count = view.read(position, out)
            if count is None:
                lost, position = lost + 1, view.head - CAPACITY // 2
                read_to[0] = position
                continue
            assert (out[:count, 0] == np.arange(position, position + count, dtype=np.uint64)).all()
            position, seen = position + count, seen + count
            read_to[0] = position
    finally:
        stop.set()
        writer.join()
    assert seen
    assert lost
    assert view.head == total


def test_who_attaches_says_that_changes_may_be_missing(memory: TmpfsMemory) -> None:
    attached(memory).note(1, keys(1, 2))
    view = view_of(memory)
    before = view.breaks
    attached(memory).note(1, keys(3))
    out = np.empty((9, 2), np.uint64)
    assert view.breaks == before + 1
    assert view.read(0, out) == 3  # the ring goes on where it was
    assert view.is_of(memory.path(changes_name(MODEL)))
    path = memory.path(changes_name(MODEL))
    damaged = bytearray(path.read_bytes())
    damaged[16] = 3  # another capacity
    path.write_bytes(damaged)
    attached(memory)
    assert view_of(memory).head == 0
    assert not view.is_of(path)


def test_where_there_is_no_room_that_is_told(memory: TmpfsMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, view = attached(memory), view_of(memory)
    ring.note(1, keys(1))
    ensure = Mapping.ensure

    def full(self: Mapping, end: int) -> None:
        raise MemoryFullError("full")

    before = view.breaks
    with monkeypatch.context() as patch:
        patch.setattr(Mapping, "ensure", full)
        ring.note(1, np.arange(1_000, dtype=np.uint64))
    assert (view.breaks, view.head) == (before + 1, 1)
    ring.note(1, keys(2))
    assert view.head == 2
    memory.remove(changes_name(MODEL))
    with monkeypatch.context() as patch:
        patch.setattr(Mapping, "ensure", full)
        assert ChangeRing.attach(MODEL, memory, memory.open("header")) is None
    assert not memory.path(changes_name(MODEL)).exists()
    assert Mapping.ensure is ensure


def test_memory_of_this_process_has_no_ring() -> None:
    memory = AnonymousMemory()
    assert ChangeRing.attach(MODEL, memory, memory.create("header", 4096)) is None


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "changes"
    for content in (b"\0" * layout.PAGE_BYTES, b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="changes file"):
            ChangesView(Mapping.open_to_read(path))
    words = np.zeros(1024, np.uint64)
    words[:3] = (layout.CHANGES_MAGIC, layout.LAYOUT_VERSION, layout.CHANGES_LOG2)
    path.write_bytes(words.tobytes())
    with pytest.raises(StoreError, match="shorter than it says"):
        ChangesView(Mapping.open_to_read(path))
