"""Aliases and dropped models as facts: merging, resolving, canonical bytes, bounds."""

import random
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko import generations
from ekko.errors import ModelError
from ekko.generations import Alias, Dropped, DroppedTable, Fact, Generation, Registers, check_free, entry_of, parse_facts
from ekko.model import INCARNATION_MAX, ModelSpec, TableSpec
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

A, B, C = Generation("a"), Generation("b"), Generation("c", 2)

numbers = st.integers(0, 5)
generation = st.builds(Generation, st.sampled_from("abc"), st.integers(0, 2))
fact = st.one_of(
    st.builds(
        Alias, st.sampled_from(["ctr", "cvr"]), st.none() | generation, st.none() | generation, numbers, numbers, numbers
    ),
    st.builds(Dropped, st.sampled_from("abc"), st.integers(0, 2), numbers),
    st.builds(DroppedTable, generation, st.sampled_from(["item", "user"]), st.integers(0, 2), numbers),
)


@given(st.lists(fact, max_size=12), st.randoms())
def test_merging_is_a_join(facts: list[Fact], rng: random.Random) -> None:
    whole = Registers().merged(facts)
    shuffled = facts + facts
    rng.shuffle(shuffled)
    one_by_one = Registers()
    for each in shuffled:
        one_by_one = one_by_one.merged([each])
    assert one_by_one == whole
    assert whole.merged(facts) is whole


@given(st.lists(fact, max_size=12))
def test_facts_survive_entries_and_the_manifest(facts: list[Fact]) -> None:
    whole = Registers().merged(facts)
    assert Registers().merged(parse_facts(whole.entries())) == whole
    assert Registers.from_json(msgpack.unpackb(msgpack.packb(whole.to_json()))) == whole


def test_of_two_values_the_later_version_counts_then_the_origin() -> None:
    earlier = Alias("ctr", A, None, 900, 1, 99)
    left, right = Alias("ctr", B, A, 100, 2, 5), Alias("ctr", C, A, 50, 2, 6)
    assert Registers().merged([right, left, earlier]).aliases["ctr"] == right


def test_a_switch_takes_effect_at_its_moment_and_back() -> None:
    registers = Registers()
    registers = registers.merged([registers.switched("ctr", B, A, 1_000, 7)])
    moment = 1_000 + generations.SWITCH_AHEAD_MS
    assert registers.resolve("ctr", moment - 1) == A
    assert registers.resolve("ctr", moment) == registers.resolve("ctr") == B
    assert (registers.pending(moment - 1), registers.pending(moment)) == (moment, None)
    back = registers.merged([registers.switched("ctr", A, A, moment, 8)])
    assert back.resolve("ctr", moment) == B
    assert back.resolve("ctr") == A
    gone = back.merged([back.switched("ctr", None, A, 9_000, 9)])
    assert gone.resolve("ctr") is None
    assert gone.aliases["ctr"].previous == A


def test_what_is_dropped_is_not_stood_for() -> None:
    registers = Registers().merged([Alias("ctr", B, A, 0, 1, 1), Dropped("b", 0, 5)])
    assert registers.resolve("ctr") == A
    # The name may be used again: that is another model, and the alias does not mean it.
    assert registers.next_incarnation("b") == 1
    assert registers.resolve("ctr") != Generation("b", 1)
    assert registers.users_of(A) == (["ctr"], ["ctr"])  # which is what readers of the alias read now
    assert registers.users_of(B) == (["ctr"], [])


def test_tables_dropped_from_a_model_are_its_own() -> None:
    registers = Registers().merged(
        [DroppedTable(A, "item", 9, 5), DroppedTable(A, "item", 3, 6), DroppedTable(C, "item", 0, 5)]
    )
    assert [registers.next_table(model, "item") for model in (A, B, C)] == [10, 0, 1]
    assert registers.is_table_dropped(A, "item", 9)
    assert not registers.is_table_dropped(A, "item", 10)
    late = registers.tables_dropped(A)
    assert set(late.values()) == {"item"}
    assert late.keys() == {TableSpec("item", 1, incarnation=number).id for number in range(2, 10)}  # however many there were


def test_incarnations_have_ids_of_their_own() -> None:
    ids = [ModelSpec("ctr", incarnation=number).id for number in range(3)]
    assert ids[0] == ModelSpec("ctr").id
    assert len(set(ids)) == 3
    keyspaces = {
        number for incarnation in range(3) for number in ModelSpec("ctr", 8, partitions=4, incarnation=incarnation).keyspaces
    }
    assert len(keyspaces) == 12


def test_facts_beyond_the_bounds_are_forgotten_alike_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "ALIASES_MAX", 3)
    monkeypatch.setattr(generations, "DROPPED_MAX", 3)
    facts: list[Fact] = [Alias(f"alias-{n}", A, None, 0, 1, n) for n in range(6)]
    facts += [Dropped(f"model-{n}", 0, n) for n in range(6)]
    forward, backward = Registers().merged(facts), Registers()
    for each in reversed(facts):
        backward = backward.merged([each])
    assert forward == backward
    assert len(forward.aliases) == 3
    assert list(forward.dropped) == ["model-3", "model-4", "model-5"]
    # What is not kept is no news, or two nodes would tell each other of it for ever.
    assert forward.merged([Dropped("model-0", 0, 0)]) is forward
    with pytest.raises(ModelError, match="3 aliases are kept"):
        check_free(forward, "another")


GOOD = entry_of(Alias("ctr", B, A, 10, 1, 7))


@pytest.mark.parametrize(
    "entry",
    [
        replace(GOOD, body=b"\xc1"),
        replace(GOOD, body=msgpack.packb(["ctr", ["b", 0], ["a", 0], 10, 1])),
        replace(GOOD, body=msgpack.packb(["ctr", ["b", 0], ["a", 0], 10, -1, 7])),
        replace(GOOD, body=msgpack.packb(["ctr", ["b", 0], ["a", 0], 10, True, 7])),
        replace(GOOD, body=msgpack.packb(["ctr", ["b", INCARNATION_MAX + 1], ["a", 0], 10, 1, 7])),
        replace(GOOD, body=msgpack.packb(["ctr", ["-b", 0], ["a", 0], 10, 1, 7])),
        replace(GOOD, body=msgpack.packb({"name": "ctr"})),
        replace(GOOD, body=GOOD.body[:1] + b"\xd9\x03ctr" + GOOD.body[5:]),  # the same fact in a longer spelling
        replace(GOOD, name="alias:cvr"),
        replace(GOOD, keyspace=5),
        SchemaEntry(ModelSpec("a").id, "dropped:a", msgpack.packb(["a", "0", 5])),
        SchemaEntry(ModelSpec("a").id, "dropped-table:x", msgpack.packb([["", 0], "x", 0, 5])),
        SchemaEntry(ModelSpec("a").id, "dropped-table:x", msgpack.packb([["a", 0], "y", 0, 5])),
        SchemaEntry(ModelSpec("a").id, "dropped-table:x", msgpack.packb([["a", 1], "x", 0, 5])),
    ],
)
def test_junk_is_the_peers_fault(entry: SchemaEntry) -> None:
    assert parse_facts([GOOD])
    with pytest.raises(RemoteProtocolError):
        parse_facts([entry])
