"""How much of a link between two regions updates may use: what nodes are configured with, and what an operator says later.

A node's file says `rate_mbps` for a pair of regions. `ekko rate` says something else while the cluster runs, on any node; that
is a fact which all nodes come to agree on (`ekko.facts`), and it counts before the files, until it says that they count again.
Of two such words on one pair the one of the higher version counts; of two of the same version, said on two sides of a split,
that of the higher origin, a random number. It survives restarts of nodes, and of all of them but for that of the machines.

What a rate does: `p2p.link.budget`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import msgpack

from ekko.errors import ConfigError, ModelError
from ekko.generations import Generation
from ekko.model import EXTRAS_SINCE, check_name
from p2p.errors import RemoteProtocolError
from p2p.link.budget import RATE_MAX, RATE_MIN
from p2p.replica import SchemaEntry

BYTES_PER_S_OF_MBPS: Final = 125_000.0
RATE_MBPS_MIN: Final = 0.01
RATE_MBPS_MAX: Final = 8_000_000.0
assert RATE_MIN <= RATE_MBPS_MIN * BYTES_PER_S_OF_MBPS < RATE_MBPS_MAX * BYTES_PER_S_OF_MBPS <= RATE_MAX
# Pairs of which something was said. Those of 90 regions; of more, those whose names come first are kept, on all nodes the same.
PAIRS_MAX: Final = 4_096

Word = float | Literal["none", "configured"]  # Mbit/s; no limit; what each node's own file says

_RATE: Final = "rate"
# Facts of no model.
_KEYSPACE: Final = 0


def pair_of(one: str, other: str) -> str:
    """The name of a pair of regions: "eu/us"."""
    return "/".join(sorted((one, other)))


def parse_pair(text: str) -> str:
    """The pair that an operator names, in either order.

    Raises:
        ConfigError: these are not two regions.
    """
    regions = text.split("/")
    if len(regions) != 2 or regions[0] == regions[1]:
        raise ConfigError(f'{text!r}: expected a pair of regions such as "eu/us"')
    try:
        return pair_of(*(check_name("region", region) for region in regions))
    except ModelError as error:
        raise ConfigError(f"{text!r}: {error}") from None


def parse_word(text: str) -> Word:
    """The rate that an operator gives.

    Raises:
        ConfigError: it is none.
    """
    if text in ("none", "configured"):
        return "none" if text == "none" else "configured"
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not RATE_MBPS_MIN <= rate <= RATE_MBPS_MAX:
        raise ConfigError(
            f"{text!r}: expected {RATE_MBPS_MIN:g} to {RATE_MBPS_MAX:g} Mbit/s, 'none' for no limit, or 'configured' for what"
            " each node's own file says"
        )
    return rate


@dataclass(frozen=True, slots=True)
class Said:
    """What an operator said last of a pair."""

    pair: str
    word: Word
    version: int
    origin: int  # a random number of who said it

    @property
    def rank(self) -> tuple[object, ...]:
        """Of two, the one with the larger rank counts; what follows version and origin only makes the order total."""
        return self.version, self.origin, str(self.word)


@dataclass(frozen=True, slots=True)
class Rates:
    """All that operators said, as far as a node knows. Never changed: `said` and `merged` make new ones."""

    by_pair: dict[str, Said] = field(default_factory=dict)

    KINDS: ClassVar[tuple[str, ...]] = (_RATE,)
    PASSING: ClassVar[bool] = False

    def said(self, pair: str, word: Word, origin: int) -> "Rates":
        """These, and a new word on a pair."""
        known = self.by_pair.get(pair)
        return self._with([Said(pair, word, 1 if known is None else known.version + 1, origin)])

    def rate_of(self, pair: str, configured: Mapping[str, float]) -> float | None:
        """Mbit/s of a pair, where its node is configured so; None: no limit."""
        known = self.by_pair.get(pair)
        if known is None or known.word == "configured":
            return configured.get(pair)
        return None if known.word == "none" else known.word

    def is_said(self, pair: str) -> bool:
        """Whether an operator's word counts for a pair, and not the files."""
        known = self.by_pair.get(pair)
        return known is not None and known.word != "configured"

    def of_region(self, region: str, configured: Mapping[str, float]) -> dict[str, float]:
        """Other region -> bytes a second of updates to it, where there is a limit."""
        rates = {}
        for pair in sorted({*self.by_pair, *configured}):
            regions = pair.split("/")
            rate = self.rate_of(pair, configured)
            if region in regions and rate is not None:
                rates[regions[regions[0] == region]] = rate * BYTES_PER_S_OF_MBPS
        return rates

    # --- a join (`ekko.facts.FactSet`)

    def _with(self, new: Iterable[Said]) -> "Rates":
        by_pair = dict(self.by_pair)
        for one in new:
            known = by_pair.get(one.pair)
            by_pair[one.pair] = one if known is None or one.rank > known.rank else known
        merged = Rates({pair: by_pair[pair] for pair in sorted(by_pair)[:PAIRS_MAX]})
        return self if merged == self else merged

    def merged(self, other: "Rates") -> "Rates":
        """See `ekko.facts.FactSet`."""
        return self._with(other.by_pair.values())

    def learned(self, entries: Sequence[SchemaEntry]) -> "Rates":
        """See `ekko.facts.FactSet`."""
        return self._with([_parse(entry) for entry in entries])

    def without(self, over: Callable[[Generation], bool]) -> "Rates":
        """See `ekko.facts.FactSet`."""
        return self

    def entries(self) -> list[SchemaEntry]:
        """See `ekko.facts.FactSet`."""
        return [_entry_of(one) for one in self.by_pair.values()]


def _entry_of(said: Said) -> SchemaEntry:
    body = bytes(msgpack.packb([said.word, said.version, said.origin]))
    return SchemaEntry(_KEYSPACE, f"{_RATE}:{said.pair}", body, EXTRAS_SINCE)


def _parse(entry: SchemaEntry) -> Said:
    try:
        pair = parse_pair(entry.name.removeprefix(f"{_RATE}:"))
        word, version, origin = msgpack.unpackb(entry.body)
        parsed = Said(pair, parse_word(str(word)), _uint64(version), _uint64(origin))
        same = _entry_of(parsed)
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    if same != entry:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return parsed


def _uint64(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 64:
        raise ValueError(f"{number!r} is no 64-bit number")
    return number
