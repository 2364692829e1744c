"""A child in state mode sends a batch on and has no room for it itself: what it has is told anew (decision 0042)."""

import dataclasses

import numpy as np
import pytest

from p2p import messages as m
from p2p.busy import feeds
from p2p.busy.feeds import Feeds
from p2p.errors import FullError
from p2p.machine import Machine
from p2p.replica import RowColumns
from sim_cluster.checkers import Watch
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import little_credit, settle
from tests.p2p.plants import Plant
from tests.p2p.test_hostile_feeds import fed, feed_of, receive

WRITER = 77


def refuse_a_batch(cluster: VirtualCluster, machine: Machine) -> None:
    """A batch of another writer comes from somebody, and finds no room."""
    replica = cluster.nodes["eu1"].store.models["ctr"]
    (spec,) = [table for table in cluster.model.tables.values() if table.name == "item"]
    row = RowColumns(spec.id, np.array([5], np.uint64), np.zeros((1, spec.row_bytes), np.uint8))
    shard = replica.shards_of(row.keys).astype(np.uint32)
    claims = m.ShardClaims(shard, np.zeros(1, np.uint64), np.zeros(1, np.uint16), np.ones(1, np.uint16))
    stamp = int(replica.vector.max()) // 4096 * 4096 + WRITER
    batch = m.Batch(cluster.model.id, "t1", "home", WRITER, 3, stamp, 0, 1, claims, (row,), 0, 0, 7)
    link = machine._core.links["t1"]
    envelope = m.Envelope(link.boot, machine._core.options.boot, link.session_in, link._sequence_in + 1, 0, 2)
    with pytest.MonkeyPatch.context() as patch:
        (keyspace,) = machine._core.keyspaces.values()
        patch.setattr(type(keyspace.replica), "reserve", _no_room)
        machine.handle(m.BatchReady(link.boot, envelope, batch), cluster.now())
    assert machine._core.counters.batches_refused_full == 1


def _no_room(*_: object) -> None:
    raise FullError("planted")


def claims_wait_until_the_vector_is_told_anew(seed: int) -> None:
    with little_credit(1_500):
        cluster, machine, chunk = fed(seed)
        replica, feed, before_ms = cluster.nodes["eu1"].store.models["ctr"], feed_of(machine), cluster.now_ms
        answered = feed.request
        claims = replica.vector.copy()
        refuse_a_batch(cluster, machine)
        receive(cluster, machine, dataclasses.replace(chunk, request=answered))
        assert (replica.vector == claims).all(), "a claim is taken which may rest on the batch that was sent on"
        cluster._arm(cluster.nodes["eu1"], machine)
        assert cluster.run_until(lambda: feed_of(machine).request not in (0, answered), 10_000, 10)
        assert cluster.now_ms - before_ms >= feeds.SENT_ON_MS, "what was sent on may not have arrived yet"
        settle(cluster, Watch(cluster))


def test_claims_wait_until_the_vector_is_told_anew() -> None:
    claims_wait_until_the_vector_is_told_anew(1)


# --- planted bugs


def nobody_asks_anew(patch: pytest.MonkeyPatch) -> None:
    """R17: a claim is taken though a batch that was sent on found no room."""
    patch.setattr(Feeds, "spoil_keyspace", lambda self, keyspace: None)


def the_vector_is_told_at_once(patch: pytest.MonkeyPatch) -> None:
    """The vector is told while the batch may still be on its way to the parent."""
    patch.setattr(Feeds, "_waits_for_room", staticmethod(lambda keyspace, now: False))


@pytest.mark.parametrize("plant", [nobody_asks_anew, the_vector_is_told_at_once])
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"a claim is taken|may not have arrived"):
        claims_wait_until_the_vector_is_told_anew(1)
