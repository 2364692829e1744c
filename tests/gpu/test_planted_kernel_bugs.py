"""Each bug that can be planted into the kernels (plants.cuh) is found by what test_interleavings.py plays without one."""

from collections.abc import Callable
from functools import partial

import pytest

from gpu.errors import KernelError
from gpu.kernels import launchers
from tests.gpu import beside

SEEDS = range(60)  # the first that finds the bug ends the search; most are found by every second one
FOUND_BY: dict[str, Callable[[beside.Model], None]] = {
    "READER_FENCE": beside.look_beside_apply,
    "READER_ACQUIRE": beside.look_beside_apply,
    "READER_SYNC": beside.look_beside_apply,
    "NO_SECOND_LOOK": beside.pool_beside_apply,
    "ODD_LOCK": beside.look_beside_inserts,
    "WRITER_FENCE": beside.look_beside_apply,
    "WRITER_RELEASE": beside.look_beside_removals,
    "LATE_CHECK": beside.alone,
    "WRONG_BUCKET": beside.alone,
    "LOST_ON_FULL": beside.two_writers,
    "STALE_SCORE": beside.alone,
    "LANE_MASK": beside.alone,
    "STALE_DIGEST": beside.two_writers_at_par,
    "LATE_LOCK": beside.two_writers,
    "ERASE_NEWER": beside.alone,
    "FIRST_MATCH_ONLY": beside.alone,
    "HOLD_AND_WAIT": beside.two_appliers,
    "EXPORT_UNPROVEN": beside.export_beside_apply,
    "CLEAR_FENCE": beside.look_for_key_zero,
    "POOL_SYNC": partial(beside.pool_beside_apply, codec="float32", dim=64),
}


@pytest.mark.parametrize(("plant", "scenario"), FOUND_BY.items(), ids=list(FOUND_BY))
def test_the_bug_is_found(plant: str, scenario: Callable[[beside.Model], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "BLOCK", beside.BLOCK)
    for seed in SEEDS:
        try:
            scenario(beside.Model(seed, plant))
        except (AssertionError, KernelError):
            return
    pytest.fail(f"{plant} was planted, and {scenario} found nothing with {len(SEEDS)} seeds")


def test_every_plant_is_looked_for() -> None:
    assert ["NONE", *FOUND_BY] == list(beside.plants())
