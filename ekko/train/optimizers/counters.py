"""Kernels of the initialisers: random numbers by their place, `value(stream, key, column)`, without a generator to advance.

The key and the stream are mixed to where a row's counter begins, and each column is one more step of SplitMix64 (Steele et al.,
"Fast Splittable Pseudorandom Number Generators", 2014) from there. Floating-point operations are such as IEEE 754 gives one
result for, none of them fused, in float64; only what comes out is rounded to float32.
"""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import mix64

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
Float: TypeAlias = Any  # a float64

_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB)
_27, _30, _31, _40, _11 = (np.uint64(bits) for bits in (27, 30, 31, 40, 11))
_ONE = np.uint64(1)
_24_BITS, _53_BITS = 2.0**-24, 2.0**-53


@inline_kernel
def _counter_of(stream: Int, key: Int) -> Int:
    return mix64(mix64(key ^ stream) + stream)


@inline_kernel
def _bits_at(counter: Int, column: Int) -> Int:
    """64 random bits."""
    bits = np.uint64(counter + (column + _ONE) * _GOLDEN)
    bits = (bits ^ (bits >> _30)) * _MULTIPLIER_1
    bits = (bits ^ (bits >> _27)) * _MULTIPLIER_2
    return bits ^ (bits >> _31)


@kernel("void(Array(uint64, 1, 'C', readonly=True), uint64, float64, float64, float32[:, ::1])")
def fill_uniform(keys: U64, stream: Int, low: Float, high: Float, out: F32) -> None:
    """float32[n, dim] in [low, high)."""
    rows, dim = out.shape
    below = np.nextafter(np.float32(high), np.float32(low))
    for row in range(rows):
        counter = _counter_of(stream, keys[row])
        for column in range(dim):
            share = np.float64(np.int64(_bits_at(counter, np.uint64(column)) >> _40)) * _24_BITS
            out[row, column] = min(np.float32(low + share * (high - low)), below)  # rounding may reach `high`


# --- the normal distribution, by Box and Muller: a distance of one number, a direction of another, and two values of both
_LN_2 = math.log(2.0)
_SQRT_2 = math.sqrt(2.0)
_QUARTER_TURN = math.pi / 2
_FRACTION = np.int64((1 << 52) - 1)
_EXPONENT_ONE = np.int64(1023 << 52)
_QUARTER_BITS = 51  # of 53 that say a direction
# Taylor's: as quotients of whole numbers they are the same everywhere. What is left out is below 4e-14 of the value.
_LOG = tuple(2.0 / odd for odd in range(1, 16, 2))
_SIN = tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(7))
_COS = tuple((-1.0) ** n / math.factorial(2 * n) for n in range(8))


@inline_kernel
def _log(number: Float) -> Float:
    """Natural logarithm of a normal number."""
    bits = np.float64(number).view(np.int64)
    exponent = (bits >> 52) - 1023
    fraction = np.int64((bits & _FRACTION) | _EXPONENT_ONE).view(np.float64)
    large = fraction > _SQRT_2
    fraction = fraction * 0.5 if large else fraction
    exponent = exponent + 1 if large else exponent
    ratio = (fraction - 1.0) / (fraction + 1.0)
    square = ratio * ratio
    total = _LOG[7]
    total = total * square + _LOG[6]
    total = total * square + _LOG[5]
    total = total * square + _LOG[4]
    total = total * square + _LOG[3]
    total = total * square + _LOG[2]
    total = total * square + _LOG[1]
    total = total * square + _LOG[0]
    return np.float64(exponent) * _LN_2 + total * ratio


@inline_kernel
def _sin_part(square: Float) -> Float:
    total = _SIN[6]
    total = total * square + _SIN[5]
    total = total * square + _SIN[4]
    total = total * square + _SIN[3]
    total = total * square + _SIN[2]
    total = total * square + _SIN[1]
    return total * square + _SIN[0]


@inline_kernel
def _cos_part(square: Float) -> Float:
    total = _COS[7]
    total = total * square + _COS[6]
    total = total * square + _COS[5]
    total = total * square + _COS[4]
    total = total * square + _COS[3]
    total = total * square + _COS[2]
    total = total * square + _COS[1]
    return total * square + _COS[0]


@inline_kernel
def _pair(first: Int, second: Int) -> tuple[Float, Float]:
    """Two independent normal values of twice 64 random bits."""
    distance = np.sqrt(-2.0 * _log(np.float64(np.int64(first >> _11) + 1) * _53_BITS))
    turn = np.int64(second >> _11)
    quarter = (turn + (1 << (_QUARTER_BITS - 1))) >> _QUARTER_BITS
    angle = np.float64(turn - (quarter << _QUARTER_BITS)) * (_QUARTER_TURN / 2.0**_QUARTER_BITS)
    square = angle * angle
    sine, cosine = _sin_part(square) * angle, _cos_part(square)
    across, along = (cosine, sine) if quarter & 1 else (sine, cosine)
    along = -along if (quarter + 1) & 2 else along
    across = -across if quarter & 2 else across
    return distance * along, distance * across


@kernel("void(Array(uint64, 1, 'C', readonly=True), uint64, float64, float64, float32[:, ::1])")
def fill_normal(keys: U64, stream: Int, mean: Float, deviation: Float, out: F32) -> None:
    """float32[n, dim]; each pair of columns is of one pair of hashes."""
    rows, dim = out.shape
    for row in range(rows):
        counter = _counter_of(stream, keys[row])
        for pair in range(dim >> 1):
            column = np.uint64(2 * pair)
            even, odd = _pair(_bits_at(counter, column), _bits_at(counter, column + _ONE))
            out[row, 2 * pair] = np.float32(mean + deviation * even)
            out[row, 2 * pair + 1] = np.float32(mean + deviation * odd)
        if dim & 1:
            column = np.uint64(dim - 1)
            even, _ = _pair(_bits_at(counter, column), _bits_at(counter, column + _ONE))
            out[row, dim - 1] = np.float32(mean + deviation * even)
