"""Which requests the online model answers, and which the baseline: decided by a hash of the request's id, on no network.

The baseline is the same model with delayed state (`role = "baseline"`). A small share of the requests, below 1 %, goes to it,
so that the online model has something to be compared with. A rollback takes requests from the online model for a while and
gives them back. Who is asked twice about one request answers the same, in every process and language:

    hash    = mix64(id xor salt)            of an id that is an integer; mix64 is the Murmur3 finaliser, as for shards
    id      = xxh64(text in UTF-8, seed 0)  of one that is text or bytes
    salt    = xxh64(the model's name in UTF-8, seed 0)   so that models divide requests independently
    online  = online_from <= hash >> 32 < online_until   two words of the model's header in shared memory; both 0: all are

A share that grows takes requests from one side only, so that a request that is the online model's at 1 % is so at 10 %, and
the baseline's own share keeps its requests whatever a rollback does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError

U64 = NDArray[np.uint64]
Arms = NDArray[np.uint8]
RequestIds = ArrayLike | Sequence[str] | Sequence[bytes]

ONLINE: Final = 0
BASELINE: Final = 1
ARMS: Final = ("online", "baseline")
_ALL: Final = 1 << 32
# Of the Murmur3 finaliser; `ekko.store.kernels.index.mix64` is the same, compiled.
_SHIFT: Final = np.uint64(33)
_MULTIPLIERS: Final = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests are divided.

    Args:
        baseline: the share that is always the baseline's.
        serving: of the others, the share that is the online model's; a rollback lowers it and restores it.
    """

    baseline: float = 0.0
    serving: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.baseline <= 1 or not 0 <= self.serving <= 1:
            raise ModelError(f"shares of requests are {self.baseline} and {self.serving}: expected numbers from 0 to 1")

    @property
    def bounds(self) -> tuple[int, int]:
        """`online_from`, `online_until`."""
        if self == Traffic():
            return 0, 0
        low = round(self.baseline * _ALL)
        # An empty range that is not (0, 0), which means all.
        return (low, low + round((_ALL - low) * self.serving)) if self.serving and low < _ALL else (_ALL, _ALL)

    @classmethod
    def of_bounds(cls, low: int, high: int) -> "Traffic":
        """What these bounds mean; of a model without online requests, not which of them are the baseline's anyway."""
        if not high:
            return cls()
        return cls(low / _ALL, (high - low) / (_ALL - low)) if low < _ALL else cls(0.0, 0.0)


@lru_cache(1_024)
def salt_of(model: str) -> int:
    """What makes models divide requests independently."""
    return xxhash.xxh64_intdigest(model.encode())


def hashes_of(model: str, request_ids: RequestIds) -> U64:
    """uint64[n]: the hash of each request.

    Args:
        model: whose requests they are.
        request_ids: integers >= 0 of any shape, or text or bytes.

    Raises:
        ModelError: they are none of these.
    """
    array = np.asarray(request_ids)
    if array.dtype.kind in "USO":
        try:
            values = [xxhash.xxh64_intdigest(one.encode() if isinstance(one, str) else one) for one in array.reshape(-1)]
        except TypeError:
            raise ModelError("request ids are mixed: expected integers >= 0, or text, or bytes") from None
        ids = np.array(values, np.uint64).reshape(array.shape)
    elif array.dtype.kind in "iu" and (array.dtype.kind == "u" or not array.size or array.min() >= 0):
        ids = array.astype(np.uint64)
    else:
        raise ModelError(f"request ids are {array.dtype}: expected integers >= 0, or text, or bytes")
    ids = np.atleast_1d(ids) ^ np.uint64(salt_of(model))  # of one dimension at least: scalars of NumPy warn of overflow
    for multiplier in _MULTIPLIERS:
        ids ^= ids >> _SHIFT
        ids *= multiplier
    ids ^= ids >> _SHIFT
    return ids.reshape(array.shape)


def arms_of(model: str, request_ids: RequestIds, low: int, high: int) -> Arms:
    """uint8[n]: `ONLINE` or `BASELINE` for each request, by the two bounds."""
    if not high:
        return np.zeros(np.asarray(request_ids).shape, np.uint8)
    upper = hashes_of(model, request_ids) >> np.uint64(32)
    return ((upper < np.uint64(low)) | (upper >= np.uint64(high))).astype(np.uint8)
