"""Fences: scenarios (R13, R15)."""

import pytest

from tests.p2p.fence_chaos import SCENARIOS
from tests.p2p.plants import Scenario
from tests.seeds import seeds


@pytest.mark.parametrize("seed", seeds(1, 2))  # they differ in nothing but the network
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Scenario, seed: int) -> None:
    scenario(seed)
