"""Expulsion and retirement: scenarios, and the rules behind them switched off one at a time (R13)."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.identity import retirement
from p2p.identity.ledger import NodeRecord
from p2p.identity.retirement import Retirement
from p2p.identity.writers import WriterBook
from p2p.knowledge import Knowledge
from p2p.members.membership import Membership
from p2p.pulling.pull import Pull
from sim_cluster.checkers import check_converged
from sim_cluster.node import MemoryLedger
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import at_rest, form
from tests.p2p.plants import Plant, Scenario, expect_caught
from tests.p2p.retirement_chaos import (
    SCENARIOS,
    a_dead_writer_is_retired,
    a_late_batch_of_a_retired_writer_arrives,
    a_node_returns_with_more_than_was_left,
    an_expelled_writer_returns,
    an_id_is_used_again,
    expel,
    isolate,
    retired_everywhere,
    two_trainers,
    who_is_away_for_long_is_expelled,
    who_is_away_is_waited_for,
    writer_at,
)
from tests.p2p.writer_chaos import formed, record_of, split, writes
from tests.seeds import seeds

SEEDS = 6


@pytest.mark.parametrize("seed", seeds(2, 4))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Scenario, seed: int) -> None:
    scenario(seed)


# --- planted bugs


def a_retired_writer_is_still_heard(patch: pytest.MonkeyPatch) -> None:
    """A batch of a retired writer is taken, whenever it comes."""
    patch.setattr(WriterBook, "is_retired", lambda *_args: False)


def the_entry_leaves_before_all_is_here(patch: pytest.MonkeyPatch) -> None:
    """A node leaves the entry out of its vector although it has not reached the floor."""
    patch.setattr(Knowledge, "is_settled", lambda self, writer: writer in self._retired)


def the_floor_is_what_the_coordinator_has(patch: pytest.MonkeyPatch) -> None:
    """F is fixed without pulling what others reported."""
    patch.setattr(Pull, "asked_ms", lambda *_args: 1 << 60)


def the_floor_is_fixed_before_all_have_reported(patch: pytest.MonkeyPatch) -> None:
    """The coordinator asks nobody."""
    patch.setattr(Membership, "expected_of", lambda *_args: [])


def strays_are_not_reported(patch: pytest.MonkeyPatch) -> None:
    """A report leaves out rows above the vector, so that F cuts them off."""
    patch.setattr(
        Retirement, "held", lambda _self, keyspace, writer: np.ascontiguousarray(keyspace.knowledge.vector[:, writer])
    )


def old_knowledge_comes_back(patch: pytest.MonkeyPatch) -> None:
    """Who was expelled, or holds more than was left, goes on with what it knows."""
    patch.setattr(Retirement, "start_over", lambda *_args: None)


def a_new_life_is_a_new_node(patch: pytest.MonkeyPatch) -> None:
    """An expelled node that restarts on its old memory is taken for somebody else."""

    def is_expelled(self: Any) -> bool:
        return self.lives[-1] in self.expelled

    patch.setattr(NodeRecord, "is_expelled", is_expelled)
    original = Retirement._follow

    def follow(self: Any, retired: m.Retired, now: m.Now) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Retirement, "start_over", lambda *_args: None)
            original(self, retired, now)

    patch.setattr(Retirement, "_follow", follow)


def who_is_only_remembered_is_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """The floor is fixed although somebody is away, since the coordinator has not met him in this life, or long ago."""
    patch.setattr(Retirement, "misses", lambda *_args: False)


def absence_is_forgotten_with_a_restart(patch: pytest.MonkeyPatch) -> None:
    """Who is away is not remembered beyond a life."""
    original = NodeRecord.begin_life

    def begin_life(self: Any, *args: Any) -> int:
        self.absent.clear()
        return original(self, *args)

    patch.setattr(NodeRecord, "begin_life", begin_life)


def the_id_is_free_at_once(patch: pytest.MonkeyPatch) -> None:
    """Whoever retires a writer forgets its nonce with the first stage."""
    original = Retirement._follow

    def follow(self: Any, retired: m.Retired, now: m.Now) -> None:
        original(self, retired, now)
        self._core.writers.release(retired.family, retired.writer, retired.nonce)
        self._core.writers._retired.clear()

    patch.setattr(Retirement, "_follow", follow)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (a_retired_writer_is_still_heard, a_late_batch_of_a_retired_writer_arrives),
        (the_entry_leaves_before_all_is_here, a_dead_writer_is_retired),
        (the_floor_is_what_the_coordinator_has, a_dead_writer_is_retired),
        (the_floor_is_fixed_before_all_have_reported, a_dead_writer_is_retired),
        (strays_are_not_reported, a_dead_writer_is_retired),
        (old_knowledge_comes_back, an_expelled_writer_returns),
        (old_knowledge_comes_back, a_node_returns_with_more_than_was_left),
        (a_new_life_is_a_new_node, an_expelled_writer_returns),
        (who_is_only_remembered_is_not_waited_for, who_is_away_is_waited_for),
        (absence_is_forgotten_with_a_restart, who_is_away_for_long_is_expelled),
        (the_id_is_free_at_once, a_late_batch_of_a_retired_writer_arrives),
        (the_entry_leaves_before_all_is_here, an_id_is_used_again),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)


# --- what is refused


def refusal(cluster: VirtualCluster, name: str, at: str) -> str:
    reply = cluster.request(at, lambda number: m.ExpelRequested(number, name))
    assert isinstance(reply, m.Refused), reply
    return reply.reason


def test_nobody_is_expelled_while_a_silent_node_would_not_understand() -> None:
    """When it came back, nobody could tell it, and all would refuse its pulls for ever."""
    cluster = VirtualCluster(1)
    for name, version in (("t1", 2), ("eu1", 2), ("eu2", 1), ("us1", 2)):
        cluster.add(
            name, name[:2], "train" if name == "t1" else "serve", [] if name == "t1" else ["t1"], protocol_version=version
        )
    formed(cluster)
    cluster.crash("us1")
    cluster.pause("eu2")
    cluster.run(15_000)
    assert "silent ones included, has protocol version 1" in refusal(cluster, "us1", "t1")


def test_who_cannot_be_expelled() -> None:
    cluster = form(1)
    formed(cluster)
    assert refusal(cluster, "eu1", "eu1") == "node 'eu1' cannot expel itself: ask another node"
    assert refusal(cluster, "us1", "eu1") == "node 'us1' is alive: stop it first, then expel it"
    assert "no node 'us9' is known here" in refusal(cluster, "us9", "eu1")
    cluster.crash("us3")
    cluster.run(10_000)
    expel(cluster, "us3", "eu1")
    cluster.run(3_000)
    assert refusal(cluster, "us3", "eu2") == "node 'us3' was expelled already, and has not come back since"


def test_an_expulsion_that_cannot_be_kept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement, "EXPELLED_MAX", 1)
    cluster = form(1)
    formed(cluster)
    cluster.crash("us2")
    cluster.crash("us3")
    cluster.run(10_000)
    expel(cluster, "us2", "eu1")
    assert "no more can be kept" in refusal(cluster, "us3", "eu1")
    assert [note.name for note in cluster.nodes["eu1"].notes].count("node_expelled") == 1


def who_was_expelled_has_no_say() -> None:
    """Its operator expels another node there, while it is cut off; meanwhile the cluster lets go of it."""
    cluster = form(1)
    formed(cluster)
    writes(cluster, "t1")
    cluster.run(3_000)
    isolate(cluster, "us3")
    cluster.run(30_000)
    assert isinstance(cluster.request("us3", lambda number: m.ExpelRequested(number, "eu1")), m.Expelled)
    expel(cluster, "us3", "eu2")
    cluster.publish("t1", "item", range(30), 5.0)
    cluster.run(3_000)
    cluster.cut = set()
    cluster.run(30_000)
    started = [name for name, node in cluster.nodes.items() if any(note.name == "started_over" for note in node.notes)]
    assert started == ["us3"]
    assert {one.node for node in cluster.nodes.values() for one in record_of(node).expelled.values()} == {"us3"}
    assert check_converged(cluster) == ""
    assert all(len(node.machine.peers_alive(cluster.now())) == 5 for node in cluster.nodes.values() if node.machine)


def test_who_was_expelled_has_no_say() -> None:
    who_was_expelled_has_no_say()


def test_who_keeps_what_it_decided_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_nothing(self: Retirement, _now: m.Now, why: str) -> None:
        self._core.emit(m.StartOver(why, 0))

    monkeypatch.setattr(Retirement, "start_over", forget_nothing)
    with pytest.raises(AssertionError):
        who_was_expelled_has_no_say()


def test_two_that_expelled_each_other_stay_apart_and_say_so() -> None:
    cluster = form(1)
    formed(cluster)
    writes(cluster, "t1")
    cluster.run(3_000)
    isolate(cluster, "us3")
    cluster.run(30_000)
    for name in ("t1", "eu1", "eu2", "us1", "us2"):
        reply = cluster.request("us3", lambda number, name=name: m.ExpelRequested(number, name))  # type: ignore[misc]
        assert isinstance(reply, m.Expelled)
    expel(cluster, "us3", "eu2")
    cluster.run(3_000)
    cluster.cut = set()
    boot = record_of(cluster.nodes["us3"]).lives[-1]
    told = m.Retirements(tuple(record_of(cluster.nodes["us3"]).expelled.values()), ())
    for name in ("t1", "eu1"):
        for _ in range(2):
            machine = cluster.nodes[name].machine
            assert machine is not None
            envelope = m.Envelope(boot, machine._core.options.boot, version=2)
            cluster.feed(cluster.nodes[name], machine, m.MessageReceived(envelope, told))
    cluster.run(10_000)
    assert not [name for name, node in cluster.nodes.items() if any(note.name == "started_over" for note in node.notes)]
    assert [note.name for note in cluster.nodes["t1"].notes].count("expelled_each_other") == 1
    assert cluster.publish("t1", "item", [1], 1.0)


def both_sides_of_a_split_expel_at_the_bound() -> None:
    """Together they decided more than can be kept; all keep the same, or they would pull from each other never again."""
    cluster = form(1)
    formed(cluster)
    writes(cluster, "t1")
    cluster.run(3_000)
    for name in ("us2", "us3"):
        cluster.crash(name)
    cluster.run(10_000)
    split(cluster, {"us1", "us2", "us3"})
    expel(cluster, "us2", "eu1")
    expel(cluster, "us3", "us1")
    for name in ("us2", "us3"):
        del cluster.nodes[name]
    cluster.publish("t1", "item", range(30), 5.0)
    cluster.run(3_000)
    cluster.cut = set()
    cluster.run(5_000)
    kept = {name: sorted(record_of(node).expelled) for name, node in cluster.nodes.items()}
    assert len(set(map(tuple, kept.values()))) == 1, kept
    assert check_converged(cluster) == ""


def test_both_sides_of_a_split_expel_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement, "EXPELLED_MAX", 1)
    both_sides_of_a_split_expel_at_the_bound()


def test_who_keeps_what_came_first_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def trim(self: NodeRecord, count_max: int) -> list[m.Expulsion]:
        came = list(self.expelled.values())
        self.expelled = {one.boot: one for one in came[:count_max]}
        return came[count_max:]

    monkeypatch.setattr(retirement, "EXPELLED_MAX", 1)
    monkeypatch.setattr(NodeRecord, "trim_expelled", trim)
    with pytest.raises(AssertionError):
        both_sides_of_a_split_expel_at_the_bound()


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=40), st.integers(0, 10), st.randoms())
def test_what_is_kept_does_not_depend_on_the_order(named: list[tuple[int, int]], count_max: int, rng: random.Random) -> None:
    records = []
    for order in (named, rng.sample(named, len(named)), [*named, *named]):
        record = NodeRecord(MemoryLedger())
        for number, (boot, other) in enumerate(order):
            record.expelled[boot] = m.Expulsion("n", boot, boot % 7)
            retired = m.Retired(other, 1, boot, boot, m.FROZEN)
            record.retired[retired.key] = retired
            if number % 5 == 4:
                record.trim_expelled(count_max), record.trim_retired(count_max)
        record.trim_expelled(count_max), record.trim_retired(count_max)
        assert len(record.expelled) == min(count_max, len({boot for boot, _ in named}))
        records.append((set(record.expelled), set(record.retired), record.retired_digest()))
    assert records[0] == records[1] == records[2]


def test_writers_of_a_divided_model_are_expelled_by_the_hundred() -> None:
    model = ModelSpec("ctr", 64, {"item": TableSpec("item", 4)}, partitions=64)
    cluster = VirtualCluster(1, model=model)
    cluster.add("t1", "train", "train")
    cluster.add("eu1", "eu", seeds=["t1"])
    formed(cluster)
    core = cluster.nodes["eu1"].machine._core  # type: ignore[union-attr]
    told = tuple(m.Retired(model.id, model.id, n, n + 1, m.FROZEN) for n in range(500))
    cluster.nodes["eu1"].machine._retirement.learn(m.Retirements((), told), None, cluster.now())  # type: ignore[union-attr]
    assert len(core.record.retired) == 500 * 65 < retirement.RETIRED_MAX
    sent = [effect.message for effect in core.effects if isinstance(effect, m.Send)]
    assert max(len(part.retired) for part in sent if isinstance(part, m.Retirements)) <= retirement.TOLD_ENTRIES_MAX


def test_nodes_of_version_1_are_neither_told_nor_let_in_afterwards() -> None:
    cluster = form(1)
    cluster.add("old", "ap", seeds=["t1"], protocol_version=1)
    formed(cluster)
    cluster.crash("us3")
    cluster.run(10_000)
    assert "upgrade all nodes first" in refusal(cluster, "us3", "eu1")
    cluster.leave("old")
    cluster.run(1_000)
    expel(cluster, "us3", "eu1")
    cluster.run(3_000)
    cluster.restart("old")
    cluster.run(3_000)
    assert "cannot be told of the nodes and writers that this cluster has expelled" in cluster.nodes["old"].fatal


def test_an_expulsion_reaches_who_was_away_meanwhile() -> None:
    cluster = two_trainers(1)
    cluster.crash("us1")
    isolate(cluster, "t2")
    cluster.run(10_000)
    expel(cluster, "t2", "eu1")
    cluster.run(2_000)
    cluster.restart("us1")
    cluster.run(3_000)
    assert list(record_of(cluster.nodes["us1"]).expelled) == list(record_of(cluster.nodes["eu1"]).expelled)
    assert "t2" not in cluster.nodes["us1"].machine._core.membership.members  # type: ignore[union-attr]


def test_a_node_that_died_as_it_learned_of_its_expulsion_starts_over_when_it_starts() -> None:
    cluster = two_trainers(1)
    isolate(cluster, "t2")
    cluster.run(10_000)
    expel(cluster, "t2", "eu1")
    cluster.crash("t2")
    record = record_of(cluster.nodes["t2"])
    record.expelled = dict(record_of(cluster.nodes["eu1"]).expelled)
    record.save()
    cluster.restart("t2")
    assert any(note.name == "started_over" for note in cluster.nodes["t2"].notes)
    cluster.cut = set()
    at_rest(cluster)


@pytest.mark.parametrize("seed", seeds(1, 2))
def test_a_writer_is_retired_in_every_partition(seed: int) -> None:
    """The operator asks a node that holds one of two; each is settled among its holders."""
    model = ModelSpec("ctr", 8, {"item": TableSpec("item", 4)}, partitions=2)
    cluster = VirtualCluster(seed, model=model)
    for name, region, role, hold in (
        ("t1", "train", "train", (0, 1)),
        ("eu1", "eu", "serve", (0,)),
        ("eu2", "eu", "serve", (1,)),
        ("us1", "us", "serve", (0,)),
        ("us2", "us", "serve", (1,)),
        ("t2", "us", "train", (0, 1)),
    ):
        cluster.add(name, region, role, [] if name == "t1" else ["t1"], hold={"ctr": hold})
    formed(cluster)
    for name in ("t1", "t2"):
        assert cluster.run_until(lambda name=name: cluster.publish(name, "item", range(40), 1.0) != 0, 20_000)  # type: ignore[misc]
    cluster.run(5_000)
    assert check_converged(cluster) == ""
    cluster.crash("t2")
    cluster.run(10_000)
    expel(cluster, "t2", "us1")
    del cluster.nodes["t2"]

    def done() -> bool:
        for node in cluster.nodes.values():
            assert node.machine is not None
            core = node.machine._core
            held = [retired for retired in core.record.retired.values() if retired.keyspace in core.keyspaces]
            if len(held) != len(core.keyspaces) or any(retired.stage != m.DONE for retired in held):
                return False
        return True

    assert cluster.run_until(done, 60_000), "a partition is not done with the writer"
    cluster.run(5_000)
    assert check_converged(cluster) == ""
    assert cluster.publish("t1", "item", range(20), 2.0)
    cluster.run(2_000)
    assert check_converged(cluster) == ""


def test_a_model_may_get_more_shards_after_a_retirement() -> None:
    """The ledger outlives the memory: what it says of the old shards is of no use to the new ones."""
    tables = {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}
    cluster = VirtualCluster(1, model=ModelSpec("ctr", 8, tables))
    for name, role in (("t1", "train"), ("t2", "train"), ("eu1", "serve")):
        cluster.add(name, "eu", role, [] if name == "t1" else ["t1"])
    formed(cluster)
    for name in ("t1", "t2"):
        writes(cluster, name)
    cluster.run(2_000)
    writer, nonce = writer_at(cluster, "t2")
    cluster.crash("t2")
    cluster.run(15_000)
    expel(cluster, "t2", "t1")
    del cluster.nodes["t2"]
    retired_everywhere(cluster, writer, nonce)
    for name in ("t1", "eu1"):
        cluster.crash(name)
    cluster.model = ModelSpec("ctr", 64, tables)
    cluster.models = {"ctr": cluster.model}
    cluster.history.clear()
    for name in ("t1", "eu1"):
        cluster.nodes[name].model = cluster.model
        cluster.restart(name, keep_state=False)
    cluster.run(5_000)
    writes(cluster, "t1")
    at_rest(cluster)
    digests = {cluster.nodes[name].machine._core.retired_digest for name in cluster.nodes}  # type: ignore[union-attr]
    assert len(digests) == 1
    assert digests != {0}
