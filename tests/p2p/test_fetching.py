"""Rows that a node dropped for want of memory come back by key when readers ask for them (R11)."""

import random
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from ekko.model import table_id
from ekko.store import capacity
from ekko.store.capacity import Capacity
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p import wire
from p2p.errors import RemoteProtocolError
from p2p.machine import Machine
from p2p.pulling.fetching import SILENCE_MS
from p2p.pulling.whole import floor_of
from p2p.replica import RowColumns, TableKeys
from p2p.stamps import WRITER_MASK, WRITERS_MAX
from sim_cluster.checkers import Watch, contents
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.test_incomplete import ROWS, SMALL, newest, running
from tests.seeds import seeds

ITEM = table_id("item")


def model_of(cluster: VirtualCluster, name: str = SMALL) -> ModelStore:
    return cluster.nodes[name].store.models["ctr"]


def machine_of(cluster: VirtualCluster, name: str = SMALL) -> Machine:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine


def ask(cluster: VirtualCluster, keys: list[int]) -> None:
    """Readers of the small node asked for these keys."""
    now_s = cluster.now().monotonic_ms / 1000
    model_of(cluster).fetching.note_asked(ITEM, np.array(keys, np.uint64), now_s)


def lacking(cluster: VirtualCluster) -> list[int]:
    kept = contents(cluster.nodes[SMALL].store, "ctr")
    return [key for table, key in newest(cluster) if (table, key) not in kept]


def give_room(cluster: VirtualCluster, rows: int) -> None:
    model = model_of(cluster)
    stride = model.tables_by_id[ITEM].stride
    model.capacity = Capacity(model.memory_bytes + rows * stride, "least_recently_updated")


def test_what_is_asked_for_comes_back() -> None:
    cluster = running(21)
    give_room(cluster, 300)
    gone = lacking(cluster)
    assert len(gone) > 60
    ask(cluster, [*gone[:50], 999_999])  # one that nobody has
    cluster.run(2_000)
    kept = contents(cluster.nodes[SMALL].store, "ctr")
    everything = newest(cluster)
    assert kept.items() <= everything.items()
    assert all((ITEM, key) in kept for key in gone[:50])
    assert not any((ITEM, key) in kept for key in gone[50:])
    assert machine_of(cluster).counters.rows_fetched == 50
    assert model_of(cluster).memory_bytes <= model_of(cluster).capacity.bytes  # type: ignore[union-attr]
    ask(cluster, gone[:50])
    cluster.run(2_000)
    assert machine_of(cluster).counters.keys_wanted == 51  # none of them twice
    cluster.publish("us-1", "item", gone[:50], 7.0)
    cluster.run(2_000)
    assert contents(cluster.nodes[SMALL].store, "ctr").items() <= newest(cluster).items()
    assert Watch(cluster).check_converged() == ""


def test_others_make_room_for_it() -> None:
    cluster = running(22)
    cluster.run(15_000)
    gone = lacking(cluster)
    model = model_of(cluster)
    assert model.eviction is not None
    before = model.eviction.evicted, model.memory_bytes
    ask(cluster, gone[:40])
    cluster.run(2_000)
    assert machine_of(cluster).counters.rows_fetched == 40
    assert model.eviction.evicted > before[0]
    assert model.memory_bytes == before[1]
    assert contents(cluster.nodes[SMALL].store, "ctr").items() <= newest(cluster).items()


def question(cluster: VirtualCluster, keys: list[int]) -> m.KeysWanted:
    """As the small node would ask."""
    machine, model = machine_of(cluster), model_of(cluster)
    keyspace = machine._core.keyspaces[model.keyspace]
    wanted = np.array(keys, np.uint64)
    floor = floor_of(keyspace, np.unique(model.shards_of(wanted)).astype(np.uint32))
    assert floor is not None
    return m.KeysWanted(model.keyspace, 5, floor, (TableKeys(ITEM, wanted),), machine._core.retired_digest)


def answers(cluster: VirtualCluster, wanted: m.KeysWanted) -> list[m.KeysFound]:
    """What another node says to it."""
    machine = machine_of(cluster, "eu-2")
    link = machine._core.link(SMALL)
    assert link is not None
    machine._core.effects = []
    machine._fetching.on_wanted(link, wanted)
    sent = [effect.message for effect in machine._core.effects if isinstance(effect, m.Send)]
    return [message for message in sent if isinstance(message, m.KeysFound)]


def test_who_knows_less_than_the_asker_does_not_answer() -> None:
    cluster = running(23)
    gone = lacking(cluster)
    wanted = question(cluster, gone[:20])
    (found,) = answers(cluster, wanted)
    assert found.row_count == 20
    stamps = wanted.floor.stamps.copy()
    stamps[0, stamps[0].argmax()] += np.uint64(50_000 << 22)  # something was dropped here that has not reached the other
    ahead = replace(wanted, floor=replace(wanted.floor, stamps=stamps))
    assert answers(cluster, ahead) == []
    assert machine_of(cluster, "eu-2").counters.fetches_refused == 1


def test_who_dropped_rows_there_too_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running(24)
    wanted = question(cluster, lacking(cluster)[:20])
    model_of(cluster, "eu-2").incomplete[:] = True
    assert answers(cluster, wanted) == []


def test_without_credit_there_is_no_answer() -> None:
    cluster = running(24)
    wanted = question(cluster, lacking(cluster)[:20])
    link = machine_of(cluster, "eu-2")._core.link(SMALL)
    assert link is not None
    link.next_envelope(1 << 30)
    assert answers(cluster, wanted) == []


def test_an_answer_is_bounded_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running(25)
    wanted = question(cluster, lacking(cluster)[:40])
    (every,) = answers(cluster, wanted)
    monkeypatch.setattr("p2p.pulling.fetching.ANSWER_BYTES_MAX", every.payload_bytes // 4)
    (some,) = answers(cluster, wanted)
    assert 8 <= some.row_count <= 10


@pytest.mark.parametrize("wrong", ["shard", "floor", "unasked", "deleted"])
def test_nonsense_is_refused_and_changes_nothing(wrong: str) -> None:
    cluster = running(26)
    gone = lacking(cluster)
    wanted = question(cluster, gone[:20])
    if wrong in ("shard", "floor"):
        shards = wanted.floor.shards + np.uint32(1_000) if wrong == "shard" else wanted.floor.shards[:1]
        floor = replace(wanted.floor, shards=shards, stamps=wanted.floor.stamps[: len(shards)])
        with pytest.raises(RemoteProtocolError):
            answers(cluster, replace(wanted, floor=floor))
        return
    (found,) = answers(cluster, wanted)
    machine, before = machine_of(cluster), contents(cluster.nodes[SMALL].store, "ctr")
    link = machine._core.link("eu-2")
    assert link is not None
    ask(cluster, gone[1:20])
    machine._fetching.on_beat(cluster.now())
    (asked,) = machine._fetching._asked.values()
    column = found.columns[0]
    if wrong == "deleted":
        column = replace(column, rows=column.rows[:0])
    machine._fetching._asked[found.keyspace] = replace(asked, boot=link.boot, request=found.request)
    with pytest.raises(RemoteProtocolError):
        machine._fetching.on_found(link, replace(found, columns=(column,)), cluster.now())
    assert contents(cluster.nodes[SMALL].store, "ctr") == before


def test_a_late_answer_is_not_taken_nor_one_to_an_earlier_question() -> None:
    cluster = running(27)
    give_room(cluster, 300)
    gone = lacking(cluster)
    (found,) = answers(cluster, question(cluster, gone[:20]))
    machine = machine_of(cluster)
    link = machine._core.link("eu-2")
    assert link is not None
    for late_ms, request, rows in ((SILENCE_MS, 0, 0), (0, 1, 0), (0, 0, 20)):
        model_of(cluster).fetching._asked.clear()
        ask(cluster, gone[:20])
        machine._fetching._asked.clear()
        now = cluster.now()
        machine._fetching.on_beat(now)
        (asked,) = machine._fetching._asked.values()
        machine._fetching._asked[found.keyspace] = replace(asked, boot=link.boot, request=found.request + request)
        machine._fetching.on_found(link, found, replace(now, monotonic_ms=now.monotonic_ms + late_ms))
        assert machine.counters.rows_fetched == rows


def test_what_was_dropped_meanwhile_does_not_come_back_older(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running(28)
    gone = lacking(cluster)
    (found,) = answers(cluster, question(cluster, gone[:20]))
    model = model_of(cluster)
    model.fetching._asked.clear()
    ask(cluster, gone[:20])
    assert sum(len(one.keys) for one in model.take_wanted(1_000)) == 20
    # A newer version of one of them comes, finds no room, and is claimed.
    monkeypatch.setattr(capacity, "room_for", lambda *_: 0)
    model.note_backed(np.zeros(WRITERS_MAX, np.uint64))
    key = np.array(gone[:1], np.uint64)
    stamp = int(found.columns[0].stamps.max()) + (1 << 40)  # type: ignore[union-attr]
    model.apply([RowColumns(ITEM, key, found.columns[0].rows[:1])], stamp)
    assert model.table(ITEM).resolve(key)[0] < 0
    monkeypatch.setattr(capacity, "room_for", lambda *_: 1_000)
    assert model.take_back(found.columns).written == 19
    assert model.table(ITEM).resolve(key)[0] < 0


# --- under way ----------------------------------------------------------------------------------------------------------


def older_than_claimed(cluster: VirtualCluster) -> int:
    """Rows of the small node of which its vector covers a newer version (invariant 3)."""
    model = model_of(cluster)
    kept = contents(cluster.nodes[SMALL].store, "ctr")
    shards = model.shards_of(np.arange(ROWS, dtype=np.uint64)).tolist()
    older = {
        write.key
        for write in cluster.history
        if (row := kept.get((ITEM, write.key))) is not None
        and row[0] < write.stamp <= int(model.vector[shards[write.key], write.stamp & WRITER_MASK])
    }
    return len(older)


@mock.patch("ekko.store.eviction.QUIET_MS", 300)
def churn(seed: int) -> str:
    """Writes, deletes and questions in a network that delays, while who could answer is behind; what is wrong afterwards."""
    cluster = running(seed)
    rng = random.Random(seed)
    cluster.options = NetworkOptions(loss_probability=0.02, tail_probability=0.3, tail_ms=300)
    for _ in range(40):
        cluster.cut = {("us-1", "eu-2")} if rng.random() < 0.5 else set()
        for _ in range(4):
            keys = rng.sample(range(ROWS), 100)
            cluster.publish("us-1", "item", keys, rng.random())
            if rng.random() < 0.3:
                cluster.publish("us-1", "item", rng.sample(range(ROWS), 50), delete=True)
            cluster.run(rng.choice((20, 100, 300)))
        model_of(cluster).fetching._asked.clear()
        ask(cluster, rng.sample(range(ROWS), 600))
        cluster.run(rng.choice((20, 300, 600)))
        if older := older_than_claimed(cluster):
            return f"{older} rows are older than what is claimed"
    cluster.cut, cluster.options = set(), NetworkOptions()
    cluster.run(15_000)
    if machine_of(cluster).counters.rows_fetched < 30:
        return "nothing was fetched"
    kept, others = (contents(cluster.nodes[name].store, "ctr") for name in (SMALL, "us-1"))
    wrong = [key for key, row in kept.items() if row[1] and others.get(key) != row]
    return f"{len(wrong)} rows that nobody else has" if wrong else Watch(cluster).check_converged()


@pytest.mark.parametrize("seed", seeds(1, 3))
def test_what_is_held_is_the_newest_whatever_is_asked_for(seed: int) -> None:
    assert churn(seed) == ""


@pytest.mark.parametrize("bug", ["who knows less answers", "what goes meanwhile is not noted"])
def test_planted_bugs_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "who knows less answers":
        monkeypatch.setattr("p2p.pulling.fetching.covers", lambda keyspace, floor: True)
    else:
        monkeypatch.setattr("ekko.store.fetching.Fetching.note_gone", lambda self, table, keys: None)
    assert any("older" in churn(seed) for seed in range(4))


def test_the_messages_are_of_version_2() -> None:
    assert wire.since(m.KeysWanted) == wire.since(m.KeysFound) == 2
