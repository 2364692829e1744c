"""The rules by which a busy origin hands children over, one by one, at an origin whose links are filled by hand."""

import numpy as np
import pytest

from p2p import messages as m
from p2p.link import links
from p2p.link.links import Link
from p2p.machine import Machine
from p2p.members.trees import TREE_ARITY
from p2p.pushing import adoption
from p2p.pushing.waiting import WaitingBatch
from p2p.replica import RowColumns
from tests.p2p.test_adoption import CREDIT, REGIONS, cluster_of_regions

CHILDREN = [f"n{number}" for number in range(1, REGIONS)]
NONE = m.ShardClaims(np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint16))


@pytest.fixture(autouse=True)
def small_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CREDIT_BYTES_MAX", CREDIT)
    monkeypatch.setattr(links, "ACK_BYTES", CREDIT // 8)


class Origin:
    """A trainer in a cluster that stands still; its links carry what a test says, and its clock is the test's."""

    def __init__(self) -> None:
        cluster = cluster_of_regions()
        machine = cluster.nodes["n0"].machine
        assert machine is not None
        self.machine: Machine = machine
        self.part = machine._push.adoption
        self.keyspace = cluster.model.id
        self._begin = cluster.now()
        self.machine._core.effects = []

    def link(self, node: str) -> Link:
        return self.machine._core.links[node]

    def load(self, **bytes_in_flight: int) -> None:
        """So much is on its way to each of these, instead of what was."""
        for node, size in bytes_in_flight.items():
            self.link(node).restart_session()
            if size:
                self.link(node).next_envelope(size)

    def feed(self, size: int = 0, after_ms: int = 0, children: list[str] = CHILDREN) -> list[str]:
        """To whom a batch of so many bytes is sent, so long after the beginning."""
        now = m.Now(self._begin.monotonic_ms + after_ms, self._begin.unix_ms + after_ms)
        return list(self.part.fed_by_us(self.batch(size), children, now))

    def batch(self, size: int) -> m.Batch:
        """A batch of rows of so many bytes together."""
        rows = RowColumns(1, np.arange(size // 20, dtype=np.uint64), np.zeros((size // 20, 12), np.uint8))
        batch = m.Batch(self.keyspace, "n0", "r0", 1, 2, 3, 0, 0, NONE, (rows,))
        assert batch.payload_bytes == size
        return batch

    @property
    def given(self) -> dict[str, str]:
        """Who was handed over, and to whom."""
        return {node: one.to for tree in self.part._given.values() for node, one in tree.items()}

    def told(self) -> dict[str, tuple[str, ...]]:
        """Whom each adopter was told to have, last, since this was asked."""
        core = self.machine._core
        names = {link.address: node for node, link in core.links.items()}
        sent, core.effects = core.effects, []
        return {
            names[one.address]: one.message.children
            for one in sent
            if isinstance(one, m.Send) and isinstance(one.message, m.Adopt)
        }


@pytest.fixture(name="origin")
def _origin() -> Origin:
    return Origin()


# --- when, and how many


def test_a_card_is_full_though_no_link_is(origin: Origin) -> None:
    """Each child has a sixth of its credit in flight; all together 1.9 times what one may have."""
    origin.load(**{node: 6_500 + 100 * number for number, node in enumerate(CHILDREN)})
    assert sum(origin.link(node).bytes_in_flight for node in CHILDREN) == 77_000
    fed = origin.feed()
    # 77 - 40 of 77 are too much: of eleven children six, at once and not one with each batch; the fullest ones.
    assert sorted(origin.given) == sorted(CHILDREN[-6:])
    assert fed == CHILDREN[:5]
    assert sum(origin.link(node).bytes_in_flight for node in fed) <= CREDIT
    # The child with least in flight takes as many as anybody may, the next one the others.
    assert [list(origin.given.values()).count(node) for node in ("n1", "n2")] == [TREE_ARITY, 2]
    assert origin.machine.counters.children_handed_over == 6


def test_the_batch_at_hand_counts(origin: Origin) -> None:
    """Next to nothing is in flight yet, and eleven copies of this one are more than the card takes."""
    origin.load(**{node: number for number, node in enumerate(CHILDREN)})
    assert origin.feed(3_600) == CHILDREN  # 39,600
    assert not origin.given
    assert len(origin.feed(4_980)) == 8  # 54,780, of which 14,780 are too much: three children
    assert len(origin.given) == 3


def test_half_of_a_links_credit_is_the_bound(origin: Origin) -> None:
    origin.load(n4=CREDIT // 2, n5=10)
    assert origin.feed() == CHILDREN
    origin.load(n4=CREDIT // 2 + 1)
    assert "n4" not in origin.feed()
    assert list(origin.given) == ["n4"]


def test_who_feeds_others_stays_ours_and_who_was_handed_over_feeds_nobody(origin: Origin) -> None:
    origin.load(n4=CREDIT // 2 + 1, **{node: 100 for node in CHILDREN if node not in ("n4", "n1")})
    origin.feed()
    assert origin.given == {"n4": "n1"}
    origin.load(n1=CREDIT, n4=0, n7=CREDIT // 2 + 1)  # n4 has least in flight
    fed = origin.feed(after_ms=10)
    assert "n1" in fed
    assert origin.given["n4"] == "n1"
    assert origin.given["n7"] not in ("n4", "n1", "n7")


def test_who_feeds_others_does_not_count_among_those_that_may_go(origin: Origin) -> None:
    origin.load(n4=CREDIT // 2 + 1)
    origin.feed()
    assert origin.given == {"n4": "n1"}
    others = [node for node in CHILDREN if node not in ("n1", "n4")]
    origin.load(n1=CREDIT // 2, **{node: 5_000 + number for number, node in enumerate(others)})
    origin.feed(after_ms=10)
    assert sorted(origin.given) == sorted(["n4", *others[-4:]])  # 25 of 65 kB are too much: of nine children four


def test_nobody_adopts_and_is_handed_over_in_one_go(origin: Origin) -> None:
    """All are equally full, so the one that adopts first is among those that are too many."""
    origin.load(**dict.fromkeys(CHILDREN, 7_000))
    origin.feed()
    assert len(origin.given) > 3
    assert not set(origin.given) & set(origin.given.values())


def test_nobody_adopts_who_has_more_in_flight(origin: Origin) -> None:
    origin.load(n4=CREDIT // 2 + 1)
    origin.feed(children=["n1", "n4"])
    assert origin.given == {"n4": "n1"}
    origin.load(n1=CREDIT, n7=CREDIT // 2 + 1)
    assert origin.feed(after_ms=10, children=["n1", "n4", "n7"]) == ["n1", "n7"]


# --- how long, and with whom


def busy(origin: Origin) -> str:
    """One child is handed over, and the card stays busy; who adopted it."""
    origin.load(n4=CREDIT // 2 + 1, n2=CREDIT // 2 - 10, n3=1_000)
    origin.feed()
    assert list(origin.given) == ["n4"]
    assert origin.told() == {origin.given["n4"]: ("n4",)}
    return origin.given["n4"]


def test_a_busy_card_changes_the_adopter_after_half_a_minute(origin: Origin) -> None:
    first = busy(origin)
    for after_ms in range(0, adoption.SAME_MS, 400):
        origin.feed(after_ms=after_ms)
        assert origin.given == {"n4": first}
    origin.told()
    origin.feed(after_ms=adoption.SAME_MS + adoption.RETURN_MS)
    second = origin.given["n4"]
    assert second != first
    assert origin.told() == {second: ("n4",), first: ()}
    # The half minute of the second one begins now.
    origin.feed(after_ms=adoption.SAME_MS + adoption.RETURN_MS + adoption.SAME_MS - 1)
    assert origin.given == {"n4": second}
    origin.feed(after_ms=2 * adoption.SAME_MS + 3 * adoption.RETURN_MS)
    assert origin.given["n4"] != second


def test_who_was_handed_over_is_nobodys_next_adopter(origin: Origin) -> None:
    first = busy(origin)
    origin.load(n5=CREDIT // 2 + 1)
    origin.feed(after_ms=10)
    assert set(origin.given) == {"n4", "n5"}
    origin.load(n5=0, n6=10, n7=10, n8=10, n9=10, n10=10, n11=10, **{first: CREDIT})  # n5 has least
    origin.feed(after_ms=adoption.SAME_MS + 10)
    assert origin.given["n4"] not in (first, "n5")


def test_an_adopter_without_credit_gives_its_child_to_another(origin: Origin) -> None:
    first = busy(origin)
    origin.feed(after_ms=adoption.ADOPTED_MS)
    assert origin.given == {"n4": first}
    origin.told()
    origin.load(**{first: CREDIT})
    origin.feed(after_ms=adoption.ADOPTED_MS + adoption.RETURN_MS)
    second, told = origin.given["n4"], origin.told()
    assert second != first
    assert "n4" in told[second]
    assert told[first] == ()


def test_an_adopter_that_is_no_child_any_more_has_none(origin: Origin) -> None:
    first = busy(origin)
    others = [node for node in CHILDREN if node != first]
    origin.load(n4=0, n2=0, n3=0)
    assert origin.feed(after_ms=10, children=others) == others
    assert not origin.given
    assert origin.told() == {first: ()}


def test_children_come_back_one_by_one_while_the_card_is_calm(origin: Origin) -> None:
    origin.load(**dict.fromkeys(CHILDREN, 7_000))
    origin.feed()
    count = len(origin.given)
    assert count > 3
    origin.load(**dict.fromkeys(CHILDREN, 0))
    origin.feed(after_ms=adoption.ADOPTED_MS - 1)
    assert len(origin.given) == count
    origin.feed(after_ms=adoption.ADOPTED_MS)
    assert len(origin.given) == count - 1
    origin.feed(after_ms=adoption.ADOPTED_MS + adoption.RETURN_MS - 1)
    assert len(origin.given) == count - 1
    origin.feed(after_ms=adoption.ADOPTED_MS + adoption.RETURN_MS)
    assert len(origin.given) == count - 2
    # A link with something that waits would have it overtaken by the news.
    assert origin.link("n1").waiting.add(WaitingBatch(origin.batch(20), 0), CREDIT, 0)
    origin.feed(after_ms=adoption.ADOPTED_MS + 2 * adoption.RETURN_MS)
    assert len(origin.given) == count - 2
    origin.link("n1").waiting.clear()
    origin.load(n1=CREDIT // 2, n2=10)
    assert not {"n1", "n2"} & set(origin.given)
    origin.feed(after_ms=adoption.ADOPTED_MS + 3 * adoption.RETURN_MS)
    assert len(origin.given) == count - 2


def test_children_of_different_moments_come_back_one_by_one(origin: Origin) -> None:
    origin.load(n4=CREDIT // 2 + 1)
    origin.feed()
    origin.load(n4=0, n5=CREDIT // 2 + 1)
    origin.feed(after_ms=100)
    origin.load(n5=0)
    assert set(origin.given) == {"n4", "n5"}
    origin.feed(after_ms=adoption.ADOPTED_MS)
    assert set(origin.given) == {"n5"}
    origin.feed(after_ms=adoption.ADOPTED_MS + adoption.RETURN_MS - 1)
    assert set(origin.given) == {"n5"}
    origin.feed(after_ms=adoption.ADOPTED_MS + adoption.RETURN_MS)
    assert not origin.given
