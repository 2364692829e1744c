"""The order of events in one run of the demo."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ekko.device.check import check_caches
from ekko.model import CODEC_DEFAULT
from gpu.errors import DeviceError
from p2p.busy.backlog import PASS_THROUGH
from sim_cluster.demo import plots
from sim_cluster.demo.board import Board, Word
from sim_cluster.demo.cluster import (
    KILLED_NODE,
    MODEL,
    REGIONS,
    TRAIN_NODE,
    DelayLog,
    DemoError,
    Outage,
    Workers,
    make_cluster,
)
from sim_cluster.demo.data import Events
from sim_cluster.demo.display import Display
from sim_cluster.demo.evaluation import Floats, auc, gain, log_loss, resampled_aucs
from sim_cluster.demo.history import FROZEN as FROZEN_DELAY
from sim_cluster.demo.history import History, replay_scores
from sim_cluster.demo.job import Job, events_path, history_path, parameters_path
from sim_cluster.demo.opening import opened
from sim_cluster.demo.report import FROZEN, LIVE, DeviceReport, Latency, OutageReport, Quality, Result
from sim_cluster.demo.verify import contents, difference, difference_to_parameters
from sim_cluster.processes import LocalCluster

OFFLINE_SHARE: Final = 0.6
LEAD_S: Final = 0.5  # from the moment when all are ready to the first event
REFRESH_S: Final = 0.1
FETCH_S: Final = 0.5  # how often a node is asked for delays, and the figures are shown
SETTLE_S_MAX: Final = 150.0  # for the nodes to start, the model to learn offline, the stream to drain; each


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Args:
        out: folder for the report and the pictures.
        stream: how many of the last events are streamed; None: the last 40 %.
        delays: how many events late the compared states are, smallest first.
        rate: events per second.
        seed: of the model, the bootstrap and synthetic events.
        kill: kill one serving node in mid-stream, and start it again.
        synthetic: do not even try to get the real data.
        codec: how rows are stored and sent.
        device: on which the regions' scorers look rows up; empty: in shared memory.
    """

    out: Path
    stream: int | None = None
    delays: tuple[int, ...] = (1_000, 10_000)
    rate: float = 500.0
    seed: int = 0
    kill: bool = False
    synthetic: bool = False
    codec: str = CODEC_DEFAULT
    device: str = ""


def run_demo(options: Options, display: Display) -> Result:
    """Run everything, write report and pictures, and clean up.

    Raises:
        EkkoError: something could not be carried through; every process is gone.
    """
    began_s = time.monotonic()
    with opened(options.out, display, synthetic=options.synthetic, seed=options.seed) as (events, scratch):
        start = len(events) - min(options.stream or len(events), len(events) - int(OFFLINE_SHARE * len(events)))
        return _Run(options, display, events, start, scratch, began_s).run()


class _Run:
    """One run, from the events to the result."""

    def __init__(self, options: Options, display: Display, events: Events, start: int, folder: Path, began_s: float) -> None:
        self._options = options
        self._display = display
        self._events = events
        self._start = start
        self._stream = len(events) - start
        self._folder = folder
        self._began_s = began_s
        self._stream_s = 0.0
        events.save(events_path(folder))
        self._board = Board.create(folder, len(REGIONS), self._stream)

    def run(self) -> Result:
        with (
            make_cluster(self._folder / "nodes", self._options.device) as cluster,
            Workers(self._folder, self._board) as workers,
        ):
            self._start_processes(cluster, workers)
            delays = DelayLog(cluster)
            outage = Outage(cluster, delays) if self._options.kill else None
            self._stream_events(cluster, workers, delays, outage)
            self._display.phase("comparing the replicas")
            replicas, parameters = self._compare(cluster)
            outage_report = _outage_report(outage) if outage is not None else None  # a node that is away has no caches
            device = self._device_report(cluster) if self._options.device else None
        self._display.phase("scoring with older state")
        scores = self._scores()
        self._display.phase("evaluating")
        result = self._result(delays, outage_report, self._quality(scores), replicas, parameters, device)
        self._write(result, delays, scores)
        return result

    def _start_processes(self, cluster: LocalCluster, workers: Workers) -> None:
        """Nodes up, model trained offline and visible everywhere, scorers ready."""
        board, display = self._board, self._display
        display.phase("starting nodes, training offline")
        run_dirs = {region: str(cluster.in_region(region)[0].run_dir) for region in REGIONS}
        options = self._options
        local, parent = cluster[TRAIN_NODE].local, os.getpid()
        job = Job(MODEL, local, run_dirs, self._start, options.rate, options.seed, options.codec, parent, options.device)
        job.save(self._folder)
        workers.start("trainer", "sim_cluster.demo.trainer")
        for region in REGIONS:
            workers.start(f"scorer-{region}", "sim_cluster.demo.scorer", region)
        cluster.start(SETTLE_S_MAX)
        board[Word.CLUSTER_READY] = 1
        self._wait(lambda: board[Word.OFFLINE_PERMILLE] == 1000, workers, "offline training", Word.OFFLINE_PERMILLE)
        display.phase("publishing the first state everywhere")
        self._wait(lambda: board[Word.VISIBLE] == 1, workers, "the first state on every node")
        self._wait(lambda: bool(board.ready.all()), workers, "ready scorers")
        # Delays are those of batches: none is told of rows that come by priority, behind a first state that filled a link.
        self._wait(lambda: _all_send_batches(cluster), workers, "links on which batches pass")

    def _wait(self, condition: Callable[[], bool], workers: Workers, what: str, permille: Word | None = None) -> None:
        deadline_s = time.monotonic() + SETTLE_S_MAX
        while not condition():
            workers.check()
            if time.monotonic() > deadline_s:
                raise DemoError(f"{what}: not there after {SETTLE_S_MAX:g} s: is the machine overloaded?")
            if permille is not None:
                self._display.update(self._board[permille] / 1000)
            time.sleep(REFRESH_S / 4)

    def _stream_events(self, cluster: LocalCluster, workers: Workers, delays: DelayLog, outage: Outage | None) -> None:
        """Start the clock, and watch until everything that was published is visible everywhere."""
        board, display = self._board, self._display
        delays.skip()
        display.phase(f"streaming {self._stream:,} events")
        start_ns = time.monotonic_ns() + int(LEAD_S * 1e9)
        board[Word.START_NS] = start_ns
        deadline_s = start_ns / 1e9 + self._stream / self._options.rate + SETTLE_S_MAX
        fetch_s = start_ns / 1e9 + FETCH_S
        while board[Word.DONE] == 0:
            workers.check()
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise DemoError(f"the stream did not end: {board[Word.LEARNT]:,} of {self._stream:,} events were learnt")
            if outage is not None:
                outage.step(board[Word.LEARNT] / self._stream)
            if now_s >= fetch_s:
                delays.fetch_next()
                fetch_s = now_s + FETCH_S
                display.update(board[Word.LEARNT] / self._stream, self._figures(delays, outage))
            time.sleep(REFRESH_S)
        self._stream_s = (int(board.learnt_ns[-1]) - start_ns) / 1e9
        self._check_nodes(cluster)
        delays.fetch()
        display.update(1.0, self._figures(delays, outage))

    def _check_nodes(self, cluster: LocalCluster) -> None:
        for node in cluster.nodes.values():
            if not node.running:
                raise DemoError(f"node {node.id} ended during the stream: {node.log_tail()}")

    def _figures(self, delays: DelayLog, outage: Outage | None) -> str:
        """Live figures for the bar: events, AUC so far where it is worst, p99 of each region."""
        board = self._board
        done = int(board.scored.min())
        words = [f"{board[Word.LEARNT]:,} learnt, {board[Word.ROWS]:,} rows"]
        if done:
            labels = self._events.labels[self._start : self._start + done]
            words.append(f"AUC {min(auc(labels, scores[:done]) for scores in board.scores):.3f}")
        p99 = [f"{region} {np.percentile(values, 99):.0f}" for region, values in delays.by_region.items() if values]
        words += [f"p99 {', '.join(p99)} ms"] if p99 else []
        words += [outage.state] if outage is not None and outage.state else []
        return "; ".join(words)

    def _compare(self, cluster: LocalCluster) -> tuple[dict[str, str], dict[str, str]]:
        """Every serving node against the training node, and against the trained parameters."""
        with np.load(parameters_path(self._folder)) as saved:
            tables = {key.removeprefix("table/"): saved[key] for key in saved if key.startswith("table/")}
            tensors = {key.removeprefix("tensor/"): saved[key] for key in saved if key.startswith("tensor/")}
        ours = contents(cluster[TRAIN_NODE].run_dir, MODEL)
        rows = sum(len(table) for name, table in ours.items() if name != "_dense")
        if rows != sum(len(table) for table in tables.values()):
            raise DemoError(f"the training node holds {rows} rows, the trainer {sum(map(len, tables.values()))}")
        serving = [node for node in cluster.nodes.values() if node.spec.region in REGIONS]
        replicas = {node.id: difference(ours, contents(node.run_dir, MODEL)) for node in serving}
        parameters = {node.id: difference_to_parameters(node.run_dir, MODEL, tables, tensors) for node in serving}
        return replicas, parameters

    def _device_report(self, cluster: LocalCluster) -> DeviceReport:
        """The caches of the nodes that scorers read from, against their stores."""
        try:
            checks = {region: check_caches(cluster.in_region(region)[0].run_dir, SETTLE_S_MAX) for region in REGIONS}
        except DeviceError as error:
            raise DemoError(f"the caches on {self._options.device} cannot be compared: {error}") from None
        found, missed = self._board.device_keys.sum(axis=0).tolist()
        return DeviceReport(
            name=self._options.device,
            rows={region: sum(check.rows for check in found) for region, found in checks.items()},
            tables=sum(len(found) for found in checks.values()),
            differences={
                f"{region}/{check.table}": check.difference
                for region, found in checks.items()
                for check in found
                if check.difference
            },
            keys_on_device=found,
            keys_from_host=missed,
        )

    def _scores(self) -> dict[str, Floats]:
        """Scores of the stream: per region live, and with the state a number of events late, and frozen."""
        history = History.load(history_path(self._folder))
        scores = {region: np.array(live) for region, live in zip(REGIONS, self._board.scores, strict=True)}
        states = {str(delay): delay for delay in self._options.delays} | {FROZEN: FROZEN_DELAY}
        for done, (key, delay) in enumerate(states.items(), start=1):
            scores[key] = replay_scores(self._events, history, self._start, delay)
            self._display.update(done / len(states))
        return scores

    def _quality(self, scores: dict[str, Floats]) -> dict[str, Quality]:
        """Figures of each region; delayed and frozen state are the same everywhere."""
        labels = self._events.labels[self._start :]
        aucs = {key: auc(labels, values) for key, values in scores.items()}
        losses = {key: log_loss(labels, values) for key, values in scores.items()}
        stacked = np.stack(list(scores.values()))
        by_event = resampled_aucs(labels, stacked, np.arange(self._stream), self._options.seed)
        by_user = resampled_aucs(labels, stacked, self._events.ids["user"][self._start :], self._options.seed)
        place = {key: index for index, key in enumerate(scores)}
        states = [key for key in scores if key not in REGIONS]
        return {
            region: Quality(
                auc={LIVE: aucs[region]} | {key: aucs[key] for key in states},
                log_loss={LIVE: losses[region]} | {key: losses[key] for key in states},
                gain={key: gain(by_event[:, place[region]], by_event[:, place[key]]) for key in states},
                gain_by_user={key: gain(by_user[:, place[region]], by_user[:, place[key]]) for key in states},
            )
            for region in REGIONS
        }

    def _result(
        self,
        delays: DelayLog,
        outage: OutageReport | None,
        quality: dict[str, Quality],
        replicas: dict[str, str],
        parameters: dict[str, str],
        device: DeviceReport | None,
    ) -> Result:
        board = self._board
        without = [region for region, values in delays.by_region.items() if not values]
        if without:
            raise DemoError(f"no node of region {without[0]!r} reported a delay: nothing was pushed to it")
        return Result(
            dataset=self._events.name,
            codec=self._options.codec,
            note=self._events.note,
            seed=self._options.seed,
            rate=self._options.rate,
            events_offline=self._start,
            events_stream=self._stream,
            rows=board[Word.ROWS],
            bytes=board[Word.BYTES],
            batches=board[Word.BATCHES],
            stream_s=self._stream_s,
            trainer_lag_max_ms=board[Word.LAG_MAX_US] / 1000,
            latency={region: Latency.of(delays.by_region[region], delay) for region, delay in REGIONS.items()},
            quality=quality,
            replicas=replicas,
            parameters=parameters,
            predicted_first=bool((board.scored_ns.max(axis=0) <= board.learnt_ns).all()),
            outage=outage,
            device=device,
            total_s=time.monotonic() - self._began_s,
        )

    def _write(self, result: Result, delays: DelayLog, scores: dict[str, Floats]) -> None:
        """The report and both pictures."""
        out = self._options.out
        shown = {LIVE: scores[result.worst_region]} | {key: values for key, values in scores.items() if key not in REGIONS}
        plots.plot_latency(result, delays.by_region, out / "latency.png")
        plots.plot_auc(result, self._events, self._start, shown, out / "auc.png")
        result.write(out)


def _all_send_batches(cluster: LocalCluster) -> bool:
    return all(peer["mode"] == PASS_THROUGH for node in cluster.nodes.values() for peer in node.status()["peers"])


def _outage_report(outage: Outage) -> OutageReport:
    if not outage.caught_up_s:
        raise DemoError(f"{KILLED_NODE} had not caught up when the stream ended: stream more events")
    return OutageReport(
        node=KILLED_NODE,
        down_s=outage.restarted_s - outage.killed_s,
        catch_up_s=outage.caught_up_s - outage.restarted_s,
        others_p99_ms={region: float(np.percentile(values, 99)) for region, values in outage.others.items() if values},
    )
