"""Planted bugs: a rule is switched off on purpose, and a scenario that passes as it is must notice."""

from collections.abc import Callable

import pytest

Plant = Callable[[pytest.MonkeyPatch], None]
Scenario = Callable[[int], None]

# A scenario says so where what it is about did not come about; that has noticed no bug.
PROVES_NOTHING = "the scenario proves nothing"


def expect_caught(plant: Plant, scenario: Scenario, patch: pytest.MonkeyPatch, seeds: int) -> None:
    """Switch the rule off, and run seed after seed until an assertion fails; none failing is the failure of this check."""
    plant(patch)
    for seed in range(seeds):
        try:
            scenario(seed)
        except AssertionError as caught:
            if PROVES_NOTHING in str(caught):
                pytest.fail(f"{plant.__doc__} It broke the scenario before that could notice: {caught}")
            return
    pytest.fail(f"{plant.__doc__} Nobody noticed in {seeds} runs.")
