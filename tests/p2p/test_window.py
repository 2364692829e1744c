"""Credit that follows what a path takes: the window by itself, joins over a narrow path, congestion noticed without a rate."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ekko.model import ModelSpec, TableSpec, table_id
from p2p import messages as m
from p2p.busy.backlog import STATE_MODE
from p2p.link import window
from p2p.link.links import ACK_DELAY_MS, ACK_SILENCE_MS, CREDIT_BYTES_MAX, CREDIT_MESSAGES_MAX, Link
from p2p.link.round_trip import RTT_MS_MAX
from p2p.link.window import (
    BATCH_BYTES_START,
    QUEUE_MS,
    STATE_QUEUE_MS,
    STRETCH_MS,
    WINDOW_BYTES_MIN,
    WINDOW_BYTES_START,
    Window,
)
from p2p.members.suspicion import Suspicion
from p2p.replica import RowColumns
from sim_cluster.checkers import check_converged
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster

MOST = CREDIT_BYTES_MAX


class Path:
    """A link that always has something to send, over a path with a delay and a rate; acknowledged where it asks, or late."""

    def __init__(self, rate: float, round_trip_ms: int = 40) -> None:
        self.rate, self.round_trip_ms = rate, round_trip_ms
        self.link = Link("b", 2, "b:1", "us", own_boot=1, version=2)
        self.delivered = self.queue_max_ms = 0
        self._free_ms = 0.0
        self._acks: list[tuple[float, int]] = []

    def run(self, duration_ms: int, piece: int = 0) -> None:
        """Send whenever there is credit, for so long."""
        link = self.link
        for _ in range(duration_ms):
            link.moment.ms += 1
            while self._acks and self._acks[0][0] <= link.moment.ms:
                link.on_ack(link.session_out, self._acks.pop(0)[1])
            while link.has_credit():
                size = piece or link.piece_bytes(1 << 18)
                envelope = link.next_envelope(size)
                self._free_ms = max(self._free_ms, float(link.moment.ms)) + size / self.rate
                self.queue_max_ms = max(self.queue_max_ms, int(self._free_ms) - link.moment.ms)
                self.delivered += size
                wait_ms = self.round_trip_ms + (0 if envelope.asks else ACK_DELAY_MS)
                at_ms = max(self._free_ms + wait_ms, self._acks[-1][0] if self._acks and not envelope.asks else 0.0)
                self._acks = [one for one in self._acks if one[0] <= at_ms]
                self._acks.append((at_ms, envelope.sequence))


@pytest.mark.parametrize(("rate", "round_trip_ms"), [(40.0, 40), (12_500.0, 20), (12_500.0, 180), (1_000.0, 600)])
def test_a_path_is_used_and_its_queue_stays_short(rate: float, round_trip_ms: int) -> None:
    path = Path(rate, round_trip_ms)
    path.link.in_state_mode = True  # nothing is trusted
    path.run(15_000)
    path.delivered, path.queue_max_ms = 0, 0
    path.run(10_000)
    assert path.delivered > 0.85 * rate * 10_000
    assert path.queue_max_ms < 2 * QUEUE_MS + round_trip_ms // 2


def test_a_wide_path_gets_all_the_credit_within_some_round_trips() -> None:
    path = Path(500_000.0, 20)
    path.run(500, piece=1 << 18)
    assert path.link.window.bytes == MOST
    assert path.link.rate is None


def test_a_path_that_becomes_narrow_is_noticed_and_one_that_becomes_wide_again_is_used() -> None:
    path = Path(20_000.0)
    path.run(5_000)
    wide = path.link.window.bytes
    path.rate = 1_000.0
    path.run(12_000)
    assert path.link.window.bytes < wide / 10
    assert path.link.rate is not None
    path.rate = 20_000.0
    path.run(5_000)
    assert path.link.window.bytes > wide / 2


def test_a_longer_path_is_believed_after_a_while() -> None:
    path = Path(12_500.0, 20)
    path.run(15_000)
    path.round_trip_ms = 400
    path.run(3 * STRETCH_MS)
    path.delivered = 0
    path.run(5_000)
    assert path.link.window.round_trip_ms is not None
    assert path.link.window.round_trip_ms >= 400
    assert path.delivered > 0.85 * 12_500 * 5_000


@given(
    st.lists(st.tuples(st.integers(0, 20_000_000), st.integers(0, 30_000), st.booleans()), max_size=80),
    st.sampled_from([3_000, 40_000, MOST]),
)
def test_whatever_is_told_the_window_is_between_its_bounds_and_comes_back(
    moves: list[tuple[int, int, bool]], most: int
) -> None:
    """Acknowledgements of any age, of what was sent and of what was not, in any session."""
    one, now_ms, sequence = Window(), 0, 0
    for size, passed_ms, truthful in moves:
        sequence += 1
        one.on_sent(1, sequence, size, size, now_ms)
        now_ms += passed_ms
        one.on_ack(1 if truthful else 2, sequence, now_ms, most)
        assert min(WINDOW_BYTES_MIN, most) <= one.bytes <= max(most, WINDOW_BYTES_START)
        assert 0 < one.credit_for_repairs(most) <= one.credit(most, trusting=True) <= most
        assert one.piece_bytes(1 << 20) > 0
        assert QUEUE_MS <= one.target_ms <= RTT_MS_MAX + QUEUE_MS
    for _ in range(40):  # the path is wide and short
        sequence += 1
        one.on_sent(1, sequence, one.bytes, one.bytes, now_ms)
        now_ms += 10
        one.on_ack(1, sequence, now_ms, most)
        now_ms += window.ASK_MS
    assert one.bytes == most
    assert not one.is_narrow


def test_a_peer_that_stood_still_costs_little_where_little_was_on_its_way() -> None:
    path = Path(500_000.0, 20)
    path.run(500, piece=1 << 18)
    one = path.link.window
    path.run(2_000)
    for sequence in (1, 2):
        one._timed = None
        one.on_sent(9, sequence, 1_000, 1_000, 100_000 * sequence)
        one.on_ack(9, sequence, 100_000 * sequence + 5_000, MOST)
    assert one.bytes == MOST // 4, "each of them halves it, and no more"
    assert path.link.rate is None


def test_a_path_that_little_is_asked_of_is_not_narrow_since_a_peer_stood_still() -> None:
    """Else bursts of a quiet link would go by priority ever after: they are too small to show what it takes."""
    link, asked = measured(), 0
    for step in range(1, 60):
        asked += link.next_envelope(1_000).asks
        link.moment.ms += 2_000 if asked % 8 == 7 else 20
        assert link.on_ack(1, step)
        assert link.rate is None, f"step {step}"
        link.moment.ms += 100
    assert asked > 14
    assert link.window.bytes < WINDOW_BYTES_START, "it was late"


def test_a_narrow_path_shows_itself_by_small_messages_too() -> None:
    path = Path(10.0)
    path.link.in_state_mode = True
    path.run(20_000, piece=500)
    assert path.link.rate is not None
    assert path.link.rate < 20


def test_a_probe_is_what_its_own_acknowledgement_took_also_where_more_leaves_with_it() -> None:
    one = Window(round_trip_ms=20, is_probing=True)
    assert one.on_sent(1, 1, 1_000, 1_000, 0)
    assert one.on_sent(1, 2, one.bytes, one.bytes, window.BURST_MS)
    one.on_ack(1, 2, 300, MOST)
    assert (one.round_trip_ms, one.is_probing) == (300, False)


def test_answers_that_use_their_half_of_it_do_not_halve_it() -> None:
    one = Window(bytes=1 << 20, round_trip_ms=20)
    one.on_sent(1, 1, 1 << 19, 1 << 19, 0)
    one.on_ack(1, 1, one.target_ms + 1, MOST)
    assert 0.99 * (1 << 20) < one.bytes < 1 << 20


@pytest.mark.parametrize(("more_ms", "probes"), [(window.SLACK_MS, False), (window.SLACK_MS + 1, True)])
def test_what_is_nearly_as_quick_as_the_quickest_keeps_the_round_trip(more_ms: int, probes: bool) -> None:
    one = Window(round_trip_ms=20)
    for sequence, now_ms in enumerate(range(0, STRETCH_MS + 1_000, 500), 1):
        one.on_sent(1, sequence, 1_000, 1_000, now_ms)
        one.on_ack(1, sequence, now_ms + 20 + more_ms, MOST)
        if one.is_probing:
            break
    assert one.is_probing is probes
    assert one.round_trip_ms == 20


# --- the link


def measured() -> Link:
    return Link("b", 2, "b:1", "us", own_boot=1, version=2)


def test_who_is_late_has_no_credit_but_for_a_message_that_would_show_a_loss() -> None:
    link = measured()
    link.next_envelope(1_000)
    link.moment.ms += link.window.target_ms
    assert link.has_credit()
    link.next_envelope(1_000)
    link.moment.ms += 1
    assert link.is_late
    assert not link.has_credit()
    assert not link.has_credit_for_repairs()
    assert link.no_credit_why == "acknowledgement late"
    assert link.admits_batch(0), "a beat has no bytes"
    assert not link.admits_batch(1)
    link.moment.ms += link.window.target_ms + ACK_DELAY_MS + 1
    assert link.has_credit()
    link.next_envelope(1_000)
    assert not link.has_credit(), "one"
    assert link.on_ack(1, 3)
    assert link.has_credit()
    assert link.no_credit_why == ""


def test_what_was_acknowledged_in_part_is_late_when_the_rest_does_not_come() -> None:
    link = measured()
    assert link.next_envelope(1_000).asks
    assert not link.next_envelope(1_000).asks
    assert link.on_ack(1, 1)
    link.moment.ms += link.window.target_ms + ACK_DELAY_MS
    assert not link.is_late
    link.moment.ms += 1
    assert link.is_late


def test_what_may_show_a_loss_is_no_more_than_may_ever_be_on_its_way() -> None:
    for on_its_way, credit in ((CREDIT_BYTES_MAX - 1, True), (CREDIT_BYTES_MAX, False)):
        link = measured()
        link.next_envelope(on_its_way)
        link.moment.ms += 60_000
        assert link.has_credit() is credit


def test_messages_without_bytes_have_bounds_too() -> None:
    link = measured()
    for _ in range(CREDIT_MESSAGES_MAX // 2):
        link.next_envelope(0)
    assert not link.has_credit_for_repairs()
    assert link.has_credit()
    for _ in range(CREDIT_MESSAGES_MAX // 2):
        link.next_envelope(0)
    assert not link.has_credit()
    assert not link.admits_batch(0)
    assert link.no_credit_why == "messages in flight"


def test_in_state_mode_less_may_stand_in_the_queues() -> None:
    link = measured()
    usual_ms = link.window.target_ms
    link.in_state_mode = True
    assert link.window.target_ms == usual_ms - QUEUE_MS + STATE_QUEUE_MS
    link.in_state_mode = False
    assert link.window.target_ms == usual_ms


def test_a_busy_card_is_told_by_all_credit_there_is_or_by_what_a_narrow_path_takes() -> None:
    link = measured()
    assert link.full_bytes == CREDIT_BYTES_MAX
    link.window.is_narrow = True
    assert link.full_bytes == link.credit_bytes == WINDOW_BYTES_START
    assert replace(measured(), version=1).full_bytes == CREDIT_BYTES_MAX


def test_a_path_is_full_where_that_was_seen() -> None:
    """It says whether what waits for credit goes into state mode."""
    link = measured()
    assert not link.is_full, "nothing is known of it"
    link.next_envelope(1_000)
    link.moment.ms += 60_000
    assert not link.is_full, "nobody has said anything: all may be lost"
    assert link.on_ack(1, 1)
    assert link.is_full, "an acknowledgement came late"
    assert link.rate is None
    link.next_envelope(1_000)
    assert link.on_ack(1, 2)
    assert not link.is_full, "the last one did not"
    link.next_envelope(link.credit_bytes - 1)
    assert not link.is_full
    link.next_envelope(1)
    assert link.is_full, "all its credit is on its way"
    beats = measured()
    for _ in range(CREDIT_MESSAGES_MAX):
        assert not beats.is_full
        beats.next_envelope(0)
    assert beats.is_full, "as many messages as may be"
    narrow = measured()
    narrow.window.is_narrow = True
    assert narrow.is_full
    assert replace(measured(), version=1).is_full, "its acknowledgements tell nothing, and credit is all there is"


def test_a_narrow_path_is_stuck_only_after_what_is_on_its_way_should_have_come() -> None:
    link = measured()
    link.window.is_narrow, link.window.bytes = True, WINDOW_BYTES_MIN
    link.next_envelope(40_000)
    assert link.rate is not None
    wait_ms = ACK_SILENCE_MS + int(2 * 40_000 / link.rate)
    assert not link.is_stuck(0)
    assert not link.is_stuck(wait_ms)
    assert link.is_stuck(wait_ms + 1)


def test_a_peer_of_version_1_and_a_link_with_a_rate_have_the_credit_that_they_had() -> None:
    link = replace(measured(), version=1)
    assert not link.next_envelope(1 << 20).asks
    link.moment.ms += 60_000
    assert link.has_credit()
    assert link.credit_bytes == CREDIT_BYTES_MAX
    assert measured().credit_bytes == BATCH_BYTES_START


def test_who_acknowledges_what_was_never_sent_gains_nothing() -> None:
    link = measured()
    for _ in range(40):
        link.next_envelope(1 << 20)
    assert not link.has_credit()
    before = link.window.bytes
    assert not link.on_ack(1, 41)
    assert not link.on_ack(2, 1)
    assert not link.has_credit()
    assert link.window.bytes == before


def test_what_asks_is_acknowledged_at_once_and_nothing_else_is() -> None:
    receiver = measured()
    assert not receiver.note_applied(10)
    assert receiver.note_applied(10, asked=True)


# --- in a cluster

ROWS, DIM = 2_500, 16
ITEM = table_id("item")
STATE = ROWS * (16 + 4 * DIM)
RATE = 40.0  # bytes a millisecond: 320 kbit/s, shared by all from eu to us


def join(*names: str, seed: int = 1) -> tuple[float, int, int]:
    """These join a trainer at once over a narrow path. How long it took, relative to the bytes of them all, pulls that were
    given up, and how often somebody was suspected.
    """
    cluster = VirtualCluster(seed, NetworkOptions(1, 2), ModelSpec("ctr", 16, {"item": TableSpec("item", DIM)}))
    cluster.add("eu1", "eu", "train")
    cluster.run(2_000)
    assert cluster.publish("eu1", "item", range(ROWS), 1.0)
    cluster.run(1_000)
    suspected, assess = 0, Suspicion.assess

    def counted(self: Suspicion, now_ms: int) -> None:
        nonlocal suspected
        before = self.suspect.copy()
        assess(self, now_ms)
        suspected += int((self.suspect & ~before).sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Suspicion, "assess", counted)
        for name in names:
            cluster.add(name, "us", "serve", ["eu1"])
        cluster.options = NetworkOptions(1, 2, links={"eu/us": LinkOptions(20, shared_bytes_per_ms=RATE)})
        begin_ms, least_ms = cluster.now_ms, len(names) * STATE / RATE
        cluster.run_until(lambda: check_converged(cluster) == "", int(4 * least_ms), 500)
        machines = [cluster.nodes[name].machine for name in names]
        abandoned = sum(one.counters.pulls_abandoned for one in machines if one is not None)
        return (cluster.now_ms - begin_ms) / least_ms, abandoned, suspected


def two_joiners() -> None:
    """Two joins end in the time that their bytes take, and nobody is taken for dead meanwhile."""
    ratio, abandoned, suspected = join("us1", "us2")
    assert (abandoned, suspected) == (0, 0)
    assert ratio < 2.0


def test_two_that_join_at_once_over_a_narrow_path_take_what_their_state_takes() -> None:
    two_joiners()


def congested() -> None:
    """A path takes a fifth of what is written, and no rate says so: that is noticed, and rows that matter come soon."""
    cluster = VirtualCluster(1, NetworkOptions(1, 2), ModelSpec("ctr", 8, {"item": TableSpec("item", DIM)}))
    cluster.add("eu1", "eu", "train")
    cluster.add("us1", "us", "serve", ["eu1"])
    cluster.run(3_000)
    machine, arrived = cluster.nodes["eu1"].machine, cluster.nodes["us1"].store.models["ctr"].table(ITEM)
    assert machine is not None
    cluster.publish("eu1", "item", [0], 0.0)
    cluster.run(500)
    cluster.options = NetworkOptions(1, 2, links={"eu/us": LinkOptions(20, shared_bytes_per_ms=RATE)})
    noticed_ms, begin_ms = 0, cluster.now_ms
    waiting: dict[int, int] = {}
    delays: list[int] = []
    for step in range(120):
        keys = np.arange(step % 40 * 100, step % 40 * 100 + 100, dtype=np.uint64)
        _publish(cluster, keys, 10)
        if step % 5 == 4:
            waiting[100_000 + step] = cluster.now_ms
            _publish(cluster, np.array([100_000 + step], np.uint64), 200)
        for _ in range(5):
            cluster.run(10)
            here = [key for key in waiting if arrived.resolve(np.array([key], np.uint64))[0] >= 0]
            delays.extend(cluster.now_ms - waiting.pop(key) for key in here)
        peer = next(one for one in machine.status(cluster.now()).peers if one.node == "us1")
        if not noticed_ms and peer.mode == STATE_MODE:
            noticed_ms = cluster.now_ms - begin_ms
    assert 0 < noticed_ms < 1_000
    assert len(waiting) < 3
    assert max(delays[10:]) < 2 * 40 + 2 * STATE_QUEUE_MS + QUEUE_MS, "they wait behind what is on its way"
    assert peer.path_bytes_per_s is not None
    assert 0.5 * RATE < peer.path_bytes_per_s / 1_000 < 2 * RATE


def _publish(cluster: VirtualCluster, keys: NDArray[np.uint64], priority: int) -> None:
    rows, classes = np.zeros((len(keys), 4 * DIM), np.uint8), np.full(len(keys), priority, np.uint8)
    columns = RowColumns(ITEM, keys, rows, priority=classes)
    cluster.request("eu1", lambda number: m.PublishRequested(number, cluster.model.id, (columns,)))


def test_congestion_is_noticed_where_no_rate_is_set() -> None:
    congested()


# --- planted bugs


def _never_shrinks(patch: pytest.MonkeyPatch) -> None:
    """The window only grows."""
    fit = Window._fit

    def grows(self: Window, in_flight: int, taken_ms: int, most: int) -> None:
        before = self.bytes
        fit(self, in_flight, taken_ms, most)
        self.bytes, self.is_narrow = max(before, self.bytes), False

    patch.setattr(Window, "_fit", grows)
    patch.setattr(window, "WINDOW_BYTES_START", BATCH_BYTES_START)


def _acknowledgements_do_not_count(patch: pytest.MonkeyPatch) -> None:
    """What is acknowledged tells nothing of the path."""
    patch.setattr(Window, "on_ack", lambda *_, **__: None)
    patch.setattr(Link, "is_late", False)


def _nothing_is_late(patch: pytest.MonkeyPatch) -> None:
    """That nothing is acknowledged is not noticed."""
    patch.setattr(Link, "is_late", False)


def _nothing_asks(patch: pytest.MonkeyPatch) -> None:
    """Acknowledgements come when there is more to acknowledge."""
    on_sent = Window.on_sent

    def sent(self: Window, *told: int) -> bool:
        on_sent(self, *told)
        return False

    patch.setattr(Window, "on_sent", sent)


def _everything_is_trusted(patch: pytest.MonkeyPatch) -> None:
    """Answers begin with all the credit there is, in pieces as large as there are."""
    patch.setattr(Window, "credit_for_repairs", lambda _, most: most // 2)
    patch.setattr(Window, "piece_bytes", lambda _, most: most)
    patch.setattr(Link, "is_late", False)


def stuck_path() -> None:
    """A peer that acknowledges nothing holds what a moment brings, and not all that may ever be on its way."""
    link = measured()
    for _ in range(1_000):
        link.moment.ms += 1
        if link.has_credit():
            link.next_envelope(2_000)
    assert link.bytes_in_flight < 1_000_000


def own_queue() -> None:
    """A path is used for two minutes: its round trip is not taken for what our own queue makes of it."""
    path = Path(1_000.0, 20)
    path.run(6 * STRETCH_MS)
    assert path.link.window.round_trip_ms is not None
    assert path.link.window.round_trip_ms < 150


def narrow_path() -> None:
    """A path that is found narrow is used, and its queue stays short."""
    path = Path(40.0)
    path.link.in_state_mode = True
    path.run(15_000)
    path.queue_max_ms = path.delivered = 0
    path.run(10_000)
    assert path.queue_max_ms < 2 * QUEUE_MS
    assert path.delivered > 0.85 * 40 * 10_000


def _probes_use_all(patch: pytest.MonkeyPatch) -> None:
    """The round trip is measured anew while the queue is as long as ever."""
    patch.setattr(Window, "_used_now", lambda _, size: size)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (_never_shrinks, narrow_path),
        (_acknowledgements_do_not_count, narrow_path),
        (_nothing_asks, narrow_path),
        (_nothing_is_late, stuck_path),
        (_probes_use_all, own_queue),
        pytest.param(_everything_is_trusted, two_joiners, marks=pytest.mark.long),
    ],
)
def test_planted_bugs_are_noticed(
    plant: Callable[[pytest.MonkeyPatch], None], scenario: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if scenario is not two_joiners:
        scenario()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        scenario()
