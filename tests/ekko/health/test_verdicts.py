"""Verdicts as facts: merging is a join, bounds forget alike, and what a peer says can do no harm."""

import random
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.errors import ModelError
from ekko.facts import changed_entries
from ekko.generations import Dropped, Generation, entry_of
from ekko.health import verdicts as module
from ekko.health.verdicts import BLOCK_MS, BLOCKS_MAX, CELL_MS, OPERATOR, RULINGS_MAX, Interval, State, Verdicts
from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry
from p2p.wire import STRING_BYTES_MAX

T = 1_700_000_000_000 // BLOCK_MS * BLOCK_MS
CTR, CVR = Generation("ctr"), Generation("cvr", 2)
SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 3)})

times = st.integers(0, 5 * BLOCK_MS).map(lambda offset: T + offset)
states = st.sampled_from(["healthy", "uncertain", "corrupted"])


@st.composite
def words(draw: st.DrawFn) -> Verdicts:
    """What one detector or operator says."""
    model, state = draw(st.sampled_from([CTR, CVR])), draw(states)
    start, end = sorted((draw(times), draw(times)))
    if draw(st.booleans()):
        return Verdicts().note(model, state, start, end)
    if draw(st.booleans()):
        return Verdicts().overrule(model, state, start, end, now_ms=end, node=draw(st.sampled_from("ab")), text="no")
    return Verdicts().note(model, state, start, end, now_ms=end, node=draw(st.sampled_from("ab")), detector="auc", text="why")


@given(st.lists(words(), max_size=8), st.randoms())
def test_merging_is_a_join(said: list[Verdicts], rng: random.Random) -> None:
    whole = Verdicts()
    for one in said:
        whole = whole.merged(one)
    shuffled = said + said
    rng.shuffle(shuffled)
    # In another order, with repeats, in two halves that meet, by entries.
    halves = [Verdicts(), Verdicts()]
    for place, one in enumerate(shuffled):
        halves[place % 2] = halves[place % 2].learned(one.entries())
    assert halves[0].merged(halves[1]) == halves[1].merged(halves[0]) == whole
    assert whole.merged(halves[0]) is whole
    # Who has a half is told the rest, and nothing that it knows.
    told = changed_entries(halves[0], whole)
    known = set(map(repr, halves[0].entries()))
    assert list(told) == [entry for entry in whole.entries() if repr(entry) not in known]
    assert halves[0].learned(told) == whole
    assert whole.learned(whole.entries()) is whole


@given(st.lists(words(), max_size=8), st.randoms())
def test_what_is_beyond_the_bounds_is_forgotten_alike_in_any_order(said: list[Verdicts], rng: random.Random) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, bound in {"BLOCKS_MAX": 2, "BLOCKS_TOTAL_MAX": 3, "RULINGS_MAX": 2, "RULINGS_TOTAL_MAX": 3}.items():
            patch.setattr(module, name, bound)
        test_merging_is_a_join.hypothesis.inner_test(said, rng)  # type: ignore[attr-defined]


def test_what_is_said_alike_of_two_models_is_forgotten_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RULINGS_TOTAL_MAX", 1)
    one, other = (Verdicts().note(model, "healthy", T, T + 1, now_ms=T, node="a", detector="auc") for model in (CTR, CVR))
    assert one.merged(other) == other.merged(one)


def test_the_worse_word_counts_at_one_moment_whoever_says_it() -> None:
    one = Verdicts().note(CTR, "healthy", T, T + 10_000)
    other = Verdicts().note(CTR, "corrupted", T + 4_000, T + 6_000)
    for both in (one.merged(other), other.merged(one)):
        assert [both.state("ctr", T + offset) for offset in (0, 3_999, 4_000, 5_999, 6_000)] == [
            "healthy",
            "healthy",
            "corrupted",
            "corrupted",
            "healthy",
        ]
        assert both.intervals("ctr") == [
            Interval("healthy", T, T + 4_000),
            Interval("corrupted", T + 4_000, T + 6_000),
            Interval("healthy", T + 6_000, T + 10_000),
        ]
        assert both.healthy_until("ctr") == T + 10_000


def test_healthy_until_is_before_any_corrupted_interval() -> None:
    said = Verdicts()
    assert said.healthy_until("ctr") is None
    assert said.state("ctr", T) == "uncertain"
    said = said.note(CTR, "healthy", T, T + 60_000)
    assert said.healthy_until("ctr") == said.judged_until("ctr") == T + 60_000
    said = said.note(CTR, "corrupted", T + 30_500, T + 90_000)  # it began before anybody noticed
    assert said.healthy_until("ctr") == T + 30_000
    assert said.state("ctr", T + 200_000) == "corrupted", "until anybody says otherwise"
    assert said.state("ctr", T - 1) == "uncertain"
    said = said.note(CTR, "uncertain", T + 90_000, T + 95_000).note(CTR, "healthy", T + 95_000, T + 99_000)
    assert said.healthy_until("ctr") == T + 99_000
    assert (said.state("ctr", T + 94_999), said.state("ctr", T + 95_000)) == ("uncertain", "healthy")


def test_rounding_is_to_the_safe_side() -> None:
    assert Verdicts().note(CTR, "healthy", T + 1, T + 2 * CELL_MS - 1) == Verdicts()
    assert Verdicts().note(CTR, "healthy", T + 1, T + 2 * CELL_MS).intervals("ctr") == [
        Interval("healthy", T + CELL_MS, T + 2 * CELL_MS)
    ]
    for state in ("uncertain", "corrupted"):
        assert Verdicts().note(CTR, state, T + 999, T + 1_001).intervals("ctr") == [Interval(state, T, T + 2 * CELL_MS)]
        assert Verdicts().note(CTR, state, T + 5, T + 5).intervals("ctr") == [Interval(state, T, T + CELL_MS)]


def test_an_operator_has_the_last_word_until_the_next() -> None:
    said = Verdicts().note(CTR, "corrupted", T, T + 20_000, now_ms=T + 20_000, node="a", detector="auc", text="AUC fell")
    late = Verdicts().note(CTR, "corrupted", T + 5_000, T + 6_000)
    said = said.overrule(CTR, "healthy", T, T + 10_000, now_ms=T + 20_000, node="b", text="a test").merged(late)
    assert said.healthy_until("ctr") == T + 10_000
    assert said.state("ctr", T + 10_000) == "corrupted"
    said = said.overrule("ctr", "uncertain", T, T + 1_000, now_ms=T, node="a", text="after all")
    assert said.state("ctr", T) == "uncertain"
    log = said.log("ctr")
    assert [(one.node, one.detector, one.state) for one in log] == [
        ("a", "auc", "corrupted"),
        ("b", OPERATOR, "healthy"),
        ("a", OPERATOR, "uncertain"),
    ]
    assert [one.stamp_ms for one in log] == [T + 20_000, T + 20_001, T + 20_002], "stamps grow, whatever the clock says"
    for _ in range(module.REVISION_MAX - 2):
        said = said.overrule("ctr", "healthy", T, T + 1_000, now_ms=T, node="a", text="")
    with pytest.raises(ModelError, match="overruled 63 times"):
        said.overrule("ctr", "healthy", T, T + 1_000, now_ms=T, node="a", text="")


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ModelError, match="expected one of healthy"):
        Verdicts().note(CTR, "fine", T, T)  # type: ignore[arg-type]
    for start, end in ((T + 1, T), (-5, -1), (T, 1 << 60)):
        with pytest.raises(ModelError, match="Unix milliseconds"):
            Verdicts().note(CTR, "corrupted", start, end)


def test_a_model_takes_bounded_room_and_each_entry_fits() -> None:
    said = Verdicts()
    for offset in range(0, 2 * BLOCKS_MAX * BLOCK_MS, BLOCK_MS):
        said = said.note(CTR, "healthy", T + offset, T + offset + BLOCK_MS, now_ms=T + offset, node="n" * 100, detector="d")
    assert len(said.blocks) == BLOCKS_MAX
    assert len(said.rulings) == RULINGS_MAX
    assert said.healthy_until(CTR) == T + 2 * BLOCKS_MAX * BLOCK_MS
    # The longest verdict paints as much as is kept, and is as quick.
    assert len(Verdicts().note(CTR, "corrupted", 0, T).blocks) == BLOCKS_MAX
    name = Generation("m" * 100, 7)
    worst = Verdicts()
    for cell in range(0, module.BLOCK_CELLS, 2):
        worst = worst.note(name, "corrupted", T + cell * CELL_MS, T + cell * CELL_MS + 1)
    worst = worst.note(name, "corrupted", T, T, now_ms=T, node="n" * 100, detector="d" * 100, text="é" * 1_000)
    assert max(len(entry.body) for entry in worst.entries()) <= STRING_BYTES_MAX
    assert worst.log(name)[0].text == "é" * 100
    assert sum(len(entry.body) for entry in said.entries() if entry.name.startswith("verdict:")) < 64 * 30


def test_a_name_is_its_newest_incarnation_of_which_anything_was_said() -> None:
    said = Verdicts().note("ctr", "corrupted", T, T).note(Generation("ctr", 1), "healthy", T, T + 5_000)
    assert said.state("ctr", T) == "healthy"
    assert said.state(Generation("ctr"), T) == "corrupted"
    assert said.without(lambda one: one.incarnation == 1).state("ctr", T) == "corrupted"
    assert said.without(lambda _: False) is said


BLOCK, RULING = Verdicts().note(CTR, "corrupted", T, T + 5_000, now_ms=T, node="a", detector="auc", text="why").entries()
BODY = msgpack.unpackb(BLOCK.body)
WORDS = msgpack.unpackb(RULING.body)


@pytest.mark.parametrize(
    "entry",
    [
        replace(BLOCK, body=b"\xc1"),
        replace(BLOCK, body=msgpack.packb({"name": "ctr"})),
        replace(BLOCK, body=msgpack.packb([*BODY[:3], b"\xff\x00"])),  # says nothing
        replace(BLOCK, body=msgpack.packb([*BODY[:3], b"\x04\x03\xf9\x00"])),  # a cell too few
        replace(BLOCK, body=msgpack.packb([*BODY[:3], b"\x01\x03\x02\x03\xfa\x00"])),  # runs that could be one
        replace(BLOCK, body=msgpack.packb([*BODY[:3], b"\x04\x04\xfa\x00"])),  # a revision of nothing
        replace(BLOCK, body=msgpack.packb([*BODY[:3], b"\x04"])),
        replace(BLOCK, body=msgpack.packb([*BODY[:3], b"\x00\x03" * 600])),
        replace(BLOCK, body=msgpack.packb(["ctr", 0, 1 << 40, BODY[3]])),
        replace(BLOCK, body=msgpack.packb(["ctr", 0, -1, BODY[3]])),
        replace(BLOCK, body=msgpack.packb(["ctr", True, *BODY[2:]])),
        replace(BLOCK, body=msgpack.packb(["-ctr", 0, *BODY[2:]])),
        replace(BLOCK, name="verdict:5"),
        replace(BLOCK, keyspace=5),
        replace(RULING, body=msgpack.packb([*WORDS[:4], "fine", *WORDS[5:]])),
        replace(RULING, body=msgpack.packb([*WORDS[:2], 1 << 50, *WORDS[3:]])),
        replace(RULING, body=msgpack.packb([*WORDS[:8], "x" * 201])),
        replace(RULING, body=msgpack.packb([*WORDS[:8], 7])),
        replace(RULING, body=msgpack.packb(WORDS[:8])),
        replace(RULING, name="verdict-ruling:1:a"),
    ],
)
def test_junk_is_the_peers_fault_and_changes_nothing(entry: SchemaEntry) -> None:
    store = Store.anonymous()
    store.add_model(SPEC)
    store.facts.note(Verdicts().note(CTR, "healthy", T, T + 9_000))
    before = store.schema()
    alias = ModelSpec("other", 4).entries()
    with pytest.raises(RemoteProtocolError):
        store.adopt([*alias, BLOCK, entry])
    assert store.schema() == before
    assert list(store.models) == ["ctr"]
    assert store.adopt([*alias, BLOCK, RULING])
    assert store.facts.of(Verdicts).state("ctr", T) == "corrupted"


def test_a_store_keeps_them_over_a_restart_and_lets_go_of_them_with_their_model(tmp_path: Path) -> None:
    run_dir = tmp_path / "node"
    store = Store.open(run_dir)
    try:
        store.add_model(SPEC)
        told = store.facts.note(Verdicts().note(CTR, "corrupted", T, T + 9_000).note(CVR, "healthy", T, T + 9_000))
        assert [entry.name for entry in told] == [f"verdict:{T // BLOCK_MS}"] * 2
        assert store.facts.note(Verdicts().note(CTR, "healthy", T, T + 9_000)) == ()
        store.close()
        after = Store.open(run_dir)
        assert after.resumed
        assert after.facts.of(Verdicts).state("ctr", T) == "corrupted"
        assert after.adopt(after.schema()) is False
        after.adopt([entry_of(Dropped("ctr", 0, T)), *told])
        assert after.facts.of(Verdicts).models() == [CVR]
        assert after.adopt(list(told)) is False, "of what is over there is no news"
        after.close()
        (run_dir / "facts").write_bytes(b"junk")
        assert Store.open(run_dir).facts.of(Verdicts) == Verdicts()
    finally:
        Store.open(run_dir).destroy()


def worst(first: State, second: State) -> State:
    both = Verdicts().note(CTR, first, T, T + 1_000).merged(Verdicts().note(CTR, second, T, T + 1_000))
    return both.state(CTR, T)


def test_states_are_ordered() -> None:
    assert worst("healthy", "uncertain") == worst("uncertain", "healthy") == "uncertain"
    assert worst("uncertain", "corrupted") == worst("corrupted", "healthy") == "corrupted"
