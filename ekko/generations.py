"""Generations of a model, the aliases that name them, and what was dropped: facts that all nodes come to agree on.

A newly trained model, perhaps with another schema, is a model of its own name, loaded beside the old one. An *alias* is the
name by which readers know it: `ctr` stands for `ctr-2026-11-22`, from a given moment on, and remembers what it stood for
before, for an instant way back. An alias hides a model of the same name, so that this one may be the first generation.

Both kinds of facts travel as schema entries, and merging them is a join: commutative, associative, idempotent, so that the
order in which nodes hear of them makes no difference.

- Of two values of an alias the one with the higher version counts; of two of the same version, made on two sides of a split,
  the one of the higher origin, a random number. An alias that is removed is a value, too: it stands for nothing.
- What was dropped of a name is the highest *incarnation* that was. A model that gets the name again is the next incarnation,
  and has other ids (`ModelSpec.label`). So nothing that comes late of an earlier one can be taken for it, or bring it back.

- Of the tables that were dropped from a model the same is known, by model and incarnation: a table that is added again under
  the name of one is the next incarnation of it, with another id (`TableSpec.id`).

Whoever drops a model on one side of a split, while the other switches an alias to it, finds both done afterwards: the alias
then stands for what it stood for before, on all nodes, since that follows from the facts alone (`Registers.resolve`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgpack

from ekko.errors import ModelError
from ekko.model import EXTRAS_SINCE, INCARNATION_MAX, ModelSpec, check_name, label_of, model_id, table_id
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

# Names; removed aliases stay as facts. 100 bytes of name each, three times.
ALIASES_MAX: Final = 256
# Names of which something was dropped. Beyond it, those that were dropped first are forgotten: a node that was away since then
# would bring its model back. A generation a day for almost three years.
DROPPED_MAX: Final = 1_024
# The same of tables, over all models.
DROPPED_TABLES_MAX: Final = 1_024
# Rows of dropped tables are on their way for a while, and are told from rows of tables that are not known here yet. Those of so
# many incarnations are remembered: nobody drops a table more often while a message is under way.
LATE_INCARNATIONS: Final = 8
# How far ahead a switch is set, so that every node has heard of it by then: a few hops around the planet.
SWITCH_AHEAD_MS: Final = 1_000
_UINT64_MAX: Final = (1 << 64) - 1

K = TypeVar("K")
F = TypeVar("F", "Alias", "Dropped", "DroppedTable")

ALIAS: Final = "alias"
DROPPED: Final = "dropped"
DROPPED_TABLE: Final = "dropped-table"


@dataclass(frozen=True, slots=True, order=True)
class Generation:
    """A model, by its name and which one of that name."""

    name: str
    incarnation: int = 0

    @staticmethod
    def of(spec: ModelSpec) -> "Generation":
        """Of a model."""
        return Generation(spec.name, spec.incarnation)


@dataclass(frozen=True, slots=True)
class Alias:
    """What a name stands for: `previous` until `effective_ms`, Unix milliseconds, then `target`. None: no alias at all."""

    name: str
    target: Generation | None
    previous: Generation | None
    effective_ms: int
    version: int
    origin: int  # a random number of who set it

    @property
    def rank(self) -> tuple[object, ...]:
        """Of two values the one with the larger rank counts. What follows version and origin only makes the order total."""
        return self.version, self.origin, self.effective_ms, _pair(self.target), _pair(self.previous)


@dataclass(frozen=True, slots=True)
class Dropped:
    """All models of this name up to this incarnation are dropped."""

    name: str
    incarnation: int
    dropped_ms: int  # Unix milliseconds

    @property
    def rank(self) -> tuple[int, int]:
        """As of an alias."""
        return self.incarnation, self.dropped_ms


@dataclass(frozen=True, slots=True)
class DroppedTable:
    """All tables of this name up to this incarnation are dropped from a model."""

    model: Generation
    table: str
    incarnation: int
    dropped_ms: int  # Unix milliseconds

    @property
    def rank(self) -> tuple[int, int]:
        """As of an alias."""
        return self.incarnation, self.dropped_ms

    @property
    def key(self) -> tuple[str, int, str]:
        """There is one such fact for each."""
        return self.model.name, self.model.incarnation, self.table

    @property
    def ids(self) -> frozenset[int]:
        """The ids that the last of them had."""
        return ids_before(self.table, self.incarnation + 1)


Fact = Alias | Dropped | DroppedTable


@dataclass(frozen=True, slots=True)
class Registers:
    """All such facts of a cluster, as far as a node knows them. Never changed: `merged` makes new ones."""

    aliases: dict[str, Alias] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    tables: dict[tuple[str, int, str], DroppedTable] = field(default_factory=dict)  # by model, its incarnation, and name

    def merged(self, facts: Iterable[Fact]) -> "Registers":
        """These and those together, as far as they are kept; these themselves when nothing is new."""
        aliases, dropped, tables = dict(self.aliases), dict(self.dropped), dict(self.tables)
        for fact in facts:
            match fact:
                case Alias():
                    _take(aliases, fact.name, fact)
                case Dropped():
                    _take(dropped, fact.name, fact)
                case DroppedTable():
                    _take(tables, fact.key, fact)
        # Everybody keeps the same of the same, in whatever order it came.
        if len(aliases) > ALIASES_MAX:
            aliases = {name: aliases[name] for name in sorted(aliases, key=model_id)[:ALIASES_MAX]}
        if len(dropped) > DROPPED_MAX:
            latest = sorted(dropped.values(), key=lambda one: (one.dropped_ms, one.name), reverse=True)
            dropped = {one.name: one for one in latest[:DROPPED_MAX]}
        if len(tables) > DROPPED_TABLES_MAX:
            kept = sorted(tables.values(), key=lambda one: (one.dropped_ms, one.model, one.table), reverse=True)
            tables = {one.key: one for one in kept[:DROPPED_TABLES_MAX]}
        merged = Registers(dict(sorted(aliases.items())), dict(sorted(dropped.items())), dict(sorted(tables.items())))
        return self if merged == self else merged

    def is_dropped(self, generation: Generation) -> bool:
        """Whether this model was dropped."""
        last = self.dropped.get(generation.name)
        return last is not None and generation.incarnation <= last.incarnation

    def next_incarnation(self, name: str) -> int:
        """Of a model that gets this name now."""
        last = self.dropped.get(name)
        return 0 if last is None else last.incarnation + 1

    def is_table_dropped(self, generation: Generation, table: str, incarnation: int) -> bool:
        """Whether this table of a model was dropped."""
        last = self.tables.get((generation.name, generation.incarnation, table))
        return last is not None and incarnation <= last.incarnation

    def next_table(self, generation: Generation, table: str) -> int:
        """The incarnation of a table that a model gets under this name now."""
        last = self.tables.get((generation.name, generation.incarnation, table))
        return 0 if last is None else last.incarnation + 1

    def tables_dropped(self, generation: Generation) -> dict[int, str]:
        """Of a model: id -> name of the tables whose rows may come late."""
        return {number: one.table for one in self.tables.values() if one.model == generation for number in one.ids}

    def facts(self) -> list[Fact]:
        """All of them."""
        return [*self.aliases.values(), *self.dropped.values(), *self.tables.values()]

    def resolve(self, alias: str, unix_ms: int | None = None) -> Generation | None:
        """What an alias stands for at a moment, or after all that is decided; None: nothing, or it is no alias.

        What it is to stand for may have been dropped meanwhile: then it is what is left.
        """
        known = self.aliases.get(alias)
        if known is None:
            return None
        ahead = unix_ms is not None and unix_ms < known.effective_ms
        order = (known.previous, known.target) if ahead and known.previous is not None else (known.target, known.previous)
        if known.target is None:  # removed
            return known.previous if ahead else None
        return next((one for one in order if one is not None and not self.is_dropped(one)), known.target)

    def users_of(self, generation: Generation) -> tuple[list[str], list[str]]:
        """The aliases that stand for a model, or are about to, and those of which it is the way back."""
        # What an alias was to stand for may be dropped: then it stands for what was its way back.
        used = [name for name, one in self.aliases.items() if generation in (one.target, self.resolve(name))]
        kept = [name for name, one in self.aliases.items() if one.previous == generation and one.target is not None]
        return used, kept

    def pending(self, unix_ms: int) -> int | None:
        """When the next switch takes effect, if one is ahead."""
        return min((one.effective_ms for one in self.aliases.values() if one.effective_ms > unix_ms), default=None)

    def switched(self, alias: str, target: Generation | None, own: Generation | None, now_ms: int, origin: int) -> Alias:
        """The value that makes an alias stand for something else.

        Args:
            alias: its name.
            target: what it is to stand for; None: it is removed, and the name means a model again.
            own: the model of the alias's own name, if there is one: what the name stood for without an alias.
            now_ms: Unix milliseconds.
            origin: a random 64-bit number.
        """
        known = self.aliases.get(alias)
        current = self.resolve(alias, now_ms) if known is not None and known.target is not None else own
        version = 1 if known is None else known.version + 1
        previous = current if current != target else None
        return Alias(alias, target, previous, now_ms + SWITCH_AHEAD_MS, version, origin)

    def entries(self) -> list[SchemaEntry]:
        """As schema entries."""
        return [entry_of(fact) for fact in self.facts()]

    def to_json(self) -> dict[str, object]:
        """For the manifest."""
        return {
            ALIAS: [_body(one) for one in self.aliases.values()],
            DROPPED: [_body(one) for one in self.dropped.values()],
            DROPPED_TABLE: [_body(one) for one in self.tables.values()],
        }

    @staticmethod
    def from_json(raw: Any) -> "Registers":
        """Of a manifest; one of an earlier version has none.

        Raises:
            ModelError, TypeError, ValueError: it makes no sense.
        """
        if raw is None:
            return Registers()
        facts: list[Fact] = [*map(_alias_of, raw[ALIAS]), *map(_dropped_of, raw[DROPPED])]
        return Registers().merged([*facts, *map(_dropped_table_of, raw.get(DROPPED_TABLE, []))])


def ids_before(table: str, incarnation: int) -> frozenset[int]:
    """The ids that the last few tables of this name had before the one of this incarnation."""
    first = max(0, incarnation - LATE_INCARNATIONS)
    return frozenset(table_id(label_of(table, number)) for number in range(first, incarnation))


def is_register(entry: SchemaEntry) -> bool:
    """Whether a schema entry is such a fact."""
    return entry.name.partition(":")[0] in (ALIAS, DROPPED, DROPPED_TABLE)


def entry_of(fact: Fact) -> SchemaEntry:
    """A fact as a schema entry: equal facts are equal bytes."""
    body = bytes(msgpack.packb(_body(fact)))
    match fact:
        case Alias() | Dropped():
            kind = ALIAS if isinstance(fact, Alias) else DROPPED
            return SchemaEntry(model_id(fact.name), f"{kind}:{fact.name}", body, EXTRAS_SINCE)
        case DroppedTable(model, table):
            return SchemaEntry(
                model_id(label_of(model.name, model.incarnation)), f"{DROPPED_TABLE}:{table}", body, EXTRAS_SINCE
            )


def parse_facts(entries: Sequence[SchemaEntry]) -> list[Fact]:
    """Understand the facts among schema entries of a peer.

    Raises:
        RemoteProtocolError: one is none that `entry_of` could have made.
    """
    return [_parse(entry) for entry in entries if is_register(entry)]


def _parse(entry: SchemaEntry) -> Fact:
    try:
        body = msgpack.unpackb(entry.body)
        fact: Fact = _READERS[entry.name.partition(":")[0]](body)
        same = entry_of(fact)
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    if same != entry:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return fact


def _pair(generation: Generation | None) -> tuple[str, int]:
    return ("", 0) if generation is None else (generation.name, generation.incarnation)


def _body(fact: Fact) -> list[object]:
    if isinstance(fact, Dropped):
        return [fact.name, fact.incarnation, fact.dropped_ms]
    if isinstance(fact, DroppedTable):
        return [list(_pair(fact.model)), fact.table, fact.incarnation, fact.dropped_ms]
    numbers = [fact.effective_ms, fact.version, fact.origin]
    return [fact.name, list(_pair(fact.target)), list(_pair(fact.previous)), *numbers]


def _alias_of(body: Any) -> Alias:
    name, target, previous, *numbers = body
    effective_ms, version, origin = (_uint64(number) for number in numbers)
    return Alias(check_name("alias", name), _generation_of(target), _generation_of(previous), effective_ms, version, origin)


def _dropped_of(body: Any) -> Dropped:
    name, incarnation, dropped_ms = body
    if _uint64(incarnation) > INCARNATION_MAX:
        raise ValueError(f"incarnation {incarnation}")
    return Dropped(check_name("model", name), incarnation, _uint64(dropped_ms))


def _dropped_table_of(body: Any) -> DroppedTable:
    pair, table, incarnation, dropped_ms = body
    model = _generation_of(pair)
    if model is None or _uint64(incarnation) > INCARNATION_MAX:
        raise ValueError(f"incarnation {incarnation} of a table of {pair!r}")
    return DroppedTable(model, check_name("table", table), incarnation, _uint64(dropped_ms))


def _generation_of(pair: Any) -> Generation | None:
    name, incarnation = pair
    if _uint64(incarnation) > INCARNATION_MAX:
        raise ValueError(f"incarnation {incarnation}")
    if name == "" and incarnation == 0:
        return None
    return Generation(check_name("model", name), incarnation)


def _uint64(number: Any) -> int:
    if type(number) is not int or not 0 <= number <= _UINT64_MAX:
        raise ValueError(f"{number!r} is not a 64-bit number")
    return number


_READERS: Final[dict[str, Callable[[Any], Fact]]] = {
    ALIAS: _alias_of,
    DROPPED: _dropped_of,
    DROPPED_TABLE: _dropped_table_of,
}


def _take(known: dict[K, F], name: K, fact: F) -> None:
    """Of two facts of one name the one with the higher rank counts."""
    before = known.get(name)
    if before is None or fact.rank > before.rank:
        known[name] = fact


def check_free(registers: Registers, alias: str) -> str:
    """Return the name of an alias, or refuse a new one beyond what is kept.

    Raises:
        ModelError: it is unusable, or there are too many.
    """
    check_name("alias", alias)
    if alias not in registers.aliases and len(registers.aliases) >= ALIASES_MAX:
        raise ModelError(
            f"{ALIASES_MAX} aliases are kept, removed ones included, and {alias!r} is none of them: use one of those"
        )
    return alias
