"""Taking the next snapshot of a node, as its daemon's helper process and `ekko snapshot` do it: clean, write, prune."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ekko.errors import SnapshotError
from ekko.snapshots.catalog import Catalog, Entry
from ekko.snapshots.folders import Folder
from ekko.snapshots.format import SnapshotManifest
from ekko.snapshots.write import Progress, SnapshotWriter, TryAgainError
from ekko.store.images import StoreImage

ATTEMPTS_MAX = 3  # where the store changes under our hands in a way that no snapshot can follow, which is rare
INCREMENTS_MAX = 64  # over one full snapshot: each makes a restart read more files

Kind = Literal["auto", "full"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How snapshots follow each other."""

    full_every_s: float = 86_400.0
    keep: int = 2


def take(
    run_dir: Path, folder: Folder, node: str, plan: Plan, kind: Kind = "auto", progress: Progress = lambda done, total: None
) -> SnapshotManifest:
    """Write the next snapshot; remove what was never finished before, and what is not kept any more afterwards.

    Raises:
        SnapshotError: it could not be written; what there was is still there.
        StoreError: there is no store.
    """
    catalog = Catalog(folder)
    with folder.locked():
        catalog.remove_leftovers()
        for attempt in range(ATTEMPTS_MAX):
            parent = _parent(catalog, run_dir, plan) if kind == "auto" and attempt == 0 else None
            try:
                manifest = SnapshotWriter(run_dir, folder, node, progress).write(parent)
                break
            except TryAgainError:
                if attempt + 1 == ATTEMPTS_MAX:
                    raise
        catalog.prune(plan.keep)
    return manifest


def _parent(catalog: Catalog, run_dir: Path, plan: Plan) -> Entry | None:
    """What an increment may stand on; None: a full one is due."""
    names = catalog.names()
    if not names:
        return None
    try:
        chain = catalog.chain(names[-1])
    except SnapshotError:
        return None
    newest = chain[-1]
    now_ms = max(time.time() * 1000, newest.manifest.created_ms)
    if len(chain) > INCREMENTS_MAX or now_ms >= chain[0].manifest.created_ms + plan.full_every_s * 1000:
        return None
    return newest if newest.manifest.store == StoreImage(run_dir).manifest.prefix else None
