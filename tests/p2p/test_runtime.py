"""The shell: order of effects, the timer, who is blamed for what, and how it ends."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from p2p import runtime as runtime_module
from p2p import wire
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.messages import (
    Ack,
    BatchApplied,
    Continue,
    Effect,
    Envelope,
    Event,
    Fatal,
    Forget,
    Leave,
    Leaving,
    MessageReceived,
    Note,
    Now,
    Published,
    SchemaChanged,
    Send,
    SendFailed,
    Started,
    TimerFired,
    WaitEnded,
)
from p2p.runtime import REJECTED_OTHERS, REJECTED_SENDERS_MAX, REJECTED_UNREADABLE, NodeStopped, Runtime, read_clock
from p2p.transport.memory import MemoryNetwork, MemoryTransport

NEVER_MS = 1 << 60
ENVELOPE = Envelope(sender_boot=0xB00, receiver_boot=2)


class Script:
    """A machine whose answers a test supplies; it writes down what it was given."""

    def __init__(self, answer: Callable[[Event], list[Effect]] = lambda _: []) -> None:
        self.answer = answer
        self.events: list[Event] = []
        self.times_ms: list[int] = []
        self.deadline_ms = NEVER_MS

    def handle(self, event: Event, now: Now) -> list[Effect]:
        self.events.append(event)
        self.times_ms.append(now.monotonic_ms)
        return self.answer(event)


class Node:
    """A runtime on a memory network, running."""

    def __init__(self, network: MemoryNetwork, script: Script, address: str = "memory:0", **options: Any) -> None:
        self.script = script
        self.effects: list[Effect] = []
        self.transport = MemoryTransport(network, address)
        self.on_effect: Callable[[Effect], None] = lambda _: None
        self.runtime = Runtime(script, self.transport, on_effect=self._on_effect, **options)

    def _on_effect(self, effect: Effect) -> None:
        self.effects.append(effect)
        self.on_effect(effect)

    async def __aenter__(self) -> "Node":
        self.task = asyncio.create_task(self.runtime.run())
        await self.runtime.started.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition never held"
        await asyncio.sleep(0.002)


def test_started_names_the_address_and_cancelling_says_goodbye() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        peer = Script()
        async with Node(network, peer, "memory:peer"):

            def farewell(event: Event) -> list[Effect]:
                return [Send("memory:peer", ENVELOPE, Leave("a"))] if event == Leaving() else []

            script = Script(farewell)
            async with Node(network, script) as node:
                assert script.events == [Started(node.transport.address)]
            assert script.events[-1] == Leaving()
            assert node.task.cancelled()
            assert not node.transport.connected("memory:peer")
            await until(lambda: MessageReceived(ENVELOPE, Leave("a")) in peer.events)

    run(main())


def test_effects_go_out_in_order_and_continue_comes_after_those_before_it() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        peer = Script()

        def answer(event: Event) -> list[Effect]:
            match event:
                case SchemaChanged():
                    first, second = Send("memory:peer", ENVELOPE, Ack(0, 1)), Send("memory:peer", ENVELOPE, Ack(0, 2))
                    return [first, Continue(TimerFired()), second, Published(1, 1)]
                case TimerFired():
                    return [Send("memory:peer", ENVELOPE, Ack(0, 3)), Published(2, 2)]
                case _:
                    return []

        async with Node(network, peer, "memory:peer"), Node(network, Script(answer)) as node:
            node.runtime.submit(SchemaChanged())
            assert node.effects == [Published(1, 1), Published(2, 2)]
            assert node.script.events[1:] == [SchemaChanged(), TimerFired()]
            await until(lambda: len(peer.events) == 4)
            assert peer.events[1:] == [MessageReceived(ENVELOPE, Ack(0, n)) for n in (1, 2, 3)]

    run(main())


@given(st.recursive(st.integers(0, 1 << 30), lambda inner: st.lists(inner, max_size=4), max_leaves=30))
def test_effects_keep_the_order_in_which_the_machine_returned_them(tree: Any) -> None:
    """Whatever events set off, and whoever submits: effects leave in the order of the calls to `handle`."""
    returned: list[Effect] = []

    def answer(event: Event) -> list[Effect]:
        assert isinstance(event, Continue)
        inner: Any = event.event
        items = inner if isinstance(inner, list) else [inner]
        effects = [Continue(Continue(item)) if isinstance(item, list) else Published(item, 0) for item in items]  # type: ignore[arg-type]
        returned.extend(effect for effect in effects if isinstance(effect, Published))
        return effects

    node = Node(MemoryNetwork(), Script(answer))
    seen: list[Effect] = []

    def on_effect(effect: Effect) -> None:
        seen.append(effect)
        if isinstance(effect, Published) and effect.request % 3 == 0:
            node.runtime.submit(Continue(effect.request + 1))  # type: ignore[arg-type]

    node.on_effect = on_effect
    node.runtime.submit(Continue(tree))  # type: ignore[arg-type]
    assert seen == returned


def test_refused_send_comes_back_at_once() -> None:
    async def main() -> None:
        def answer(event: Event) -> list[Effect]:
            match event:
                case SchemaChanged():
                    return [Send("memory:nobody", ENVELOPE, Ack(0, 1)), Published(1, 1)]
                case SendFailed():
                    return [WaitEnded(2, ())]
                case _:
                    return []

        async with Node(MemoryNetwork(), Script(answer)) as node:
            node.runtime.submit(SchemaChanged())
            assert node.script.events[1:] == [SchemaChanged(), SendFailed("memory:nobody", ENVELOPE)]
            assert node.effects == [Published(1, 1), WaitEnded(2, ())]

    run(main())


def test_forget_and_delay_reach_the_transport() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        peer = Script()

        def answer(event: Event) -> list[Effect]:
            match event:
                case SchemaChanged():
                    return [Send("memory:peer", ENVELOPE, Ack(0, 1))]
                case TimerFired():
                    return [Forget("memory:peer")]
                case _:
                    return []

        far = {"memory:peer": 0.03}
        async with Node(network, peer, "memory:peer"), Node(network, Script(answer), delay_s=far.__getitem__) as node:
            sent = time.monotonic()
            node.runtime.submit(SchemaChanged())
            await until(lambda: len(peer.events) == 2)
            assert time.monotonic() - sent >= 0.03
            assert node.transport.connected("memory:peer")
            node.runtime.submit(TimerFired())
            assert not node.transport.connected("memory:peer")

    run(main())


def test_timer_follows_the_deadline() -> None:
    """By a clock of the test's own, which stands still but where it is moved; the loop's timers know another one."""

    async def main() -> None:
        script, clock_ms, looks = Script(), 0, 0

        def clock() -> Now:
            nonlocal looks
            looks += 1
            return Now(clock_ms, clock_ms)

        def once(event: Event) -> list[Effect]:
            if event == TimerFired():
                script.deadline_ms = NEVER_MS
            return []

        async with Node(MemoryNetwork(), script, clock=clock) as node:
            script.answer = once
            script.deadline_ms = 3_600_000
            node.runtime.submit(SchemaChanged())
            script.deadline_ms = 10  # sooner than what is armed
            node.runtime.submit(SchemaChanged())
            script.deadline_ms = 20  # later again: the armed timer must not count
            clock_ms, looks = 19, 0
            # It fires, looks, and is armed again: twice at the least.
            await until(lambda: looks > 4 or TimerFired() in script.events)
            assert TimerFired() not in script.events
            clock_ms = 20
            await until(lambda: TimerFired() in script.events)
            await asyncio.sleep(0.01)
            assert script.events.count(TimerFired()) == 1
            assert script.times_ms[-1] == 20

    run(main())


def test_deadline_that_stays_in_the_past_does_not_take_the_loop() -> None:
    async def main() -> None:
        script = Script()
        async with Node(MemoryNetwork(), script) as node:
            script.deadline_ms = 0
            node.runtime.submit(SchemaChanged())
            begin = time.monotonic()
            await until(lambda: time.monotonic() > begin + 0.1 and script.events.count(TimerFired()) > 10)
            assert script.events.count(TimerFired()) <= 2 * (time.monotonic() - begin) / runtime_module.TIMER_FLOOR_S

    run(main())


def test_peers_faults_are_counted_by_sender_and_told_sparingly() -> None:
    async def main() -> None:
        network = MemoryNetwork()

        def answer(event: Event) -> list[Effect]:
            if isinstance(event, MessageReceived):
                raise RemoteProtocolError("out of place")
            return []

        async with Node(network, Script(answer)) as node:
            for _ in range(100):
                network.inject(node.transport.address, [b"junk", b"more junk"])
                network.inject(node.transport.address, wire.encode(ENVELOPE, Ack(1, 1)))
            await until(lambda: sum(node.runtime.rejected.values()) == 200)
            assert node.runtime.rejected == {REJECTED_UNREADABLE: 100, f"{0xB00:016x}": 100}
            notes = [effect for effect in node.effects if isinstance(effect, Note)]
            assert len(notes) == 14  # 1, 2, 4, ..., 64 of each
            assert {note.name for note in notes} == {"frame_rejected"}
            for boot in range(REJECTED_SENDERS_MAX + 50):
                frames = wire.encode(Envelope(boot, 2), Ack(1, 1))
                await until(lambda frames=frames: network.inject(node.transport.address, frames))  # type: ignore[misc]
            await until(lambda: sum(node.runtime.rejected.values()) == 250 + REJECTED_SENDERS_MAX)
            assert len(node.runtime.rejected) == REJECTED_SENDERS_MAX + 1
            assert node.runtime.rejected[REJECTED_OTHERS] > 40
            assert not node.task.done()

    run(main())


def test_local_misuse_comes_back_to_the_caller_and_the_node_lives() -> None:
    async def main() -> None:
        def answer(event: Event) -> list[Effect]:
            if event == SchemaChanged():
                raise LocalProtocolError("not now")
            return [Published(1, 1)]

        async with Node(MemoryNetwork(), Script(answer)) as node:
            with pytest.raises(LocalProtocolError, match="not now"):
                node.runtime.submit(SchemaChanged())
            node.runtime.submit(TimerFired())
            assert node.effects[-1] == Published(1, 1)

    run(main())


def test_fatal_and_bugs_end_the_node() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        node = Node(network, Script(lambda event: [Fatal("two nodes with one id")] if event == SchemaChanged() else []))
        async with node:
            node.runtime.submit(SchemaChanged())
            with pytest.raises(NodeStopped, match="two nodes with one id"):
                await node.task
            assert node.effects == [Fatal("two nodes with one id")]
            assert Leaving() not in node.script.events

        def bug(event: Event) -> list[Effect]:
            if isinstance(event, MessageReceived):
                raise ZeroDivisionError("planned")
            return []

        node = Node(network, Script(bug))
        async with node:
            network.inject(node.transport.address, wire.encode(ENVELOPE, Ack(1, 1)))
            with pytest.raises(ZeroDivisionError, match="planned"):
                await node.task
            assert network.find(node.transport.address) is None

    run(main())


def test_events_that_set_off_one_another_without_end_are_stopped() -> None:
    def answer(event: Event) -> list[Effect]:
        return [Continue(TimerFired()), Continue(TimerFired())]

    node = Node(MemoryNetwork(), Script(answer))
    with pytest.raises(RuntimeError, match="set off more than"):
        node.runtime.submit(TimerFired())


def test_taken_address_ends_run_before_the_machine_begins() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        async with Node(network, Script(), "memory:a"):
            second = Node(network, Script(), "memory:a")
            with pytest.raises(OSError, match="already in use"):
                await second.runtime.run()
            assert second.script.events == []

    run(main())


def test_flood_starves_neither_the_timer_nor_local_requests() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        script = Script()

        def slow(event: Event) -> list[Effect]:
            if isinstance(event, MessageReceived):
                stop = time.perf_counter() + 0.0005
                while time.perf_counter() < stop:
                    pass
            elif event == TimerFired():
                script.deadline_ms = read_clock().monotonic_ms + 5
            return []

        script.answer = slow
        async with Node(network, script) as node:
            frames = wire.encode(ENVELOPE, Ack(1, 1))
            answered: list[float] = []

            async def flood() -> None:
                while True:
                    while network.inject(node.transport.address, frames):
                        pass
                    await asyncio.sleep(0)

            async def ask() -> None:
                while True:
                    node.runtime.submit(SchemaChanged())
                    answered.append(time.monotonic())
                    await asyncio.sleep(0.005)

            script.deadline_ms = 0
            node.runtime.submit(SchemaChanged())
            tasks = [asyncio.create_task(flood()), asyncio.create_task(ask())]
            await until(
                lambda: (
                    sum(isinstance(event, MessageReceived) for event in script.events) > 50
                    and script.events.count(TimerFired()) > 10
                    and len(answered) > 10
                )
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main())


def test_effects_of_the_machine_pass_through_unchanged() -> None:
    async def main() -> None:
        applied = BatchApplied(1, "eu", 2, 3, 4, 5)
        async with Node(MemoryNetwork(), Script(lambda _: [applied])) as node:
            assert node.effects == [applied]

    run(main())
