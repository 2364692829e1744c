"""What is cached of a table, as the configuration says."""

from dataclasses import dataclass
from typing import Final, Literal

from ekko.model import DENSE_TABLE, TableSpec
from gpu.layout import Shape

Policy = Literal["lru", "lfu", "priority"]

HOST_TWIN: Final = "host-twin"
ROWS_DEFAULT: Final = 65_536
POLICY_DEFAULT: Final[Policy] = "lru"


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How large the cache of each table of a model is, and which rows leave it first.

    Args:
        rows: that it has room for; 0: the model has no caches.
        bytes: of device memory for each table's cache instead; None: `rows` says.
        policy: which row leaves when one comes into a full bucket.
    """

    rows: int = ROWS_DEFAULT
    bytes: int | None = None
    policy: Policy = POLICY_DEFAULT

    def rows_of(self, table: TableSpec) -> int:
        """Rows of the cache of this table; 0: it has none."""
        if table.name == DENSE_TABLE or table.ttl_s:
            # A row of a table with a ttl is gone at a moment of which no batch tells: readers of shared memory compare its
            # stamp with the clock, and the device's kernels know neither.
            return 0
        if self.bytes is None:
            return self.rows
        return self.bytes // Shape(1, table.dim, table.codec).slot_bytes


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """Of a node.

    Args:
        name: of the device: "cuda:0", or "host-twin".
        default: of models that `models` does not name.
        models: by name.
    """

    name: str
    default: CacheSettings
    models: dict[str, CacheSettings]

    def of(self, model: str) -> CacheSettings:
        """Of one model."""
        return self.models.get(model, self.default)
