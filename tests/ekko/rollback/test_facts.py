"""Facts of rollbacks: merging is a join, one epoch wins, nothing of a peer harms."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.generations import Generation
from ekko.rollback import facts
from ekko.rollback.facts import HISTORY_MAX, Rollback, Rollbacks, Step, entry_of
from ekko.rollback.scope import Scope
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

CTR = Generation("ctr")


def fact(epoch: int = 1 << 32, step: Step = Step.WRITING, **more: object) -> Rollback:
    known = {"to_ms": 1_700_000_000_000, "requested_ms": 1_700_000_060_000 + epoch % 1_000, "asked_by": "train"}
    return Rollback(CTR, epoch, step, **{**known, **more})  # type: ignore[arg-type]


FACTS = st.builds(
    lambda epoch, version, step, witness, dry, model: replace(
        fact(epoch, Step(step), version=version, witness=witness, dry=dry), model=Generation(model)
    ),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(0, 9),
    st.sampled_from(["w1", "w2"]),
    st.booleans(),
    st.sampled_from(["ctr", "cvr"]),
)


@given(st.lists(FACTS, max_size=24), st.randoms(), st.integers(0, 24))
def test_merging_does_not_depend_on_order_repeats_or_grouping(told: list[Rollback], shuffler: object, cut: int) -> None:
    shuffled = told + told
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    whole = Rollbacks().having(*told)
    assert Rollbacks().having(*shuffled) == whole
    one, other = Rollbacks().having(*told[:cut]), Rollbacks().having(*told[cut:])
    assert one.merged(other) == other.merged(one) == whole
    assert whole.merged(one) is whole
    assert Rollbacks().learned(whole.entries()) == whole


def test_of_two_witnesses_that_decide_at_once_the_same_one_wins_everywhere() -> None:
    known = Rollbacks()
    one, other = (fact(known.next_epoch(CTR, random), Step.FENCING, witness=name) for random, name in ((7, "w1"), (9, "w2")))
    for order in ((one, other), (other, one)):
        winner = Rollbacks().having(*order).running(CTR)
        assert winner is not None
        assert winner.witness == "w2"


def test_a_later_round_is_above_all_epochs_of_the_ones_before() -> None:
    first = Rollbacks().next_epoch(CTR, 0xFFFFFFFF)
    assert Rollbacks().having(fact(first)).next_epoch(CTR, 0) > first


def test_a_question_is_no_rollback_and_history_is_bounded() -> None:
    known = Rollbacks().having(
        *(fact(round_ << 32, Step.DONE) for round_ in range(1, 40)), fact(99 << 32, Step.REQUESTED, dry=True)
    )
    assert len(known.of(CTR)) == HISTORY_MAX + 1
    assert known.running(CTR) is None
    current = known.current(CTR)
    assert current is not None
    assert current.epoch == 39 << 32


def test_traffic_comes_back_in_steps() -> None:
    shares = []
    for version, (step, share) in enumerate(
        ((Step.REQUESTED, 1_000), (Step.WRITING, 0), (Step.PROBING, 10), (Step.DONE, 1_000))
    ):
        shares.append(Rollbacks().having(fact(step=step, share=share, version=version)).share(CTR))
    assert shares == [1.0, 0.0, 0.01, 1.0]


def test_what_a_fact_says_survives_the_wire() -> None:
    scope = Scope(("item", "_dense"), "train", (3, 7), 10, 1 << 64)
    said = fact(scope=scope, unreachable=("a", "b"), reason="no mark", automatic=True, rows=2**40, share=10)
    assert Rollbacks().learned([entry_of(said)]).running(CTR) == said


@pytest.mark.parametrize(
    "change",
    [
        {"reason": "x" * (facts.REASON_BYTES_MAX + 1)},
        {"unreachable": tuple(map(str, range(facts.NODES_MAX + 1)))},
        {"share": 1_001},
        {"scope": Scope(writers=(4_096,))},
        {"model": Generation("no model/")},
        {"witness": "n" * 257},
    ],
)
def test_what_nobody_could_have_said_is_refused(change: dict[str, object]) -> None:
    said = entry_of(replace(fact(), **change))  # type: ignore[arg-type]
    with pytest.raises(RemoteProtocolError):
        Rollbacks().learned([said])


@given(st.binary(max_size=200))
def test_junk_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Rollbacks().learned([SchemaEntry(entry_of(fact()).keyspace, "rollback:0000000100000000", body)])


def test_a_fact_under_another_name_is_refused() -> None:
    entry = entry_of(fact())
    with pytest.raises(RemoteProtocolError, match="another way"):
        Rollbacks().learned([replace(entry, name="rollback:00000000000000ff")])


def test_too_long_a_reason_is_cut() -> None:
    cut = facts.shortened(fact(reason="ü" * 400, unreachable=tuple(map(str, range(100)))))
    assert Rollbacks().learned([entry_of(cut)]).of(CTR) == [cut]
