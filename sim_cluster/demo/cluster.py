"""The demo's nodes and worker processes: where they are, how far apart, and how they are started and ended."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ekko.errors import EkkoError
from sim_cluster.demo.board import Board, Word
from sim_cluster.demo.worker import STOPPED_STATUS
from sim_cluster.processes import LocalCluster, NodeProcess, NodeProcessError, NodeSpec

MODEL: Final = "ctr"
TRAIN_REGION: Final = "train"
TRAIN_NODE: Final = "train-1"
REGIONS: Final[Mapping[str, float]] = {"near": 2.0, "mid": 40.0, "far": 90.0}  # one-way delay to the trainer, milliseconds
NODES_PER_REGION: Final = 2
# Serving regions lie on different sides of the trainer: between them it is at least as far as the farther one's way.
BETWEEN_REGIONS: Final[Mapping[str, float]] = {"near/mid": 40.0, "near/far": 90.0, "mid/far": 100.0}

WORKER_STOP_S_MAX: Final = 5.0
POLL_S: Final = 0.02
LOG_TAIL_LINES: Final = 3


class DemoError(EkkoError):
    """The demo could not be carried through."""


# Rows of each table on a device: fewer than there are users and films, so that rows leave the caches and come back.
DEVICE_ROWS: Final = 768


def make_cluster(folder: Path, device: str = "") -> LocalCluster:
    """The demo's nodes, not started yet. The model comes with the trainer's publisher.

    `device`: of the nodes that scorers read from; empty: none.
    """
    specs = [NodeSpec(TRAIN_NODE, TRAIN_REGION, "train")]
    on_device: dict[str, str | int] = {"name": device, "rows": DEVICE_ROWS} if device else {}
    for region in REGIONS:
        specs.append(NodeSpec(f"{region}-1", region, device=on_device))
        specs += [NodeSpec(f"{region}-{n}", region) for n in range(2, NODES_PER_REGION + 1)]
    delays = {f"{TRAIN_REGION}/{region}": delay for region, delay in REGIONS.items()} | dict(BETWEEN_REGIONS)
    return LocalCluster(folder, specs, delays_ms=delays)


class Workers:
    """The trainer and the scorers. A context manager: leaving it ends them all."""

    def __init__(self, folder: Path, board: Board) -> None:
        self._folder = folder
        self._board = board
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._board[Word.STOP] = 1
        deadline = time.monotonic() + WORKER_STOP_S_MAX
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, module: str, *arguments: str) -> None:
        """Start `python -m module FOLDER arguments...`; its output goes to `name.log` in the folder."""
        command = [sys.executable, "-m", module, str(self._folder), *arguments]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | threads
            )

    def check(self) -> None:
        """Raise `DemoError` when one has failed."""
        for name, process in self._processes.items():
            if process.poll() not in (None, 0, STOPPED_STATUS):
                lines = (self._folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
                raise DemoError(f"the {name} process failed: {' | '.join(lines[-LOG_TAIL_LINES:]) or process.returncode}")


@dataclass(slots=True)
class DelayLog:
    """Exact publish-to-visible delays, fetched from the nodes now and then, pooled by region.

    Attributes:
        by_region: region -> delays in milliseconds, in the order they were fetched.
    """

    cluster: LocalCluster
    by_region: dict[str, list[float]] = field(default_factory=lambda: {region: [] for region in REGIONS})
    _next: dict[str, int] = field(default_factory=dict)
    _turn: int = 0

    def skip(self) -> None:
        """Forget everything that was applied until now."""
        self.fetch()
        self.by_region = {region: [] for region in REGIONS}

    def fetch(self) -> None:
        """Take what is new from all nodes."""
        for node in self.cluster.nodes.values():
            self._fetch_from(node)

    def fetch_next(self) -> None:
        """Take what is new from one node, each in its turn: while events stream, a node is asked for little at once."""
        self._turn = (self._turn + 1) % len(self.cluster.nodes)
        self._fetch_from(list(self.cluster.nodes.values())[self._turn])

    def _fetch_from(self, node: NodeProcess) -> None:
        """A node that does not answer is left for the next time."""
        if node.spec.region in self.by_region and node.running:
            with suppress(NodeProcessError):
                delays = node.delays(self._next.get(node.id, 0))
                self._next[node.id] = delays.next
                self.by_region[node.spec.region] += delays.delays_ms

    def restarted(self, node: str) -> None:
        """The node counts from nought again."""
        self._next.pop(node, None)

    def counts(self) -> dict[str, int]:
        """How many delays each region has so far."""
        return {region: len(delays) for region, delays in self.by_region.items()}


KILL_AT: Final = 0.4  # of the stream
KILLED_NODE: Final = "mid-1"  # the one its region's scorer reads from: reading goes on without the daemon
DOWN_S: Final = 5.0


@dataclass(slots=True)
class Outage:
    """One serving node dies in mid-stream and comes back; nothing else may notice."""

    cluster: LocalCluster
    delays: DelayLog
    killed_s: float = 0.0  # CLOCK_MONOTONIC; 0: not yet
    restarted_s: float = 0.0
    caught_up_s: float = 0.0
    _before: dict[str, int] = field(default_factory=dict)
    others: dict[str, list[float]] = field(default_factory=dict)  # delays in the other regions from kill to catch-up

    def step(self, fraction: float) -> None:
        """Do what is due at this fraction of the stream."""
        node = self.cluster[KILLED_NODE]
        now_s = time.monotonic()
        if not self.killed_s and fraction >= KILL_AT:
            self.delays.fetch()
            self._before = self.delays.counts()
            node.kill()
            self.killed_s = now_s
        elif self.killed_s and not self.restarted_s and now_s >= self.killed_s + DOWN_S:
            node.start()
            self.delays.restarted(node.id)
            self.restarted_s = now_s
        elif self.restarted_s and not self.caught_up_s and _is_ready(node):
            self.caught_up_s = time.monotonic()
            self.delays.fetch()
            for region, count in self._before.items():
                if region != node.spec.region:
                    self.others[region] = self.delays.by_region[region][count:]

    @property
    def state(self) -> str:
        """For people."""
        if self.caught_up_s:
            return f"{KILLED_NODE} caught up {self.caught_up_s - self.restarted_s:.1f} s after its restart"
        if self.restarted_s:
            return f"{KILLED_NODE} catches up"
        return f"{KILLED_NODE} killed" if self.killed_s else ""


def _is_ready(node: NodeProcess) -> bool:
    with suppress(NodeProcessError):
        status = node.status()
        return bool(status["ready"]) and MODEL in status["models"]
    return False
