"""Where samples of many nodes meet: every node hears of every closed window of the others, and adds them up for itself.

Scorers report to their own node, and a baseline's to the baseline's node; so no node sees both arms, and what is judged has to
meet somewhere. Each closed window of a node becomes one passing entry of the schema's exchange: 150 bytes, flooded once, kept
for a while, and repeated with the next two windows instead of being repaired. So every node that judges has the same numbers,
almost always, and the same opinion; where it has not, verdicts merge (`ekko.health.verdicts`). Nobody collects for the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgpack
import numpy as np

from ekko.generations import Generation
from ekko.health.samples import FIELDS, Sample
from ekko.health.windows import Pair
from ekko.model import EXTRAS_SINCE, INCARNATION_MAX, check_name, label_of, model_id
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

# Windows of one node and model that are remembered: more than are judged at once, and than are repeated.
WINDOWS_MAX: Final = 16
# Of all nodes and models: 256 nodes that report on one.
SUMMARIES_MAX: Final = 4_096
# How often a window is told: with those after it. One that is lost so often is not missed by anybody's life.
TOLD_TIMES: Final = 3
WINDOW_MS_MAX: Final = 86_400_000
_WINDOW_MAX: Final = 1 << 47
_KIND: Final = "quality"

Key = tuple[Generation, str, int, int]  # model, node, window_ms, window


@dataclass(frozen=True, slots=True)
class Summaries:
    """Closed windows of nodes, as far as a node has heard of them. Never changed: `merged` makes new ones."""

    windows: Mapping[Key, bytes] = field(default_factory=dict)  # float32[2, FIELDS]

    KINDS: ClassVar[tuple[str, ...]] = (_KIND,)
    PASSING: ClassVar[bool] = True

    def pair(self, model: Generation, window_ms: int, window: int) -> tuple[Pair, tuple[str, ...]]:
        """All nodes' samples of a window together, and which nodes those are."""
        online, baseline, nodes = Sample(), Sample(), []
        for (one, node, length, number), packed in self.windows.items():
            if (one, length, number) == (model, window_ms, window):
                mine = _unpacked(packed)
                online, baseline = online + mine[0], baseline + mine[1]
                nodes.append(node)
        return (online, baseline), tuple(nodes)

    def numbers(self, window_ms: int) -> list[tuple[Generation, int]]:
        """Which windows of which models there are, in order of time."""
        there = {(window, model) for model, _, length, window in self.windows if length == window_ms}
        return [(model, window) for window, model in sorted(there)]

    def told(self, model: Generation, node: str, window_ms: int, window: int) -> list[SchemaEntry]:
        """What a node says when it has closed a window: that one, and the ones before, once more."""
        newest = range(window - TOLD_TIMES + 1, window + 1)
        keys = [(model, node, window_ms, number) for number in newest if number >= 0]
        return [_entry_of(key, self.windows[key]) for key in keys if key in self.windows]

    @staticmethod
    def of(model: Generation, node: str, window_ms: int, window: int, pair: Pair) -> "Summaries":
        """One window of one node."""
        return Summaries({(model, node, window_ms, window): b"".join(arm.to_array().tobytes() for arm in pair)})

    def merged(self, other: "Summaries") -> "Summaries":
        """See `ekko.facts.FactSet`."""
        return self._with(other.windows.items())

    def _with(self, new: Iterable[tuple[Key, bytes]]) -> "Summaries":
        kept = dict(self.windows)
        for key, packed in new:
            kept[key] = max(kept.get(key, b""), packed, key=_rank)
        if kept == self.windows:
            return self
        left: dict[tuple[Generation, str], int] = {}
        windows: dict[Key, bytes] = {}
        for key in sorted(kept, key=lambda key: (key[3] * key[2], key), reverse=True):
            taken = left.get(key[:2], 0)
            if taken < WINDOWS_MAX and len(windows) < SUMMARIES_MAX:
                left[key[:2]] = taken + 1
                windows[key] = kept[key]
        return self if windows == self.windows else Summaries(dict(sorted(windows.items())))

    def without(self, over: Callable[[Generation], bool]) -> "Summaries":
        """See `ekko.facts.FactSet`."""
        gone = {model for model, _, _, _ in self.windows if over(model)}
        return self if not gone else Summaries({key: one for key, one in self.windows.items() if key[0] not in gone})

    def learned(self, entries: Sequence[SchemaEntry]) -> "Summaries":
        """See `ekko.facts.FactSet`."""
        return self._with([_parse(entry) for entry in entries])

    def entries(self) -> list[SchemaEntry]:
        """See `ekko.facts.FactSet`."""
        return [_entry_of(key, packed) for key, packed in self.windows.items()]


def _rank(packed: bytes) -> tuple[float, bytes]:
    """Of two summaries of one window the one of more events counts: of a node that was restarted in the middle of it."""
    return (float(np.frombuffer(packed, np.float32).reshape(2, FIELDS)[:, 0].sum()) if packed else -1.0), packed


def _unpacked(packed: bytes) -> Pair:
    online, baseline = np.frombuffer(packed, np.float32).reshape(2, FIELDS)
    return Sample.from_array(online), Sample.from_array(baseline)


def _entry_of(key: Key, packed: bytes) -> SchemaEntry:
    model, node, window_ms, window = key
    body = bytes(msgpack.packb([model.name, model.incarnation, node, window_ms, window, packed]))
    number = model_id(label_of(model.name, model.incarnation))
    return SchemaEntry(number, f"{_KIND}:{node}:{window_ms}:{window}", body, EXTRAS_SINCE)


def _parse(entry: SchemaEntry) -> tuple[Key, bytes]:
    """A summary of a peer.

    Raises:
        RemoteProtocolError: it is none that `_entry_of` could have made.
    """
    try:
        name, incarnation, node, window_ms, window, packed = msgpack.unpackb(entry.body)
        for number, number_max in ((incarnation, INCARNATION_MAX), (window_ms, WINDOW_MS_MAX), (window, _WINDOW_MAX)):
            if type(number) is not int or not 0 <= number <= number_max:
                raise ValueError(f"{number!r}")
        if not window_ms or type(packed) is not bytes:
            raise ValueError("no window")
        _unpacked(packed)
        key: Any = (Generation(check_name("model", name), incarnation), check_name("node", node), window_ms, window)
        same = _entry_of(key, packed)
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    if same != entry:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return key, packed
