"""Fences: scenarios (R13, R15)."""

import pytest

from tests.p2p.fence_chaos import SCENARIOS, a_divided_model_is_fenced, fences_come_often, nodes_join_in_the_middle
from tests.p2p.plants import Scenario

SEEDS = 2
# A second or two each; their seeds differ in nothing but the network.
SLOW = (a_divided_model_is_fenced, fences_come_often, nodes_join_in_the_middle)


@pytest.mark.parametrize(
    ("scenario", "seed"),
    [
        pytest.param(
            scenario, seed, id=f"{scenario.__name__}-{seed}", marks=[pytest.mark.long] if seed and scenario in SLOW else []
        )
        for scenario in SCENARIOS
        for seed in range(SEEDS)
    ],
)
def test_scenario(scenario: Scenario, seed: int) -> None:
    scenario(seed)
