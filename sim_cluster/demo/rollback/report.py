"""What the chapter found out: per fault how long it took to notice, to decide and to restore, and what it cost.

*Exposed* are requests that the online model answered while its rows were bad: from the first bad step on, up to the moment at
which every replica had its rows back, less what the baseline answered meanwhile.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ekko.version import __version__
from sim_cluster.demo.data import Events
from sim_cluster.demo.evaluation import Floats, auc
from sim_cluster.demo.rollback.faults import Fault
from sim_cluster.demo.rollback.job import ONLINE
from sim_cluster.demo.rollback.plan import BASELINE_DELAY_S, BASELINE_SHARE, Plan
from sim_cluster.demo.rollback.watch import Course

SLOW: Final = 1.1  # a stream that took so many times as long as it should have is told of

WITH: Final = "with"
WITHOUT: Final = "without"
CLEAN: Final = "clean"
RUNS: Final = (WITH, WITHOUT, CLEAN)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fault. Moments are seconds of the stream, None: never; AUC is of the stretch in which the feed was bad."""

    kind: str
    began_s: float
    ended_s: float
    noticed_s: float | None  # the model was not healthy any more
    decided_s: float | None
    restored_s: float | None
    resumed_s: float | None
    cut_s: float | None
    rows: int
    exposed: int
    exposed_without: int
    auc: Mapping[str, float]

    def took(self, moment: str) -> float | None:
        """Seconds from the first bad step to "noticed", "decided", "restored" or "resumed"."""
        at: float | None = getattr(self, f"{moment}_s")
        return None if at is None else at - self.began_s

    def to_json(self) -> dict[str, object]:
        """With the keys of the report."""
        moments = ("noticed", "decided", "restored", "resumed")
        exposed = {WITH: self.exposed, WITHOUT: self.exposed_without}
        return {
            **{key: value for key, value in asdict(self).items() if not key.startswith("exposed")},
            "seconds_to": {moment: self.took(moment) for moment in moments},
            "requests_exposed": exposed,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """Everything."""

    dataset: str
    note: str
    seed: int
    plan: Plan
    outcomes: Sequence[Outcome]
    auc: Mapping[str, float]  # of the whole stream
    false_alarms: int  # rollbacks outside of faults
    replicas: Mapping[str, str]  # serving node -> how its store differs from the training node's, empty where it does not
    trainer_lag_max_ms: float
    total_s: float
    stream_s: float  # how long the stream took
    not_begun: Sequence[str] = ()  # faults for which no events were left

    @property
    def restored(self) -> bool:
        """Every fault was taken back, and every replica equals the training node."""
        done = all(outcome.restored_s is not None for outcome in self.outcomes) and not self.not_begun
        return done and not any(self.replicas.values())

    def to_json(self) -> dict[str, object]:
        """The report."""
        return {
            "chapter": "rollback",
            "dataset": self.dataset,
            "synthetic": bool(self.note),
            "note": self.note,
            "faults": [outcome.to_json() for outcome in self.outcomes],
            "auc": dict(self.auc),
            "false_alarms": self.false_alarms,
            "replicas_equal": not any(self.replicas.values()),
            "differences": {node: text for node, text in self.replicas.items() if text},
            "events": {"offline": self.plan.start, "stream": self.plan.events, "per_s": self.plan.rate},
            "trainer_lag_max_ms": self.trainer_lag_max_ms,
            "seed": self.seed,
            "not_begun": list(self.not_begun),
            "seconds": {"stream": self.stream_s, "planned": self.plan.seconds, "total": self.total_s},
            "environment": {"cores": os.cpu_count(), "python": platform.python_version(), "ekko": __version__},
        }

    def write(self, folder: Path) -> Path:
        """Write `report.json` into the folder; returns its path."""
        path = folder / "report.json"
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        return path


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What a run left behind.

    Args:
        events: all, clean.
        plan: of the stream.
        scores: `WITH`, `WITHOUT`, `CLEAN` -> float32[stream].
        arms: uint8[stream]: who answered.
        scored_s: float64[stream]: when.
        learnt_s: float64[stream]: when the trainer came to the event.
        states: of the model, since when.
        courses: rollbacks, by when they were decided.
    """

    events: Events
    plan: Plan
    scores: Mapping[str, Floats]
    arms: NDArray[np.uint8]
    scored_s: NDArray[np.float64]
    learnt_s: NDArray[np.float64]
    states: Sequence[tuple[float, str]]
    courses: Sequence[Course]

    def outcomes(self) -> tuple[list[Outcome], int]:
        """Of each fault, and how many rollbacks belong to none."""
        ends = [fault.first - self.plan.start for fault in self.plan.faults[1:]] + [self.plan.events - 1]
        spans = [
            (float(self.learnt_s[fault.first - self.plan.start]), float(self.learnt_s[end]))
            for fault, end in zip(self.plan.faults, ends, strict=True)
        ]
        belonging = [[one for one in self.courses if low <= one.decided_s < high] for low, high in spans]
        outcomes = [
            self._outcome(fault, span, courses) for fault, span, courses in zip(self.plan.faults, spans, belonging, strict=True)
        ]
        # A second rollback of one fault takes back nothing that was bad, unless the first one failed.
        needed = sum(bool(courses) for courses in belonging) + sum(one.failed for one in self.courses)
        return outcomes, max(0, len(self.courses) - needed)

    def _outcome(self, fault: Fault, span: tuple[float, float], courses: Sequence[Course]) -> Outcome:
        began, end = span
        stretch = slice(fault.first - self.plan.start, fault.last - self.plan.start)
        ended = float(self.learnt_s[min(stretch.stop, self.plan.events - 1)])
        done = next((course for course in courses if course.restored_s is not None), None)
        noticed = [at for at, state in self.states if began <= at < end and state != "healthy"]
        decided = [course.decided_s for course in courses]
        bad = (self.scored_s >= began) & (self.scored_s < ended)
        restored = done.restored_s if done is not None else None
        exposed = bad & (self.arms == ONLINE)
        if restored is not None:
            exposed = (self.scored_s >= began) & (self.scored_s < restored) & (self.arms == ONLINE)
        labels = self.events.labels[fault.first : fault.last]
        return Outcome(
            kind=fault.kind,
            began_s=began,
            ended_s=ended,
            noticed_s=min([*noticed, *decided], default=None),
            decided_s=min(decided, default=None),
            restored_s=restored,
            resumed_s=done.over_s if done is not None else None,
            cut_s=done.cut_s if done is not None else None,
            rows=done.rows if done is not None else 0,
            exposed=int(exposed.sum()),
            exposed_without=int(bad.sum()),
            auc={run: auc(labels, self.scores[run][stretch]) for run in RUNS},
        )


def print_result(result: Result, console: Console) -> None:
    """Everything on one page."""
    if result.note:
        console.print(f"[bold red]SYNTHETIC EVENTS, not real data:[/] {result.note}")
    plan = result.plan
    console.print(
        f"[bold]{result.dataset}[/]: {plan.start:,} events learnt offline, {plan.events:,} streamed at {plan.rate:g} a second; "
        f"meanwhile the feed goes bad: {', '.join(fault.kind for fault in plan.faults)}."
    )
    table = Table(title="From the first bad step, seconds", title_justify="left", box=SIMPLE_HEAD)
    for column in ("fault", "noticed", "decided", "restored", "resumed", "rows", "exposed", "without"):
        table.add_column(column, justify="left" if column == "fault" else "right", no_wrap=True)
    for outcome in result.outcomes:
        times = [outcome.took(moment) for moment in ("noticed", "decided", "restored", "resumed")]
        figures = ["[red]never[/]" if took is None else f"{took:.1f}" for took in times]
        table.add_row(outcome.kind, *figures, f"{outcome.rows:,}", f"{outcome.exposed:,}", f"{outcome.exposed_without:,}")
    console.print(table)
    console.print("Exposed: requests that the online model answered with bad rows; without: had nobody taken them back.")
    table = Table(title="AUC while the feed is bad", title_justify="left", box=SIMPLE_HEAD)
    for column in ("fault", "with manager", "without", "had the feed been good"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for outcome in result.outcomes:
        table.add_row(outcome.kind, *(f"{outcome.auc[run]:.4f}" for run in RUNS))
    table.add_row("whole stream", *(f"{result.auc[run]:.4f}" for run in RUNS))
    console.print(table)
    for line in conclusions(result):
        console.print(line)


def conclusions(result: Result) -> list[str]:
    """What was shown, in sentences; also what was not."""
    missed = [outcome.kind for outcome in result.outcomes if outcome.restored_s is None]
    lines = [f"[bold red]Not taken back:[/] {', '.join(missed)}."] if missed else []
    if result.not_begun:
        lines.append(f"[bold red]Not begun:[/] {', '.join(result.not_begun)}: no events were left.")
    lines.append(
        f"With the manager, {BASELINE_SHARE:.0%} of the requests are the baseline's, with rows {BASELINE_DELAY_S:g} s old: "
        "that is why AUC is lower there while all is well; a service gives its baseline less than one in a hundred."
    )
    lines.append(f"Rollbacks of a model that was well: {result.false_alarms}.")
    if result.stream_s > SLOW * result.plan.seconds:
        lines.append(
            f"[bold yellow]This machine was too busy:[/] it kept up with {result.plan.events / result.stream_s:.0f} events a "
            f"second of the {result.plan.rate:g} that were planned: everything took longer."
        )
    wrong = [f"{node}: {text}" for node, text in result.replicas.items() if text]
    if wrong:
        lines.append(f"[bold red]Replicas differ:[/] {'; '.join(wrong)}")
    else:
        lines.append(f"[green]Every replica equals the training node bit for bit[/] ({len(result.replicas)} nodes).")
    return lines
