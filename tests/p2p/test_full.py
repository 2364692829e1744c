"""Nodes whose memory has no room for what comes (decision 0036)."""

from unittest import mock

import numpy as np
import pytest

from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.core import Keyspace
from p2p.errors import FullError
from p2p.paper.sync import PRESETS, PUSH, SyncOptions
from p2p.pulling import full
from p2p.replica import Applied
from sim_cluster.checkers import Watch, check_converged, check_knowledge, contents
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import little_credit
from tests.p2p.chaos import at_rest, check_claims
from tests.p2p.presets import quick_first
from tests.small_memory import SmallMemory

HELD = range(20)
# The first pages of a table hold 900 rows.
MANY = range(1_000, 6_000)


def start(small: str, sync: SyncOptions = PUSH, seed: int = 1) -> tuple[VirtualCluster, SmallMemory]:
    """Four nodes, of which one has a memory that can be filled."""
    cluster, memory = VirtualCluster(seed, sync=sync), SmallMemory()
    for name in ("t1", "eu1", "us1", "us2"):
        store = memory.store() if name == small else None
        cluster.add(name, name[:2], "train" if name == "t1" else "serve", [] if name == "t1" else ["t1"], store=store)
    cluster.run(5_000)
    cluster.publish("t1", "item", HELD, 1.0)
    at_rest(cluster)
    return cluster, memory


def alarms(cluster: VirtualCluster, name: str) -> list[m.Note]:
    return [note for note in cluster.nodes[name].notes if note.name == "memory_full"]


def full_ms(cluster: VirtualCluster, name: str) -> int | None:
    node = cluster.nodes[name]
    assert node.machine is not None, node.fatal
    return node.machine.status(cluster.now_of(node)).keyspaces[0].full_ms


def full_for_a_while(sync: SyncOptions, small: str = "us1") -> None:
    """A replica's memory is full for two minutes in which rows come; then there is room."""
    cluster, memory = start(small, sync)
    watch, node = Watch(cluster), cluster.nodes[small]
    memory.fill()
    for begin in range(0, len(MANY), 500):
        assert cluster.publish("t1", "item", MANY[begin : begin + 500], 2.0)
        cluster.run(100)
        assert watch.check() == ""
    assert cluster.publish("t1", "item", HELD, 3.0)  # rows that are there
    for _ in range(30):
        cluster.run(4_000)
        assert check_knowledge(cluster, node) == ""
    check_claims(cluster)
    assert watch.check() == ""
    assert node.machine is not None
    assert node.fatal == ""
    counters = node.machine.counters
    refused = counters.batches_refused_full + counters.answers_refused_full
    assert refused, "it was not full"
    assert counters.answers_refused_full <= 16, "it asks in vain all the time"
    assert 1 <= len(alarms(cluster, small)) <= 3
    assert "shared memory is full" in str(alarms(cluster, small)[0].fields)
    assert (full_ms(cluster, small) or 0) > 100_000
    held = contents(node.store, "ctr")
    assert len(held) < len(MANY), "it has them all: the test fills nothing"
    if sync.push:
        rows, _ = node.store.models["ctr"].lookup("item", np_keys(HELD))
        assert rows[:, 0].tolist() == [3.0] * len(HELD), "what is there is not updated"
    memory.limit = 1 << 40
    # Looked at once a second: each look reads every row of every node.
    limit_ms = full.PAUSE_MS_MAX + 20_000
    assert cluster.run_until(lambda: check_converged(cluster) == "", limit_ms, step_ms=1_000), check_converged(cluster)
    check_claims(cluster)
    assert watch.check_converged() == ""
    cluster.run(3_000)
    assert full_ms(cluster, small) is None
    assert full_ms(cluster, "us2") is None


@pytest.mark.parametrize("preset", quick_first(PRESETS))
def test_a_replica_that_is_full_lives_claims_nothing_and_recovers(preset: str) -> None:
    full_for_a_while(PRESETS[preset])


def test_updates_of_what_is_held_go_on_while_new_rows_are_refused() -> None:
    cluster, memory = start("us1")
    memory.fill()
    cluster.publish("t1", "item", MANY, 2.0)
    cluster.run(500)
    cluster.publish("t1", "item", HELD, 3.0)
    cluster.run(500)
    rows, _ = cluster.nodes["us1"].store.models["ctr"].lookup("item", np_keys(HELD))
    assert rows[:, 0].tolist() == [3.0] * len(HELD)
    check_claims(cluster)


def held_while_busy() -> str:
    """New rows find no room, over links in state mode; says which of those that are there are old after seven seconds."""
    with little_credit():
        cluster, memory = start("us1")
        memory.fill()
        cluster.options = NetworkOptions(1, 2, links={"t1/us": LinkOptions(shared_bytes_per_ms=40)})
        for number in range(60):
            assert cluster.publish("t1", "item", range(2_000 + 100 * number, 2_100 + 100 * number), 2.0)
            cluster.run(20)
        keyspace = next(iter(cluster.nodes["us1"].machine._core.keyspaces.values()))  # type: ignore[union-attr]
        assert keyspace.feeds, "no link towards it is in state mode"
        assert keyspace.full is not None, "it is not full"
        assert cluster.publish("t1", "item", HELD, 3.0)
        cluster.run(7_000)
        check_claims(cluster)
        rows, _ = cluster.nodes["us1"].store.models["ctr"].lookup("item", np_keys(HELD))
        return ", ".join(str(key) for key, value in zip(HELD, rows[:, 0].tolist(), strict=True) if value != 3.0)


def test_so_they_do_where_rows_come_by_priority() -> None:
    assert held_while_busy() == ""


def test_a_full_node_that_takes_no_rows_by_priority_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "held", lambda keyspace, columns: ())
    assert held_while_busy() != ""


def np_keys(keys: range) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(keys, np.uint64)


def test_a_publisher_of_a_full_node_is_refused_whole_and_goes_on_later() -> None:
    cluster, memory = start("t1")
    watch, node = Watch(cluster), cluster.nodes["t1"]
    model = node.store.models["ctr"]
    memory.fill()
    before, last = model.table_stats()["item"].rows, model.last_stamp
    pending = model.stamp_max
    assert cluster.publish("t1", "item", [*HELD, *MANY], 2.0) == 0
    refused = list(node.replies.values())[-1]
    assert isinstance(refused, m.Refused)
    assert "shared memory is full" in refused.reason
    assert refused.reason.endswith("nothing was published")
    assert node.machine is not None
    assert node.machine.counters.steps_refused_full == 1
    assert (model.table_stats()["item"].rows, model.last_stamp, model.stamp_max) == (before, last, pending)
    rows, _ = model.lookup("item", np_keys(HELD))
    assert rows[:, 0].tolist() == [1.0] * len(HELD), "a part of the step is there"
    assert cluster.publish("t1", "item", HELD, 3.0)
    at_rest(cluster)
    memory.limit = 1 << 40
    assert cluster.publish("t1", "item", MANY, 4.0)
    at_rest(cluster)
    assert watch.check_converged() == ""


def test_what_is_deleted_stays_until_there_is_memory_for_the_floor() -> None:
    cluster, memory = VirtualCluster(3), SmallMemory()
    cluster.collect_ms = 1_000
    for name in ("t1", "us1"):
        store = memory.store() if name == "us1" else None
        cluster.add(name, name, "train" if name == "t1" else "serve", [] if name == "t1" else ["t1"], store=store)
    cluster.run(5_000)
    cluster.publish("t1", "item", HELD, 1.0)
    at_rest(cluster)
    memory.fill()
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    cluster.run(20_000)
    assert memory.asked, "nothing was collected"
    assert cluster.nodes["us1"].store.models["ctr"].table_stats()["item"].tombstones == 10
    memory.limit = 1 << 40
    assert cluster.run_until(lambda: not cluster.nodes["us1"].store.models["ctr"].table_stats()["item"].tombstones, 60_000)


# --- broken on purpose ------------------------------------------------------------------------------------------------------


def test_without_reservation_the_scenario_fails() -> None:
    with mock.patch.object(ModelStore, "reserve"), pytest.raises(FullError):
        test_a_publisher_of_a_full_node_is_refused_whole_and_goes_on_later()


@pytest.mark.parametrize("preset", quick_first(PRESETS))
def test_claiming_what_found_no_room_is_noticed(preset: str) -> None:
    apply = ModelStore.apply

    def apply_what_fits(self: ModelStore, columns: object, stamp: int) -> object:
        try:
            return apply(self, columns, stamp)  # type: ignore[arg-type]
        except FullError:
            return Applied()

    with (
        mock.patch.object(ModelStore, "reserve"),
        mock.patch.object(ModelStore, "apply", apply_what_fits),
        pytest.raises(AssertionError, match=r"eu1|us1|claims|lacks|row"),
    ):
        full_for_a_while(PRESETS[preset])


def test_pulling_without_a_pause_is_noticed() -> None:
    def never(keyspace: Keyspace, now: m.Now) -> bool:
        return False

    with mock.patch.object(full, "pauses", never), pytest.raises(AssertionError, match="in vain"):
        full_for_a_while(PUSH)
