"""What a look-up makes of slots that change hands, of rows that expire, of a writer in mid-row; and mutants of it, caught.

The memory is made by hand, so that each state that a writer passes through can be held still.
"""

import importlib.util
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels import gather, pool, rows, whole_row
from ekko.store.kernels.atomics import store_u32, store_u64
from ekko.store.kernels.index import publish
from ekko.store.kernels.quantise import FLOAT32

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]

LOG2 = 4
DEADLINE_S = 60.0
_ENTRIES = layout.INDEX.offset("entries")
_ROWS = layout.TABLE.offset("rows")


def address_of(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


class Memory:
    """A table of a few rows, and its index, written field by field."""

    def __init__(self, dim: int = 4, slots: int = 8) -> None:
        self.dim = dim
        self.stride = layout.row_stride(4 * dim)
        self.table = np.zeros(_ROWS + slots * self.stride + 64, np.uint8)
        self.index = np.zeros(layout.index_bytes(LOG2), np.uint8)

    def row(self, slot: int) -> int:
        return address_of(self.table) + _ROWS + slot * self.stride

    def put(self, slot: int, key: int, value: float, stamp: int = 7, flags: int = 0, lock: int = 2) -> None:
        row = self.row(slot)
        store_u32_at(row, lock)
        store_u32_at(row + whole_row.FLAGS, flags)
        store_u64_at(row + whole_row.STAMP, stamp)
        store_u64_at(row + whole_row.KEY, np.uint64(key))
        begin = _ROWS + slot * self.stride + whole_row.DATA
        self.table[begin : begin + 4 * self.dim].view(np.float32)[:] = value

    def enter(self, key: int, slot: int) -> None:
        """Point the key's entry at a slot; keys here never share a first entry."""
        index = address_of(self.index)
        enter_at(index, index + _ENTRIES + layout.ENTRY_BYTES * first_place(np.uint64(key)), np.uint64(key), slot)

    def remove(self, key: int) -> None:
        """Mark the key's entry as removed."""
        begin = _ENTRIES + layout.ENTRY_BYTES * first_place(np.uint64(key))
        self.index[begin : begin + layout.ENTRY_BYTES].view(np.uint64)[:] = layout.ENTRY_REMOVED

    def replace_index(self) -> None:
        """The table says that an index of the next generation is in use."""
        begin = layout.TABLE.offset("index_generation")
        self.table[begin : begin + 8].view(np.uint64)[:] += 1

    def gather(self, keys: list[int], stamp_min: int = 0, default: F32 | None = None) -> tuple[int, F32, U64]:
        """How many are done, rows, stamps."""
        out, stamps = np.full((len(keys), self.dim), np.nan, np.float32), np.full(len(keys), 99, np.uint64)
        asked = np.array(keys, np.uint64)
        done = gather.gather(*self._where(stamp_min, default), asked, out, stamps, 0)
        return done, out, stamps

    def pool(
        self, keys: list[int], ends: list[int], mode: int = pool.SUM, begin: int = 0, out: F32 | None = None
    ) -> tuple[int, F32]:
        """How many are done, bags."""
        out = np.full((len(ends) - 1, self.dim), np.nan, np.float32) if out is None else out
        asked, none = np.array(keys, np.uint64), np.empty(0, np.float32)
        done = pool.pool(*self._where(0, None), mode, asked, np.array(ends), none, False, 0, out, begin)
        return done, out

    def _where(self, stamp_min: int, default: F32 | None) -> tuple[int, ...]:
        row = 0 if default is None else address_of(default)
        return address_of(self.table), self.stride, FLOAT32, address_of(self.index), LOG2, stamp_min, row


@numba.njit
def store_u32_at(address: Any, value: Any) -> None:
    store_u32(address, np.uint32(value))


@numba.njit
def store_u64_at(address: Any, value: Any) -> None:
    store_u64(address, np.uint64(value))


@numba.njit
def enter_at(index: Any, entry: Any, key: Any, slot: Any) -> None:
    publish(index, entry, key, slot)


def first_place(key: np.uint64) -> int:
    """The number of the first entry of a key, as the layout's document says."""
    mask = (1 << 64) - 1
    mixed = int(key)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ mixed >> 33) * factor & mask
    return (mixed ^ mixed >> 33) >> 64 - LOG2


def unmixed(hashed: int) -> int:
    """The key of which this is the hash."""
    mask = (1 << 64) - 1
    for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
        hashed = (hashed ^ hashed >> 33) * pow(factor, -1, 1 << 64) & mask
    return hashed ^ hashed >> 33


def enter_behind(memory: Memory, key: int, slot: int) -> None:
    """Enter a key at the first entry that is empty, from its own on."""
    entries = memory.index[_ENTRIES:].view(np.uint64)
    place = first_place(np.uint64(key))
    while entries[place]:
        place = (place + 1) % (1 << LOG2)
    index = address_of(memory.index)
    enter_at(index, index + _ENTRIES + layout.ENTRY_BYTES * place, np.uint64(key), slot)


# Of one first entry and one tag: their hashes differ in the bits between.
TWINS = [unmixed(0xF << 60 | number << 40 | 5) for number in range(4)]
# Keys whose first entries differ.
KEYS: list[int] = []
for candidate in range(100):
    if first_place(np.uint64(candidate)) not in {first_place(np.uint64(key)) for key in KEYS}:
        KEYS.append(candidate)
A, B, C, GONE = KEYS[:4]


@pytest.fixture
def memory() -> Memory:
    """A in slot 0, B in slot 1, C is deleted in slot 2."""
    memory = Memory()
    for slot, key in enumerate((A, B, C)):
        memory.put(slot, key, slot + 1.0, flags=layout.FLAG_TOMBSTONE if key == C else 0)
        memory.enter(key, slot)
    return memory


def values_of(found: tuple[int, F32, U64]) -> tuple[list[float], list[int]]:
    """The value of each row, and its stamp; all keys are done, and rows are uniform."""
    done, out, stamps = found
    assert done == len(out)
    assert (out == out[:, :1]).all()
    return out[:, 0].tolist(), stamps.tolist()


def check_hands(memory: Memory) -> None:
    """Slots that are free, or another key's, are not what was asked for."""
    assert values_of(memory.gather([A, B, C, GONE])) == ([1.0, 2.0, 0.0, 0.0], [7, 7, 0, 0])
    memory.put(0, A, 1.0, flags=layout.FLAG_FREE)  # freed, and the entry is still there
    assert values_of(memory.gather([A, B])) == ([0.0, 2.0], [0, 7])
    assert memory.pool([A, B, B], [0, 3])[1].tolist() == [[4.0] * 4]
    memory.put(0, GONE, 1.0, flags=layout.FLAG_FREE)  # what a free row says of its key means nothing
    assert values_of(memory.gather([A, B])) == ([0.0, 2.0], [0, 7])
    memory.remove(A)
    assert values_of(memory.gather([A, B])) == ([0.0, 2.0], [0, 7])


def check_another_key(memory: Memory) -> None:
    """A stale index says that A is where B has moved in: nothing of B may be taken for A."""
    memory.put(0, B, 5.0)
    assert memory.gather([B, A])[0] == 1, "busy: the caller is to look whether the index is still in use"
    assert memory.pool([B, A], [0, 2])[0] == 1
    memory.enter(A, 3)
    memory.put(3, A, 6.0)
    assert values_of(memory.gather([B, A])) == ([2.0, 6.0], [7, 7])


def check_lock(memory: Memory) -> None:
    """A row under its writer is not read; what was done before is kept, and one goes on from there."""
    memory.put(1, B, 9.0, lock=3)
    done, out, _ = memory.gather([A, B])
    assert (done, out[0, 0]) == (1, 1.0)
    done, bags = memory.pool([A, A, B, A], [0, 0, 1, 4, 4])
    assert done == 2
    memory.put(1, B, 9.0, lock=4)
    done, bags = memory.pool([A, A, B, A], [0, 0, 1, 4, 4], begin=done, out=bags)
    assert done == 4
    assert bags[:, 0].tolist() == [0.0, 1.0, 11.0, 0.0]


def check_expiry(memory: Memory) -> None:
    """A row older than the table allows is absent, and a default takes its place."""
    assert values_of(memory.gather([A, B, C], stamp_min=7)) == ([1.0, 2.0, 0.0], [7, 7, 0])
    memory.put(1, B, 2.0, stamp=6)
    assert values_of(memory.gather([A, B], stamp_min=7)) == ([1.0, 0.0], [7, 0])
    default = np.full(4, 3.0, np.float32)
    assert values_of(memory.gather([A, B, C, GONE], 7, default)) == ([1.0, 3.0, 3.0, 3.0], [7, 0, 0, 0])


def check_same_tag(memory: Memory) -> None:
    """Keys of which the index says the same: each is found behind the others, and one that is not there is absent."""
    first, second, third, missing = twins = TWINS
    for slot, key in enumerate(twins[:3]):
        memory.put(3 + slot, key, 10.0 + slot)
        enter_behind(memory, key, 3 + slot)
    assert values_of(memory.gather([*twins, A])) == ([10.0, 11.0, 12.0, 0.0, 1.0], [7, 7, 7, 0, 7])
    assert memory.pool([first, third, missing], [0, 1, 3])[1].tolist() == [[10.0] * 4, [12.0] * 4]
    memory.put(3, first, 10.0, flags=layout.FLAG_FREE)
    assert values_of(memory.gather([first, second, missing])) == ([0.0, 11.0, 0.0], [0, 7, 0])
    memory.replace_index()
    assert memory.gather([second, missing])[0] == 1, "busy: an index that was replaced says nothing of what it does not have"


CHECKS = {
    "same-tag": check_same_tag,
    "hands": check_hands,
    "another-key": check_another_key,
    "lock": check_lock,
    "expiry": check_expiry,
}


@pytest.mark.parametrize("check", sorted(CHECKS))
def test_a_row_counts_only_under_its_key_and_lock(memory: Memory, check: str) -> None:
    CHECKS[check](memory)


# --- a writer at full speed -----------------------------------------------------------------------------------------------

ROWS_WIDE = 4
DIM_WIDE = 4_096
# So many bags must have met a version that another one did not: then both threads ran at the same time.
MEETINGS = 200


def _rewrite(table: Any, first: Any, stride: Any, data: Any, row_bytes: Any, stop: Any) -> Any:
    """Overwrite rows in turn until told to stop; version v of a row is v % 64 in every value."""
    version = 0
    while stop[0] == 0:
        version += 1
        row = first + (version % ROWS_WIDE) * stride
        rows._overwrite(table, row, np.uint64(version), data + (version % 64) * row_bytes, row_bytes)
        for pause in range(2_000):
            stop[1] = pause
    return version


def pool_under_writes(meetings: int) -> None:
    """Sums of rows that are rewritten without pause: all values of a bag are the same, or a torn row got into it."""
    memory = Memory(DIM_WIDE, ROWS_WIDE)
    keys = KEYS[:ROWS_WIDE]
    for slot, key in enumerate(keys):
        memory.put(slot, key, 0.0)
        memory.enter(key, slot)
    rewrite = numba.njit(nogil=True)(_rewrite)
    versions = np.repeat(np.arange(64, dtype=np.float32), DIM_WIDE)
    stop = np.ones(2, np.int64)
    arguments = (address_of(memory.table), memory.row(0), memory.stride, address_of(versions), 4 * DIM_WIDE, stop)
    rewrite(*arguments)  # compile it
    stop[0] = 0
    writing = threading.Thread(target=rewrite, args=arguments)
    writing.start()
    try:
        seen, before, deadline = 0, -1.0, time.monotonic() + DEADLINE_S
        while seen < meetings:
            assert time.monotonic() < deadline, f"only {seen} bags met a new version"
            done, bags = memory.pool(keys, [0, 1, ROWS_WIDE])
            if done == ROWS_WIDE:
                assert (bags == bags[:, :1]).all(), "torn"
                seen += bags[1, 0] != before
                before = bags[1, 0]
            else:
                time.sleep(0)  # on a busy machine the writer may need this processor to come to the row's end
    finally:
        stop[0] = 1
        writing.join()


def test_no_torn_row_gets_into_a_sum() -> None:
    pool_under_writes(MEETINGS)


def check_overtaken(_: Memory) -> None:
    """For a planted bug: a row is torn sooner or later, and that it is too late to tell counts as missed."""
    try:
        pool_under_writes(100 * MEETINGS)
    except AssertionError as noticed:
        if "torn" in str(noticed):
            raise


# --- planted bugs ---------------------------------------------------------------------------------------------------------


def compiled(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch("ekko.store.kernels.compile._cache_directory", lambda: None):
        spec.loader.exec_module(module)
    return module


def one_codec(source: str) -> str:
    """Kernels for float32 alone: a quarter of the compiling."""
    return re.sub(r"\(_(\w+)\(codec\) for codec in [^)]*\)\)", r"(_\1(FLOAT32),) * 4", source)


@contextmanager
def mutant(folder: Path, kernel: ModuleType, name: str, before: str, after: str) -> Iterator[None]:
    """One kernel, compiled with one change of its source, for float32 alone."""
    source = Path(str(kernel.__file__)).read_text()
    assert source.count(before) == 1, f"{before!r} is not what the source says: change this test with it"
    source = one_codec(source.replace(before, after))
    with ExitStack() as stack:
        if kernel is whole_row:  # which the others have compiled in
            changed = compiled(folder / "mutant_row.py", source)
            stack.enter_context(patch.object(whole_row, "read_by_key", changed.read_by_key))
            for other, entry in ((gather, "gather"), (pool, "pool")):
                module = compiled(folder / f"mutant_{entry}.py", one_codec(Path(str(other.__file__)).read_text()))
                stack.enter_context(patch.object(other, entry, getattr(module, entry)))
        else:
            stack.enter_context(patch.object(kernel, name, getattr(compiled(folder / "mutant.py", source), name)))
        yield


_QUICK_LOOK = "np.uint64(odd) | (held ^ key) | np.uint64(stamp < stamp_min)"
_QUICK_LOCK = "odd = (load_u32(row + LOCK) ^ lock) | (lock & 1) | (flags & GONE)"
BUGS: dict[str, tuple[ModuleType, str, str, str, list[Callable[[Memory], None]]]] = {
    "copies-any-key": (gather, "gather", _QUICK_LOOK, "np.uint64(odd) | np.uint64(stamp < stamp_min)", [check_another_key]),
    "copies-what-is-free": (gather, "gather", _QUICK_LOCK, _QUICK_LOCK.replace("GONE", "1"), [check_hands]),
    "copies-what-expired": (gather, "gather", _QUICK_LOOK, "np.uint64(odd) | (held ^ key)", [check_expiry]),
    "copies-under-the-lock": (gather, "gather", _QUICK_LOCK, "odd = flags & GONE", [check_lock]),
    "pools-any-key": (pool, "pool", _QUICK_LOOK, "np.uint64(odd) | np.uint64(stamp < stamp_min)", [check_another_key]),
    "pools-what-is-free": (pool, "pool", _QUICK_LOCK, _QUICK_LOCK.replace("GONE", "1"), [check_hands]),
    "pools-under-the-lock": (pool, "pool", _QUICK_LOCK, "odd = flags & GONE", [check_lock]),
    "pools-what-was-overtaken": (
        pool,
        "pool",
        _QUICK_LOCK,
        "odd = (lock & 1) | (flags & GONE)",
        [check_overtaken],
    ),
    "forgets-the-open-bag": (pool, "pool", "begin > ends[bag], out + bag * row_bytes)", "False, out)", [check_lock]),
    "patient-and-any-key": (whole_row, "", "if held == key:", "if True:", [check_another_key, check_same_tag]),
    "patient-and-free": (whole_row, "", "if flags & FREE == 0:", "if True:", [check_hands]),
    "stops-at-the-first-twin": (whole_row, "", "if not has_tag(word, tag_of(held)):", "if True:", [check_same_tag]),
    "trusts-an-old-index": (whole_row, "", "if _is_in_use(base, index) else BUSY", "", [check_same_tag]),
}


# Each of these compiles the largest kernels anew, for ten seconds; those of single look-ups always run.
SLOW = {
    "patient-and-any-key",
    "pools-what-was-overtaken",
    "trusts-an-old-index",
    "stops-at-the-first-twin",
    "pools-any-key",
    "pools-what-is-free",
    "pools-under-the-lock",
    "forgets-the-open-bag",
    "patient-and-free",
}


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=pytest.mark.long if bug in SLOW else ()) for bug in sorted(BUGS)])
def test_a_planted_bug_is_noticed(bug: str, memory: Memory, tmp_path: Path) -> None:
    kernel, name, before, after, checks = BUGS[bug]
    with mutant(tmp_path, kernel, name, before, after):
        for check in checks:
            with pytest.raises(AssertionError):
                check(memory)
