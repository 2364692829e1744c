"""Where a reader finds its model: from the node's manifest to mapped memory, and whether that is still the one to use."""

import os
from collections.abc import Callable
from collections.abc import Mapping as ReadOnlyMapping
from dataclasses import dataclass
from pathlib import Path

from ekko.errors import StoreError
from ekko.generations import Generation
from ekko.model import TensorSpec
from ekko.store import layout
from ekko.store.kernels.atomics import watch_word
from ekko.store.manifest import CONTROL_NAME, Manifest, ModelEntry, header_name, kernel_boot_id, read_manifest
from ekko.store.memory import Mapping, TmpfsMemory
from ekko.store.view import TableFiles, TableView

# The store may be replaced between reading its manifest and opening its files; it is not replaced often in a row.
ATTACH_ATTEMPTS_MAX = 100

_GENERATION = layout.CONTROL.offset("manifest_generation") // 8
_RETIRED = layout.CONTROL.offset("retired") // 8
_ALIASES_MS = layout.CONTROL.offset("aliases_ms") // 8


@dataclass(frozen=True, slots=True)
class Attachment:
    """Everything a look-up needs, as of one manifest. Replaced as a whole, so that threads see one or the other."""

    words: memoryview  # of the control file
    generation: int
    header: memoryview  # of the model
    header_address: int
    tables: dict[str, TableView]
    tensors: dict[str, TensorSpec]
    shards: int
    partitions: int
    hold: tuple[int, ...]  # the partitions that are here
    model: Generation  # which model it is; the name asked for may be an alias
    dropped: frozenset[str]  # names of tables that were dropped from it

    @property
    def current(self) -> bool:
        """False once there is a newer manifest, or another store."""
        return self.words[_GENERATION] == self.generation and self.words[_RETIRED] == 0


class Attacher:
    """Attaches to one model of a node.

    Args:
        model: its name, or an alias.
        run_dir: the node's.
        counted: count what is looked up.
        check: called with each table that is mapped; what it raises ends the attaching.
    """

    def __init__(self, model: str, run_dir: Path, counted: bool, check: Callable[[TableView], None]) -> None:
        self._model = model
        self._run_dir = run_dir
        self._counted = counted
        self._check = check

    def attach(self, old: Attachment | None) -> Attachment | None:
        """Attach to what the manifest names now; None when the model is not there."""
        for _ in range(ATTACH_ATTEMPTS_MAX):
            manifest = self._manifest()
            if manifest is None:
                return None
            memory = TmpfsMemory(Path(manifest.memory_dir), manifest.prefix)
            try:
                control = Mapping.open_to_read(memory.path(CONTROL_NAME))
                words = control.view(layout.CONTROL_BYTES)
                generation = watch_word(control.address + 8 * _GENERATION)
                # Read again: this one is at least as new as the generation.
                manifest = self._manifest()
                if manifest is None or manifest.prefix != memory.prefix:
                    continue
                aliased = manifest.registers.resolve(self._model, words[_ALIASES_MS] or None)
                found = (one for one in manifest.models if aliased in (None, one.generation))
                entry = next((one for one in found if aliased is not None or one.name == self._model), None)
                if entry is None:
                    return None
                hold = tuple(range(entry.partitions) if entry.hold is None else entry.hold)
                mapped = self._map_model(entry, memory, old)
                dropped = frozenset(manifest.registers.tables_dropped(entry.generation).values())
                return Attachment(words, generation, *mapped, entry.shards, entry.partitions, hold, entry.generation, dropped)
            except FileNotFoundError:
                continue  # replaced under our hands
        return None

    def missing(self) -> str:
        """Why there is nothing to attach to."""
        manifest = self._manifest()
        if manifest is None:
            return f"no node has a store in {self._run_dir}: start `ekko node` with this run_dir, or pass wait="
        known = names({entry.name: entry for entry in manifest.models})
        registers = manifest.registers
        if (target := registers.resolve(self._model)) is not None:
            what = "was dropped" if registers.is_dropped(target) else "is not on this node"
            return f"alias {self._model!r} stands for model {target.name!r}, which {what}: switch it with `ekko alias`"
        if self._model in registers.dropped:
            return f"model {self._model!r} was dropped on the node at {self._run_dir}: it has {known}"
        return f"the node at {self._run_dir} does not have model {self._model!r} yet: it has {known}"

    def _manifest(self) -> Manifest | None:
        manifest = read_manifest(self._run_dir)
        if manifest is None or manifest.boot_id != kernel_boot_id():
            return None  # the memory it speaks of is gone
        if manifest.layout_version != layout.LAYOUT_VERSION:
            raise StoreError(
                f"the node at {self._run_dir} uses shared-memory layout {manifest.layout_version}, this reader "
                f"{layout.LAYOUT_VERSION}: install the same version of ekko on both sides"
            )
        return manifest

    def _map_model(
        self, entry: ModelEntry, memory: TmpfsMemory, old: Attachment | None
    ) -> tuple[memoryview, int, dict[str, TableView], dict[str, TensorSpec]]:
        number = entry.bare_spec.id
        header = Mapping.open_to_read(memory.path(header_name(number)))
        tables = {}
        for spec in entry.tables:
            files = TableFiles(memory, number, spec.id)
            held = old.tables.get(spec.name) if old is not None else None
            tables[spec.name] = (
                held if held is not None and held.files == files else TableView(spec, files, counted=self._counted)
            )
            self._check(tables[spec.name])
        return header.view(layout.PAGE_BYTES), header.address, tables, {spec.name: spec for spec in entry.tensors}


def not_for_us(error: PermissionError, run_dir: Path) -> StoreError:
    """What is said where this user may not read a node's memory."""
    return StoreError(
        f"user {os.geteuid()} may not read {error.filename} of the node at {run_dir} (Permission denied): let others by "
        'node.shm_mode = "0644", or a group by node.shm_group'
    )


def names(known: ReadOnlyMapping[str, object]) -> str:
    """What there is, for an error."""
    return ", ".join(map(repr, known)) or "none"
