"""Kernels that count which keys are asked for: a count-min sketch that all readers of a table share, and its decayed twin.

Source: Cormode and Muthukrishnan, "An Improved Data Stream Summary: The Count-Min Sketch and its Applications" (2005). A key
has one counter in each row of the sketch; others may share them, so that the least of them is never below the truth.

Readers add with relaxed atomics: no lock that a dead process could hold, and no count is lost between two that meet. They do
not count every key. A look-up of n keys spends n + `CALL_COST`, and on the line of all that is spent lie points at random,
`PERIOD` apart on average. The look-up that goes past one is counted: some of its keys, drawn one from each of equal parts of
it, with a weight that makes up for all that was left out. The distances are exponential, so that no rhythm of a caller falls in
step with them, and what is expected of each counter is exact for any mixture of short and long look-ups.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import add_u32, add_u64, load_u32, load_u64, prefetch_write, store_u64
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import mix64, resolve

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# What is spent between two look-ups that are counted. Counting one costs about a microsecond and 50 ns a sample; looking up so
# many keys costs a hundred times that.
PERIOD = 8_192
# Of a look-up, beside its keys: those of few keys cost more a key, and should not be counted each time for all that.
CALL_COST = 64
# Keys for one that is drawn.
SAMPLE_GAP = 512
# Samples worked on at once.
_PART = 256

_DEPTH = layout.HOT_DEPTH
_CELLS = layout.HOT.offset("cells")
_CANDIDATES = layout.HOT.offset("candidates")
_CANDIDATE_BYTES = layout.CANDIDATE_BYTES
_ESTIMATE = layout.CANDIDATE.offset("estimate")
_CANDIDATE_SHIFT = np.uint64(64 - layout.HOT_CANDIDATES.bit_length() + 1)
_SEED = layout.HOT.offset("seed")
_SALT = layout.HOT.offset("salt")
_LOOKUPS = layout.HOT.offset("lookups")
_KEYS = layout.HOT.offset("keys")
_MISSES = layout.HOT.offset("misses")
_ROWS = layout.TABLE.offset("rows")
_FLAGS = layout.ROW.offset("flags")
_GONE = layout.FLAG_TOMBSTONE | layout.FLAG_FREE

# A counter that grew by more since the last fold did not grow: it was written to by somebody who should not have.
_GROWTH_MAX = np.uint32(1 << 31)

_TWELVE, _TWENTY_FIVE, _TWENTY_SEVEN = np.uint64(12), np.uint64(25), np.uint64(27)
_XORSHIFT = np.uint64(0x2545F4914F6CDD1D)
_ONE = np.uint64(1)


@inline_kernel
def _random(state: U64) -> Int:
    """The next number of xorshift64*, in [0, 1). Threads that meet here get the same number, which does no harm."""
    x = state[0]
    x ^= x >> _TWELVE
    x ^= x << _TWENTY_FIVE
    x ^= x >> _TWENTY_SEVEN
    state[0] = x
    return np.float64((x * _XORSHIFT) >> np.uint64(11)) * (1.0 / (1 << 53))


@inline_kernel
def _cell(first: Int, step: Int, row: Int, width_log2: Int) -> Int:
    """Position of a key's counter in the sketch, over all rows; `first` and `step` are its two hashes."""
    return (row << width_log2) + np.int64((first + np.uint64(row) * step) >> np.uint64(64 - width_log2))


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), boolean, uint64, int64, int64, "
    "int64, uint64[::1])",
)
def count(
    hot: Int,
    width_log2: Int,
    table: Int,
    stride: Int,
    index: Int,
    capacity_log2: Int,
    keys: U64,
    padded: bool,
    padding: Int,
    left: Int,
    lookups_new: Int,
    keys_new: Int,
    state: U64,
) -> Int:
    """Count the look-up of uint64[n] keys that went past the next point: `left` to spend is below 0.

    If it is `padded`, the keys that are `padding` were not asked for, and are not counted.

    `hot`, `table` and `index` are addresses of files, `stride` is of rows; `lookups_new` and `keys_new` came since the last
    call; `state` is uint64[1], not 0. Returns what may be spent until the next look-up is counted.
    """
    add_u64(hot + _LOOKUPS, np.uint64(lookups_new))
    add_u64(hot + _KEYS, np.uint64(keys_new))
    crossed = 0
    while left < 0:  # points that this look-up went past: PERIOD each on average
        left += np.int64(-PERIOD * np.log(1.0 - _random(state)))
        crossed += 1
    size = keys.size
    if size == 0:
        return left
    total = np.float64(crossed) * PERIOD * size / (size + CALL_COST)
    samples: Int = min(size, max(1, np.int64(total / SAMPLE_GAP)))
    weight = np.uint32(min(total / samples + _random(state), 2.0**31))
    seed, salt = load_u64(hot + _SEED), load_u64(hot + _SALT)
    drawn, slots = np.empty(_PART, np.uint64), np.empty(_PART, np.int64)
    first, step = np.empty(_PART, np.uint64), np.empty(_PART, np.uint64)
    misses = 0
    for begin in range(0, samples, _PART):
        part = min(_PART, samples - begin)
        for i in range(part):
            key = keys[np.int64((begin + i + _random(state)) * size / samples)]
            drawn[i] = key
            first[i] = mix64(key ^ seed)
            step[i] = mix64(first[i]) | _ONE
            for row in range(_DEPTH):
                prefetch_write(hot + _CELLS + 4 * _cell(first[i], step[i], row, width_log2))
        resolve(index, capacity_log2, drawn[:part], slots)
        for i in range(part):
            if padded and drawn[i] == padding:
                continue
            if slots[i] < 0 or load_u32(table + _ROWS + slots[i] * stride + _FLAGS) & _GONE:
                misses += 1
            estimate = np.uint32(0xFFFF_FFFF)
            for row in range(_DEPTH):
                before = add_u32(hot + _CELLS + 4 * _cell(first[i], step[i], row, width_log2), weight)
                estimate = min(estimate, np.uint32(before + weight))
            place = hot + _CANDIDATES + np.int64((first[i] * salt) >> _CANDIDATE_SHIFT) * _CANDIDATE_BYTES
            # Not as one: another reader may write between the two, and the key may get the other's estimate. The daemon asks
            # the sketch again.
            if np.uint64(estimate) > load_u64(place + _ESTIMATE):
                store_u64(place + _ESTIMATE, np.uint64(estimate))
                store_u64(place, drawn[i])
    add_u64(hot + _MISSES, np.uint64(misses) * np.uint64(weight))
    return left


@kernel("void(int64, int64, int64)")
def count_calls(hot: Int, lookups_new: Int, keys_new: Int) -> None:
    """Add what was looked up since the last `count`, of a reader that ends."""
    add_u64(hot + _LOOKUPS, np.uint64(lookups_new))
    add_u64(hot + _KEYS, np.uint64(keys_new))


@kernel("void(Array(uint32, 1, 'C', readonly=True), uint32[::1], float32[::1], float32)")
def fold(cells: U32, seen: U32, heat: F32, decay: float) -> None:
    """Let heat := heat * decay + what was counted since `seen`; seen := cells. Whatever the cells hold, heat stays finite."""
    for i in range(cells.size):
        grown = np.uint32(cells[i] - seen[i])
        heat[i] = heat[i] * decay + np.float32(grown if grown < _GROWTH_MAX else np.uint32(0))
        seen[i] = cells[i]


@kernel("void(Array(float32, 1, 'C', readonly=True), int64, uint64, Array(uint64, 1, 'C', readonly=True), float64[::1])")
def estimate(heat: F32, width_log2: Int, seed: Int, keys: U64, out: F64) -> None:
    """The least of each key's counters."""
    for i in range(keys.size):
        first = mix64(keys[i] ^ seed)
        step = mix64(first) | _ONE
        least = heat[_cell(first, step, 0, width_log2)]
        for row in range(1, _DEPTH):
            least = min(least, heat[_cell(first, step, row, width_log2)])
        out[i] = least
