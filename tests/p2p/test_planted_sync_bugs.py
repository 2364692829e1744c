"""Each rule of the paper's protocol is switched off on purpose; the simulator must notice.

As `test_planted_bugs` for the product: whole clusters, faults, and every checker, under the presets that have no push.
"""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest

from p2p import messages as m
from p2p.arrivals import Arrivals
from p2p.core import Core
from p2p.link.links import Arrival
from p2p.paper import rounds, schedule, shard_versions
from p2p.paper.leaders import leaders_of
from p2p.paper.round_answers import RoundAnswers
from p2p.paper.rounds import Rounds
from p2p.paper.shard_versions import ShardVersions, settle
from p2p.paper.sync import LEADERS, SHARD_VERSIONS
from p2p.pulling import outbox, pull
from p2p.pulling.pull import Pull
from sim_cluster.checkers import check_converged, check_knowledge, contents
from sim_cluster.network import NetworkOptions
from sim_cluster.version_watch import VersionWatch
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import REGIONS, at_rest, chaos, form
from tests.p2p.plants import Plant, Scenario, expect_caught

SEEDS = 48  # the first that notices ends it; which one it is changes with every message more or less


by_versions = partial(chaos, sync=SHARD_VERSIONS)
by_leaders = partial(chaos, sync=LEADERS)


# --- scenarios --------------------------------------------------------------------------------------------------------------


def origin_dies_in_mid_answer(seed: int) -> None:
    """A reply breaks off with some of its rows applied, and nobody else has them: equal versions, different rows (R8)."""
    with mock.patch.object(outbox, "CHUNK_BYTES_MAX", 300):
        cluster = form(seed, sync=SHARD_VERSIONS)
        cluster.run(8_000)
        cluster.cut |= {("t1", name) for name in (*REGIONS["eu"][1:], *REGIONS["us"])}
        cluster.publish("t1", "item", range(600), 1.0)
        assert cluster.run_until(lambda: bool(contents(cluster.nodes["eu1"].store, "ctr")), 10_000, step_ms=1)
        cluster.crash("t1")
        replica = cluster.nodes["eu1"].store.models["ctr"]
        assert not replica.vector.any(), "the scenario did not leave strays"
        cluster.run(20_000)
        live = [contents(node.store, "ctr") for node in cluster.nodes.values() if node.machine is not None]
        assert all(one == live[0] for one in live), f"seed {seed}: nodes stay apart"


def equals_ask_each_other_at_the_same_moment(seed: int) -> None:
    """Two nodes with equal vectors and different versions exchange both in one instant; then there is nothing more to say."""

    def in_step(self: schedule.Schedule, now: m.Now) -> None:
        self._due_ms = (now.monotonic_ms // 1_000 + 1) * 1_000

    with mock.patch.object(schedule.Schedule, "start", in_step):
        cluster = VirtualCluster(seed, NetworkOptions(delay_ms_min=5, delay_ms_max=5), sync=SHARD_VERSIONS)
        cluster.add("t1", "train", "train")
        cluster.add("eu1", "eu", seeds=["t1"])
        cluster.publish("t1", "item", range(30), 1.0)
        at_rest(cluster)
        cluster.run(10_000)
        asked = shards_asked(cluster)
        assert asked, "they never differed"
        cluster.run(10_000)
        assert shards_asked(cluster) == asked, f"seed {seed}: equal nodes go on asking each other for vectors"


def shards_asked(cluster: VirtualCluster) -> int:
    return sum(node.machine.counters.shards_asked for node in cluster.nodes.values() if node.machine is not None)


def writing_goes_on_while_a_round_streams(seed: int) -> None:
    """Rows that are written after an answer's rows were selected are not claimed by it."""
    with mock.patch.object(outbox, "CHUNK_BYTES_MAX", 300):
        cluster = VirtualCluster(seed, sync=SHARD_VERSIONS)
        cluster.add("t1", "train", "train")
        reader = cluster.add("eu1", "eu", seeds=["t1"])
        cluster.run(4_000)
        cluster.publish("t1", "item", range(400), 1.0)
        for step in range(300):
            cluster.publish("t1", "user", [step], float(step))
            cluster.run(1)
            assert check_knowledge(cluster, reader) == "", f"seed {seed}, {cluster.now_ms} ms"
        at_rest(cluster)


def leaders_die(seed: int) -> None:
    """Two of three nodes of a region die for good, one after the other; the third gets what is written after that."""
    cluster = form(seed, sync=LEADERS)
    cluster.run(8_000)
    for step in range(60):
        if step in (20, 40):
            cluster.crash(f"us{step // 20 + seed % 2}")
        cluster.publish("t1", "item", range(step, step + 20), float(step))
        cluster.run(100)
    limit_ms = 40_000
    assert cluster.run_until(lambda: check_converged(cluster) == "", limit_ms), check_converged(cluster)


def versions_meet_after_a_split(seed: int) -> None:
    """Two regions get different halves of what is written, then meet: vectors that neither side had, so versions are minted."""
    cluster = form(seed, sync=SHARD_VERSIONS)
    cluster.add("t2", "ap", "train", ["t1"])
    cluster.run(8_000)
    watch = VersionWatch(cluster)
    sides = ({"t1", "eu1", "eu2"}, {"t2", "us1", "us2", "us3"})
    for step in range(40):
        if step == 10:
            cluster.cut |= {pair for one in sides[0] for other in sides[1] for pair in ((one, other), (other, one))}
        if step == 30:
            cluster.cut.clear()
        for name in ("t1", "t2"):
            cluster.publish(name, "item", range(step, step + 5), float(step))
        for _ in range(20):
            cluster.run(10)
            assert watch.check() == "", f"seed {seed}, {cluster.now_ms} ms: {watch.check()}"
    at_rest(cluster)


# --- plants -----------------------------------------------------------------------------------------------------------------


def a_version_is_adopted_though_the_vectors_differ(patch: pytest.MonkeyPatch) -> None:
    """Our merged vector has more than the peer's."""
    patch.setattr(shard_versions, "settle", lambda ours, theirs, _is_ours, is_theirs: (theirs, np.zeros(len(ours), np.bool_)))


def a_counter_starts_anew_under_the_old_id(patch: pytest.MonkeyPatch) -> None:
    """R9: the id is the node's, not that of its life."""
    original = Pull.__init__

    def init(self: Pull, core: Core) -> None:
        with mock.patch.object(core, "options", replace(core.options, boot=sum(core.options.node.encode()))):
            original(self, core)

    patch.setattr(Pull, "__init__", init)


def a_version_is_kept_across_a_merge(patch: pytest.MonkeyPatch) -> None:
    """A vector that neither side had gets no version of its own."""

    def settled(ours: Any, theirs: Any, is_ours: Any, is_theirs: Any) -> Any:
        return settle(ours, theirs, is_ours, is_theirs)[0], np.zeros(len(ours), np.bool_)

    patch.setattr(shard_versions, "settle", settled)


def a_write_mints_nothing(patch: pytest.MonkeyPatch) -> None:
    """A version goes on to stand for a vector that has grown."""

    def current(self: ShardVersions) -> Any:
        before, now = self._see()
        new = np.flatnonzero(self._versions == 0)
        if len(new):
            self._mint(new)
        before[...] = now
        return self._versions

    patch.setattr(ShardVersions, "current", current)


def the_vectors_are_merged_with_the_first_chunk(patch: pytest.MonkeyPatch) -> None:
    """T1: vectors and versions count although only a part of the rows is here."""
    original = outbox._of_round

    def of_round(stream: Any, number: int, _last: bool, *rest: Any) -> m.ShardsReply:
        return original(stream, number, True, *rest)

    patch.setattr(outbox, "_of_round", of_round)


def the_last_rows_are_left_out(patch: pytest.MonkeyPatch) -> None:
    """T1: vectors are merged before the last rows are applied, and a kill comes between."""
    original = Rounds.on_reply

    def on_reply(self: Any, link: Any, reply: Any, now: Any) -> None:
        original(self, link, replace(reply, columns=()) if reply.last else reply, now)

    patch.setattr(Rounds, "on_reply", on_reply)


def the_vectors_are_read_after_the_rows(patch: pytest.MonkeyPatch) -> None:
    """An answer carries the vectors of the moment its last chunk leaves, not those its rows were selected under."""
    original = outbox.next_chunk

    def chunk(stream: Any, keyspace: Any) -> Any:
        if stream.shards is not None:
            stream.writers = keyspace.knowledge.writers
            stream.vector = np.ascontiguousarray(keyspace.knowledge.vector[np.ix_(stream.shards, stream.writers)])
        return original(stream, keyspace)

    patch.setattr(outbox, "next_chunk", chunk)


def chunks_may_be_missing(patch: pytest.MonkeyPatch) -> None:
    """R3: a hole in the answer is not noticed."""
    original = Rounds.on_reply

    def on_reply(self: Any, link: Any, reply: Any, now: Any) -> None:
        found = self._rounds.get((reply.keyspace, link.node))
        if found is not None:
            found.next_chunk = reply.chunk
        original(self, link, reply, now)

    patch.setattr(Rounds, "on_reply", on_reply)
    patch.setattr(pull.Pull, "abandon_from", lambda *_args: None)
    patch.setattr(Arrivals, "take", lambda *_args: Arrival.NEXT)


def both_take_the_others_version(patch: pytest.MonkeyPatch) -> None:
    """Of two versions of equal vectors each side picks the other's, so that they swap them for ever."""

    def settled(ours: Any, theirs: Any, is_ours: Any, is_theirs: Any) -> Any:
        return np.where(is_theirs, theirs, ours), ~(is_ours | is_theirs)

    patch.setattr(shard_versions, "settle", settled)


def strays_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    """R8: equal versions are taken for equal rows."""
    patch.setattr(pull.Pull, "_why_pull", lambda *_args: "")


def what_was_settled_stays_settled(patch: pytest.MonkeyPatch) -> None:
    """A neighbour's list says a new version, and the shard is still taken for pulled."""
    original = rounds._Listed.take

    def take(self: Any, told: m.VersionList) -> None:
        settled = self.settled.copy()
        original(self, told)
        self.settled |= settled

    patch.setattr(rounds._Listed, "take", take)


def a_list_counts_before_it_came(patch: pytest.MonkeyPatch) -> None:
    """The neighbour tells only what changed since it was last asked, whether or not its answer arrived."""
    original = RoundAnswers.on_versions_wanted
    told: dict[Any, int] = {}

    def on_versions_wanted(self: Any, link: Any, wanted: m.VersionsWanted, now: m.Now) -> None:
        place = (id(self), link.boot, wanted.keyspace)
        original(self, link, replace(wanted, since=told.get(place, 0)), now)
        told[place] = self._versions.by_keyspace[wanted.keyspace].mark

    patch.setattr(RoundAnswers, "on_versions_wanted", on_versions_wanted)


def a_frontier_is_merged_with_some_shards(patch: pytest.MonkeyPatch) -> None:
    """A round that fetched some shards claims all that the neighbour had."""
    original = Rounds._finish

    def finish(self: Any, place: Any, keyspace: Any, now: m.Now) -> None:
        listed = self._lists[place]
        keyspace.knowledge.learn_frontier(listed.writers, listed.frontier)
        original(self, place, keyspace, now)

    patch.setattr(Rounds, "_finish", finish)


def a_new_list_counts_before_older_rows(patch: pytest.MonkeyPatch) -> None:
    """The answer to the next round's first question is compared while rows of this one are on their way, and then forgotten."""
    original = Rounds._go_on

    def go_on(self: Any, place: Any, ended: Any, ahead: m.VersionsWanted, now: m.Now) -> None:
        if ended.ahead_list is not None:
            listed = self._lists[place]
            listed.take(ended.ahead_list)
            listed.settled[:] = True
            ended.ahead_list = None
        original(self, place, ended, ahead, now)

    patch.setattr(Rounds, "_go_on", go_on)


def a_dead_leader_stays_leader(patch: pytest.MonkeyPatch) -> None:
    """Leaders are those of the largest view there ever was."""
    largest: list[str] = []

    def leaders(nodes: Any, shards: int) -> Any:
        if nodes[0].startswith("us"):
            largest[:] = sorted({*largest, *nodes})
            chosen = [largest[number] for number in leaders_of(largest, shards)]
            return np.array([nodes.index(node) if node in nodes else len(nodes) for node in chosen])
        return leaders_of(nodes, shards)

    patch.setattr(schedule, "leaders_of", leaders)


def a_region_pulls_from_its_leader_alone(patch: pytest.MonkeyPatch) -> None:
    """Nobody of a region pulls from other regions."""
    original = schedule.Schedule._pull_from_freshest

    def none(self: Any, *arguments: Any) -> None:
        if not self._core.options.sync.leaders:
            original(self, *arguments)

    patch.setattr(schedule.Schedule, "_pull_from_freshest", none)


SCENARIOS = [
    origin_dies_in_mid_answer,
    equals_ask_each_other_at_the_same_moment,
    writing_goes_on_while_a_round_streams,
    leaders_die,
    versions_meet_after_a_split,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__)
def test_the_scenarios_pass_as_they_are(scenario: Scenario) -> None:
    for seed in range(2):
        scenario(seed)


# Of the paper's configurations, which the ablation alone runs; their scenarios are always run.
@pytest.mark.long
@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (a_version_is_adopted_though_the_vectors_differ, versions_meet_after_a_split),
        (a_counter_starts_anew_under_the_old_id, by_versions),
        (a_version_is_kept_across_a_merge, versions_meet_after_a_split),
        (a_write_mints_nothing, by_versions),
        (the_vectors_are_merged_with_the_first_chunk, by_versions),
        (the_last_rows_are_left_out, by_leaders),
        (the_vectors_are_read_after_the_rows, writing_goes_on_while_a_round_streams),
        (chunks_may_be_missing, by_leaders),
        (both_take_the_others_version, equals_ask_each_other_at_the_same_moment),
        (strays_are_not_compared, origin_dies_in_mid_answer),
        (what_was_settled_stays_settled, by_versions),
        pytest.param(a_list_counts_before_it_came, by_leaders, marks=pytest.mark.long),
        (a_frontier_is_merged_with_some_shards, by_leaders),
        (a_new_list_counts_before_older_rows, by_leaders),
        (a_dead_leader_stays_leader, leaders_die),
        (a_region_pulls_from_its_leader_alone, by_leaders),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scenarios pass as they are: above, and in `test_sync`."""
    expect_caught(plant, scenario, monkeypatch, SEEDS)
