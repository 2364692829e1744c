"""Suspicion and the register alone, and the scenarios that they exist for in virtual time."""

import random
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p import messages as m
from p2p.core import Keyspace
from p2p.machine import Machine
from p2p.members import gossip, membership, suspicion
from p2p.members.membership import Membership, fingers_of, place_of
from p2p.members.suspicion import FLAP_FORGET_MS, FLAP_HOLD_MS, HEARTBEAT_MS, SILENCE_INTERVALS, Suspicion
from p2p.members.trees import Holder
from p2p.pulling.pull import PULL_SILENCE_MS
from p2p.stamps import writer_of
from p2p.versions import first_record_version
from sim_cluster.checkers import contents
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, REGIONS, at_rest
from tests.p2p.test_machine import start

QUIET_MS = 20  # longer than a message is on its way
PATIENCE_MS = int(HEARTBEAT_MS * SILENCE_INTERVALS)  # of a member that beats as it should


def machine_of(cluster: VirtualCluster, name: str) -> Machine:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine


def register_of(cluster: VirtualCluster, name: str) -> Membership:
    return machine_of(cluster, name)._core.membership


def alive(cluster: VirtualCluster, name: str) -> set[str]:
    return {peer.node for peer in machine_of(cluster, name).status(cluster.now()).peers if peer.alive}


def holders(cluster: VirtualCluster, name: str) -> set[str]:
    return {holder.node for holder in register_of(cluster, name).holders(cluster.now_ms)}


def nobody_beats_soon(cluster: VirtualCluster, name: str) -> bool:
    """Whether no heartbeat of another node is on its way, nor will be for a moment: one tells of all who live."""
    waits = [machine_of(cluster, other)._gossip.beat_ms - cluster.now_ms for other in cluster.nodes if other != name]
    return min(waits) > QUIET_MS and max(waits) < HEARTBEAT_MS - QUIET_MS


def one(beats: int = 0) -> Suspicion:
    watch = Suspicion()
    assert watch.take(boot=7, version=0, beats=beats, prior_ms=HEARTBEAT_MS, now_ms=0) == 0
    return watch


def hear(watch: Suspicion, beats: int, now_ms: int) -> None:
    watch.hear(np.array([0]), np.array([beats], np.uint64), now_ms)


def suspected(watch: Suspicion, now_ms: int) -> bool:
    watch.assess(now_ms)
    return bool(watch.suspect[0])


# --- suspicion


@pytest.mark.parametrize(
    ("interval_ms", "patience_ms"),
    [(100, PATIENCE_MS), (500, PATIENCE_MS), (1_000, 2 * PATIENCE_MS), (3_000, 6 * PATIENCE_MS), (60_000, 12 * PATIENCE_MS)],
    ids=["never below a beat", "steady", "slower", "much slower", "never above the bound"],
)
def test_patience_follows_the_rhythm(interval_ms: int, patience_ms: int) -> None:
    watch = one()
    for beat in range(1, 400):
        hear(watch, beat, beat * interval_ms)
    assert watch.patience_ms()[0] == pytest.approx(patience_ms, rel=0.02)


def test_silence_is_suspected_in_time_and_a_beat_ends_it() -> None:
    watch = one()
    hear(watch, 1, 500)
    assert not suspected(watch, 500 + PATIENCE_MS - 50)
    assert suspected(watch, 500 + PATIENCE_MS + suspicion.ASSESS_MS)
    hear(watch, 1, 10_000)
    assert suspected(watch, 10_200), "hearsay of an old beat proves nothing"
    hear(watch, 2, 10_300)
    assert not suspected(watch, 10_400)
    assert watch.interval_ms[0] == pytest.approx(HEARTBEAT_MS), "the outage is not part of its rhythm"


def test_a_pause_of_our_own_is_nobodys_silence() -> None:
    watch = one()
    hear(watch, 1, 500)
    watch.excuse(60_000)
    assert not suspected(watch, 61_000)
    assert suspected(watch, 60_500 + 2 * PATIENCE_MS + 200), "twice as patient, not blind"


@pytest.mark.parametrize("bad_beats", [0, 1, 3, 50])
def test_bad_health_makes_patient_and_good_beats_restore(bad_beats: int) -> None:
    watch = one()
    for _ in range(bad_beats):
        watch.judge(good=False)
    assert watch.patience_ms()[0] == pytest.approx(PATIENCE_MS * (1 + min(bad_beats, suspicion.HEALTH_MAX)), rel=0.01)
    for _ in range(bad_beats):
        watch.judge(good=True)
    assert watch.health == 0


def test_who_flaps_is_held_out_longer_each_time_and_forgiven() -> None:
    watch = one()
    now_ms, held = 0, []
    for beat in range(1, 8):
        now_ms += 30_000
        assert suspected(watch, now_ms)
        hear(watch, beat, now_ms)
        assert watch.alive[0]
        held.append(max(0, int(watch.readmit_ms[0]) - now_ms))
    assert held == [0, 0, 5_000, 10_000, 20_000, 40_000, 80_000]
    now_ms += FLAP_FORGET_MS
    assert suspected(watch, now_ms)
    hear(watch, 100, now_ms)
    assert watch.in_trees(now_ms)[0]


def test_the_end_of_a_hold_changes_the_view() -> None:
    watch = one()
    watch.readmit_ms[0] = FLAP_HOLD_MS
    hear(watch, 1, FLAP_HOLD_MS - 1)
    watch.assess(FLAP_HOLD_MS - 1)
    watch.changed = False
    assert not watch.in_trees(FLAP_HOLD_MS - 1)[0]
    watch.assess(FLAP_HOLD_MS + suspicion.ASSESS_MS)
    assert watch.changed
    assert watch.in_trees(FLAP_HOLD_MS + suspicion.ASSESS_MS)[0]


def test_every_counter_gets_its_turn_and_the_dead_get_none() -> None:
    watch = Suspicion()
    for boot in range(1, 201):
        watch.take(boot, 0, 0, HEARTBEAT_MS, 0)
    watch.suspect[:50] = True
    told: list[int] = []
    for rotation in (5, 77, 301):
        told += watch.counters(50, rotation)[0].tolist()
    assert sorted(told) == list(range(51, 201))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40, unique=True), st.randoms())
def test_lives_are_found_whatever_was_forgotten(boots: list[int], rng: random.Random) -> None:
    watch = Suspicion()
    slots = {boot: watch.take(boot, 0, 0, HEARTBEAT_MS, 0) for boot in boots}
    for boot in rng.sample(boots, len(boots) // 2):
        watch.drop(slots.pop(boot))
    found = watch.slots_of(np.array(boots, np.uint64)).tolist()
    assert found == [slots.get(boot, -1) for boot in boots]


@pytest.mark.parametrize(
    ("clocks", "error_ms", "peers"),
    [([], 0, 0), ([0], 0, 1), ([40_000], -40_000, 1), ([0, 10, 90_000], -10, 3), ([-35_000, -35_000, 0], 35_000, 3)],
)
def test_our_clock_is_judged_by_the_median(clocks: list[int], error_ms: int, peers: int) -> None:
    watch = Suspicion()
    for boot, ahead_ms in enumerate(clocks):
        watch.note_clock(watch.take(boot + 1, 0, 0, HEARTBEAT_MS, 0), 1_000_000 + ahead_ms, 500)
    assert watch.clock_error_ms(1_000_000, 500) == (error_ms, peers)
    if peers:  # a step of our own shows without another word of theirs
        assert watch.clock_error_ms(1_000_000 + 7_000, 500)[0] == error_ms + 7_000
    assert watch.clock_error_ms(1_000_000, 500 + suspicion.CLOCK_LIFE_MS) == (0, 0)


# --- the register


def record(node: str, boot: int = 1, **changes: object) -> m.MemberRecord:
    values = {"region": "eu", "role": "serve", "address": f"virtual://{node}", "heartbeat": 1, "boot_ms": boot, **changes}
    return m.MemberRecord(node, boot, **values)  # type: ignore[arg-type]


def register(*records: m.MemberRecord) -> Membership:
    made = Membership(record("me", 999))
    for other in records:
        assert made.learn(other, 0)
    return made


@pytest.mark.parametrize(
    ("news", "changed", "kept_boot"),
    [
        (record("a", 5), False, 5),
        (record("a", 5, heartbeat=9), False, 5),
        (record("a", 5, version=1), True, 5),
        (record("a", 5, left=True), True, 5),
        (record("a", 6), True, 6),
        (record("a", 4, version=9, heartbeat=9), False, 5),
    ],
    ids=["repeat", "it lives", "it changed", "it left", "a new life", "a former life"],
)
def test_what_is_news(news: m.MemberRecord, changed: bool, kept_boot: int) -> None:
    ours = register(record("a", 5))
    ours.take_news(), ours.take_news()
    assert ours.learn(news, 100) is changed
    assert ours.members["a"].record.boot == kept_boot
    assert ours.members["a"].record.left is (changed and news.left)


def test_who_has_left_does_not_come_back_in_the_same_life() -> None:
    ours = register(record("a", 5))
    ours.learn(record("a", 5, left=True), 0)
    assert not ours.learn(record("a", 5, heartbeat=50, version=50), 0)
    ours.hear(np.array([5], np.uint64), np.array([99], np.uint64), 10)
    assert not ours.alive("a", 10)
    assert ours.learn(record("a", 6), 20)
    assert ours.alive("a", 20)


def test_a_farewell_is_taken_back_by_the_next_version() -> None:
    first = first_record_version(2)
    ours = register(record("a", 5, version=first, heartbeat=7))
    assert ours.learn(record("a", 5, version=first, left=True), 0)
    assert not ours.learn(record("a", 5, version=first, heartbeat=50), 0)
    assert ours.learn(record("a", 5, version=first + 1), 60_000)
    assert ours.alive("a", 60_000), "however long that took"
    assert not ours.learn(record("a", 5, version=first, left=True), 60_000)


def test_what_others_tell_has_bounds_and_what_a_node_tells_has_none() -> None:
    ours = register(record("a", 5, version=9, heartbeat=7))
    ours.hear(np.array([5], np.uint64), np.array([8], np.uint64), 10)
    far = record("a", 5, version=20 + suspicion.AHEAD_MAX, heartbeat=1 << 30)
    assert not ours.learn(far, 20)
    ours.hear(np.array([5], np.uint64), np.array([9 + suspicion.AHEAD_MAX], np.uint64), 20)
    assert int(ours.suspicion.beats[0]) == 8
    for own in (far, record("a", 5, version=11, heartbeat=9)):  # back again: the others had been told a lie
        ours.note_direct(own, 30)
        assert ours.learn(own, 30, direct=True)
        assert (int(ours.suspicion.version[0]), int(ours.suspicion.beats[0])) == (own.version, own.heartbeat)


def test_a_life_that_nobody_heard_yields_to_one_that_speaks() -> None:
    ours = register(record("a", 5))
    assert ours.learn(record("a", 6, address="virtual://elsewhere"), 0)
    assert ours.learn(record("a", 5), 10, direct=True)
    assert not ours.learn(record("a", 7, address="virtual://elsewhere"), 20), "a has just spoken"
    assert ours.learn(record("a", 7, address="virtual://elsewhere"), 10 + suspicion.DIRECT_MS)
    now_ms = 20 + suspicion.DIRECT_MS
    assert ours.learn(record("a", 7, left=True), now_ms, direct=True)
    assert ours.learn(record("a", 8, address="virtual://again"), now_ms), "who has left may begin anew elsewhere"
    ours.note_direct(record("a", 8), now_ms)
    assert not ours.learn(record("a", 5), 20 + suspicion.DIRECT_MS, direct=True), "that came late"


def record_of_some_version(node: str, boot: int, version: int, **changes: object) -> m.MemberRecord:
    """The last of a node's lives is one of protocol version 2."""
    return record(node, boot, version=version + first_record_version(1 + boot // 3), **changes)


RECORDS = st.builds(
    record_of_some_version,
    st.sampled_from("abcd"),
    st.integers(1, 3),
    version=st.integers(0, 3),
    heartbeat=st.integers(1, 3),
    left=st.booleans(),
)


@given(st.lists(RECORDS, max_size=12), st.randoms())
def test_registers_that_heard_the_same_are_equal(records: list[m.MemberRecord], rng: random.Random) -> None:
    """In any order, with repeats; a record says the same in one version (here: `left` is the larger)."""
    shuffled = [*records, *records]
    rng.shuffle(shuffled)
    first, second = Membership(record("me", 999)), Membership(record("me", 999))
    for number, told in enumerate(records):
        first.learn(told, number)
    for number, told in enumerate(shuffled):
        second.learn(told, number)
    seen = [{node: (x.record.boot, x.record.left) for node, x in r.members.items()} for r in (first, second)]
    assert seen[0] == seen[1]


@given(st.lists(st.lists(RECORDS, max_size=8), max_size=6))
def test_sifting_leaves_out_only_what_says_nothing_new(messages: list[list[m.MemberRecord]]) -> None:
    """A register that learns every record one by one ends where one does that takes repeats as signs of life."""
    first, second = Membership(record("me", 999)), Membership(record("me", 999))
    for number, records in enumerate(messages):
        for one in records:
            news = first.learn(one, number * 100)
            rest = second.sift((one,), number * 100)
            assert (second.learn(rest[0], number * 100) if rest else False) is news
    told = [{node: replace(one.record, heartbeat=0) for node, one in r.members.items()} for r in (first, second)]
    assert told[0] == told[1]
    for name in ("boot", "version", "beats", "heard_ms", "gone", "news"):
        assert np.array_equal(getattr(first.suspicion, name), getattr(second.suspicion, name)), name


@given(st.sets(st.integers(1, 30)), st.sets(st.integers(1, 30)))
def test_an_exchange_of_indexes_makes_registers_equal(mine: set[int], theirs: set[int]) -> None:
    ours = register(*(record(f"n{boot}", boot) for boot in sorted(mine)))
    other = Membership(record("other", 998))
    for boot in sorted(theirs):
        other.learn(record(f"n{boot}", boot, version=boot % 2), 0)
    ours.learn(other.own, 0), other.learn(ours.own, 0)
    equal = ours.digest(0) == other.digest(0)
    assert equal == ({(b, 0) for b in mine} == {(b, b % 2) for b in theirs})
    sent, ahead = other.missing_in(*ours.index(0), 0)
    for told in sent:
        ours.learn(told, 0)
    if ahead:
        back, _ = ours.missing_in(*other.index(0), 0)
        for told in back:
            other.learn(told, 0)
    assert ours.digest(0) == other.digest(0)


def test_what_a_hello_leaves_out_is_found_by_an_exchange_of_indexes() -> None:
    whole = record_of_some_version("a", 5, 0, holds=(m.Holding(7, 2, (1,)),))
    short = replace(whole, holds=(), told=1, heartbeat=9)  # the same version
    ours, other = (Membership(record_of_some_version(name, 996, 0)) for name in ("me", "other"))
    assert ours.learn(short, 0)
    other.learn(whole, 0), other.learn(ours.own, 0), ours.learn(other.own, 0)
    assert ours.protocol_min(0) == 2, "what it speaks is known by its hello, too"
    assert ours.digest(0) != other.digest(0)
    sent, _ = other.missing_in(*ours.index(0), 0)
    assert sent == (whole,)
    assert ours.missing_in(*other.index(0), 0) == ((), True)
    assert ours.sift(sent, 0, m.RecordColumns.of(sent)) == [whole]
    assert ours.learn(whole, 0)
    assert not ours.learn(short, 0)
    assert ours.members["a"].record.holds == whole.holds
    assert ours.digest(0) == other.digest(0)


def test_a_late_hello_takes_nothing_back() -> None:
    writers = (m.WriterRecord(7, 3, 1, 5),)
    whole = record_of_some_version("a", 5, 0, holds=(m.Holding(7, 2, (1,)),), writers=writers)
    ours = register(whole)
    assert not ours.learn(replace(whole, holds=(), told=1, heartbeat=9), 0)
    assert ours.members["a"].record.holds == whole.holds


def test_news_rides_a_few_times_and_then_rests() -> None:
    ours = register(record("a"), record("b"))
    assert ours.news
    assert [len(ours.take_news()) for _ in range(membership.NEWS_TELLS + 1)] == [2] * membership.NEWS_TELLS + [0]
    assert ours.quiet
    assert not ours.news


@pytest.mark.parametrize("count", [1, 2, 3, 6, 100, 1_000])
def test_fingers_are_few_and_everybody_is_as_often_one(count: int) -> None:
    places = sorted((place_of(f"n{number}"), f"n{number}") for number in range(count))
    chosen: dict[str, list[str]] = {}
    for here, node in places:
        others = [place for place in places if place[1] != node]
        behind = fingers_of(here, np.array([place for place, _ in others], np.uint64))
        chosen[node] = [others[index][1] for index in behind.tolist()]
    degree = (count - 1).bit_length()
    assert all(len(fingers) == len(set(fingers)) == degree and node not in fingers for node, fingers in chosen.items())
    pointed = [finger for fingers in chosen.values() for finger in fingers]
    assert all(pointed.count(node) == degree for _, node in places)
    reached = {places[0][1]}
    for _ in range(degree):
        reached |= {finger for node in reached for finger in chosen[node]}
    assert len(reached) == count, "log2(n) steps reach everybody"


def test_the_deaf_and_the_suspected_are_out_of_the_trees() -> None:
    ours = register(record("a", 1), record("b", 2), record("c", 3), record("w", 4, role="witness"))
    ours.learn(record("b", 2, version=1, deaf=True), 0)
    assert ours.holders(0) == (Holder("eu", "a"), Holder("eu", "c"), Holder("eu", "me"))
    assert ours.alive("b", 0), "it lives all the same"
    ours.hear(np.array([1], np.uint64), np.array([2], np.uint64), PATIENCE_MS)
    assert ours.holders(PATIENCE_MS + 1_000) == (Holder("eu", "a"), Holder("eu", "me"))
    assert ours.suspects() == ["b", "c", "w"]


# --- scenarios


def test_one_way_cut_leaves_everybody_alive_and_converges() -> None:
    """A hears B, B does not hear A: the counter takes another way, and rows are pulled from others."""
    cluster = start(2)
    cluster.cut.add(("us1", "us2"))
    cluster.cut.add(("t1", "us3"))
    for step in range(60):
        cluster.publish("t1", "item", [step], float(step))
        cluster.run(500)
        for name in cluster.nodes:
            assert alive(cluster, name) == set(cluster.nodes) - {name}
    at_rest(cluster, 20_000)


def test_who_does_not_hear_our_question_is_not_asked_twice_in_a_row() -> None:
    """us1 has a gap below us2, which sends to it and does not hear it: when that is silent, the origin is asked."""
    cluster = start(2)
    assert cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    cluster.cut.add(("us2", "us1"))
    assert cluster.publish("t1", "item", [2], 2.0)
    cluster.run(20)
    cluster.cut = {("us1", "us2")}
    newest = cluster.publish("t1", "item", [3], 3.0)
    cluster.run(500)
    (keyspace,) = machine_of(cluster, "us1")._core.keyspaces.values()
    assert machine_of(cluster, "us1")._pull.asking == {keyspace.replica.keyspace: "us2"}, "the scenario proves nothing"
    whole = cluster.run_until(lambda: int(keyspace.knowledge.frontier[writer_of(newest)]) >= newest, PULL_SILENCE_MS)
    assert whole, "it is asked again and again"


def test_a_node_that_hears_nobody_accuses_nobody_and_is_routed_around() -> None:
    cluster = start(3)
    cluster.run(3_000)
    cluster.cut |= {(name, "us1") for name in cluster.nodes}
    cluster.run(2 * PATIENCE_MS)
    assert alive(cluster, "us1") == set(cluster.nodes) - {"us1"}, "it may be itself"
    for name in set(cluster.nodes) - {"us1"}:
        assert "us1" in alive(cluster, name), "its heartbeats come"
        assert "us1" not in holders(cluster, name), "but nothing may be sent through it"
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(60)
    for name in ("us2", "us3"):
        assert int(cluster.nodes[name].store.models["ctr"].frontier[0]), "by push"
    cluster.cut.clear()
    cluster.run(2_000)
    assert all("us1" in holders(cluster, name) for name in cluster.nodes)
    at_rest(cluster)


def test_a_paused_node_accuses_nobody_when_it_goes_on() -> None:
    cluster = start(4)
    cluster.run(5_000)
    cluster.pause("eu1")
    cluster.cut |= {(name, "eu1") for name in cluster.nodes}  # its buffers are full: nothing waits for it
    cluster.run(20_000)
    assert cluster.run_until(lambda: nobody_beats_soon(cluster, "eu1"), 1_000, 1), "the scenario proves nothing"
    cluster.cut.clear()
    assert all("eu1" not in alive(cluster, name) for name in set(cluster.nodes) - {"eu1"})
    cluster.resume("eu1")
    for step_ms in (1, *[2] * 300):  # first before anybody could have answered
        cluster.run(step_ms)
        assert alive(cluster, "eu1") == set(cluster.nodes) - {"eu1"}
    assert all("eu1" in alive(cluster, name) for name in set(cluster.nodes) - {"eu1"})


def test_a_split_is_noticed_and_heals() -> None:
    cluster = start(5)
    cluster.run(5_000)
    east, west = ["t1", "eu1", "eu2"], list(REGIONS["us"])
    cut = {(a, b) for a in east for b in west}
    cluster.cut |= cut | {(b, a) for a, b in cut}
    cluster.run(15_000)
    assert alive(cluster, "us1") == {"us2", "us3"}
    assert alive(cluster, "t1") == {"eu1", "eu2"}
    cluster.publish("t1", "item", [1], 1.0)
    cluster.cut.clear()
    cluster.run(2_500)
    assert all(alive(cluster, name) == set(cluster.nodes) - {name} for name in cluster.nodes)
    at_rest(cluster, 10_000)


def test_a_flapping_node_is_held_out_of_the_trees_and_still_catches_up() -> None:
    cluster = start(6)
    for _ in range(5):
        cluster.crash("us1")
        cluster.run(2_000)
        cluster.restart("us1")
        cluster.run(3_000)
    others = set(cluster.nodes) - {"us1"}
    assert all("us1" in alive(cluster, name) for name in others)
    assert all("us1" not in holders(cluster, name) for name in others)
    cluster.publish("t1", "item", [1], 1.0)
    at_rest(cluster, 10_000)
    cluster.run(60_000)
    assert all("us1" in holders(cluster, name) for name in others)


def test_who_wrote_in_the_future_says_so_until_its_clock_is_there() -> None:
    """R14: its stamps go on from the last one, and all peers would refuse them although its clock is right again."""
    cluster = VirtualCluster(3)
    cluster.add("t1", "home", "train")
    cluster.run(1_000)
    cluster.shift_clock("t1", 100_000)
    assert cluster.publish("t1", "item", [1], 1.0)
    cluster.shift_clock("t1", -100_000)
    cluster.add("eu1", "eu", "serve", ["t1"])
    cluster.run(3_000)
    assert not cluster.publish("t1", "item", [2], 2.0)
    refused = cluster.nodes["t1"].replies[max(cluster.nodes["t1"].replies)]
    assert isinstance(refused, m.Refused)
    assert re.search(r"last stamp is 9\d\.\d s ahead of its clock, .* later than 60 s ahead: publish when", refused.reason), (
        refused.reason
    )
    cluster.run(45_000)
    assert cluster.publish("t1", "item", [2], 2.0)
    cluster.run(5_000)
    assert len(contents(cluster.nodes["eu1"].store, "ctr")) == 2


@pytest.mark.parametrize("by_ms", [-31_000, 31_000])
def test_a_node_whose_clock_is_off_refuses_to_publish_and_says_so(by_ms: int) -> None:
    cluster = start(7)
    cluster.run(2_000)
    assert cluster.publish("t1", "item", [1], 1.0)
    cluster.shift_clock("t1", by_ms)
    assert cluster.publish("t1", "item", [2], 1.0) == 0, "a step shows at once"
    number = max(cluster.nodes["t1"].replies)
    reason = cluster.nodes["t1"].replies[number]
    assert isinstance(reason, m.Refused)
    assert "clock is 31.0 s " + ("ahead" if by_ms > 0 else "behind") in reason.reason
    cluster.run(1_000)
    assert any(note.name == "clock_off" and note.alarm for note in cluster.nodes["t1"].notes)
    cluster.shift_clock("t1", -by_ms)
    assert cluster.publish("t1", "item", [2], 1.0)
    assert gossip.CLOCK_ERROR_MS_MAX == 30_000
    at_rest(cluster)


def test_one_wrong_clock_among_the_others_stops_nobody() -> None:
    cluster = start(8)
    cluster.shift_clock("us1", 50_000)
    cluster.run(5_000)
    assert cluster.publish("t1", "item", [1], 1.0)


def test_links_are_opened_by_need_and_are_few() -> None:
    cluster = VirtualCluster(1, CALM)
    for number in range(60):
        cluster.add(f"n{number}", f"r{number % 3}", "serve" if number else "train", ["n0"] if number else [])
    assert cluster.run_until(lambda: all(len(alive(cluster, name)) == 59 for name in cluster.nodes), 5_000)
    cluster.run(20_000)
    links = [len(machine_of(cluster, name)._core.links) for name in cluster.nodes if name != "n0"]
    # Fingers of both rings in both directions, the seed, and a few that were fingers while the view was forming.
    assert max(links) <= 2 * (6 + 5) + 8
    cluster.publish("n0", "item", [1], 1.0)
    cluster.run(60)
    assert all(int(node.store.models["ctr"].frontier[0]) for node in cluster.nodes.values()), "by push alone"


@pytest.mark.parametrize(("loss", "limit_ms"), [(0.0, 10_000), (0.5, 15_000)])
def test_the_dead_are_noticed_and_the_living_left_alone(loss: float, limit_ms: int) -> None:
    cluster = VirtualCluster(9, NetworkOptions(1, 5, 40))
    for number in range(40):
        cluster.add(f"n{number}", f"r{number % 4}", "serve" if number else "train", ["n0"] if number else [])
    assert cluster.run_until(lambda: all(len(alive(cluster, name)) == 39 for name in cluster.nodes), 5_000)
    cluster.options = NetworkOptions(1, 5, 40, loss_probability=loss)
    for _ in range(10):
        cluster.run(1_000)
        assert all(len(alive(cluster, name)) == 39 for name in cluster.nodes)
    cluster.crash("n5")
    others = [name for name in cluster.nodes if name != "n5"]
    assert cluster.run_until(lambda: not any("n5" in alive(cluster, name) for name in others), limit_ms)
    assert all(len(alive(cluster, name)) == 38 for name in others)


# Who left a question unanswered is forgotten.
nobody_silent = property(lambda _keyspace: "", lambda _keyspace, _node: None)


def healthy(_watch: Suspicion, _late_ms: int) -> None:
    """Lifeguard switched off."""


@pytest.mark.parametrize(
    ("owner", "name", "broken", "scenario"),
    [
        (Suspicion, "excuse", healthy, test_a_paused_node_accuses_nobody_when_it_goes_on),
        (Suspicion, "judge", lambda *_args, **_kwargs: None, test_a_node_that_hears_nobody_accuses_nobody_and_is_routed_around),
        (Suspicion, "_note_returns", lambda *_args: None, test_a_flapping_node_is_held_out_of_the_trees_and_still_catches_up),
        (Membership, "suspects", lambda _self: [], test_a_split_is_noticed_and_heals),
        (Keyspace, "gap_silent", nobody_silent, test_who_does_not_hear_our_question_is_not_asked_twice_in_a_row),
    ],
    ids=["late timers", "hears nobody", "flapping", "calling suspects", "silent senders"],
)
def test_a_rule_switched_off_is_noticed(
    owner: type, name: str, broken: object, scenario: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        scenario()


def test_a_record_that_changes_no_tree_leaves_the_trees() -> None:
    register = Membership(record("me"))
    for number in range(20):
        register.learn(record(f"n{number}", boot=number + 2), 0)
    trees, digest = register.trees(0), register.digest(0)
    told = replace(record("n3", boot=5), version=register.members["n3"].record.version + 1)
    assert register.learn(replace(told, writers=(m.WriterRecord(5, 9, 3, 0),)), 0)
    assert register.trees(0) is trees
    assert register.digest(0) != digest
    assert register.learn(replace(told, version=told.version + 1, deaf=True), 0)
    assert register.trees(0) is not trees
    assert Holder(told.region, "n3") not in register.holders(0)
