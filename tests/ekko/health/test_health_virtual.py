"""Judging in the virtual cluster: events at two nodes, verdicts on all, whatever the network loses and whoever is cut off."""

import random

import numpy as np
import pytest

from ekko.config.sections import HealthSection
from ekko.errors import ModelError
from ekko.generations import Generation
from ekko.health.service import Health
from ekko.health.summaries import Summaries
from ekko.health.traffic import BASELINE, ONLINE
from ekko.health.verdicts import State, Verdicts
from ekko.health.wire import Report, events_of
from p2p import messages as m
from p2p.replica import SchemaEntry
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import FAULTS, form

SECTION = HealthSection(window=1.0, lateness=0.5, level=0.001, horizon=3_600.0, precision=0.1, baseline_share=0.25)


class Judged:
    """The six nodes, each of which judges; two have scorers, one for each arm."""

    def __init__(self, seed: int, *, tells_again: bool = True) -> None:
        self.cluster = form(seed, FAULTS)
        self.cluster.run(3_000)
        self.rng = np.random.default_rng(seed)
        self.flipped = False
        self.tells_again = tells_again
        self.changes: dict[str, list[State]] = {name: [] for name in self.cluster.nodes}
        self.health = {name: self._health_of(node) for name, node in self.cluster.nodes.items()}

    def _health_of(self, node: VirtualNode) -> Health:
        def submit(entries: tuple[SchemaEntry, ...]) -> None:
            assert node.machine is not None
            self.cluster.feed(node, node.machine, m.SchemaChanged(entries))

        def peers() -> tuple[str, ...]:
            assert node.machine is not None
            return node.machine.peers_alive(self.cluster.now_of(node)) if self.tells_again else ()

        health = Health(
            node.name, SECTION, node.store, submit, lambda: 2, peers=peers, clock=lambda: self.cluster.now_of(node).unix_ms
        )
        health.on_state = lambda _, state: self.changes[node.name].append(state)
        return health

    def run(self, seconds: int) -> None:
        for _ in range(4 * seconds):
            for name, arm in (("eu1", ONLINE), ("us3", BASELINE)):
                truth = (self.rng.random(100) < 0.3).astype(np.float32)
                prediction = 1 / (1 + np.exp(1.0 - self.rng.normal(truth * 1.5)))
                label = 1 - truth if self.flipped and arm == ONLINE else truth
                at_ms = self.cluster.now_of(self.cluster.nodes[name]).unix_ms
                for events in events_of(prediction, label, None, None, arm, at_ms):
                    self.health[name].report(Report("ctr", events))
            self.cluster.run(250)
            for health in self.health.values():
                health.tick()

    def states(self) -> list[State]:
        return [next(one.state for one in health.pictures()) for health in self.health.values()]

    def run_until(self, state: State, seconds: int) -> None:
        for _ in range(seconds):
            self.run(1)
            if set(self.states()) == {state}:
                return
        raise AssertionError(f"seed {self.cluster.seed}: after {seconds} s: {self.states()}")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
def test_all_nodes_agree_under_loss_and_after_a_split(seed: int) -> None:
    judged = Judged(seed)
    cluster = judged.cluster
    judged.run_until("healthy", 60)
    names, side = list(cluster.nodes), {"eu1", "eu2", "t1"}
    # Scorers of one arm on each side: nobody can compare, and nobody is blamed.
    cluster.cut = {(a, b) for a in names for b in names if (a in side) != (b in side)}
    judged.run(5)
    flipped_ms = cluster.now_of(cluster.nodes["t1"]).unix_ms
    judged.flipped = True
    cluster.cut = set()
    judged.run_until("corrupted", 40)
    untils = {health.verdicts.healthy_until("ctr") for health in judged.health.values()}
    assert max(until or 0 for until in untils) <= flipped_ms + 1_000
    judged.flipped = False
    judged.run_until("healthy", 60)
    cluster.run(5_000)  # nobody judges any more: what was said last is with everybody
    assert len({health.verdicts.healthy_until("ctr") for health in judged.health.values()}) == 1
    for changes in judged.changes.values():
        assert [state for state in changes if state != "uncertain"] == ["healthy", "corrupted", "healthy"]
    log = [one for one in judged.health["t1"].verdicts.log("ctr") if one.state != "uncertain"]
    assert [one.state for one in log] == ["healthy", "corrupted", "healthy"], "six nodes found it, and one line says so"
    assert [one.stamp_ms for one in log] == sorted({one.stamp_ms for one in log}), "stamps are monotone"


@pytest.mark.parametrize("tells_again", [True, pytest.param(False, marks=pytest.mark.long)])
def test_what_happened_while_nodes_were_cut_off_is_judged_when_they_are_back(tells_again: bool) -> None:
    """Labels are flipped during the cut only, when no node sees both arms; without being told again nobody ever knows."""
    judged = Judged(3, tells_again=tells_again)
    cluster = judged.cluster
    judged.run_until("healthy", 60)
    names, side = list(cluster.nodes), {"eu1", "eu2", "t1"}
    cluster.cut = {(a, b) for a in names for b in names if (a in side) != (b in side)}
    judged.run(2)
    judged.flipped = True
    judged.run(5)
    judged.flipped = False
    judged.run(6)  # the last windows are told again anyway
    cluster.cut = set()
    judged.run(6)
    cluster.run(5_000)
    found = {tuple(health.verdicts.intervals("ctr")) for health in judged.health.values()}
    assert len(found) == 1, "all nodes end with the same verdicts"
    assert any(one.state == "corrupted" for one in next(iter(found))) == tells_again
    missed = [health.pictures()[0].missed for health in judged.health.values()]
    assert all(count == 0 if tells_again else count > 0 for count in missed), missed


def test_a_rollback_and_the_configuration_divide_requests() -> None:
    cluster: VirtualCluster = form(9)
    node = cluster.nodes["t1"]
    health = Health("t1", SECTION, node.store, lambda _: None, lambda: 2, clock=lambda: 10_000)
    health.tick()
    assert node.store.models["ctr"].traffic.baseline == 0.25
    health.serving = lambda model: 0.5 if model == Generation("ctr") else 1.0
    health.tick()
    assert node.store.models["ctr"].traffic.serving == pytest.approx(0.5)


def test_who_has_no_health_takes_no_reports_and_knows_what_others_found() -> None:
    cluster: VirtualCluster = form(9)
    node = cluster.nodes["t1"]
    health = Health("t1", None, node.store, lambda _: None, lambda: 2, clock=lambda: 10_000_000)
    (events,) = events_of([0.5], [1], None, "eu", ONLINE, 10_000_000)
    with pytest.raises(ModelError, match=r"add \[health\] to its configuration"):
        health.report(Report("ctr", events))
    node.store.facts.note(health.verdicts.note("ctr", "corrupted", 9_000_000, 9_900_000))
    seen: list[State] = []
    health.on_state = lambda _, state: seen.append(state)
    health.tick()
    health.tick()
    assert seen == ["corrupted"]
    (picture,) = health.pictures()
    assert picture.to_json()["state"] == "corrupted"
    health.overrule("ctr", "healthy", None, "a drill")
    assert health.verdicts.state("ctr", 9_500_000) == "healthy"
    for moment in (10_000_001, -1, 1 << 80):
        with pytest.raises(ModelError, match="expected Unix milliseconds up to now"):
            health.overrule("ctr", "corrupted", moment, "")
    with pytest.raises(ModelError, match="unknown model 'nothing'"):
        health.overrule("nothing", "healthy", None, "")


def test_a_node_whose_clock_is_ahead_neither_judges_nor_promises_a_healthy_future() -> None:
    node, now_ms = form(9).nodes["t1"], 10_000_000
    agrees = [True]
    health = Health("t1", SECTION, node.store, lambda _: None, lambda: 2, clock_agrees=lambda: agrees[0], clock=lambda: now_ms)
    node.store.facts.note(health.verdicts.note("ctr", "healthy", now_ms - 9_000, now_ms - 5_000))
    node.store.facts.note(health.verdicts.note("ctr", "healthy", now_ms + 3_600_000, now_ms + 3_700_000))
    (picture,) = health.pictures()
    assert (picture.healthy_until_ms, picture.judged_until_ms) == (now_ms - 5_000, now_ms - 5_000)
    (events,) = events_of([0.5] * 9, [1] * 9, None, "eu", ONLINE, now_ms - 70_000)
    for expected in (False, True):
        agrees[0] = expected
        health.report(Report("ctr", events))
        health.tick()
        assert bool(node.store.facts.of(Summaries).models()) == expected, "it tells of no windows by its own time"
    assert health._judges
    health.report(Report("ctr", events))
    node.store.drop_model("ctr", now_ms)
    health.tick()
    assert [*health._judges, *health._windows, *health._segments] == [], "of what is dropped nothing is kept"
    health._log_changes()
    assert not health._states


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 12))])
def test_detectors_that_disagree_on_one_moment_end_in_one_state_everywhere(seed: int) -> None:
    """Every node says something else of the same seconds, again and again, while messages are lost, repeated and cut off."""
    cluster = form(seed, FAULTS)
    cluster.run(2_000)
    rng, names = random.Random(seed), list(cluster.nodes)
    states: list[State] = ["healthy", "uncertain", "corrupted"]
    worst = dict.fromkeys(range(100, 160), 0)
    for number in range(40):
        if number in (10, 25):
            half = set(rng.sample(names, 3))
            cluster.cut = {(a, b) for a in names for b in names if (a in half) != (b in half)}
        if number in (20, 35):
            cluster.cut = set()
        node = cluster.nodes[rng.choice(names)]
        state, first = rng.choice(states), rng.randrange(100, 158)
        facts = node.store.facts
        said = facts.of(Verdicts).note(
            "ctr", state, first * 1_000, (first + 2) * 1_000, now_ms=number, node=node.name, detector="d", text=f"{number}"
        )
        for second in (first, first + 1):
            worst[second] = max(worst[second], states.index(state) + 1)
        told = facts.note(said)
        assert node.machine is not None
        cluster.feed(node, node.machine, m.SchemaChanged(told))
        if rng.random() < 0.3:  # as somebody says it again who has heard it
            cluster.feed(node, node.machine, m.SchemaChanged(tuple(facts.of(Verdicts).entries())))
        cluster.run(150)
    cluster.run(8_000)
    found = [node.store.facts.of(Verdicts) for node in cluster.nodes.values()]
    assert all(one == found[0] for one in found)
    for second, severity in worst.items():
        at = [one for one in found[0].intervals("ctr") if one.from_ms <= second * 1_000 < one.until_ms]
        assert [one.state for one in at] == ([states[severity - 1]] if severity else [])


def test_who_comes_and_goes_is_told_again_only_so_often() -> None:
    node, now_ms, there, told = form(9).nodes["t1"], [10_000_000], [("a",)], []
    submit = told.append
    health = Health("t1", SECTION, node.store, submit, lambda: 2, peers=lambda: there[0], clock=lambda: now_ms[0])
    (events,) = events_of([0.5] * 9, [1] * 9, None, None, ONLINE, now_ms[0] - 70_000)
    health.report(Report("ctr", events))
    health.tick()
    told.clear()
    for _ in range(120):  # 30 s, in which b flaps four times a second
        now_ms[0] += 250
        there[0] = ("a", "b") if there[0] == ("a",) else ("a",)
        health.tick()
    assert 5 <= len(told) <= 10
    there[0] = ("a", "b")
    now_ms[0] += 3_000
    health.tick()
    told.clear()
    for _ in range(40):
        now_ms[0] += 250
        health.tick()
    assert told == [], "nobody new"
