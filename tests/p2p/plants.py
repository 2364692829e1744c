"""Planted bugs: a rule is switched off on purpose, and a scenario that passes as it is must notice."""

from collections.abc import Callable

import pytest

Plant = Callable[[pytest.MonkeyPatch], None]
Scenario = Callable[[int], None]


def expect_caught(plant: Plant, scenario: Scenario, patch: pytest.MonkeyPatch, seeds: int) -> None:
    """Switch the rule off, and run seed after seed until an assertion fails; none failing is the failure of this check."""
    plant(patch)
    for seed in range(seeds):
        try:
            scenario(seed)
        except AssertionError:
            return
    pytest.fail(f"{plant.__doc__} Nobody noticed in {seeds} runs.")
