"""What could leave a rollback half done, or take back what is good: operators in each other's way, deaths at bad moments."""

from pathlib import Path
from typing import Any

import pytest

from ekko.delayed.history import cut_of
from ekko.errors import EkkoError, ModelError
from ekko.model import ModelSpec, TableSpec
from ekko.rollback import diff, performer
from ekko.rollback import machine as r
from ekko.rollback.coordinator import TAKEOVER_MS
from ekko.rollback.facts import HISTORY_MAX, Step
from ekko.rollback.moments import HEALTHY
from ekko.rollback.performer import Performer
from ekko.rollback.plan import Plan, PlanBatch, read_plan
from ekko.rollback.risk import decode_risk
from p2p import messages as m
from sim_cluster.network import NetworkOptions
from sim_cluster.rollbacks import Shell, attach, held, oracle, taken_back
from sim_cluster.virtual import VirtualCluster
from tests.sim_cluster.test_rollbacks import check, end, fact_of, form, good_and_bad, step_of, write


def test_questions_do_not_push_out_what_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_ROWS_MAX", 2)
    cluster, shells, cut_ms = good_and_bad(11, tmp_path)
    epoch = shells["w1"].request(cut_ms).epoch
    assert cluster.run_until(lambda: step_of(shells) >= Step.FENCING, step_ms=1)
    for _ in range(HISTORY_MAX + 1):
        shells["s1"].request(cut_ms, dry=True)
        cluster.run(20)
    end(cluster, shells)
    assert fact_of(shells).request == epoch
    check(cluster, shells)


class NotHeard(Performer):
    """Of the end nobody hears."""

    def _carry_out(self, effect: r.Effect, now: m.Now) -> r.Event | None:
        if isinstance(effect, r.Tell) and effect.fact.step >= Step.LIFTING:
            return None
        return super()._carry_out(effect, now)


BACK = pytest.param(True, id="it comes back without its memory", marks=pytest.mark.long)


@pytest.mark.parametrize("back", [BACK, pytest.param(False, id="another one takes over")])
def test_what_was_written_after_the_end_is_not_taken_back(back: bool, tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(12, tmp_path)
    shells["w1"].coordinator.make_performer = NotHeard  # type: ignore[union-attr]
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells, "t1") >= Step.WRITING, step_ms=1)
    assert cluster.run_until(lambda: bool(cluster.publish("t1", "item", [1], 7.0)), step_ms=1), "writers go on"
    cluster.run(200)
    cluster.crash("w1")
    if back:
        cluster.run(500)
        cluster.restart("w1", keep_state=False)
    assert cluster.publish("t2", "item", [3], 8.0)
    end(cluster, shells if back else {name: shell for name, shell in shells.items() if name != "w1"})
    for node in cluster.nodes.values():
        if node.machine is not None:
            item = held(node, "ctr", cluster.model.tables["item"])
            assert (item[1], item[3]) == (7.0, 8.0)


def test_who_is_forced_out_is_told_so(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(13, tmp_path)
    first = shells["s1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells, "s2") >= Step.FENCING, step_ms=1)
    second = shells["s2"].request(cut_ms, force=True)
    end(cluster, shells)
    for asked, step in ((first, Step.FAILED), (second, Step.DONE)):
        answer = shells["s1"].facts.answering(asked.epoch)
        assert answer is not None
        assert shells["s1"].facts.shown(answer).step is step, answer
        assert ("another rollback" in shells["s1"].facts.shown(answer).reason) == (asked is first)
    check(cluster, shells)


class NeverDone(Performer):
    """Works out a plan for ever."""

    def work(self, now: m.Now) -> None:
        self._planning = None
        self._drop_draft()


@pytest.mark.long
def test_a_question_whose_witness_dies_is_answered_by_another(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(14, tmp_path)
    shells["w1"].coordinator.make_performer = NeverDone  # type: ignore[union-attr]
    asked = shells["s1"].request(cut_ms, dry=True)
    cluster.run(300)
    cluster.crash("w1")

    def answered() -> bool:
        answer = shells["s1"].facts.answering(asked.epoch)
        return answer is not None and answer.over

    assert cluster.run_until(answered, 30_000)


def test_a_request_of_a_node_whose_clock_is_behind_is_taken_on(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(15, tmp_path)
    cluster.shift_clock("s1", -25_000)
    shells["s1"].request(cut_ms)
    end(cluster, shells)
    check(cluster, shells)


def test_a_model_that_is_dropped_ends_its_rollback_and_nothing_else(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(16, tmp_path)
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells) >= Step.FENCING, step_ms=1)
    for name in ("w1",):
        cluster.nodes[name].store.drop_model("ctr", cluster.now().unix_ms)
    coordinator = shells["w1"].coordinator
    assert coordinator is not None
    coordinator.look(cluster.now())
    for one in coordinator.performers.values():
        one.on_timer(cluster.now())
    assert not coordinator.performers


def test_rows_at_risk_are_named_by_the_witness_afterwards(tmp_path: Path) -> None:
    cluster, shells = form(17, tmp_path)
    write(cluster, 8, 1.0, 4)
    cluster.run(1_000)
    mark_ms = cluster.now().unix_ms
    cluster.run(10)
    assert cluster.publish("t1", "item", [5, 77], 2.0)  # good, and of a moment that the witnesses cannot tell
    cluster.run(500)
    cut_ms = cluster.now().unix_ms
    for name in ("w1", "w2"):
        shells[name].delayed._model("ctr").history.blur(cut_of(mark_ms) + 1, cut_of(cut_ms) + 1)  # type: ignore[union-attr]
    cluster.run(10)
    assert cluster.publish("t2", "item", [6], 666.0)
    shells["s2"].request(cut_ms)
    end(cluster, shells)
    fact = fact_of(shells)
    assert (fact.cut_ms, fact.at_risk) == (mark_ms, 2)
    check(cluster, shells)
    kept = shells["w1"].plans.kept(fact.model, fact.epoch)
    assert kept is not None
    assert [one.keys.tolist() for one in decode_risk(kept)] == [[5, 77]]


def test_a_model_in_partitions_goes_to_a_witness_that_holds_all_of_it(tmp_path: Path) -> None:
    spec = ModelSpec("ctr", 8, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}, partitions=2)
    cluster = VirtualCluster(18, NetworkOptions(1, 20), model=spec)
    roles = {"t1": "train", "s1": "serve", "w1": "witness", "w2": "witness"}
    holds = {"s1": [1], "w1": [0]}
    for name, role in roles.items():
        cluster.add(name, "home", role, [] if name == "t1" else ["t1"], hold={"ctr": holds[name]} if name in holds else None)
    shells = {name: Shell(cluster, name, tmp_path / name if role == "witness" else None) for name, role in roles.items()}
    attach(cluster, shells.values())
    cluster.run(3_000)
    for key in range(30):
        cluster.publish("t1", "item", [key, key + 1], 1.0)
        cluster.run(20)
    cluster.run(1_000)
    cut_ms = cluster.now().unix_ms
    cluster.run(100)
    for key in range(20):
        cluster.publish("t1", "item", [2 * key, 100 + key], 666.0)
    cluster.run(300)
    shells["s1"].request(cut_ms)
    end(cluster, shells)
    assert fact_of(shells).witness == "w2"
    due = oracle(cluster, "item", taken_back(shells["t1"]))
    assert due == dict.fromkeys(range(31), 1.0)
    halves: list[int] = []
    for name, node in cluster.nodes.items():
        found = held(node, "ctr", spec.tables["item"])
        assert found.items() <= due.items(), name
        assert len(found) == 31 or name in holds
        halves += found if name in holds else []
    assert sorted(halves) == list(range(31))
    # Without it the others are not worth stopping anybody for.
    cluster.leave("w2")
    cluster.run(3_000)
    with pytest.raises(EkkoError, match=r"no witness is alive .* model 'ctr'.* holds all 2 partitions of it; to go"):
        shells["s1"].request(cut_ms)
    assert cluster.publish("t1", "item", [1], 3.0)


@pytest.mark.long
def test_half_a_rollback_is_left_to_its_witness_where_no_other_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "BATCH_ROWS_MAX", 2)
    cluster, shells, cut_ms = good_and_bad(19, tmp_path)
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells, "w2") >= Step.WRITING, step_ms=1)
    cluster.crash("w1")
    shells["w2"].delayed.advance("ctr", cluster.now().unix_ms)  # type: ignore[union-attr]
    cluster.run(TAKEOVER_MS + 10_000)
    assert step_of(shells, "w2") is Step.WRITING
    assert [name for name, _ in shells["w2"].notes].count("rollback_left_to_its_witness") == 1
    assert not cluster.publish("t1", "item", [1], 7.0), "writers do not go on from half of it"
    cluster.restart("w1")
    end(cluster, shells)
    assert fact_of(shells).witness == "w1"
    check(cluster, shells)


def test_what_cannot_be_stops_nobody(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(20, tmp_path)
    for name in ("w1", "w2"):
        shells[name].advance(cut_ms)
    shells["s1"].request(cut_ms - 2_000)
    end(cluster, shells, Step.FAILED)
    assert "is before what witness 'w1' keeps" in fact_of(shells).reason
    assert cluster.nodes["t1"].machine.fence_of(cluster.model.id) is None  # type: ignore[union-attr]
    assert cluster.publish("t1", "item", [1], 5.0)
    with pytest.raises(ModelError, match="lies ahead of now: give a moment in Unix milliseconds"):
        shells["s1"].request(1_000 * cut_ms)  # microseconds


@pytest.mark.long
def test_the_past_does_not_move_over_a_moment_while_it_is_worked_out(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(21, tmp_path)
    shells["w1"].healthy_until = lambda model: cut_ms
    cluster.crash("w1")
    cluster.restart("w1")
    cluster.run(1_000)
    shells["w1"].coordinator.make_performer = NeverDone  # type: ignore[union-attr]
    cluster.crash("w2")
    shells["w1"].request(HEALTHY)
    assert cluster.run_until(lambda: step_of(shells) is Step.PLANNING)
    shells["w1"].advance(cut_ms + 50)
    assert shells["w1"].delayed.oldest_cut("ctr") == cut_ms  # type: ignore[union-attr]


@pytest.mark.long
def test_a_plan_that_cannot_be_read_for_a_while_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, failures = Plan.batch, [OSError(5, "Input/output error"), ValueError("a part is damaged")]

    def badly(plan: Plan, index: int) -> PlanBatch:
        if failures:
            raise failures.pop()
        return read(plan, index)

    def found(*given: Any) -> Plan | None:
        plan = read_plan(*given)
        monkeypatch.setattr(Plan, "batch", badly)  # from now on
        return plan

    cluster, shells, cut_ms = good_and_bad(22, tmp_path)
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells) >= Step.FENCING, step_ms=1)
    monkeypatch.setattr(performer, "read_plan", found)
    end(cluster, shells)
    assert not failures
    assert sum(name == "rollback_write_refused" for name, _ in shells["w1"].notes) == 2
    check(cluster, shells)


def test_a_witness_that_does_not_know_the_moment_leaves_it_to_one_that_does(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(23, tmp_path)
    shells["w1"].advance(cluster.now().unix_ms)
    shells["s1"].request(cut_ms)
    end(cluster, shells)
    assert fact_of(shells).witness == "w2"
    check(cluster, shells)
