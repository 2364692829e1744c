"""Rollbacks on a virtual cluster with the daemon's own parts: what was wrong is gone everywhere, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ekko.generations import Generation
from ekko.rollback import diff, performer
from ekko.rollback import machine as r
from ekko.rollback.facts import Rollback, Step
from ekko.rollback.performer import Performer
from ekko.rollback.plan import PlanBatch, Summary
from ekko.rollback.scope import Scope
from p2p import messages as m
from p2p.replica import RowColumns
from sim_cluster.network import NetworkOptions
from sim_cluster.rollbacks import Shell, attach, held, over, plan_left, taken_back, wrong_rows
from sim_cluster.virtual import VirtualCluster

NODES = {
    "t1": ("home", "train"),
    "t2": ("home", "train"),
    "s1": ("eu", "serve"),
    "s2": ("eu", "serve"),
    "w1": ("eu", "witness"),
    "w2": ("home", "witness"),
}
Shells = dict[str, Shell]


def long(step: Step) -> object:
    """On request: the others cover most of it."""
    return pytest.param(step, marks=pytest.mark.long)


def form(seed: int, folder: Path) -> tuple[VirtualCluster, Shells]:
    cluster = VirtualCluster(seed, NetworkOptions(1, 20))
    for name, (region, role) in NODES.items():
        cluster.add(name, region, role, [] if name == "t1" else ["t1"])
    shells = {name: Shell(cluster, name, folder / name if role == "witness" else None) for name, (_, role) in NODES.items()}
    attach(cluster, shells.values())
    cluster.run(3_000)
    return cluster, shells


def write(cluster: VirtualCluster, steps: int, value: float, delete: int) -> None:
    """Steps of both trainers over both tables; each `delete`-th is a deletion."""
    for step in range(steps):
        keys = [(7 * step + 3 * number) % 40 for number in range(6)]
        deletes = step % delete == delete - 1
        cluster.publish(("t1", "t2")[step % 2], ("item", "user")[step // 2 % 2], keys, value + step, delete=deletes)
        cluster.run(40)


def good_and_bad(seed: int, folder: Path) -> tuple[VirtualCluster, Shells, int]:
    """A cluster that was written well, and then badly; and the moment in between."""
    cluster, shells = form(seed, folder)
    write(cluster, 20, 1.0, 4)
    cluster.run(1_000)
    cut_ms = cluster.now().unix_ms
    cluster.run(100)
    write(cluster, 12, 1_000.0, 3)
    cluster.publish("t1", "item", [101, 102, 103], 666.0)  # born bad
    return cluster, shells, cut_ms


def fact_of(shells: Shells, name: str = "t1") -> Rollback:
    current = shells[name].facts.current(Generation.of(shells[name].cluster.model))
    assert current is not None
    return current


def step_of(shells: Shells, name: str = "w1") -> Step:
    """How far the first witness is, as far as it has told."""
    current = shells[name].facts.current(Generation.of(shells[name].cluster.model))
    return Step.REQUESTED if current is None else current.step


def end(cluster: VirtualCluster, shells: Shells, step: Step = Step.DONE) -> None:
    assert cluster.run_until(lambda: all(over(shell, step)() for shell in shells.values()), 90_000), fact_of(shells)


def check(cluster: VirtualCluster, shells: Shells) -> None:
    """All is as it should be, and goes on. The other witness is a leaf, which a rollback does not wait for (R22)."""
    cluster.run(1_000)
    assert wrong_rows(cluster, taken_back(shells["t1"])) == ""
    assert plan_left(shells.values()) == ""
    assert all(shell.facts.running(Generation.of(cluster.model)) is None for shell in shells.values())
    assert cluster.publish("t2", "item", [1], 5.0)
    assert cluster.publish("t1", "user", [2], 6.0)
    cluster.run(2_000)
    assert wrong_rows(cluster, taken_back(shells["t1"])) == ""


@pytest.mark.parametrize("asked_at", ["w1", "s1"])
def test_a_model_goes_back_to_what_it_was_on_all_nodes(asked_at: str, tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(1, tmp_path)
    begin_ms = cluster.now_ms
    shells[asked_at].request(cut_ms)
    end(cluster, shells)
    assert cluster.now_ms - begin_ms < 1_000  # a few round trips
    fact = fact_of(shells)
    assert (fact.witness, fact.cut_ms, fact.at_risk) == ("w1", cut_ms, 0)
    assert fact.rows_done == fact.rows > fact.deletions > 0
    check(cluster, shells)


def test_writers_are_refused_meanwhile_and_told_why(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(1, tmp_path)
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells) >= Step.WRITING, step_ms=1)
    columns = (RowColumns(cluster.model.tables["item"].id, np.array([1], np.uint64), np.zeros((1, 16), np.uint8)),)
    reply = cluster.request("t1", lambda number: m.PublishRequested(number, cluster.model.id, columns))
    assert isinstance(reply, m.Refused)
    assert "it is taken back to 20" in reply.reason
    end(cluster, shells)
    check(cluster, shells)


def test_a_dry_run_from_any_node_changes_nothing(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(2, tmp_path)
    cluster.run(300)
    before = [held(node, "ctr", cluster.model.tables["item"]) for node in cluster.nodes.values()]
    asked = shells["s2"].request(cut_ms, dry=True)
    assert cluster.run_until(lambda: (answer := shells["s2"].facts.answering(asked.epoch)) is not None and answer.over)
    answer = shells["s2"].facts.answering(asked.epoch)
    assert answer is not None
    assert (answer.step, answer.cut_ms, answer.witness) == (Step.DONE, cut_ms, "w1")
    assert answer.rows > answer.deletions > 0
    assert [held(node, "ctr", cluster.model.tables["item"]) for node in cluster.nodes.values()] == before
    assert cluster.publish("t1", "item", [1], 5.0)
    # What it said is what comes.
    shells["s2"].request(cut_ms)
    end(cluster, shells)
    assert abs(fact_of(shells).rows - answer.rows) <= 1


def test_a_narrower_scope_leaves_the_rest(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(3, tmp_path)
    cluster.run(300)
    user = held(cluster.nodes["s1"], "ctr", cluster.model.tables["user"])
    high = {key: row for key, row in held(cluster.nodes["s1"], "ctr", cluster.model.tables["item"]).items() if key >= 50}
    shells["w2"].request(cut_ms, Scope(("item",), key_end=50))
    end(cluster, shells)
    for node in cluster.nodes.values():
        assert held(node, "ctr", cluster.model.tables["user"]) == user
        item = held(node, "ctr", cluster.model.tables["item"])
        assert {key: row for key, row in item.items() if key >= 50} == high == {101: 666.0, 102: 666.0, 103: 666.0}
        assert all(row < 1_000 for key, row in item.items() if key < 50)


def test_before_the_log_begins_nothing_can_be_done_and_writers_go_on(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(4, tmp_path)
    for name in ("w1", "w2"):
        shells[name].advance(cut_ms)
    shells["s1"].request(cut_ms - 2_000)
    end(cluster, shells, Step.FAILED)
    assert "is before what witness 'w1' keeps" in fact_of(shells).reason
    assert cluster.publish("t1", "item", [1], 5.0)


def test_a_corrupted_model_is_taken_back_by_itself_and_probed(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(5, tmp_path)
    judged = {"state": "corrupted"}
    for name in ("w1", "w2"):
        shells[name].verdict = lambda model, since_ms: judged["state"]
        shells[name].healthy_until = lambda model: cut_ms
        shells[name].automatic = True
        cluster.crash(name)
        cluster.restart(name)
    assert cluster.run_until(lambda: step_of(shells) is Step.PROBING)
    assert fact_of(shells).automatic
    assert shells["s1"].facts.share(Generation.of(cluster.model)) == 0.01
    judged["state"] = "healthy"
    end(cluster, shells)
    check(cluster, shells)


@pytest.mark.parametrize(
    "step", [Step.WRITING, *(long(step) for step in (Step.FENCING, Step.PLANNING, Step.WAITING, Step.LIFTING))]
)
def test_a_witness_that_dies_goes_on_where_it_was(step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_ROWS_MAX", 2)
    cluster, shells, cut_ms = good_and_bad(6, tmp_path)
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells) >= step, step_ms=1)
    cluster.crash("w1")
    cluster.run(500)
    cluster.restart("w1")
    end(cluster, shells)
    assert fact_of(shells).witness == "w1"
    check(cluster, shells)


@pytest.mark.parametrize("step", [Step.WRITING, *(long(step) for step in (Step.FENCING, Step.WAITING))])
def test_another_witness_takes_over(step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_ROWS_MAX", 2)
    cluster, shells, cut_ms = good_and_bad(7, tmp_path)
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells) >= step, step_ms=1)
    cluster.crash("w1")
    others = {name: shell for name, shell in shells.items() if name != "w1"}
    end(cluster, others)
    assert fact_of(others).witness == "w2"
    cluster.restart("w1", keep_state=step is not Step.WRITING)
    end(cluster, shells)
    cluster.run(3_000)
    check(cluster, shells)


def test_of_two_witnesses_that_decide_at_once_one_wins(tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(8, tmp_path)
    cluster.cut = {(one, other) for one in NODES for other in NODES if "w2" in (one, other)}
    for name in ("w1", "w2"):
        shells[name].request(cut_ms)
    cluster.run(5)
    cluster.cut = set()
    end(cluster, shells)
    assert len({fact_of(shells, name).epoch for name in shells}) == 1
    check(cluster, shells)


# --- planted bugs -------------------------------------------------------------------------------------------------------------


class KeepsNewKeys(Performer):
    """Keys that were born in the bad interval are not deleted."""

    def _left(self, batch: PlanBatch) -> PlanBatch | None:
        live = len(batch.rows)
        left = PlanBatch(batch.table, batch.keys[:live], batch.rows, batch.expected[:live])
        return super()._left(left) if live else None


class WritesOldStamps(Performer):
    """Rows are written under the stamps that they have: nobody takes them for news."""

    def _ask(self, effect: r.Effect, make: Callable[[int], m.Event]) -> None:
        def old(number: int) -> m.Event:
            event = make(number)
            if isinstance(event, m.PublishRequested):
                store = self._model
                for column in event.columns:
                    stamps = performer.versions_now(store.tables_by_id[column.table], column.keys).stamps
                    store.apply([RowColumns(column.table, column.keys, column.rows, stamps)], 0)
                empty = tuple(RowColumns(c.table, c.keys[:0], c.rows[:0]) for c in event.columns)
                return m.PublishRequested(number, event.keyspace, empty, through_fence=event.through_fence)
            return event

        super()._ask(effect, old)


class ForgetsItsPlan(Performer):
    """The plan is not durable: who dies half-way takes what is left of the differences for all there is to do, and is done."""

    def begin(self, now: m.Now, why: str = "") -> None:
        if self.fact.step >= Step.WRITING:
            self._plan = None
            self._feed(r.Begun(Summary(self.fact.cut_ms)), now)
        else:
            super().begin(now, why)


@pytest.mark.parametrize("planted", [KeepsNewKeys, WritesOldStamps])
def test_a_planted_bug_is_noticed(planted: type[Performer], tmp_path: Path) -> None:
    cluster, shells, cut_ms = good_and_bad(9, tmp_path)
    shells["w1"].coordinator.make_performer = planted  # type: ignore[union-attr]
    shells["w1"].request(cut_ms)
    cluster.run(10_000)
    assert over(shells["t1"])()
    assert "has other rows" in wrong_rows(cluster, taken_back(shells["t1"]))


def test_a_plan_that_is_not_durable_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_ROWS_MAX", 2)
    cluster, shells, cut_ms = good_and_bad(10, tmp_path)
    shells["w1"].make_performer = ForgetsItsPlan
    shells["w1"].request(cut_ms)
    assert cluster.run_until(lambda: step_of(shells) >= Step.WRITING, step_ms=1)
    cluster.crash("w1")
    cluster.restart("w1")
    cluster.run_until(over(shells["t1"]), 20_000)
    cluster.run(1_000)
    assert over(shells["t1"])()
    assert "has other rows" in wrong_rows(cluster, taken_back(shells["t1"]))
