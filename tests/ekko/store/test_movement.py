"""How far rows are from what is stored, against a plain computation, in every codec."""

import numpy as np
import pytest

from ekko.codec import decode, encode
from ekko.model import CODECS, ModelSpec, TableSpec
from ekko.store import Store
from p2p.replica import RowColumns

F32 = np.float32


def in_four_lines(one: np.ndarray, other: np.ndarray) -> np.float32:
    """The order in which it is added up: number i in line i % 4, what is left at the end in the first."""
    magnitudes, whole = np.abs(one - other), one.size & ~3
    lines = np.zeros(4, F32)
    for quad in magnitudes[:whole].reshape(-1, 4):
        lines += quad
    for rest in magnitudes[whole:]:
        lines[0] += rest
    return (lines[0] + lines[1]) + (lines[2] + lines[3])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 3, 4, 17, 64])
def test_movement_is_the_sum_of_magnitudes(codec: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    spec = TableSpec("item", dim, codec)
    model = Store.anonymous().add_model(ModelSpec("ctr", 8, {"item": spec}, codec=codec))
    stored, given = (encode(codec, rng.normal(size=(100, dim)).astype(F32)) for _ in range(2))
    keys = np.arange(100, dtype=np.uint64)
    model.apply([RowColumns(spec.id, keys[:60], stored[:60])], 10)
    model.apply([RowColumns(spec.id, keys[50:60], stored[:0])], 11)
    # Of what is there: some moves, some is deleted; new keys; deleted ones that come back; and deletes of what is not there.
    asked = np.concatenate([keys[20:80], keys[:10], keys[55:57], keys[95:]])
    moved, before = model.tables_by_id[spec.id].movement(asked, given[20:80])
    here = asked < 50
    old = np.where(here[:, None], decode(codec, stored, dim)[asked.astype(int)], 0)
    new = np.zeros((asked.size, dim), F32)
    new[:60] = decode(codec, np.ascontiguousarray(given[20:80]), dim)
    np.testing.assert_allclose(moved, np.abs(new - old).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(moved, [in_four_lines(*both) for both in zip(new, old, strict=True)])
    assert before.tolist() == np.where(here, 10, 0).tolist()
    assert model.tables_by_id[spec.id].movement(keys[:0], given[:0])[0].size == 0
