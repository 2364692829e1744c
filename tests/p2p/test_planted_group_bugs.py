"""What a group of steps may get wrong: each is planted on purpose, and must be noticed (`tests/p2p/plants.py`)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from p2p import messages as m
from p2p import wire
from p2p.pushing import groups, push
from p2p.pushing.groups import LINGER_MS, Joined, Step
from p2p.wire import pushing as wire_pushing
from sim_cluster.checkers import Watch
from sim_cluster.meter import Meter
from tests.p2p.chaos import CALM, FAULTS, at_rest, check_claims, form
from tests.p2p.plants import Plant, Scenario, expect_caught

SEEDS = 10


def steps_come_fast(seed: int) -> None:
    """Bursts of steps, closer than `LINGER_MS`, through a network that loses, repeats and reorders messages."""
    cluster = form(seed, FAULTS)
    watch = Watch(cluster)
    cluster.run(5_000)
    cluster.meter = Meter()
    for burst in range(25):
        for step in range(6):
            keys = [(burst * 5 + step * 3 + offset) % 40 for offset in range(1 + (burst + step) % 4)]
            cluster.publish("t1", "item" if step % 3 else "user", keys, float(burst * 6 + step), delete=(burst + step) % 7 == 0)
            cluster.run((seed + step) % (LINGER_MS // 2))
        cluster.run(30)
        assert watch.check() == "", f"seed {seed}, {cluster.now_ms} ms: {watch.check()}"
        check_claims(cluster)
    assert cluster.meter.groups > 20, "no steps shared messages"
    cluster.options = CALM
    at_rest(cluster)
    assert watch.check_converged() == "", f"seed {seed}: {watch.check_converged()}"


def a_group_needs_no_pull(seed: int) -> None:
    """Where nothing is lost, everybody has after some groups what the origin has, and nobody asks for anything."""
    cluster = form(seed)
    cluster.run(5_000)
    before = {name: node.machine.counters.pulls_started for name, node in cluster.nodes.items() if node.machine}
    for burst in range(6):
        for step in range(5):
            assert cluster.publish("t1", "item", [burst + 7 * step, 50 + step], float(step), delete=step == 3)
        cluster.run(200)
    cluster.run(3_000)
    at_rest(cluster)
    for name, node in cluster.nodes.items():
        assert node.machine is not None
        assert node.machine.counters.pulls_started == before[name], f"seed {seed}: {name} pulled"


def planted(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Have groups be joined otherwise; single steps stay as they are."""
    original = groups.join

    def join(steps: Sequence[Step]) -> Joined:
        joined = original(steps)
        return joined if joined.steps is None else change(joined, steps)

    patch.setattr(push, "join", join)


def claims_reach_to_the_end(patch: pytest.MonkeyPatch) -> None:
    """Each claim says the group's last stamp, also of shards that the last step did not touch."""

    def change(joined: Joined, steps: Sequence[Step]) -> Joined:
        until = np.full(len(joined.claims.shards), steps[-1].stamp, np.uint64)
        return replace(joined, claims=replace(joined.claims, until=until))

    planted(patch, change)


def claims_reach_one_step_too_far(patch: pytest.MonkeyPatch) -> None:
    """Receivers merge the group's stamp instead of each claim's own."""
    original = wire_pushing._take_group

    def take(columns: Any, count: int, claims: m.ShardClaims) -> Any:
        steps, reaching = original(columns, count, claims)
        return steps, replace(reaching, until=np.full(len(claims.shards), steps.stamps[-1], np.uint64))

    patch.setattr(wire_pushing, "_take_group", take)


def a_middle_step_is_lost(patch: pytest.MonkeyPatch) -> None:
    """The rows of one of three steps are not sent; the claims say that they are."""

    def change(joined: Joined, steps: Sequence[Step]) -> Joined:
        if len(steps) < 3:
            return joined
        without = groups.join([steps[0], *steps[2:]])
        return replace(joined, columns=without.columns, shard_of=without.shard_of)

    planted(patch, change)


def a_claim_begins_at_its_last_step(patch: pytest.MonkeyPatch) -> None:
    """What a claim builds on is what the last step found in the shard, not the first."""

    def change(joined: Joined, steps: Sequence[Step]) -> Joined:
        prev = joined.claims.prev.copy()
        for step in steps:
            prev[np.searchsorted(joined.claims.shards, step.shards)] = step.prev
        return replace(joined, claims=replace(joined.claims, prev=prev))

    planted(patch, change)


def rows_have_the_groups_stamp(patch: pytest.MonkeyPatch) -> None:
    """All rows get the stamp of the last step."""

    def change(joined: Joined, steps: Sequence[Step]) -> Joined:
        columns = [
            replace(section, stamps=np.full(len(section.keys), steps[-1].stamp, np.uint64)) for section in joined.columns
        ]
        return replace(joined, columns=tuple(columns))

    planted(patch, change)


def a_group_follows_its_last_but_one_step(patch: pytest.MonkeyPatch) -> None:
    """The frontier is chained from the last step, as if those before it had come."""
    original = wire.seal

    def seal(batch: m.Batch) -> m.Batch:
        return original(batch if batch.steps is None else replace(batch, writer_prev=int(batch.steps.stamps[0]) - 1))

    patch.setattr(wire, "seal", seal)


@pytest.mark.parametrize("scenario", [steps_come_fast, a_group_needs_no_pull], ids=lambda function: function.__name__)
def test_the_scenarios_pass_as_they_are(scenario: Scenario) -> None:
    for seed in range(3):
        scenario(seed)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (claims_reach_to_the_end, a_group_needs_no_pull),
        (claims_reach_one_step_too_far, a_group_needs_no_pull),
        (a_middle_step_is_lost, steps_come_fast),
        (a_claim_begins_at_its_last_step, a_group_needs_no_pull),
        (rows_have_the_groups_stamp, steps_come_fast),
        (a_group_follows_its_last_but_one_step, a_group_needs_no_pull),
    ],
    ids=lambda value: value.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)
