"""Launchers by themselves: many tables in one call, arrays at any address, what is refused. Rows and memory are compared with
`gpu.reference` to the bit.
"""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu import layout, reference, sources
from gpu.backend import Device
from gpu.errors import ArgumentError
from gpu.kernels import launchers
from gpu.layout import CODECS, MODES, Memory, PooledJob, Shape

DIMS = (1, 3, 16, 64, 100, 128, 200)


def both(device: Device, shape: Shape, rng: np.random.Generator, count: int) -> tuple[Memory, Memory, NDArray[np.uint64]]:
    """The same cache on the device and in the reference, `count` keys offered to it; and the keys."""
    there = reference.new_memory(shape)
    keys = rng.integers(0, 2**64, count, np.uint64)
    keys = keys[np.argsort(layout.mix64(keys))]
    stamps = rng.integers(1, 2**63, count).astype(np.uint64)
    rows = rng.integers(0, 64, (count, shape.row_bytes), np.uint8)  # no infinity and no NaN, whatever the codec
    reference.insert(there, keys, stamps, rows, None, np.empty(count, np.uint8), score=1, admit=True)
    arrays = (device.upload(getattr(there, name)) for name in ("digests", "headers", "rows", "counters"))
    return Memory(shape, *arrays), there, keys


def bits(values: Any) -> Any:
    return np.asarray(values).view(np.uint32)


@pytest.mark.parametrize("mode", MODES)
def test_many_tables_are_pooled_in_one_call(device: Device, mode: str) -> None:
    rng = np.random.default_rng(5)
    jobs, expected = [], []
    for number in range(launchers.POOLS_MAX + 3):  # more than one launch takes
        shape = Shape(1 + number % 3, DIMS[number % len(DIMS)], list(CODECS)[number % len(CODECS)])
        here, there, keys = both(device, shape, rng, 40)
        asked = np.concatenate([rng.choice(keys, 30), rng.integers(0, 2**64, 5, np.uint64)])
        bags = number % 7  # of the first none at all
        offsets = np.sort(np.append(rng.integers(0, len(asked), bags), len(asked)))
        weights = rng.random(len(asked)).astype(np.float32) if number % 2 and mode == "sum" else None
        out = np.full((bags, shape.dim), np.nan, np.float32)
        told = np.empty(len(asked), np.int64), np.zeros(1, np.uint64)
        expected.append(PooledJob(there, 0, 7, asked, offsets, weights, out, *told))
        on_device = [None if array is None else device.upload(array) for array in (asked, offsets, weights, out, *told)]
        jobs.append(PooledJob(here, 0, 7, *on_device))
    launchers.pooled(device, jobs, mode=MODES[mode])
    reference.pooled([job for job in expected if len(job.offsets) > 1], mode=MODES[mode])
    for job, wanted in zip(jobs, expected, strict=True):
        np.testing.assert_array_equal(bits(device.download(job.out)), bits(wanted.out))
        missed, count = device.download(job.missed), int(device.download(job.missed_count)[0])
        inside = wanted.missed[: int(wanted.missed_count[0])]
        inside = inside[inside >= wanted.offsets[0]]  # the reference looks up keys before the first bag, too
        np.testing.assert_array_equal(np.sort(missed[:count]), inside)


@pytest.mark.parametrize(
    ("codec", "dim", "shift"), [("float32", 64, 16), ("float32", 64, 4), ("float16", 5, 2), ("int8", 9, 4)]
)
def test_rows_may_begin_where_their_values_may(device: Device, codec: str, dim: int, shift: int) -> None:
    rng = np.random.default_rng(shift)
    shape = Shape(2, dim, codec)
    here, there, keys = both(device, shape, rng, 50)
    stamps = np.full(50, 2**63, np.uint64)
    rows = rng.integers(0, 64, (50, shape.row_bytes), np.uint8)
    memory = device.empty(shift + rows.nbytes, np.uint8)
    shifted = memory[shift:].reshape(rows.shape)
    device.upload(rows, shifted)
    outcomes = device.empty(50, np.uint8)
    launchers.apply(device, here, device.upload(keys), device.upload(stamps), shifted, outcomes)
    reference.apply(there, keys, stamps, rows, np.empty(50, np.uint8))
    np.testing.assert_array_equal(device.download(here.rows), there.rows)

    values = device.empty(50 * dim + 1, np.float32)[1:].reshape(50, dim)  # not at a multiple of 16
    found, missed, count = device.empty(50, np.uint64), device.empty(50, np.int64), device.zeros(1, np.uint64)
    launchers.lookup(device, here, device.upload(keys), values, found, missed, count, policy=None, tick=0)
    expected = np.empty((50, dim), np.float32), np.empty(50, np.uint64), np.empty(50, np.int64), np.zeros(1, np.uint64)
    reference.lookup(there, keys, *expected, policy=0, tick=0)
    np.testing.assert_array_equal(bits(device.download(values)), bits(expected[0]))
    np.testing.assert_array_equal(device.download(found), expected[1])


def test_rows_at_odd_addresses_are_refused(device: Device) -> None:
    here, _, keys = both(device, Shape(1, 4, "float16"), np.random.default_rng(0), 8)
    rows = device.empty(8 * 8 + 1, np.uint8)[1:].reshape(8, 8)
    with pytest.raises(ArgumentError, match=r"odd address .* two bytes at a time"):
        launchers.apply(device, here, device.upload(keys), device.upload(keys), rows, device.empty(8, np.uint8))


@pytest.mark.parametrize("count", [0, 1, 5_000])
def test_missed_rows_go_where_zeros_were(device: Device, count: int) -> None:
    rng = np.random.default_rng(count)
    out, stamps = np.zeros((6_000, 3), np.float32), np.zeros(6_000, np.uint64)
    rows, of = rng.random((count, 3)).astype(np.float32), rng.integers(1, 2**63, count).astype(np.uint64)
    places = rng.permutation(6_000)[:count]
    on_device, told = device.upload(out), device.upload(stamps)
    launchers.scatter(device, device.upload(rows), device.upload(of), device.upload(places), on_device, told)
    out[places], stamps[places] = rows, of
    np.testing.assert_array_equal(device.download(on_device), out)
    np.testing.assert_array_equal(device.download(told), stamps)


def test_arrays_that_do_not_fit_are_refused(device: Device) -> None:
    here, _, _ = both(device, Shape(1, 4, "float32"), np.random.default_rng(0), 8)
    keys, rows, stamps = device.empty(8, np.uint64), device.empty((8, 4), np.float32), device.empty(8, np.uint64)
    missed, count = device.empty(8, np.int64), device.empty(1, np.uint64)
    with pytest.raises(ArgumentError, match=r"rows .* expected float32\[8, 4\]"):
        launchers.lookup(device, here, keys, rows[:7], stamps, missed, count, policy=0, tick=0)
    with pytest.raises(ArgumentError, match=r"stamps is of dtype float32"):
        launchers.lookup(device, here, keys, rows, device.empty(8, np.float32), missed, count, policy=0, tick=0)
    with pytest.raises(ArgumentError, match="not C-contiguous"):
        launchers.lookup(device, here, device.empty(16, np.uint64)[::2], rows, stamps, missed, count, policy=0, tick=0)


def test_structures_are_those_of_the_sources() -> None:
    """Sizes are compared by the compilers, with static_assert; this has them in one place with the types."""
    sizes = {"Table": launchers._TABLE, "LookUp": launchers._LOOK_UP, "Batch": launchers._BATCH}
    sizes |= {"Export": launchers._EXPORT, "Pool": launchers._POOL}
    for name, dtype in sizes.items():
        texts = [path.read_text() for path in sources.FOLDER.glob("*.cu*")]
        asserted = [text for text in texts if f"static_assert(sizeof({name}) == {dtype.itemsize}," in text]
        assert len(asserted) == 1, name
