"""Every preset keeps replicas equal, under every fault (theorem T7: pull alone converges)."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest

from ekko.store.model_store import ModelStore
from p2p.paper.sync import PRESETS, SyncOptions
from p2p.pushing.push import Push
from sim_cluster.checkers import check_converged
from sim_cluster.virtual import VirtualCluster
from tests.p2p import retirement_chaos
from tests.p2p.chaos import CALM, at_rest, chaos, form
from tests.p2p.presets import quick_first
from tests.p2p.retirement_chaos import an_expelled_writer_returns, an_id_is_used_again
from tests.seeds import seeds

PULLING = [name for name, sync in PRESETS.items() if not sync.push]


def start(preset: str, seed: int = 1) -> VirtualCluster:
    cluster = form(seed, CALM, sync=PRESETS[preset])
    cluster.run(8_000)
    assert all(node.machine and node.machine.status(cluster.now()).synced for node in cluster.nodes.values())
    return cluster


@pytest.mark.parametrize("seed", seeds(2, 6))
@pytest.mark.parametrize("preset", quick_first(PULLING))
def test_faults_end_in_equal_stores(preset: str, seed: int) -> None:
    """T7, as in `test_machine` for the product: no batch is ever sent here."""
    sent: list[object] = []
    with mock.patch.object(Push, "receive", side_effect=sent.append):
        chaos(seed, PRESETS[preset])
    assert not sent


@pytest.mark.parametrize("preset", quick_first(PRESETS))
def test_each_preset_spreads_steps_and_deletes(preset: str) -> None:
    cluster = start(preset)
    for step in range(10):
        cluster.publish("t1", "item", range(step * 10, step * 10 + 30), float(step))
        cluster.run(100)
    cluster.publish("t1", "item", range(5), delete=True)
    assert cluster.run_until(lambda: check_converged(cluster) == "", 20 * PRESETS[preset].interval_ms or 100)
    at_rest(cluster)


@pytest.mark.parametrize("preset", quick_first(PRESETS))
def test_a_wait_ends_and_freshness_moves_with_every_preset(preset: str) -> None:
    cluster = start(preset)
    stamp = cluster.publish("t1", "item", range(30), 1.0)
    replicas = [node.store.models["ctr"] for node in cluster.nodes.values()]
    assert cluster.run_until(lambda: all(int(replica.frontier[0]) >= stamp for replica in replicas), 5_000)


@pytest.mark.parametrize("preset", quick_first(PULLING))
def test_a_newcomer_catches_up_though_nobody_is_up_to_date_with_both_writers(preset: str) -> None:
    cluster = start(preset)
    cluster.add("t2", "ap", "train", ["t1"])
    cluster.run(8_000)
    assert cluster.publish("t1", "item", range(30), 1.0)
    assert cluster.run_until(lambda: cluster.publish("t2", "item", range(30, 60), 2.0) != 0, 20_000)
    cluster.run(3_000)
    newcomer = cluster.add("ap1", "ap", seeds=["us1"])
    assert cluster.run_until(lambda: bool(newcomer.machine and newcomer.machine.status(cluster.now()).synced), 10_000)
    at_rest(cluster)


@pytest.mark.parametrize("scenario", [an_expelled_writer_returns, an_id_is_used_again], ids=lambda function: function.__name__)
@pytest.mark.parametrize("preset", quick_first(["cache", "shard_versions", "leaders"]))
def test_writers_are_retired_without_push(
    preset: str, scenario: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R13. Where no batch says that an id is used again, stamps above what was left of its first owner do."""
    monkeypatch.setattr(retirement_chaos, "form", partial(form, sync=PRESETS[preset]))
    scenario(1)


def test_only_the_vector_preset_scans() -> None:
    for preset, scans in (("vector", True), ("cache", False)):
        with mock.patch.object(ModelStore, "scan_since", side_effect=AssertionError("a scan")):
            cluster = form(1, CALM, sync=PRESETS[preset])
            if scans:
                with pytest.raises(AssertionError, match="a scan"):
                    cluster.run(8_000)
            else:
                cluster.run(8_000)


def test_presets_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="interval_ms"):
        SyncOptions(push=False)
