"""The load on real nodes, whose regions are joined by the kernel's token bucket, where this machine allows that.

The training node is in one region, two serving nodes in another, 40 ms away (the transport's delay line: `netem` is often
missing). A process looks rows up in the memory of the serving node that gets them last, so a delay ends where a reader sees the
row. Without namespaces the nodes' own budget is all that limits a link, and the figures say so.

Which rows are significant is for their origin to say, from what it has seen so far; those are looked at that are a fifth above
the threshold of the long run. All keys are new, so freshness does not count (`fresh_weight = 0`).
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from numpy.typing import NDArray

import ekko
from benchmarks.congested.load import FIRST_SIGNIFICANT, TABLE, Load, classes_of
from benchmarks.congested.probe import Expected, Probe
from benchmarks.limited.cluster import RegionNode
from benchmarks.limited.regions import Regions, missing
from ekko.rates import BYTES_PER_S_OF_MBPS
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until

F64 = NDArray[np.float64]
HOME: Final = "home"
AWAY: Final = "us"
DELAY_MS: Final = 40.0
TRAINER: Final = "train"
SERVING: Final = ("us-0", "us-1")
NODES: Final = (NodeSpec(TRAINER, HOME, "train"), *(NodeSpec(name, AWAY) for name in SERVING))
BUDGET_SHARE: Final = 0.95
# Of the ordinary updates so many are looked for: a look-up of thousands of rows takes longer than it should measure.
SAMPLED: Final = 0.02
SETTLE_S_MAX: Final = 240.0
# Two classes above the first: a fifth more than the threshold.
SURELY_SIGNIFICANT: Final = FIRST_SIGNIFICANT + 2


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Of one stretch of the load."""

    significant_ms: F64
    ordinary_ms: F64
    sent_bytes_per_s: float
    published_bytes_per_s: float
    late_ms: float  # 99th percentile of how late this machine woke the publisher

    @property
    def significant_p99_ms(self) -> float:
        return float(np.percentile(self.significant_ms, 99))


def how_limited() -> str:
    """What limits the links here, for the figures."""
    reason = missing()
    delays = "delays in the transport's shaper"
    return f"the nodes' own budget only ({reason}); {delays}" if reason else f"network namespaces, veth, tc tbf; {delays}"


class Bed:
    """A running cluster with one outbox, its publisher and its probe."""

    def __init__(
        self, cluster: LocalCluster, regions: Regions | None, load: Load, publisher: ekko.Publisher, probe: Probe
    ) -> None:
        self._cluster = cluster
        self._regions = regions
        self._load = load
        self._publisher = publisher
        self._probe = probe
        self._steps = load.steps()
        self._number = 0
        self._rng = np.random.default_rng(7)

    def limit(self, bytes_per_s: float | None) -> None:
        """The link between the regions carries so much from now on; None: as much as there is."""
        rate = "none" if bytes_per_s is None else f"{max(0.01, bytes_per_s * BUDGET_SHARE / BYTES_PER_S_OF_MBPS):.4f}"
        if self._regions is not None:
            self._regions.limit(None if bytes_per_s is None else bytes_per_s / BYTES_PER_S_OF_MBPS)
        body = {"pair": f"{AWAY}/{HOME}", "rate": rate}
        for node in self._cluster.nodes.values():
            status, answer = node.post("/rate", body)
            if status != 200:
                raise RuntimeError(f"{node.id} refuses the rate: {answer!r}")

    def run(self, seconds: float, drain_s: float) -> Measured:
        """Publish for so long, and wait until what was looked for is seen, for `drain_s` at most."""
        sent, begin_s, published, late = self._sent(), time.monotonic(), 0, []
        start_ms: int | None = None
        for at_ms, keys, significance in self._steps:
            start_ms = at_ms if start_ms is None else start_ms
            due_s = begin_s + (at_ms - start_ms) / 1_000
            if due_s > begin_s + seconds:
                break
            time.sleep(max(0.0, due_s - time.monotonic()))
            late.append((time.monotonic() - due_s) * 1_000)
            self._publish(keys, significance)
            published += len(keys) * self._load.row_bytes
        taken_s = time.monotonic() - begin_s
        rate = (self._sent() - sent) / taken_s
        return Measured(*self._probe.finish(drain_s), rate, published / taken_s, float(np.percentile(late, 99)))

    def settle(self) -> bool:
        """Let everything reach everybody; whether it did, and the serving nodes hold the training node's rows."""
        self.limit(None)
        silent = self._publisher.wait(self._publisher.last_stamp, "all", SETTLE_S_MAX)
        return not silent and self._are_equal()

    def _publish(self, keys: np.ndarray, significance: np.ndarray) -> None:
        self._number += 1
        rows = np.full((len(keys), self._load.dim), self._number, np.float32)
        # Else zstd makes nothing of them; real rows hardly shrink.
        rows[:, 1:] = self._rng.standard_normal((len(keys), self._load.dim - 1), dtype=np.float32)
        now_s = time.monotonic()
        self._publisher.publish(TABLE, keys, rows, significance=significance)
        classes = classes_of(significance)
        significant = classes >= SURELY_SIGNIFICANT
        wanted = significant | ((classes < FIRST_SIGNIFICANT) & (self._rng.random(len(keys)) < SAMPLED))
        if wanted.any():
            self._probe.expect(Expected(self._number, keys[wanted], significant[wanted], now_s))

    def _sent(self) -> float:
        """Payload that the training node has sent to the other region."""
        return float(sum(peer["bytes_out"] for peer in self._cluster[TRAINER].status()["peers"] if peer["region"] == AWAY))

    def _are_equal(self) -> bool:
        keys = np.arange(self._load.rows, dtype=np.uint64)
        rows = []
        for node in self._cluster.nodes.values():
            with ekko.Reader(self._load.model.name, run_dir=node.run_dir, wait=10.0) as reader:
                rows.append(reader.lookup(TABLE, keys))
        return all(np.array_equal(rows[0], other) for other in rows[1:])


@contextmanager
def bed(load: Load, outbox: str) -> Iterator[Bed]:
    """A cluster whose nodes have this outbox, once it is ready."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ekko-bench-")))
        regions = stack.enter_context(Regions([HOME, AWAY])) if not missing() else None
        models = {load.model.name: ModelTables({TABLE: load.dim}, capacity_rows=load.rows)}

        def make_node(spec: NodeSpec, place: Path, ports: Sequence[int]) -> NodeProcess:
            node = _LocalNode(spec, place, ports) if regions is None else _RegionNode(spec, place, ports, regions)
            node.launcher = [*node.launcher, *_launcher(outbox)]
            return node

        delays_ms = {f"{HOME}/{AWAY}": DELAY_MS}
        cluster = stack.enter_context(LocalCluster(folder, NODES, models=models, delays_ms=delays_ms, make_node=make_node))
        cluster.start()
        publisher = stack.enter_context(ekko.Publisher(cluster[TRAINER].local, load.model.name))
        wait_until(lambda: len(cluster[TRAINER].status()["peers"]) == len(NODES) - 1, "the nodes meet", 60.0)
        probe = stack.enter_context(Probe(cluster[SERVING[-1]].run_dir, load.model.name, TABLE))
        yield Bed(cluster, regions, load, publisher, probe)


class _Weighed(NodeProcess):
    """Its rows matter as much as their publisher says, however new they are."""

    def write_config(self, seeds: Iterable[str], models: Mapping[str, ModelTables], delays_ms: Mapping[str, float]) -> None:
        """See `NodeProcess`."""
        super().write_config(seeds, models, delays_ms)
        with self.config_path.open("a") as file:
            file.writelines(f"[models.{json.dumps(name)}.priority]\nfresh_weight = 0\n" for name in models)


class _LocalNode(_Weighed):
    """Without a region's namespace."""


class _RegionNode(_Weighed, RegionNode):
    """In a region's namespace."""


def _launcher(outbox: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.congested.node", outbox]
