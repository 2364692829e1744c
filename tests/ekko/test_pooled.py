"""Pooled look-ups against `torch.nn.functional.embedding_bag` and NumPy, in every mode and codec; and what absent keys are."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ekko.codec import encode, rounded
from ekko.errors import ModelError
from ekko.model import CODECS, ModelSpec, TableSpec
from ekko.serve import defaults
from ekko.serve.reader import Reader
from ekko.store import Store
from ekko.store.kernels.rows import PART_KEYS
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import make_stamp

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]

ROWS = 60
DIMS = {"narrow": 3, "wide": 64}
DELETED = np.array([5, 17], np.uint64)
# Keys from ROWS on have never been there.
KEYS = st.lists(st.integers(0, ROWS + 4), max_size=40)


def values(table: str, codec: str) -> F32:
    """float32[ROWS, dim]: what readers see of row i, key i, deleted ones apart."""
    rng = np.random.default_rng(DIMS[table])
    return rounded(codec, rng.standard_normal((ROWS, DIMS[table]), dtype=np.float32))


def fill(model: ModelStore, table: str) -> None:
    spec = model.spec.tables[table]
    rng = np.random.default_rng(spec.dim)
    rows = rng.standard_normal((ROWS, spec.dim), dtype=np.float32)
    model.apply([RowColumns(spec.id, np.arange(ROWS, dtype=np.uint64), encode(spec.codec, rows))], 10)
    model.apply([RowColumns(spec.id, DELETED, np.empty((0, spec.row_bytes), np.uint8))], 11)


@pytest.fixture(scope="module", params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run_dir(codec: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run_dir = tmp_path_factory.mktemp("pooled") / codec
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", 8, {name: TableSpec(name, dim, codec) for name, dim in DIMS.items()}, codec=codec))
    for table in DIMS:
        fill(model, table)
    yield run_dir
    store.destroy()


def expected(
    rows: F32, default: F32, keys: U64, ends: NDArray[np.int64], mode: str, weights: F32 | None, padding: int | None
) -> F32:
    """The oracle: bag by bag, in float64."""
    out = np.zeros((ends.size - 1, rows.shape[1]))
    table = np.concatenate([rows, np.zeros((5, rows.shape[1]), np.float32)])
    table[DELETED.astype(int)] = table[ROWS:] = default
    for bag in range(ends.size - 1):
        chosen = [i for i in range(ends[bag], ends[bag + 1]) if int(keys[i]) != padding]
        if chosen:
            found = table[keys[chosen].astype(int)].astype(float)
            if weights is not None:
                found *= weights[chosen][:, None]
            out[bag] = {"sum": found.sum(0), "mean": found.mean(0), "max": found.max(0)}[mode]
    return out.astype(np.float32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.sampled_from(sorted(DIMS)),
    keys=KEYS,
    cuts=st.lists(st.integers(0, 40), max_size=8),
    mode=st.sampled_from(["sum", "mean", "max", "weighted"]),
    last=st.booleans(),
    padding=st.none() | st.integers(0, ROWS + 4),
    default=st.sampled_from(["zeros", "given"]),
)
def test_bags_are_what_numpy_makes_of_them(
    run_dir: Path,
    codec: str,
    table: str,
    keys: list[int],
    cuts: list[int],
    mode: str,
    last: bool,
    padding: int | None,
    default: str,
) -> None:
    asked = np.array(keys, np.uint64)
    ends = np.array([0, *sorted(min(cut, len(keys)) for cut in cuts), len(keys)])
    weights = np.random.default_rng(len(keys)).standard_normal(len(keys), dtype=np.float32) if mode == "weighted" else None
    row = np.arange(DIMS[table], dtype=np.float32) if default == "given" else np.zeros(DIMS[table], np.float32)
    with Reader("ctr", run_dir, defaults={table: row} if default == "given" else {}) as reader:
        found = reader.lookup_pooled(
            table,
            asked,
            ends if last else ends[:-1],
            mode="sum" if mode == "weighted" else mode,  # type: ignore[arg-type]
            weights=weights,
            include_last_offset=last,
            padding_key=padding,
        )
    wanted = expected(values(table, codec), row, asked, ends, "sum" if mode == "weighted" else mode, weights, padding)
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("table", DIMS)
def test_bags_are_what_torch_makes_of_them(run_dir: Path, codec: str, table: str, mode: str) -> None:
    """Bags from none to several parts of the kernel, 2-D keys, weights and padding."""
    torch = pytest.importorskip("torch")
    bag = torch.nn.functional.embedding_bag
    rng = np.random.default_rng(3)
    rows = values(table, codec)
    rows[DELETED.astype(int)] = 0
    weight = torch.from_numpy(rows)
    lengths = np.array([0, 3, 0, 0, 2 * PART_KEYS + 5, 1, PART_KEYS - 9, 0, 17, 0])
    keys = rng.integers(0, ROWS, lengths.sum())
    offsets = np.cumsum(lengths) - lengths
    grid = keys[:300].reshape(20, 15)
    factors = rng.standard_normal(keys.size, dtype=np.float32)
    close = {"rtol": 1e-4, "atol": 1e-3}
    with Reader("ctr", run_dir) as reader:
        for padding in (None, 3):
            found = reader.lookup_pooled(table, keys, offsets, mode=mode, padding_key=padding)  # type: ignore[arg-type]
            wanted = bag(torch.from_numpy(keys), weight, torch.from_numpy(offsets), mode=mode, padding_idx=padding)
            assert np.allclose(found, wanted.numpy(), **close)
            out = np.full((20, DIMS[table]), np.nan, np.float32)
            assert reader.lookup_pooled(table, grid, mode=mode, padding_key=padding, out=out) is out  # type: ignore[arg-type]
            wanted = bag(torch.from_numpy(grid), weight, mode=mode, padding_idx=padding)
            assert np.allclose(out, wanted.numpy(), **close)
        if mode == "sum":
            found = reader.lookup_pooled(table, keys, offsets, weights=factors)
            wanted = bag(
                torch.from_numpy(keys),
                weight,
                torch.from_numpy(offsets),
                mode="sum",
                per_sample_weights=torch.from_numpy(factors),
            )
            assert np.allclose(found, wanted.numpy(), **close)


def test_what_does_not_fit_is_named(run_dir: Path) -> None:
    ones = np.ones(3, np.float32)
    mistakes = {
        "mode is 'median'": {"keys": [[1]], "mode": "median"},
        r"keys are \[3\] and there are no offsets": {"keys": [1, 2, 3]},
        r"keys are \[1, 1\] and there are offsets": {"keys": [[1]], "offsets": [0]},
        "offsets have to begin with 0: the first is 1": {"keys": [1, 2], "offsets": [1]},
        "offsets have to begin with 0: there are none": {"keys": [1, 2], "offsets": []},
        "offsets have to ascend": {"keys": [1, 2, 3], "offsets": [0, 2, 1]},
        "at most the number of keys, 2": {"keys": [1, 2], "offsets": [0, 3]},
        "offsets are float64": {"keys": [1, 2], "offsets": [0.0]},
        "the last of the offsets": {"keys": [1, 2], "offsets": [0, 1], "include_last_offset": True},
        "without offsets": {"keys": [[1, 2]], "include_last_offset": True},
        "only 'sum' has weights": {"keys": [[1, 2, 3]], "weights": [ones], "mode": "mean"},
        "expected one weight for each key": {"keys": [[1, 2]], "weights": [ones]},
        "padding_key is -1": {"keys": [[1]], "padding_key": -1},
        "out is float32": {"keys": [[1]], "out": np.zeros((2, 3), np.float32)},
    }
    with Reader("ctr", run_dir) as reader:
        for complaint, arguments in mistakes.items():
            with pytest.raises(ModelError, match=complaint):
                reader.lookup_pooled("narrow", **arguments)  # type: ignore[arg-type]
        assert reader.lookup_pooled("narrow", [], []).shape == (0, 3)
        assert reader.lookup_pooled("narrow", np.empty((4, 0), np.int64)).tolist() == [[0.0] * 3] * 4


# --- what absent keys are, and several tables -------------------------------------------------------------------------------


def test_absent_keys_are_what_the_reader_was_told(run_dir: Path, codec: str) -> None:
    given = np.array([1, 2, 3])
    absent = [int(DELETED[0]), ROWS]
    wide = values("wide", codec)
    live = np.delete(wide, DELETED.astype(int), axis=0)
    with Reader("ctr", run_dir, defaults={"narrow": given, "wide": "mean"}) as reader:
        rows, stamps = reader.lookup("narrow", [*absent, 0], stamps=True)
        assert rows.tolist() == [[1, 2, 3], [1, 2, 3], values("narrow", codec)[0].tolist()]
        assert stamps.tolist() == [0, 0, 10]
        assert np.allclose(reader.lookup("wide", [absent]), live.mean(0), atol=1e-6)
        assert np.allclose(reader.lookup_pooled("wide", [absent], mode="mean"), live.mean(0), atol=1e-6)
    with Reader("ctr", run_dir, defaults={"narrow": "zeros"}) as reader:
        assert not reader.lookup("narrow", absent).any()


def test_a_default_that_is_none_is_refused(run_dir: Path) -> None:
    mistakes = {
        "'median': expected 'zeros', 'mean', or a row": "median",
        r"is float64\[1, 3\]": [[1.0, 2.0, 3.0]],
        "a row of finite numbers": [1.0, np.nan, 2.0],
        "has 2 values: expected dim 3": [1.0, 2.0],
    }
    for complaint, rule in mistakes.items():
        with pytest.raises(ModelError, match=complaint):
            Reader("ctr", run_dir, defaults={"narrow": rule})  # type: ignore[dict-item]


def test_the_mean_row_follows_the_table(tmp_path: Path) -> None:
    """Made anew when the table has twice as many rows, and after a while."""
    store = Store.open(tmp_path)
    try:
        model = store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 2)}))
        spec = model.spec.tables["item"]

        def publish(keys: range, value: float, stamp: int) -> None:
            rows = np.full((len(keys), 2), value, np.float32)
            model.apply([RowColumns(spec.id, np.array(keys, np.uint64), rows.view(np.uint8))], stamp)

        with Reader("ctr", tmp_path, defaults={"item": "mean"}) as reader:
            assert reader.lookup("item", [999]).tolist() == [[0.0, 0.0]]
            publish(range(10), 4.0, 1)
            assert reader.lookup("item", [999]).tolist() == [[4.0, 4.0]]
            publish(range(10), 8.0, 2)
            assert reader.lookup("item", [999]).tolist() == [[4.0, 4.0]], "not with each look-up"
            with patch.object(defaults, "time", SimpleNamespace(monotonic=lambda: 1e9)):
                assert reader.lookup("item", [999]).tolist() == [[8.0, 8.0]]
            publish(range(10, 40), 0.0, 3)
            assert reader.lookup("item", [999]).tolist() == [[2.0, 2.0]]
    finally:
        store.destroy()


def test_rows_that_expired_are_absent(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    try:
        model = store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 2, ttl_s=60)}))
        spec = model.spec.tables["item"]
        now = int(time.time() * 1000)
        for key, age_s in ((1, 0), (2, 3_600)):
            row = np.full((1, 2), key, np.float32)
            stamp = make_stamp(now - 1_000 * age_s, 0, 5)
            model.apply([RowColumns(spec.id, np.array([key], np.uint64), row.view(np.uint8))], stamp)
        with Reader("ctr", tmp_path, defaults={"item": "mean"}) as reader:
            rows, stamps = reader.lookup("item", [1, 2, 3], stamps=True)
            assert rows[:, 0].tolist() == [1.0, 1.0, 1.0], "the mean is of the row that is left"
            assert [bool(stamp) for stamp in stamps] == [True, False, False]
            assert reader.lookup_pooled("item", [[1, 2]], weights=[[2.0, 3.0]]).tolist() == [[5.0, 5.0]]
        with Reader("ctr", tmp_path) as reader:
            assert reader.lookup_pooled("item", [[1, 2]]).tolist() == [[1.0, 1.0]]
    finally:
        store.destroy()


def test_several_tables_in_one_call(run_dir: Path, codec: str) -> None:
    out = np.full((2, 3), np.nan, np.float32)
    with Reader("ctr", run_dir) as reader:
        found = reader.lookup_many({"wide": [[0, 1], [2, ROWS]], "narrow": [3, 4]}, out={"narrow": out})
        assert list(found) == ["wide", "narrow"]
        assert found["narrow"] is out
        assert out.tolist() == values("narrow", codec)[3:5].tolist()
        assert found["wide"].shape == (2, 2, 64)
        assert found["wide"].reshape(4, 64)[:3].tolist() == values("wide", codec)[:3].tolist()
        assert not found["wide"][1, 1].any()
        with pytest.raises(ModelError, match="no table 'shop'"):
            reader.lookup_many({"wide": [1], "shop": [1]})
        with pytest.raises(ModelError, match="out has 'narrow', and keys are asked of 'wide'"):
            reader.lookup_many({"wide": [1]}, out={"narrow": out})
