"""What could leave a rollback half done, or take back what is good: operators in each other's way, deaths at bad moments."""

from pathlib import Path

import pytest

from ekko.rollback import diff
from ekko.rollback import machine as r
from ekko.rollback.facts import HISTORY_MAX, Step
from ekko.rollback.performer import Performer
from p2p import messages as m
from sim_cluster.rollbacks import held
from tests.sim_cluster.test_rollbacks import check, end, fact_of, good_and_bad, step_of


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


@pytest.mark.parametrize("back", [True, False], ids=["it comes back without its memory", "another one takes over"])
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
    for performer in coordinator.performers.values():
        performer.on_timer(cluster.now())
    assert not coordinator.performers
