"""The demo's two pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sim_cluster.demo.data import Events
from sim_cluster.demo.evaluation import Floats, auc_over_time
from sim_cluster.demo.report import FROZEN, LIVE, SLACK_MS, Result, freshness_name

# Okabe and Ito's palette, which colour-blind readers can tell apart.
REGION_COLOURS: Final = ("#0072B2", "#009E73", "#D55E00")
LIVE_COLOUR: Final = "#0072B2"
LATE_COLOURS: Final = ("#E69F00", "#CC79A7")
FROZEN_COLOUR: Final = "#6E6E6E"
GREY: Final = "#5A5A5A"
DPI: Final = 150
BIN_MS: Final = 1.0
CURVE_POINTS: Final = 120
WINDOW_SHARE: Final = 0.15  # of the stream; fewer events make an AUC that jumps about


def plot_latency(result: Result, delays_ms: Mapping[str, Sequence[float]], path: Path) -> None:
    """Histograms of publish-to-visible latency, a panel for each region, on one scale."""
    plt = pyplot()
    figure, axes = plt.subplots(len(delays_ms), 1, figsize=(8, 1.2 + 1.55 * len(delays_ms)), sharex=True)
    end = max(latency.p99 for latency in result.latency.values()) + SLACK_MS
    end = max(end, *(latency.one_way_delay + 1.4 * SLACK_MS for latency in result.latency.values()))
    edges = np.arange(0, end + BIN_MS, BIN_MS)
    for axis, (region, delays), colour in zip(np.atleast_1d(axes), delays_ms.items(), REGION_COLOURS, strict=False):
        latency = result.latency[region]
        axis.hist(
            np.minimum(delays, edges[-1]), bins=edges, color=colour, alpha=0.85, weights=np.full(len(delays), 100 / len(delays))
        )
        axis.axvline(latency.one_way_delay, color=GREY, linewidth=1.2)
        axis.axvline(latency.one_way_delay + SLACK_MS, color=GREY, linewidth=1.2, linestyle=":")
        axis.axvline(latency.p99, color=colour, linewidth=1.4, linestyle="--")
        title = f"{region}:  p50 {latency.p50:.1f}   p99 {latency.p99:.1f}   max {latency.max:.1f} ms"
        title += f"   ({latency.samples:,} samples)"
        axis.set_title(title, loc="left", fontsize=10, color=colour, fontweight="bold")
        axis.set_ylabel("% of batches", fontsize=9)
        plain(axis)
    last = np.atleast_1d(axes)[-1]
    last.set_xlim(0, edges[-1])
    last.set_xlabel(
        "publish-to-visible latency, ms  (grey: emulated one-way delay; dotted: 25 ms more; dashed: p99)", fontsize=9
    )
    figure.suptitle(f"How long an update takes until a replica serves it: {_data_name(result)}", x=0.01, ha="left", fontsize=11)
    write_picture(figure, path)


def plot_auc(result: Result, events: Events, start: int, scores: Mapping[str, Floats], path: Path) -> None:
    """AUC within a sliding window of the stream, a line for each age of the state.

    Args:
        result: for the titles.
        events: all events.
        start: where the stream begins.
        scores: `LIVE` (of the worst region), a delay in events as text, or `FROZEN` -> float32[stream].
        path: the picture.
    """
    plt = pyplot()
    labels = events.labels[start:]
    window = max(200, int(WINDOW_SHARE * len(labels)))
    figure, axis = plt.subplots(figsize=(8, 4.4))
    late = iter(LATE_COLOURS)
    ends = []
    for key, values in scores.items():
        colour = {LIVE: LIVE_COLOUR, FROZEN: FROZEN_COLOUR}.get(key) or next(late, GREY)
        x, y = auc_over_time(labels, values, window, CURVE_POINTS)
        name = f"live ({result.worst_region})" if key == LIVE else freshness_name(key)
        axis.plot(x, y, color=colour, linewidth=2.2 if key == LIVE else 1.5, label=name)
        ends.append((float(y[-1]), f"{name}\nAUC {result.quality[result.worst_region].auc[key]:.4f}", colour))
    _label_ends(axis, ends, x[-1])
    axis.set_xlim(0, len(labels))
    axis.set_xlabel("events of the stream  (beside each line's end: AUC of the whole stream)", fontsize=9)
    axis.set_ylabel(f"AUC of the last {window:,} events", fontsize=9)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plain(axis)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    figure.suptitle(f"What fresh rows are worth: {_data_name(result)}", x=0.01, ha="left", fontsize=11)
    write_picture(figure, path)


def _label_ends(axis: Any, ends: list[tuple[float, str, str]], x: float) -> None:  # Any: matplotlib's axes
    """Write each line's name beside its end, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    gap = (high - low) * 0.115
    place = -np.inf
    for y, name, colour in sorted(ends):
        place = max(y, place + gap)
        axis.annotate(
            name, (x, y), xytext=(1.015, place), textcoords=("axes fraction", "data"), color=colour, fontsize=9, va="center"
        )


def _data_name(result: Result) -> str:
    return "SYNTHETIC EVENTS, not real data" if result.note else result.dataset


def pyplot() -> Any:  # Any: the module, loaded only when there is something to draw
    """matplotlib.pyplot, which draws into files alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plain(axis: Any) -> None:  # Any: matplotlib's axes
    """Without the lines above and to the right."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def write_picture(figure: Any, path: Path) -> None:  # Any: a matplotlib figure
    """Save it, and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot().close(figure)
