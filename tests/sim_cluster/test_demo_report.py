"""What the demo says about its figures, also where they say little."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from ekko.errors import ConfigError
from sim_cluster.demo.cli import register
from sim_cluster.demo.evaluation import Gain
from sim_cluster.demo.report import DeviceReport, Latency, OutageReport, Quality, Result, print_result

BETTER, NOISE, WORSE = Gain(0.02, 0.01, 0.03), Gain(0.001, -0.01, 0.012), Gain(-0.02, -0.03, -0.01)


def quality(live: float, gain: Gain = BETTER) -> Quality:
    values = {"live": live, "1000": 0.71, "frozen": 0.7}
    gains = {"1000": gain, "frozen": gain}
    return Quality(auc=values, log_loss=values, gain=gains, gain_by_user=gains)


def latency(delay: float, p99: float) -> Latency:
    return Latency(p50=delay + 3, p99=p99, max=p99 + 9, one_way_delay=delay, samples=100)


RESULT = Result(
    dataset="MovieLens-100K",
    codec="float32",
    note="",
    seed=0,
    rate=500.0,
    events_offline=60_000,
    events_stream=40_000,
    rows=80_000,
    bytes=11_000_000,
    batches=2_500,
    stream_s=80.0,
    trainer_lag_max_ms=50.0,
    latency={"near": latency(2, 27), "far": latency(90, 115.1)},
    quality={"near": quality(0.75), "far": quality(0.74)},
    replicas={"near-1": "", "far-1": ""},
    parameters={"near-1": "", "far-1": ""},
    predicted_first=True,
    outage=None,
    total_s=100.0,
)


def page(**changes: object) -> str:
    text = io.StringIO()
    print_result(dataclasses.replace(RESULT, **changes), Console(file=text, width=300))
    return text.getvalue()


def test_report_has_the_agreed_keys(tmp_path: Path) -> None:
    path = RESULT.write(tmp_path)
    report = json.loads(path.read_text())
    assert path == tmp_path / "report.json"
    assert report["rows_per_s"] == 1_000
    assert report["worst_region"] == "far"
    assert report["auc"] == {"live": 0.74, "delayed": {"1000": 0.71}, "frozen": 0.7} == report["by_region"]["far"]["auc"]
    assert report["auc_gain"]["delayed"]["1000"] == {"mean": 0.02, "low": 0.01, "high": 0.03}
    assert report["latency_ms"]["near"] == {"p50": 5, "p99": 27, "max": 36, "one_way_delay": 2, "samples": 100}
    assert report["latency_on_target"] == {"near": True, "far": False}
    expected = {"dataset", "rows_published", "bytes_published", "rows_per_s", "latency_ms", "auc", "log_loss", "auc_gain"}
    assert expected | {"by_region", "replicas_equal"} <= set(report)


def test_latency_is_taken_from_the_samples() -> None:
    found = Latency.of([*np.arange(1.0, 100.0), 500.0], one_way_delay=2)
    assert (found.p50, found.max, found.samples) == (50.5, 500, 100)
    assert 99 < found.p99 < 110


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        pytest.param(BETTER, "live rows are worth +0.0200 AUC", id="better"),
        pytest.param(NOISE, "live rows make no difference that can be told from chance", id="chance"),
        pytest.param(WORSE, "live rows cost 0.0200 AUC", id="worse"),
    ],
)
def test_the_page_says_what_fresh_rows_are_worth(gain: Gain, sentence: str) -> None:
    text = page(quality={"near": quality(0.75), "far": quality(0.74, gain)})
    assert f"Against state 1,000 events late, {sentence}" in text
    assert f"Against state frozen at the start of the stream, {sentence}" in text


def test_the_page_says_what_went_wrong() -> None:
    assert "Every replica equals the training node bit for bit (2 serving nodes)." in page()
    unequal = page(replicas={"near-1": "", "far-1": "table 'item': 1 rows differ in data, first key 2"})
    assert "Replicas differ: far-1: table 'item': 1 rows differ in data, first key 2" in unequal
    assert "the live figures are void" in page(predicted_first=False)
    assert "the trainer fell up to 2.5 s behind" in page(trainer_lag_max_ms=2_500.0)
    assert "SYNTHETIC EVENTS, not real data: no network" in page(note="no network")
    assert not any(word in page() for word in ("SYNTHETIC", "void", "too busy"))


def test_a_cache_that_differs_fails_the_run_and_is_named() -> None:
    fine = DeviceReport("host-twin", {"near": 10, "far": 20}, 4, {}, 90, 10)
    assert "Every row on host-twin equals its node's store bit for bit (4 caches, 30 rows)" in page(device=fine)
    assert "scorers found 90.0% of 100 keys" in page(device=fine)
    assert dataclasses.replace(RESULT, device=fine).all_equal
    for wrong in (
        dataclasses.replace(fine, differences={"near/item": "1 rows have another stamp"}),
        dataclasses.replace(fine, rows={"near": 0, "far": 0}),
    ):
        result = dataclasses.replace(RESULT, device=wrong)
        assert not result.all_equal
        assert result.to_json()["caches_equal"] is False
        assert "Caches on host-twin differ from their stores" in page(device=wrong)
    assert RESULT.to_json()["caches_equal"] is None


def test_the_page_tells_of_an_outage() -> None:
    text = page(outage=OutageReport("mid-1", 5.04, 1.26, {"near": 9.0, "far": 99.95}))
    assert "mid-1 was killed, stayed down 5.0 s and caught up 1.3 s after its restart" in text
    assert "near 9.0 ms, far 100.0 ms" in text


def test_a_rate_below_the_demos_is_refused() -> None:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["--rate", "100"])
    assert isinstance(result.exception, ConfigError)
    assert "--rate is 100: expected at least 500 events per second" in str(result.exception)
