"""A question that is lost is asked again soon; one that is not lost is answered once."""

from dataclasses import dataclass

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.core import Keyspace
from p2p.machine import Machine
from p2p.pulling import pull
from p2p.pulling.pull_answers import HELD_MS_MAX, PullAnswers
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

ROWS = 10


@dataclass(frozen=True)
class Repair:
    """What it took to close a gap."""

    took_ms: int
    rows: int  # that came in answers
    served: int
    abandoned: int


def machine_of(cluster: VirtualCluster, name: str) -> Machine:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine


def form(delay_ms: int, *names: str) -> VirtualCluster:
    """A trainer in a region of its own, and these in another; they have met, and a step is everywhere."""
    options = NetworkOptions(1, 1, region_delay_ms=delay_ms)
    cluster = VirtualCluster(1, options, ModelSpec("ctr", 16, {"item": TableSpec("item", 32)}))
    cluster.add("n0", "r0", "train")
    for name in names:
        cluster.add(name, "r1", "serve", ["n0"])
    cluster.run(8_000)
    assert cluster.publish("n0", "item", range(ROWS), 0.0)
    cluster.run(3_000)
    return cluster


def lose_a_step(cluster: VirtualCluster, *names: str) -> int:
    """The next step is lost on its way to these; the one after it, of other rows, is on its way. Returns its stamp."""
    cluster.cut = {("n0", name) for name in names}
    assert cluster.publish("n0", "item", range(ROWS), 1.0)
    cluster.run(1)
    cluster.cut = set()
    return cluster.publish("n0", "item", range(ROWS, 2 * ROWS), 2.0)


def repair(delay_ms: int, question_is_lost: bool) -> Repair:
    """A step is lost, and perhaps the question for it, too."""
    cluster = form(delay_ms, "n1")
    asker, answerer = machine_of(cluster, "n1").counters, machine_of(cluster, "n0").counters
    rows, served, asked = asker.pull_rows_received, answerer.pulls_served, asker.pulls_started
    stamp = lose_a_step(cluster, "n1")
    cluster.cut = {("n1", "n0")} if question_is_lost else set()
    assert cluster.run_until(lambda: asker.pulls_started > asked, 2_000, 1)
    begin_ms = cluster.now_ms
    cluster.run(5)
    cluster.cut = set()
    frontier = cluster.nodes["n1"].store.models["ctr"].frontier
    assert cluster.run_until(lambda: int(frontier.max()) >= stamp > 0, 10_000, 1)
    took_ms = cluster.now_ms - begin_ms
    cluster.run(2_000)
    return Repair(took_ms, asker.pull_rows_received - rows, answerer.pulls_served - served, asker.pulls_abandoned)


def test_a_lost_question_is_asked_again_soon() -> None:
    found = repair(delay_ms=20, question_is_lost=True)
    assert found.took_ms < pull.REPEAT_MS + 150
    assert (found.rows, found.served, found.abandoned) == (ROWS, 1, 0)


def test_without_repeats_it_would_take_as_long_as_an_answer_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull.Pull, "_repeat", lambda *_: None)
    assert repair(delay_ms=20, question_is_lost=True).took_ms >= pull.PULL_SILENCE_MS


def test_a_question_that_is_asked_again_is_answered_once() -> None:
    """Over a path that is so long that every question is asked twice."""
    found = repair(delay_ms=400, question_is_lost=False)
    assert found.took_ms < 1_000
    assert (found.rows, found.served, found.abandoned) == (ROWS, 1, 0)


def test_were_it_answered_anew_it_would_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PullAnswers.on_request

    def on_request(self: PullAnswers, *args: object, **options: object) -> None:
        self._begun.clear()
        original(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PullAnswers, "on_request", on_request)
    assert repair(delay_ms=400, question_is_lost=False).served > 1


def test_who_asks_again_waits_no_longer_than_who_does_not() -> None:
    """Of two with the same gap one asks the other, which cannot ask the trainer: after a second it is answered all the same."""
    cluster = form(20, "n1", "n2")
    lose_a_step(cluster, "n1", "n2")
    cluster.run(30)
    cluster.cut = {("n1", "n0"), ("n2", "n0")}
    waiting = [machine_of(cluster, name)._pull.answers for name in ("n1", "n2")]
    assert cluster.run_until(lambda: any(one.held for one in waiting), 1_000, 1)
    begin_ms = cluster.now_ms
    assert cluster.run_until(lambda: not any(one.held for one in waiting), 5_000, 1)
    assert HELD_MS_MAX - 100 <= cluster.now_ms - begin_ms <= HELD_MS_MAX + 100


def chunk(number: int, keyspace: Keyspace) -> m.PullReply:
    """The first of several of an answer without rows."""
    nothing = np.empty(0, np.uint16), np.empty((keyspace.knowledge.shards, 0), np.uint64), np.empty(0, np.uint64)
    return m.PullReply(keyspace.replica.keyspace, number, 0, False, (), *nothing)


def test_what_is_left_of_an_answer_behind_a_hole_ends_no_newer_question() -> None:
    """Over a long path the rest of an answer still comes behind the hole that ended it when the next question has left."""
    cluster = form(200, "n1")
    node, machine = cluster.nodes["n1"], machine_of(cluster, "n1")
    core, pulls = machine._core, machine._pull
    (keyspace,), link = core.keyspaces.values(), core.links["n0"]
    sequence = link._sequence_in

    def ask() -> int:
        core.effects = []
        pulls.ask(keyspace, link, cluster.now(), "test")
        return pulls._asked[keyspace.replica.keyspace].request

    def bring(number: int) -> None:
        nonlocal sequence
        sequence += 2  # the first time, one is missing
        envelope = m.Envelope(link.boot, link.own_boot, link.session_in, sequence, 0, link.version)
        cluster.feed(node, machine, m.MessageReceived(envelope, chunk(number, keyspace)))

    first = ask()
    bring(first)
    assert not pulls.asking, "it has a hole"
    second = ask()
    bring(first)
    assert pulls.asking, "it is the first one's"
    bring(second)
    assert not pulls.asking, "its answer has begun behind the hole"


def test_an_old_question_that_comes_late_ends_no_newer_answer() -> None:
    cluster = form(20, "n1")
    answers, core = machine_of(cluster, "n0")._pull.answers, machine_of(cluster, "n0")._core
    asker = machine_of(cluster, "n1")
    (keyspace,), link = asker._core.keyspaces.values(), core.links["n1"]
    older, newer = (asker._pull._question(keyspace, 1_000 + number) for number in (1, 2))
    served = core.counters.pulls_served
    for request in (newer, older):
        answers.on_request(link, request, cluster.now())
    assert core.counters.pulls_served == served + 1
    assert answers._outboxes["n1"].streams[request.keyspace].request == newer.request
