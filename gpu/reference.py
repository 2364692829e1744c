"""What each kernel does, in NumPy: the same arguments, the same memory afterwards, bit for bit.

The kernels' tests compare with this; it is no way to serve. Where a kernel's order is open (the order of missed keys, or of
exported rows), so is it here, and tests compare sorted. Nothing else runs meanwhile here, so no reader is ever crossed.

Batches of writers hold a key once, and are sorted by bucket (`gpu.batches`). A bucket's keys are then taken in their order, by
one group of lanes on a device and in rounds here: round j takes the j-th key of every bucket at once.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gpu import layout
from gpu.layout import (
    BUCKET_SLOTS,
    HEADER,
    MODES,
    POLICIES,
    RANK_SHIFT,
    TICK_MASK,
    USES_MAX,
    Memory,
    PooledJob,
    Shape,
)

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

_KEYS_AT_ONCE = 1 << 14  # their digests are looked at as one array


def new_memory(shape: Shape) -> Memory:
    """An empty cache in arrays of NumPy."""
    return Memory(
        shape,
        np.zeros(shape.slots, np.uint8),
        np.zeros((shape.slots, layout.HEADER_BYTES), np.uint8),
        np.zeros((shape.slots, shape.stride), np.uint8),
        np.zeros(layout.COUNTERS, np.uint64),
    )


def headers_of(memory: Memory) -> NDArray[np.void]:
    """HEADER[slots]: the headers by their fields, the same memory."""
    view: NDArray[np.void] = memory.headers.view(HEADER)[:, 0]
    return view


def find(memory: Memory, keys: U64) -> I64:
    """int64[n]: the slot of each key, -1 where it is not here."""
    slots = np.full(len(keys), -1, np.int64)
    headers = headers_of(memory)
    digests = memory.digests.reshape(-1, BUCKET_SLOTS)
    for first in range(0, len(keys), _KEYS_AT_ONCE):
        part = keys[first : first + _KEYS_AT_ONCE]
        hashed = layout.mix64(part)
        buckets = layout.bucket_of(hashed, memory.shape.buckets)
        which, place = np.nonzero(digests[buckets] == layout.digest_of(hashed)[:, None])
        candidates = buckets[which] * BUCKET_SLOTS + place
        met = (headers["key"][candidates] == part[which]) & (headers["stamp"][candidates] != 0)
        slots[first + which[met]] = candidates[met]
    return slots


def decode(shape: Shape, rows: U8) -> F32:
    """float32[n, dim] of encoded rows, uint8[n, row_bytes or more]."""
    rows = np.ascontiguousarray(rows[:, : shape.row_bytes])
    match shape.codec:
        case "float32":
            return rows.view(np.float32)
        case "float16":
            return rows.view(np.float16).astype(np.float32)
        case "bfloat16":
            return (rows.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        case _:
            scales = np.ascontiguousarray(rows[:, : layout.SCALE_BYTES]).view(np.float32)
            values = rows[:, layout.SCALE_BYTES : layout.SCALE_BYTES + shape.dim].view(np.int8)
            return values.astype(np.float32) * scales


def lookup(
    memory: Memory, keys: U64, rows: F32, stamps: U64, missed: I64, missed_count: U64, *, policy: int, tick: int
) -> None:
    """Gather: `rows` float32[n, dim] and `stamps` uint64[n] of each key, zeros for a key that is not here.

    The indices of keys that are not here go to `missed`, int64[n], and their number is added to `missed_count`, uint64[1]. A
    key may stand in `keys` several times. Each that is found counts as used at `tick`.
    """
    slots = find(memory, keys)
    found = np.flatnonzero(slots >= 0)
    rows[...] = 0
    stamps[...] = 0
    rows[found] = decode(memory.shape, memory.rows[slots[found]])
    stamps[found] = headers_of(memory)["stamp"][slots[found]]
    _count_look_up(memory, slots, missed, missed_count)
    _touch(memory, slots[found], policy, tick)


def pooled(jobs: list[PooledJob], *, mode: int) -> None:
    """The sum of the rows of each bag, or that divided by how many keys the bag has, for several caches.

    Bag b of a job are its keys from `offsets[b]` to `offsets[b + 1]`. Rows are added in this order in float32; a key that is
    not here adds nothing, and is told as `lookup` tells it. A bag without keys is zeros. `weights` multiply the rows.
    """
    for job in jobs:
        slots = find(job.memory, job.keys)
        _count_look_up(job.memory, slots, job.missed, job.missed_count)
        _touch(job.memory, slots[slots >= 0], job.policy, job.tick)
        values = decode(job.memory.shape, job.memory.rows[np.maximum(slots, 0)])
        if job.weights is not None:
            values = values * job.weights[:, None]
        job.out[...] = 0
        first, sizes = job.offsets[:-1], np.diff(job.offsets)
        for j in range(int(sizes.max(initial=0))):
            bags = np.flatnonzero(sizes > j)
            bags = bags[slots[first[bags] + j] >= 0]
            job.out[bags] += values[first[bags] + j]
        if mode == MODES["mean"]:
            job.out[...] /= np.maximum(sizes, 1).astype(np.float32)[:, None]


def apply(memory: Memory, keys: U64, stamps: U64, rows: U8, outcomes: U8) -> None:
    """Assign the rows of keys that are here with an older stamp: ASSIGNED, KEPT or ABSENT. Stamp 0: ABSENT, not counted."""
    slots = find(memory, keys)
    outcomes[...] = np.where(slots < 0, layout.ABSENT, layout.KEPT)
    newer = np.flatnonzero((slots >= 0) & (stamps > headers_of(memory)["stamp"][slots]))
    _write_rows(memory, slots[newer], stamps[newer], rows[newer])
    outcomes[newer] = layout.ASSIGNED
    outcomes[stamps == 0] = layout.ABSENT
    _count_outcomes(memory, outcomes, stamps)


def insert(
    memory: Memory, keys: U64, stamps: U64, rows: U8, scores: U64 | None, outcomes: U8, *, score: int, admit: bool
) -> None:
    """Insert or assign, one bucket's keys in their order.

    A key that is here: ASSIGNED if its stamp is older, else KEPT; it is scored anew if there are `scores`. Else into the lowest
    empty slot of its bucket: INSERTED. Else in the place of the lowest score (the lowest slot of several): REPLACED; but
    REFUSED if its own score is lower and `admit` is false. Without `scores` the new rows score `score`. Stamp 0: REFUSED, not
    counted.
    """
    headers = headers_of(memory)
    new_scores = np.full(len(keys), score, np.uint64) if scores is None else scores
    outcomes[...] = layout.REFUSED
    for chosen in _rounds(memory.shape, keys, stamps):
        slots = find(memory, keys[chosen])
        here = slots >= 0
        newer = here.copy()
        newer[here] = stamps[chosen[here]] > headers["stamp"][slots[here]]
        outcomes[chosen[here]] = np.where(newer[here], layout.ASSIGNED, layout.KEPT)
        _write_rows(memory, slots[newer], stamps[chosen[newer]], rows[chosen[newer]])
        if scores is not None:
            _write_scores(memory, slots[here & ~newer], scores[chosen[here & ~newer]])
            headers["score"][slots[newer]] = scores[chosen[newer]]  # with the row, under the same lock
        absent = chosen[~here]
        slots, outcomes[absent] = _places(memory, keys[absent], new_scores[absent], admit)
        entering = absent[slots >= 0]
        slots = slots[slots >= 0]
        headers["key"][slots] = keys[entering]
        headers["score"][slots] = new_scores[entering]
        memory.digests[slots] = layout.digest_of(layout.mix64(keys[entering]))
        _write_rows(memory, slots, stamps[entering], rows[entering])
    memory.counters[layout.SIZE] += np.uint64(np.count_nonzero(outcomes == layout.INSERTED))
    _count_outcomes(memory, outcomes, stamps)


def erase(memory: Memory, keys: U64, stamps: U64, outcomes: U8) -> None:
    """Remove keys that are here with no newer stamp: ERASED, KEPT or ABSENT. A stamp of 0: ABSENT, not counted."""
    slots = find(memory, keys)
    outcomes[...] = np.where(slots < 0, layout.ABSENT, layout.KEPT)
    covered = np.flatnonzero((slots >= 0) & (stamps >= headers_of(memory)["stamp"][slots]))
    outcomes[covered] = layout.ERASED
    outcomes[stamps == 0] = layout.ABSENT
    _clear(memory, slots[covered])
    _count_outcomes(memory, outcomes, stamps)


def histogram(memory: Memory, counts: U64, *, word: int, shift: int, prefix: int, score: int) -> None:
    """Add to `counts`, uint64[256], how often each value of 8 bits occurs in a word of the rows that are here.

    The bits are those from `shift` on. Word 0 is the score, and rows whose bits above do not equal `prefix` do not count; word
    1 is the key's hash, likewise, of rows that score `score` exactly.
    """
    headers = headers_of(memory)
    live = np.flatnonzero(headers["stamp"])
    if word == 0:
        values = headers["score"][live]
    else:
        values = layout.mix64(headers["key"][live[headers["score"][live] == np.uint64(score)]])
    above = values >> np.uint64(shift + 8) if shift < 56 else np.zeros_like(values)
    digits = (values[above == np.uint64(prefix)] >> np.uint64(shift)) & np.uint64(255)
    counts += np.bincount(digits.astype(np.int64), minlength=256).astype(np.uint64)


def sweep(memory: Memory, *, score: int, hashed: int) -> None:
    """Remove each row whose (score, hash of the key) is at most this one."""
    headers = headers_of(memory)
    scores = headers["score"]
    below = (scores < np.uint64(score)) | ((scores == np.uint64(score)) & (layout.mix64(headers["key"]) <= np.uint64(hashed)))
    slots = np.flatnonzero((headers["stamp"] != 0) & below)
    _clear(memory, slots)
    memory.counters[layout.EVICTED] += np.uint64(len(slots))


def decay(memory: Memory) -> None:
    """Halve the rank of every row."""
    scores = headers_of(memory)["score"]  # of an empty slot it is 0
    scores[...] = (scores >> np.uint64(RANK_SHIFT + 1) << np.uint64(RANK_SHIFT)) | (scores & np.uint64(TICK_MASK))


def export(
    memory: Memory,
    keys: U64,
    stamps: U64,
    scores: U64,
    rows: U8,
    count: U64,
    *,
    first_bucket: int,
    buckets: int,
    newer_than: int,
) -> None:
    """Write the rows of some buckets whose stamp is larger, in any order, and add their number to `count`, uint64[1].

    What finds no room in the arrays is counted and not written.
    """
    headers = headers_of(memory)
    first = first_bucket * BUCKET_SLOTS
    slots = first + np.flatnonzero(headers["stamp"][first : first + buckets * BUCKET_SLOTS] > np.uint64(newer_than))
    before = int(count[0])
    count += np.uint64(len(slots))
    slots = slots[: max(0, len(keys) - before)]
    out = slice(before, before + len(slots))
    keys[out], stamps[out], scores[out] = headers["key"][slots], headers["stamp"][slots], headers["score"][slots]
    rows[out] = memory.rows[slots, : memory.shape.row_bytes]


def _rounds(shape: Shape, keys: U64, stamps: U64) -> Iterator[I64]:
    """Indices of keys, at most one of a bucket a time; those with stamp 0 never."""
    chosen = np.flatnonzero(stamps)
    buckets = layout.bucket_of(layout.mix64(keys[chosen]), shape.buckets)
    order = np.argsort(buckets, kind="stable")  # it is sorted already, but a test of what happens else wants no surprise
    chosen, buckets = chosen[order], buckets[order]
    heads = np.flatnonzero(np.diff(buckets, prepend=-1))
    sizes = np.diff(heads, append=len(buckets))
    for j in range(int(sizes.max(initial=0))):
        yield chosen[heads[sizes > j] + j]


def _places(memory: Memory, keys: U64, scores: U64, admit: bool) -> tuple[I64, U8]:
    """The slot that each key, of a bucket of its own and not here, gets, or -1; and the outcome."""
    buckets = layout.bucket_of(layout.mix64(keys), memory.shape.buckets)
    headers = headers_of(memory).reshape(-1, BUCKET_SLOTS)
    empty = headers["stamp"][buckets] == 0
    has_empty = empty.any(axis=1)
    there = headers["score"][buckets]
    place = np.where(has_empty, empty.argmax(axis=1), there.argmin(axis=1))
    enters = has_empty | admit | (scores >= there.min(axis=1, initial=np.uint64(2**64 - 1)))
    slots = np.where(enters, buckets * BUCKET_SLOTS + place, -1)
    outcomes = np.where(has_empty, layout.INSERTED, np.where(enters, layout.REPLACED, layout.REFUSED))
    return slots, outcomes.astype(np.uint8)


def _write_rows(memory: Memory, slots: I64, stamps: U64, rows: U8) -> None:
    headers = headers_of(memory)
    memory.rows[slots, : memory.shape.row_bytes] = rows
    headers["stamp"][slots] = stamps
    headers["lock"][slots] += np.uint32(2)


def _write_scores(memory: Memory, slots: I64, scores: U64) -> None:
    headers_of(memory)["score"][slots] = scores  # a reader needs no consistent view of it: the lock stays


def _clear(memory: Memory, slots: I64) -> None:
    headers = headers_of(memory)
    memory.digests[slots] = 0
    for field in "key", "stamp", "score":
        headers[field][slots] = 0
    headers["lock"][slots] += np.uint32(2)
    memory.counters[layout.SIZE] -= np.uint64(len(slots))


def _touch(memory: Memory, slots: I64, policy: int, tick: int) -> None:
    scores = headers_of(memory)["score"]
    if policy == POLICIES["lfu"]:
        distinct, uses = np.unique(slots, return_counts=True)
        ranks = scores[distinct] >> np.uint64(RANK_SHIFT)
        room = np.maximum(ranks, np.uint64(USES_MAX)) - ranks
        scores[distinct] += np.minimum(uses.astype(np.uint64), room) << np.uint64(RANK_SHIFT)
        return
    older = slots[(scores[slots] & np.uint64(TICK_MASK)) < np.uint64(tick)]
    scores[older] = (scores[older] & ~np.uint64(TICK_MASK)) | np.uint64(tick)


def _count_look_up(memory: Memory, slots: I64, missed: I64, missed_count: U64) -> None:
    indices = np.flatnonzero(slots < 0)
    missed[: len(indices)] = indices
    missed_count += np.uint64(len(indices))
    memory.counters[layout.LOOKED_UP] += np.uint64(len(slots))
    memory.counters[layout.MISSED] += np.uint64(len(indices))


def _count_outcomes(memory: Memory, outcomes: U8, stamps: U64) -> None:
    of_each = np.bincount(outcomes[stamps != 0], minlength=layout.OUTCOMES).astype(np.uint64)
    memory.counters[layout.OUTCOME_FIRST : layout.OUTCOME_FIRST + layout.OUTCOMES] += of_each
