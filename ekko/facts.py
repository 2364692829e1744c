"""Facts that nodes come to agree on beside the schema: what a set of them must be, so that the store can carry it.

They travel as schema entries, in the exchange that the schema has anyway: at the handshake, on change, and whenever the digests
of two heartbeats differ. A set is a value, and merging is a join: commutative, associative, idempotent; so the order in which
nodes hear makes no difference, and who has heard of the same has the same bytes. `ekko.health.verdicts` is one such set;
the store has them all (`ekko.store.facts`).
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, Self, runtime_checkable

from ekko.generations import Generation
from p2p.replica import SchemaEntry


class FactSet(Protocol):
    """One kind of facts of a cluster, as far as a node knows them. Never changed: merging makes new ones."""

    # First words of the names of its entries, up to the colon; no other set has them.
    KINDS: ClassVar[tuple[str, ...]]
    # True: not part of the schema, so neither repaired when one is lost nor kept over a restart. For what is soon outdated.
    PASSING: ClassVar[bool]

    def learned(self, entries: Sequence[SchemaEntry]) -> Self:
        """These facts and those of a peer; this very set when nothing is new.

        Raises:
            RemoteProtocolError: an entry is none that `entries` could have made.
        """

    def merged(self, other: Self) -> Self:
        """Both together; this very set when nothing is new."""

    def without(self, over: Callable[[Generation], bool]) -> Self:
        """These, but what they say of models that are over; this very set when that is all."""

    def entries(self) -> list[SchemaEntry]:
        """All of them, bounded; equal facts are equal bytes."""


@runtime_checkable
class Differing(Protocol):
    """A set that knows its difference from an earlier one without making all entries: of those that change often."""

    def beyond(self, before: Self) -> list[SchemaEntry]:
        """Entries that the earlier one has not, or has otherwise; in the order of `entries`."""


def kind_of(entry: SchemaEntry) -> str:
    """The first word of an entry's name."""
    return entry.name.partition(":")[0]


def changed_entries(before: FactSet, after: FactSet) -> tuple[SchemaEntry, ...]:
    """What a peer that has the first needs to be told, to have the second."""
    if before is after:
        return ()
    if isinstance(after, Differing) and type(before) is type(after):
        return tuple(after.beyond(before))
    known = {(entry.keyspace, entry.name): entry.body for entry in before.entries()}
    return tuple(entry for entry in after.entries() if known.get((entry.keyspace, entry.name)) != entry.body)
