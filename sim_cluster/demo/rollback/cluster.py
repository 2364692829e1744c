"""The chapter's nodes: one that trains, two that serve, a baseline and a witness; all judge the model by the same settings."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from sim_cluster.demo.cluster import MODEL, TRAIN_NODE, TRAIN_REGION
from sim_cluster.demo.rollback import plan
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec

REGIONS: Final[Mapping[str, float]] = {"near": 2.0, "far": 90.0}  # one-way delay to the trainer, milliseconds
BASELINE_NODE: Final = "baseline-1"
WITNESS_NODE: Final = "witness-1"
LOG_BYTES: Final = "64MB"

__all__ = ["BASELINE_NODE", "MODEL", "REGIONS", "TRAIN_NODE", "WITNESS_NODE", "make_cluster"]


class JudgingNode(NodeProcess):
    """A node with `[health]`."""

    def write_config(self, seeds: Iterable[str], models: Mapping[str, ModelTables], delays_ms: Mapping[str, float]) -> None:
        """See `NodeProcess`."""
        super().write_config(seeds, models, delays_ms)
        settings = {
            "window": f"{plan.WINDOW_S:g}s",
            "lateness": f"{plan.LATENESS_S:g}s",
            "horizon": "1h",
            "level": plan.LEVEL,
            "tolerance": plan.TOLERANCE,
            "precision": plan.PRECISION,
            "baseline_share": plan.BASELINE_SHARE,
        }
        if self.spec.role == "witness":
            settings |= {
                "auto_rollback": True,
                "auto_rollback_every": f"{plan.ROLLBACK_EVERY_S:g}s",
                "probe_share": plan.PROBE_SHARE,
            }
        lines = ["[health]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
        lines.append(f"watermarks = {{ auc = {{ min = {plan.AUC_MIN} }} }}")
        with self.config_path.open("a") as config:
            config.write("\n".join(lines) + "\n")


def make_cluster(folder: Path, baseline_delay_s: float = plan.BASELINE_DELAY_S) -> LocalCluster:
    """Not started yet. The model comes with the trainer's publisher."""
    older = {"log_bytes": LOG_BYTES}
    specs = [
        NodeSpec(TRAIN_NODE, TRAIN_REGION, "train"),
        *(NodeSpec(f"{region}-1", region) for region in REGIONS),
        NodeSpec(BASELINE_NODE, "near", "baseline", settings=older | {"delay": f"{baseline_delay_s:g}s"}),
        NodeSpec(WITNESS_NODE, TRAIN_REGION, "witness", settings=older | {"delay": f"{plan.WITNESS_DELAY_S:g}s"}),
    ]
    delays = {f"{TRAIN_REGION}/{region}": delay for region, delay in REGIONS.items()} | {"near/far": 90.0}
    return LocalCluster(folder, specs, delays_ms=delays, make_node=JudgingNode)
