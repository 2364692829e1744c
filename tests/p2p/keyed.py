"""A node behind a transport that says whose key was proven, as ZeroMQ with keys does: messages come in the name of anybody."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from p2p import messages as m
from p2p import wire
from p2p.machine import Machine, MachineOptions
from p2p.members.introductions import CONSTANTS
from p2p.runtime import Runtime
from p2p.stamps import EPOCH_MS
from p2p.transport import Frames, Origin, Receive
from p2p.versions import first_record_version
from sim_cluster.node import MemoryLedger

MODEL = ModelSpec("ctr", 8, {"item": TableSpec("item", 4)})
BOOTS = {"t1": 101, "evil": 102, "us1": 103}
OWN_BOOT = 5


class KeyedTransport:
    """Takes everything; remembers which addresses are connected."""

    address = "tcp://10.0.0.1:1"

    def __init__(self) -> None:
        self.sent: list[tuple[str, Frames]] = []
        self.addresses: set[str] = set()
        self._receive: Receive | None = None

    async def start(self, receive: Receive) -> None:
        self._receive = receive

    def send(self, address: str, frames: Frames) -> bool:
        self.sent.append((address, frames))
        self.addresses.add(address)
        return True

    def connected(self, address: str) -> bool:
        return address in self.addresses

    def disconnect(self, address: str) -> None:
        self.addresses.discard(address)

    def set_delay(self, address: str, seconds: float) -> None:
        self.addresses.add(address)

    async def close(self) -> None:
        pass

    def come(self, node: str, envelope: m.Envelope, message: m.Message) -> None:
        """A message from the owner of this node's key, whatever its envelope says."""
        assert self._receive is not None
        self._receive([memoryview(bytes(frame)) for frame in wire.encode(envelope, message)], Origin(node, node))


class KeyedNode:
    """Node `eu1`, and what it was made of."""

    def __init__(self, **options: Any) -> None:
        store = Store.anonymous()
        store.add_model(MODEL, 64)
        chosen = {"node": "eu1", "region": "eu", "role": "serve", "seeds": ("tcp://10.0.0.9:1",)} | options
        self.machine = Machine(
            MachineOptions(boot=OWN_BOOT, boot_ms=EPOCH_MS, **chosen), store, MemoryLedger(), random.Random(1)
        )
        self.transport = KeyedTransport()
        self.effects: list[m.Effect] = []
        self.now_ms, self.unix_ms = 1_000, EPOCH_MS + 10**9
        self.runtime = Runtime(self.machine, self.transport, on_effect=self.effects.append, clock=self.clock)

    def clock(self) -> m.Now:
        return m.Now(self.now_ms, self.unix_ms + self.now_ms)

    def come(self, node: str, message: m.Message, boot: int = 0, sequence: int = 0, version: int = 2) -> None:
        """A message of the owner of this node's key; `boot`: as whom it speaks, if not as itself."""
        envelope = m.Envelope(boot or BOOTS[node], OWN_BOOT, int(sequence > 0), sequence, version=version)
        self.transport.come(node, envelope, message)

    def alive(self) -> set[str]:
        return set(self.machine.peers_alive(self.clock()))


def record_of(name: str, boot: int, role: str = "serve") -> m.MemberRecord:
    address = f"tcp://10.0.1.{boot % 200}:1"
    return m.MemberRecord(name, boot, EPOCH_MS, "eu", role, address, 1, version=first_record_version(2))


def hello_of(record: m.MemberRecord) -> m.Hello:
    return m.Hello(1, 2, CONSTANTS, record, (), tuple(MODEL.entries()), False)


def with_node(body: Callable[[KeyedNode], Awaitable[None]], *, peers: bool = True, **options: Any) -> None:
    """Run `body` with a node that knows t1 (training), evil and us1; it must not fail meanwhile."""

    async def main() -> None:
        node = KeyedNode(**options)
        task = asyncio.create_task(node.runtime.run())
        await node.runtime.started.wait()
        try:
            for name, boot in BOOTS.items() if peers else ():
                node.transport.come(
                    name, m.Envelope(boot, OWN_BOOT), hello_of(record_of(name, boot, "train" if name == "t1" else "serve"))
                )
            assert not peers or node.alive() == set(BOOTS)
            await body(node)
            await asyncio.sleep(0)
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
