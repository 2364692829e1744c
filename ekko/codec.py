"""Codecs: how the rows of a model are stored and sent.

A model has one codec. Its publishers apply it once, before the first node stores the row, and from there on a row is bytes:
all nodes hold and send the same ones, and only a look-up makes float32 of them again. Encoding what was decoded gives the same
bytes again, so a row may be read and published any number of times without drifting.

| codec | bytes of a row | largest error of a value x | refused |
|---|---|---|---|
| `float32` | 4 dim | none | |
| `float16` | 2 dim | 2**-11 abs(x); 2**-25 below 2**-14 | abs(x) >= 65520 |
| `bfloat16` | 2 dim | 2**-8 abs(x); 2**-134 below 2**-126 | abs(x) >= 3.396e38 |
| `int8` | 4 + dim, a multiple of 4 | m / 253.9, m the largest abs(x) of its row; 2**-120 where that is more | |

float16 and bfloat16 round to the nearest number, ties to even, as the processor's own conversions do; a value whose nearest
number would be infinite is refused, like an infinite one. An int8 row is a float32 scale s and integers q of -127 to 127, and
means q * s: s is m / 127, rounded up to 17 bits, so that q * s is exact in float32; no smaller than 2**-120; 0 for a row of
zeros. Numbers are little-endian; an int8 row is padded with zeros.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.model import CODECS
from ekko.store.kernels.checks import INFINITY_BITS
from ekko.store.kernels.quantise import decode_rows, encode_rows

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

ALIGNMENT: Final = 4  # what the kernels want an array of encoded rows to begin at a multiple of
# The magnitude from which on a value is refused, as the bits of a float32; infinity where every finite value has a code. The
# others lie half a step above the codec's largest number.
LIMIT_BITS: Final = {
    "float32": INFINITY_BITS,
    "float16": 0x477F_F000,
    "bfloat16": 0x7F7F_8000,
    "int8": INFINITY_BITS,
}


def limit_of(codec: str) -> float:
    """The magnitude from which on `codec` has no number for a value."""
    return float(np.uint32(LIMIT_BITS[codec]).view(np.float32))


def encode(codec: str, rows: F32) -> U8:
    """Encode rows.

    Args:
        codec: one of `CODECS`.
        rows: float32[n, dim], C-contiguous, each magnitude below `limit_of(codec)`.

    Returns:
        uint8[n, row_bytes]; for float32 a view of `rows`.
    """
    count, dim = rows.shape
    row_bytes = CODECS[codec].row_bytes(dim)
    if codec == "float32":
        return rows.view(np.uint8) if count else np.empty((0, row_bytes), np.uint8)
    out = np.empty((count, row_bytes), np.uint8)
    encode_rows(CODECS[codec].number, rows, out)
    return out


def decode(codec: str, data: U8, dim: int) -> F32:
    """float32[n, dim] of uint8[n, row_bytes]: what a look-up of these rows gives."""
    if not data.flags.c_contiguous or data.ctypes.data % ALIGNMENT:
        data = data.copy()
    out = np.empty((len(data), dim), np.float32)
    decode_rows(CODECS[codec].number, data, out)
    return out


def rounded(codec: str, rows: F32) -> F32:
    """float32[n, dim]: what readers see of rows published in this codec."""
    return decode(codec, encode(codec, np.ascontiguousarray(rows)), rows.shape[1])
