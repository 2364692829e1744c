"""What a store knows of the facts that nodes agree on beside the schema (`ekko.facts`), and the file in which they outlive it.

The file is written whole at each change, and not synced: it survives the daemon, not the machine. Peers tell it again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgpack

from ekko.facts import FactSet, changed_entries, kind_of
from ekko.generations import Generation
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

FILE_NAME: Final = "facts"
FILE_BYTES_MAX: Final = 64 << 20

F = TypeVar("F", bound=FactSet)
Over = Callable[[Generation], bool]


class Facts:
    """Sets of facts, one for each class.

    Args:
        empty: the sets there are, of which nothing is known yet.
    """

    def __init__(self, empty: Iterable[FactSet]) -> None:
        self._sets: dict[type[FactSet], FactSet] = {type(one): one for one in empty}
        self._by_kind = {kind: type(one) for one in self._sets.values() for kind in one.KINDS}
        self._path: Path | None = None  # None: they live as long as this process
        self.on_change: Callable[[], None] = lambda: None  # called when any of them has changed
        self.listeners: list[Callable[[], None]] = []  # so are these

    def of(self, kind: type[F]) -> F:
        """What is known of one kind."""
        known = self._sets[kind]
        assert isinstance(known, kind)
        return known

    def has(self, entry: SchemaEntry) -> bool:
        """Whether an entry is of one of these sets."""
        return kind_of(entry) in self._by_kind

    def entries(self) -> list[SchemaEntry]:
        """All of them, but those that pass."""
        return [entry for one in self._sets.values() if not one.PASSING for entry in one.entries()]

    def note(self, new: FactSet) -> tuple[SchemaEntry, ...]:
        """Merge what this node has to say; returns what peers are to be told (`p2p.messages.SchemaChanged`)."""
        before = self._sets[type(new)]
        merged = before.merged(new)
        self.take({type(new): merged})
        return changed_entries(before, merged)

    def learned(self, entries: Sequence[SchemaEntry], over: Over) -> Mapping[type[FactSet], FactSet]:
        """The sets that would change by what a peer says; nothing is changed yet.

        Raises:
            RemoteProtocolError: an entry cannot be understood.
        """
        by_set: dict[type[FactSet], list[SchemaEntry]] = {}
        for entry in entries:
            if self.has(entry):
                by_set.setdefault(self._by_kind[kind_of(entry)], []).append(entry)
        learned = {kind: self._sets[kind].learned(of_kind).without(over) for kind, of_kind in by_set.items()}
        return {kind: one for kind, one in learned.items() if one != self._sets[kind]}

    def take(self, learned: Mapping[type[FactSet], FactSet]) -> bool:
        """Have these sets in place of those of their kinds; True when something changed."""
        changed = {kind: one for kind, one in learned.items() if one is not self._sets[kind]}
        if not changed:
            return False
        self._sets.update(changed)
        if any(not one.PASSING for one in changed.values()):
            self._save()
        self.on_change()
        for listener in self.listeners:
            listener()
        return True

    def forget(self, over: Over) -> None:
        """Let go of what is said of models that are over."""
        self.take({kind: one.without(over) for kind, one in self._sets.items()})

    def reopened(self) -> "Facts":
        """The same, as the node's next process finds them."""
        return Facts(type(one)() if one.PASSING else one for one in self._sets.values())

    def keep_in(self, run_dir: Path) -> None:
        """Read what an earlier process left in this folder, and keep them there from now on. A damaged file is as none."""
        self._path = run_dir / FILE_NAME
        with suppress(OSError, ValueError, TypeError, RemoteProtocolError, msgpack.UnpackException):
            if self._path.stat().st_size > FILE_BYTES_MAX:
                return
            rows: list[Any] = msgpack.unpackb(self._path.read_bytes())
            entries = [SchemaEntry(int(keyspace), str(name), bytes(body)) for keyspace, name, body in rows]
            self._sets.update(self.learned(entries, lambda _: False))

    def _save(self) -> None:
        if self._path is None:
            return
        # A full or broken disk costs what is known after the next start, not the node.
        with suppress(OSError):
            temporary = self._path.with_suffix(".new")
            temporary.write_bytes(msgpack.packb([[one.keyspace, one.name, one.body] for one in self.entries()]))
            temporary.replace(self._path)
