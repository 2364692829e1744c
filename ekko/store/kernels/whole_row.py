"""One row, read whole: what all readers have in common. `rows` tells the sequence lock, of which this is the other side.

A reader finds a slot in the index, and only the row can say what is in it: the entry may be that of another key with the same
tag, and meanwhile the slot may have become free, or may have been given to another key. So a copy counts if the lock was the
same even number before and after it, and the key that was under that lock is the one that was asked for. If the entry is
another key's, the search goes on behind it; if the slot changed hands, the key is searched again.

Memory order. The first look at the lock is an acquire load, so that nothing is read before it; the acquire fence keeps the
second look behind the copy. On x86-64 both are free, since loads are not reordered with loads there; on aarch64 they are `ldar`
and `dmb ishld`. The words of the header are relaxed atomics; the data is copied with plain accesses, and thrown away with the
rest when the second look says that a writer was there.
"""

from ekko.store import layout
from ekko.store.kernels.atomics import (
    copy_bytes,
    fence_acquire,
    fence_program_order,
    load_acquire_i64,
    load_acquire_u32,
    load_i64,
    load_u32,
    load_u64,
    store_u64,
    zero_bytes,
)
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import NOTHING, first_entry, has_tag, next_entry, slot_in, tag_of, word_at
from ekko.store.kernels.quantise import decode_row

# Looks at an odd lock before the reader gives its processor away: far longer than a row takes to write (below 1 us).
SPINS_MAX = 4096
# Searches for a key whose slot was given away each time it was looked at. A second one finds the new place as a rule.
SEARCHES_MAX = 8

# What `read_by_key` found.
ABSENT, FOUND, BUSY = 0, 1, 2

LOCK = layout.ROW.offset("lock")
FLAGS = layout.ROW.offset("flags")
STAMP = layout.ROW.offset("stamp")
KEY = layout.ROW.offset("key")
DATA = layout.ROW.offset("data")
FREE = layout.FLAG_FREE
GONE = layout.FLAG_TOMBSTONE | layout.FLAG_FREE
_ROWS = layout.TABLE.offset("rows")
_GENERATION = layout.TABLE.offset("index_generation")
_OWN_GENERATION = layout.INDEX.offset("generation")


@inline_kernel
def put_default(default: Int, dim: Int, target: Int) -> None:
    """What an absent key is: the float32[dim] at address `default`, or zeros if that is 0."""
    if default:
        copy_bytes(target, default, 4 * dim)
    else:
        zero_bytes(target, 4 * dim)


@inline_kernel
def _is_in_use(base: Int, index: Int) -> bool:
    """Whether no other index has replaced this one: what it does not have was absent a moment ago."""
    return bool(load_acquire_i64(base - _ROWS + _GENERATION) == load_i64(index + _OWN_GENERATION))


@kernel("int64(int64, int64, int64, int64, int64, int64, uint64, uint64, int64, int64)")
def read_by_key(
    base: Int,
    stride: Int,
    codec: Int,
    dim: Int,
    index: Int,
    capacity_log2: Int,
    key: Int,
    stamp_min: Int,
    target: Int,
    stamp_target: Int,
) -> Int:
    """Read a row with patience: where a quick look met the writer, a tombstone, an old row, or a slot of somebody else.

    FOUND: its values are at `target`, its stamp at `stamp_target` unless that is 0. ABSENT: what is at `target` means nothing.
    BUSY: the lock stayed odd, or the index was replaced; the caller takes the newest one and looks again.
    """
    tag = tag_of(key)
    for _ in range(SEARCHES_MAX):
        moved = False
        entry = first_entry(index, capacity_log2, key)
        word = word_at(entry)
        while word != NOTHING:
            if has_tag(word, tag):
                row = base + slot_in(word) * stride
                spins = 0
                while True:
                    lock = load_acquire_u32(row + LOCK)
                    flags = load_u32(row + FLAGS)
                    stamp = load_u64(row + STAMP)
                    held = load_u64(row + KEY)
                    decode_row(codec, row + DATA, dim, target)
                    fence_acquire()
                    if lock & 1 == 0 and load_u32(row + LOCK) == lock:
                        break
                    spins += 1
                    if spins >= SPINS_MAX:
                        return BUSY
                    while lock & 1 and spins < SPINS_MAX:  # no copy until the writer is done
                        fence_program_order()
                        lock = load_u32(row + LOCK)
                        spins += 1
                # A slot is freed before its index entry is removed: free means that the key was absent when we looked, or that
                # the slot was another key's.
                if flags & FREE == 0:
                    if held == key:
                        if flags & GONE or stamp < stamp_min:
                            return ABSENT
                        if stamp_target:
                            store_u64(stamp_target, stamp)
                        return FOUND
                    # Its entry, if it has the same tag; else the slot changed hands after we had read whose it was.
                    if not has_tag(word, tag_of(held)):
                        moved = True
            entry = next_entry(index, capacity_log2, entry)
            word = word_at(entry)
        if not moved:
            return ABSENT if _is_in_use(base, index) else BUSY
    return BUSY
