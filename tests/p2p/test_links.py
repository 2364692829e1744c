"""Credit comes back only by acknowledgement, and a hole ends a session (R3)."""

import pytest

from p2p.link.links import ACK_MESSAGES, CREDIT_BYTES_MAX, CREDIT_MESSAGES_MAX, Arrival, Link
from p2p.messages import Envelope


def pair() -> tuple[Link, Link]:
    return Link("b", 2, "b:1", "eu", own_boot=1), Link("a", 1, "a:1", "us", own_boot=2)


def test_credit_is_spent_by_bytes_and_released_by_the_acknowledged_prefix() -> None:
    sender, _ = pair()
    half = CREDIT_BYTES_MAX // 2
    for _ in range(2):
        assert sender.has_credit()
        sender.next_envelope(half)
    assert not sender.has_credit()
    assert sender.on_ack(1, 1)
    assert sender.has_credit()
    assert sender.bytes_in_flight == half
    assert not sender.on_ack(1, 1), "an acknowledgement counts once"


def test_messages_without_bytes_are_bounded_too() -> None:
    sender, _ = pair()
    for _ in range(CREDIT_MESSAGES_MAX):
        assert sender.has_credit()
        sender.next_envelope(0)
    assert not sender.has_credit()


def test_a_hole_breaks_the_session_until_the_sender_begins_anew() -> None:
    sender, receiver = pair()
    envelopes = [sender.next_envelope(10) for _ in range(3)]
    assert receiver.on_arrival(envelopes[0]) is Arrival.NEXT
    assert receiver.on_arrival(envelopes[2]) is Arrival.BROKEN
    assert receiver.on_arrival(envelopes[1]) is Arrival.BROKEN, "what comes after the hole does not mend it"
    receiver.note_applied(10)
    assert receiver.take_ack() == (1, 1)
    sender.restart_session()
    assert sender.bytes_in_flight == 0
    assert receiver.on_arrival(sender.next_envelope(10)) is Arrival.NEXT
    assert receiver.on_arrival(envelopes[0]) is Arrival.REPEAT, "a late message of an older session"
    assert not sender.on_ack(1, 3), "an acknowledgement of an older session releases nothing"


def test_repeats_are_recognised() -> None:
    sender, receiver = pair()
    envelope = sender.next_envelope(10)
    assert [receiver.on_arrival(envelope) for _ in range(2)] == [Arrival.NEXT, Arrival.REPEAT]


@pytest.mark.parametrize(("messages", "due"), [(ACK_MESSAGES - 1, False), (ACK_MESSAGES, True)])
def test_acknowledgement_is_due_after_enough_messages(messages: int, due: bool) -> None:
    _, receiver = pair()
    assert [receiver.note_applied(1) for _ in range(messages)][-1] is due
    assert receiver.ack_waits


def test_a_session_may_not_begin_in_the_middle() -> None:
    _, receiver = pair()
    assert receiver.on_arrival(Envelope(1, 2, session=4, sequence=2)) is Arrival.BROKEN
