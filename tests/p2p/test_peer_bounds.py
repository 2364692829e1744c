"""One message of a member that lies: what it may cost is named and bounded, and it can end nobody."""

import dataclasses

import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p import wire
from p2p.errors import RemoteProtocolError
from sim_cluster.virtual import VirtualCluster
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
