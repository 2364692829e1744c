"""Where every byte of the shared memory lies.

One store is a handful of files in tmpfs: a control file; per model a header file; per table a rows file and an index file. All
numbers are little-endian and naturally aligned; all files are sparse, so reserved room costs nothing. Every structure below is
also written out in `docs/reference/shared-memory-layout.md`, and a test holds the two together.

A change of anything here needs a new `LAYOUT_VERSION`: a store of another version is not resumed (R4), and a reader of another
version refuses to attach.
"""

from dataclasses import dataclass

from ekko.model import SHARDS_MAX
from p2p.stamps import WRITERS_MAX

LAYOUT_VERSION = 3

PAGE_BYTES = 4096
LINE_BYTES = 64  # words with different writers or rhythms lie on different cache lines
DIM_BYTES_MAX = 65_536  # the widest encoded row: 16,384 float32


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a structure: where it begins and how long it is."""

    name: str
    offset: int
    bytes: int
    meaning: str


@dataclass(frozen=True, slots=True)
class Structure:
    """A file or a record, and its fields in ascending order."""

    name: str
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        end = 0
        for entry in self.fields:
            assert entry.offset >= end, f"{self.name}.{entry.name} overlaps the field before it"
            end = entry.offset + entry.bytes

    def offset(self, name: str) -> int:
        """Where the field begins."""
        return next(entry.offset for entry in self.fields if entry.name == name)

    @property
    def end(self) -> int:
        """The first byte after the last field."""
        return self.fields[-1].offset + self.fields[-1].bytes


def _magic(text: str) -> int:
    return int.from_bytes(text.encode().ljust(8, b"\0"), "little")


CONTROL_MAGIC = _magic("ekkoctl")
MODEL_MAGIC = _magic("ekkomodl")
TABLE_MAGIC = _magic("ekkotabl")
INDEX_MAGIC = _magic("ekkoindx")
HOT_MAGIC = _magic("ekkohot")
HEAT_MAGIC = _magic("ekkoheat")
CHANGES_MAGIC = _magic("ekkochng")

_COMMON = (
    Field("magic", 0, 8, "tells the kind of file"),
    Field("layout_version", 8, 8, "`LAYOUT_VERSION` of the writer"),
)

CONTROL = Structure(
    "control file",
    (
        *_COMMON,
        Field("manifest_generation", 64, 8, "grows after each new manifest; readers that see it move read the manifest again"),
        Field("retired", 72, 8, "1: this store was replaced or removed; readers attach anew"),
        Field("aliases_ms", 80, 8, "Unix milliseconds up to which switches of aliases count for readers; 0: all do"),
        Field("run_dir", 128, PAGE_BYTES - 128, "where the manifest is: a path in UTF-8, then zeros; empty: it is too long"),
    ),
)
CONTROL_BYTES = PAGE_BYTES

# A writer's row image, kept while the row is overwritten in place; the image is the row as it was, its 24-byte header included.
UNDO = Structure(
    "undo record",
    (
        Field("slot_plus_one", 0, 8, "0: nothing was ever written in place; else the image is that slot's row"),
        Field("table", 8, 8, "the table's id"),
        Field("row", 64, 24 + DIM_BYTES_MAX, "the row as it was, header first"),
    ),
)
UNDO_BYTES = 17 * PAGE_BYTES
UNDO_RECORDS = 8  # one is in use; the others wait for more than one applying thread

MODEL = Structure(
    "model header file",
    (
        *_COMMON,
        Field("model", 16, 8, "the model's id"),
        Field("shards", 24, 8, "number of shards"),
        Field("synced_until_ms", 64, 8, "Unix milliseconds up to which this node has everything; 0: unknown"),
        Field("writer_bound", 128, 8, "1 while the three words after it hold a writer identity"),
        Field("writer_id", 136, 8, "12-bit writer id"),
        Field("writer_nonce", 144, 8, "its nonce (R12)"),
        Field("writer_last_stamp", 152, 8, "the last stamp it minted before it was bound"),
        Field("pending_stamp", 192, 8, "stamp of the local step being applied or applied last (R4); 0: none"),
        Field("stamp_max", 256, 8, "no row of the model has a larger stamp"),
        Field("batch_epoch", 264, 8, "grows by 2 with each applied batch; odd while one is being applied (R19)"),
        Field("unsettled", 272, 8, "0: look-ups may be consistent; else bits that say why not (R19)"),
        Field("floor_used", 320, 8, "1: something was dropped for good, and the loss floor may be looked at"),
        Field("online_from", 384, 8, "requests whose hash, its upper 32 bits, is from here on are the online model's"),
        Field("online_until", 392, 8, "and below this; all others are the baseline's. 0: all are online"),
        Field("pending_shards", PAGE_BYTES, SHARDS_MAX // 8, "bitmap of the shards that the pending step touches"),
        Field("undo", 4 * PAGE_BYTES, UNDO_RECORDS * UNDO_BYTES, "undo records (R23)"),
        Field("frontier", 144 * PAGE_BYTES, 8 * WRITERS_MAX, "uint64 per writer, in a model of one partition"),
        Field("vector", 152 * PAGE_BYTES, 0, "uint64[4096, shards]; after it frontiers, the loss floor, its bitmap"),
    ),
)


def frontiers_offset(shards: int, partitions: int) -> int:
    """Where the frontiers uint64[partitions, 4096] begin in a model's header file."""
    # A model of one partition has room for its frontier in front of the vector.
    return MODEL.offset("frontier") if partitions == 1 else MODEL.offset("vector") + shards * WRITERS_MAX * 8


def loss_floor_offset(shards: int, partitions: int = 1) -> int:
    """Where the loss floor (R5), of the vector's shape, begins in a model's header file."""
    frontiers = 0 if partitions == 1 else partitions
    return MODEL.offset("vector") + (shards + frontiers) * WRITERS_MAX * 8


def incomplete_offset(shards: int, partitions: int = 1) -> int:
    """Where the bitmap of shards begins whose loss floor is incomplete: live rows were dropped there, too (R11)."""
    return loss_floor_offset(shards, partitions) + shards * WRITERS_MAX * 8


def model_bytes(shards: int, partitions: int = 1) -> int:
    """Length of a model's header file."""
    return incomplete_offset(shards, partitions) + SHARDS_MAX // 8


TABLE = Structure(
    "table file",
    (
        *_COMMON,
        Field("table", 16, 8, "the table's id"),
        Field("row_bytes", 24, 8, "bytes of an encoded row"),
        Field("row_stride", 32, 8, "bytes from one row to the next"),
        Field("codec", 40, 8, "0: float32, 1: float16, 2: bfloat16, 3: int8"),
        Field("rows_used", 64, 8, "slots given out so far, in order; free ones are given out again"),
        Field("tombstones", 72, 8, "of those, deleted rows"),
        Field("free", 80, 8, "of those, free slots"),
        Field("index_generation", 128, 8, "number of the index file in use; grows when the index grows"),
        Field("index_ahead", 136, 8, "number of the index file that readers may map before it is in use; else not larger"),
        Field("slots_reused", 192, 8, "how often a free slot was given to a key (R18)"),
        Field("rows", PAGE_BYTES, 0, "rows, `row_stride` bytes each"),
    ),
)

# The scale of an int8 row lies in its encoded bytes, in front of the values, so it needs no field of its own.
ROW = Structure(
    "row",
    (
        Field("lock", 0, 4, "sequence lock: odd while the row is being written"),
        Field("flags", 4, 4, "bit 0: tombstone; bit 1: free; bits 16-31: slot epoch"),
        Field("stamp", 8, 8, "the version's stamp"),
        Field("key", 16, 8, "the key; another one only after the slot was free, under the lock"),
        Field("data", 24, 0, "the encoded row, padded to 8 bytes"),
    ),
)
ROW_HEADER_BYTES = 24
FLAG_TOMBSTONE = 1
FLAG_FREE = 2  # the slot belongs to no key: what else is in it means nothing
# A slot's epoch grows by one, round the end, whenever the slot is given to a key (R18).
SLOT_EPOCH_SHIFT = 16

INDEX = Structure(
    "index file",
    (
        *_COMMON,
        Field("generation", 16, 8, "the number in the file's name"),
        Field("capacity_log2", 24, 8, "binary logarithm of the number of entries"),
        Field("removed", 32, 8, "entries that are removed; too many after a kill"),
        Field("entries", PAGE_BYTES, 0, "entries, 8 bytes each"),
    ),
)

ENTRY = Structure(
    "index entry",
    (
        Field("slot", 0, 4, "the slot; where `tag` is 0, 0: empty, 1: removed"),
        Field("tag", 4, 4, "bits 0-30 of `mix64(key)`, and bit 31 set; 0: the entry holds no slot"),
    ),
)
ENTRY_BYTES = 8  # read and written as one word
ENTRY_EMPTY, ENTRY_REMOVED = 0, 1

# Counted by readers, under whatever uid: the one file of a store that others than its daemon write.
HOT_DEPTH = 4  # rows of the sketch: the least of four counters is off by more than e / width of all requests once in 55 keys
HOT_WIDTH_LOG2_MIN, HOT_WIDTH_LOG2_MAX = 12, 18
HOT_CANDIDATES = 1_024
HOT = Structure(
    "hot file",
    (
        *_COMMON,
        Field("table", 16, 8, "the table's id"),
        Field("width_log2", 24, 8, "binary logarithm of the counters in a row of the sketch"),
        Field("seed", 32, 8, "of the sketch's hash"),
        Field("salt", 40, 8, "odd; another one after each fold: which candidates compete for a place"),
        Field("lookups", 64, 8, "calls of readers"),
        Field("keys", 72, 8, "keys they asked for"),
        Field("misses", 80, 8, "of those, absent ones; an estimate from a sample"),
        Field("candidates", PAGE_BYTES, 16 * HOT_CANDIDATES, "1,024 candidates for the hottest keys"),
        Field("cells", PAGE_BYTES + 16 * HOT_CANDIDATES, 0, "uint32[4, width], the count-min sketch; they wrap around"),
    ),
)

CANDIDATE = Structure(
    "candidate",
    (
        Field("key", 0, 8, "the key"),
        Field("estimate", 8, 8, "how often it was asked for, by the sketch; 0: nobody"),
    ),
)
CANDIDATE_BYTES = 16

# What the daemon makes of the counts: they decay, and survive it.
HEAT_TOP = 1_024
HEAT = Structure(
    "heat file",
    (
        *_COMMON,
        Field("table", 16, 8, "the table's id"),
        Field("width_log2", 24, 8, "as in the hot file"),
        Field("seed", 32, 8, "as in the hot file"),
        Field("folded_ms", 64, 8, "milliseconds of the machine's monotonic clock at the last fold; 0: none yet"),
        Field("lookups", 72, 8, "calls of readers since the table is there"),
        Field("keys", 80, 8, "keys they asked for"),
        Field("misses", 88, 8, "of those, absent ones"),
        Field("lookups_seen", 96, 8, "`lookups` of the hot file at the last fold"),
        Field("keys_seen", 104, 8, "`keys` of it"),
        Field("misses_seen", 112, 8, "`misses` of it"),
        Field("requests", 120, 8, "float64: keys asked for, decayed"),
        Field("top_count", 128, 8, "keys in `top`"),
        Field("top", PAGE_BYTES, 8 * HEAT_TOP, "uint64: the hottest keys, hottest first"),
        Field("cells", 3 * PAGE_BYTES, 0, "float32[4, width], decayed; then uint32[4, width], the hot file's at the last fold"),
    ),
)

# Which rows changed lately, for sinks. A store that was made without this file gets one: the version need not say so.
CHANGES_LOG2 = 16  # entries: 1 MiB; half a second of 100,000 rows a second, and who is further behind looks at all rows
CHANGES = Structure(
    "changes file",
    (
        *_COMMON,
        Field("capacity_log2", 16, 8, "binary logarithm of the number of entries"),
        Field("breaks", 64, 8, "grows whenever changes may be missing: a daemon attached, or there was no memory"),
        Field("reserved", 128, 8, "entries up to here, modulo the capacity, may be overwritten just now"),
        Field("head", 136, 8, "entries noted so far"),
        Field("entries", PAGE_BYTES, 0, "the youngest entries, 16 bytes each: entry n at n modulo the capacity"),
    ),
)

CHANGE = Structure(
    "change",
    (
        Field("key", 0, 8, "the key"),
        Field("table", 8, 4, "the table's id"),
        Field("gone", 12, 4, "1: the row was dropped for good; 0: it was written or deleted"),
    ),
)
CHANGE_BYTES = 16

STRUCTURES = (CONTROL, MODEL, UNDO, TABLE, ROW, INDEX, ENTRY, HOT, CANDIDATE, HEAT, CHANGES, CHANGE)


def changes_bytes() -> int:
    """Length of a changes file."""
    return CHANGES.offset("entries") + (CHANGE_BYTES << CHANGES_LOG2)


def hot_bytes(width_log2: int) -> int:
    """Length of a hot file."""
    return HOT.offset("cells") + (4 * HOT_DEPTH << width_log2)


def heat_bytes(width_log2: int) -> int:
    """Length of a heat file."""
    return HEAT.offset("cells") + (8 * HOT_DEPTH << width_log2)


def row_stride(row_bytes: int) -> int:
    """Bytes from one row to the next: header and data, padded to 8 bytes so that stamps and keys are aligned."""
    return ROW_HEADER_BYTES + (row_bytes + 7 & ~7)


def index_bytes(capacity_log2: int) -> int:
    """Length of an index file."""
    return INDEX.offset("entries") + (ENTRY_BYTES << capacity_log2)
