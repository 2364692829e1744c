"""The same scenario as real processes: daemons of this machine, load through a publisher, faults by signals, a live table.

What cannot be done to real processes without privileges (loss, rates, partitions, clocks) is refused, not ignored: `--virtual`
does it. At the end every node must hold what the training node holds, and every step that `publish` returned for must be there.
"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ekko.errors import ConfigError, EkkoError
from ekko.store import layout
from ekko.store.kernels.index import shards_of
from ekko.train.publisher import Publisher
from p2p.paper.sync import PRESETS, PUSH
from sim_cluster.demo.verify import Contents, contents, difference
from sim_cluster.network import NetworkOptions
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeProcessError, NodeSpec, wait_until
from sim_cluster.scenario import BURST_MAX, NETWORK, FaultEvent, Scenario

# A kill comes in the middle of whatever a process does, wanted or not.
KINDS_REAL: Final = ("crash", "kill", "leave", "pause")
SHOW_EVERY_S: Final = 0.5
PUBLISH_TIMEOUT_S: Final = 2.0
MODEL: Final = "sim"
TABLES: Final = {"item": 4, "user": 2}
_PLAIN: Final = NetworkOptions()
# What the virtual network has of itself; between real processes, loopback does.
_IGNORED: Final = ("delay_ms_min", "delay_ms_max", "region_delay_ms", "links", "tail_ms", "afterlife_probability")


def check_feasible(scenario: Scenario) -> None:
    """Refuse what only virtual time can do.

    Raises:
        ConfigError: naming it.
    """
    wanted = [field.name for field in fields(NetworkOptions) if field.name not in _IGNORED]
    impossible = [name for name in wanted if getattr(scenario.network, name) != getattr(_PLAIN, name)]
    impossible += [f'links."{pair}"' for pair, link in scenario.network.links.items() if link.rate_bytes_per_ms]
    impossible += [f'links."{pair}".loss' for pair, link in scenario.network.links.items() if link.loss_probability]
    impossible += sorted({f"fault {event.kind!r}" for event in scenario.events if event.kind not in KINDS_REAL})
    if scenario.swarm and NETWORK in scenario.kinds:
        impossible.append(f"swarm with {NETWORK!r} among its kinds")
    impossible += sorted(
        {f"fault {kind!r}" for kind in scenario.kinds if scenario.swarm and kind not in (*KINDS_REAL, NETWORK)}
    )
    if PRESETS[scenario.sync] != PUSH:
        impossible.append(f"sync = {scenario.sync!r}")
    if scenario.workload.models > 1:
        impossible.append("workload.models above 1")
    if impossible:
        raise ConfigError(f"real processes cannot have {', '.join(impossible)}: add --virtual, or remove it")


def run_real(scenario: Scenario, seed: int) -> dict[str, Any]:
    """Run a scenario as real processes and show it while it runs.

    Returns:
        Figures, and `problem`: what is wrong at the end, or an empty string.

    Raises:
        ConfigError: the scenario asks for what real processes cannot do.
        NodeProcessError: a node did not start.
    """
    check_feasible(scenario)
    regions = sorted({node.region for node in scenario.nodes})
    pairs = {f"{a}/{b}": float(scenario.network.region_delay_ms) for a in regions for b in regions if a < b}
    pairs |= {pair: float(link.delay_ms + scenario.network.region_delay_ms) for pair, link in scenario.network.links.items()}
    load, holds = scenario.workload, scenario.holds(seed)
    model = ModelTables(TABLES, load.shards, codec=load.codec, partitions=load.partitions)
    specs = [
        NodeSpec(node.name, node.region, node.role, {MODEL: holds[node.name][load.model_names[0]]}) for node in scenario.nodes
    ]
    delays = {pair: delay for pair, delay in pairs.items() if delay}
    with (
        tempfile.TemporaryDirectory(prefix="ekko-sim-") as folder,
        LocalCluster(Path(folder), specs, models={MODEL: model}, delays_ms=delays) as cluster,
    ):
        cluster.start()
        run = _Run(scenario, cluster, seed)
        with Live(run.table(), console=Console(stderr=True), refresh_per_second=4) as live:
            run.drive(live)
            problem = run.settle(live)
        return {"seed": seed, "problem": problem, "batches": run.published, "rows": run.rows, "refused": run.refused}


class _Run:
    """Load and faults on a running cluster."""

    def __init__(self, scenario: Scenario, cluster: LocalCluster, seed: int) -> None:
        self.published = self.rows = self.refused = 0
        self._scenario = scenario
        self._cluster = cluster
        self._rng = random.Random(f"load of {seed}")
        self._events = scenario.faults(seed).events
        self._trainer = cluster[scenario.trainer]
        self._publisher: Publisher | None = None
        self._acknowledged: dict[tuple[str, int], int] = {}  # (table, key) -> stamp
        self._ends: list[tuple[float, FaultEvent]] = []
        self._happening: dict[str, str] = {}  # node -> what is being done to it

    def drive(self, live: Live) -> None:
        """Load and faults, for the scenario's duration."""
        begin = shown = time.monotonic()
        every_s = 1 / self._scenario.workload.batches_per_s
        events, due = list(self._events), begin
        while (now := time.monotonic()) < begin + self._scenario.duration_ms / 1000:
            while events and begin + events[0].at_ms / 1000 <= now:
                self._begin(events.pop(0), now)
            self._undo(now)
            for _ in range(self._rng.randint(2, BURST_MAX) if self._rng.random() < self._scenario.workload.bursts else 1):
                self._publish()
            if now - shown > SHOW_EVERY_S:
                shown = now
                live.update(self.table())
            due = max(due + every_s, now)
            time.sleep(max(0.0, due - time.monotonic()))

    def settle(self, live: Live) -> str:
        """End all faults, and wait until all nodes are equal; what is wrong, or an empty string."""
        self._undo(float("inf"))
        if self._publisher is not None:
            self._publisher.close()
        for node in self._cluster.nodes.values():
            node.wait_ready()
        problem = "not looked yet"

        def equal() -> bool:
            nonlocal problem
            live.update(self.table())
            problem = self._problem()
            return not problem

        try:
            wait_until(equal, "all nodes equal", self._scenario.settle_ms / 1000)
        except TimeoutError as error:
            return f"{error}: {problem}"
        return ""

    def _problem(self) -> str:
        reference = _rows_of(self._trainer)
        for table in TABLES:
            held = reference.get(table)
            stamps = {} if held is None else dict(zip(held["key"].tolist(), held["stamp"].tolist(), strict=True))
            for (name, key), stamp in self._acknowledged.items():
                if name == table and stamps.get(key, 0) < stamp:
                    return f"the training node lost stamp {stamp} of {table} {key}, which it had acknowledged"
        for node in self._cluster.nodes.values():
            due = {table: rows[np.isin(self._partition_of(rows), node.spec.hold[MODEL])] for table, rows in reference.items()}
            if node is not self._trainer and (found := difference(due, _rows_of(node))):
                return f"{node.id} differs from {self._trainer.id}: {found}"
        return ""

    def _partition_of(self, rows: NDArray[np.void]) -> NDArray[np.int64]:
        shards = np.empty(len(rows), np.int64)
        shards_of(np.ascontiguousarray(rows["key"]), self._scenario.workload.shards, shards)
        return shards % self._scenario.workload.partitions

    def _publish(self) -> None:
        load, rng = self._scenario.workload, self._rng
        table, count = rng.choice(list(TABLES)), rng.randint(1, load.rows)
        keys = np.unique(np.array([int(load.keys * rng.random() ** 3) for _ in range(count)], np.uint64))
        delete = rng.random() < load.deletes
        if self._trainer.id in self._happening:
            return  # it would only make us wait
        try:
            if self._publisher is None:
                self._publisher = Publisher(self._trainer.local, MODEL, TABLES, load.shards, PUBLISH_TIMEOUT_S, load.codec)
            if delete:
                stamp = self._publisher.delete(table, keys)
            else:
                stamp = self._publisher.publish(table, keys, np.full((len(keys), TABLES[table]), self.published, np.float32))
        except EkkoError:
            self.refused += 1
            return
        self.published += 1
        self.rows += len(keys)
        self._acknowledged.update({(table, key): stamp for key in keys.tolist()})

    def _begin(self, event: FaultEvent, now: float) -> None:
        if event.node in self._happening:
            return
        node = self._cluster[event.node]
        act: dict[str, Callable[[], object]] = {"pause": node.pause, "leave": node.request_stop}
        act.get(event.kind, node.kill)()
        self._happening[event.node] = {"pause": "paused", "leave": "stopped"}.get(event.kind, "killed")
        self._ends.append((now + event.for_ms / 1000, event))

    def _undo(self, now: float) -> None:
        for end in [end for end in self._ends if end[0] <= now]:
            self._ends.remove(end)
            node = self._cluster[end[1].node]
            if end[1].kind == "pause":
                node.resume()
            else:
                if end[1].kind == "leave":
                    node.stop()
                node.start()
            del self._happening[node.id]

    def table(self) -> Table:
        """The cluster now."""
        shown = Table("node", "region", "", "peers", "rows in", title=f"{self._scenario.name}: {self.published} batches")
        for node in self._cluster.nodes.values():
            state = self._happening.get(node.id, "")
            shown.add_row(node.id, node.spec.region, state, *(("", "") if state else _figures(node)))
        return shown


def _rows_of(node: NodeProcess) -> Contents:
    """What a node holds; of a tombstone the value is blanked, which is whatever the row was before it was deleted."""
    held = contents(node.run_dir, MODEL)
    for rows in held.values():
        gone = (rows["flags"] & layout.FLAG_TOMBSTONE) != 0
        rows["data"][gone] = np.zeros(int(gone.sum()), rows["data"].dtype)
    return held


def _figures(node: NodeProcess) -> tuple[str, str]:
    try:
        peers = node.status()["peers"]
    except (NodeProcessError, KeyError):
        return "", "starting"
    return str(sum(peer["alive"] for peer in peers)), f"{sum(peer['rows_in'] for peer in peers):,}"
