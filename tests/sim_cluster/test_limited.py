"""Swarms in which some nodes have room for a part of the rows, and what must not be switched off there (R11)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sim_cluster.scenario import load_scenario
from sim_cluster.swarm import run_virtual

SCENARIO = load_scenario(Path(__file__).parents[2] / "scenarios" / "limited.toml")
Patch = Callable[[pytest.MonkeyPatch], None]


def test_who_is_limited_is_drawn_from_the_seed() -> None:
    drawn = [SCENARIO.limited(seed) for seed in range(20)]
    assert {len(names) for names in drawn} == {1, 2, 3, 4}
    assert not any("-t" in name for names in drawn for name in names)
    assert SCENARIO.limited(3) == drawn[3]


def test_a_limited_node_holds_the_newest_or_nothing_and_the_others_all() -> None:
    assert run_virtual(replace(SCENARIO, duration_ms=8_000), 2).problem == ""


@pytest.mark.long
@pytest.mark.parametrize("seed", [13, 43])
def test_what_may_be_gone_is_no_row_whose_stamp_went_down(seed: int) -> None:
    """13: who begins shards anew says nothing more of what it had dropped. 43: a version is evicted that nobody was told of."""
    assert run_virtual(SCENARIO, seed).problem == ""


@pytest.mark.long
@pytest.mark.parametrize("seed", [22, 84, 98])
def test_a_link_that_faults_put_into_state_mode_leaves_it(seed: int) -> None:
    """Children of a node that evicts and is fed so have to pull (0042). 22, 98: a narrow path; 84: two models."""
    assert run_virtual(SCENARIO, seed).problem == ""


def _who_knows_less_answers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("p2p.pulling.fetching.covers", lambda keyspace, floor: True)


def _what_goes_meanwhile_is_not_noted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ekko.store.fetching.Fetching.note_gone", lambda self, table, keys: None)


def _older_versions_come_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ekko.store.eviction.Eviction._dropped_up_to", lambda self: np.zeros(self._model.shards, np.uint64))


def _incomplete_nodes_answer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("p2p.pulling.pull_answers.may_answer", lambda keyspace, below: True)


@pytest.mark.long  # a minute
@pytest.mark.parametrize(
    "bug", [_who_knows_less_answers, _what_goes_meanwhile_is_not_noted, _older_versions_come_in, _incomplete_nodes_answer]
)
def test_planted_bugs_are_noticed(bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    assert any(run_virtual(SCENARIO, seed).problem for seed in range(8))
