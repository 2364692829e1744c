"""What may go wrong where a busy origin hands children over and batches wait; each rule is switched off once on purpose."""

from collections import deque
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.link import links
from p2p.link.links import Link
from p2p.machine import Machine
from p2p.pulling import outbox, pull_answers
from p2p.pulling.outbox import Outbox
from p2p.pushing import adoption, waiting
from p2p.pushing.groups import LINGER_MS
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import nothing_goes_wrong
from tests.p2p.plants import Plant, Scenario, expect_caught
from tests.p2p.test_adoption import CALM, CARD, CREDIT, cluster_of_regions, late_ms


@pytest.fixture(autouse=True)
def small_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CREDIT_BYTES_MAX", CREDIT)
    monkeypatch.setattr(links, "ACK_BYTES", CREDIT // 8)


def machine_of(cluster: VirtualCluster, name: str) -> Machine:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine


def pulls(cluster: VirtualCluster) -> int:
    return sum(machine_of(cluster, name).counters.pulls_started for name in cluster.nodes)


def frontier_min(cluster: VirtualCluster) -> int:
    return min(int(node.store.models["ctr"].frontier.max()) for node in cluster.nodes.values())


def given_of(cluster: VirtualCluster) -> dict[str, str]:
    """Who was handed over, and to whom, in any tree."""
    given = machine_of(cluster, "n0")._push.adoption._given.values()
    return {node: one.to for tree in given for node, one in tree.items()}


def a_trainer_pauses(_seed: int) -> None:
    """It was busy, was silent for longer than adopters remember, and goes on: all of its steps arrive by push alone."""
    cluster = cluster_of_regions()
    late_ms(cluster)
    cluster.options = CALM
    cluster.run(2 * adoption.KEPT_MS)
    assert given_of(cluster), "the scenario did not leave a child with another"
    before = pulls(cluster)
    for step in range(4):
        stamp = cluster.publish("n0", "item", range(100), float(step))
        cluster.run(200)
        assert frontier_min(cluster) >= stamp > 0, "a child gets nothing from anybody"
    assert pulls(cluster) == before


def a_card_is_free_again(_seed: int) -> None:
    """It was busy, and is not any more: a step takes no detour."""
    cluster = cluster_of_regions()
    late_ms(cluster)
    cluster.options = CALM
    for _ in range(40):
        assert cluster.publish("n0", "item", range(16), 1.0)
        cluster.run(500)
    assert not given_of(cluster), "adoption does not end"


def a_burst_on_one_link(_seed: int) -> None:
    """More than the credit at once: what waits comes later, in order, and nobody has to pull."""
    cluster = VirtualCluster(1, CALM, ModelSpec("ctr", 16, {"item": TableSpec("item", 32)}))
    cluster.add("n0", "r0", "train")
    cluster.add("n1", "r1", "serve", ["n0"])
    cluster.run(6_000)
    assert cluster.publish("n0", "item", range(10), 0.0)
    cluster.run(1_000)
    cluster.options = NetworkOptions(1, 1, region_delay_ms=20, card_bytes_per_ms=200.0)
    before = pulls(cluster)
    stamp = 0
    for step in range(12):
        stamp = cluster.publish("n0", "item", range(80), float(step))
        cluster.run(LINGER_MS)
    assert machine_of(cluster, "n0")._core.links["n1"].waiting, "the scenario did not fill the link"
    assert cluster.run_until(lambda: frontier_min(cluster) >= stamp, 5_000)
    assert pulls(cluster) == before, "what waited came out of order"
    assert machine_of(cluster, "n0").counters.batches_skipped == 0


def two_have_the_same_gap(_seed: int) -> None:
    """Who is asked for what it lacks itself asks above, and then answers."""
    cluster = VirtualCluster(1, CALM, ModelSpec("ctr", 16, {"item": TableSpec("item", 32)}))
    cluster.add("n0", "r0", "train")
    for name in ("n1", "n2"):
        cluster.add(name, "r1", "serve", ["n0"])
    cluster.run(8_000)
    assert cluster.publish("n0", "item", range(10), 0.0)
    cluster.run(1_000)
    cluster.cut = {("n0", "n1"), ("n0", "n2")}
    assert cluster.publish("n0", "item", range(10), 1.0)
    cluster.run(1)
    cluster.cut = set()
    stamp = cluster.publish("n0", "item", range(10), 2.0)
    held = cluster.run_until(lambda: any(machine_of(cluster, name)._pull.answers.held for name in ("n1", "n2")), 1_000, 1)
    assert held, "the scenario let nobody wait"
    begin_ms = cluster.now_ms
    assert cluster.run_until(lambda: frontier_min(cluster) >= stamp > 0, 4_000, 1)
    assert cluster.now_ms - begin_ms < 200, "an asker was answered only when it had asked again"
    cluster.run(4_000)
    counters = [machine_of(cluster, name).counters for name in ("n1", "n2")]
    assert not any(one.pulls_abandoned for one in counters), "an asker was never answered"


def an_adopter_begins_anew(_seed: int) -> None:
    """Its process ends and comes back at once: the origin knows that the new one adopted nobody."""
    cluster = cluster_of_regions()
    late_ms(cluster)
    cluster.options = CALM
    adopter = next(iter(given_of(cluster).values()))
    before = machine_of(cluster, "n0")._core.links[adopter].boot
    cluster.crash(adopter)
    cluster.restart(adopter)
    trainer = machine_of(cluster, "n0")
    assert cluster.run_until(lambda: trainer._core.links[adopter].boot != before, 5_000, 10)
    assert adopter in given_of(cluster).values(), "the scenario gave it back before"
    assert cluster.publish("n0", "item", range(100), 1.0)
    given = [one for tree in trainer._push.adoption._given.values() for one in tree.values() if one.to == adopter]
    boots = {one.boot for one in given}
    assert boots <= {trainer._core.links[adopter].boot}, "children are with a life that is over"


@mock.patch.object(adoption, "SAME_MS", 8_000)  # instead of half a minute
def an_adopter_does_not_reach_its_child(_seed: int) -> None:
    """Nothing passes between those two while the card stays busy: another one adopts, and steps come by push again."""
    cluster = cluster_of_regions()
    late_ms(cluster)
    cluster.options = CARD
    for step in range(4):
        assert cluster.publish("n0", "item", range(160), float(step))
        cluster.run(100)
    child, first = next(iter(given_of(cluster).items()))
    cluster.cut = {(first, child), (child, first)}

    def goes_on() -> bool:
        assert cluster.publish("n0", "item", range(cluster.now_ms % 7, 160), 1.0)
        return given_of(cluster).get(child, first) != first

    assert cluster.run_until(goes_on, 20_000, 100), "the child stays with who does not reach it"
    second = given_of(cluster)[child]
    link = machine_of(cluster, second)._core.links[child]
    before, until_ms = link.traffic.rows_out, cluster.now_ms + 1_000
    assert cluster.run_until(lambda: not goes_on() or cluster.now_ms >= until_ms, 2_000, 100)
    assert link.traffic.rows_out >= before + 150, "who adopted the child sends it nothing"


@mock.patch.object(outbox, "CHUNK_BYTES_MAX", CREDIT // 4)
def an_answer_is_long_and_steps_go_on(_seed: int) -> None:
    """A node joins and pulls everything over a narrow card; small steps find credit all the time."""
    cluster = VirtualCluster(1, CALM, ModelSpec("ctr", 16, {"item": TableSpec("item", 32)}))
    cluster.add("n0", "r0", "train")
    cluster.run(2_000)
    for first in range(0, 3_000, 100):
        assert cluster.publish("n0", "item", range(first, first + 100), 1.0)
    cluster.options = NetworkOptions(1, 1, region_delay_ms=20, card_bytes_per_ms=100.0)
    cluster.add("n1", "r1", "serve", ["n0"])
    outboxes = machine_of(cluster, "n0")._pull.outboxes
    assert cluster.run_until(lambda: "n1" in outboxes and bool(outboxes["n1"].streams), 20_000, 10), "nobody pulled"
    link = machine_of(cluster, "n0")._core.links["n1"]
    steps = 0
    while "n1" in outboxes and outboxes["n1"].streams:
        assert cluster.publish("n0", "item", range(10), float(steps))
        assert not link.waiting, "a step waits behind an answer"
        cluster.run(50)
        steps += 1
    assert steps > 20, "the answer of the scenario was short"


def adopters_are_told_once(patch: pytest.MonkeyPatch) -> None:
    """0022: an adopter that has forgotten is not told again."""
    patch.setattr(adoption, "TELL_MS", 1 << 40)


def adoption_never_ends(patch: pytest.MonkeyPatch) -> None:
    """0022: what was handed over stays so."""
    patch.setattr(adoption, "ADOPTED_MS", 1 << 40)
    patch.setattr(adoption, "KEPT_MS", 1 << 41)


def the_last_to_wait_goes_first(patch: pytest.MonkeyPatch) -> None:
    """0022: waiting batches leave in the wrong order."""
    original = waiting.WaitingLine.take

    def take(self: Any) -> waiting.WaitingBatch:
        self.batches = deque(reversed(self.batches))
        one = original(self)
        self.batches = deque(reversed(self.batches))
        return one

    patch.setattr(waiting.WaitingLine, "take", take)


def who_waits_for_an_answer_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """0011: a question that was put aside stays there."""
    patch.setattr(pull_answers.PullAnswers, "on_progress", lambda *_: None)


def an_adopter_forwards_unasked(patch: pytest.MonkeyPatch) -> None:
    """0022: who gets a batch from its origin feeds others that were not handed over to it."""
    patch.setattr(adoption.Adoption, "taken", lambda *_: ("n1", "n2"))


def a_new_life_is_taken_for_the_old_one(patch: pytest.MonkeyPatch) -> None:
    """0022: that an adopter's process ended is not noticed."""
    patch.setattr(adoption.Adoption, "_boot_of", lambda self, node: next(_boots_given(self, node), None))


def _boots_given(given: adoption.Adoption, node: str) -> Any:
    return (one.boot for tree in given._given.values() for one in tree.values() if one.to == node)


def a_child_stays_with_its_adopter(patch: pytest.MonkeyPatch) -> None:
    """0022: while the card is busy, nobody else adopts."""

    def keep(_self: Any, _place: Any, given: Any, _children: Any, node: str, now_ms: int) -> None:
        given[node] = replace(given[node], until_ms=now_ms + adoption.RETURN_MS)

    patch.setattr(adoption.Adoption, "_keep", keep)


def answers_take_all_of_the_credit(patch: pytest.MonkeyPatch) -> None:
    """0022: no half of the credit is left for batches."""
    patch.setattr(Link, "has_credit_for_repairs", Link.has_credit)


CASES: list[tuple[Plant, Scenario]] = [
    (adopters_are_told_once, a_trainer_pauses),
    (adoption_never_ends, a_card_is_free_again),
    (the_last_to_wait_goes_first, a_burst_on_one_link),
    (who_waits_for_an_answer_is_forgotten, two_have_the_same_gap),
    (an_adopter_forwards_unasked, nothing_goes_wrong),
    (a_new_life_is_taken_for_the_old_one, an_adopter_begins_anew),
    (a_child_stays_with_its_adopter, an_adopter_does_not_reach_its_child),
    (answers_take_all_of_the_credit, an_answer_is_long_and_steps_go_on),
]


@pytest.mark.parametrize("scenario", [scenario for _, scenario in CASES if scenario is not nothing_goes_wrong])
def test_scenarios_pass(scenario: Scenario) -> None:
    scenario(0)


@pytest.mark.parametrize(("plant", "scenario"), CASES)
def test_planted_bug_is_caught(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, 2)


def test_beats_give_their_credit_back() -> None:
    link = Link("b", 2, "b:1", "eu", own_boot=1)
    link.next_envelope(0)
    assert link.on_ack(1, 1), "batches that wait for it would wait for ever"
    assert not link.on_ack(1, 1)


def test_a_full_link_brings_a_repair_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "CHUNK_BYTES_MAX", 1_000)
    cluster = cluster_of_regions()
    core = machine_of(cluster, "n0")._core
    link, box = core.links["n1"], Outbox()
    box.streams[0] = None  # type: ignore[assignment]  # never sent in this test
    link.next_envelope(CREDIT * 3 // 4)
    box.pump(core, link)
    assert not box.is_due(link)
    link.traffic.bytes_out += outbox.CHUNK_EVERY * 1_000
    assert box.is_due(link)
    link.next_envelope(CREDIT)
    assert not box.is_due(link), "there is no credit at all"


def test_leaves_adopt_nobody_and_nobody_adopts_for_itself() -> None:
    cluster = cluster_of_regions()
    machine = machine_of(cluster, "n1")
    link, place = machine._core.links["n0"], cluster.model.id
    part = machine._push.adoption
    part.on_adopt(link, m.Adopt(place, 0, ("n0", "n1", "n5", "n5")), cluster.now())
    assert part.taken(place, "n0", 0, cluster.now().monotonic_ms) == ("n5",)
    link.boot += 1
    assert part.taken(place, "n0", 0, cluster.now().monotonic_ms) == (), "its origin began a new life"
    object.__setattr__(machine._core.options, "role", "witness")
    part.on_adopt(link, m.Adopt(place, 0, ("n5",)), cluster.now())
    assert not part.entries


def test_a_liar_fills_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "ENTRIES_MAX", 3)
    cluster = cluster_of_regions()
    machine = machine_of(cluster, "n1")
    for node in ("n0", "n2", "n3", "n4", "n5"):
        link = machine._core.link(node)
        assert link is not None
        for tree in range(4):
            machine._push.adoption.on_adopt(link, m.Adopt(cluster.model.id, tree, ("nobody",)), cluster.now())
    assert machine._push.adoption.entries == 3
    machine._push.adoption.on_adopt(machine._core.links["n0"], m.Adopt(cluster.model.id, 0, ("nobody",)), cluster.now())
    for _ in range(3):
        stamp = cluster.publish("n0", "item", range(100), 1.0)
        cluster.run(300)
        assert frontier_min(cluster) >= stamp > 0


def test_batches_for_a_node_that_is_gone_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "ADOPTED_MAX", 0)
    cluster = cluster_of_regions()
    cluster.cut = {pair for node in cluster.nodes for pair in (("n1", node), (node, "n1"))}
    cluster.options = CARD
    for step in range(30):
        assert cluster.publish("n0", "item", range(160), float(step))
        cluster.run(LINGER_MS)
    link = machine_of(cluster, "n0")._core.links["n1"]
    assert link.waiting, "the scenario did not fill the link"
    cluster.run(15_000)
    assert not machine_of(cluster, "n0")._core.membership.alive("n1", cluster.now().monotonic_ms)
    assert not link.waiting
    assert link.waiting.bytes == 0
