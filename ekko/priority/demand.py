"""Which models readers ask for: every node tells the others what its own readers counted, and adds up what all of them say.

An origin has no readers as a rule, and a model's priority is its share of what is asked for anywhere (paper, section 5.2.1). So
a node tells its counts (`ekko.store.hot`, faded by half per `hot_half_life_s`) as passing entries of the schema's exchange: 100
bytes a model and half a minute, repeated rather than repaired, and forgotten when its node says nothing any more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgpack

from ekko.generations import Generation
from ekko.model import EXTRAS_SINCE, INCARNATION_MAX, check_name, label_of, model_id
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

# How often a node tells what its readers ask for; what is older than some of these is outdated, for its node may be gone.
TELL_MS: Final = 30_000
OUTDATED_MS: Final = 5 * TELL_MS
# Models of nodes; the newest words are kept.
DEMANDS_MAX: Final = 4_096
REQUESTS_MAX: Final = 1 << 62
_TIME_MAX: Final = 1 << 47
_KIND: Final = "demand"

Key = tuple[Generation, str]  # model, node
Word = tuple[int, int]  # Unix milliseconds, and requests of the half-life before


@dataclass(frozen=True, slots=True)
class Demand:
    """What readers of each node ask for, as far as a node has heard. Never changed: `merged` makes new ones."""

    words: Mapping[Key, Word] = field(default_factory=dict)

    KINDS: ClassVar[tuple[str, ...]] = (_KIND,)
    PASSING: ClassVar[bool] = True

    def requests(self, unix_ms: int) -> dict[Generation, int]:
        """By model, over all nodes that said something lately."""
        sums: dict[Generation, int] = {}
        for (model, _), (said_ms, requests) in self.words.items():
            if abs(unix_ms - said_ms) <= OUTDATED_MS:
                sums[model] = sums.get(model, 0) + requests
        return sums

    def merged(self, other: "Demand") -> "Demand":
        """See `ekko.facts.FactSet`."""
        return self._with(other.words.items())

    def _with(self, new: Iterable[tuple[Key, Word]]) -> "Demand":
        kept = dict(self.words)
        for key, word in new:
            kept[key] = max(kept.get(key, (0, 0)), word)
        if len(kept) > DEMANDS_MAX:
            kept = dict(sorted(kept.items(), key=lambda one: (one[1], one[0]), reverse=True)[:DEMANDS_MAX])
        return self if kept == self.words else Demand(dict(sorted(kept.items())))

    def without(self, over: Callable[[Generation], bool]) -> "Demand":
        """See `ekko.facts.FactSet`."""
        gone = {model for model, _ in self.words if over(model)}
        return self if not gone else Demand({key: word for key, word in self.words.items() if key[0] not in gone})

    def learned(self, entries: Sequence[SchemaEntry]) -> "Demand":
        """See `ekko.facts.FactSet`."""
        return self._with([_parse(entry) for entry in entries])

    def entries(self) -> list[SchemaEntry]:
        """See `ekko.facts.FactSet`."""
        return [_entry_of(key, word) for key, word in self.words.items()]


def _entry_of(key: Key, word: Word) -> SchemaEntry:
    model, node = key
    body = bytes(msgpack.packb([model.name, model.incarnation, node, *word]))
    return SchemaEntry(model_id(label_of(model.name, model.incarnation)), f"{_KIND}:{node}", body, EXTRAS_SINCE)


def _parse(entry: SchemaEntry) -> tuple[Key, Word]:
    """A word of a peer.

    Raises:
        RemoteProtocolError: it is none that `_entry_of` could have made.
    """
    try:
        name, incarnation, node, said_ms, requests = msgpack.unpackb(entry.body)
        for number, number_max in ((incarnation, INCARNATION_MAX), (said_ms, _TIME_MAX), (requests, REQUESTS_MAX)):
            if type(number) is not int or not 0 <= number <= number_max:
                raise ValueError(f"{number!r}")
        key: Any = Generation(check_name("model", name), incarnation), check_name("node", node)
        same = _entry_of(key, (said_ms, requests))
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    if same != entry:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return key, (said_ms, requests)
