"""A node that dropped live rows for want of memory, among others that have them all (R11)."""

import numpy as np
import pytest

from ekko.store.capacity import Capacity
from ekko.store.eviction import Eviction
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.link.links import Link
from p2p.paper.sync import PRESETS, SyncOptions
from p2p.pulling.incomplete import note_incomplete
from p2p.pulling.outbox import Completion
from p2p.pulling.pull import Pull
from p2p.pulling.pull_answers import PullAnswers
from p2p.stamps import WRITER_MASK
from sim_cluster.checkers import Watch, contents
from sim_cluster.virtual import VirtualCluster

ROWS = 1_200
STEP = 100
SMALL = "eu-1"  # first by name, so that it is asked first


def limit(cluster: VirtualCluster, name: str, rows: int = 0) -> None:
    """This node has room for so many more rows than it has, and evicts."""
    model = cluster.nodes[name].store.models["ctr"]
    stride = model.tables_by_id[cluster.model.tables["item"].id].stride
    model.limit(Capacity(model.memory_bytes + rows * stride, "least_recently_updated"))


def publish(cluster: VirtualCluster, value: float, begin: int = 0, end: int = ROWS) -> None:
    for first in range(begin, end, STEP):
        cluster.publish("us-1", "item", range(first, first + STEP), value)
        cluster.run(50)


def running(seed: int, sync: SyncOptions = PRESETS["push"]) -> VirtualCluster:
    """Rows that a node with little memory had to drop some of; all others have all."""
    cluster = VirtualCluster(seed, sync=sync)
    cluster.add("us-1", "us", "train")
    for name in (SMALL, "eu-2"):
        cluster.add(name, "eu", seeds=["us-1"])
    cluster.run(3_000)
    publish(cluster, 1.0, 0, 500)
    cluster.run(15_000)  # until these are old enough to go
    limit(cluster, SMALL)
    publish(cluster, 2.0, 500)
    cluster.run(10_000)
    return cluster


def newest(cluster: VirtualCluster) -> dict[tuple[int, int], tuple[int, bytes]]:
    held = contents(cluster.nodes["us-1"].store, "ctr")
    assert len(held) == ROWS
    return held


def test_who_has_nothing_for_us_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of a region that lack the same would ask each other, though others have it whom they do not hear themselves."""
    cluster, asked = VirtualCluster(7), set[str]()
    cluster.add("us-1", "us", "train")
    for name in (SMALL, "eu-2", "eu-3"):
        cluster.add(name, "eu", seeds=["us-1"])
    cluster.run(3_000)
    publish(cluster, 1.0, 0, 100)
    cluster.run(3_000)

    def only_the_small_one_says_anything(self: Pull, link: Link, summary: m.KeyspaceSummary, now: m.Now, **_: bool) -> None:
        core, small = self._core, self._core.link(SMALL)
        if core.options.node == "eu-2" and small is not None:
            note_incomplete(core, small.boot, summary.keyspace)
            self.ask(core.keyspaces[summary.keyspace], small, now, "it has more")
            asked.update(self.asking.values())

    monkeypatch.setattr(Pull, "on_summary", only_the_small_one_says_anything)
    cluster.run(4_000)
    assert asked == {"eu-3", "us-1"}
    machine = cluster.nodes["eu-2"].machine
    assert machine is not None
    assert machine._pull._in_vain
    cluster.cut = {(other, "eu-2") for other in cluster.nodes}
    publish(cluster, 2.0, 0, 100)
    cluster.cut = set()
    assert cluster.run_until(
        lambda: contents(cluster.nodes["eu-2"].store, "ctr") == contents(cluster.nodes["us-1"].store, "ctr"), 4_000
    )


@pytest.mark.parametrize("sync", ["push", "leaders", "cache", "shard_versions"])
def test_others_hold_all_and_it_holds_what_fits(sync: str) -> None:
    cluster = running(7, PRESETS[sync])
    small = cluster.nodes[SMALL]
    model = small.store.models["ctr"]
    assert model.capacity is not None
    assert model.eviction is not None
    assert model.eviction.evicted > 0
    assert model.memory_bytes <= model.capacity.bytes
    everything = newest(cluster)
    assert contents(cluster.nodes["eu-2"].store, "ctr") == everything
    kept = contents(small.store, "ctr")
    assert 200 < len(kept) < ROWS
    assert kept.items() <= everything.items()  # nothing that is older, nothing that was not written
    assert model.vector.tolist() == cluster.nodes["eu-2"].store.models["ctr"].vector.tolist()  # it claims what it passed on
    assert Watch(cluster).check_converged() == ""


def joined(cluster: VirtualCluster) -> VirtualCluster:
    """A node comes that is told of the incomplete one only, while the training node is away for a while."""
    cluster.add("eu-9", "eu", seeds=[SMALL])
    cluster.run(20_000)
    return cluster


@pytest.mark.parametrize("sync", ["push", "leaders", "cache", "shard_versions"])
def test_who_joins_gets_all_rows_and_none_of_them_from_it(sync: str) -> None:
    cluster = joined(running(8, PRESETS[sync]))
    assert contents(cluster.nodes["eu-9"].store, "ctr") == newest(cluster)
    machine = cluster.nodes["eu-9"].machine
    assert machine is not None
    assert machine.status(cluster.now_of(cluster.nodes["eu-9"])).synced
    assert Watch(cluster).check_converged() == ""


@pytest.mark.parametrize("sync", ["push", "leaders"])
def test_an_incomplete_node_that_answers_like_others_is_noticed(sync: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p.pulling.pull_answers.may_answer", lambda keyspace, below: True)
    monkeypatch.setattr("p2p.paper.round_answers.may_answer", lambda keyspace, below: True)
    monkeypatch.setattr("p2p.pulling.incomplete.note_incomplete", lambda core, boot, keyspace: None)
    monkeypatch.setattr("p2p.pulling.pull.note_incomplete", lambda core, boot, keyspace: None)
    assert any(Watch(joined(running(seed, PRESETS[sync]))).check_converged() for seed in range(8, 14))


def test_rows_are_evicted_only_while_somebody_else_has_them() -> None:
    cluster = VirtualCluster(9)
    cluster.add("us-1", "us", "train")
    cluster.add(SMALL, "eu", seeds=["us-1"])
    cluster.run(3_000)
    publish(cluster, 1.0, 0, 500)
    cluster.run(15_000)
    limit(cluster, SMALL)
    eviction = cluster.nodes[SMALL].store.models["ctr"].eviction
    assert eviction is not None
    cluster.run(2_000)
    assert eviction.backed
    cluster.crash("us-1")
    cluster.run(20_000)
    assert not eviction.backed
    before = contents(cluster.nodes[SMALL].store, "ctr")
    cluster.restart("us-1", keep_state=False)  # all that there was is here
    publish(cluster, 2.0, 500, 600)
    cluster.run(20_000)
    assert before.items() <= contents(cluster.nodes["us-1"].store, "ctr").items()
    assert np.all([key in contents(cluster.nodes["us-1"].store, "ctr") for key in before])


def restart_with(cluster: VirtualCluster, rows: int | None) -> ModelStore:
    """The small node starts again, with room for so many more rows than it has; None: without a limit."""
    model = cluster.nodes[SMALL].store.models["ctr"]
    stride = model.tables_by_id[cluster.model.tables["item"].id].stride
    allowed = None if rows is None else Capacity(model.memory_bytes + rows * stride, "least_recently_updated")
    cluster.nodes[SMALL].capacity = allowed
    cluster.crash(SMALL)
    cluster.run(1_000)
    cluster.restart(SMALL)
    return cluster.nodes[SMALL].store.models["ctr"]


@pytest.mark.parametrize("sync", ["push", "leaders"])
def test_a_node_that_is_given_more_memory_becomes_complete_again(sync: str) -> None:
    cluster = running(13, PRESETS[sync])
    before = contents(cluster.nodes[SMALL].store, "ctr")
    gone = [key for _, key in newest(cluster).keys() - before.keys()]
    kept = [key for _, key in before]
    # Deleted and forgotten everywhere while it is away: rows that it dropped, and rows that it has.
    deleted = [*gone[:20], *kept[:20]]
    cluster.crash(SMALL)
    cluster.publish("us-1", "item", deleted, delete=True)
    cluster.run(1_000)
    cluster.nodes[SMALL].capacity = None
    cluster.restart(SMALL)
    model = cluster.nodes[SMALL].store.models["ctr"]
    assert not model.incomplete.any()
    assert model.lookup("item", np.array(kept, np.uint64))[1].all()  # what is here is read meanwhile
    cluster.run(60_000)
    everything = contents(cluster.nodes["us-1"].store, "ctr")
    assert len(everything) == ROWS - 40  # without tombstones
    assert contents(cluster.nodes[SMALL].store, "ctr") == everything
    assert Watch(cluster).check_converged() == ""
    cluster.crash("us-1")
    cluster.crash("eu-2")
    cluster.add("eu-9", "eu", seeds=[SMALL])
    cluster.run(30_000)
    assert contents(cluster.nodes["eu-9"].store, "ctr") == everything  # and others may rely on it


def test_who_has_no_room_to_speak_of_does_not_begin_anew() -> None:
    cluster = running(14)
    lacking = cluster.nodes[SMALL].store.models["ctr"].incomplete.copy()
    vector = cluster.nodes[SMALL].store.models["ctr"].vector.copy()
    model = restart_with(cluster, 5)
    assert model.incomplete.tolist() == lacking.tolist()
    assert (model.vector >= vector).all()


def test_who_begins_anew_with_too_little_room_lacks_some_again() -> None:
    cluster = running(15)
    before = len(contents(cluster.nodes[SMALL].store, "ctr"))
    model = restart_with(cluster, 400)
    assert not model.incomplete.any()
    cluster.run(20_000)
    assert model.incomplete.any()
    kept, everything = contents(cluster.nodes[SMALL].store, "ctr"), newest(cluster)
    assert before < len(kept) < ROWS
    assert kept.items() <= everything.items()
    assert model.capacity is not None
    assert model.memory_bytes <= model.capacity.bytes
    assert Watch(cluster).check_converged() == ""


def test_an_answer_that_cannot_be_completed_is_redirected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a stream had selected are evicted before it gets to them."""
    cluster = running(17)
    monkeypatch.setattr(PullAnswers, "_complete", lambda *_: Completion.GIVE_UP)
    machine = cluster.nodes["eu-2"].machine
    assert machine is not None
    keyspace = machine._core.keyspaces[cluster.model.id]
    link = machine._core.link(SMALL)
    assert link is not None
    small = cluster.nodes[SMALL].machine
    assert small is not None
    question = small._pull._question(small._core.keyspaces[cluster.model.id], 77)
    machine._core.effects = []
    machine._pull.answers.on_request(link, question, cluster.now())
    machine._pull.outboxes[SMALL].pump(machine._core, link)
    told = [effect.message for effect in machine._core.effects if isinstance(effect, m.Send)]
    assert m.Incomplete(keyspace.replica.keyspace, 77) in told


def test_a_writer_does_not_begin_anew() -> None:
    cluster = running(16)
    model = cluster.nodes["us-1"].store.models["ctr"]
    model.incomplete[:] = True
    assert model.begin_anew() == 0
    assert model.vector.any()


def evicting(cluster: VirtualCluster, name: str) -> Eviction:
    eviction = cluster.nodes[name].store.models["ctr"].eviction
    assert eviction is not None
    return eviction


def test_nodes_that_evict_do_not_count_on_each_other() -> None:
    """Two of them might drop the same row at the same moment."""
    cluster = VirtualCluster(11)
    cluster.add("us-1", "us", "train")
    for name in (SMALL, "eu-2"):
        cluster.add(name, "eu", seeds=["us-1"])
    cluster.run(3_000)
    publish(cluster, 1.0, 0, 500)
    cluster.run(2_000)
    for name in (SMALL, "eu-2"):
        limit(cluster, name, 10_000)
    cluster.run(2_000)
    assert evicting(cluster, SMALL).backed
    assert evicting(cluster, "eu-2").backed
    cluster.crash("us-1")
    cluster.run(20_000)
    assert not evicting(cluster, SMALL).backed
    assert not evicting(cluster, "eu-2").backed


def test_who_has_not_caught_up_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = VirtualCluster(12)
    cluster.add("us-1", "us", "train")
    cluster.add(SMALL, "eu", seeds=["us-1"])
    cluster.run(3_000)
    publish(cluster, 1.0, 0, 500)
    cluster.run(2_000)
    limit(cluster, SMALL, 10_000)
    cluster.crash("us-1")
    monkeypatch.setattr(Pull, "ask", lambda *_: None)
    cluster.add("eu-3", "eu", seeds=[SMALL])
    cluster.run(20_000)
    assert contents(cluster.nodes["eu-3"].store, "ctr") == {}
    assert not evicting(cluster, SMALL).backed
    monkeypatch.undo()
    cluster.run(5_000)
    assert len(contents(cluster.nodes["eu-3"].store, "ctr")) == 500
    until = evicting(cluster, SMALL).until
    newest = max(stamp for stamp, _ in contents(cluster.nodes[SMALL].store, "ctr").values())
    assert until[newest & WRITER_MASK] >= newest


def test_what_a_peer_says_of_itself_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = VirtualCluster(10)
    cluster.add("us-1", "us", "train")
    cluster.add("eu-2", "eu", seeds=["us-1"])
    cluster.run(3_000)
    machine = cluster.nodes["us-1"].machine
    assert machine is not None
    core, pull = machine._core, machine._pull
    (link,) = core.links.values()
    for keyspace in (12_345, cluster.model.id):
        pull.on_incomplete(link, m.Incomplete(keyspace, 7), cluster.now())
    assert list(core.incomplete) == [(link.boot, cluster.model.id)]  # of keyspaces that are not here nothing is kept
    monkeypatch.setattr("p2p.pulling.incomplete.INCOMPLETE_MAX", 3)
    for boot in range(10):
        note_incomplete(core, boot, 5)
    assert list(core.incomplete) == [(7, 5), (8, 5), (9, 5)]
