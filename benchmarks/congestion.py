"""`congestion`: links between regions that carry less than is published, with the scheduler, without it, and with a plain log.

The same load (`benchmarks.congested.load`) at 100, 50, 20, 8 and 4 % of the bandwidth that it needs; k = 99. In virtual time
(`benchmarks.congested.virtual`) and on real nodes behind the kernel's token bucket (`benchmarks.congested.real`). A delay is
the time from the commit of an update until the slowest replica shows it or a newer version of its row.

    state   the product: rows leave by priority, their newest value is read when they are sent
    none    what finds no credit is skipped, and the child pulls: the product without its scheduler
    fifo    what finds no credit waits in a log without end, in order

How to read it: `*_ratio` is the 99th percentile of the delay of significant updates (the top percent) over that of links that
nothing fills; `lag` is the age of the oldest update that some replica does not show.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.congested import real, virtual
from benchmarks.congested.lag import F64, is_bounded
from benchmarks.congested.load import Load
from benchmarks.congested.virtual import Plan, Run

TARGETS = {
    "significant_p99_ratio_8": "<= 2",
    "real_significant_p99_ratio_8": "<= 2",
    "lag_bounded": ">= 1",
    "return_ratio": "<= 2",
    "replicas_equal": ">= 1",
}
SHARES, SHARES_QUICK = (100, 50, 20, 8, 4), (8,)
SHARES_REAL, SHARES_REAL_QUICK = (100, 20, 8), ()
OUTBOXES = ("state", "none", "fifo")
GATED = 8  # percent
NARROW_S, NARROW_S_QUICK = 40.0, 4.0
MEASURED_S, MEASURED_S_QUICK = 25.0, 2.0
LONG_S, LONG_S_QUICK = 600.0, 4.0
RECOVER_S, RECOVER_S_QUICK = 60.0, 10.0
REAL_S, REAL_SETTLE_S = 10.0, 4.0
LOAD = Load(trace_s=LONG_S + RECOVER_S + 60)
LOAD_QUICK = Load(rows=10_000, dim=32, updates_per_s=600.0, trace_s=40)
LOAD_REAL = Load(updates_per_s=4_000.0, trace_s=400)
# Processes: a run may have 1.3 million updates, some hundred bytes each.
WORKERS_MAX = 4
# Where the plot goes; without this variable, a file beside other temporary ones.
PLOTS = "EKKO_BENCH_PLOTS"

Report = Callable[[str], None]


def run(quick: bool) -> dict[str, object]:
    """Everything; 8 % for four virtual seconds when quick."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def report(state: str) -> None:
            bar.update(task, description=state)

        return _virtual(quick, report) | _real(quick, report)


# --- in virtual time


@dataclass(frozen=True, slots=True)
class _Job:
    """One run in virtual time; `share`: percent of the demand, None: no narrow link."""

    load: Load
    share: int | None
    plan: Plan

    @property
    def text(self) -> str:
        return f"virtual, {self.plan.outbox}, {'uncongested' if self.share is None else f'{self.share} %'}"


def _virtual(quick: bool, report: Report) -> dict[str, object]:
    """All of it; on several cores side by side, since nothing here depends on how fast it runs."""
    load, measured_s = (LOAD_QUICK, MEASURED_S_QUICK) if quick else (LOAD, MEASURED_S)
    report("virtual, uncongested")
    calm = _run(_Job(load, None, Plan("state", None, 2.0, measured_s + 1, measured_s)))
    demand = calm.crossed_bytes / measured_s
    long_jobs, jobs = _long_jobs(quick, demand), _jobs(quick, demand)
    with ExitStack() as stack:
        spread = _spread(stack, quick)
        report("virtual")
        # What takes longest begins first.
        long_runs = [(job.plan.outbox, spread(_run, job)) for job in long_jobs]
        served = spread(_served, quick)
        runs = [(job, spread(_run, job)) for job in jobs]
        figures = _figures(calm, demand, measured_s, [(job, done.result()) for job, done in runs])
        lags = {outbox: done.result() for outbox, done in long_runs}
        figures["replicas_equal"] = int(bool(figures["replicas_equal"]) and all(one.equal for one in lags.values()))
        return (
            figures
            | _long({outbox: one.timeline.lag_ms(one.narrow_ms, one.end_ms)[1] for outbox, one in lags.items()})
            | served.result()
        )


def _spread(stack: ExitStack, quick: bool) -> Callable[..., Future[Any]]:
    """What begins a call in another process, of which there are as many as cores; when quick, all is done at once, here."""
    if quick:
        return _done
    context = multiprocessing.get_context("spawn")
    pool = stack.enter_context(ProcessPoolExecutor(min(os.cpu_count() or 1, WORKERS_MAX), mp_context=context))
    return pool.submit


def _done(call: Callable[..., object], *arguments: object) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(call(*arguments))
    return future


def _jobs(quick: bool, demand: float) -> list[_Job]:
    load, shares = (LOAD_QUICK, SHARES_QUICK) if quick else (LOAD, SHARES)
    narrow_s, measured_s = (NARROW_S_QUICK, MEASURED_S_QUICK) if quick else (NARROW_S, MEASURED_S)
    recover_s = RECOVER_S_QUICK if quick else RECOVER_S
    return [
        _Job(
            load,
            share,
            Plan(
                outbox,
                demand * share / 100,
                2.0,
                narrow_s,
                measured_s,
                demand * virtual.WIDE,
                recover_s if outbox == "state" else 0.0,
            ),
        )
        for share in shares
        for outbox in OUTBOXES
    ]


def _run(job: _Job) -> Run:
    done = virtual.run(job.load, job.plan)
    p99_ms = done.timeline.p99_ms(done.begin_ms, done.end_ms, significant=True)
    print(f"{job.text}: significant p99 {p99_ms:,.0f} ms, {done.modes}, {done.seconds:.0f} s", file=sys.stderr, flush=True)
    return done


def _figures(calm: Run, demand: float, measured_s: float, runs: Sequence[tuple[_Job, Run]]) -> dict[str, object]:
    calm_p99_ms = calm.timeline.p99_ms(calm.begin_ms, calm.end_ms, significant=True)
    at: dict[str, dict[str, object]] = {}
    for job, done in runs:
        cell = at.setdefault(str(job.share), {})
        cell |= _cell(job.plan.outbox, done, calm_p99_ms, demand * measured_s)
        if job.plan.outbox == "state":
            cell |= _returned(done, demand * virtual.WIDE)
    gated = at[str(GATED)]
    returned = {share: cell["return_ratio"] for share, cell in at.items()}
    never = [share for share, ratio in returned.items() if ratio is None]
    ratios = {share: float(str(cell["significant_p99_ratio"])) for share, cell in at.items()}
    worst = max(ratios, key=lambda share: ratios[share])
    return {
        "significant_p99_ratio_max": ratios[worst],
        "significant_p99_ratio_max_at": int(worst),
        "significant_p99_ratio_8": gated["significant_p99_ratio"],
        "fifo_p99_ratio_8": gated["fifo_p99_ratio"],
        "none_p99_ratio_8": gated["none_p99_ratio"],
        "bytes_saved_8": gated["bytes_saved"],
        "return_ratio": None if never else max(float(str(ratio)) for ratio in returned.values()),
        "uncongested_p99_ms": calm_p99_ms,
        "demand_bytes_per_s": demand,
        "replicas_equal": int(calm.equal and all(done.equal for _, done in runs)),
        "at": at,
    } | ({"note_return_ratio": f"at {', '.join(never)} % the lag was not normal within {RECOVER_S:g} s"} if never else {})


def _cell(outbox: str, done: Run, calm_p99_ms: float, demand_bytes: float) -> dict[str, object]:
    """Of one run, under the names of its outbox."""
    ratio = done.timeline.p99_ms(done.begin_ms, done.end_ms, significant=True) / calm_p99_ms
    lag_ms = done.timeline.lag_ms(done.narrow_ms, done.end_ms)[1]
    if outbox != "state":
        return {f"{outbox}_p99_ratio": ratio, f"{outbox}_lag_s": float(lag_ms.max()) / 1_000}
    return {
        "significant_p99_ratio": ratio,
        "all_p99_ms": done.timeline.p99_ms(done.begin_ms, done.end_ms, significant=False),
        "lag_s": float(lag_ms.max()) / 1_000,
        "bytes_saved": 1 - done.crossed_bytes / demand_bytes,
        "bytes_saved_told": done.saved_told / max(1.0, done.saved_told + done.crossed_bytes),
    }


def _returned(done: Run, wide_bytes_per_s: float) -> dict[str, object]:
    """How long the return to normal took, over the time in which the backlog passes the wide link and travels to its end."""
    transfer_ms = 1_000 * done.backlog_bytes / wide_bytes_per_s + max(virtual.DELAYS_MS.values())
    ratio = None if done.recovered_ms is None else done.recovered_ms / transfer_ms
    return {"return_ratio": ratio, "return_ms": done.recovered_ms, "backlog_bytes": done.backlog_bytes}


# --- over ten virtual minutes


def _long_jobs(quick: bool, demand: float) -> list[_Job]:
    load, long_s = (LOAD_QUICK, LONG_S_QUICK) if quick else (LOAD, LONG_S)
    plans = [Plan(outbox, demand * GATED / 100, 2.0, long_s, long_s - 1) for outbox in ("state", "fifo")]
    return [_Job(load, GATED, plan) for plan in plans]


def _long(lags: Mapping[str, F64]) -> dict[str, object]:
    """Lag at 8 % for ten minutes: bounded with the scheduler, growing with a log."""
    halves = {outbox: (lag[: len(lag) // 2].max(), lag[len(lag) // 2 :].max()) for outbox, lag in lags.items()}
    return {
        "lag_bounded": int(is_bounded(lags["state"])),
        "lag_max_s": float(lags["state"].max()) / 1_000,
        "fifo_lag_max_s": float(lags["fifo"].max()) / 1_000,
        "fifo_lag_bounded": int(is_bounded(lags["fifo"])),
        "lag_halves": [{"outbox": one, "first_s": a / 1_000, "second_s": b / 1_000} for one, (a, b) in halves.items()],
        "plot": _plot(lags),
    }


def _plot(lags: Mapping[str, F64]) -> str:
    """Draw it; where to, or why not."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "not drawn: matplotlib is missing, pip install 'ekko[demo]'"
    path = Path(os.environ.get(PLOTS, tempfile.gettempdir())) / "ekko-congestion-lag.png"
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for outbox, lag_ms in lags.items():
        axes.plot(np.arange(len(lag_ms)), lag_ms / 1_000, label={"state": "scheduler", "fifo": "log"}[outbox])
    axes.set(xlabel=f"seconds at {GATED} % of the bandwidth", ylabel="age of the oldest update on its way, s", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return str(path)


# --- what predictions are worth


def _served(quick: bool) -> dict[str, object]:
    key = f"auc_at_{GATED}_percent"
    if quick:
        return {key: None, f"note_{key}": "not at this size: a model is learnt for it"}
    try:
        from benchmarks.congested import served
    except ImportError as error:
        return {key: None, f"note_{key}": f"{error}: pip install 'ekko[torch]'"}
    figures = served.figures(GATED)
    print(f"predictions at {GATED} %: {figures[key]}", file=sys.stderr, flush=True)
    return figures


# --- real nodes


def _real(quick: bool, report: Report) -> dict[str, object]:
    shares: Sequence[int] = SHARES_REAL_QUICK if quick else SHARES_REAL
    if not shares:
        note = "not at this size: real nodes take minutes"
        return {"real": {}, "real_significant_p99_ratio_8": None, "note_real_significant_p99_ratio_8": note}
    cells: dict[str, dict[str, object]] = {str(share): {} for share in shares}
    equal, late_ms = True, 0.0
    for outbox in OUTBOXES:
        with real.bed(LOAD_REAL, outbox) as bed:
            report(f"real, {outbox}: uncongested")
            bed.run(4.0, 30.0)
            calm = bed.run(REAL_S, 30.0)
            for share in shares:
                report(f"real, {outbox}: {share} %")
                bed.limit(calm.published_bytes_per_s * share / 100)
                bed.run(REAL_SETTLE_S, 0.0)
                # What a log or pulls have not brought by then counts with the time that has passed.
                done = bed.run(REAL_S, 2 * REAL_S if outbox == "state" else REAL_S)
                late_ms = max(late_ms, done.late_ms)
                cells[str(share)] |= _real_cell(outbox, done, calm)
                text = f"real, {outbox}, {share} %: significant p99 {done.significant_p99_ms:,.0f} ms"
                print(f"{text}, uncongested {calm.significant_p99_ms:,.0f} ms", file=sys.stderr, flush=True)
                bed.settle()
            equal = bed.settle() and equal
    return {
        "real_significant_p99_ratio_8": cells[str(GATED)]["significant_p99_ratio"],
        "real_replicas_equal": int(equal),
        "real_limited_by": real.how_limited(),
        "real_late_wakeup_p99_ms": late_ms,
        "real": cells,
    }


def _real_cell(outbox: str, done: real.Measured, calm: real.Measured) -> dict[str, object]:
    ratio = done.significant_p99_ms / calm.significant_p99_ms
    if outbox != "state":
        return {f"{outbox}_p99_ratio": ratio}
    return {
        "significant_p99_ratio": ratio,
        "significant_p99_ms": done.significant_p99_ms,
        "uncongested_p99_ms": calm.significant_p99_ms,
        "ordinary_p99_ms": float(np.percentile(done.ordinary_ms, 99)),
        "bytes_saved": 1 - done.sent_bytes_per_s / calm.sent_bytes_per_s,
    }
