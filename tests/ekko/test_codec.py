"""Codecs: what each loses at most, that nothing is lost twice, and that NumPy's own conversions agree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ekko.codec import LIMIT_BITS, decode, encode, limit_of, rounded
from ekko.errors import ModelError
from ekko.model import CODECS, ModelSpec, TableSpec, parse_entry
from ekko.store.kernels.checks import all_below

LOSSY = ["float16", "bfloat16", "int8"]
FLOAT_MAX = float(np.finfo(np.float32).max)

# Where codecs go wrong: around their smallest and largest numbers, halfway between two of them, and far apart in one row.
EDGES = [
    0.0,
    -0.0,
    2.0**-149,  # the smallest float32
    2.0**-134,
    2.0**-133,
    2.0**-126,
    2.0**-121,
    2.0**-120,
    2.0**-25,  # half the smallest float16
    2.0**-25 * (1 + 2**-23),
    2.0**-24,
    2.0**-14 - 2.0**-26,
    2.0**-14,
    1.0,
    1.0 + 2.0**-11,  # a tie of float16
    1.0 + 3 * 2.0**-11,
    1.0 + 2.0**-8,  # a tie of bfloat16
    1.0 + 3 * 2.0**-8,
    63.5,
    127.0,
    2047.5,
    65_504.0,
    65_519.996,
    3.3895e38,
    FLOAT_MAX,
]
VALUES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from(EDGES + [-edge for edge in EDGES]).map(lambda value: float(np.float32(value))),
    st.floats(-1, 1, width=32),
)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 18)), elements=VALUES, fill=st.nothing())


def within_limits(codec: str, rows: np.ndarray) -> np.ndarray:
    """The same rows with what the codec has no number for brought below its limit."""
    below = np.nextafter(np.float32(limit_of(codec)), np.float32(0))
    return np.clip(rows, -below, below)


def bound(codec: str, rows: np.ndarray) -> np.ndarray:
    """float64: the error that the documentation allows each value."""
    size = np.abs(rows.astype(np.float64))
    match codec:
        case "float16":
            return np.where(size < 2.0**-14, 2.0**-25, 2.0**-11 * size)
        case "bfloat16":
            return np.where(size < 2.0**-126, 2.0**-134, 2.0**-8 * size)
        case "int8":
            return np.maximum(size.max(axis=1, keepdims=True) / 253.9, 2.0**-120)
        case _:
            return np.zeros_like(size)


@pytest.mark.parametrize("codec", CODECS)
@given(rows=ROWS)
def test_the_error_is_within_its_bound(codec: str, rows: np.ndarray) -> None:
    rows = within_limits(codec, rows)
    seen = rounded(codec, rows)
    assert np.isfinite(seen).all()
    error = np.abs(seen.astype(np.float64) - rows.astype(np.float64))
    assert (error <= bound(codec, rows)).all()


@pytest.mark.parametrize("codec", CODECS)
@given(rows=ROWS)
def test_what_was_decoded_encodes_to_the_same_bytes(codec: str, rows: np.ndarray) -> None:
    first = encode(codec, within_limits(codec, rows))
    assert first.shape == (len(rows), TableSpec("t", rows.shape[1], codec).row_bytes)
    seen = decode(codec, first, rows.shape[1])
    again = encode(codec, seen)
    assert again.tobytes() == first.tobytes()
    assert decode(codec, again, rows.shape[1]).tobytes() == seen.tobytes()


@given(rows=ROWS)
def test_float16_is_what_numpy_makes_of_it(rows: np.ndarray) -> None:
    rows = within_limits("float16", rows)
    assert encode("float16", rows).tobytes() == rows.astype(np.float16).tobytes()


def test_every_float16_and_every_bfloat16_survives() -> None:
    halves = np.arange(65_536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 2)
    assert decode("float16", halves.view(np.uint8), 2).tobytes() == halves.astype(np.float32).tobytes()
    assert encode("float16", halves.astype(np.float32)).tobytes() == halves.tobytes()
    uppers = (np.arange(65_536, dtype=np.uint32) << 16).view(np.float32)
    uppers = uppers[np.isfinite(uppers)].reshape(-1, 2)
    encoded = encode("bfloat16", uppers)
    assert (encoded.view(np.uint16).astype(np.uint32) << 16).tobytes() == uppers.tobytes()
    assert decode("bfloat16", encoded, 2).tobytes() == uppers.tobytes()


def test_ties_go_to_the_even_number() -> None:
    ulp = 2.0**-7
    values = np.array([[1 + ulp / 2, 1 + 3 * ulp / 2, -(1 + ulp / 2), 1 + ulp / 2 + 2.0**-20]], np.float32)
    assert rounded("bfloat16", values)[0].tolist() == [1, 1 + 2 * ulp, -1, 1 + ulp]
    scaled = np.array([[127.0, 0.5, 1.5, -2.5, 63.0]], np.float32)  # a scale of exactly one
    assert rounded("int8", scaled)[0].tolist() == [127, 0, 2, -2, 63]


def test_an_int8_row_is_a_scale_and_levels() -> None:
    encoded = encode("int8", np.array([[254.0, -2.0, 1.0, 0.0, 6.0], [0, -0.0, 0, 0, 0]], np.float32))
    assert encoded.shape == (2, 12)  # 4 + 5 values, up to a multiple of 4
    assert encoded[0].tobytes() == np.float32(2).tobytes() + bytes([127, 255, 0, 0, 3, 0, 0, 0])
    assert encoded[1].tobytes() == bytes(12)
    # So small that all of it is rounded away: spelt as zeros are.
    assert encode("int8", np.full((1, 5), 2.0**-149, np.float32)).tobytes() == bytes(12)


@pytest.mark.parametrize("largest", [FLOAT_MAX, 65_504.0, 1e-3, 2.0**-119, 2.0**-126])
def test_int8_scales_multiply_exactly(largest: float) -> None:
    row = np.linspace(-largest, largest, 255, dtype=np.float64).astype(np.float32)[None, :]
    encoded = encode("int8", row)
    scale = float(encoded[0, :4].view(np.float32)[0])
    levels = encoded[0, 4:259].view(np.int8).astype(np.float64)
    seen = decode("int8", encoded, 255)[0]
    assert np.array_equal(seen.astype(np.float64), scale * levels)  # in float64 the product is exact; float32 lost nothing
    assert abs(levels).max() == (127 if largest > 2.0**-114 else round(largest * 2**120))


@pytest.mark.parametrize("codec", CODECS)
def test_the_limit_is_where_the_codec_has_no_number_any_more(codec: str) -> None:
    limit = np.uint32(LIMIT_BITS[codec]).view(np.float32)
    below = np.nextafter(limit, np.float32(0)).reshape(1, 1)
    assert np.isfinite(rounded(codec, below)).all()
    assert all_below(below, LIMIT_BITS[codec])
    assert all_below(-below, LIMIT_BITS[codec])
    for beyond in (limit, -limit, np.float32(np.inf), np.float32(np.nan)):
        assert not all_below(np.array([0.0, beyond], np.float32), LIMIT_BITS[codec])
    if codec == "float16":
        with np.errstate(over="ignore"):
            assert np.isinf(limit.astype(np.float16))
    if codec == "bfloat16":
        assert (int(limit.view(np.uint32)) + 0x8000) >> 16 == 0x7F80


@pytest.mark.parametrize("codec", CODECS)
def test_rows_that_begin_at_an_odd_address_are_decoded(codec: str) -> None:
    rows = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    encoded = encode(codec, rows)
    odd = np.zeros(encoded.nbytes + 1, np.uint8)[1:].reshape(encoded.shape)
    odd[...] = encoded
    assert decode(codec, odd, 4).tobytes() == rounded(codec, rows).tobytes()
    assert decode(codec, np.empty((0, encoded.shape[1]), np.uint8), 4).shape == (0, 4)
    assert encode(codec, rows[:0]).shape == (0, encoded.shape[1])


@pytest.mark.parametrize("codec", CODECS)
def test_a_model_says_its_codec_in_its_schema_entry(codec: str) -> None:
    model = ModelSpec("ctr", 8, {"item": TableSpec("item", 5, codec)}, codec=codec)
    parsed = [parse_entry(entry) for entry in model.entries()]
    assert parsed == [ModelSpec("ctr", 8, codec=codec), model.tables["item"]]
    if codec == "float32":  # as protocol version 1 spelt it
        assert model.entries()[0].body == b"\x92\xa3ctr\x08"


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ModelError, match="'int9': there are 'float32', 'float16', 'bfloat16', 'int8'"):
        TableSpec("item", 4, "int9")
    with pytest.raises(ModelError, match="model 'ctr' asks for codec 'int9'"):
        ModelSpec("ctr", codec="int9")
