"""`ablation`: the paper's protocol one idea at a time, then push, against three other ways to carry the same updates.

One recorded trace, one simulated WAN of 10 regions with 3 nodes each, one of which trains (`benchmarks.wan.testbed`), in
virtual time that is charged for work by costs measured at the beginning (`benchmarks.wan.calibration`). A delay is the time
from the commit of an update at the trainer until the slowest replica shows it or a newer version of its row; the paper reports
its mean.

What the paper measured on its test-bed (Ekko, OSDI '22, figures 6 and 8): 76.3 s with version vectors only, 27.4 s with the
update cache, 6.0 s with shard versions, 2.6 s with leaders; 18.8 s for primary push (Adam); over 29 minutes for a checkpoint.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.baselines import virtual
from benchmarks.common import Figure
from benchmarks.wan.calibration import calibrate
from benchmarks.wan.replay import Outcome, System, Window, replay
from benchmarks.wan.testbed import SLOWEST_PATH_MS, Bed, unloaded_wan
from p2p.paper.sync import PRESETS
from sim_cluster.costs import CostTable
from sim_cluster.network import NetworkOptions
from sim_cluster.traces import HOSTILE_EXPONENT, Trace, TraceOptions, hostile, record, skewed

TARGETS = {
    "order_as_paper": ">= 1",
    "ratio_cache": ">= 2.8",
    "ratio_shard_versions": ">= 4.6",
    "ratio_leaders": ">= 2.3",
    "ratio_all": ">= 29.3",
    "ratio_primary_push": ">= 7",
    "push_p99_to_bound": "<= 1",
}
ROWS, ROWS_QUICK = 100_000, 4_000
TRACE_S = 1_200.0
WINDOW = Window(after_s=600, warm_s=5, measured_s=15, drain_s=120)
WINDOW_HOSTILE = Window(after_s=600, warm_s=2, measured_s=4, drain_s=25)
WINDOW_QUICK = Window(after_s=600, warm_s=1, measured_s=5, drain_s=20)
# Without load: steps of 100 rows, 10 a second, each row counting as itself.
UNLOADED = TraceOptions(10_000, 3, 500.0, 10_000, HOSTILE_EXPONENT, 0.0, duration_s=30)
WINDOW_UNLOADED = Window(after_s=0, warm_s=2, measured_s=10, drain_s=10)
WINDOW_UNLOADED_QUICK = Window(after_s=0, warm_s=1, measured_s=2, drain_s=10)
WINDOW_HALF_RATE = Window(after_s=600, warm_s=2, measured_s=6, drain_s=25)
CHECKPOINT_DRAIN_S = 7_200
LOG_DRAIN_S = 120  # cheap to wait for, and their queues do end
SLOW_REGION = 5  # in the middle

NAMES = ("vector", "cache", "shard_versions", "leaders", "push", "primary_push", "log_tree", "checkpoint")
# (figure, slower, faster, the paper's)
RATIOS = (
    ("ratio_cache", "vector", "cache", 2.8),
    ("ratio_shard_versions", "cache", "shard_versions", 4.6),
    ("ratio_leaders", "shard_versions", "leaders", 2.3),
    ("ratio_all", "vector", "leaders", 29.3),
    ("ratio_primary_push", "primary_push", "leaders", 7.0),
    ("ratio_primary_push_to_push", "primary_push", "push", None),
    ("ratio_log_tree_to_push", "log_tree", "push", None),
)
# Slowest first; where the paper has two that we do not compare with each other, it is their place that counts.
ORDER = ("checkpoint", "vector", "cache", "primary_push", "shard_versions", "leaders")

SYSTEMS = {name: System(name, PRESETS[name]) for name in NAMES if name in PRESETS} | {
    "primary_push": System("primary_push", make_machine=virtual.primary_push, drain_s=LOG_DRAIN_S),
    "log_tree": System("log_tree", make_machine=virtual.log_tree, drain_s=LOG_DRAIN_S),
    "checkpoint": System("checkpoint", make_machine=virtual.checkpoint, drain_s=CHECKPOINT_DRAIN_S),
}
NAMES_QUICK = ("push", "primary_push", "log_tree", "checkpoint")
HALF_RATE = ("leaders", "push", "primary_push", "log_tree")

Report = Callable[[str], None]


def run(quick: bool) -> dict[str, object]:
    """Everything; a model of 4,000 rows and three seconds of the trace when quick."""
    bed = Bed(ROWS_QUICK if quick else ROWS)
    costs = calibrate(quick)
    print("nanoseconds: " + ", ".join(f"{kind} {cost:.3g}" for kind, cost in asdict(costs).items()), file=sys.stderr)
    console = Console(stderr=True)
    columns = TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, bed.limits():
        task = bar.add_task("traces", total=2 * len(NAMES) + len(HALF_RATE) + 2, state="")

        def begin(what: str) -> Report:
            bar.update(task, description=what, advance=1)
            return lambda state: bar.update(task, state=state)

        trace, other = skewed(bed.rows, bed.updates_per_s, duration_s=TRACE_S), hostile(bed.rows, duration_s=TRACE_S)
        window, window_hostile = (WINDOW_QUICK, WINDOW_QUICK) if quick else (WINDOW, WINDOW_HOSTILE)
        calm = _replay_all(NAMES, trace, window, bed, costs, bed.wan(), "skewed", begin)
        wild = _replay_all(NAMES_QUICK if quick else NAMES, other, window_hostile, bed, costs, bed.wan(), "hostile", begin)
        half = _replay_all(
            () if quick else HALF_RATE, trace, WINDOW_HALF_RATE, bed, costs, bed.wan(SLOW_REGION), "half rate", begin
        )
    unloaded = replay(
        SYSTEMS["push"],
        record(UNLOADED),
        WINDOW_UNLOADED_QUICK if quick else WINDOW_UNLOADED,
        Bed(UNLOADED.rows),
        costs,
        unloaded_wan(),
        scaled=False,
    )
    return _figures(calm, wild, half, unloaded) | {
        "costs_ns": asdict(costs),
        "test_bed": {
            "rows": bed.rows,
            "rows_per_row": bed.rows_per_row,
            "shards": bed.model.shards,
            "updates_per_s": bed.updates_per_s,
            "updates_per_s_hostile": other.options.updates_per_s,
            "changed_10_min": trace.share_changed(600, 1_200),
            "changed_10_min_hostile": other.share_changed(600, 1_200),
        },
    }


def _replay_all(
    names: tuple[str, ...],
    trace: Trace,
    window: Window,
    bed: Bed,
    costs: CostTable,
    network: NetworkOptions,
    what: str,
    begin: Callable[[str], Report],
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for name in names:
        if name in SYSTEMS:
            report = begin(f"{what}: {name}")
            outcome = outcomes[name] = replay(SYSTEMS[name], trace, window, bed, costs, network, report=report)
            delays = outcome.delays
            state = (
                f"mean {delays.mean_ms:,.0f} ms, p99 {delays.p99_ms:,.0f}, max {delays.max_ms:,.0f}, missing {delays.missing}"
            )
            print(f"{what}: {name}: {state}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
    return outcomes


def _figures(
    calm: Mapping[str, Outcome], wild: Mapping[str, Outcome], half: Mapping[str, Outcome], unloaded: Outcome
) -> dict[str, object]:
    mean = {name: outcome.delays.mean_ms for name, outcome in calm.items()}
    ratios: dict[str, Figure] = {}
    for figure, slower, faster, _ in RATIOS:
        missing = [name for name in (slower, faster) if name not in mean]
        ratios[figure] = None if missing else mean[slower] / mean[faster]
        if missing:
            ratios[f"note_{figure}"] = f"this version has no {' and no '.join(missing)}"
    measured = [name for name in ORDER if name in mean]
    in_order = all(mean[slower] > mean[faster] for slower, faster in pairwise(measured))
    bound_ms = 1.3 * SLOWEST_PATH_MS + 10
    return {
        "order_as_paper": int(in_order),
        **ratios,
        "push_p99_to_bound": unloaded.delays.p99_ms / bound_ms,
        "push_p99_unloaded_ms": unloaded.delays.p99_ms,
        "push_bound_ms": bound_ms,
        "mean_ms": mean,
        "p99_ms": {name: outcome.delays.p99_ms for name, outcome in calm.items()},
        "max_ms": {name: outcome.delays.max_ms for name, outcome in calm.items()},
        "hostile": {
            "mean_ms": {name: outcome.delays.mean_ms for name, outcome in wild.items()},
            "p99_ms": {name: outcome.delays.p99_ms for name, outcome in wild.items()},
        },
        "ratios": [
            {"ratio": figure, "slower": slower, "faster": faster, "ours": ratios[figure], "paper": paper}
            for figure, slower, faster, paper in RATIOS
        ],
        "skewed_trace": _cells(calm),
        "hostile_trace": _cells(wild),
        "one_link_at_half_rate": _cells(half),
    }


def _cells(outcomes: Mapping[str, Outcome]) -> list[dict[str, object]]:
    return [
        {
            "system": name,
            "mean ms": outcome.delays.mean_ms,
            "p99 ms": outcome.delays.p99_ms,
            "max ms": outcome.delays.max_ms,
            "missing": outcome.delays.missing,
            "growth": outcome.delays.growth,
            "local B/update": outcome.bytes_local,
            "cross B/update": outcome.bytes_cross,
            "trainer's card": outcome.trainer_card,
            "trainer's CPU": outcome.trainer_cpu,
            "busiest CPU": outcome.busiest_cpu,
            "most CPU for": " ".join(list(outcome.spent_ms)[:2]),
            "seconds": round(outcome.seconds, 1),
        }
        for name, outcome in outcomes.items()
    ]
