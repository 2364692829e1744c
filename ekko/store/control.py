"""Where a store is found: its control file and its manifest, and the files that they name.

The manifest says which files are a store's, and is replaced as a whole. The control file is mapped by every reader: a number in
it grows with each manifest, another one says up to which moment aliases have switched, and a third that another store has taken
this one's place. Who follows them never meets a file that is half made.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from ekko.errors import StoreError
from ekko.generations import Registers
from ekko.store import layout
from ekko.store.access import Access
from ekko.store.kernels.atomics import publish_word, watch_word
from ekko.store.leftovers import note_run_dir
from ekko.store.manifest import (
    CONTROL_NAME,
    MANIFEST_NAME,
    Manifest,
    ModelEntry,
    kernel_boot_id,
    prefix_of,
    read_manifest,
    write_manifest,
)
from ekko.store.memory import Mapping, TmpfsMemory


def fresh_memory(run_dir: Path, memory_dir: Path, access: Access) -> TmpfsMemory:
    """Memory under names that no other store of this run_dir has."""
    return TmpfsMemory(memory_dir, f"{prefix_of(run_dir)}-{token_hex(4)}", access)


def remove_unnamed(run_dir: Path, memory: TmpfsMemory) -> None:
    """Unlink what lies there under names that neither this store nor the one of the manifest has, which readers may use."""
    kept = [memory.prefix]
    with suppress(StoreError, OSError):
        before = read_manifest(run_dir)
        kept += [] if before is None else [before.prefix]
    for path in sorted(memory.directory.glob(f"{prefix_of(run_dir)}-*")):
        if not path.name.startswith(tuple(f"{prefix}-" for prefix in kept)):
            path.unlink(missing_ok=True)


class Control:
    """Of one store in a tmpfs. Use `attach` or `begin`; the store's lock is held."""

    def __init__(self, memory: TmpfsMemory, run_dir: Path, mapping: Mapping) -> None:
        self.memory = memory
        self.run_dir = run_dir
        self._mapping = mapping

    @classmethod
    def attach(cls, memory: TmpfsMemory, run_dir: Path) -> "Control | None":
        """The control file that a daemon left; None: it is damaged, or another store took its place.

        Raises:
            StoreError: it cannot be mapped.
            OSError: it is missing.
        """
        mapping = memory.open(CONTROL_NAME)
        mapping.mark_in_use()
        words = mapping.words(0, layout.CONTROL_BYTES // 8)
        if int(words[0]) != layout.CONTROL_MAGIC or int(words[layout.CONTROL.offset("retired") // 8]):
            return None
        return cls(memory, run_dir, mapping)

    @classmethod
    def begin(cls, memory: TmpfsMemory, run_dir: Path, models: Sequence[ModelEntry], registers: Registers) -> "Control":
        """Make this the store of its run_dir: readers of the one before are told."""
        old = _control_of_old_store(run_dir)
        mapping = memory.create(CONTROL_NAME, layout.CONTROL_BYTES)
        mapping.mark_in_use()
        mapping.ensure(layout.CONTROL_BYTES)
        note_run_dir(mapping, run_dir)
        words = mapping.words(0, 2)
        words[...] = (layout.CONTROL_MAGIC, layout.LAYOUT_VERSION)
        if old is not None and len(old) >= layout.CONTROL_BYTES:
            aliases_ms = layout.CONTROL.offset("aliases_ms")
            mapping.words(aliases_ms)[...] = old.words(aliases_ms)
        control = cls(memory, run_dir, mapping)
        control.publish(models, registers)
        if old is not None:  # after the new manifest is there: whoever is told finds it
            _retire(old)
        return control

    def publish(self, models: Sequence[ModelEntry], registers: Registers) -> None:
        """Write the manifest, then tell attached readers."""
        memory = self.memory
        manifest = Manifest(kernel_boot_id(), str(memory.directory), memory.prefix, list(models), registers=registers)
        write_manifest(self.run_dir, manifest, memory.access)
        self.tell_readers()

    def tell_readers(self) -> None:
        """Have them read the manifest again."""
        # Released: who sees the number finds this manifest.
        generation = self._mapping.address + layout.CONTROL.offset("manifest_generation")
        publish_word(generation, watch_word(generation) + 1)

    def settle_aliases(self, unix_ms: int) -> int:
        """Let readers know up to which moment aliases have switched; returns up to which before."""
        word = self._mapping.words(layout.CONTROL.offset("aliases_ms"))
        before, word[...] = int(word), unix_ms
        return before

    def open_to(self, access: Access, names: Collection[str]) -> None:
        """Let these users read the manifest, and the files of these names."""
        for path in (self.run_dir / MANIFEST_NAME, *(self.memory.directory / name for name in names)):
            access.apply_to(path)

    def remove_strangers(self, keep: Collection[str]) -> None:
        """Unlink what stores of this run_dir left behind, in this or an earlier life; files of these names stay."""
        for path in sorted(self.memory.directory.glob(f"{prefix_of(self.run_dir)}-*")):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def destroy(self) -> None:
        """Remove the manifest and all files, and tell readers."""
        (self.run_dir / MANIFEST_NAME).unlink(missing_ok=True)
        _retire(self._mapping)
        self.remove_strangers(())


def _control_of_old_store(run_dir: Path) -> Mapping | None:
    """The control file that an older manifest names, if both can still be used."""
    try:
        manifest = read_manifest(run_dir)
        if manifest is None:
            return None
        return TmpfsMemory(Path(manifest.memory_dir), manifest.prefix).open(CONTROL_NAME)
    except (StoreError, OSError, ValueError):
        return None


def _retire(control: Mapping) -> None:
    if len(control) >= layout.CONTROL_BYTES:
        publish_word(control.address + layout.CONTROL.offset("retired"), 1)
