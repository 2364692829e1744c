"""Rows that nobody has yet: the same for everybody, for ever, and as random as they should be."""

from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from ekko.errors import ConfigError, ModelError
from ekko.train.optimizers import INITIALIZERS, Constant, Normal, Uniform, Zeros, initializer_of

U64 = NDArray[np.uint64]

KEYS = np.array([0, 1, 7, 1 << 40, (1 << 64) - 1], np.uint64)


def test_rows_are_these_bits_for_ever() -> None:
    """Who changes them changes rows under servers that share a model: the numbers were taken once, and may not change."""
    normal = Normal(std=1.0, seed=5).rows("item", KEYS, 3).view(np.uint32)
    uniform = Uniform(low=-1.0, high=1.0, seed=5).rows("item", KEYS, 3).view(np.uint32)
    assert normal.tolist() == NORMAL
    assert uniform.tolist() == UNIFORM


NORMAL = [
    [1065163372, 3203948701, 1060936174],
    [1076246621, 3220685342, 3205305099],
    [1000567335, 1052619431, 3205227071],
    [1060265129, 3211958065, 3191841926],
    [1069423881, 3209965153, 3197600053],
]
UNIFORM = [
    [1035570864, 1062917206, 1053010052],
    [3212660080, 1061932890, 1048713704],
    [1063127026, 3204520148, 1046811416],
    [985474048, 1060350320, 1061093904],
    [3204938254, 1062635008, 1063663016],
]


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_rows_are_a_function_of_seed_table_and_key(name: str) -> None:
    one = initializer_of({"name": name, "seed": 1})
    rows = one.rows("item", KEYS, 8)
    np.testing.assert_array_equal(rows[::-1], one.rows("item", KEYS[::-1].copy(), 8))
    np.testing.assert_array_equal(rows[:, :5], one.rows("item", KEYS, 5))
    for other in (one.rows("user", KEYS, 8), initializer_of({"name": name, "seed": 2}).rows("item", KEYS, 8)):
        assert not (rows == other).any()


def test_plain_rows() -> None:
    assert (Zeros().rows("item", KEYS, 4) == 0).all()
    assert (Constant(0.25).rows("item", KEYS, 4) == np.float32(0.25)).all()
    assert Constant(0.25).rows("item", KEYS[:0], 4).shape == (0, 4)


def test_uniform_values_fill_their_range_evenly() -> None:
    values = Uniform(low=-2.0, high=6.0).rows("item", np.arange(20_000, dtype=np.uint64), 16).ravel()
    assert -2.0 <= values.min() < -1.999
    assert 5.999 < values.max() < 6.0
    counts = np.histogram(values, bins=64, range=(-2, 6))[0]
    expected = values.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * np.sqrt(2 * 63)


def test_normal_values_have_the_right_distribution_and_no_memory() -> None:
    values = Normal(mean=1.0, std=2.0).rows("item", np.arange(40_000, dtype=np.uint64), 8).astype(np.float64)
    values = (values - 1.0) / 2.0
    few = 5 / np.sqrt(values.size)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0, 6: 10_170.0}[power]
        assert abs((values**power).mean() - moment) < few * np.sqrt(spread)
    columns = np.corrcoef(values.T) - np.eye(8)
    assert abs(columns).max() < 5 / np.sqrt(len(values))
    neighbours = (values[1:] * values[:-1]).mean()  # rows of keys that follow each other
    assert abs(neighbours) < few
    # Kolmogorov's distance from the cumulative distribution, where it is known without a library.
    for bound, share in ((-3.0, 0.0013498980), (-1.0, 0.1586552539), (0.0, 0.5), (0.5, 0.6914624613), (2.0, 0.9772498681)):
        assert abs((values < bound).mean() - share) < few


def shares_of(seed: int, table: str, keys: U64, columns: int) -> U64:
    """uint64[n, columns]: SplitMix64 from where Murmur3's finaliser puts each key's counter."""

    def mixed(bits: U64, first: int, one: int, second: int, other: int, third: int) -> U64:
        bits = (bits ^ (bits >> np.uint64(first))) * np.uint64(one)
        bits = (bits ^ (bits >> np.uint64(second))) * np.uint64(other)
        return bits ^ (bits >> np.uint64(third))

    def finalised(bits: U64) -> U64:
        return mixed(bits, 33, 0xFF51AFD7ED558CCD, 33, 0xC4CEB9FE1A85EC53, 33)

    stream = np.uint64(xxhash.xxh64_intdigest(table.encode()) ^ xxhash.xxh64_intdigest(seed.to_bytes(8, "little")))
    counters = finalised(finalised(keys ^ stream) + stream)
    steps = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(counters[:, None] + steps, 30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31)


def test_normal_values_are_those_of_box_and_muller() -> None:
    """With the C library's logarithm, sine and cosine in float64: the polynomials are as good as the rounding to float32."""
    keys = np.arange(20_000, dtype=np.uint64)
    shares = shares_of(9, "item", keys, 4) >> np.uint64(11)
    first, second = (
        (shares[:, 0::2] + np.uint64(1)).astype(np.float64) * 2.0**-53,
        shares[:, 1::2].astype(np.float64) * 2.0**-53,
    )
    distance, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    expected = np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=2).reshape(-1, 4)
    rows = Normal(std=1.0, seed=9).rows("item", keys, 4)
    np.testing.assert_allclose(rows, expected.astype(np.float32), rtol=1.5e-7, atol=1e-14)
    assert (rows == expected.astype(np.float32)).mean() > 0.9999


def test_uniform_values_are_the_upper_bits() -> None:
    keys = np.arange(1_000, dtype=np.uint64)
    shares = (shares_of(9, "item", keys, 3) >> np.uint64(40)).astype(np.float64) * 2.0**-24
    np.testing.assert_array_equal(Uniform(low=0.0, high=1.0, seed=9).rows("item", keys, 3), shares.astype(np.float32))


BAD: list[tuple[Any, str]] = [
    (0.01, "a table such as"),
    ({"name": "xavier"}, "expected one of zeros, constant, uniform, normal"),
    ({"name": "zeros", "seed": 1}, "has no setting 'seed': it has none"),
    ({"name": "normal", "std": -1}, "std is -1: expected a number from 0"),
    ({"name": "normal", "seed": 0.5}, "seed is 0.5: expected a whole number, from 0"),
    ({"name": "normal", "seed": -1}, "seed is -1: expected a whole number, from 0"),
    ({"name": "uniform", "low": 1.0, "high": 1.0}, "low = 1 and high = 1: expected low below high"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_get_one_line(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        initializer_of(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_settings_say_all_and_can_be_read_again(name: str) -> None:
    one = initializer_of({"name": name})
    assert initializer_of(one.settings) == one


def test_keys_that_are_no_keys_are_refused() -> None:
    with pytest.raises(ModelError, match="expected contiguous uint64"):
        Zeros().rows("item", np.arange(3), 4)  # type: ignore[arg-type]
