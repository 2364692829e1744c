"""How long the rows of a table live: a fact of the schema, the same on all nodes."""

from pathlib import Path

import pytest

from ekko.errors import ModelError
from ekko.model import TTL_S_MAX, ModelSpec, TableSpec, parse_entry, ttl_seconds
from ekko.store import Store
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry
from p2p.stamps import make_stamp

NOW_MS = 1_800_000_000_000


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("90s", 90), ("5m", 300), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600), (7, 7), (0, 0), ("", 0)],
)
def test_times_are_said_in_words_or_seconds(said: object, seconds: int) -> None:
    assert ttl_seconds("item", said) == seconds


@pytest.mark.parametrize("said", ["0s", "30", "1.5h", "d", "-1d", "99999999999w", TTL_S_MAX + 1, -1, 1.0, True, None, ["1d"]])
def test_other_times_are_refused(said: object) -> None:
    with pytest.raises(ModelError, match="expected a time such as"):
        ttl_seconds("item", said)


def test_a_row_expires_so_long_after_its_last_update() -> None:
    table = TableSpec("item", 4, ttl_s=60)
    youngest_that_is_gone = make_stamp(NOW_MS - 60_001, 1023, 4095)
    oldest_that_counts = make_stamp(NOW_MS - 60_000, 0, 0)
    assert youngest_that_is_gone < table.stamp_min(NOW_MS) <= oldest_that_counts
    assert TableSpec("item", 4).stamp_min(NOW_MS) == 0
    assert TableSpec("item", 4, ttl_s=TTL_S_MAX).stamp_min(NOW_MS) == 0


def test_the_schema_says_it_only_where_there_is_one() -> None:
    """So that equal facts stay equal bytes, and nodes of the version before understand the others."""
    mortal, lasting = TableSpec("item", 4, ttl_s=60), TableSpec("item", 4)
    spec = ModelSpec("ctr", 8, {"item": mortal})
    assert [(entry.name, entry.since) for entry in spec.entries()] == [("model", 1), ("table:item", 2)]
    assert (spec.since, ModelSpec("ctr", 8, {"item": lasting}).since) == (2, 1)
    assert [parse_entry(entry) for entry in spec.entries()] == [spec.bare(), mortal]
    plain = ModelSpec("ctr", 8, {"item": lasting}).entries()[1]
    assert plain.body != spec.entries()[1].body
    longer = SchemaEntry(spec.id, "table:item", plain.body[:1].replace(b"\x93", b"\x94") + plain.body[1:] + b"\x00")
    with pytest.raises(RemoteProtocolError, match="another way"):
        parse_entry(longer)


def test_a_store_that_is_opened_again_knows_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 4, ttl_s=60)}))
    store.close()
    again = Store.open(tmp_path)
    assert again.models["ctr"].spec.tables["item"].ttl_s == 60
    again.destroy()
