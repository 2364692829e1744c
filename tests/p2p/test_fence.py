"""Fences: scenarios, and what is refused (R13)."""

import pytest

from tests.p2p.fence_chaos import SCENARIOS
from tests.p2p.plants import Scenario

SEEDS = 2


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Scenario, seed: int) -> None:
    scenario(seed)
