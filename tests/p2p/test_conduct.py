"""Who is shut out, for how long, and that it ends."""

import asyncio

from p2p import wire
from p2p.errors import RemoteProtocolError
from p2p.link import conduct as conduct_module
from p2p.link.conduct import CALLS_MAX, FORGIVEN_MS, REJECTED_MAX, SHUT_OUT_MS, SHUT_OUT_MS_MAX, SOURCES_MAX, WINDOW_MS, Conduct
from p2p.messages import Ack, Effect, Event, Hello, Leave, MemberRecord, MessageReceived, Note, Now
from p2p.transport import Origin
from p2p.transport.memory import MemoryNetwork
from tests.p2p.test_runtime import ENVELOPE, Node, Script, run, until


def shut_out(conduct: Conduct, source: str, now_ms: int) -> int:
    """Send junk until it is enough; returns the length of the time-out."""
    for _ in range(REJECTED_MAX):
        assert conduct.note_rejected(source, now_ms) == 0
    return conduct.note_rejected(source, now_ms)


def test_some_mistakes_are_forgiven_and_more_are_not() -> None:
    conduct = Conduct()
    for window in range(5):
        for _ in range(REJECTED_MAX):
            assert conduct.note_rejected("a", window * WINDOW_MS) == 0
    assert conduct.admits("a", 5 * WINDOW_MS)
    begin = 10 * WINDOW_MS
    assert shut_out(conduct, "a", begin) == SHUT_OUT_MS
    assert conduct.admits("b", begin)
    assert not conduct.admits("a", begin + SHUT_OUT_MS - 1)
    assert conduct.admits("a", begin + SHUT_OUT_MS)
    assert (conduct.shut_outs, conduct.dropped) == (1, 1)


def test_repeats_take_longer_up_to_a_bound_and_time_heals() -> None:
    conduct, now_ms = Conduct(), 0
    lengths = []
    for _ in range(8):
        lengths.append(shut_out(conduct, "a", now_ms))
        now_ms += lengths[-1]
    assert lengths[:4] == [SHUT_OUT_MS, 2 * SHUT_OUT_MS, 4 * SHUT_OUT_MS, 8 * SHUT_OUT_MS]
    assert lengths[-1] == SHUT_OUT_MS_MAX
    assert shut_out(conduct, "a", now_ms + FORGIVEN_MS + 1) == SHUT_OUT_MS


def test_a_flood_of_calls_counts_too_and_memory_is_bounded() -> None:
    conduct = Conduct()
    assert not any(conduct.note_call("a", 5) for _ in range(CALLS_MAX))
    assert conduct.note_call("a", 5) == SHUT_OUT_MS
    for number in range(SOURCES_MAX + 10):
        conduct.note_call(f"s{number}", 6)
    assert len(conduct._records) == SOURCES_MAX


def test_the_runtime_drops_unread_what_a_shut_out_source_sends_and_nobody_elses() -> None:
    async def main() -> None:
        now = Now(1_000, 0)

        def answer(event: Event) -> list[Effect]:
            if isinstance(event, MessageReceived) and event.message == Ack(1, 1):
                raise RemoteProtocolError("a lie")
            return []

        script = Script(answer)
        network = MemoryNetwork()
        async with Node(network, script, clock=lambda: now) as node:
            end = node.transport.address

            def received(text: str) -> bool:
                return MessageReceived(ENVELOPE, Leave(text)) in script.events

            for number in range(REJECTED_MAX + 1):
                junk = [b"junk", b"junk"] if number % 2 else wire.encode(ENVELOPE, Ack(1, 1))
                network.inject(end, junk, "liar")
            network.inject(end, wire.encode(ENVELOPE, Leave("unheard")), "liar")
            network.inject(end, wire.encode(ENVELOPE, Leave("other")), "honest")
            await until(lambda: received("other"))
            assert not received("unheard")
            assert node.runtime.conduct.dropped == 1
            assert [e.fields[0] for e in node.effects if isinstance(e, Note) and e.name == "peer_shut_out"] == [
                ("peer", "liar")
            ]
            now = Now(1_000 + SHUT_OUT_MS, 0)
            network.inject(end, wire.encode(ENVELOPE, Leave("again")), "liar")
            await until(lambda: received("again"))

    run(main())


def test_a_proven_node_cannot_introduce_itself_as_another() -> None:
    async def main() -> None:
        script = Script()
        async with Node(MemoryNetwork(), script) as node:
            member = MemberRecord("victim", ENVELOPE.sender_boot, 1, "eu", "serve", "tcp://x:1", 0)
            frames = [memoryview(f) for f in wire.encode(ENVELOPE, Hello(1, 0, (), member, (), (), False))]
            count = len(script.events)
            node.runtime._on_message(frames, Origin("thief", "thief"))
            assert len(script.events) == count
            assert sum(node.runtime.rejected.values()) == 1
            node.runtime._on_message(frames, Origin("victim", "victim"))
            assert len(script.events) == count + 1
            await asyncio.sleep(0)

    run(main())


def test_limits_leave_room_for_what_is_nobodys_fault() -> None:
    assert conduct_module.WINDOW_MS < conduct_module.SHUT_OUT_MS < conduct_module.SHUT_OUT_MS_MAX < conduct_module.FORGIVEN_MS
