"""One kind of message on the wire, and what later versions of the protocol added to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from p2p import messages as m
from p2p.wire.columns import Columns
from p2p.wire.limits import HEADER_ITEMS_MAX

Packed = tuple[list[Any], list[NDArray[Any]]]  # header and columns
Header = list[Any]  # what msgpack makes of junk is anything; each decoder below checks what it takes
# Fields that later versions put to the end of a header, in order: (since which version, what it means where it is missing).
Added = tuple[tuple[int, Any], ...]


def trim(header: Header, added: Added, version: int) -> Header:
    """What `version` has of a header; `added` are its last fields."""
    later = sum(since > version for since, _ in added)
    return header[: len(header) - later]


def extend(header: Header, added: Added, version: int) -> Header:
    """A header of `version` with the fields that it does not have yet."""
    return [*header, *(missing for since, missing in added if since > version)]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of message on the wire. A version that has it may lack the last fields of its header."""

    message: type
    pack: Callable[[Any, int], Packed]  # for a version: records inside the header may have fields of their own
    unpack: Callable[[Header, Columns], Any]
    since: int = 1
    added: Added = ()
    changed: tuple[int, ...] = ()  # versions that changed it otherwise: records inside it, or its columns
    header_items_max: int = HEADER_ITEMS_MAX  # more for those that tell of the whole schema, or of many members

    @property
    def name(self) -> str:
        return self.message.__name__

    def encode(self, message: m.Message, version: int) -> Packed:
        """Header and columns, in the shape of a version."""
        header, columns = self.pack(message, version)
        return trim(header, self.added, version), columns

    def same_shape(self, one: int, other: int) -> bool:
        """Whether nothing changed between two versions."""
        if one == other:
            return True
        low, high = sorted((one, other))
        return not any(low < since <= high for since in (*self.changed, *(since for since, _ in self.added)))
