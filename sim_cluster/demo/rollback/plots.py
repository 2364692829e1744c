"""The chapter's picture: AUC over time, with and without the manager, and what happened when."""

from pathlib import Path
from typing import Any, Final

from matplotlib.patches import Patch

from sim_cluster.demo.evaluation import auc_over_time
from sim_cluster.demo.plots import plain, pyplot, write_picture
from sim_cluster.demo.rollback.report import CLEAN, RUNS, WITH, WITHOUT, Measured, Outcome, Result

COLOURS: Final = {WITH: "#0072B2", WITHOUT: "#D55E00", CLEAN: "#6E6E6E"}
NAMES: Final = {WITH: "with the manager", WITHOUT: "without", CLEAN: "had the feed been good"}
BAND: Final = "#F2C9B0"
MOMENTS: Final = {"noticed": "#E69F00", "decided": "#CC79A7", "restored": "#009E73"}
WINDOW_EVENTS: Final = 1_200  # a trade-off: fewer jump about, more blur what happens within seconds
POINTS: Final = 240


def plot_rollback(result: Result, measured: Measured, path: Path) -> None:
    """One line for each run, a band where the feed is bad, a mark for each moment."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(10, 4.6))
    labels = measured.events.labels[result.plan.start :]
    window = min(WINDOW_EVENTS, max(100, result.plan.events // 10))
    for run in reversed(RUNS):
        ends, values = auc_over_time(labels, measured.scores[run], window, POINTS)
        width = 2.2 if run == WITH else 1.5
        axis.plot(measured.scored_s[ends - 1], values, color=COLOURS[run], linewidth=width, label=f"{NAMES[run]}")
    for outcome in result.outcomes:
        _mark(axis, outcome)
    axis.axhline(0.5, color="#BBBBBB", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, result.stream_s)
    axis.set_xlabel("seconds of the stream", fontsize=9)
    axis.set_ylabel(f"AUC of the last {window:,} requests", fontsize=9)
    plain(axis)
    lines, names = axis.get_legend_handles_labels()
    moments = [plt.Line2D([], [], color=colour, linestyle="--", label=moment) for moment, colour in MOMENTS.items()]
    band = Patch(color=BAND, alpha=0.6, label="feed is bad")
    handles = [*lines, band, *moments]
    axis.legend(handles=handles, labels=[*names, "feed is bad", *MOMENTS], loc="lower left", fontsize=8, ncols=3)
    name = "SYNTHETIC EVENTS, not real data" if result.note else result.dataset
    figure.suptitle(
        f"A feed goes bad three ways: {name}" if len(result.outcomes) == 3 else f"A feed goes bad: {name}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    write_picture(figure, path)


def _mark(axis: Any, outcome: Outcome) -> None:  # Any: matplotlib's axes
    axis.axvspan(outcome.began_s, outcome.ended_s, color=BAND, alpha=0.6, linewidth=0)
    axis.annotate(
        outcome.kind,
        (outcome.began_s, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
    )
    for moment, colour in MOMENTS.items():
        took = outcome.took(moment)
        if took is not None:
            axis.axvline(outcome.began_s + took, color=colour, linewidth=1.2, linestyle="--")
