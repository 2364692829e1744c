"""Every benchmark runs at its tiny size, so that none can rot; and the reporting around them works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common

ROOT = Path(__file__).parent.parent
DEADLINE_S = 200

# What the readers of a benchmark's JSON rely on, by benchmark.
KEYS = {
    "apply": {"rows_per_s", "vs_numpy_scatter", "inserts_per_s"},
    "compression": {"saved_float32", "saved_float16", "saved_int8", "dataset", "cells"},
    "lookup": {
        "keys_per_s",
        "vs_np_take",
        "vs_torch_embedding",
        "pooled_vs_embedding_bag",
        "pooled_vs_two_step",
        "counting_cost",
        "vs_redis_mget",
        "redis_p99_ratio",
        "cells",
        "codecs",
    },
    "read-under-write": {
        "p99_ratio",
        "torn_rows",
        "rows_read",
        "growth_p999_ratio",
        "growth_stall_cpu_ms_max",
        "unlocked_torn_rows",
    },
    "dissemination": {
        "rows_per_s",
        "vs_raw_zmq",
        "vs_raw_zmq_float16",
        "vs_redis_streams",
        "vs_redis_mset_mget",
        "vs_nats",
        "cpu",
    },
    "ps": {"pull_rows_per_s", "push_rows_per_s", "vs_redis_pipeline", "vs_torch_rpc", "workers_4_vs_1", "cells"},
    "gpu": {"engine", "registers", "spills", "lookup_vs_torch", "apply_vs_index_copy", "hbm_fraction"},
    "membership": {"detect_s_100", "detect_s_100_loss_50pct", "false_suspicions", "idle_bytes_per_s"},
    "health": {"false_alarms_auc", "false_alarms_log_loss", "level", "streams", "windows", "delays"},
    "hooks": {"step_overhead", "queue_rows_max", "captured_equals_changed"},
    "latency": {"p50_ms", "p99_ms", "wan_excess_p99_ms"},
    "congestion": {"at", "real", "lag_bounded", "significant_p99_ratio_8", "fifo_p99_ratio_8", "bytes_saved_8", "return_ratio"},
    "ablation": {"mean_ms", "p99_ms", "max_ms", "hostile"},
    "scale": {"nodes", "missed", "redundancy_max", "redundancy_loss_1pct_max", "region_bytes_ratio_max", "busiest_to_mean_max"},
    "cache-policy": {"buckets_cost_max", "whole_hidden", "assign_cost_max", "traces", "policies", "updates", "ticks", "decays"},
    "optimizers": {"aggregate_rows_per_s", "aggregate_vs_torch", "adam_vs_torch", "ftrl_rows_per_s", "normal_rows_per_s"},
    "rollback": {"restore_s", "full_reload_s", "speedup", "detect_s"},
    "sinks": {"rates", "latency", "nothing_rows_per_s", "embedding_rows_per_s", "redis_rows_per_s"},
    "sync-cost": {"ratio_10m_to_1m", "vs_scan", "metadata_bytes_per_row", "memory_bytes_per_row"},
}


def test_the_store_has_its_benchmarks() -> None:
    assert set(KEYS) <= set(common.names())


# Half a minute each, of which other tests with processes, or in virtual time, do the same.
LONG = {"ablation", "dissemination", "flood", "latency", "ps", "read-under-write", "rollback", "scale", "sinks"}


@pytest.mark.processes
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in common.names()]
)
def test_quick(name: str) -> None:
    result = common.measure(name, quick=True)
    figures, environment = result["figures"], result["environment"]
    assert result["name"] == name
    assert isinstance(figures, dict)
    assert isinstance(environment, dict)
    assert KEYS.get(name, set()) <= set(figures)
    assert {"cores", "python", "commit", "seconds"} <= set(environment)
    assert set(common.targets(name)) <= set(figures)
    json.dumps(result)
    for figure, value in figures.items():  # a figure that is missing says why
        assert value is not None or f"note_{figure.removeprefix('vs_')}" in figures, figure
    if name == "read-under-write":
        assert figures["torn_rows"] == 0
        assert figures["unlocked_torn_rows"] > 0, "torn rows would not show"
        assert figures["slots_reused"] > 10_000
        assert figures["stamps_back"] == 0
        assert figures["rows_read"] > 100_000
    if name == "cache-policy":
        assert figures["assign_cost_max"] == 0
        assert all(0 <= cell["whole"] <= cell["hit"] < 1 for cell in figures["traces"])
    if name == "congestion":
        assert figures["replicas_equal"] == 1
        assert figures["significant_p99_ratio_8"] < figures["fifo_p99_ratio_8"]
        assert figures["bytes_saved_8"] > 0.5
    if name == "hooks":
        assert figures["captured_equals_changed"] == figures["stores_equal"] == 1
        assert figures["rows_missed"] == 0
        assert figures["queue_rows_max"] <= figures["table_rows"]
        assert figures["queue_per_row_bytes"] <= 5
    if name == "dissemination":
        cells = {(cell["side"], cell["role"]): cell["cpu_ms_per_batch"] for cell in figures["cpu"]}
        assert all(value > 0 for value in cells.values())
        roles = {"ekko": ("publisher", "train", "leader", "leaf", "leaf", "leaf"), "raw_zmq": ("publisher", *4 * ("replica",))}
        for side, own in {**roles, "ekko_float16": roles["ekko"]}.items():
            assert sum(cells[side, role] for role in own) == pytest.approx(cells[side, "all"], rel=1e-6)


def test_the_command_writes_a_table_and_json(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts/bench"), "apply", "--quick", "--json"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "COLUMNS": "120"}
    piped = subprocess.run([*command, "-"], env=environment, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    assert json.loads(piped.stdout)["name"] == "apply"
    assert "vs_numpy_scatter" in piped.stderr
    filed = subprocess.run(
        [*command, "out.json"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    assert json.loads((tmp_path / "out.json").read_text())["environment"]["quick"] is True
    assert "vs_numpy_scatter" in filed.stdout


def test_an_unknown_benchmark_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "nonsense" in result.stderr


@pytest.mark.parametrize(
    ("value", "target", "met"), [(0.8, ">= 0.8", True), (0.79, ">= 0.8", False), (1.5, "<= 1.5", True), (1.6, "<= 1.5", False)]
)
def test_targets(value: float, target: str, met: bool) -> None:
    assert common.meets(value, target) is met
