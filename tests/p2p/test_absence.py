"""Who is away for long is let go of, and only by those who can tell that it is not they who are away (R13, R14)."""

from collections.abc import Callable

import pytest

from p2p.identity import absence
from p2p.identity.absence import Absence
from p2p.members import membership
from sim_cluster.checkers import contents
from sim_cluster.virtual import VirtualCluster
from tests.p2p.plants import Plant
from tests.p2p.retirement_chaos import isolate
from tests.p2p.test_machine import synced
from tests.p2p.writer_chaos import record_of

# In the order that they have by default: who hears nobody suspects them within 20 s, then forgets, then would let go of them.
FORGET_MS = 25_000
EXPEL_MS = 45_000
ROWS = 20
NODES = (
    ("t1", "train", "train"),
    ("eu1", "eu", "serve"),
    ("eu2", "eu", "serve"),
    ("us1", "us", "serve"),
    ("us2", "us", "serve"),
)


@pytest.fixture(autouse=True)
def forgotten_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "FORGET_MS", FORGET_MS)


def formed(count: int = 5, expel_ms: int = EXPEL_MS) -> VirtualCluster:
    """So many nodes that hold the same rows."""
    cluster = VirtualCluster(1)
    cluster.expel_after_ms = expel_ms
    for name, region, role in NODES[:count]:
        cluster.add(name, region, role, ["eu1"] if name == "t1" else ["t1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    cluster.publish("t1", "item", range(ROWS), 1.0)
    cluster.run(2_000)
    assert set(held(cluster).values()) == {ROWS}
    return cluster


def held(cluster: VirtualCluster) -> dict[str, int]:
    return {name: len(contents(node.store, "ctr")) for name, node in cluster.nodes.items()}


def started_over(cluster: VirtualCluster) -> list[str]:
    return [name for name, node in cluster.nodes.items() if any(note.name == "started_over" for note in node.notes)]


def expelled_at(cluster: VirtualCluster, name: str) -> list[str]:
    return sorted(expulsion.node for expulsion in record_of(cluster.nodes[name]).expelled.values())


def split(cluster: VirtualCluster, side: tuple[str, ...]) -> None:
    others = [name for name in cluster.nodes if name not in side]
    cluster.cut |= {(one, other) for one in side for other in others} | {(other, one) for one in side for other in others}


def an_isolated_node_lets_go_of_nobody() -> None:
    cluster = formed()
    isolate(cluster, "us2")
    cluster.run(EXPEL_MS + 25_000)
    assert expelled_at(cluster, "us2") == []
    assert expelled_at(cluster, "t1") == ["us2"], "the others, who are most, do"
    cluster.cut.clear()
    cluster.run(15_000)
    assert started_over(cluster) == ["us2"]
    assert set(held(cluster).values()) == {ROWS}


def a_node_that_was_switched_off_for_long_lets_go_of_nobody() -> None:
    """Its network fails, it is switched off, repaired, and switched on again without memory after a long time."""
    cluster = formed()
    isolate(cluster, "us2")
    cluster.run(FORGET_MS + 5_000)
    cluster.crash("us2")
    cluster.run(EXPEL_MS + 5_000)
    cluster.cut.clear()
    cluster.restart("us2", keep_state=False)
    cluster.run(15_000)
    assert set(held(cluster).values()) == {ROWS}
    assert not set(started_over(cluster)) - {"us2"}


def who_left_in_order_may_stay_away() -> None:
    """A cluster is stopped over a weekend, and the node that was stopped last comes back first, without its memory."""
    cluster = formed()
    for name in ("us2", "us1", "eu2", "eu1", "t1"):
        cluster.leave(name)
        cluster.run(1_500)
    cluster.run(EXPEL_MS)
    cluster.restart("t1", keep_state=False)
    cluster.restart("eu1")
    cluster.restart("eu2")
    cluster.run(EXPEL_MS + 5_000)
    assert expelled_at(cluster, "eu1") == []
    for name in ("us1", "us2"):
        cluster.restart(name)
    cluster.run(15_000)
    assert started_over(cluster) == []
    assert set(held(cluster).values()) == {ROWS}


def neither_half_of_a_cluster_lets_go_of_the_other() -> None:
    cluster = formed(4)
    split(cluster, ("t1", "eu1"))
    cluster.run(EXPEL_MS + 25_000)
    assert {name: expelled_at(cluster, name) for name in cluster.nodes} == {name: [] for name in cluster.nodes}


def a_coordinator_that_lost_sight_begins_to_count_anew() -> None:
    cluster = formed()
    cluster.crash("us2")
    cluster.run(EXPEL_MS - 5_000)
    isolate(cluster, "eu1")
    isolate(cluster, "eu2")  # who would be next
    isolate(cluster, "t1")
    cluster.run(22_000)
    cluster.cut.clear()
    cluster.run(EXPEL_MS // 2)
    assert expelled_at(cluster, "eu1") == []
    cluster.run(EXPEL_MS)
    assert expelled_at(cluster, "eu1") == ["us2"]


SCENARIOS: tuple[Callable[[], None], ...] = (
    an_isolated_node_lets_go_of_nobody,
    a_node_that_was_switched_off_for_long_lets_go_of_nobody,
    who_left_in_order_may_stay_away,
    neither_half_of_a_cluster_lets_go_of_the_other,
    a_coordinator_that_lost_sight_begins_to_count_anew,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Callable[[], None]) -> None:
    scenario()


def test_either_of_two_nodes_waits_for_the_other_for_ever() -> None:
    cluster = formed(2)
    cluster.crash("eu1")
    cluster.run(EXPEL_MS + 25_000)
    assert expelled_at(cluster, "t1") == []


def test_the_coordinators_wall_clock_may_jump() -> None:
    """Time-outs are monotonic: ten seconds of silence are not a day."""
    cluster = formed(expel_ms=24 * 3_600_000)
    cluster.pause("us2")
    cluster.run(10_000)
    cluster.shift_clock("eu1", 25 * 3_600_000)
    cluster.run(2_000)
    cluster.shift_clock("eu1", -25 * 3_600_000)
    cluster.resume("us2")
    cluster.run(5_000)
    assert started_over(cluster) == []


def test_a_coordinator_that_did_not_run_has_not_missed_anybody() -> None:
    cluster = formed()
    cluster.crash("us2")
    cluster.run(10_000)
    cluster.pause("eu1")
    cluster.pause("eu2")  # who would be next
    cluster.pause("t1")
    cluster.run(EXPEL_MS)
    cluster.restart("us2")
    for name in ("eu1", "eu2", "t1"):
        cluster.resume(name)
    cluster.run(5_000)
    assert started_over(cluster) == []


# --- planted bugs


def whoever_sees_nobody_judges_all(patch: pytest.MonkeyPatch) -> None:
    """The rule of before: nobody alive sorts before us."""
    patch.setattr(Absence, "_may_judge", lambda *_args: True)


def half_is_enough(patch: pytest.MonkeyPatch) -> None:
    """Who sees as many as it misses judges them."""
    original = Absence._may_judge

    def may_judge(self: Absence, now: object) -> bool:
        live = len(self._core.membership.live_nodes(now.monotonic_ms))  # type: ignore[attr-defined]
        return original(self, now) or 2 * (1 + live) >= 4  # type: ignore[arg-type]

    patch.setattr(Absence, "_may_judge", may_judge)


def a_farewell_is_an_absence(patch: pytest.MonkeyPatch) -> None:
    """Who left is let go of like who fell silent."""
    original = absence.absent_of
    patch.setattr(absence, "absent_of", lambda record, _left: original(record, False))


def a_break_does_not_count(patch: pytest.MonkeyPatch) -> None:
    """What was witnessed before the coordinator lost sight still counts."""

    class Kept(dict[int, int]):
        def clear(self) -> None:
            pass

    original = Absence.on_beat

    def on_beat(self: Absence, now: object) -> object:
        self._beats = Kept(self._beats)
        return original(self, now)  # type: ignore[arg-type]

    patch.setattr(Absence, "on_beat", on_beat)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (whoever_sees_nobody_judges_all, an_isolated_node_lets_go_of_nobody),
        (half_is_enough, neither_half_of_a_cluster_lets_go_of_the_other),
        (a_farewell_is_an_absence, who_left_in_order_may_stay_away),
        (a_break_does_not_count, a_coordinator_that_lost_sight_begins_to_count_anew),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        scenario()
