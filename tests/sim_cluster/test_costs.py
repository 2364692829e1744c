"""Work takes time in a cluster with a cost model: nodes do one thing after the other, and what is narrow is shared."""

import random

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.paper.sync import CACHE, VECTOR
from p2p.pushing.groups import LINGER_MS
from p2p.replica import RowColumns
from sim_cluster.costs import COSTS, CostTable, VirtualCpus
from sim_cluster.network import LinkOptions, Network, NetworkOptions, pair_of
from sim_cluster.virtual import VirtualCluster

MODEL = ModelSpec("ctr", 8, {"item": TableSpec("item", 4)})
CALM = NetworkOptions(1, 1)


def costs(**some: float) -> CostTable:
    return CostTable(**{name: some.get(name, 0.0) for name in COSTS})


def pair(cpus: VirtualCpus | None, sync: object = None) -> VirtualCluster:
    cluster = VirtualCluster(1, CALM, MODEL, cpu=cpus, **({} if sync is None else {"sync": sync}))
    cluster.add("a", "eu", "train")
    cluster.add("b", "eu", seeds=["a"])
    assert cluster.run_until(lambda: all(node.machine.status(cluster.now()).peers for node in cluster.nodes.values()))
    cluster.run(2_000)
    return cluster


def publish(cluster: VirtualCluster, keys: range) -> None:
    rows = np.zeros((len(keys), 4), np.float32).view(np.uint8)
    columns = (RowColumns(MODEL.tables["item"].id, np.array(keys, np.uint64), rows),)
    cluster.request("a", lambda number: m.PublishRequested(number, MODEL.id, columns))


def test_applying_takes_time_at_both_ends_and_for_each_row() -> None:
    seen: list[tuple[str, int, float]] = []
    cpus = VirtualCpus(costs(apply_row=1e6), observer=lambda node, _, keys, __, at_ms: seen.append((node, len(keys), at_ms)))
    cluster = pair(cpus)
    begin_ms = cluster.now_ms
    publish(cluster, range(10))  # 1 ms a row
    publish(cluster, range(10, 30))
    cluster.run(200)
    at_ms = {(node, rows): done_ms - begin_ms for node, rows, done_ms in seen}
    assert at_ms["a", 10] == pytest.approx(10, abs=1)
    assert at_ms["a", 20] == pytest.approx(30, abs=1)  # after the first, though it was asked for at the same moment
    assert at_ms["b", 10] == pytest.approx(21, abs=2)  # it left when its origin was done with it
    assert at_ms["b", 20] == pytest.approx(51, abs=2)


def test_a_row_stands_for_many_and_cores_share_its_work_but_a_message_is_one() -> None:
    for rows_per_row, cores, row_ms in ((1.0, 1, 1.0), (50.0, 1, 50.0), (50.0, 10, 5.0)):
        cpus = VirtualCpus(costs(apply_row=1e6, send=1e6), rows_per_row, cores)
        cpus.begin("a", 0.0)
        cpus.charge("apply_row", 2)
        assert cpus.ends_ms == pytest.approx(2 * row_ms)
        cpus.charge("send")
        assert cpus.ends_ms == pytest.approx(2 * row_ms + 1)


def test_what_came_to_a_busy_node_is_handled_in_order_and_local_requests_first() -> None:
    cpus = VirtualCpus(costs(batch=5e7, apply_row=1e5))
    cluster = pair(cpus)
    for begin in range(0, 50, 10):
        publish(cluster, range(begin, begin + 10))
        cluster.run(LINGER_MS)
    cluster.run(400)
    machine = cluster.nodes["b"].machine
    assert machine is not None
    assert machine.counters.batches_received >= 5
    assert len(cluster.nodes["b"].store.models["ctr"].changed_since(np.zeros((8, 4096), np.uint64))[0].slots) == 50
    assert cpus.busy_ms["b"] >= 250


def test_a_scan_costs_what_there_is_and_the_update_cache_what_changed() -> None:
    spent = {}
    for name, sync in (("vector", VECTOR), ("cache", CACHE)):
        cpus = VirtualCpus(costs(scan_row=1e3, walk_entry=1e3, select_row=1e3))
        cluster = pair(cpus, sync)
        publish(cluster, range(500))
        cluster.run(3_000)
        cpus.spent_ms.clear()
        cluster.run(3_000)
        spent[name] = dict(cpus.spent_ms)
    assert spent["vector"]["scan_row"] > 10 * 500 * 1e3 / 1e6  # some thirty answers, each a look at all 500 rows
    assert "scan_row" not in spent["cache"]


def test_a_node_that_restarts_while_busy_forgets_what_waited() -> None:
    cpus = VirtualCpus(costs(batch=5e7))
    cluster = pair(cpus)
    for begin in range(0, 50, 10):
        publish(cluster, range(begin, begin + 10))
    cluster.run(100)
    assert cluster.nodes["b"].waiting
    cluster.crash("b")
    assert not cluster.nodes["b"].waiting
    cluster.run(100)
    cluster.restart("b")
    cluster.run(20_000)
    rows = cluster.nodes["b"].store.models["ctr"].changed_since(np.zeros((8, 4096), np.uint64))
    assert sum(len(selection.slots) for selection in rows) == 50


def test_a_card_and_a_pipe_are_shared() -> None:
    pipe = {pair_of("eu", "us"): LinkOptions(delay_ms=10, shared_bytes_per_ms=10.0)}
    options = NetworkOptions(0, 0, card_bytes_per_ms=100.0, links=pipe)
    network = Network(random.Random(1))
    # Two nodes of one region send across: the pipe takes one after the other. 1,000 bytes are 100 ms of the pipe, 10 of a card.
    assert network.arrivals(options, ("a", "x"), ("eu", "us"), 1_000, 0) == [110]
    assert network.arrivals(options, ("b", "y"), ("eu", "us"), 1_000, 0) == [210]
    # Back, and within a region, the way is free, but for the sender's own card.
    assert network.arrivals(options, ("x", "a"), ("us", "eu"), 1_000, 0) == [110]
    assert network.arrivals(options, ("a", "b"), ("eu", "eu"), 1_000, 0) == [20]
    assert network.arrivals(options, ("c", "b"), ("eu", "eu"), 1_000, 0) == [10]


def test_messages_about_members_hardly_count_on_links_that_are_slower_for_a_smaller_model() -> None:
    cpus = VirtualCpus(costs(), rows_per_row=1_000.0)
    rows = RowColumns(1, np.zeros(10, np.uint64), np.zeros((10, 32), np.uint8), np.zeros(10, np.uint64))
    nothing = np.empty(0, np.uint16), np.empty((8, 0), np.uint64), np.empty(0, np.uint64)
    reply = m.PullReply(1, 1, 0, False, (rows,), *nothing)
    assert cpus.bytes_of(reply, [bytes(48), bytes(480 + 52)]) == pytest.approx(480 + 0.1)
    assert cpus.bytes_of(m.Leave("a"), [bytes(48), bytes(52)]) == pytest.approx(0.1)
