"""The device manifest: which tables have a cache, of which model of which store, and how another process opens it.

`run_dir/device.json` is replaced as a whole. The control file's generation is that of the newest one: whoever reads another
number in it than there came between two, and reads again.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ekko.store.access import Access

NAME: Final = "device.json"


@dataclass(frozen=True, slots=True)
class TableCache:
    """The cache of one table."""

    name: str
    dim: int
    codec: str
    rows: int  # that it has room for
    cache: str  # names this cache: another one, also of the same table, has another
    handle: dict[str, Any]  # how it is opened; see `gpu.cache`
    wanted: str  # path of the file in which readers say which keys they missed


@dataclass(frozen=True, slots=True)
class ModelCaches:
    """Those of one model."""

    name: str
    id: int
    place: int  # of its words in the control file
    tables: dict[int, TableCache]  # by the table's id


@dataclass(frozen=True, slots=True)
class DeviceManifest:
    """All of them."""

    generation: int
    device: str  # "host-twin", "cuda:0"
    store: str  # the prefix of the store's files, of which these are caches
    reason: str = ""  # why some or all rows are served from the host only; empty: all is as configured
    models: list[ModelCaches] = field(default_factory=list)

    def write(self, run_dir: Path, access: Access) -> None:
        """Replace the manifest in `run_dir`."""
        temporary = run_dir / f"{NAME}.new"
        with temporary.open("w") as file:
            access.apply(file.fileno(), temporary)
            json.dump(asdict(self), file, indent=1)
        temporary.replace(run_dir / NAME)


def read(run_dir: Path) -> DeviceManifest | None:
    """The manifest; None where there is none that can be understood."""
    try:
        raw = json.loads((run_dir / NAME).read_text())
        models = [
            ModelCaches(
                str(model["name"]),
                int(model["id"]),
                int(model["place"]),
                {int(number): TableCache(**table) for number, table in model["tables"].items()},
            )
            for model in raw["models"]
        ]
        return DeviceManifest(int(raw["generation"]), str(raw["device"]), str(raw["store"]), str(raw["reason"]), models)
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
