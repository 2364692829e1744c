"""The chapter in which a model is taken back: what is counted, what is told, and the whole of it with real processes."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sim_cluster.demo import data
from sim_cluster.demo.display import Display
from sim_cluster.demo.rollback.faults import Fault
from sim_cluster.demo.rollback.job import BASELINE, ONLINE, RollbackJob
from sim_cluster.demo.rollback.plan import Plan, Stage
from sim_cluster.demo.rollback.plots import plot_rollback
from sim_cluster.demo.rollback.report import CLEAN, WITH, WITHOUT, Measured, Result, print_result
from sim_cluster.demo.rollback.run import Options, run_rollback
from sim_cluster.demo.rollback.schedule import Director, Schedule
from sim_cluster.demo.rollback.watch import Course, Watch
from sim_cluster.processes import NodeProcess, NodeSpec

EVENTS = data.generate(0, "a test", count=1_000)
# A hundred seconds of ten events: bad from 20 to 40 and from 60 to 90.
PLAN = Plan(0, 1_000, 10.0, (Fault("shuffled labels", 200, 400), Fault("slow drift", 600, 900)))


def course(epoch: str, decided_s: float, *steps: tuple[str, float]) -> Course:
    return Course(epoch, decided_s, dict(steps), rows=7, cut_s=decided_s - 5)


def measured(courses: list[Course], states: list[tuple[float, str]]) -> Measured:
    seconds = np.arange(1_000) / 10
    scores = np.random.default_rng(0).random(1_000).astype(np.float32)
    arms = np.where(np.arange(1_000) % 5 == 0, BASELINE, ONLINE).astype(np.uint8)
    runs = {WITH: scores, WITHOUT: 1 - scores, CLEAN: scores}
    return Measured(EVENTS, PLAN, runs, arms, seconds, seconds + 0.05, states, courses)


def result_of(one: Measured, stream_s: float = 100.0) -> Result:
    outcomes, false_alarms = one.outcomes()
    aucs = dict.fromkeys((WITH, WITHOUT, CLEAN), 0.5)
    return Result("synthetic", "a test", 0, PLAN, outcomes, aucs, false_alarms, {"near-1": ""}, 12.0, 190.0, stream_s)


def test_moments_and_requests_are_those_of_each_fault(tmp_path: Path) -> None:
    first = course("1", 24.05, ("fencing", 24.05), ("waiting", 25.0), ("probing", 26.05), ("done", 30.05))
    second = course("2", 75.05, ("fencing", 75.05), ("lifting", 77.05), ("done", 78.05))
    states = [(1.0, "healthy"), (22.05, "uncertain"), (24.0, "corrupted"), (29.0, "healthy"), (74.05, "corrupted")]
    one = measured([first, second], states)
    result = result_of(one)
    shuffled, drift = result.outcomes
    assert [shuffled.took(moment) for moment in ("noticed", "decided", "restored", "resumed")] == pytest.approx([2, 4, 6, 10])
    assert [drift.took(moment) for moment in ("noticed", "decided", "restored", "resumed")] == pytest.approx([14, 15, 17, 18])
    # Ten requests a second for six seconds, of which four in five were the online model's; without a manager all of them.
    assert (shuffled.exposed, shuffled.exposed_without) == (48, 200)
    assert (drift.exposed, drift.exposed_without) == (136, 300)
    assert shuffled.auc[WITH] == pytest.approx(1 - shuffled.auc[WITHOUT], abs=1e-6)
    assert (result.false_alarms, result.restored) == (0, True)
    plot_rollback(result, one, tmp_path / "rollback.png")
    assert (tmp_path / "rollback.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(result.write(tmp_path).read_text())
    assert report["faults"][0]["seconds_to"]["restored"] == pytest.approx(6)
    assert report["faults"][0]["requests_exposed"] == {"with": 48, "without": 200}
    page = io.StringIO()
    print_result(result, Console(file=page, width=120))
    assert "SYNTHETIC EVENTS, not real data: a test" in page.getvalue()
    assert "Rollbacks of a model that was well: 0." in page.getvalue()
    assert "too busy" not in page.getvalue()


def test_what_nobody_noticed_was_never_restored() -> None:
    result = result_of(measured([], [(1.0, "healthy")]), stream_s=200.0)
    assert not result.restored
    assert all(outcome.noticed_s is outcome.restored_s is None for outcome in result.outcomes)
    assert result.outcomes[0].exposed == 160  # the baseline answered the others
    page = io.StringIO()
    print_result(result, Console(file=page, width=120))
    assert "Not taken back: shuffled labels, slow drift." in page.getvalue()
    assert "too busy: it kept up with 5 events a second of the 10" in page.getvalue()


def test_a_rollback_before_anything_was_bad_is_a_false_alarm() -> None:
    early = course("1", 5.0, ("fencing", 5.0), ("done", 8.0))
    late = course("2", 65.0, ("fencing", 65.0), ("done", 70.0))
    twice = course("3", 80.0, ("fencing", 80.0), ("done", 85.0))
    assert result_of(measured([early, late, twice], [])).false_alarms == 2


def test_a_watch_keeps_when_each_step_began(tmp_path: Path) -> None:
    watch = Watch(NodeProcess(NodeSpec("n", "near"), tmp_path, (1, 2, 3)), start_ns=0)
    unix_ms = round((watch._unix_offset_s + 10) * 1000)
    told = {"dry": False, "epoch": "a", "requested_ms": unix_ms, "changed_ms": unix_ms + 500, "rows": 0, "reason": ""}
    watch.note_rollback(told | {"step": "fencing", "cut_ms": 0})
    watch.note_rollback(told | {"step": "fencing", "cut_ms": 0, "changed_ms": unix_ms + 900})
    watch.note_rollback(told | {"step": "lifting", "cut_ms": unix_ms - 3_000, "changed_ms": unix_ms + 1_500, "rows": 5})
    watch.note_rollback(told | {"epoch": "b", "dry": True})
    (only,) = watch.courses.values()
    assert (only.decided_s, only.restored_s, only.cut_s) == pytest.approx((10, 11.5, 7), abs=0.01)
    assert only.steps["fencing"] == pytest.approx(10.5, abs=0.01)
    assert (only.rows, only.over_s, only.failed) == (5, None, False)
    for at_s, state in ((1.0, "healthy"), (2.0, "healthy"), (3.0, "corrupted")):
        watch.note_state(state, at_s)
    assert watch.states == [(1.0, "healthy"), (3.0, "corrupted")]
    assert watch.state == "model corrupted, rollback: lifting"


STAGES = (Stage("shuffled labels", 100, 200, 50), Stage("slow drift", 80, 300, 60))


def test_a_job_and_the_schedule_agree_on_where_a_fault_is(tmp_path: Path) -> None:
    kinds, bad = [stage.kind for stage in STAGES], [stage.bad for stage in STAGES]
    RollbackJob("ctr", "tcp://x", {"near": "/n"}, 5, 10.0, 0, "float32", 1, "", "/t", "/b", kinds, bad).save(tmp_path)
    job, demo = RollbackJob.load(tmp_path), Schedule(tmp_path, len(STAGES))
    trainer = Schedule(tmp_path)
    assert (demo.firsts, trainer.allowed, trainer.ended) == ([], 0, False)
    demo.allow(1)
    assert trainer.allowed == 1
    trainer.begin(110)
    assert (job.fault(0, 110, 1_000),) == demo.faults(STAGES) == (Fault("shuffled labels", 110, 310),)
    assert (job.fault(0, 110, 300),) == demo.faults(STAGES, 300) == (Fault("shuffled labels", 110, 300),)
    demo.end()
    assert trainer.ended


def test_a_fault_begins_only_when_the_one_before_is_over_and_the_model_well(tmp_path: Path) -> None:
    """Ten events a second, of which the first is number 1,000 of all."""
    schedule = Schedule(tmp_path, len(STAGES))
    director = Director(schedule, STAGES, 1_000, lambda second: round(second * 10))
    watch = Watch(NodeProcess(NodeSpec("n", "near"), tmp_path, (1, 2, 3)), time.monotonic_ns())

    def allowed(learnt: int) -> int:
        director.look(watch, learnt)
        return schedule.allowed

    assert allowed(100) == 0, "nobody has judged it"
    watch.note_state("healthy", 1.0)
    assert [allowed(99), allowed(100)] == [0, 1]
    schedule.begin(1_101)
    rollback = watch.courses["1"] = course("1", 25.0, ("fencing", 25.0))
    assert allowed(2_000) == 1, "a rollback is under way"
    rollback.steps["done"] = 50.0
    assert [allowed(629), allowed(630)] == [1, 2], "80 and 50 clean events after the end of the rollback at 500"
    schedule.begin(1_631)
    watch.note_state("corrupted", 65.0)
    watch.courses["2"] = course("2", 65.0, ("done", 70.0))
    director.look(watch, 630 + 359)
    assert not schedule.ended, "the feed is bad up to event 931"
    director.look(watch, 631 + 360)
    assert schedule.ended


def test_who_is_never_decided_does_not_hold_up_the_stream(tmp_path: Path) -> None:
    schedule = Schedule(tmp_path, 1)
    watch = Watch(NodeProcess(NodeSpec("n", "near"), tmp_path, (1, 2, 3)), time.monotonic_ns())
    answered = [499]
    director = Director(schedule, STAGES[:1], 1_000, lambda _: answered[0])
    watch.note_state("healthy", 1.0)
    director.look(watch, 100)
    schedule.begin(1_100)
    director.look(watch, 2_000)
    assert not schedule.ended, "it may still be found"
    answered[0] = 500
    director.look(watch, 550)
    assert schedule.ended


@pytest.mark.long
@pytest.mark.processes
def test_a_feed_that_explodes_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = data.generate(0, "a test", count=30_000)
    monkeypatch.setattr(data, "load", lambda **_: events)
    stage = Stage("exploding gradients", 4_000, 5_000, 3_000)
    with Display(Console(file=io.StringIO())) as display:
        result = run_rollback(Options(tmp_path / "out", (stage,)), display)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert result.restored, report
    (fault,) = report["faults"]
    seconds = [fault["seconds_to"][moment] for moment in ("noticed", "decided", "restored")]
    assert seconds == sorted(seconds)
    # The restored model is judged, too; a stream that ends before that leaves it at the probe's share of the traffic.
    assert fault["seconds_to"]["resumed"] is None or fault["seconds_to"]["resumed"] >= seconds[-1]
    assert fault["requests_exposed"]["with"] < fault["requests_exposed"]["without"]
    assert fault["auc"]["with"] > fault["auc"]["without"]
    assert report["false_alarms"] == 0
    assert report["replicas_equal"], report["differences"]
    assert (tmp_path / "out" / "rollback.png").read_bytes().startswith(b"\x89PNG")
