"""What a schema may cost, whoever names it; and that the largest legal one can be told."""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ekko.errors import ModelError
from ekko.model import ModelSpec, TableSpec, TensorSpec
from ekko.store import Store, room
from ekko.store.store import MEMORY_DIR
from p2p import messages as m
from p2p import wire
from p2p.errors import BlamelessError, SchemaClashError
from p2p.members import membership
from p2p.replica import SchemaEntry
from p2p.sizes import SUMMARY_ITEMS_MAX, fitting, items_of
from p2p.stamps import WRITERS_MAX, make_stamp
from p2p.versions import PROTOCOL_VERSION


def used(folder: Path) -> int:
    """Bytes that files in this folder really take."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in a tmpfs: other file systems give a file more than it asks for."""
    with tempfile.TemporaryDirectory(prefix="ekko-room-", dir=MEMORY_DIR) as folder:
        yield Path(folder)


def test_a_peers_schema_takes_a_bounded_part_of_the_memory(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "UNASKED_BYTES_MAX", 27 << 20)
    store = Store.open(tmp_path / "run", memory_dir=memory)
    before = used(memory)
    with pytest.raises(BlamelessError, match="no room"):
        store.adopt(ModelSpec("wide", 65_536, {"a": TableSpec("a", 4)}).entries())
    tables = {f"t{number}": TableSpec(f"t{number}", 4) for number in range(2_000)}
    with pytest.raises(BlamelessError, match="no room"):
        store.adopt(ModelSpec("many", 1, tables).entries())
    assert used(memory) == before
    assert not store.models
    for count in range(5):
        store.adopt(ModelSpec(f"m{count}", 64, {"a": TableSpec("a", 4)}).entries())
    with pytest.raises(BlamelessError, match="configuration"):
        store.adopt(ModelSpec("m5", 64, {"a": TableSpec("a", 4)}).entries())
    assert len(store.models) == 5
    assert used(memory) - before <= 27 << 20
    # What the node's own configuration names is not of theirs, and may be added to while it runs.
    store.add_model(ModelSpec("ours", 512, {"a": TableSpec("a", 4)}))
    store.add_model(ModelSpec("m0", 64, {"a": TableSpec("a", 4)}))
    assert store.adopt(ModelSpec("ours", 512, {"b": TableSpec("b", 4)}).entries())
    with pytest.raises(ModelError, match="configuration"):
        store.add_model(ModelSpec("theirs", 512), asked=False)
    store.destroy()


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        pytest.param([ModelSpec(f"m{n}", 64, partitions=64) for n in range(65)], "4096", id="partitions"),
        pytest.param([ModelSpec(f"m{n}", 1) for n in range(1_025)], "1024", id="models"),
        pytest.param(
            [ModelSpec("m", 1, tensors={f"t{n}": TensorSpec(f"t{n}", (1,), "float32") for n in range(65_536)})],
            "65536",
            id="entries",
        ),
        pytest.param(
            [ModelSpec("m", 1, tensors={n: TensorSpec(n, (1,), "float32") for n in (f"{k:0100}" for k in range(30_000))})],
            "bytes",
            id="bytes",
        ),
    ],
)
def test_what_could_not_be_told_to_others_is_refused(specs: list[ModelSpec], complaint: str) -> None:
    with pytest.raises(room.NoRoomError, match=complaint):
        room.check_room([], [room.cost_of(spec) for spec in specs], 0)


def test_a_model_that_there_is_costs_what_is_added() -> None:
    spec = ModelSpec("m", 64, {"a": TableSpec("a", 4)})
    more = ModelSpec("m", 64, {"a": TableSpec("a", 4), "b": TableSpec("b", 4)})
    assert room.cost_of(spec) + room.cost_of(more, spec) == room.cost_of(more)
    assert room.cost_of(spec, spec) == room.Cost()


def largest_record(number: int) -> m.MemberRecord:
    """Of a node that writes all models and holds everything, as far as there is room for it."""
    writers = tuple(m.WriterRecord(2**32 - 1 - n, n, 2**64 - 1 - n, 0) for n in range(room.MODELS_MAX))
    holds = tuple(m.Holding(2**32 - 1 - n, 64, tuple(range(64))) for n in range(room.KEYSPACES_MAX // 64))
    life = number + 2**63, 2**47, "region", "train", f"tcp://node-{number}:7700", 2**31
    return m.MemberRecord(f"node-{number}", *life, writers=writers, holds=holds, version=2**31, told=PROTOCOL_VERSION)


def over_the_wire(message: m.Message) -> m.Message:
    frames = wire.encode(m.Envelope(1, 2, version=PROTOCOL_VERSION), message)
    return wire.decode([memoryview(bytes(frame)) for frame in frames])[1]


def test_the_largest_hello_is_read() -> None:
    """Of 64 such records as many as fit; they alone would be more items than a header may have."""
    own, *others = [largest_record(number) for number in range(membership.RECORDS_MAX + 1)]
    told = tuple(others[: fitting(others)])
    assert 1 < len(told) < len(others)
    bytes_each = room.ENTRY_BYTES_MAX // room.ENTRIES_MAX - 12
    schema = tuple(SchemaEntry(2**32 - 1, f"{n:0{bytes_each - 20}}", b"x" * 20) for n in range(room.ENTRIES_MAX))
    hello = m.Hello(1, 2**64 - 1, (4, 4, 8), own, told, schema, True)
    assert over_the_wire(hello) == hello


def test_the_largest_heartbeat_is_read() -> None:
    own, *others = [largest_record(number) for number in range(membership.RECORDS_MAX + 1)]
    stamps = tuple((w, make_stamp(2**41, 0, w)) for w in range(WRITERS_MAX))
    summary = m.KeyspaceSummary(2**32 - 1, 2**128 - 1, 2**128 - 1, stamps)
    small = m.KeyspaceSummary(2**32 - 1, 2**128 - 1, 2**128 - 1, stamps[:1])
    for one in (summary, small):
        count = SUMMARY_ITEMS_MAX // items_of(one)
        count = min(count, room.KEYSPACES_MAX)
        summaries = tuple(dataclasses.replace(one, keyspace=2**32 - 1 - number) for number in range(count))
        beat = m.Heartbeat(own, tuple(others[: fitting(others)]), 2**63, 2**47, summaries)
        read = over_the_wire(beat)
        assert isinstance(read, m.Heartbeat)
        assert read.summaries == beat.summaries
        assert read.members == beat.members


def test_two_models_of_one_message_that_have_an_id_in_common_are_a_clash_of_schemas() -> None:
    """A partition of the one has the number of the other: 32 bits, which a peer can search for."""
    store = Store.anonymous()
    wide, other = ModelSpec("w1594", 64, partitions=64), ModelSpec("p317908", 8)
    assert other.id in wide.keyspaces
    with pytest.raises(SchemaClashError, match="id of another"):
        store.adopt([*wide.entries(), *other.entries()])
    assert not store.models, "all of it or nothing"
    store.adopt(wide.entries())
    with pytest.raises(SchemaClashError, match="same id"):
        store.adopt(other.entries())
