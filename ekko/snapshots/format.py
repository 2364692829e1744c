"""What a snapshot consists of: data files, and a manifest that names them and is written last.

    1779485400000-5f3a09c1/            13 digits of Unix milliseconds: names sort by age; a random part
        0-8d1f07a2.rows                rows of model 0's table 8d1f07a2: images (`ekko.store.images`), one after the other
        0.knowledge                    msgpack: vector, frontiers, loss floor, its incomplete shards
        manifest.json                  all the rest; without it there is no snapshot

Rows are checked in chunks of some MiB, each with its xxh3; so is each knowledge file; the manifest holds its own checksum and
is in one spelling only. A flipped bit anywhere is found. An *increment* has the rows above its parent's vector, and all rows of
its `whole` shards: those in which rows were dropped that its parent may have.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from ekko.errors import ModelError, SnapshotError
from ekko.generations import Registers
from ekko.model import DENSE_ROWS_MAX, DENSE_TABLE, SHARDS_MAX, TableSpec
from ekko.store import layout
from ekko.store.images import FloorImage, KnowledgeImage
from ekko.store.manifest import ModelEntry, entry_from_json
from p2p.stamps import WRITERS_MAX

if TYPE_CHECKING:
    from typing_extensions import Buffer

U64 = NDArray[np.uint64]

FORMAT = 1
NAME = re.compile(r"[0-9]{13}-[0-9a-f]{8}")
# Files of a snapshot, so that no manifest can name anything outside its folder.
_FILE = re.compile(r"[0-9]{1,6}(-[0-9a-f]{8}\.rows|\.knowledge)")
_HEX = re.compile(r"[0-9a-f]{1,16}")
MANIFEST_BYTES_MAX = 256 << 20  # 100 GB in chunks are 25,000 lines of 40 bytes
KNOWLEDGE_BYTES_MAX = 4 << 30
# A chunk is copied, checksummed and written while it is in the processor's cache; read, checked and settled likewise.
CHUNK_BYTES = 2 << 20
CHUNK_ROWS_MAX = 1 << 20


def checksum_of(data: "Buffer") -> str:
    """xxh3 of 64 bits, in 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True, slots=True)
class TablePart:
    """The rows of one table."""

    table: int  # its id
    file: str
    stride: int  # bytes of an image
    chunks: list[tuple[int, str]] = field(default_factory=list)  # (images, checksum)

    @property
    def rows(self) -> int:
        """How many images there are."""
        return sum(rows for rows, _ in self.chunks)


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One model."""

    entry: ModelEntry
    bindings: list[tuple[int, str]]  # writer -> nonce in hexadecimal, of those in the vector that are known
    whole: list[int]  # shards of which this increment has all rows; of a full snapshot: none are named
    knowledge: str  # file
    knowledge_checksum: str
    tables: list[TablePart]


@dataclass(frozen=True, slots=True)
class SnapshotManifest:
    """Everything about a snapshot but its rows and vectors."""

    name: str
    created_ms: int
    node: str
    cluster: str  # cluster nonce in hexadecimal; "0": none
    store: str  # names the shared memory that it was made of
    lives: list[str]  # boots of the lives that used that memory, in hexadecimal
    parent: str | None  # of an increment
    parent_checksum: str | None
    models: list[ModelPart]
    registers: Registers = field(default_factory=Registers)  # aliases, and what was dropped
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return sum(table.rows * table.stride for model in self.models for table in model.tables)

    @property
    def rows(self) -> int:
        """Images in it."""
        return sum(table.rows for model in self.models for table in model.tables)


def encode_manifest(manifest: SnapshotManifest) -> bytes:
    """The bytes of `manifest.json`."""
    body = asdict(manifest) | {"registers": manifest.registers.to_json()}
    return _spelled({"checksum": checksum_of(_spelled(body)), "body": body})


def _spelled(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def decode_manifest(data: bytes, name: str) -> SnapshotManifest:
    """Understand the manifest of the snapshot of this name.

    Raises:
        SnapshotError: it is damaged, or of a newer version.
    """
    try:
        raw = json.loads(data)
        body = raw["body"]
        if int(body["format"]) > FORMAT:
            raise SnapshotError(f"snapshot {name} has format {body['format']}, this version of ekko knows {FORMAT}: upgrade it")
        if _spelled(raw) != data or raw["checksum"] != checksum_of(_spelled(body)) or body["name"] != name:
            raise ValueError("its checksum is wrong")
        return _parse(body)
    except SnapshotError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RecursionError, ModelError) as error:
        raise SnapshotError(f"the manifest of snapshot {name} is damaged: {error}") from None


def _parse(body: dict[str, Any]) -> SnapshotManifest:
    models = [_parse_model(model) for model in body["models"]]
    if len({model.entry.name for model in models}) < len(models):
        raise ValueError("it has two models of one name")
    parent = body["parent"]
    if parent is not None and not (_matched(NAME, parent) < body["name"] and isinstance(body["parent_checksum"], str)):
        raise ValueError("it stands on one that came later")
    return SnapshotManifest(
        body["name"],
        int(body["created_ms"]),
        str(body["node"]),
        _matched(_HEX, body["cluster"]),
        str(body["store"]),
        [_matched(_HEX, boot) for boot in body["lives"]],
        parent,
        body["parent_checksum"],
        models,
        Registers.from_json(body.get("registers")),
    )


def _parse_model(model: dict[str, Any]) -> ModelPart:
    entry = entry_from_json(model["entry"])
    specs = {spec.id: spec for spec in entry.tables}
    if len(specs) < len(entry.tables) or any(spec.codec != entry.codec for spec in specs.values() if spec.name != DENSE_TABLE):
        raise ValueError(f"the tables of model {entry.name!r} do not go together")
    shards = entry.bare_spec.shards  # it is checked by this
    if entry.hold is not None and (
        entry.hold != sorted(set(entry.hold)) or not set(entry.hold) <= set(range(entry.partitions))
    ):
        raise ValueError(f"model {entry.name!r} has no such partitions as {entry.hold}")
    if not all(tensor.rows <= DENSE_ROWS_MAX and min(tensor.shape, default=1) >= 0 for tensor in entry.tensors):
        raise ValueError(f"a tensor of model {entry.name!r} is too large")
    tables = [_parse_table(table, specs) for table in model["tables"]]
    if len({table.table for table in tables}) < len(tables):
        raise ValueError(f"model {entry.name!r} has a table twice")
    bindings = [(int(writer), _matched(_HEX, nonce)) for writer, nonce in model["bindings"]]
    whole = [int(shard) for shard in model["whole"]]
    if not all(0 <= writer < WRITERS_MAX for writer, _ in bindings) or not all(0 <= shard < shards for shard in whole):
        raise ValueError(f"model {entry.name!r} has no such writers or shards")
    return ModelPart(entry, bindings, whole, _matched(_FILE, model["knowledge"]), str(model["knowledge_checksum"]), tables)


def _parse_table(table: dict[str, Any], specs: dict[int, TableSpec]) -> TablePart:
    spec, stride = specs[int(table["table"])], int(table["stride"])
    if stride != layout.row_stride(spec.row_bytes):
        raise ValueError(f"rows of table {spec.name!r} have {stride} bytes, not {layout.row_stride(spec.row_bytes)}")
    chunks = [(int(rows), str(checksum)) for rows, checksum in table["chunks"]]
    if not all(0 < rows <= CHUNK_ROWS_MAX for rows, _ in chunks):
        raise ValueError(f"table {spec.name!r} has chunks without rows, or with too many")
    return TablePart(spec.id, _matched(_FILE, table["file"]), stride, chunks)


def _matched(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or pattern.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not to be expected there")
    return text


def encode_knowledge(knowledge: KnowledgeImage, floors: FloorImage) -> bytes:
    """The bytes of a knowledge file."""
    return bytes(
        msgpack.packb(
            {
                "vector": _sparse(knowledge.vector),
                "frontiers": _sparse(knowledge.frontiers.T),
                "floor": _sparse(floors.floor),
                "incomplete": floors.incomplete.tobytes(),
            }
        )
    )


def decode_knowledge(data: bytes, entry: ModelEntry) -> tuple[KnowledgeImage, FloorImage]:
    """Understand a knowledge file whose checksum was right.

    Raises:
        SnapshotError: it does not fit the model.
    """
    try:
        raw = msgpack.unpackb(data)
        vector = _dense(raw["vector"], entry.shards)
        frontiers = np.ascontiguousarray(_dense(raw["frontiers"], entry.partitions).T)
        floor = _dense(raw["floor"], entry.shards)
        incomplete = np.frombuffer(raw["incomplete"], np.uint8).copy()
        if incomplete.size != SHARDS_MAX // 8:
            raise ValueError("its bitmap has another length")
    except (KeyError, IndexError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise SnapshotError(f"the knowledge of model {entry.name!r} cannot be understood: {error}") from None
    return KnowledgeImage(vector, frontiers), FloorImage(floor, incomplete)


def _sparse(columns: U64) -> list[bytes]:
    """uint64[WRITERS_MAX, n] as the writers that have anything, and their rows."""
    writers = np.flatnonzero(columns.any(axis=1)).astype("<u2")
    return [writers.tobytes(), np.ascontiguousarray(columns[writers]).astype("<u8").tobytes()]


def _dense(sparse: list[bytes], width: int) -> U64:
    writers = np.frombuffer(sparse[0], "<u2")
    out = np.zeros((WRITERS_MAX, width), np.uint64)
    out[writers] = np.frombuffer(sparse[1], "<u8").reshape(len(writers), width)
    return out
