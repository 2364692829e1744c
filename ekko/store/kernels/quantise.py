"""Kernels of the codecs: float32 values to encoded ones and back. What each promises is told in `ekko.codec`.

Whole numbers and exact operations only, so that every processor gets the same bits, in any of its modes: no float32 below the
normal ones is ever an operand whose loss would change a result (PyTorch may have told the processor to flush them to zero).
The loops have no branch, and become vector instructions. float16 in such steps decodes 6.6 G values/s on one core from the
nearest cache, encodes 5.4 G; the processor's own conversion 9 G and 13 G, NumPy's `astype` 0.7 G and 0.4 G. A row of 64 takes
10 ns here, so a second way for the processors that have the instruction would not be seen.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.model import CODECS
from ekko.store.kernels.atomics import bits_of, copy_bytes, copy_line, float_of, floats_at, load_u32, uints8_at, uints16_at
from ekko.store.kernels.compile import Int, inline_kernel, kernel

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

FLOAT32 = CODECS["float32"].number
FLOAT16 = CODECS["float16"].number
BFLOAT16 = CODECS["bfloat16"].number
INT8 = CODECS["int8"].number

_SIGN = np.uint32(0x8000_0000)
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_ONE = np.uint32(1)
_16 = np.uint32(16)

# --- float16: 5 bits of exponent, 10 of fraction
_HALF_MAX = np.uint32(0x477F_E000)  # 65504 as a float32
_HALF_NORMAL_MIN = np.uint32(0x3880_0000)  # 2**-14
_HALF_REBIAS = np.uint32(0x3800_0000)  # what the exponents differ by, 127 - 15
_HALF_ROUND = np.uint32(0xC800_0FFF)  # minus the above, and half a unit of the last place less one
_HALF_BITS = np.uint32(0x7FFF)
_13 = np.uint32(13)
# One half: adding it to a number below 2**-14 leaves the fraction of a float16 in the last bits, rounded to nearest even.
_HALF_SUBNORMAL = np.uint32(0x3F00_0000)
_DECODED_NORMAL_MIN = np.uint32(0x0080_0000)

# --- bfloat16: the upper half of a float32
_BF16_MAX = np.uint32(0x7F7F_0000)
_BF16_ROUND = np.uint32(0x7FFF)

# --- int8: a scale a row, and values of -127 to 127 times it
LEVELS = np.float32(127.0)
# A scale keeps 17 bits of fraction, so that its product with a value of 7 bits is exact, and is rounded up to them.
_SCALE_ROUND = np.uint32(0x7F)
_SCALE_KEPT = np.uint32(0xFFFF_FF80)
_SCALE_MIN = np.uint32(0x0380_0000)  # 2**-120; see the top of this file
_SCALE_MAX = np.uint32(0x7C01_0200)  # of such scales the largest whose 127-fold is finite


@inline_kernel
def _encode_half(values: F32, out: Any) -> None:
    for i in range(values.size):
        bits = bits_of(values[i])
        magnitude = min(np.uint32(bits & _MAGNITUDE), _HALF_MAX)
        rounded = np.uint32(magnitude + _HALF_ROUND + ((magnitude >> _13) & _ONE)) >> _13
        subnormal = np.uint32(bits_of(float_of(magnitude) + float_of(_HALF_SUBNORMAL)) - _HALF_SUBNORMAL)
        chosen = subnormal if magnitude < _HALF_NORMAL_MIN else rounded
        out[i] = np.uint16(chosen | ((bits & _SIGN) >> _16))


@inline_kernel
def half_value(code: Any) -> Any:
    """The float32 that a float16's bits, a uint16, mean."""
    bits = np.uint32(code)
    magnitude = np.uint32((bits & _HALF_BITS) << _13)
    normal = np.uint32(magnitude + _HALF_REBIAS)
    subnormal = bits_of(float_of(np.uint32(magnitude + _HALF_NORMAL_MIN)) - float_of(_HALF_NORMAL_MIN))
    chosen = subnormal if magnitude < _DECODED_NORMAL_MIN else normal
    return float_of(np.uint32(chosen | ((bits << _16) & _SIGN)))


@inline_kernel
def _decode_half(data: Any, out: F32) -> None:
    for i in range(out.size):
        out[i] = half_value(data[i])


@inline_kernel
def _encode_bfloat(values: F32, out: Any) -> None:
    for i in range(values.size):
        bits = bits_of(values[i])
        magnitude = min(np.uint32(bits & _MAGNITUDE), _BF16_MAX)
        rounded = np.uint32(magnitude + _BF16_ROUND + ((magnitude >> _16) & _ONE)) >> _16
        out[i] = np.uint16(rounded | ((bits & _SIGN) >> _16))


@inline_kernel
def bfloat_value(code: Any) -> Any:
    """The float32 that a bfloat16's bits, a uint16, mean."""
    return float_of(np.uint32(np.uint32(code) << _16))


@inline_kernel
def _decode_bfloat(data: Any, out: F32) -> None:
    for i in range(out.size):
        out[i] = bfloat_value(data[i])


@inline_kernel
def _scale_for(values: F32) -> Int:
    """The bits of a row's scale."""
    largest = np.uint32(0)
    for i in range(values.size):
        largest = max(largest, np.uint32(bits_of(values[i]) & _MAGNITUDE))  # as whole numbers in the order of the floats
    exact = bits_of(float_of(largest) / LEVELS)
    return min(max(np.uint32((exact + _SCALE_ROUND) & _SCALE_KEPT), _SCALE_MIN), _SCALE_MAX)


@inline_kernel
def _encode_int8(values: F32, target: Int, row_bytes: Int) -> None:
    scale_bits = _scale_for(values)
    scale = float_of(scale_bits)
    out = uints8_at(target + 4, row_bytes - 4)
    any_set = np.uint8(0)
    for i in range(values.size):
        level = np.uint8(np.int32(np.rint(values[i] / scale)))
        any_set |= level
        out[i] = level
    for i in range(values.size, row_bytes - 4):
        out[i] = np.uint8(0)
    # A row of zeros has one spelling, whatever was rounded to it.
    bits_at = uints16_at(target, 2)
    scale_bits = scale_bits if any_set else np.uint32(0)
    bits_at[0] = np.uint16(scale_bits & np.uint32(0xFFFF))
    bits_at[1] = np.uint16(scale_bits >> _16)


@inline_kernel
def int8_value(code: Any, scale: Any) -> Any:
    """The float32 that a byte means in a row of this scale."""
    return np.float32(np.int8(code)) * scale


@inline_kernel
def _decode_int8(data: Any, scale: Any, out: F32) -> None:
    for i in range(out.size):
        out[i] = int8_value(data[i], scale)


@inline_kernel
def _copy_values(data: Int, dim: Int, target: Int) -> None:
    # A call of memcpy a row costs as much as several lines do: without it a look-up is a twentieth faster.
    rest = 4 * dim & 63
    for offset in range(0, 4 * dim - rest, 64):
        copy_line(target + offset, data + offset)
    if rest:
        copy_bytes(target + 4 * dim - rest, data + 4 * dim - rest, rest)


@inline_kernel
def decode_row(codec: Int, data: Int, dim: Int, target: Int) -> None:
    """Decode the row at address `data` into float32[dim] at address `target`."""
    if codec == FLOAT32:
        _copy_values(data, dim, target)
    elif codec == FLOAT16:
        _decode_half(uints16_at(data, dim), floats_at(target, dim))
    elif codec == BFLOAT16:
        _decode_bfloat(uints16_at(data, dim), floats_at(target, dim))
    else:
        _decode_int8(uints8_at(data + 4, dim), float_of(load_u32(data)), floats_at(target, dim))


@kernel("void(int64, Array(float32, 2, 'C', readonly=True), uint8[:, ::1])")
def encode_rows(codec: Int, values: F32, out: U8) -> None:
    """Encode each row of finite values; what the codec has no number for becomes its largest."""
    rows, dim = values.shape
    row_bytes = out.shape[1]
    source, target = np.int64(values.ctypes.data), np.int64(out.ctypes.data)
    if codec == FLOAT16:
        _encode_half(floats_at(source, rows * dim), uints16_at(target, rows * dim))
    elif codec == BFLOAT16:
        _encode_bfloat(floats_at(source, rows * dim), uints16_at(target, rows * dim))
    elif codec == INT8:
        for i in range(rows):
            _encode_int8(floats_at(source + i * 4 * dim, dim), target + i * row_bytes, row_bytes)
    else:
        copy_bytes(target, source, 4 * rows * dim)


@kernel("void(int64, Array(uint8, 2, 'C', readonly=True), float32[:, ::1])")
def decode_rows(codec: Int, data: U8, out: F32) -> None:
    """The values of each encoded row; `data` begins at a multiple of 4."""
    rows, dim = out.shape
    row_bytes = data.shape[1]
    source, target = np.int64(data.ctypes.data), np.int64(out.ctypes.data)
    for i in range(rows):
        decode_row(codec, source + i * row_bytes, dim, target + i * 4 * dim)
