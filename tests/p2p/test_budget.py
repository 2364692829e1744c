"""Budgets between regions: tokens hold the rate, nodes share it fairly, the machine comes back when there are some again."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p import messages as m
from p2p import wire
from p2p.core import FIFO
from p2p.errors import RemoteProtocolError
from p2p.link import links
from p2p.link.budget import ALL, BURST_MS, CLAIM_BYTES, MESSAGE_BYTES, RATE_MIN, Bucket, Budgets, demand, fair_share
from p2p.link.links import Link
from p2p.link.round_trip import RTT_MS_ASSUMED, RTT_MS_MIN, RTT_WINDOW_MS, RoundTrip
from p2p.machine import Machine
from sim_cluster.checkers import Watch
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster

RATE = 100_000.0  # bytes a second


def bucket_of(rate: float = RATE) -> Bucket:
    return Bucket("us", rate / 1_000, rate / 1_000, 0)


# --- the bucket


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50_000)), max_size=60))
def test_over_any_stretch_no_more_leaves_than_the_rate_a_burst_and_one_message(moves: list[tuple[int, int]]) -> None:
    bucket, now_ms, sent = bucket_of(), 0, [(0, 0)]
    for passed_ms, size in moves:
        now_ms += passed_ms
        bucket.advance(now_ms)
        if bucket.has_tokens():
            bucket.take(size)
            sent.append((now_ms, size))
    for (first, (begin_ms, _)), (last, (end_ms, _)) in itertools.combinations(enumerate(sent), 2):
        between = sum(size for _, size in sent[first + 1 : last])  # all but one message
        assert between <= RATE / 1_000 * (end_ms - begin_ms + BURST_MS) + 1e-6


def test_a_message_of_any_size_passes_and_its_debt_is_paid_before_the_next() -> None:
    bucket = bucket_of()
    bucket.advance(1)
    assert bucket.has_tokens()
    bucket.take(1_000_000)
    assert not bucket.has_tokens()
    assert bucket.ready_ms == pytest.approx(10_000, abs=2)
    bucket.advance(bucket.ready_ms - 2)
    assert not bucket.has_tokens()
    bucket.advance(bucket.ready_ms)
    assert bucket.has_tokens()


def test_what_compressing_saved_comes_back_but_never_more_than_a_burst() -> None:
    bucket = bucket_of()
    bucket.advance(1)
    bucket.take(50_000)
    bucket.give_back(45_000)
    assert bucket.used == 5_000
    assert bucket.level == pytest.approx(100 - 5_000)
    bucket.give_back(1_000_000)
    assert bucket.level == RATE / 1_000 * BURST_MS


def test_a_debt_outlives_a_change_of_the_rate() -> None:
    budgets = Budgets("eu")
    assert budgets.set_rate("us", RATE, 0)
    budgets.buckets["us"].take(1_000_000)
    assert not budgets.set_rate("us", 2 * RATE, 0)
    assert budgets.buckets["us"].level < -900_000
    assert budgets.buckets["us"].rate == 2 * RATE / 1_000
    assert budgets.set_rate("us", None, 0)
    assert not budgets.buckets
    assert not budgets.set_rate("eu", RATE, 0), "there is no limit within a region"
    budgets.set_rate("us", 0.0, 0)
    assert budgets.buckets["us"].pair_rate == RATE_MIN / 1_000, "a rate of nothing would never end"


# --- shares


@given(st.floats(1_000, 1e9), st.lists(st.one_of(st.just(ALL), st.integers(0, 1 << 30)), min_size=1, max_size=12))
def test_shares_of_all_that_want_all_are_equal_and_use_the_rate(rate: float, wants: list[int]) -> None:
    greedy = [number for number, want in enumerate(wants) if want == ALL]
    shares = [fair_share(rate, wants[:number] + wants[number + 1 :]) for number in range(len(wants))]
    used = [min(share, want) for share, want in zip(shares, wants, strict=True)]
    assert sum(used) <= rate * (1 + 1e-9)
    if greedy:
        assert sum(used) == pytest.approx(rate)
        assert len({round(shares[number], 3) for number in greedy}) == 1
        assert all(used[number] >= rate / len(wants) * (1 - 1e-9) for number in greedy)


def test_who_was_refused_wants_all_and_others_a_little_more_than_they_used() -> None:
    bucket = bucket_of()
    bucket.advance(1)
    bucket.take(1_000)
    assert demand(bucket, 500) == 2_500
    assert demand(bucket, 500) == 0
    assert not bucket.has_tokens()
    assert demand(bucket, 500) == ALL
    assert demand(bucket, 500) == 0


# --- the link


def link_of(bucket: Bucket | None) -> Link:
    return Link("b", 2, "b:1", "us", own_boot=1, bucket=bucket)


def test_credit_is_the_rate_of_two_round_trips_where_a_rate_is_set() -> None:
    link = link_of(bucket_of())
    assert link.bucket is not None
    assert link.credit_bytes == RATE * 2 * RTT_MS_ASSUMED / 1_000
    link.bucket.advance(1)
    link.next_envelope(1_000)
    link.bucket.advance(81)
    link.on_ack(1, 1)
    assert link.credit_bytes == RATE * 2 * 80 / 1_000
    assert link_of(None).credit_bytes == links.CREDIT_BYTES_MAX


def test_neither_batches_nor_answers_leave_without_tokens() -> None:
    link = link_of(bucket_of())
    assert link.bucket is not None
    link.bucket.advance(1)
    assert link.has_credit()
    assert link.has_credit_for_repairs()
    link.next_envelope(500, claim_bytes=3 * CLAIM_BYTES)
    assert link.bucket.used == 500 + 3 * CLAIM_BYTES + MESSAGE_BYTES
    assert not link.has_credit()
    assert not link.has_credit_for_repairs()
    link.on_ack(1, 1)
    assert not link.has_credit(), "an acknowledgement brings no tokens"
    link.bucket.advance(1_000)
    assert link.has_credit()


def test_a_rated_link_is_acknowledged_before_its_credit_is_used_up() -> None:
    sender, receiver = link_of(bucket_of()), link_of(bucket_of())
    sender.round_trip.on_sent(1, 0, 0)
    sender.round_trip.on_ack(1, 0, 1)
    applied, due = 0, False
    while not due:
        applied += 500
        due = receiver.note_applied(500)
    assert applied <= sender.credit_bytes / 2


def test_pieces_are_small_where_the_rate_is() -> None:
    assert link_of(None).piece_bytes(1 << 20) == 1 << 20
    assert link_of(bucket_of(1e6)).piece_bytes(1 << 20) == 1e6 * links.PIECE_MS / 1_000
    assert link_of(bucket_of(2_000)).piece_bytes(1 << 20) == links.PIECE_BYTES_MIN


def test_the_shortest_round_trip_of_the_last_minutes_counts() -> None:
    times, now_ms = RoundTrip(), 0
    for number, taken_ms in enumerate((300, 90, 500)):
        times.on_sent(1, number, now_ms)
        now_ms += taken_ms
        times.on_ack(1, number, now_ms)
    assert times.ms == 90
    times.on_sent(1, 3, now_ms)
    times.on_sent(1, 4, now_ms + 50)
    times.on_ack(1, 2, now_ms + 60)
    assert times.ms == 90, "that was not the message that is timed"
    for number in range(4, 7):  # the way became longer
        now_ms += RTT_WINDOW_MS
        times.on_ack(1, 99, now_ms)
        times.on_sent(1, number, now_ms)
        now_ms += 200
        times.on_ack(1, number, now_ms)
    assert times.ms == 200
    fast = RoundTrip()
    fast.on_sent(1, 1, 0)
    fast.on_ack(1, 1, 1)
    assert fast.ms == RTT_MS_MIN


# --- in a cluster


WAN = NetworkOptions(1, 2, links={"eu/us": LinkOptions(delay_ms=20)})


class Crossing:
    """Bytes of sequenced messages from eu to us, by sender and second."""

    def __init__(self, cluster: VirtualCluster) -> None:
        self.bytes: dict[str, dict[int, int]] = {}
        self._cluster, self._transmit = cluster, cluster.post.transmit
        cluster.post.transmit = self._count  # type: ignore[method-assign]

    def _count(self, sender, address, envelope, message) -> bool:  # type: ignore[no-untyped-def]
        target = self._cluster.nodes[address.removeprefix("virtual://")]
        if envelope.sequence and (sender.region, target.region) == ("eu", "us"):
            size = sum(memoryview(frame).nbytes for frame in wire.encode(envelope, message))
            each = self.bytes.setdefault(sender.name, {})
            each[self._cluster.now_ms // 1_000] = each.get(self._cluster.now_ms // 1_000, 0) + size
        return self._transmit(sender, address, envelope, message)

    def total(self, first_s: int, last_s: int, sender: str = "") -> int:
        """Of all senders, or one, in these seconds."""
        chosen = [each for name, each in self.bytes.items() if sender in ("", name)]
        return sum(size for each in chosen for second, size in each.items() if first_s <= second < last_s)


def cluster_of(trainers: int = 1) -> VirtualCluster:
    cluster = VirtualCluster(3, WAN, capacity_rows=4_096)
    for number in range(trainers):
        cluster.add(f"train-{number}", "eu", "train", [] if number == 0 else ["train-0"])
    for number in range(2):
        cluster.add(f"us-{number}", "us", seeds=["train-0"])
    cluster.run(3_000)
    return cluster


def load(cluster: VirtualCluster, seconds: int, trainers: int = 1, rows: int = 200) -> None:
    for step in range(10 * seconds):
        for number in range(trainers):
            keys = range(1_000 * number + step * rows % 600, 1_000 * number + step * rows % 600 + rows)
            cluster.publish(f"train-{number}", "item", list(keys), float(step))
        cluster.run(100)


def test_updates_between_regions_keep_to_the_rate_and_to_a_new_one_at_once() -> None:
    cluster = cluster_of()
    crossing = Crossing(cluster)
    load(cluster, 2)
    begin_s = cluster.now_ms // 1_000
    assert crossing.total(begin_s - 2, begin_s) > 100_000, "the load is more than the rates below"
    cluster.set_rate("eu", "us", 20_000)
    load(cluster, 5)
    middle_s = cluster.now_ms // 1_000
    assert 5 * 20_000 * 0.8 < crossing.total(begin_s, middle_s) < 5 * 20_000 * 1.1 + 10_000
    cluster.set_rate("us", "eu", 5_000)
    load(cluster, 8)
    end_s = cluster.now_ms // 1_000
    assert 8 * 5_000 * 0.6 < crossing.total(middle_s, end_s) < 8 * 5_000 * 1.1 + 10_000
    machine = cluster.nodes["train-0"].machine
    assert machine is not None
    assert machine._state_mode.rows_max()
    cluster.set_rate("eu", "us", None)
    assert not machine._state_mode.rows_max(), "what waits leaves when there is no limit any more"
    watch = Watch(cluster)
    assert cluster.run_until(lambda: not watch.missed(), 5_000)


def test_a_node_that_starts_again_keeps_the_rate() -> None:
    cluster = cluster_of()
    cluster.set_rate("eu", "us", 20_000)
    cluster.crash("train-0")
    cluster.run(500)
    cluster.restart("train-0")
    cluster.run(1_000)
    crossing, begin_s = Crossing(cluster), cluster.now_ms // 1_000
    load(cluster, 4)
    assert crossing.total(begin_s, begin_s + 4) < 4 * 20_000 * 1.1 + 10_000


def test_several_senders_of_a_region_share_the_rate_by_demand() -> None:
    cluster = cluster_of(trainers=2)
    for number in range(2):  # both have ids
        cluster.publish(f"train-{number}", "item", [1], 0.0)
    cluster.run(1_000)
    cluster.set_rate("eu", "us", 40_000)
    crossing = Crossing(cluster)
    load(cluster, 2)  # the first alone
    begin_s = cluster.now_ms // 1_000
    load(cluster, 4)
    middle_s = cluster.now_ms // 1_000
    assert crossing.total(begin_s, middle_s, "train-0") > 0.85 * 4 * 40_000, "who sends alone has all of it"
    load(cluster, 2, trainers=2)
    begin_s = cluster.now_ms // 1_000
    load(cluster, 6, trainers=2)
    end_s = cluster.now_ms // 1_000
    assert crossing.total(begin_s, end_s) < 6 * 40_000 * 1.15
    each = [crossing.total(begin_s, end_s, f"train-{number}") for number in range(2)]
    assert min(each) > 0.35 * sum(each)


def test_the_bucket_of_the_receiver_gets_back_what_compressing_saved() -> None:
    cluster = cluster_of()
    cluster.set_rate("eu", "us", 1_000)
    machine, receiver = cluster.nodes["train-0"].machine, cluster.nodes["us-0"].machine
    assert machine is not None
    assert receiver is not None
    bucket = machine._core.budgets.buckets["us"]
    bucket.take(100_000)
    used, level = bucket.used, bucket.level
    machine.handle(m.SentSmaller(receiver._core.options.boot, 90_000), cluster.now())
    assert (bucket.used, bucket.level) == (used - 90_000, level + 90_000)
    machine.handle(m.SentSmaller(12345, 90_000), cluster.now())
    assert bucket.used == used - 90_000


def test_a_batch_that_would_keep_a_narrow_link_busy_for_long_goes_as_rows() -> None:
    cluster = cluster_of()
    cluster.publish("train-0", "item", list(range(300)), 1.0)
    cluster.run(1_000)
    cluster.set_rate("eu", "us", 10_000)
    machine, crossing, begin_s = cluster.nodes["train-0"].machine, Crossing(cluster), cluster.now_ms // 1_000
    assert machine is not None
    cluster.publish("train-0", "item", list(range(300)), 2.0)  # 7 KB and more: 0.7 s
    assert machine.counters.backlogs_begun == 1
    cluster.run(1_500)
    watch = Watch(cluster)
    assert not watch.missed()
    assert crossing.total(begin_s, begin_s + 1) < 12_000
    cluster.run(1_500)
    assert machine.counters.backlogs_ended == 1
    cluster.publish("train-0", "item", [1], 3.0)
    assert machine.counters.backlogs_begun == 1, "a small one passes"


def test_a_log_keeps_every_batch_in_order_and_nobody_pulls() -> None:
    cluster = VirtualCluster(3, WAN, capacity_rows=4_096, make_machine=lambda o, *rest: Machine(replace(o, outbox=FIFO), *rest))
    cluster.add("train-0", "eu", "train")
    for number in range(2):
        cluster.add(f"us-{number}", "us", seeds=["train-0"])
    cluster.run(3_000)
    cluster.set_rate("eu", "us", 20_000)
    load(cluster, 4)
    machine = cluster.nodes["train-0"].machine
    assert machine is not None
    assert max(len(link.waiting) for link in machine._core.links.values()) > 10
    cluster.set_rate("eu", "us", None)
    watch = Watch(cluster)
    assert cluster.run_until(lambda: not watch.missed(), 5_000)
    assert machine.counters.batches_skipped == 0
    assert machine.counters.pulls_served <= 2, "of those who joined"


def test_what_another_region_says_it_wants_means_nothing() -> None:
    cluster = cluster_of()
    cluster.set_rate("eu", "us", 40_000)
    sender, target = cluster.nodes["us-0"].machine, cluster.nodes["train-0"].machine
    assert sender is not None
    assert target is not None
    bucket = target._core.budgets.buckets["us"]
    foreign = m.Envelope(sender._core.options.boot, target._core.options.boot, version=2)
    target.handle(m.MessageReceived(foreign, m.Wants((("us", ALL),))), cluster.now())
    cluster.run(1_000)
    assert bucket.rate == bucket.pair_rate


def test_a_message_about_wants_survives_the_wire_and_junk_is_refused() -> None:
    envelope = m.Envelope(1, 2, version=2)
    told = m.Wants((("us", ALL), ("ap", 17)))
    frames = [memoryview(bytes(frame)) for frame in wire.encode(envelope, told)]
    assert wire.decode(frames) == (envelope, told)
    for bad in (m.Wants((("us", -1),)), m.Wants((("us", 1.5),)), m.Wants(((7, 1),))):  # type: ignore[arg-type]
        frames = [memoryview(bytes(frame)) for frame in wire.encode(envelope, bad)]
        with pytest.raises(RemoteProtocolError):
            wire.decode(frames)


def test_a_narrow_pipe_with_a_bounded_buffer_refuses_what_does_not_fit() -> None:
    options = NetworkOptions(1, 1, links={"eu/us": LinkOptions(shared_bytes_per_ms=10, buffer_bytes=1_000)})
    network = VirtualCluster(1).post.network
    link, regions = ("a", "b"), ("eu", "us")
    assert network.arrivals(options, link, regions, 600, 0) == [61]
    assert network.arrivals(options, ("c", "d"), regions, 600, 0) == [121], "one after the other"
    assert network.arrivals(options, link, regions, 600, 0) is None
    assert network.arrivals(options, link, ("us", "eu"), 600, 0) == [61], "the other way is another pipe"
    assert network.arrivals(options, link, regions, 600, 50) is not None
