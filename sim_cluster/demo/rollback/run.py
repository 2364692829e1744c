"""The order of events in one run of the chapter."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from sim_cluster.demo.board import Board, Word
from sim_cluster.demo.cluster import DemoError, Workers
from sim_cluster.demo.data import Events
from sim_cluster.demo.display import Display
from sim_cluster.demo.evaluation import Floats, auc
from sim_cluster.demo.job import events_path
from sim_cluster.demo.opening import opened
from sim_cluster.demo.rollback.cluster import BASELINE_NODE, MODEL, REGIONS, TRAIN_NODE, WITNESS_NODE, make_cluster
from sim_cluster.demo.rollback.faults import corrupted
from sim_cluster.demo.rollback.job import RollbackJob, create_arms, open_arms
from sim_cluster.demo.rollback.plan import BASELINE_DELAY_S, RATE, STAGES, Plan, Stage, events_of, stream_start
from sim_cluster.demo.rollback.plots import plot_rollback
from sim_cluster.demo.rollback.replay import unguarded_scores
from sim_cluster.demo.rollback.report import CLEAN, WITH, WITHOUT, Measured, Result
from sim_cluster.demo.rollback.schedule import Director, Schedule
from sim_cluster.demo.rollback.watch import Watch
from sim_cluster.demo.verify import contents, difference
from sim_cluster.processes import LocalCluster

LEAD_S: Final = 0.5
REFRESH_S: Final = 0.1
SETTLE_S_MAX: Final = 90.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Args:
        out: folder for the report and the picture.
        stages: the faults, and what is clean around them.
        rate: events per second.
        seed: of the model, the faults and synthetic events.
        synthetic: do not even try to get the real data.
        baseline_delay_s: how old the baseline's rows are.
    """

    out: Path
    stages: tuple[Stage, ...] = STAGES
    rate: float = RATE
    seed: int = 0
    synthetic: bool = False
    baseline_delay_s: float = BASELINE_DELAY_S


def run_rollback(options: Options, display: Display) -> Result:
    """Run everything, write report and picture, and clean up.

    Raises:
        EkkoError: something could not be carried through; every process is gone.
    """
    began_s = time.monotonic()
    with opened(options.out, display, synthetic=options.synthetic, seed=options.seed) as (events, scratch):
        return _Run(options, display, events, scratch, began_s).run()


class _Run:
    """One run, from the events to the result."""

    def __init__(self, options: Options, display: Display, events: Events, folder: Path, began_s: float) -> None:
        self._options = options
        self._display = display
        self._events = events
        self._start = stream_start(len(events), options.stages)
        self._events_max = events_of(options.stages)
        self._folder = folder
        self._began_s = began_s
        events.save(events_path(folder))
        self._board = Board.create(folder, len(REGIONS), self._events_max)
        create_arms(folder, self._events_max)
        self._schedule = Schedule(folder, len(options.stages))

    def run(self) -> Result:
        with (
            make_cluster(self._folder / "nodes", self._options.baseline_delay_s) as cluster,
            Workers(self._folder, self._board) as workers,
        ):
            self._start_processes(cluster, workers)
            watch = self._stream(cluster, workers)
            self._display.phase("comparing the replicas")
            replicas = self._compare(cluster)
        measured = self._measured(watch)
        result = self._result(measured, replicas)
        plot_rollback(result, measured, self._options.out / "rollback.png")
        result.write(self._options.out)
        return result

    def _start_processes(self, cluster: LocalCluster, workers: Workers) -> None:
        """Nodes up, model trained offline and visible everywhere, the baseline's state old enough, scorers ready."""
        board, display = self._board, self._display
        display.phase("starting nodes, training offline")
        RollbackJob(
            MODEL,
            cluster[TRAIN_NODE].local,
            {region: str(cluster.in_region(region)[0].run_dir) for region in REGIONS},
            self._start,
            self._options.rate,
            self._options.seed,
            "float32",
            os.getpid(),
            "",  # rows come from shared memory
            str(cluster[TRAIN_NODE].run_dir),
            str(cluster[BASELINE_NODE].run_dir),
            [stage.kind for stage in self._options.stages],
            [stage.bad for stage in self._options.stages],
        ).save(self._folder)
        workers.start("trainer", "sim_cluster.demo.rollback.trainer")
        for region in REGIONS:
            workers.start(f"scorer-{region}", "sim_cluster.demo.rollback.scorer", region)
        cluster.start(SETTLE_S_MAX)
        board[Word.CLUSTER_READY] = 1
        self._wait(lambda: board[Word.VISIBLE] == 1, workers, "the first state on every node")
        display.phase(f"waiting for a baseline of {self._options.baseline_delay_s:g} s")
        self._wait(lambda: bool(board.ready.all()), workers, "ready scorers", self._options.baseline_delay_s)

    def _wait(self, condition: Callable[[], bool], workers: Workers, what: str, more_s: float = 0.0) -> None:
        began_s = time.monotonic()
        while not condition():
            workers.check()
            waited_s = time.monotonic() - began_s
            if waited_s > SETTLE_S_MAX + more_s:
                raise DemoError(f"{what}: not there after {SETTLE_S_MAX + more_s:g} s: is the machine overloaded?")
            self._display.update(min(1.0, waited_s / more_s) if more_s else self._board[Word.OFFLINE_PERMILLE] / 1000)
            time.sleep(REFRESH_S / 4)

    def _stream(self, cluster: LocalCluster, workers: Workers) -> Watch:
        """Start the clock, let faults begin, and watch until the last one is taken back, or the events are all."""
        board, display = self._board, self._display
        display.phase(f"streaming up to {self._events_max:,} events")
        start_ns = time.monotonic_ns() + int(LEAD_S * 1e9)
        watch = Watch(cluster[WITNESS_NODE], start_ns)
        director = Director(self._schedule, self._options.stages, self._start, self._event_at)
        board[Word.START_NS] = start_ns
        moved_s, learnt = time.monotonic(), 0
        while board[Word.DONE] == 0:
            workers.check()
            if board[Word.LEARNT] > learnt:
                moved_s, learnt = time.monotonic(), board[Word.LEARNT]
            if time.monotonic() > moved_s + SETTLE_S_MAX:
                raise DemoError(f"the stream stands still: {learnt:,} of {self._events_max:,} events were taken")
            self._look(watch)
            director.look(watch, learnt)
            display.update(learnt / self._events_max, self._figures(watch))
            time.sleep(REFRESH_S)
        # What is under way needs no more requests, or it waits for a verdict, which will not come: then it stays as it is.
        deadline_s = time.monotonic() + SETTLE_S_MAX / 6
        while any(course.over_s is None for course in watch.courses.values()) and time.monotonic() < deadline_s:
            self._look(watch)
            time.sleep(REFRESH_S)
        for node in cluster.nodes.values():
            if not node.running:
                raise DemoError(f"node {node.id} ended during the stream: {node.log_tail()}")
        return watch

    def _look(self, watch: Watch) -> None:
        watch.look()
        failed = next((course for course in watch.courses.values() if course.failed), None)
        if failed is not None:
            raise DemoError(f"a rollback failed: {failed.reason}")

    def _event_at(self, second: float) -> int:
        """How many events of the stream were answered by then."""
        scored_ns = self._scored_ns(self._events_max)
        return int(np.count_nonzero((scored_ns > 0) & (scored_ns <= self._board[Word.START_NS] + second * 1e9)))

    def _scored_ns(self, count: int) -> NDArray[np.int64]:
        events = np.arange(count)
        scored_ns: NDArray[np.int64] = self._board.scored_ns[events % len(REGIONS), events]
        return scored_ns

    def _figures(self, watch: Watch) -> str:
        """Live figures for the bar."""
        done = int(self._board.scored.min())
        words = [f"{self._board[Word.LEARNT]:,} events"]
        recent = slice(max(0, done - 1_000), done)
        if done:
            labels = self._events.labels[self._start :][recent]
            words.append(f"AUC {auc(labels, self._live()[recent]):.3f}")
        return "; ".join([*words, watch.state])

    def _live(self) -> Floats:
        """float32[stream]: what was answered, by whichever region's scorer the request went to."""
        events = np.arange(self._events_max)
        scores: Floats = self._board.scores[events % len(REGIONS), events]
        return scores

    def _compare(self, cluster: LocalCluster) -> dict[str, str]:
        """Every serving node, and the witness, against the training node, once all have everything."""
        names = [node.id for node in cluster.nodes.values() if node.id not in (TRAIN_NODE, BASELINE_NODE)]
        deadline_s = time.monotonic() + SETTLE_S_MAX / 3
        while True:
            ours = contents(cluster[TRAIN_NODE].run_dir, MODEL)
            replicas = {name: difference(ours, contents(cluster[name].run_dir, MODEL)) for name in names}
            if not any(replicas.values()) or time.monotonic() > deadline_s:
                return replicas
            time.sleep(REFRESH_S)

    def _scores(self, plan: Plan, events: Events) -> dict[str, Floats]:
        """Live, and of the two runs that nobody manages: on the feed as it was, and as it should have been."""
        torch.set_num_threads(1)  # steps are small: two threads spend more time waiting for each other than they save
        feed = corrupted(events, plan.faults, self._options.seed)
        scores = {WITH: self._live()[: plan.events]}
        for run, learnt, name in ((WITHOUT, feed, "the same without a manager"), (CLEAN, events, "a good feed")):
            self._display.phase(f"replaying {name}")
            scores[run] = unguarded_scores(events, learnt, plan.start, self._options.seed, self._display.update)
        return scores

    def _measured(self, watch: Watch) -> Measured:
        learnt, start_ns = self._board[Word.LEARNT], watch.start_ns
        events = self._events.first(self._start + learnt)
        faults = self._schedule.faults(self._options.stages, len(events))
        plan = Plan(self._start, learnt, self._options.rate, faults)
        return Measured(
            events,
            plan,
            self._scores(plan, events),
            np.array(open_arms(self._folder)[:learnt]),
            (self._scored_ns(learnt) - start_ns) / 1e9,
            (np.array(self._board.learnt_ns[:learnt]) - start_ns) / 1e9,
            watch.states,
            sorted(watch.courses.values(), key=lambda course: course.decided_s),
        )

    def _result(self, measured: Measured, replicas: dict[str, str]) -> Result:
        outcomes, false_alarms = measured.outcomes()
        plan = measured.plan
        labels = measured.events.labels[plan.start :]
        return Result(
            self._events.name,
            self._events.note,
            self._options.seed,
            plan,
            outcomes,
            {run: auc(labels, scores) for run, scores in measured.scores.items()},
            false_alarms,
            replicas,
            self._board[Word.LAG_MAX_US] / 1000,
            time.monotonic() - self._began_s,
            float(measured.learnt_s[-1]),
            [stage.kind for stage in self._options.stages[len(plan.faults) :]],
        )
