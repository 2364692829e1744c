"""The share of a model among what readers ask for: every node tells, all add up, and what is outdated is forgotten."""

import random
from typing import Any

import pytest

from ekko.generations import Generation
from ekko.model import ModelSpec, TableSpec
from ekko.priority.demand import DEMANDS_MAX, OUTDATED_MS, TELL_MS, Demand
from ekko.priority.shares import Shares
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.errors import RemoteProtocolError
from p2p.messages import Now
from p2p.replica import SchemaEntry

UNIX_MS = 1_700_000_000_000
NAMES = ("ctr", "cvr", "idle")


def origin() -> tuple[Store, Shares, list[SchemaEntry]]:
    store = Store.anonymous()
    for name in NAMES:
        store.add_model(ModelSpec(name, 8, {"item": TableSpec("item", 4)}))
    told: list[SchemaEntry] = []
    return store, Shares("t-1", store, told.extend), told


def said(model: str, node: str, at_ms: int, requests: int) -> Demand:
    return Demand({(Generation(model), node): (at_ms, requests)})


def test_shares_are_relative_to_the_average_model() -> None:
    store, shares, _ = origin()
    shares.look(Now(0, UNIX_MS))
    assert [shares.share_of(name) for name in NAMES] == [1, 1, 1], "nobody counts"
    for node, requests in (("eu-1", 500), ("us-1", 100)):
        store.facts.note(said("ctr", node, UNIX_MS, requests))
    store.facts.note(said("cvr", "eu-1", UNIX_MS, 300))
    shares.look(Now(1, UNIX_MS))
    assert [shares.share_of(name) for name in NAMES] == [2, 1, 0]
    assert shares.share_of("unknown") == 1


def test_a_node_that_says_nothing_any_more_is_forgotten() -> None:
    store, shares, _ = origin()
    store.facts.note(said("ctr", "eu-1", UNIX_MS, 500))
    store.facts.note(said("cvr", "us-1", UNIX_MS + OUTDATED_MS, 500))
    shares.look(Now(0, UNIX_MS + OUTDATED_MS + 1))
    assert [shares.share_of(name) for name in NAMES] == [0, 3, 0]


def test_own_readers_are_told_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    _, shares, told = origin()
    counted = {"ctr": 70.0, "cvr": 0.2, "idle": 0.0}
    monkeypatch.setattr(ModelStore, "requests", property(lambda model: counted[model.spec.name]))
    for second in range(0, 2 * TELL_MS, 2_000):
        shares.look(Now(second, UNIX_MS + second))
    assert [entry.name for entry in told] == ["demand:t-1"] * 2
    assert Demand().learned(told).requests(UNIX_MS + TELL_MS) == {Generation("ctr"): 70}
    assert shares.share_of("ctr") == 3


def test_the_order_of_hearing_makes_no_difference() -> None:
    draw = random.Random(3)
    words = [said(draw.choice(NAMES), f"n-{draw.randint(0, 3)}", draw.randint(0, 9), draw.randint(0, 9)) for _ in range(60)]
    ends = set()
    for _ in range(10):
        draw.shuffle(words)
        known = Demand()
        for word in words:
            known = known.learned(word.entries()) if draw.random() < 0.5 else known.merged(word)
        assert known.learned(known.entries()) is known
        ends.add(tuple(known.words.items()))
    assert len(ends) == 1


def test_what_is_kept_is_bounded_and_the_newest() -> None:
    known = Demand().merged(Demand({(Generation("ctr"), f"n-{number}"): (number, 1) for number in range(DEMANDS_MAX + 50)}))
    assert len(known.words) == DEMANDS_MAX
    assert min(said_ms for said_ms, _ in known.words.values()) == 50
    assert not known.without(lambda model: model.name == "ctr").words


GOOD = said("ctr", "eu-1", UNIX_MS, 5).entries()[0]


@pytest.mark.parametrize(
    "entry",
    [
        SchemaEntry(GOOD.keyspace, "demand:us-1", GOOD.body),
        SchemaEntry(GOOD.keyspace + 1, GOOD.name, GOOD.body),
        SchemaEntry(GOOD.keyspace, GOOD.name, b"junk"),
        SchemaEntry(GOOD.keyspace, GOOD.name, GOOD.body[:-1] + b"\xff"),
    ],
)
def test_nonsense_of_a_peer_is_refused(entry: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        Demand().learned([entry])
