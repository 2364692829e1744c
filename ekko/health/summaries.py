"""Where samples of many nodes meet: every node hears of every closed window of the others, and adds them up for itself.

Scorers report to their own node, and a baseline's to the baseline's node; so no node sees both arms, and what is judged has to
meet somewhere. Each closed window of a node becomes one passing entry of the schema's exchange: some hundred bytes, flooded
once, kept for a while, and repeated with the next two windows. When a node comes back that was cut off, everybody tells it once
more what is kept (`told_again`). So all nodes that judge have the same numbers, almost always, and the same opinion; where they
have not, verdicts merge (`ekko.health.verdicts`). Nobody collects for the others. What was never heard of shows: each window
says how many events its node has told of by then.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgpack

from ekko.generations import Generation
from ekko.health.samples import Sample
from ekko.health.windows import Pair
from ekko.model import EXTRAS_SINCE, INCARNATION_MAX, check_name, label_of, model_id
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

# Windows of one node and model that are remembered: of the default length, for as long a cut as ten minutes.
WINDOWS_MAX: Final = 64
# Of all nodes and models: 128 nodes that report on one; 10 MB.
SUMMARIES_MAX: Final = 8_192
# How often a window is told: with those after it. One that is lost so often is not missed by anybody's life.
TOLD_TIMES: Final = 3
# Of one node, when somebody comes back: ten minutes of sixteen models; a megabyte at most.
TOLD_AGAIN_MAX: Final = 1_024
WINDOW_MS_MAX: Final = 86_400_000
_WINDOW_MAX: Final = 1 << 47
_KIND: Final = "quality"
# Of events of one node's life.
TOTAL_MAX: Final = 1e15

# Events of closed windows that the node has told of in this life, this one included; and how many bytes the online arm takes.
_HEAD: Final = struct.Struct("<dI")

Source = tuple[Generation, str]  # model, node
Number = tuple[int, int]  # window_ms, window
Of = Mapping[Source, Mapping[Number, bytes]]


@dataclass(frozen=True, slots=True)
class Told:
    """What one node said of one window."""

    total: float  # events of the node's closed windows up to this one, in its life
    arms: Pair

    @property
    def events(self) -> float:
        """Of both arms."""
        return self.arms[0].events + self.arms[1].events

    @staticmethod
    def parse(packed: bytes) -> "Told":
        """What `to_bytes` made.

        Raises:
            ValueError: it did not make this.
            struct.error: nor did it make this.
        """
        total, length = _HEAD.unpack_from(packed)
        rest = packed[_HEAD.size :]
        if not 0 <= total <= TOTAL_MAX or length > len(rest):
            raise ValueError(f"a window of {total} events by now")
        return Told(total, (Sample.from_bytes(rest[:length]), Sample.from_bytes(rest[length:])))

    def to_bytes(self) -> bytes:
        """For other nodes."""
        online, baseline = (arm.to_bytes() for arm in self.arms)
        return _HEAD.pack(self.total, len(online)) + online + baseline


@dataclass(frozen=True, slots=True)
class Summaries:
    """Closed windows of nodes, as far as a node has heard of them. Never changed: `merged` makes new ones."""

    by_source: Of = field(default_factory=dict)

    KINDS: ClassVar[tuple[str, ...]] = (_KIND,)
    PASSING: ClassVar[bool] = True

    def __len__(self) -> int:
        return sum(len(windows) for windows in self.by_source.values())

    def of(self, model: Generation, window_ms: int) -> dict[str, dict[int, bytes]]:
        """Of one model, windows of one length: node -> window -> `Told` as bytes."""
        found: dict[str, dict[int, bytes]] = {}
        for (one, node), windows in self.by_source.items():
            if one == model:
                mine = {window: packed for (length, window), packed in windows.items() if length == window_ms}
                if mine:
                    found[node] = mine
        return found

    def models(self) -> list[Generation]:
        """Of which anything was told."""
        return sorted({model for model, _ in self.by_source})

    def told(self, model: Generation, node: str, window_ms: int, window: int) -> list[SchemaEntry]:
        """What a node says when it has closed a window: that one, and the ones before, once more."""
        newest = {(window_ms, number) for number in range(window - TOLD_TIMES + 1, window + 1)}
        windows = self.by_source.get((model, node), {})
        return [_entry_of((model, node), number, packed) for number, packed in windows.items() if number in newest]

    def told_again(self, node: str) -> list[SchemaEntry]:
        """What a node has said and is kept, newest first, as much as goes in a message, for who may not have heard it."""
        mine = [
            (_begins(number), source, number, packed)
            for source, windows in self.by_source.items()
            for number, packed in windows.items()
            if source[1] == node
        ]
        return [_entry_of(*one[1:]) for one in sorted(mine, reverse=True)[:TOLD_AGAIN_MAX]]

    @staticmethod
    def said(model: Generation, node: str, window_ms: int, window: int, told: Told) -> "Summaries":
        """One window of one node."""
        return Summaries({(model, node): {(window_ms, window): told.to_bytes()}})

    def merged(self, other: "Summaries") -> "Summaries":
        """See `ekko.facts.FactSet`."""
        return self._with(other.by_source)

    def _with(self, new: Of) -> "Summaries":
        changed: dict[Source, Mapping[Number, bytes]] = {}
        for source, windows in new.items():
            before = self.by_source.get(source, {})
            after = dict(before)
            for number, packed in windows.items():
                if after.get(number) != packed:
                    after[number] = max(after.get(number, b""), packed, key=_rank)
            newest = sorted(after, key=_begins, reverse=True)[:WINDOWS_MAX]
            after = {number: after[number] for number in sorted(newest)}
            if after != before:
                changed[source] = after
        if not changed:
            return self
        kept: Of = dict(sorted({**self.by_source, **changed}.items()))
        if sum(map(len, kept.values())) > SUMMARIES_MAX:
            kept = _newest(kept)
        return self if kept == self.by_source else Summaries(kept)

    def beyond(self, before: "Summaries") -> list[SchemaEntry]:
        """See `ekko.facts.Differing`."""
        return [
            _entry_of(source, number, packed)
            for source, windows in self.by_source.items()
            if windows is not before.by_source.get(source)
            for number, packed in windows.items()
            if before.by_source.get(source, {}).get(number) != packed
        ]

    def without(self, over: Callable[[Generation], bool]) -> "Summaries":
        """See `ekko.facts.FactSet`."""
        gone = {model for model in self.models() if over(model)}
        return self if not gone else Summaries({source: one for source, one in self.by_source.items() if source[0] not in gone})

    def learned(self, entries: Sequence[SchemaEntry]) -> "Summaries":
        """See `ekko.facts.FactSet`."""
        new: dict[Source, dict[Number, bytes]] = {}
        for source, number, packed in map(_parse, entries):
            windows = new.setdefault(source, {})
            windows[number] = max(windows.get(number, b""), packed, key=_rank)
        return self._with(new)

    def entries(self) -> list[SchemaEntry]:
        """See `ekko.facts.FactSet`."""
        return [
            _entry_of(source, number, packed)
            for source, windows in self.by_source.items()
            for number, packed in windows.items()
        ]


def _begins(number: Number) -> tuple[int, int]:
    """Windows in order of time, whatever their lengths."""
    window_ms, window = number
    return window_ms * window, window_ms


def _newest(known: Of) -> Of:
    """The newest windows of all, for what is kept has a bound."""
    every = [(_begins(number), source, number) for source, windows in known.items() for number in windows]
    kept: dict[Source, dict[Number, bytes]] = {}
    for _, source, number in sorted(sorted(every, reverse=True)[:SUMMARIES_MAX], key=lambda one: one[1:]):
        kept.setdefault(source, {})[number] = known[source][number]
    return kept


def _rank(packed: bytes) -> tuple[float, bytes]:
    """Of two summaries of one window the one of more events counts: of a node that was restarted in the middle of it."""
    return (Told.parse(packed).events if packed else -1.0), packed


def _entry_of(source: Source, number: Number, packed: bytes) -> SchemaEntry:
    (model, node), (window_ms, window) = source, number
    body = bytes(msgpack.packb([model.name, model.incarnation, node, window_ms, window, packed]))
    keyspace = model_id(label_of(model.name, model.incarnation))
    return SchemaEntry(keyspace, f"{_KIND}:{node}:{window_ms}:{window}", body, EXTRAS_SINCE)


def _parse(entry: SchemaEntry) -> tuple[Source, Number, bytes]:
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
        Told.parse(packed)
        source: Any = Generation(check_name("model", name), incarnation), check_name("node", node)
        same = _entry_of(source, (window_ms, window), packed)
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    if same != entry:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return source, (window_ms, window), packed
