"""The virtual cluster itself: what its network, its clocks and its kills do to messages and processes."""

import random

import numpy as np
import pytest

from p2p.stamps import WRITERS_MAX
from sim_cluster.checkers import contents
from sim_cluster.network import QUEUE_BYTES_MAX, LinkOptions, Network, NetworkOptions, pair_of
from sim_cluster.virtual import VirtualCluster

AB, REGIONS = ("a", "b"), ("eu", "us")


def arrivals(
    options: NetworkOptions, count: int = 200, size: int = 100, at_ms: int = 0, seed: int = 1
) -> list[list[int] | None]:
    network = Network(random.Random(seed))
    return [network.arrivals(options, AB, REGIONS, size, at_ms) for _ in range(count)]


def pair(options: NetworkOptions | None = None, seed: int = 1) -> VirtualCluster:
    cluster = VirtualCluster(seed, options or NetworkOptions())
    cluster.add("t1", "eu", "train")
    cluster.add("s1", "us", seeds=["t1"])
    cluster.run(5_000)
    return cluster


def held(cluster: VirtualCluster, name: str) -> int:
    return len(contents(cluster.nodes[name].store, "ctr"))


# --- the network -------------------------------------------------------------------------------------------------------------


def test_a_link_keeps_its_order_unless_told_otherwise() -> None:
    in_order = [times[0] for times in arrivals(NetworkOptions(delay_ms_max=50)) if times]
    assert in_order == sorted(in_order)
    overtaking = [times[0] for times in arrivals(NetworkOptions(delay_ms_max=50, reorder_probability=1.0)) if times]
    assert overtaking != sorted(overtaking)


def test_delays_of_a_region_and_of_a_pair_of_regions_add_up() -> None:
    plain = NetworkOptions(2, 2, region_delay_ms=30, links={pair_of("us", "eu"): LinkOptions(delay_ms=100)})
    assert arrivals(plain, 1, at_ms=7) == [[7 + 2 + 30 + 100]]
    assert Network(random.Random(1)).arrivals(plain, AB, ("eu", "eu"), 100, 7) == [9]


def test_messages_are_lost_repeated_and_late_as_often_as_asked() -> None:
    lost = [times for times in arrivals(NetworkOptions(loss_probability=0.25), 2_000) if times == []]
    assert 400 < len(lost) < 600
    twice = [
        times for times in arrivals(NetworkOptions(repeat_probability=0.25), 2_000) if times is not None and len(times) == 2
    ]
    assert 400 < len(twice) < 600
    late = NetworkOptions(1, 1, tail_probability=0.25, tail_ms=500.0, reorder_probability=1.0)
    assert 300 < sum(times is not None and times[0] > 50 for times in arrivals(late, 2_000)) < 600


def test_a_link_with_a_rate_takes_its_time_and_refuses_what_does_not_fit() -> None:
    slow = NetworkOptions(1, 1, rate_bytes_per_ms=10.0)
    assert arrivals(slow, 3, size=100) == [[11], [21], [31]]
    answers = arrivals(slow, 3, size=QUEUE_BYTES_MAX)
    assert answers[0] is not None
    assert answers[2] is None


# --- processes ---------------------------------------------------------------------------------------------------------------


def test_nothing_passes_a_cut_and_it_is_one_way() -> None:
    cluster = pair()
    delivered = cluster.delivered
    cluster.cut = {("t1", "s1")}
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    assert held(cluster, "s1") == 0
    assert cluster.delivered > delivered, "nothing came back either"
    cluster.cut = set()
    cluster.run(3_000)
    assert held(cluster, "s1") == 1


def test_what_comes_for_a_paused_process_waits_for_it() -> None:
    cluster = pair()
    cluster.pause("s1")
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(500)
    assert held(cluster, "s1") == 0
    cluster.resume("s1")
    cluster.run(1)
    assert held(cluster, "s1") == 1


@pytest.mark.parametrize("afterlife", [0.0, 1.0])
def test_a_message_dies_with_its_process_or_reaches_the_next(afterlife: float) -> None:
    cluster = pair(NetworkOptions(20, 20, afterlife_probability=afterlife))
    cluster.publish("t1", "item", [1], 1.0)
    cluster.crash("s1")
    cluster.run(100)
    cluster.restart("s1")
    cluster.run(5)
    machine = cluster.nodes["s1"].machine
    assert machine is not None
    assert (machine.counters.strangers > 0) == (afterlife > 0)
    cluster.run(3_000)
    assert held(cluster, "s1") == 1


def test_a_wall_clock_jumps_and_the_monotonic_one_goes_on() -> None:
    cluster = pair()
    before = cluster.now_of(cluster.nodes["s1"])
    cluster.shift_clock("s1", -30_000)
    after = cluster.now_of(cluster.nodes["s1"])
    assert (after.monotonic_ms, after.unix_ms) == (before.monotonic_ms, before.unix_ms - 30_000)


def test_a_flipped_bit_is_noticed_by_the_receiver() -> None:
    cluster = pair(NetworkOptions(corrupt_probability=0.3))
    for key in range(20):
        cluster.publish("t1", "item", [key], 1.0)
    cluster.run(5_000)
    assert cluster.nodes["s1"].rejected
    assert cluster.violations == []


@pytest.mark.parametrize("steps", range(5))
def test_a_kill_leaves_what_was_done_and_the_next_process_attaches_to_it(steps: int) -> None:
    cluster = pair()
    assert cluster.publish("t1", "item", [1], 1.0)
    node = cluster.nodes["t1"]
    cluster.kill_within("t1", steps)
    stamp = cluster.publish("t1", "item", range(1, 11), 2.0)
    model = node.store.models["ctr"]
    # Its own record, half of the rows, the others, the end of that; then what is sent, and at last the answer.
    assert node.machine is None
    assert stamp == 0
    assert held(cluster, "t1") == (1 if steps < 2 else 5 if steps < 3 else 10)
    cluster.restart("t1")
    attached = node.store.models["ctr"]
    assert attached is not model
    claimed = int(attached.vector.max())
    rows = attached.scan_since(np.zeros((attached.shards, WRITERS_MAX), np.uint64))
    assert sum(len(selection.slots) for selection in rows) == held(cluster, "t1")
    # R4: what was begun is claimed, whether or not all of it was written.
    assert (claimed > int(cluster.history[0].stamp)) == (steps > 0)
    assert len(cluster.history) == 1
    cluster.run(3_000)
    assert held(cluster, "s1") == held(cluster, "t1")


def test_who_loses_its_memory_loses_what_nobody_else_held() -> None:
    cluster = pair()
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(500)
    cluster.cut = {("t1", "s1")}
    cluster.publish("t1", "item", [2], 2.0)
    cluster.crash("t1")
    cluster.restart("t1", keep_state=False)
    assert [write.key for write in cluster.history] == [1]


def test_a_seed_is_a_trace() -> None:
    faults = NetworkOptions(1, 40, loss_probability=0.1, repeat_probability=0.1, reorder_probability=0.3)
    traces = [pair(faults, seed).trace for seed in (1, 1, 2)]
    assert traces[0] == traces[1] != traces[2]


def test_a_step_that_waited_for_a_writer_id_is_history_once_it_is_acknowledged() -> None:
    """Else a checker knows nothing of its tombstones, and misses the rows that they delete once these are collected."""
    cluster = VirtualCluster(1)
    cluster.add("t1", "home", "train")
    cluster.run(3_000)
    cluster.add("t2", "home", "train", seeds=["t1"])
    cluster.run(50)
    assert not cluster.publish("t2", "item", [3, 1], 2.0, delete=True)
    assert not cluster.history
    cluster.run(500)
    assert [(write.key, write.deleted, write.value) for write in cluster.history] == [(1, True, 2.0), (3, True, 2.0)]
    assert all(write.stamp for write in cluster.history)
