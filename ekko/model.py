"""Models and tables: names, widths, shards, and how they become the p2p layer's keyspaces.

A model's id is xxh32 of its name, a table's id is xxh32 of the table's name. A model is one p2p *keyspace*, or, in several
partitions, a family of as many. The schema is a grow-only set of entries that nodes gossip; each entry is canonical msgpack, so
that equal facts are equal bytes.

A model's codec says how the rows of its tables are stored and sent; `ekko.codec` has the arithmetic.

Dense tensors are flattened into rows of `DENSE_DIM` float32 in the reserved table `_dense`, whatever the model's codec,
`key = (xxh64(name) << 20) | row`; their shape and dtype are schema entries.
"""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any, Final

import msgpack
import numpy as np
import xxhash

from ekko.errors import ModelError
from p2p.errors import RemoteProtocolError
from p2p.replica import PARTITIONS_MAX, SchemaEntry
from p2p.stamps import EPOCH_MS, make_stamp
from p2p.versions import FIRST_VERSION

DENSE_TABLE = "_dense"
# The key of a dense tensor's row: its name's hash, and the row's number in so many bits.
TENSOR_KEY_BITS = 20
DENSE_DIM = 256
DENSE_ROWS_MAX = 1 << 20  # rows of one tensor; the key keeps 20 bits for them
SHARDS_DEFAULT = 64
# Ends the name of what a parameter server keeps of a model beside what is served (`ekko.train.server`): only nodes whose
# configuration says so hold any of it.
TRAINING_SUFFIX: Final = ".training"
# Of a training model: what an optimiser keeps of the rows of a table, how many steps that had, and which pushes count.
STATE_SUFFIX: Final = ".state"
STEPS_SUFFIX: Final = ".steps"
MARKS_TABLE: Final = "_marks"
SHARDS_MAX = 65_536
DIM_MAX = 16_384
TABLES_MAX = 4_096
TENSORS_MAX = 65_536
INCARNATION_MAX: Final = (1 << 32) - 1
CODEC_DEFAULT = "float32"
TTL_S_MAX = 100 * 365 * 86_400
_TTL_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")


@lru_cache(4_096)  # asked at every publish
def model_id(name: str) -> int:
    """uint32 id of a model; the id of its p2p family."""
    return int(xxhash.xxh32_intdigest(name.encode()))


def keyspace_id(label: str, partition: int, partitions: int) -> int:
    """uint32 id of the p2p keyspace that a partition of a model is; `label` as in `ModelSpec`."""
    # No name has a slash, so these are not names of other models.
    return model_id(label) if partitions == 1 else model_id(f"{label}/{partition}")


@lru_cache(4_096)  # asked several times a batch
def table_id(name: str) -> int:
    """uint32 id of a table inside its model."""
    return int(xxhash.xxh32_intdigest(name.encode()))


def check_name(kind: str, name: str) -> str:
    """Return `name`, or refuse it.

    Raises:
        ModelError: not 1 to 100 of letters, digits, `_`, `-`, `.`; or it starts with `-` or `.`.
    """
    if not isinstance(name, str) or NAME_PATTERN.fullmatch(name) is None:
        raise ModelError(
            f"{kind} name {name!r} is not usable: use 1 to 100 letters, digits, '_', '-' or '.', not starting with '-' or '.'"
        )
    return name


def check_incarnation(kind: str, name: str, incarnation: int) -> None:
    """Refuse a number that is none of an incarnation.

    Raises:
        ModelError: naming the range.
    """
    if type(incarnation) is not int or not 0 <= incarnation <= INCARNATION_MAX:
        raise ModelError(f"{kind} {name!r} has incarnation {incarnation!r}: expected 0 to {INCARNATION_MAX}")


def label_of(name: str, incarnation: int) -> str:
    """The name of what has it as the so many-th: no two that ever were have the same one."""
    return name if not incarnation else f"{name}#{incarnation}"  # no name has a number sign


def training_name(model: str) -> str:
    """The model in which a parameter server keeps what it trains of `model`."""
    return model + TRAINING_SUFFIX


def served_name(model: str) -> str:
    """The model that is served of what a parameter server keeps in `model`; any other model itself."""
    return model.removesuffix(TRAINING_SUFFIX)


def is_training(model: str) -> bool:
    """Whether the model is one of those: no node holds it unasked."""
    return model.endswith(TRAINING_SUFFIX)


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """How a row of `dim` values is laid out: the scale if there is one, the values, zeros up to a multiple of `align`."""

    number: int  # in shared memory
    value_bytes: int
    scale_bytes: int = 0
    align: int = 1

    def row_bytes(self, dim: int) -> int:
        """Bytes of one encoded row."""
        return self.scale_bytes + -(-dim * self.value_bytes // self.align) * self.align


# An int8 row begins with its float32 scale, and is padded so that the next row's scale is aligned too.
CODECS: Final = {
    CODEC_DEFAULT: CodecSpec(0, 4),
    "float16": CodecSpec(1, 2),
    "bfloat16": CodecSpec(2, 2),
    "int8": CodecSpec(3, 1, scale_bytes=4, align=4),
}


def check_codec(kind: str, name: str, codec: str) -> str:
    """Return `codec`, or refuse it.

    Raises:
        ModelError: there is no such codec.
    """
    if not isinstance(codec, str) or codec not in CODECS:
        raise ModelError(f"{kind} {name!r} asks for codec {codec!r}: there are {', '.join(map(repr, CODECS))}")
    return codec


def ttl_seconds(table: str, ttl: object) -> int:
    """Seconds, from a whole number of them or text such as "30d": s, m, h, d, w; 0 or "": rows of the table never expire.

    Raises:
        ModelError: it is neither.
    """
    if ttl == "" or (isinstance(ttl, int) and not isinstance(ttl, bool) and 0 <= ttl <= TTL_S_MAX):
        return int(ttl or 0)
    parts = re.fullmatch(r"(\d{1,12})([smhdw])", ttl) if isinstance(ttl, str) else None
    seconds = int(parts[1]) * _TTL_UNITS[parts[2]] if parts else 0
    if not 1 <= seconds <= TTL_S_MAX:
        raise ModelError(
            f'table {table!r} has ttl = {ttl!r}: expected a time such as "90s", "12h" or "30d", of 1 second to 100 years'
        )
    return seconds


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One embedding table: `float32[dim]` to its users, stored as `codec` encodes it.

    `ttl_s`: a row whose last update is so many seconds ago counts as deleted, on all nodes alike; 0: never.
    `incarnation`: how many tables of this name were dropped from the model before it.
    """

    name: str
    dim: int
    codec: str = CODEC_DEFAULT
    ttl_s: int = 0
    incarnation: int = 0

    def __post_init__(self) -> None:
        check_name("table", self.name)
        if not isinstance(self.dim, int) or not 1 <= self.dim <= DIM_MAX:
            raise ModelError(f"table {self.name!r} has dim {self.dim!r}: expected a whole number from 1 to {DIM_MAX}")
        check_codec("table", self.name, self.codec)
        ttl_seconds(self.name, self.ttl_s)
        check_incarnation("table", self.name, self.incarnation)

    @property
    def id(self) -> int:
        return table_id(label_of(self.name, self.incarnation))

    @property
    def since(self) -> int:
        """The first protocol version whose nodes understand this table."""
        return EXTRAS_SINCE if self.ttl_s or self.incarnation else FIRST_VERSION

    def stamp_min(self, unix_ms: int) -> int:
        """The smallest stamp of a row that has not expired at this moment; 0: none ever does."""
        return make_stamp(max(unix_ms - 1_000 * self.ttl_s, EPOCH_MS), 0, 0) if self.ttl_s else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one encoded row."""
        return _row_bytes(self.codec, self.dim)


@lru_cache(4_096)  # asked several times a batch
def _row_bytes(codec: str, dim: int) -> int:
    return CODECS[codec].row_bytes(dim)


DENSE_SPEC: Final = TableSpec(DENSE_TABLE, DENSE_DIM)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A dense tensor's shape and dtype (NumPy name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def rows(self) -> int:
        """Rows of `DENSE_DIM` float32 that hold it."""
        return -(-prod(self.shape) // DENSE_DIM)

    @property
    def keys(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """uint64[rows]: the keys of its rows in `_dense`."""
        base = (xxhash.xxh64_intdigest(self.name.encode()) << TENSOR_KEY_BITS) & 0xFFFF_FFFF_FFFF_FFFF
        return np.uint64(base) | np.arange(self.rows, dtype=np.uint64)


@dataclass(slots=True)
class ModelSpec:
    """A model's schema: what exists, not what is in it. Grows; never shrinks."""

    name: str
    shards: int = SHARDS_DEFAULT
    tables: dict[str, TableSpec] = field(default_factory=dict)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    partitions: int = 1
    codec: str = CODEC_DEFAULT  # of all its tables
    incarnation: int = 0  # how many models of this name were dropped before it

    def __post_init__(self) -> None:
        check_name("model", self.name)
        check_incarnation("model", self.name, self.incarnation)
        check_codec("model", self.name, self.codec)
        if not isinstance(self.shards, int) or not 1 <= self.shards <= SHARDS_MAX:
            raise ModelError(
                f"model {self.name!r} has shards = {self.shards!r}: expected a whole number from 1 to {SHARDS_MAX}"
            )
        partitions_max = min(self.shards, PARTITIONS_MAX)
        if not isinstance(self.partitions, int) or not 1 <= self.partitions <= partitions_max:
            raise ModelError(
                f"model {self.name!r} has partitions = {self.partitions!r}: expected a whole number from 1 to {partitions_max} "
                f"(of {self.shards} shards)"
            )

    @property
    def label(self) -> str:
        """What its ids come from: no two models that ever were have the same one."""
        return label_of(self.name, self.incarnation)

    @property
    def id(self) -> int:
        return model_id(self.label)

    @property
    def keyspaces(self) -> tuple[int, ...]:
        """The p2p keyspace of each partition."""
        return tuple(keyspace_id(self.label, partition, self.partitions) for partition in range(self.partitions))

    def bare(self) -> "ModelSpec":
        """The same model, without tables and tensors."""
        return replace(self, tables={}, tensors={})

    @property
    def since(self) -> int:
        """The first protocol version whose nodes understand this model."""
        said = self.partitions, self.codec, self.incarnation
        own = FIRST_VERSION if said == _AS_ALWAYS[2:] else EXTRAS_SINCE
        return max(own, *(table.since for table in self.tables.values())) if self.tables else own

    def entries(self) -> list[SchemaEntry]:
        """The model as schema entries, sorted by name."""
        entries = [SchemaEntry(self.id, "model", _body(self), self.bare().since)]
        entries += [SchemaEntry(self.id, f"table:{t.name}", _body(t), t.since) for t in self.tables.values()]
        entries += [SchemaEntry(self.id, f"tensor:{t.name}", _body(t)) for t in self.tensors.values()]
        return sorted(entries, key=lambda entry: entry.name)


# What a model's entry leaves out at its end: partitions, codec and incarnation, which came with protocol version 2; and a
# table's: its ttl and incarnation.
EXTRAS_SINCE: Final = 2
_AS_ALWAYS: Final[tuple[Any, ...]] = (None, None, 1, CODEC_DEFAULT, 0)
_TABLE_AS_ALWAYS: Final[tuple[Any, ...]] = (None, None, None, 0, 0)


def _body(fact: ModelSpec | TableSpec | TensorSpec) -> bytes:
    match fact:
        case ModelSpec():
            # What is as always is not said: earlier versions understand such a model, and equal facts are equal bytes.
            body: list[object] = [fact.name, fact.shards, fact.partitions, fact.codec, fact.incarnation]
            while body[2:] and body[-1] == _AS_ALWAYS[len(body) - 1]:
                body.pop()
        case TableSpec():
            body = [fact.name, fact.dim, fact.codec, fact.ttl_s, fact.incarnation]
            while body[3:] and body[-1] == _TABLE_AS_ALWAYS[len(body) - 1]:
                body.pop()
        case TensorSpec():
            body = [fact.name, list(fact.shape), fact.dtype]
    return bytes(msgpack.packb(body))


def parse_entry(entry: SchemaEntry) -> ModelSpec | TableSpec | TensorSpec:
    """Understand one schema entry from a peer; a `ModelSpec` comes back without tables.

    Raises:
        RemoteProtocolError: it is not an entry that `ModelSpec.entries` could have made.
    """
    fact = _parse(entry)
    # Nodes compare bytes: one fact in two spellings would be news for ever, and be sent around for ever.
    if _body(fact) != entry.body:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return fact


def _parse(entry: SchemaEntry) -> ModelSpec | TableSpec | TensorSpec:
    try:
        body: list[Any] = msgpack.unpackb(entry.body)
        match entry.name.split(":", 1):
            case ["model"]:
                name, shards, partitions, codec, incarnation = (*body, *_AS_ALWAYS[len(body) :])
                spec = ModelSpec(name, shards, partitions=partitions, codec=codec, incarnation=incarnation)
                if spec.id != entry.keyspace:
                    raise RemoteProtocolError(f"model {name!r} does not have id {entry.keyspace}")
                return spec
            case ["table", label]:
                name, dim, codec, ttl_s, incarnation = (*body, *_TABLE_AS_ALWAYS[len(body) :])
                if name == label and type(ttl_s) is int:
                    return TableSpec(name, dim, codec, ttl_s, incarnation)
            case ["tensor", label]:
                name, shape, dtype = body
                tensor = TensorSpec(name, tuple(int(n) for n in shape), np.dtype(dtype).name)
                if name == label and min(tensor.shape, default=1) >= 0 and tensor.rows <= DENSE_ROWS_MAX:
                    return tensor
    except RemoteProtocolError:
        raise
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood")
