"""Losses are no congestion: what is lost, or nobody acknowledges, puts no link into state mode and makes no path narrow."""

from collections.abc import Callable

import pytest

from p2p.link.links import ACK_DELAY_MS, Link
from p2p.link.window import WINDOW_BYTES_START, Window
from p2p.pushing import push
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import REGIONS, at_rest, form

ROUND_TRIP_MS = 20


def acknowledgements_are_lost(every_ms: int = 300, step_bytes: int = 300) -> None:
    """Every third one does not come, of steps over a wide path."""
    link = Link("b", 2, "b:1", "us", own_boot=1, version=2)
    acks: list[tuple[int, int]] = []
    asked = applied = without_ms = 0
    least_bytes = link.window.bytes
    delayed_ms: int | None = None  # when what did not ask is acknowledged
    for now_ms in range(1, 20_000):
        link.moment.ms = now_ms
        if delayed_ms is not None and now_ms >= delayed_ms:
            acks.append((now_ms, applied))
            delayed_ms = None
        while acks and acks[0][0] <= now_ms:
            link.on_ack(link.session_out, acks.pop(0)[1])
        without_ms += not link.has_credit()
        least_bytes = min(least_bytes, link.window.bytes)
        if now_ms % every_ms or not link.has_credit():
            continue
        envelope = link.next_envelope(step_bytes)
        applied = envelope.sequence
        if not envelope.asks:
            delayed_ms = delayed_ms or now_ms + ROUND_TRIP_MS + ACK_DELAY_MS
            continue
        asked, delayed_ms = asked + 1, None
        if asked % 3:
            acks.append((now_ms + ROUND_TRIP_MS, applied))
    assert asked > 30
    assert link.rate is None, "the path was taken for narrow"
    assert least_bytes >= WINDOW_BYTES_START, "the window became smaller"
    assert without_ms < 1_000, f"{without_ms} ms of 20 s without credit"


def steps_are_lost(seed: int = 1) -> None:
    """A tenth of all messages is lost, and now and then a node hears nobody for a second; nothing is narrow."""
    cluster = form(seed)
    cluster.run(6_000)
    assert cluster.publish("t1", "item", [0], 0.0)
    cluster.options = NetworkOptions(1, 30, 40, loss_probability=0.1)
    for step in range(120):
        cluster.publish("t1", "item", [step % 40, 40 + step % 7], float(step))
        away = REGIONS["us"][step % 3]
        cluster.cut = {pair for other in cluster.nodes for pair in ((away, other), (other, away))} if step % 40 > 25 else set()
        cluster.run(70)
        assert not _begun(cluster), f"seed {seed}, step {step}: a link is in state mode"
    cluster.cut, cluster.options = set(), NetworkOptions()
    at_rest(cluster)
    assert not _begun(cluster)


def _begun(cluster: VirtualCluster) -> int:
    return sum(node.machine.counters.backlogs_begun for node in cluster.nodes.values() if node.machine is not None)


@pytest.mark.parametrize("step_bytes", [300, 12_000])
@pytest.mark.parametrize("every_ms", [10, 100, 300])
def test_lost_acknowledgements_make_no_path_narrow(every_ms: int, step_bytes: int) -> None:
    acknowledgements_are_lost(every_ms, step_bytes)


def test_lost_steps_put_no_link_into_state_mode() -> None:
    steps_are_lost()


# --- planted bugs


def _a_later_acknowledgement_tells_how_long_it_took(patch: pytest.MonkeyPatch) -> None:
    on_ack = Window.on_ack

    def always(self: Window, *told: int, late: bool) -> None:
        on_ack(self, *told)

    patch.setattr(Window, "on_ack", always)


def _nobody_asks_again(patch: pytest.MonkeyPatch) -> None:
    on_sent = Window.on_sent

    def once(self: Window, session: int, sequence: int, *rest: int) -> bool:
        waits = self._timed is not None and self._timed.session == session
        return on_sent(self, session, sequence, *rest) and not waits

    patch.setattr(Window, "on_sent", once)


def _whatever_is_late_is_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Link, "is_full", True)


def _a_line_waits_for_acknowledgements(patch: pytest.MonkeyPatch) -> None:
    """Nothing is sent that would show a loss."""
    patch.setattr(Window, "is_silent", lambda *_: False)
    patch.setattr(push, "SHORT_BYTES_MAX", 1_000)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (_a_later_acknowledgement_tells_how_long_it_took, acknowledgements_are_lost),
        (_nobody_asks_again, acknowledgements_are_lost),
        (_whatever_is_late_is_full, steps_are_lost),
        (_a_line_waits_for_acknowledgements, steps_are_lost),
    ],
)
def test_planted_bugs_are_noticed(
    plant: Callable[[pytest.MonkeyPatch], None], scenario: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        scenario()
