"""Checked access to single values that a peer sent inside a header; all raise only `RemoteProtocolError`."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

from p2p.errors import RemoteProtocolError

STRING_BYTES_MAX: Final = 1_024

T = TypeVar("T")


def uint(value: object, bits: int = 64) -> int:
    """An unsigned number."""
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise RemoteProtocolError(f"expected an unsigned {bits}-bit number, got {value!r}"[:100])
    return value


def wide(value: object) -> int:
    """A 128-bit digest travels as 16 bytes."""
    if type(value) is not bytes or len(value) != 16:
        raise RemoteProtocolError("expected a 16-byte digest")
    return int.from_bytes(value, "little")


def text(value: object) -> str:
    """A short string."""
    if type(value) is not str or len(value) > STRING_BYTES_MAX:
        raise RemoteProtocolError("expected a short string")
    return value


def flag(value: object) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise RemoteProtocolError("expected true or false")
    return value


def items(value: object, count_max: int, parse: Callable[[Any], T]) -> tuple[T, ...]:
    """A list of at most so many, each parsed."""
    if type(value) is not list or len(value) > count_max:
        raise RemoteProtocolError(f"expected a list of at most {count_max}")
    return tuple(parse(item) for item in value)
