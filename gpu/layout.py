"""The cache's memory: which arrays there are, where each field lies, where a key belongs.

A cache is a hash table of buckets, and a bucket is 32 slots. A key has one bucket, so a look-up reads one sector of 32 bytes to
know which slots may hold it, and one more, the slot's header, to know that one does:

    digests   uint8[slots]              of a bucket: one sector. 0: the slot is empty; else 1 to 255, of the key's hash
    headers   uint8[slots, 32]          of a slot: one sector. key, stamp (0: empty), score, lock, spare
    rows      uint8[slots, stride]      encoded as the node's store encodes them, padded with zeros to a multiple of 16 bytes
    counters  uint64[COUNTERS]          sums since the cache was made

    slot = 32 * bucket + place in it;   bucket = (hash * buckets) >> 64;   digest = 1 + (hash % 256) * 255 / 256

Any 64-bit number is a key. The hash is the finaliser of splitmix64, which is not the Murmur3 one that deals keys out to shards:
a node that holds some shards only would else fill some buckets only. Two keys of a bucket share a digest once in 255, so that a
look-up in a full bucket reads 1.12 headers on average; with 7 bits it would be 1.25.

A slot's lock is even while its row can be read, and odd while its writer changes it; each write adds 2. A slot is in use when
its stamp is not 0.

A score is 32 bits of rank above 32 bits of tick. The larger stays:

    policy     rank                        tick            a use (look-up)
    lru        0                           of the last use tick := now
    lfu        uses since it came, halved  of the insert   rank += 1, below USES_MAX
               at every decay
    priority   as the caller gave it       of the last use tick := now

One source for Python and for the kernels: `defines()` is what the kernels are compiled with.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

LAYOUT_VERSION: Final = 1  # of handles: a process opens no cache whose memory it would misread

BUCKET_SLOTS: Final = 32  # as many as a warp has lanes, and as a sector has bytes
SECTOR_BYTES: Final = 32
CHUNK_BYTES: Final = 16  # the widest load of a lane; a row's stride is a multiple
BUCKETS_MAX: Final = 1 << 31  # slots, and bytes of digests, stay far below 2**63; a hash has bits enough for each bucket

# --- a slot's header: offsets in bytes, and what they are in whole words of the field's size
HEADER_BYTES: Final = 32
HEADER_KEY: Final = 0
HEADER_STAMP: Final = 8
HEADER_SCORE: Final = 16
HEADER_LOCK: Final = 24
HEADER_SPARE: Final = 28
HEADER: Final = np.dtype(
    {
        "names": ["key", "stamp", "score", "lock", "spare"],
        "formats": ["<u8", "<u8", "<u8", "<u4", "<u4"],
        "offsets": [HEADER_KEY, HEADER_STAMP, HEADER_SCORE, HEADER_LOCK, HEADER_SPARE],
        "itemsize": HEADER_BYTES,
    }
)

# --- codecs, numbered as the store numbers them
CODECS: Final = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}
SCALE_BYTES: Final = 4  # an int8 row begins with its float32 scale
DIM_MAX: Final = 16_384

# --- policies
POLICIES: Final = {"lru": 0, "lfu": 1, "priority": 2}
RANK_SHIFT: Final = 32
RANK_ONE: Final = 1 << RANK_SHIFT
TICK_MASK: Final = RANK_ONE - 1
# Uses are counted up to here, since a rank that overflows would make the hottest row the first to leave: within a minute where
# a device looks up a table of ten rows. Look-ups that run at once may each add one beyond it, and 31 bits are left for them.
USES_MAX: Final = 1 << 31

# --- pooling
MODES: Final = {"sum": 0, "mean": 1}

# --- what became of a key of a batch
ABSENT: Final = 0  # apply, erase: not in the cache
ASSIGNED: Final = 1  # it was there, and has the new row and stamp now
KEPT: Final = 2  # it is there with the same stamp or a newer one; nothing was done but to score it, if insert was told a score
INSERTED: Final = 3  # into an empty slot
REPLACED: Final = 4  # another key left for it
REFUSED: Final = 5  # all others in the bucket score higher
ERASED: Final = 6
OUTCOMES: Final = 7

# --- counters, by index
COUNTERS: Final = 16  # some are spare: a new one is no new layout
SIZE: Final = 0  # rows that are here
LOOKED_UP: Final = 1  # keys that were looked up
MISSED: Final = 2  # of these, not found
CROSSED: Final = 3  # of these, found but changed under the reader at every attempt
OUTCOME_FIRST: Final = 4  # + outcome: keys of batches with this outcome, those of stamp 0 excepted
EVICTED: Final = 11  # by a sweep

READ_ATTEMPTS_MAX: Final = 4  # then a key counts as missed. A row is written in under a microsecond; four in a row are rare

_DEFINED: Final = (
    *(
        "BUCKET_SLOTS",
        "SECTOR_BYTES",
        "CHUNK_BYTES",
        "READ_ATTEMPTS_MAX",
        "SCALE_BYTES",
        "RANK_SHIFT",
        "RANK_ONE",
        "TICK_MASK",
        "USES_MAX",
    ),
    *("HEADER_BYTES", "HEADER_KEY", "HEADER_STAMP", "HEADER_SCORE", "HEADER_LOCK", "HEADER_SPARE"),
    *("ABSENT", "ASSIGNED", "KEPT", "INSERTED", "REPLACED", "REFUSED", "ERASED"),
    *("COUNTERS", "SIZE", "LOOKED_UP", "MISSED", "CROSSED", "OUTCOME_FIRST", "EVICTED"),
)

_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
_GOLDEN: Final = 0x9E3779B97F4A7C15  # added first, so that key 0 is none that maps to 0


@dataclass(frozen=True, slots=True)
class Shape:
    """What the memory of a cache looks like."""

    buckets: int
    dim: int
    codec: str

    @property
    def slots(self) -> int:
        """How many rows it can hold."""
        return self.buckets * BUCKET_SLOTS

    @property
    def row_bytes(self) -> int:
        """Bytes of one encoded row, as the store has them."""
        return row_bytes(self.codec, self.dim)

    @property
    def stride(self) -> int:
        """Bytes from one row to the next in the cache."""
        return -(-self.row_bytes // CHUNK_BYTES) * CHUNK_BYTES

    @property
    def chunks(self) -> int:
        """Loads of a lane that one row takes."""
        return self.stride // CHUNK_BYTES

    @property
    def slot_bytes(self) -> int:
        """Device memory that one slot takes."""
        return 1 + HEADER_BYTES + self.stride

    @property
    def memory_bytes(self) -> int:
        """Device memory of the whole cache."""
        return self.slots * self.slot_bytes + 8 * COUNTERS


@dataclass(frozen=True, slots=True)
class Memory:
    """A cache's arrays on one device; kernels, their launchers and the reference take it as it is.

    `digests` uint8[slots], `headers` uint8[slots, 32], `rows` uint8[slots, stride], `counters` uint64[COUNTERS].
    """

    shape: Shape
    digests: Any
    headers: Any
    rows: Any
    counters: Any


@dataclass(frozen=True, slots=True)
class PooledJob:
    """One table's part in a pooled look-up; all arrays on the device.

    `keys` uint64[n]; `offsets` int64[bags + 1], from 0 to n and never falling; `weights` float32[n] or None; `out`
    float32[bags, dim]; `missed` int64[n], `missed_count` uint64[1]: indices of keys that were not found, and how many they are.
    `buffer`: like `out`, undefined, used where a row has more than 512 bytes, which no warp reads at once; None: a new one.
    """

    memory: Memory
    policy: int
    tick: int
    keys: Any
    offsets: Any
    weights: Any
    out: Any
    missed: Any
    missed_count: Any
    buffer: Any = None


def row_bytes(codec: str, dim: int) -> int:
    """Bytes of one encoded row."""
    match codec:
        case "float32":
            return 4 * dim
        case "float16" | "bfloat16":
            return 2 * dim
        case _:
            return SCALE_BYTES + -(-dim // SCALE_BYTES) * SCALE_BYTES


def buckets_for(capacity: int) -> int:
    """The fewest buckets that have `capacity` slots."""
    return -(-capacity // BUCKET_SLOTS)


def mix64(keys: U64) -> U64:
    """uint64[n]: the hash of each key; a bijection."""
    hashed = keys + np.uint64(_GOLDEN)
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(_MIX_1)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(_MIX_2)
    return hashed ^ (hashed >> np.uint64(31))


def bucket_of(hashed: U64, buckets: int) -> I64:
    """int64[n]: the bucket of each hash, the upper 64 bits of hash * buckets."""
    count = np.uint64(buckets)
    low = (hashed & np.uint64(0xFFFF_FFFF)) * count >> np.uint64(32)  # buckets are 2**31 at most: no product overflows
    return (((hashed >> np.uint64(32)) * count + low) >> np.uint64(32)).astype(np.int64)


def digest_of(hashed: U64) -> U8:
    """uint8[n], 1 to 255: what tells the keys of a bucket apart at first sight."""
    return (1 + ((hashed & np.uint64(0xFF)).astype(np.int64) * 255 >> 8)).astype(np.uint8)


def score_of(rank: int, tick: int) -> int:
    """A score; see the top of this file."""
    return (rank << RANK_SHIFT) | (tick & TICK_MASK)


def defines() -> dict[str, int]:
    """Name -> value, for the kernels: `-D NAME=VALUE`, each at most 2**64 - 1 and to be read as unsigned beyond 2**31 - 1."""
    values = {name: int(globals()[name]) for name in _DEFINED}
    values |= {"MIX_1": _MIX_1, "MIX_2": _MIX_2, "MIX_GOLDEN": _GOLDEN}
    values |= {f"CODEC_{name.upper()}": number for name, number in CODECS.items()}
    values |= {f"POLICY_{name.upper()}": number for name, number in POLICIES.items()}
    values |= {f"MODE_{name.upper()}": number for name, number in MODES.items()}
    return {f"EKKO_{name}": value for name, value in values.items()}


def define_lines() -> str:
    """The same as lines of C++, to stand before a kernel's source."""
    return "".join(f"#define {name} {value}{'ULL' if value > 0x7FFF_FFFF else ''}\n" for name, value in defines().items())
