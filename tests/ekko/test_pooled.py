"""Pooled look-ups against `torch.nn.functional.embedding_bag` and NumPy, in every mode and codec; and what absent keys are."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ekko.codec import encode, rounded
from ekko.errors import ModelError
from ekko.model import CODECS, ModelSpec, TableSpec
from ekko.serve.reader import Reader
from ekko.store import Store
from ekko.store.kernels.rows import PART_KEYS
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

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
