"""The daemon's side of snapshots: a process of its own writes each, at its time or when asked, and this watches it."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ekko.snapshots.take import Kind, Plan

LINE_BYTES_MAX = 1 << 16  # of what the process says
ERROR_MAX = 2_000


@dataclass(frozen=True, slots=True)
class SnapshotPicture:
    """What is to be said of a node's snapshots."""

    url: str
    running: bool = False
    done_bytes: int = 0  # of the one that is being written
    total_bytes: int = 0  # about
    name: str = ""  # the last one that was written
    created_ms: int = 0  # Unix milliseconds
    bytes: int = 0
    rows: int = 0
    full: bool = False
    seconds: float = 0.0
    written: int = 0  # in this life
    failed: int = 0
    error: str = ""  # of the last attempt; empty: it did not fail
    restored: str = ""  # what this life began with
    refused: tuple[str, ...] = ()  # and why others were not taken


@dataclass(frozen=True, slots=True)
class SnapshotSettings:
    """`[snapshots]`, understood."""

    url: str  # of this node's own folder
    every_s: float
    plan: Plan
    seed: str | None = None


class SnapshotService:
    """Takes snapshots until it is cancelled.

    Args:
        settings: where to, and how often.
        run_dir: of the node.
        node: its id.
        told: called with the picture after each attempt.
    """

    def __init__(self, settings: SnapshotSettings, run_dir: Path, node: str, told: Callable[[SnapshotPicture], None]) -> None:
        self.picture = SnapshotPicture(settings.url)
        self._settings = settings
        self._run_dir = run_dir
        self._node = node
        self._told = told
        self._asked = asyncio.Event()
        self._kind: Kind = "auto"

    def restored(self, name: str, created_ms: int, refused: tuple[str, ...]) -> None:
        """This life began with a snapshot, or with none; why others were not taken."""
        self.picture = replace(self.picture, restored=name, name=name, created_ms=created_ms, refused=refused)

    def ask(self, kind: Kind) -> None:
        """Take one now; while one is being written, the next follows it."""
        self._kind = kind
        self._asked.set()

    async def run(self) -> None:
        """Take one after another."""
        due_s = time.monotonic() + self._settings.every_s
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), max(0.0, due_s - time.monotonic()))
            self._asked.clear()
            kind, self._kind = self._kind, "auto"
            due_s = time.monotonic() + self._settings.every_s
            await self._take(kind)
            self._told(self.picture)

    async def _take(self, kind: Kind) -> None:
        settings = self._settings
        arguments = (
            str(self._run_dir),
            settings.url,
            self._node,
            str(settings.plan.full_every_s),
            str(settings.plan.keep),
            kind,
        )
        self.picture = replace(self.picture, running=True, done_bytes=0, total_bytes=0)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "ekko.snapshots",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
            )
        except OSError as error:
            self._failed(f"the process that writes snapshots cannot be started: {error}")
            return
        try:
            said = await self._listen(process)
        except ValueError:  # a line longer than any of ours
            said = {}
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if "name" in said:
            self._written(said)
        else:
            self._failed(str(said.get("error", f"the process that writes snapshots ended with {process.returncode}")))

    async def _listen(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        """The last thing that it says; its progress goes into the picture."""
        assert process.stdout is not None
        said: dict[str, Any] = {}
        async for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue  # something else wrote to its output
            if "done" in said:
                self.picture = replace(self.picture, done_bytes=said["done"], total_bytes=said["total"])
        await process.wait()
        return said

    def _written(self, said: dict[str, Any]) -> None:
        self.picture = replace(
            self.picture,
            running=False,
            name=said["name"],
            created_ms=said["created_ms"],
            bytes=said["bytes"],
            rows=said["rows"],
            full=said["full"],
            seconds=said["seconds"],
            written=self.picture.written + 1,
            error="",
        )

    def _failed(self, error: str) -> None:
        self.picture = replace(self.picture, running=False, failed=self.picture.failed + 1, error=error[:ERROR_MAX])
