"""What `ekko snapshot` does, and its progress bars."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ekko.asking import ask_node
from ekko.errors import EkkoError, SnapshotError
from ekko.model import ModelSpec
from ekko.rundir import locked
from ekko.snapshots.catalog import Catalog
from ekko.snapshots.folders import open_folder
from ekko.snapshots.load import Loader, Wanted, open_or_restore
from ekko.store import Store

POLL_S = 0.1
SILENCE_S_MAX = 60.0


@contextlib.contextmanager
def bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def take_now(http: str, *, full: bool, quiet: bool) -> dict[str, Any]:
    """Have the node at HOST:PORT take a snapshot, and wait until it is written.

    Raises:
        EkkoError: it cannot, or it failed.
        NodeUnreachable: nobody answers there.
    """
    before = ask_node(http, "/snapshot", {"kind": "full" if full else "auto"})
    heard_s = time.monotonic()
    with bar("snapshot", quiet=quiet) as progress:
        while True:
            now = ask_node(http, "/status").get("snapshots") or before
            if now["failed"] > before["failed"]:
                raise SnapshotError(f"the snapshot failed: {now['error']}")
            if now["written"] > before["written"] + int(before["running"]):
                return dict(now)
            if now["running"]:
                heard_s = time.monotonic()
                progress(now["done_bytes"], max(1, now["total_bytes"]))
            elif time.monotonic() - heard_s > SILENCE_S_MAX:
                raise SnapshotError(f"the node at {http} does not begin the snapshot: look at its log")
            time.sleep(POLL_S)


def load_now(http: str, request: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Have the node at HOST:PORT load a file, and wait until it is done.

    Raises:
        EkkoError: it cannot, or it failed.
        NodeUnreachable: nobody answers there.
    """
    before = ask_node(http, "/load", request)
    with bar("load, rows", quiet=quiet) as progress:
        # While it starts, the status of a node says nothing of loads.
        while (now := ask_node(http, "/status").get("load", before))["running"] or now is before:
            progress(now["rows"], max(1, now["rows_total"]))
            time.sleep(POLL_S)
    if now["finished"] == before["finished"]:
        raise EkkoError(f"the node at {http} was started again while it loaded: load the file again")
    if now["error"]:
        raise EkkoError(now["error"])
    return dict(now)


def listed(url: str) -> list[dict[str, Any]]:
    """Every snapshot in a folder, oldest first."""
    catalog, found = Catalog(open_folder(url)), []
    for name in catalog.names():
        one: dict[str, Any] = {"name": name}
        try:
            manifest = catalog.chain(name)[-1].manifest
            one |= {"kind": "full" if manifest.parent is None else "increment", "node": manifest.node}
            one |= {"models": [part.entry.name for part in manifest.models], "rows": manifest.rows, "bytes": manifest.bytes}
            one |= {"parent": manifest.parent}
        except SnapshotError as error:
            one["damaged"] = str(error)
        found.append(one)
    return found


def verify(url: str, name: str | None, *, quiet: bool) -> dict[str, Any]:
    """Load a snapshot into memory of this process, which checks everything.

    Raises:
        SnapshotError: it is damaged, or there is none.
    """
    folder = open_folder(url)
    catalog = Catalog(folder)
    name = name or next(reversed(catalog.names()), None)
    if name is None:
        raise SnapshotError(f"there are no snapshots in {url}")
    chain = catalog.chain(name)
    with bar("verify", quiet=quiet) as progress:
        store = Store.anonymous(table_bytes_max=max(1 << 30, 2 * sum(entry.manifest.bytes for entry in chain)))
        Loader(folder, chain, Wanted(), progress=progress).fill(store)
        store.close()
    size, rows = sum(entry.manifest.bytes for entry in chain), sum(entry.manifest.rows for entry in chain)
    return {"name": name, "bytes": size, "rows": rows, "chain": [entry.name for entry in chain]}


def restore(
    url: str, run_dir: Path, node: str, specs: Mapping[str, ModelSpec], hold: Mapping[str, Sequence[int]], *, quiet: bool
) -> dict[str, Any]:
    """Begin the store of a node that does not run with the newest sound snapshot of a folder.

    Raises:
        ConfigError: the node runs.
        SnapshotError: it has memory already, or no snapshot is sound.
    """
    with locked(run_dir), bar("restore", quiet=quiet) as progress:
        if Store.attach(run_dir) is not None:
            raise SnapshotError(f"the node of {run_dir} has its memory still: start it; or remove that first (`ekko clean`)")
        restored = open_or_restore(run_dir, [open_folder(url)], Wanted(specs, hold, node), progress=progress)
        if restored.snapshot is None:
            restored.store.destroy()
            reasons = "; ".join(restored.refused) or "there are none"
            raise SnapshotError(f"no snapshot in {url} can be used: {reasons}")
        restored.store.close()
        return {"name": restored.snapshot, "bytes": restored.bytes, "refused": restored.refused}
