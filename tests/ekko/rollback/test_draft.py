"""A plan that is begun while rows still come is as whole, in the end, as one that was begun afterwards."""

import random
from functools import partial

import pytest

from ekko.generations import Generation
from ekko.rollback.diff import differences
from ekko.rollback.draft import Draft
from ekko.rollback.plan import MemoryPlans, PlanWriter, read_plan, write_plan
from ekko.rollback.scope import WHOLE
from p2p.replica import RowColumns
from p2p.stamps import make_stamp
from tests.ekko.rollback.remembered import Remembered
from tests.ekko.rollback.test_diff import CUT_MS, KEYS, NOW_MS, differing, history

CTR = Generation("ctr", 0)
AFTER_MS = NOW_MS + 100


def written_on(past: Remembered, rng: random.Random, at_ms: int) -> None:
    """One more bad step."""
    keys = sorted(rng.sample(range(KEYS), rng.randint(1, 12)))
    past.write(rng.choice(["item", "user"]), keys, rng.choice([None, 7.0]), make_stamp(at_ms, 0, 1))


def carried_out(past: Remembered, draft: Draft, plans: MemoryPlans) -> None:
    """Finish the plan, and write it back."""
    *_, summary = write_plan(draft.writer, draft.finish())
    plan = read_plan(plans, CTR)
    assert summary is not None
    assert plan is not None
    assert plan.summary == summary
    named: set[tuple[int, int]] = set()
    for index in range(summary.batches):
        batch = plan.batch(index)
        of_batch = {(batch.table, key) for key in batch.keys.tolist()}
        assert not of_batch & named  # once each
        named |= of_batch
        past.model.apply([RowColumns(batch.table, batch.keys, batch.rows)], make_stamp(AFTER_MS, index, 9))


def draft_of(past: Remembered, plans: MemoryPlans) -> Draft:
    make = partial(differences, past.model, past, CUT_MS, CUT_MS, WHOLE, NOW_MS)
    return Draft(PlanWriter(plans, CTR, 7, CUT_MS), CUT_MS, CUT_MS, make)


@pytest.mark.parametrize("seed", range(20))
def test_what_comes_meanwhile_is_taken_back_too(seed: int) -> None:
    rng, past, plans = random.Random(seed), history(seed), MemoryPlans()
    draft = draft_of(past, plans)
    slices = rng.randint(0, 40)  # as far as it comes before the fence is closed
    for number in range(slices):
        if draft.working:
            draft.work()
        if rng.random() < 0.3:
            written_on(past, rng, NOW_MS + number)
    written_on(past, rng, NOW_MS + slices)
    carried_out(past, draft, plans)
    assert differing(past) == []


def test_a_draft_that_is_not_looked_through_again_is_noticed() -> None:
    """The planted bug: what came after the draft is not in the plan."""
    rng, past, plans = random.Random(1), history(1), MemoryPlans()
    draft = draft_of(past, plans)
    while draft.working:
        draft.work()
    for number in range(5):
        written_on(past, rng, NOW_MS + number)
    draft._differences = lambda _: iter(())
    carried_out(past, draft, plans)
    assert differing(past)


def test_a_draft_that_is_not_wanted_leaves_no_plan() -> None:
    past, plans = history(2), MemoryPlans()
    draft = draft_of(past, plans)
    draft.work()
    draft.close()
    assert not draft.working
    assert read_plan(plans, CTR) is None
