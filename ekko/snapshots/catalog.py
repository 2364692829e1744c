"""Which snapshots a folder has, which of them belong together, and which are removed.

A snapshot is a folder with a manifest. Folders of that name without one are what a writer left that was killed: the next one
removes them. Kept are the newest `keep` full snapshots with all increments over them.
"""

from dataclasses import dataclass

from ekko.errors import SnapshotError
from ekko.snapshots.folders import MANIFEST, Folder
from ekko.snapshots.format import (
    KNOWLEDGE_BYTES_MAX,
    MANIFEST_BYTES_MAX,
    NAME,
    ModelPart,
    SnapshotManifest,
    checksum_of,
    decode_knowledge,
    decode_manifest,
)
from ekko.store.images import FloorImage, KnowledgeImage

CHAIN_MAX = 1_024  # increments over one full snapshot


@dataclass(frozen=True, slots=True)
class Entry:
    """One snapshot whose manifest is sound."""

    manifest: SnapshotManifest
    checksum: str  # of the manifest's bytes; its increments name it

    @property
    def name(self) -> str:
        return self.manifest.name

    def knowledge(self, folder: Folder, part: ModelPart) -> tuple[KnowledgeImage, FloorImage]:
        """What it knows of a model.

        Raises:
            SnapshotError: the file is missing or damaged.
        """
        data = folder.get(f"{self.name}/{part.knowledge}", KNOWLEDGE_BYTES_MAX)
        if checksum_of(data) != part.knowledge_checksum:
            raise SnapshotError(f"{self.name}/{part.knowledge} is damaged: its checksum is wrong")
        return decode_knowledge(data, part.entry)


class Catalog:
    """The snapshots of a folder. One process writes there at a time."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Of whole snapshots, oldest first; they need not be sound."""
        return [name for name in self._all() if self._folder.has(f"{name}/{MANIFEST}")]

    def _all(self) -> list[str]:
        return [name for name in self._folder.names() if NAME.fullmatch(name)]

    def next_name(self, unix_ms: int, nonce: str) -> str:
        """A name behind all others, whatever the clock says."""
        newest = max((int(name[:13]) for name in self._all()), default=0)
        return f"{max(unix_ms, newest + 1):013d}-{nonce}"

    def entry(self, name: str) -> Entry:
        """One snapshot.

        Raises:
            SnapshotError: there is none of this name, or its manifest is damaged or of a newer version.
        """
        if not NAME.fullmatch(name):
            raise SnapshotError(f"{name!r} is not the name of a snapshot")
        data = self._folder.get(f"{name}/{MANIFEST}", MANIFEST_BYTES_MAX)
        return Entry(decode_manifest(data, name), checksum_of(data))

    def chain(self, name: str) -> list[Entry]:
        """The snapshot and what it stands on, the full one first.

        Raises:
            SnapshotError: one of them is missing or damaged.
        """
        chain = [self.entry(name)]
        while (parent := chain[0].manifest.parent) is not None:
            if len(chain) > CHAIN_MAX or parent >= chain[0].name:
                raise SnapshotError(f"snapshot {name} stands on a chain that has no end")
            below = self.entry(parent)
            if below.checksum != chain[0].manifest.parent_checksum:
                raise SnapshotError(f"snapshot {parent} is not the one that {chain[0].name} stands on")
            chain.insert(0, below)
        return chain

    def newest(self) -> Entry | None:
        """The newest one whose manifest is sound, and so are those that it stands on."""
        for name in reversed(self.names()):
            try:
                return self.chain(name)[-1]
            except SnapshotError:
                continue
        return None

    def remove_leftovers(self) -> int:
        """Remove what was never finished; returns how many."""
        left = [name for name in self._all() if not self._folder.has(f"{name}/{MANIFEST}")]
        for name in left:
            self._folder.remove(name)
        return len(left)

    def prune(self, keep: int) -> list[str]:
        """Keep the newest `keep` full snapshots and their increments; returns what was removed."""
        roots: dict[str, str | None] = {}
        for name in self.names():
            try:
                roots[name] = self.chain(name)[0].name
            except SnapshotError:
                roots[name] = None  # cannot be used any more
        full = [name for name, root in roots.items() if name == root]
        if len(full) < keep:
            return []
        kept = set(full[-keep:])
        # What cannot be read may be of a newer version, or the place may fail for a moment: it goes when it would be too old
        # anyway. Newest first: an increment never stays without its parent.
        gone = [name for name, root in reversed(roots.items()) if root not in kept and name < full[-keep]]
        for name in gone:
            self._folder.remove(name)
        return gone
