"""What a schema costs before there is a row, and how much of it a node takes.

Every node of a cluster has every model and table, so one publisher, or one member that lies, spends the memory of all of them.
What a node's own configuration names it has for good reason; of the rest, `UNASKED_BYTES_MAX` is the bound. Three others hold
for everything: a node tells all of its schema in one hello, and something of every keyspace in its heartbeats.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from ekko.errors import ModelError
from ekko.model import ModelSpec
from ekko.store import layout
from ekko.store.table import INDEX_LOG2_MIN

MODELS_MAX: Final = 1_024
# Of all models together, partitions that are not held here included.
KEYSPACES_MAX: Final = 4_096
# Facts about models, tables and tensors, and their bytes: half of what a header may have (`p2p.wire`).
ENTRIES_MAX: Final = 65_536
ENTRY_BYTES_MAX: Final = 4 << 20
# Shared memory of models and tables that peers and publishers brought, rows not counted: 200 models of 64 shards.
UNASKED_BYTES_MAX: Final = 1 << 30

_ENTRY_BYTES: Final = 12  # of an entry, beside its name and body
# The smallest a table may be: the first page of its rows, its index, and what readers count.
_TABLE_BYTES: Final = (
    layout.PAGE_BYTES
    + layout.index_bytes(INDEX_LOG2_MIN)
    + layout.hot_bytes(layout.HOT_WIDTH_LOG2_MIN)
    + layout.heat_bytes(layout.HOT_WIDTH_LOG2_MIN)
)


class NoRoomError(ModelError):
    """Nothing is wrong with a schema but its size."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What some facts of a schema cost."""

    models: int = 0
    keyspaces: int = 0
    entries: int = 0
    entry_bytes: int = 0
    memory_bytes: int = 0

    def __add__(self, other: Self) -> "Cost":
        return Cost(
            self.models + other.models,
            self.keyspaces + other.keyspaces,
            self.entries + other.entries,
            self.entry_bytes + other.entry_bytes,
            self.memory_bytes + other.memory_bytes,
        )


def cost_of(spec: ModelSpec, but: ModelSpec | None = None) -> Cost:
    """What a model costs with its tables and tensors, those left out that `but` has already."""
    tables = spec.tables.keys() - (but.tables.keys() if but is not None else ())
    tensors = spec.tensors.keys() - (but.tensors.keys() if but is not None else ())
    new = ModelSpec(
        spec.name,
        spec.shards,
        {name: spec.tables[name] for name in tables},
        {name: spec.tensors[name] for name in tensors},
        spec.partitions,
        spec.codec,
        spec.incarnation,
    )
    entries = [entry for entry in new.entries() if but is None or entry.name != "model"]
    header = layout.model_bytes(spec.shards, spec.partitions) if but is None else 0  # the loss floor's pages, too
    dense = bool(tensors) and (but is None or not but.tensors)
    return Cost(
        int(but is None),
        spec.partitions if but is None else 0,
        len(entries),
        sum(len(entry.name) + len(entry.body) + _ENTRY_BYTES for entry in entries),
        header + (len(tables) + dense) * _TABLE_BYTES,
    )


def check_room(held: Iterable[Cost], new: Iterable[Cost], unasked_bytes: int) -> None:
    """Refuse more than there may be.

    Args:
        held: what there is.
        new: what is to be.
        unasked_bytes: what of all that would be memory that no configuration asked for; 0 where one asks.

    Raises:
        NoRoomError: naming the bound, and the remedy.
    """
    more = sum(new, Cost())
    total = sum(held, more)
    for name, wanted, fill, bound in (
        ("models", more.models, total.models, MODELS_MAX),
        ("partitions of models", more.keyspaces, total.keyspaces, KEYSPACES_MAX),
        ("models, tables and tensors", more.entries, total.entries, ENTRIES_MAX),
        ("bytes of names and shapes", more.entry_bytes, total.entry_bytes, ENTRY_BYTES_MAX),
    ):
        if wanted and fill > bound:
            raise NoRoomError(f"this node has {fill - wanted} {name}, room for {bound}: not for {wanted} more")
    if more.memory_bytes and unasked_bytes > UNASKED_BYTES_MAX:
        raise NoRoomError(
            f"models that peers and publishers brought would take {unasked_bytes} bytes of shared memory before any row, "
            f"limit {UNASKED_BYTES_MAX}: name those that are wanted in this node's configuration"
        )
