"""Encrypted links with real sockets: who gets in, who is cut off, and what a stranger gets."""

import asyncio
import itertools
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop
import zmq

from p2p.transport import Origin
from p2p.transport import zmq as zmq_module
from p2p.transport.curve import KeyPair
from p2p.transport.zmq import ZmqTransport


def new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


class Book:
    """Keys in memory; fulfils `p2p.transport.curve.Keys`."""

    def __init__(self, node: str, own: KeyPair, others: dict[str, str]) -> None:
        self.node, self.own, self.others = node, own, others  # others: public key -> node

    def owner(self, public: str) -> str | None:
        return self.node if public == self.own.public else self.others.get(public)

    def candidates(self, address: str) -> Sequence[str]:
        return list(self.others)


class Member:
    """A transport, its keys and what it received."""

    def __init__(self, book: Book | None, bind: str = "tcp://127.0.0.1:0", advertise: str | None = None) -> None:
        self.book = book
        self.transport = ZmqTransport(bind, advertise=advertise, keys=book)
        self.messages: list[bytes] = []
        self.origins: set[Origin] = set()

    def receive(self, frames: list[memoryview], origin: Origin) -> None:
        self.messages.append(bytes(frames[0]))
        self.origins.add(origin)

    @property
    def address(self) -> str:
        return self.transport.address

    def reaches(self, other: "Member", text: bytes = b"x") -> bool:
        """Send; whether anything of this text has arrived."""
        self.transport.send(other.address, [text])
        return text in other.messages


class Cluster:
    """Some members, each with a key that all others allow."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def open(self, *names: str) -> list[Member]:
        pairs = {name: new_pair() for name in names}
        members = []
        for name, own in pairs.items():
            others = {pair.public: other for other, pair in pairs.items() if other != name}
            members.append(await self.start(Member(Book(name, own, others))))
        return members

    async def start(self, member: Member) -> Member:
        await member.transport.start(member.receive)
        self._stack.push_async_callback(member.transport.close)
        return member


def clustered(body: Callable[[Cluster], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        async def main() -> None:
            async with AsyncExitStack() as stack:
                await body(Cluster(stack))

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    test.__name__ = body.__name__
    return test


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition never held"
        await asyncio.sleep(0.005)


@clustered
async def test_members_talk_and_know_whom_they_hear(cluster: Cluster) -> None:
    a, b, c = await cluster.open("a", "b", "c")
    await until(lambda: a.reaches(b))
    await until(lambda: c.reaches(b, b"y"))
    assert b.origins == {Origin("a", "a"), Origin("c", "c")}
    assert b.transport.counters.strangers == 0


@clustered
async def test_a_stranger_gets_nothing_and_is_counted(cluster: Cluster) -> None:
    a, b = await cluster.open("a", "b")
    assert a.book is not None
    assert b.book is not None
    await until(lambda: a.reaches(b))
    # It knows b's public key, but b does not know its own.
    stranger = await cluster.start(Member(Book("a", new_pair(), {b.book.own.public: "b"})))
    await until(lambda: stranger.reaches(b, b"secret?") or b.transport.counters.strangers >= 2)
    assert b.transport.counters.strangers >= 2  # it comes again, slowly
    assert b"secret?" not in b.messages
    assert not stranger.transport.connected(b.address)
    # In the clear, and with the wrong idea of who listens there.
    failures = b.transport.counters.handshakes_failed
    clear = await cluster.start(Member(None))
    await until(lambda: clear.reaches(b, b"clear") or b.transport.counters.handshakes_failed > failures)
    misled = await cluster.start(Member(Book("m", new_pair(), {new_pair().public: "b"})))
    failures = b.transport.counters.handshakes_failed
    await until(lambda: misled.reaches(b, b"misled") or b.transport.counters.handshakes_failed > failures)
    assert set(b.messages) == {b"x"}
    # And b does not speak to a listener that is no member: it dials, and no byte of the message leaves.
    assert not b.reaches(stranger, b"ours")
    await until(lambda: a.reaches(b, b"still here"))
    assert stranger.messages == []


@clustered
async def test_a_key_that_is_removed_is_cut_off_and_one_that_is_added_let_in(cluster: Cluster) -> None:
    a, b, c = await cluster.open("a", "b", "c")
    assert a.book is not None
    assert b.book is not None
    await until(lambda: a.reaches(b))
    await until(lambda: c.reaches(b))
    await until(lambda: b.reaches(a))
    node = b.book.others.pop(a.book.own.public)
    await until(lambda: a.reaches(b, b"unread before the cut") or b.transport.counters.revoked)
    await b.transport.check_keys()
    await until(lambda: not a.transport.connected(b.address) and not b.transport.connected(a.address))
    await until(lambda: a.reaches(b, b"too late") or b.transport.counters.strangers)
    await until(lambda: c.reaches(b, b"c comes back"))
    assert not {b"unread before the cut", b"too late"} & set(b.messages)
    assert not b.reaches(a, b"to the removed")
    b.book.others[a.book.own.public] = node
    await b.transport.check_keys()
    await until(lambda: a.reaches(b, b"back"))
    await until(lambda: b.reaches(a, b"back"))
    assert b"to the removed" not in a.messages


@clustered
async def test_a_key_is_replaced_while_all_talk(cluster: Cluster) -> None:
    a, b, c = await cluster.open("a", "b", "c")
    new = new_pair()
    await until(lambda: a.reaches(b) and b.reaches(a) and c.reaches(b))
    for member in (a, c):
        assert member.book is not None
        member.book.others[new.public] = "b"  # the new key is allowed beside the old one
        await member.transport.check_keys()
    assert b.book is not None
    old, b.book.own = b.book.own, new
    address = b.address
    await b.transport.check_keys()
    assert b.address == address
    await until(lambda: a.reaches(b, b"1") and b.reaches(a, b"1") and c.reaches(b, b"1") and b.reaches(c, b"1"))
    for member in (a, c):
        assert member.book is not None
        del member.book.others[old.public]
        await member.transport.check_keys()
    assert a.reaches(b, b"1")
    await until(lambda: a.reaches(b, b"2") and b.reaches(a, b"2") and c.reaches(b, b"2") and b.reaches(c, b"2"))
    assert a.origins == {Origin("b", "b")}


@clustered
async def test_among_many_keys_the_right_one_is_found(cluster: Cluster) -> None:
    a, b = await cluster.open("a", "b")
    assert a.book is not None
    a.book.others = {**{new_pair().public: f"n{number}" for number in range(60)}, **a.book.others}
    await until(lambda: a.reaches(b))


@pytest.mark.parametrize("encrypted", [False, True])
def test_ipv6_and_names_and_advertise(encrypted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(zmq_module, "REDIAL_S", 0.05)
    asked: list[str] = []

    async def main() -> None:
        async with AsyncExitStack() as stack:
            cluster = Cluster(stack)
            pairs = {name: new_pair() for name in "ab"}
            books = {n: Book(n, p, {q.public: m for m, q in pairs.items() if m != n}) for n, p in pairs.items()}
            a = await cluster.start(Member(books["a"] if encrypted else None, "tcp://[::1]:0"))
            assert a.address.startswith("tcp://[::1]:")
            port = a.address.rpartition(":")[2]
            b = await cluster.start(Member(books["b"] if encrypted else None, "tcp://localhost:0", "tcp://b.example:7"))
            assert b.address == "tcp://b.example:7"
            await until(lambda: b.reaches(a))
            # A name that means nothing at first, then the wrong machine, then the right one, as often as it takes to connect.
            answers = itertools.chain([OSError("no such name"), "127.0.0.1"], itertools.repeat("::1"))
            loop = asyncio.get_running_loop()

            async def resolve(host: str, port: str, **_: object) -> list[Any]:
                asked.append(host)
                answer = next(answers)
                if isinstance(answer, OSError):
                    raise answer
                return [(0, 0, 0, "", (answer, int(port)))]

            class Loop:
                getaddrinfo = staticmethod(resolve)

                def __getattr__(self, name: str) -> Any:
                    return getattr(loop, name)

            b.transport._loop = Loop()  # type: ignore[assignment]
            await until(lambda: b.transport.send(f"tcp://a.example:{port}", [b"by name"]))
            await until(lambda: b"by name" in a.messages)
            b.transport._loop = loop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert len(asked) >= 3
    assert set(asked) == {"a.example"}
