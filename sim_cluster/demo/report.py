"""The result of a demo run: as JSON for machines, as tables for people."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ekko.version import __version__
from sim_cluster.demo.evaluation import Gain

LIVE: Final = "live"
FROZEN: Final = "frozen"  # beside them, a delay in events as text: "1000"
SLACK_MS: Final = 25.0  # publish-to-visible p99 may exceed the emulated one-way delay by this much
LAG_WARNING_MS: Final = 500.0  # a step's events wait 50 ms for each other and for the scorers as a rule


@dataclass(frozen=True, slots=True)
class Latency:
    """Publish-to-visible in one region, milliseconds; its nodes pooled, one sample per batch and node."""

    p50: float
    p99: float
    max: float
    one_way_delay: float
    samples: int

    @classmethod
    def of(cls, delays_ms: list[float], one_way_delay: float) -> "Latency":
        """Of at least one sample."""
        p50, p99 = np.percentile(delays_ms, [50, 99])
        return cls(float(p50), float(p99), float(max(delays_ms)), one_way_delay, len(delays_ms))

    @property
    def on_target(self) -> bool:
        """Whether the 99th percentile is within the emulated delay and `SLACK_MS`."""
        return self.p99 <= self.one_way_delay + SLACK_MS


@dataclass(frozen=True, slots=True)
class Quality:
    """How well one region's events were predicted. Keys: `LIVE`, `FROZEN`, and each delay in events as text."""

    auc: Mapping[str, float]
    log_loss: Mapping[str, float]
    gain: Mapping[str, Gain]  # live minus that one; events drawn one by one
    gain_by_user: Mapping[str, Gain]  # the same, users drawn with all their events, which depend on each other

    def to_json(self) -> dict[str, object]:
        """With the keys of the report."""
        return {
            "auc": _nested(self.auc),
            "log_loss": _nested(self.log_loss),
            "auc_gain": _nested({name: asdict(gain) for name, gain in self.gain.items()}),
            "auc_gain_by_user": _nested({name: asdict(gain) for name, gain in self.gain_by_user.items()}),
        }


@dataclass(frozen=True, slots=True)
class OutageReport:
    """What the kill of one node did."""

    node: str
    down_s: float
    catch_up_s: float  # from its restart until it was ready again
    others_p99_ms: Mapping[str, float]  # other regions, from the kill to the catch-up


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """Rows on devices at the end of the stream, of the nodes that scorers read from."""

    name: str
    rows: Mapping[str, int]  # region -> rows in its node's caches
    tables: int  # caches that were compared, of all regions
    differences: Mapping[str, str]  # "region/table" -> how a cache differs from its node's store; those that do
    keys_on_device: int  # that scorers asked for, and found there
    keys_from_host: int  # and read in shared memory

    @property
    def equal(self) -> bool:
        """Whether every row of every cache is the store's, and there are some; a node that just started again may have none."""
        return not self.differences and sum(self.rows.values()) > 0

    def to_json(self) -> dict[str, object]:
        """With the keys of the report."""
        asked = self.keys_on_device + self.keys_from_host
        return {**asdict(self), "hit_rate": self.keys_on_device / asked if asked else 0.0}


@dataclass(frozen=True, slots=True)
class Result:
    """Everything a run found out.

    Args:
        replicas: serving node -> how its store differs from the training node's, empty where it does not.
        parameters: serving node -> how what its reader sees differs from the trained parameters, empty where it does not.
        predicted_first: every region predicted every event before it was learnt.
    """

    dataset: str
    codec: str
    note: str
    seed: int
    rate: float
    events_offline: int
    events_stream: int
    rows: int
    bytes: int
    batches: int
    stream_s: float
    trainer_lag_max_ms: float
    latency: Mapping[str, Latency]
    quality: Mapping[str, Quality]
    replicas: Mapping[str, str]
    parameters: Mapping[str, str]
    predicted_first: bool
    outage: OutageReport | None
    total_s: float
    device: DeviceReport | None = None

    @property
    def worst_region(self) -> str:
        """Where the live AUC is lowest."""
        return min(self.quality, key=lambda region: self.quality[region].auc[LIVE])

    @property
    def replicas_equal(self) -> bool:
        """Every store equal to the training node's, and to the trained parameters, bit for bit."""
        return not any(self.replicas.values()) and not any(self.parameters.values())

    @property
    def all_equal(self) -> bool:
        """And every row on a device equal to its node's store."""
        return self.replicas_equal and (self.device is None or self.device.equal)

    @property
    def rows_per_s(self) -> float:
        """Rows published while streaming, per second."""
        return self.rows / self.stream_s

    def to_json(self) -> dict[str, object]:
        """The report."""
        return {
            "dataset": self.dataset,
            "codec": self.codec,
            "synthetic": bool(self.note),
            "note": self.note,
            "rows_published": self.rows,
            "bytes_published": self.bytes,
            "rows_per_s": self.rows_per_s,
            "batches_published": self.batches,
            "latency_ms": {region: asdict(latency) for region, latency in self.latency.items()},
            "latency_on_target": {region: latency.on_target for region, latency in self.latency.items()},
            "worst_region": self.worst_region,
            **self.quality[self.worst_region].to_json(),
            "by_region": {region: quality.to_json() for region, quality in self.quality.items()},
            "replicas_equal": self.replicas_equal,
            "differences": {node: text for node, text in [*self.replicas.items(), *self.parameters.items()] if text},
            "device": self.device.to_json() if self.device else None,
            "caches_equal": self.device.equal if self.device else None,
            "predicted_before_learnt": self.predicted_first,
            "outage": asdict(self.outage) if self.outage else None,
            "events": {"offline": self.events_offline, "stream": self.events_stream, "per_s": self.rate},
            "trainer_lag_max_ms": self.trainer_lag_max_ms,
            "seed": self.seed,
            "seconds": {"stream": self.stream_s, "total": self.total_s},
            "environment": {"cores": os.cpu_count(), "python": platform.python_version(), "ekko": __version__},
        }

    def write(self, folder: Path) -> Path:
        """Write `report.json` into the folder; returns its path."""
        path = folder / "report.json"
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        return path


def _nested(values: Mapping[str, object]) -> dict[str, object]:
    """Delays under a key of their own."""
    outer = {name: value for name, value in values.items() if name in (LIVE, FROZEN)}
    return {**outer, "delayed": {name: value for name, value in values.items() if name not in outer}}


def freshness_name(key: str) -> str:
    """For people: "live", "1,000 events late", "frozen"."""
    return f"{int(key):,} events late" if key.isdecimal() else key


def print_result(result: Result, console: Console) -> None:
    """Everything on one page."""
    if result.note:
        console.print(f"[bold red]SYNTHETIC EVENTS, not real data:[/] {result.note}")
    console.print(
        f"[bold]{result.dataset}[/]: {result.events_offline:,} events learnt offline, {result.events_stream:,} streamed "
        f"at {result.rate:g} a second. Published meanwhile: {result.rows:,} rows in {result.batches:,} batches, "
        f"{result.codec}, {result.bytes / 1e6:.1f} MB, {result.rows_per_s:,.0f} rows a second."
    )
    console.print(_latency_table(result))
    console.print(_quality_table(result))
    for line in conclusions(result):
        console.print(line)


def _latency_table(result: Result) -> Table:
    table = Table(title="Publish-to-visible latency, ms", title_justify="left", box=SIMPLE_HEAD)
    for column in ("region", "one-way delay", "p50", "p99", "max", f"p99 <= delay + {SLACK_MS:g}"):
        table.add_column(column, justify="left" if column == "region" else "right", no_wrap=True)
    for region, latency in result.latency.items():
        figures = [f"{value:.1f}" for value in (latency.one_way_delay, latency.p50, latency.p99, latency.max)]
        table.add_row(region, *figures, "[green]yes[/]" if latency.on_target else "[red]no[/]")
    return table


def _quality_table(result: Result) -> Table:
    title = f"{result.dataset}{' (SYNTHETIC)' if result.note else ''}: the stream, scored with state of different age"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("region", "state", "AUC", "log-loss", "AUC gain of live (95 %)"):
        table.add_column(column, justify="left" if column in ("region", "state") else "right", no_wrap=True)
    for region, quality in result.quality.items():
        for key, auc in quality.auc.items():
            gain = quality.gain.get(key)
            words = "" if gain is None else f"{gain.mean:+.4f} ({gain.low:+.4f}, {gain.high:+.4f})"
            table.add_row(
                region if key == LIVE else "", freshness_name(key), f"{auc:.4f}", f"{quality.log_loss[key]:.4f}", words
            )
        table.add_section()
    return table


def conclusions(result: Result) -> list[str]:
    """What the data says, in sentences; also where it says little."""
    worst = result.worst_region
    quality = result.quality[worst]
    lines = [_verdict(key, worst, gain, quality.gain_by_user[key]) for key, gain in quality.gain.items()]
    wrong = [f"{node}: {text}" for node, text in [*result.replicas.items(), *result.parameters.items()] if text]
    if result.replicas_equal:
        lines.append(f"[green]Every replica equals the training node bit for bit[/] ({len(result.replicas)} serving nodes).")
    else:
        lines.append(f"[bold red]Replicas differ:[/] {'; '.join(wrong)}")
    if (device := result.device) is not None:
        lines.append(_device_line(device))
    if result.trainer_lag_max_ms > LAG_WARNING_MS:
        lag_s = result.trainer_lag_max_ms / 1000
        lines.append(
            f"[bold yellow]This machine was too busy:[/] the trainer fell up to {lag_s:.1f} s behind the stream, so that live "
            "rows were older than the network made them."
        )
    if not result.predicted_first:
        lines.append("[bold red]Some events were learnt before every region had predicted them: the live figures are void.[/]")
    if result.outage:
        others = ", ".join(f"{region} {p99:.1f} ms" for region, p99 in result.outage.others_p99_ms.items())
        lines.append(
            f"{result.outage.node} was killed, stayed down {result.outage.down_s:.1f} s and caught up "
            f"{result.outage.catch_up_s:.1f} s after its restart; p99 elsewhere meanwhile: {others}."
        )
    return lines


def _device_line(device: DeviceReport) -> str:
    asked = device.keys_on_device + device.keys_from_host
    if not device.equal:
        wrong = "; ".join(f"{table}: {text}" for table, text in device.differences.items()) or "some have no rows"
        return f"[bold red]Caches on {device.name} differ from their stores:[/] {wrong}"
    return (
        f"[green]Every row on {device.name} equals its node's store bit for bit[/] ({device.tables} caches, "
        f"{sum(device.rows.values()):,} rows); scorers found {device.keys_on_device / max(1, asked):.1%} of {asked:,} keys."
    )


def _verdict(key: str, region: str, gain: Gain, by_user: Gain) -> str:
    other = "frozen at the start of the stream" if key == FROZEN else f"{int(key):,} events late"
    interval = f"95 % interval {by_user.low:+.4f} to {by_user.high:+.4f} when users are drawn as a whole"
    if by_user.low > 0:
        return f"Against state {other}, live rows are worth {gain.mean:+.4f} AUC in the worst region ({region}; {interval})."
    if by_user.high < 0:
        return (
            f"Against state {other}, live rows [bold]cost[/] {-gain.mean:.4f} AUC in the worst region ({region}; {interval})."
        )
    return (
        f"Against state {other}, live rows make no difference that can be told from chance in the worst region "
        f"({region}): {gain.mean:+.4f} AUC, {interval}."
    )
