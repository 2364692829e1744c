"""Rows at risk of rollbacks that are over: which good rows went with the bad ones, kept where the operator finds them (R15).

A plan names them and goes when it is carried out; the witness keeps this of it, of the last rollbacks of each model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgpack
import numpy as np

from ekko.rollback.moments import show_moment
from ekko.rollback.plan import RowsAtRisk
from p2p.stamps import unix_ms_of

# Of each model so many are kept; each has 16 bytes a row, of `AT_RISK_NAMED_MAX` rows at most.
KEPT_MAX: Final = 8


def encode_risk(rows: Sequence[RowsAtRisk]) -> bytes:
    """For `decode_risk`."""
    return bytes(msgpack.packb([[one.table, one.keys.tobytes(), one.stamps.tobytes()] for one in rows]))


def decode_risk(data: bytes) -> list[RowsAtRisk]:
    """What `encode_risk` was given; nothing of what is damaged."""
    try:
        parts: list[Any] = msgpack.unpackb(data)
        return [
            RowsAtRisk(table, np.frombuffer(keys, np.uint64), np.frombuffer(stamps, np.uint64)) for table, keys, stamps in parts
        ]
    except (ValueError, TypeError, msgpack.UnpackException):
        return []


def risk_picture(rows: Sequence[RowsAtRisk], tables: Mapping[int, str]) -> list[dict[str, object]]:
    """As JSON: table, key, and when what is lost of it was written; keys are text, since JSON readers round large numbers.

    Args:
        rows: of one rollback.
        tables: names by id; of others the number stands.
    """
    return [
        {
            "table": tables.get(one.table, str(one.table)),
            "key": str(key),
            "written": show_moment(unix_ms_of(stamp)) if stamp else None,
        }
        for one in rows
        for key, stamp in zip(one.keys.tolist(), one.stamps.tolist(), strict=True)
    ]
