"""One message of a member that lies: what it may cost is named and bounded, and it can end nobody."""

import asyncio
import dataclasses
import tracemalloc

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p import wire
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.link.compression import Mode
from p2p.link.links import Link
from p2p.link.outgoing import Outgoing
from p2p.replica import RowColumns, SchemaEntry
from p2p.transport import Frames
from p2p.wire.frames import pack_envelope
from p2p.wire.table import NUMBER_OF
from sim_cluster.node import MemoryLedger
from sim_cluster.virtual import VirtualCluster
from tests.p2p.keyed import KeyedTransport
from tests.p2p.test_hostile import link_of, machine_of
from tests.p2p.test_machine import start, synced


def over_the_wire(message: m.Message) -> m.Message:
    frames = wire.encode(m.Envelope(1, 2, version=2), message)
    return wire.decode([memoryview(bytes(frame)) for frame in frames])[1]


def record_of(cluster: VirtualCluster, name: str, **changes: object) -> m.MemberRecord:
    return dataclasses.replace(machine_of(cluster, name)._core.own_record(), **changes)  # type: ignore[arg-type]


def effects_of(cluster: VirtualCluster, name: str, source: str, message: m.Message) -> list[m.Effect]:
    """What one message of `source` sets off at `name`."""
    machine = machine_of(cluster, name)
    envelope = m.Envelope(link_of(cluster, name, source).boot, machine._core.options.boot, version=2)
    return machine.handle(m.MessageReceived(envelope, message), cluster.now())


@pytest.mark.parametrize("unix_ms", [1 << 48, 1 << 63, (1 << 64) - 1])
def test_a_clock_beyond_all_time_is_refused_before_it_is_computed_with(unix_ms: int) -> None:
    beat = m.Heartbeat(record_of(start(), "eu2"), (), 0, unix_ms, ())
    with pytest.raises(RemoteProtocolError):
        over_the_wire(beat)


@pytest.mark.parametrize("changes", [{"boot_ms": 1 << 48}, {"heartbeat": 1 << 32}])
def test_numbers_of_a_record_that_no_life_reaches_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        over_the_wire(m.MemberNews((record_of(start(), "eu2", **changes),)))


def test_the_largest_clock_that_is_read_is_computed_with() -> None:
    cluster = start()
    beat = over_the_wire(m.Heartbeat(record_of(cluster, "eu2"), (), 0, (1 << 48) - 1, ()))
    effects_of(cluster, "eu1", "eu2", beat)
    cluster.run(1_000)
    assert synced(cluster, "eu1")


def test_retirements_without_room_make_one_note() -> None:
    """Of 64 partitions each retired writer of the family makes an entry."""
    model = ModelSpec("ctr", 64, {"item": TableSpec("item", 4)}, partitions=64)
    cluster = VirtualCluster(1, model=model)
    cluster.add("t1", "train", "train")
    cluster.add("eu1", "eu", seeds=["t1"])
    assert cluster.run_until(lambda: synced(cluster, "eu1"))
    told = tuple(m.Retired(1, model.id, n, n + 1, m.FROZEN) for n in range(4096))
    effects = effects_of(cluster, "eu1", "t1", over_the_wire(m.Retirements((), told)))
    notes = [effect for effect in effects if isinstance(effect, m.Note) and effect.name == "retirements_full"]
    assert len(notes) == 1
    assert len(effects) < 2 * len(told)


def test_an_array_of_empty_maps_costs_no_multiple_of_the_frame_it_came_from() -> None:
    """Compressed, five megabytes of them are 254 bytes on the wire."""
    for item in (b"\x80", b"\x90", b"\x91\x90"):
        count = (5 << 20) // len(item)
        header = b"\x91\xdd" + count.to_bytes(4, "big") + item * count
        with pytest.raises(RemoteProtocolError):
            wire.decode(framed(header))
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError):
                wire.decode(framed(header))
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()


def test_many_short_lists_cost_a_bounded_number_of_items() -> None:
    header = b"\x91\xdd" + (1000).to_bytes(4, "big") + (b"\xdd" + (1000).to_bytes(4, "big") + b"\x90" * 1000) * 1000
    with pytest.raises(RemoteProtocolError, match="items"):
        wire.decode(framed(header))


def framed(header: bytes) -> list[memoryview]:
    """A MemberNews with this header."""
    head = len(header).to_bytes(4, "little") + header
    head += bytes(-len(head) % 8)
    number = NUMBER_OF[m.MemberNews]
    envelope = pack_envelope(m.Envelope(1, 2, version=2), number, wire.checksum([head]))
    return [memoryview(envelope), memoryview(head)]


def test_the_largest_schema_that_fits_in_a_header_is_read() -> None:
    entries = tuple(SchemaEntry(n & 1, f"tensor:layers.{n:05}.projection.weight", b"x" * 40) for n in range(20_000))
    assert over_the_wire(m.SchemaUpdate(entries)) == m.SchemaUpdate(entries)


class CountingLedger(MemoryLedger):
    """Counts durable writes."""

    saves = 0

    def save(self, record: bytes) -> None:
        self.saves += 1
        super().save(record)


def test_a_pull_that_names_every_writer_makes_one_durable_write() -> None:
    cluster = start()
    core = machine_of(cluster, "eu1")._core
    ledger = core.record.ledger = CountingLedger()
    ids = np.arange(4096, dtype=np.uint16)
    nonces = np.full(4096, 666, np.uint64)
    for (_, writer), nonce in core.record.bindings.items():
        nonces[writer] = nonce
    pull = m.PullRequest(cluster.model.id, 1, ids, np.zeros((8, 4096), np.uint64), np.zeros(4096, np.uint64), 8, nonces)
    effects_of(cluster, "eu1", "eu2", over_the_wire(pull))
    assert core.writers.nonce_of(cluster.model.id, 4095) == 666
    assert ledger.saves == 1


def test_a_refused_chunk_binds_no_writer() -> None:
    cluster = start()
    machine = machine_of(cluster, "eu1")
    machine._core.effects = []
    machine._pull.ask(machine._core.keyspaces[cluster.model.id], link_of(cluster, "eu1", "t1"), cluster.now(), "test")
    before = dict(machine._core.record.bindings)
    nothing = np.empty(0, np.uint16), np.empty((9, 0), np.uint64), np.empty(0, np.uint64)  # nine shards, not eight
    bindings = np.array([99], np.uint16), np.array([5], np.uint64)
    chunk = m.PullReply(cluster.model.id, machine._pull._requests, 0, True, (), *nothing, *bindings)
    with pytest.raises(RemoteProtocolError):
        machine._pull.on_reply(link_of(cluster, "eu1", "t1"), chunk, cluster.now())
    assert machine._core.record.bindings == before


def test_an_acknowledgement_of_what_was_never_sent_gives_no_credit() -> None:
    link = Link("a", 1, "x", "eu", 2)
    for _ in range(3):
        link.next_envelope(1000)
    assert not link.on_ack(1, 4)
    assert link.bytes_in_flight == 3000
    assert link.on_ack(1, 3)
    assert link.bytes_in_flight == 0


def test_an_expelled_stranger_is_told_everything_once_a_beat() -> None:
    cluster = start()
    machine = machine_of(cluster, "eu1")
    effects_of(cluster, "eu1", "t1", m.Retirements((m.Expulsion("gone", 4711, 1),), ()))
    gone = m.MemberRecord("gone", 4711, 1, "eu", "serve", "virtual://gone", 1)
    event = m.MessageReceived(m.Envelope(4711, machine._core.options.boot, version=2), m.Heartbeat(gone, (), 0, 0, ()))
    answers = [sum(isinstance(effect, m.Send) for effect in machine.handle(event, cluster.now())) for _ in range(20)]
    assert answers == [1] + [0] * 19
    cluster.run(500)
    assert any(isinstance(effect, m.Send) for effect in machine.handle(event, cluster.now()))


def test_an_error_while_a_line_is_worked_off_is_told_and_the_line_goes_on() -> None:
    """asyncio swallows what a callback raises."""

    class Failing(KeyedTransport):
        failures = 1

        def send(self, address: str, frames: Frames) -> bool:
            if self.failures:
                self.failures -= 1
                raise LocalProtocolError("a frame that is too long")
            return super().send(address, frames)

    async def main() -> None:
        transport, failures = Failing(), list[Exception]()
        out = Outgoing(transport, Mode.ALWAYS, lambda _: True, failures.append)
        rows = RowColumns(1, np.arange(20_000, dtype=np.uint64), np.zeros((20_000, 32), np.uint8), np.ones(20_000, np.uint64))
        nothing = np.empty(0, np.uint16), np.zeros((8, 0), np.uint64), np.empty(0, np.uint64)
        envelope = m.Envelope(1, 2, 1, 1, version=2)
        assert out.send("a", envelope, m.PullReply(1, 1, 0, False, (rows,), *nothing))
        assert out.send("a", dataclasses.replace(envelope, sequence=2), m.Ack(1, 1))
        await out.close()
        assert not out._lines
        assert len(transport.sent) == out.counters.lost == len(failures) == 1

    asyncio.run(main())
