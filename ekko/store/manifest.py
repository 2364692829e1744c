"""The manifest: which files in shared memory make up a store, and what is in them.

`run_dir/manifest.json` is replaced as a whole, so that a reader sees an old one or a new one. The control file's
`manifest_generation` grows after each replacement; its `retired` word says that another store took this one's place.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ekko.errors import StoreError
from ekko.generations import Generation, Registers
from ekko.model import CODEC_DEFAULT, ModelSpec, TableSpec, TensorSpec
from ekko.store import layout
from ekko.store.access import DEFAULT_ACCESS, Access

MANIFEST_NAME = "manifest.json"
_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the store."""

    name: str
    shards: int
    capacity_rows: int
    tables: list[TableSpec] = field(default_factory=list)  # `_dense` included
    tensors: list[TensorSpec] = field(default_factory=list)
    partitions: int = 1
    hold: list[int] | None = None  # partitions that are here, ascending; None: all
    codec: str = CODEC_DEFAULT
    incarnation: int = 0

    @property
    def generation(self) -> Generation:
        """Which model it is."""
        return Generation(self.name, self.incarnation)

    @property
    def bare_spec(self) -> ModelSpec:
        """The model without tables and tensors."""
        return ModelSpec(self.name, self.shards, partitions=self.partitions, codec=self.codec, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a process needs to attach."""

    boot_id: str
    memory_dir: str
    prefix: str  # of all file names, new with each creation
    models: list[ModelEntry] = field(default_factory=list)
    layout_version: int = layout.LAYOUT_VERSION
    registers: Registers = field(default_factory=Registers)  # they outlive the memory


# File names below the prefix.
CONTROL_NAME = "control"


def header_name(model_id: int) -> str:
    """The model's header file."""
    return f"{model_id:08x}-header"


def rows_name(model_id: int, table_id: int) -> str:
    """The table's rows file."""
    return f"{model_id:08x}-{table_id:08x}-rows"


def index_name(model_id: int, table_id: int, generation: int) -> str:
    """The table's index file of this generation."""
    return f"{model_id:08x}-{table_id:08x}-index-{generation}"


def hot_name(model_id: int, table_id: int) -> str:
    """What readers count of the table."""
    return f"{model_id:08x}-{table_id:08x}-hot"


def heat_name(model_id: int, table_id: int) -> str:
    """What the daemon makes of those counts."""
    return f"{model_id:08x}-{table_id:08x}-heat"


def undo_name(model_id: int) -> str:
    """Of the file in which a parameter server keeps rows as they were before a step (`ekko.train.server.undo`)."""
    return f"{model_id:08x}-undo"


def changes_name(model_id: int) -> str:
    """Which rows of the model changed lately."""
    return f"{model_id:08x}-changes"


def kernel_boot_id() -> str:
    """Names the life of the machine: memory of another boot is gone."""
    return _BOOT_ID_PATH.read_text().strip()


def prefix_of(run_dir: Path) -> str:
    """What the names of all files of this run_dir begin with, whichever store made them."""
    return f"ekko-{xxhash.xxh64_hexdigest(str(run_dir.resolve()).encode())}"


def write_manifest(run_dir: Path, manifest: Manifest, access: Access = DEFAULT_ACCESS) -> None:
    """Replace the manifest as a whole, durably."""
    temporary = run_dir / f"{MANIFEST_NAME}.new"
    with temporary.open("w") as file:
        access.apply(file.fileno(), temporary)
        json.dump(asdict(manifest) | {"registers": manifest.registers.to_json()}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run_dir / MANIFEST_NAME)


def entry_from_json(model: dict[str, Any]) -> ModelEntry:
    """What `asdict` made of an entry, here or in a snapshot; raises whatever comes when it is damaged."""
    return ModelEntry(
        str(model["name"]),
        int(model["shards"]),
        int(model["capacity_rows"]),
        [
            TableSpec(table["name"], table["dim"], table["codec"], table.get("ttl_s", 0), table.get("incarnation", 0))
            for table in model["tables"]
        ],
        [TensorSpec(tensor["name"], tuple(tensor["shape"]), tensor["dtype"]) for tensor in model["tensors"]],
        int(model.get("partitions", 1)),
        None if model.get("hold") is None else [int(partition) for partition in model["hold"]],
        model.get("codec", CODEC_DEFAULT),  # not there in a manifest of an older version
        int(model.get("incarnation", 0)),
    )


def read_manifest(run_dir: Path) -> Manifest | None:
    """The manifest, or None when there is none.

    Raises:
        StoreError: there is one, but it makes no sense.
    """
    path = run_dir / MANIFEST_NAME
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        raw = json.loads(text)
        models = [entry_from_json(model) for model in raw["models"]]
        registers = Registers.from_json(raw.get("registers"))
        return Manifest(
            str(raw["boot_id"]), str(raw["memory_dir"]), str(raw["prefix"]), models, int(raw["layout_version"]), registers
        )
    except Exception as error:  # a damaged file can fail in any way
        raise StoreError(f"{path} cannot be understood ({error}): remove it, and start the node again") from error
