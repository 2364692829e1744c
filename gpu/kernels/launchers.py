"""Launchers of the kernels, one a kernel; the structures that their sources take, for NumPy.

`gpu.cache` and `gpu.reading` say what is looked up or written and check what callers hand over; `gpu.reference` says what each
kernel does to memory. All enqueue on `stream` (None: the device's default) and never synchronise. The arrays are the device's,
and stay the caller's: they live until the stream has passed the launch.

Raises, all of them: `ArgumentError`, before anything is launched, for an array of another dtype or shape, not contiguous, or at
an address that rows cannot be read at.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np

from gpu.backend import Array, Device, Stream
from gpu.batches import check_array
from gpu.errors import ArgumentError
from gpu.layout import BUCKET_SLOTS, CHUNK_BYTES, CODECS, HEADER_BYTES, POLICIES, Memory, PooledJob

WARP: Final = 32
BLOCK: Final = 256  # threads; what the kernels are compiled for
PLACES_A_WARP: Final = 4  # insert.cu
POOLS_MAX: Final = 26  # pooled.cu
_NO_USE: Final = 0xFFFF_FFFF  # rows.cuh: do not score rows that are read

_POINTER = np.uint64
# Structures of the kernel sources, field by field; static_asserts there and a test here hold the sizes.
_TABLE: Final = np.dtype(
    [(name, _POINTER) for name in ("digests", "headers", "rows", "counters")]
    + [("buckets", np.uint64)]
    + [(name, np.uint32) for name in ("chunks", "dim", "codec", "tile")]
)
_OUTPUT: Final = np.dtype([("values", _POINTER), ("dim", np.uint32), ("wide", np.uint32)])
_INPUT: Final = np.dtype([("bytes", _POINTER), ("row_bytes", np.uint32), ("unit", np.uint32)])
_LOOK_UP: Final = np.dtype(
    [("table", _TABLE), ("keys", _POINTER), ("out", _OUTPUT)]
    + [(name, _POINTER) for name in ("stamps", "missed", "missed_count")]
    + [("count", np.int64), ("use", np.uint32), ("now", np.uint32)]
)
_BATCH: Final = np.dtype(
    [(name, _POINTER) for name in ("keys", "stamps", "scores")]
    + [("rows", _INPUT), ("outcomes", _POINTER), ("count", np.int64), ("score", np.uint64)]
    + [("scored", np.uint32), ("admit", np.uint32)]
)
_EXPORT: Final = np.dtype(
    [("table", _TABLE)]
    + [(name, _POINTER) for name in ("keys", "stamps", "scores", "rows", "count")]
    + [("newer_than", np.uint64)]
    + [(name, np.int64) for name in ("room", "first_bucket", "buckets")]
    + [("row_bytes", np.uint32), ("unit", np.uint32)]
)
_POOL: Final = np.dtype(
    [("table", _TABLE)]
    + [(name, _POINTER) for name in ("keys", "offsets", "weights")]
    + [("out", _OUTPUT)]
    + [(name, _POINTER) for name in ("buffer", "missed", "missed_count")]
    + [("bags", np.int64), ("first_warp", np.int64)]
    + [(name, np.uint32) for name in ("mode", "weighted", "use", "now")]
)
_POOLS: Final = np.dtype([("pool", _POOL, (POOLS_MAX,))])


def lookup(
    device: Device,
    memory: Memory,
    keys: Array,
    rows: Array,
    stamps: Array,
    missed: Array,
    missed_count: Array,
    *,
    policy: int | None,
    tick: int,
    stream: Stream | None = None,
) -> None:
    """Rows of keys, as float32.

    Args:
        device: of all arrays.
        memory: the cache. Others may write it meanwhile.
        keys: uint64[n]; repeats are fine.
        rows: float32[n, dim]: each key's row, or zeros if it was missed.
        stamps: uint64[n]: each row's; 0 if the key was missed.
        missed: int64[n]: the indices of missed keys, in no order, come first.
        missed_count: uint64[1]: their number is added.
        policy: of the cache: rows that are found count as used; None: they do not.
        tick: now; only the lower 32 bits count.
        stream: where to enqueue.
    """
    count = len(keys)
    _check("keys", keys, np.uint64, (None,))
    _check("rows", rows, np.float32, (count, memory.shape.dim))
    _check("stamps", stamps, np.uint64, (count,))
    _check("missed", missed, np.int64, (count,))
    _check("missed_count", missed_count, np.uint64, (1,))
    if not count:
        return
    ask = np.zeros((), _LOOK_UP)
    ask["table"] = _table(device, memory)
    ask["out"] = _output(device, rows)
    for name, array in (("keys", keys), ("stamps", stamps), ("missed", missed), ("missed_count", missed_count)):
        ask[name] = device.address(array)
    ask["count"] = count
    ask["use"], ask["now"] = _use(policy, tick)
    _launch(device, "lookup", "lookup", count, [_value(ask)], stream)


def pooled(device: Device, jobs: Sequence[PooledJob], *, mode: int, stream: Stream | None = None) -> None:
    """The sum or mean of each bag's rows, for several caches; a launch for up to 26 of them.

    Args:
        device: of all arrays.
        jobs: what each cache is asked; arrays as `gpu.layout.PooledJob` says.
        mode: one of `gpu.layout.MODES`.
        stream: where to enqueue.
    """
    jobs = [job for job in jobs if len(job.offsets) > 1]
    for first in range(0, len(jobs), POOLS_MAX):
        part = jobs[first : first + POOLS_MAX]
        pools = np.zeros((), _POOLS)
        warps, buffers = 0, []
        for pool, job in zip(pools["pool"], part, strict=False):
            buffers.append(_fill_pool(device, pool, job, mode))  # alive until the launch has been told of them
            pool["first_warp"] = warps
            warps += -(-int(pool["bags"]) * int(pool["table"]["tile"]) // WARP)
        _launch(device, "pooled", "pooled", warps * WARP, [_value(pools), np.uint32(len(part))], stream)


def apply(
    device: Device, memory: Memory, keys: Array, stamps: Array, rows: Array, outcomes: Array, *, stream: Stream | None = None
) -> None:
    """Give rows that are in the cache their newer versions.

    Args:
        device: of all arrays.
        memory: the cache. Look-ups may run meanwhile; other writes may not.
        keys: uint64[n], without repeats.
        stamps: uint64[n]; 0 leaves a key out.
        rows: uint8[n, row_bytes], encoded.
        outcomes: uint8[n]: ASSIGNED, KEPT or ABSENT.
        stream: where to enqueue.
    """
    batch = _batch(device, memory, keys, stamps, rows, outcomes)
    _launch(device, "apply", "apply", len(keys), [_table(device, memory), _value(batch)], stream)


def insert(
    device: Device,
    memory: Memory,
    keys: Array,
    stamps: Array,
    rows: Array,
    scores: Array | None,
    outcomes: Array,
    *,
    score: int,
    admit: bool,
    stream: Stream | None = None,
) -> None:
    """Insert rows, or give those that are there their newer versions.

    Args:
        device: of all arrays.
        memory: the cache. Look-ups may run meanwhile; other writes may not.
        keys: uint64[n], without repeats, those of a bucket side by side.
        stamps: uint64[n]; 0 leaves a key out.
        rows: uint8[n, row_bytes], encoded.
        scores: uint64[n], of new rows and of those that are there; or None.
        outcomes: uint8[n]: ASSIGNED, KEPT, INSERTED, REPLACED or REFUSED.
        score: of new rows where `scores` is None.
        admit: a new row takes the lowest score's place even if it scores lower.
        stream: where to enqueue.
    """
    batch = _batch(device, memory, keys, stamps, rows, outcomes)
    if scores is not None:
        _check("scores", scores, np.uint64, (len(keys),))
        batch["scores"], batch["scored"] = device.address(scores), 1
    batch["score"], batch["admit"] = score, admit
    warps = -(-len(keys) // PLACES_A_WARP)
    _launch(device, "insert", "insert", warps * WARP, [_table(device, memory), _value(batch)], stream)


def erase(device: Device, memory: Memory, keys: Array, stamps: Array, outcomes: Array, *, stream: Stream | None = None) -> None:
    """Remove keys that are there with this stamp or an older one; arguments as of `apply`, outcomes ERASED, KEPT, ABSENT."""
    batch = _batch(device, memory, keys, stamps, None, outcomes)
    _launch(device, "erase", "erase", len(keys), [_table(device, memory), _value(batch)], stream)


def histogram(
    device: Device,
    memory: Memory,
    counts: Array,
    *,
    word: int,
    shift: int,
    prefix: int,
    score: int,
    stream: Stream | None = None,
) -> None:
    """Add to `counts`, uint64[256], how often each 8 bits from `shift` on occur; see `gpu.reference.histogram`."""
    _check("counts", counts, np.uint64, (256,))
    numbers = [np.uint32(word), np.uint32(shift), np.uint64(prefix), np.uint64(score)]
    _launch(device, "sweep", "histogram", memory.shape.slots, [_table(device, memory), counts, *numbers], stream)


def sweep(device: Device, memory: Memory, *, score: int, hashed: int, stream: Stream | None = None) -> None:
    """Remove each row whose (score, hash of the key) is at most this one."""
    _launch(device, "sweep", "sweep", memory.shape.slots, [_table(device, memory), np.uint64(score), np.uint64(hashed)], stream)


def decay(device: Device, memory: Memory, *, stream: Stream | None = None) -> None:
    """Halve the rank of every row."""
    _launch(device, "sweep", "decay", memory.shape.slots, [_table(device, memory)], stream)


def export(
    device: Device,
    memory: Memory,
    keys: Array,
    stamps: Array,
    scores: Array,
    rows: Array,
    count: Array,
    *,
    first_bucket: int,
    buckets: int,
    newer_than: int,
    stream: Stream | None = None,
) -> None:
    """The rows of some buckets whose stamp is larger than `newer_than`, in no order.

    Args:
        device: of all arrays.
        memory: the cache. Writes may run meanwhile: a row that left while it was read, or changed too often, has stamp 0.
        keys: uint64[room].
        stamps: uint64[room].
        scores: uint64[room].
        rows: uint8[room, row_bytes], encoded.
        count: uint64[1]: their number is added; what is beyond `room` was not written.
        first_bucket: where to begin.
        buckets: how many buckets to read.
        newer_than: 0: all rows.
        stream: where to enqueue.
    """
    room = len(keys)
    for name, column in (("keys", keys), ("stamps", stamps), ("scores", scores)):
        _check(name, column, np.uint64, (room,))
    _check("count", count, np.uint64, (1,))
    encoded = _input(device, memory, rows, room)
    ask = np.zeros((), _EXPORT)
    ask["table"] = _table(device, memory)
    for name, array in (("keys", keys), ("stamps", stamps), ("scores", scores), ("rows", rows), ("count", count)):
        ask[name] = device.address(array)
    ask["newer_than"], ask["room"], ask["first_bucket"], ask["buckets"] = newer_than, room, first_bucket, buckets
    ask["row_bytes"], ask["unit"] = encoded["row_bytes"], encoded["unit"]
    _launch(device, "export", "export_rows", buckets * BUCKET_SLOTS, [_value(ask)], stream)


def scatter(
    device: Device,
    rows: Array,
    stamps: Array,
    indices: Array,
    out: Array,
    out_stamps: Array,
    *,
    stream: Stream | None = None,
) -> None:
    """Put rows that were missed where a look-up left zeros.

    Args:
        device: of all arrays; `rows`, `stamps` and `indices` may be its pinned memory.
        rows: float32[m, dim].
        stamps: uint64[m].
        indices: int64[m], without repeats, each below n.
        out: float32[n, dim]; out[indices] = rows.
        out_stamps: uint64[n]; likewise.
        stream: where to enqueue.
    """
    count, dim = len(indices), out.shape[1]
    _check("indices", indices, np.int64, (None,))
    _check("rows", rows, np.float32, (count, dim))
    _check("stamps", stamps, np.uint64, (count,))
    _check("out", out, np.float32, (None, dim))
    _check("out_stamps", out_stamps, np.uint64, (len(out),))
    if count:
        args = [rows, stamps, indices, np.int64(count), out, out_stamps, np.uint32(dim)]
        _launch(device, "scatter", "scatter", count * dim, args, stream)


def _launch(device: Device, source: str, name: str, threads: int, args: Sequence[Any], stream: Stream | None) -> None:
    if threads:
        device.launch(device.kernel(f"{source}.cu", name), -(-threads // BLOCK), BLOCK, args, stream)


def _check(name: str, array: Array, dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    check_array(name, array, (dtype,), shape)


def _value(structure: np.ndarray[Any, Any]) -> np.void:
    return cast(np.void, structure[()])  # NumPy's types know it as an array


def _table(device: Device, memory: Memory) -> np.void:
    shape = memory.shape
    table = np.zeros((), _TABLE)
    for name in ("digests", "headers", "rows", "counters"):
        table[name] = device.address(getattr(memory, name))
    table["buckets"], table["chunks"], table["dim"] = shape.buckets, shape.chunks, shape.dim
    table["codec"] = CODECS[shape.codec]
    table["tile"] = min(WARP, 1 << (shape.chunks - 1).bit_length())
    assert memory.headers.shape == (shape.slots, HEADER_BYTES)
    return _value(table)


def _use(policy: int | None, tick: int) -> tuple[int, int]:
    assert policy is None or policy in POLICIES.values()
    return _NO_USE if policy is None else policy, tick & 0xFFFF_FFFF


def _output(device: Device, rows: Array) -> np.void:
    output = np.zeros((), _OUTPUT)
    output["values"], output["dim"] = device.address(rows), rows.shape[1]
    output["wide"] = rows.shape[1] % 4 == 0 and int(output["values"]) % CHUNK_BYTES == 0
    return _value(output)


def _input(device: Device, memory: Memory, rows: Array, count: int) -> np.void:
    row_bytes = memory.shape.row_bytes
    _check("rows", rows, np.uint8, (count, row_bytes))
    address = device.address(rows)
    units = [unit for unit in (CHUNK_BYTES, 4, 2) if row_bytes % unit == 0 and address % unit == 0]
    if not units:
        raise ArgumentError(f"rows begin at the odd address {address:#x}: encoded rows are read two bytes at a time or more")
    encoded = np.zeros((), _INPUT)
    encoded["bytes"], encoded["row_bytes"], encoded["unit"] = address, row_bytes, units[0]
    return _value(encoded)


def _batch(
    device: Device, memory: Memory, keys: Array, stamps: Array, rows: Array | None, outcomes: Array
) -> np.ndarray[Any, Any]:
    count = len(keys)
    _check("keys", keys, np.uint64, (None,))
    _check("stamps", stamps, np.uint64, (count,))
    _check("outcomes", outcomes, np.uint8, (count,))
    batch = np.zeros((), _BATCH)
    for name, array in (("keys", keys), ("stamps", stamps), ("outcomes", outcomes)):
        batch[name] = device.address(array)
    if rows is not None:
        batch["rows"] = _input(device, memory, rows, count)
    batch["count"] = count
    return batch


def _fill_pool(device: Device, pool: np.void, job: PooledJob, mode: int) -> Array:
    """Returns the buffer that the pool goes through, if any."""
    bags, dim = len(job.offsets) - 1, job.memory.shape.dim
    _check("keys", job.keys, np.uint64, (None,))
    _check("offsets", job.offsets, np.int64, (None,))
    _check("out", job.out, np.float32, (bags, dim))
    _check("missed", job.missed, np.int64, (len(job.keys),))
    _check("missed_count", job.missed_count, np.uint64, (1,))
    pool["table"] = _table(device, job.memory)
    for name in ("keys", "offsets", "missed", "missed_count"):
        pool[name] = device.address(getattr(job, name))
    if job.weights is not None:
        _check("weights", job.weights, np.float32, (len(job.keys),))
        pool["weights"], pool["weighted"] = device.address(job.weights), 1
    pool["out"] = _output(device, job.out)
    buffer = job.buffer
    if job.memory.shape.chunks > WARP:
        buffer = device.empty((bags, dim), np.float32) if buffer is None else buffer
        _check("buffer", buffer, np.float32, (bags, dim))
        pool["buffer"] = device.address(buffer)
    pool["bags"], pool["mode"] = bags, mode
    pool["use"], pool["now"] = _use(job.policy, job.tick)
    return buffer
