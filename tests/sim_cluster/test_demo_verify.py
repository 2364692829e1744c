"""The comparison of replicas finds every kind of difference, and none where there is none."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec, TensorSpec, table_id
from ekko.store import Store
from p2p.replica import RowColumns
from sim_cluster.demo.verify import contents, difference, difference_to_parameters

TENSOR = TensorSpec("top", (3, 2), "float32")
SPEC = ModelSpec("ctr", tables={"item": TableSpec("item", 4)}, tensors={"top": TENSOR})
ROWS = np.arange(20, dtype=np.float32).reshape(5, 4)
VALUE = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Path, Path, Store, Store]]:
    """Two nodes' run_dirs and stores, with the same rows in another order: three live ones, two deleted ones."""
    stores = []
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        store = Store.open(tmp_path / name)
        model = store.add_model(SPEC)
        for key in order:
            apply(store, [key], ROWS[[key]], 100 + key)
        model.apply([RowColumns(table_id("item"), np.array([8, 9], np.uint64), np.empty((0, 16), np.uint8))], 200)
        dense = np.zeros((1, 256), np.float32)
        dense[0, :6] = VALUE.reshape(-1)
        model.apply([RowColumns(table_id("_dense"), TENSOR.keys, dense.view(np.uint8))], 300)
        stores.append(store)
    yield tmp_path / "a", tmp_path / "b", *stores
    for store in stores:
        store.destroy()


def apply(store: Store, keys: list[int], rows: np.ndarray, stamp: int) -> None:
    store.models["ctr"].apply([RowColumns(table_id("item"), np.array(keys, np.uint64), rows.view(np.uint8))], stamp)


def test_contents_are_every_version_sorted_by_key(pair: tuple[Path, Path, Store, Store]) -> None:
    held = contents(pair[0], "ctr")
    assert set(held) == {"item", "_dense"}
    assert held["item"]["key"].tolist() == [0, 1, 2, 8, 9]
    assert held["item"]["stamp"].tolist() == [100, 101, 102, 200, 200]
    assert (held["item"]["flags"] & 1).tolist() == [0, 0, 0, 1, 1]
    assert held["item"]["data"][1].tobytes() == ROWS[1].tobytes()
    assert contents(pair[0], "other") == {}


def test_equal_stores_have_no_difference_whatever_the_order_of_writes(pair: tuple[Path, Path, Store, Store]) -> None:
    assert difference(contents(pair[0], "ctr"), contents(pair[1], "ctr")) == ""


@pytest.mark.parametrize(
    ("key", "row", "stamp", "complaint"),
    [
        pytest.param(1, ROWS[1], 150, "'item': 1 rows differ in stamp, first key 1", id="stamp"),
        pytest.param(5, ROWS[1], 150, "'item': different keys \\(5 and 6 rows\\)", id="extra-key"),
        pytest.param(9, ROWS[1], 150, None, id="an-older-write-changes-nothing"),
    ],
)
def test_a_difference_is_named(
    pair: tuple[Path, Path, Store, Store], key: int, row: np.ndarray, stamp: int, complaint: str | None
) -> None:
    apply(pair[3], [key], row[None], stamp)
    found = difference(contents(pair[0], "ctr"), contents(pair[1], "ctr"))
    if complaint is None:
        assert found == ""
    else:
        assert re.search(complaint, found)


def test_a_value_or_a_tombstone_under_the_same_stamp_is_found(pair: tuple[Path, Path, Store, Store]) -> None:
    apply(pair[2], [1, 2], ROWS[[1, 2]], 400)
    apply(pair[3], [1, 2], ROWS[[1, 2]] + np.array([[0], [1]], np.float32), 400)
    assert difference(contents(pair[0], "ctr"), contents(pair[1], "ctr")) == "table 'item': 1 rows differ in data, first key 2"
    apply(pair[2], [1, 2], ROWS[[1, 2]], 500)
    gone = RowColumns(table_id("item"), np.array([2, 1], np.uint64), ROWS[[2]].view(np.uint8))
    pair[3].models["ctr"].apply([gone], 500)
    assert difference(contents(pair[0], "ctr"), contents(pair[1], "ctr")) == "table 'item': 1 rows differ in flags, first key 1"


def test_parameters_are_compared_as_a_reader_sees_them(pair: tuple[Path, Path, Store, Store]) -> None:
    def compare(rows: np.ndarray, value: np.ndarray) -> str:
        return difference_to_parameters(pair[0], "ctr", {"item": rows}, {"top": value})

    assert compare(ROWS[:3], VALUE) == ""
    negative_zero = ROWS[:3].copy()
    negative_zero[0, 0] = -0.0  # equal as a number, not as bits
    assert compare(negative_zero, VALUE) == "table 'item': 1 rows differ from the trained ones, first key 0"
    assert compare(ROWS[:3], VALUE + 1) == "dense parameter 'top' differs from the trained one"
