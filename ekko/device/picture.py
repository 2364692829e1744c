"""What is to be said of a node's caches: for /status, the metrics, and `ekko status`."""

from dataclasses import asdict, dataclass, field
from typing import Any, Final

# Counts of the daemon's side, and what they count.
COUNT_MEANINGS: Final = {
    "updated": "Keys that changed in the store and were offered to a cache.",
    "wanted": "Keys that readers missed and asked for, repeats included.",
    "wanted_absent": "Of those that differ, keys that the store does not have.",
    "wanted_lost": "Of these, wishes that were overwritten by later ones before they were read.",
    "offered": "Rows that were missed, and offered to a cache.",
    "compared": "Tables of which all cached rows were compared with the store, since too much had changed.",
}


@dataclass(frozen=True, slots=True)
class DevicePicture:
    """What is to be said of a node's caches at one moment."""

    name: str
    serving: bool  # some table has a cache
    reason: str  # why not all of them have; empty: they have
    behind_ms: int  # how much older than the store they are, at most
    waiting: int  # keys that changed, and are not on the device yet
    waiting_max: int
    overflows: int  # times that more changed than may wait
    counts: dict[str, int] = field(default_factory=dict)
    models: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # model -> table -> figures

    def to_json(self) -> dict[str, object]:
        """For /status."""
        return asdict(self)
