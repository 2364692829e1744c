"""The demo as a whole, small: real processes on synthetic events."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ekko.cli import EXIT_INTERRUPTED
from ekko.store.manifest import prefix_of
from sim_cluster.demo import data
from sim_cluster.demo.board import Board
from sim_cluster.demo.cluster import REGIONS, DemoError, Workers
from sim_cluster.demo.display import Display
from sim_cluster.demo.report import print_result
from sim_cluster.demo.run import Options, run_demo
from sim_cluster.processes import MEMORY_DIR, wait_until
from tests.everywhere import PATIENCE_S

STREAM = 1_500


@pytest.mark.timeout(480)  # eleven processes begin at once
@pytest.mark.processes
@pytest.mark.parametrize("device", ["host-twin", pytest.param("", marks=pytest.mark.long)])
def test_a_small_run_from_training_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    events = data.generate(0, "a test", count=8_000)
    monkeypatch.setattr(data, "load", lambda **_: events)
    log = io.StringIO()
    with Display(Console(file=log)) as display:
        result = run_demo(Options(tmp_path / "out", stream=STREAM, delays=(200, 500), device=device), display)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["replicas_equal"] is True, report["differences"]
    assert report["predicted_before_learnt"] is True
    assert report["dataset"] == "synthetic"
    assert report["events"] == {"offline": 6_500, "stream": STREAM, "per_s": 500.0}
    assert report["rows_published"] >= STREAM // 64  # at the very least a row a step
    assert report["bytes_published"] > report["rows_published"] * 4 * 16
    assert set(report["latency_ms"]) == set(report["by_region"]) == set(REGIONS)
    if device:
        assert report["caches_equal"] is True, report["device"]
        assert report["device"]["tables"] == 4 * len(REGIONS)
        assert report["device"]["keys_on_device"] > 0  # how many depends on how soon the nodes come to fill their caches
    else:
        assert report["device"] is report["caches_equal"] is None
    for region, delay in REGIONS.items():
        latency = report["latency_ms"][region]
        assert delay <= latency["p50"] <= latency["p99"] <= latency["max"]
        # Of each batch to each node; a node that stood still gets what it missed another way.
        assert 0 < latency["samples"] <= 2 * report["batches_published"]
    for part in (report, *report["by_region"].values()):
        assert set(part["auc"]) == set(part["log_loss"]) == {"live", "delayed", "frozen"}
        assert set(part["auc"]["delayed"]) == set(part["auc_gain"]["delayed"]) == {"200", "500"}
        assert set(part["auc_gain"]["frozen"]) == {"mean", "low", "high"}
    for picture in ("latency.png", "auc.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert "streaming 1,500 events: done." in log.getvalue()
    page = io.StringIO()
    print_result(result, Console(file=page, width=100))
    assert "SYNTHETIC EVENTS, not real data: a test" in page.getvalue()
    assert "Every replica equals the training node bit for bit (6 serving nodes)." in page.getvalue()
    assert (f"Every row on {device} equals its node's store bit for bit" in page.getvalue()) == bool(device)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.processes
@pytest.mark.parametrize(
    ("chapter", "before"), [("freshness", "starting nodes, training offline"), ("rollback", "waiting for a baseline of")]
)
def test_an_interrupt_in_mid_stream_leaves_nothing_behind(chapter: str, before: str, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "ekko.cli", "demo", "--chapter", chapter, "--synthetic", "--out", str(tmp_path / "out")]
    said = tmp_path / "said"
    with said.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() or re.search(f"{before}.*: done", said.read_text()), "the stream to begin", 300)
        assert process.poll() is None, said.read_text()
        nodes = list(tmp_path.glob("*/nodes/*"))
        assert len(nodes) >= 5
        prefixes = [prefix_of(manifest.parent) for manifest in tmp_path.glob("*/nodes/*/run/**/manifest.json")]
        assert len(prefixes) >= len(nodes) + 2 * (chapter == "rollback"), "a baseline and a witness have two stores each"
        assert all(any(MEMORY_DIR.glob(f"{prefix}-*")) for prefix in prefixes)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == EXIT_INTERRUPTED
    except TimeoutError:
        process.send_signal(signal.SIGINT)  # else its nodes' memory stays
        process.wait(30)
        raise
    finally:
        process.kill()
        process.wait()
    assert said.read_text().splitlines()[-1] == "Interrupted: all processes have ended, and their memory is given back."
    assert "Traceback" not in said.read_text()
    assert [path.name for prefix in prefixes for path in MEMORY_DIR.glob(f"{prefix}-*")] == []
    assert list(tmp_path.glob("ekko-demo-*")) == []
    assert [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in text_of(entry)] == []


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # it ended while we looked


def test_a_worker_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    board = Board.create(tmp_path, regions=1, events=1)
    with Workers(tmp_path, board) as workers:
        workers.start("trainer", "sim_cluster.demo.nonsense")

        failures: list[str] = []

        def failed() -> bool:
            try:
                workers.check()
            except DemoError as error:
                failures.append(str(error))
            return bool(failures)

        wait_until(failed, "the failure is seen", PATIENCE_S)
    assert failures[0].startswith("the trainer process failed: ")
    assert "No module named sim_cluster.demo.nonsense" in failures[0]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match=r"--out .*file/out: Not a directory"), Display(Console(file=io.StringIO())) as display:
        run_demo(Options(tmp_path / "file" / "out"), display)
