"""What a peer that is allowed in may tell of another must not last: the other's own word wins (decision 0026)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from p2p import messages as m
from p2p.members.introductions import LIFE_AHEAD_MS_MAX, OTHER_LIFE_MS, Introductions
from p2p.members.membership import Membership
from p2p.members.suspicion import AHEAD_MAX, DIRECT_MS
from sim_cluster.checkers import check_converged
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import at_rest
from tests.p2p.keyed import KeyedNode, record_of, with_node
from tests.p2p.plants import Plant
from tests.p2p.test_hostile import machine_of, receive
from tests.p2p.test_machine import synced

# More than anybody's fingers, so that many know of the victim by hearsay alone.
SERVING = 12
LIAR = "s1"
# A second life is called for a while before it is refuted; then a round of gossip, and who had suspected it calls it.
HEAL_MS = OTHER_LIFE_MS + 10_000

Lie = Callable[[m.MemberRecord], m.Message]


def formed() -> VirtualCluster:
    """A training node and serving ones in two regions."""
    cluster = VirtualCluster(1)
    cluster.add("t1", "eu", "train")
    for number in range(SERVING):
        cluster.add(f"s{number}", ("eu", "us")[number % 2], "serve", ["t1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    cluster.publish("t1", "item", range(10), 1.0)
    cluster.run(5_000)
    return cluster


def own_of(cluster: VirtualCluster, name: str) -> m.MemberRecord:
    return machine_of(cluster, name)._core.own_record()


def tell(cluster: VirtualCluster, victim: str, lie: Lie, to: tuple[str, ...] = ()) -> None:
    """The liar tells everybody, or these, at once; the victim too, if it comes to that."""
    message = lie(own_of(cluster, victim))
    for name in to or tuple(cluster.nodes):
        if name not in (LIAR, victim):
            receive(cluster, name, message, own_of(cluster, LIAR).boot)


def believers(cluster: VirtualCluster, victim: str) -> list[str]:
    """Who believes of the victim what it does not say itself, or takes it for dead."""
    own, wrong = own_of(cluster, victim), []
    for name in cluster.nodes:
        if name == victim:
            continue
        core = machine_of(cluster, name)._core
        known = core.membership.members.get(victim)
        told = None if known is None else replace(known.record, heartbeat=0, writers=_bound(known.record))
        if told != replace(own, heartbeat=0, writers=_bound(own)) or not core.membership.alive(victim, cluster.now_ms):
            wrong.append(name)
    return wrong


def _bound(record: m.MemberRecord) -> tuple[m.WriterRecord, ...]:
    return tuple(replace(writer, last_stamp=0) for writer in record.writers)


def news(**changes: object) -> Lie:
    return lambda own: m.MemberNews((replace(own, **changes),))  # type: ignore[arg-type]


def later(**changes: object) -> Lie:
    return lambda own: m.MemberNews((replace(own, version=own.version + 1, **changes),))  # type: ignore[arg-type]


def counter(by: int) -> Lie:
    def lie(own: m.MemberRecord) -> m.Message:
        counters = np.array([own.heartbeat + by], np.uint64)
        return m.Heartbeat(_liar, (), 0, 0, (), boots=np.array([own.boot], np.uint64), counters=counters)

    return lie


_liar = m.MemberRecord("", 0, 0, "", "", "", 0)


def a_second_life(boot_ms: int, **changes: object) -> Lie:
    return lambda own: m.MemberNews((replace(own, boot=77, boot_ms=own.boot_ms + boot_ms, **changes),))  # type: ignore[arg-type]


LIES = {
    "it has left": news(left=True),
    "it has left, later": later(left=True),
    "it is deaf": later(deaf=True),
    "it is elsewhere": later(region="mars"),
    "it holds another part": later(holds=(m.Holding(1, 2, (0,)),)),
    "it listens elsewhere": later(address="virtual://nowhere"),
    "it writes": later(writers=(m.WriterRecord(1, 5, 666, 4_101),)),
    "it has said much since": lambda own: news(version=own.version + AHEAD_MAX, region="mars")(own),
    "its life began later": later(boot_ms=1 << 47),
    "a later life": a_second_life(1_000, address="virtual://nowhere"),
    "a later life at its address": a_second_life(1_000),
    "a later life that has left": a_second_life(1_000, left=True),
    "a life in the far future": a_second_life(1 << 40),
    "many beats": lambda own: news(heartbeat=own.heartbeat + AHEAD_MAX)(own),
}


def heals(name: str, victim: str = "t1") -> None:
    cluster = formed()
    assert believers(cluster, victim) == []
    for _ in range(3):
        tell(cluster, victim, LIES[name])
        cluster.run(700)
    cluster.run(HEAL_MS)
    assert believers(cluster, victim) == [], name
    assert machine_of(cluster, victim) is not None
    cluster.publish("t1", "item", range(20), 2.0)
    at_rest(cluster)
    cluster.run(2_000)
    assert check_converged(cluster) == ""


# Records that say something else in one field are taken, and refuted, alike: one of them always runs.
ALIKE = {"it is deaf", "it holds another part", "it listens elsewhere", "it has left, later"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name in ALIKE else ()) for name in LIES])
def test_a_lie_does_not_last(name: str) -> None:
    heals(name)


@pytest.mark.parametrize("name", ["it has left", "a later life"])
def test_who_has_just_heard_it_does_not_believe_others(name: str) -> None:
    cluster = formed()
    suspicion = {other: machine_of(cluster, other)._core.membership for other in cluster.nodes if other not in ("t1", LIAR)}
    near = [
        other
        for other, register in suspicion.items()
        if register.suspicion.heard_directly(register.members["t1"].slot, cluster.now_ms)
    ]
    assert 0 < len(near) < len(suspicion)
    tell(cluster, "t1", LIES[name], tuple(near))
    assert believers(cluster, "t1") == []


def test_lies_that_climb_faster_than_they_are_refuted_do_not_last() -> None:
    """Each is believed by who believed the one before; the victim hears of the last one only."""
    cluster = formed()
    own = own_of(cluster, "s2")
    for step in (1, 2, 3):
        climbed = replace(own, version=own.version + step * AHEAD_MAX, region="mars")
        tell(cluster, "s2", lambda _own, climbed=climbed: m.MemberNews((climbed,)))  # type: ignore[misc]
    cluster.run(30_000)
    assert believers(cluster, "s2") == []


def told_first(changes: dict[str, object]) -> tuple[VirtualCluster, str]:
    """s3 has never heard of s2, and hears of it from the liar first; s2 speaks then."""
    cluster = formed()
    machine = machine_of(cluster, "s3")
    if (link := machine._core.links.get("s2")) is not None:
        machine._introductions.drop_link(link)
    machine._core.membership.forget("s2")
    own = own_of(cluster, "s2")
    receive(cluster, "s3", m.MemberNews((replace(own, **changes),)), own_of(cluster, LIAR).boot)  # type: ignore[arg-type]
    machine._core.effects = []
    assert machine._core.link("s2") is not None
    receive(cluster, "s3", m.MemberNews((own,)), own.boot)
    return cluster, machine._core.links["s2"].address


@pytest.mark.parametrize(
    "changes",
    [
        {"region": "mars"},
        {"role": "baseline"},
        {"address": "virtual://nowhere"},
        {"holds": (m.Holding(1, 2, (0,)),)},
        {"writers": (m.WriterRecord(1, 5, 666, 4_101),)},
        {"version": 3},
    ],
    ids=str,
)
def test_a_lie_that_was_told_before_the_truth_of_the_same_version_ends_with_it(changes: dict[str, object]) -> None:
    cluster, address = told_first(changes)
    assert address == "virtual://s2", "the link was opened to where the liar said"
    assert machine_of(cluster, "s3")._core.links["s2"].version == 2
    cluster.run(2_000)
    assert believers(cluster, "s2") == []
    assert own_of(cluster, "s2").version > own_of(cluster, "s4").version or "version" in changes, "others may believe it, too"


def test_where_a_life_listens_does_not_change_because_others_say_so() -> None:
    cluster = formed()
    tell(cluster, "t1", LIES["it listens elsewhere"])
    registers = [machine_of(cluster, name)._core.membership for name in cluster.nodes if name != "t1"]
    met = [register for register in registers if register.suspicion.ever_direct(register.members["t1"].slot)]
    assert met
    assert {register.members["t1"].record.address for register in met} == {"virtual://t1"}


def test_a_late_heartbeat_of_who_has_left_is_no_own_word() -> None:
    cluster = formed()
    before = own_of(cluster, "s2")
    cluster.leave("s2")
    cluster.run(1_000)
    core = machine_of(cluster, "s3")._core
    receive(cluster, "s3", m.MemberNews((replace(before, heartbeat=before.heartbeat + 1),)), before.boot)
    assert core.membership.members["s2"].record.left


def test_who_has_left_is_not_brought_back() -> None:
    cluster = formed()
    before = own_of(cluster, "s2")
    cluster.leave("s2")
    cluster.run(1_000)
    told = m.MemberNews((replace(before, heartbeat=before.heartbeat + 5),))
    for name in ("t1", "s3", "s4"):
        receive(cluster, name, told, own_of(cluster, LIAR).boot)
    cluster.run(DIRECT_MS)
    assert all("s2" in machine_of(cluster, name)._core.membership.left() for name in cluster.nodes if name != "s2")


@pytest.mark.parametrize("by", [AHEAD_MAX // 2, AHEAD_MAX + 5_000, (1 << 32) - 5_000])
def test_a_counter_that_was_never_reached_does_not_make_the_living_silent(by: int) -> None:
    cluster = formed()
    lie = counter(by)(own_of(cluster, "s2"))
    assert isinstance(lie, m.Heartbeat)
    for name in cluster.nodes:
        if name not in (LIAR, "s2"):
            receive(cluster, name, replace(lie, member=own_of(cluster, LIAR)), own_of(cluster, LIAR).boot)
    worst: list[str] = []
    for _ in range(40):
        cluster.run(500)
        worst += believers(cluster, "s2")
    assert worst == []


@pytest.mark.parametrize("beats", [AHEAD_MAX // 2, (1 << 32) - 1])
def test_a_counter_told_before_the_first_true_one_is_mended_by_a_call(beats: int) -> None:
    cluster = formed()
    register = machine_of(cluster, "s3")._core.membership
    slot = register.members["s2"].slot
    register.suspicion.beats[slot] = beats
    register.suspicion.version[slot] += 70_000 if beats > AHEAD_MAX else 0
    cluster.run(30_000)
    assert int(register.suspicion.beats[slot]) < beats + 100
    assert believers(cluster, "s2") == []


def test_a_writer_that_others_invent_is_not_bound() -> None:
    cluster = formed()
    own = own_of(cluster, "t1")
    (writer,) = own.writers
    told = m.WriterRecord(writer.keyspace, 4_000, 666, 1)
    tell(cluster, "t1", later(writers=(writer, told)), ("s2",))
    core = machine_of(cluster, "s2")._core
    assert told in core.membership.members["t1"].record.writers, "for a moment it is believed"
    assert core.writers.nonce_of(told.keyspace, told.writer) == 0
    cluster.run(HEAL_MS)
    assert believers(cluster, "t1") == []
    mine = replace(own_of(cluster, "s3"), writers=(told,), version=own_of(cluster, "s3").version + 1)
    receive(cluster, "s2", m.MemberNews((mine,)), mine.boot)
    assert core.writers.nonce_of(told.keyspace, told.writer) == 666, "what a node says of itself is written down"


def test_a_second_life_that_was_told_of_and_speaks_with_no_voice_ends_nobody() -> None:
    """With keys, only who has our key can say that it is we."""

    async def body(node: KeyedNode) -> None:
        own = node.machine._core.own_record()
        other = replace(own, boot=300, boot_ms=own.boot_ms + 5, address="tcp://10.9.9.9:1")
        node.come("evil", m.MemberNews((other,)))
        assert node.transport.sent[-1][0] == "tcp://10.9.9.9:1", "it is called"
        node.come("evil", m.Refusal("node id in use"), boot=300)
        assert not any(isinstance(effect, m.Fatal) for effect in node.effects)
        for _ in range(4):
            node.now_ms += OTHER_LIFE_MS // 4
            node.come("evil", m.MemberNews((other,)))
        assert node.machine._core.own_record().boot_ms == other.boot_ms + 1

    with_node(body)


def test_what_is_told_beyond_belief_is_not_written_down() -> None:
    async def body(node: KeyedNode) -> None:
        ahead = record_of("ghost", 200)
        node.come("evil", m.MemberNews((replace(ahead, boot_ms=node.clock().unix_ms + LIFE_AHEAD_MS_MAX + 5),)))
        assert "ghost" not in node.alive()
        stolen = replace(ahead, boot=101)
        node.come("evil", m.MemberNews((stolen,)))
        assert "ghost" not in node.alive(), "that is the life of t1"
        node.come("evil", m.MemberNews((ahead,)))
        assert "ghost" in node.alive()

    with_node(body)


# --- planted bugs


def nobody_refutes(patch: pytest.MonkeyPatch) -> None:
    """What is told of a node is left as it is."""
    patch.setattr(Membership, "refute", lambda *_args: False)


def no_life_is_outlived(patch: pytest.MonkeyPatch) -> None:
    """A later life of our own id is believed."""
    patch.setattr(Introductions, "_note_other_life", lambda *_args: None)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (nobody_refutes, "it is elsewhere"),
        (nobody_refutes, "it has left"),
        (no_life_is_outlived, "a later life"),
    ],
)
def test_the_simulator_catches(plant: Plant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        heals(name)
