"""Which versions of the protocol there are, and what two nodes of different versions speak with each other.

A node of version k speaks k and k-1, so that a cluster is upgraded one node after another: neighbours in version interoperate,
others refuse each other in one line. A link speaks the smaller of both versions; `wire` declares what exists since when.

How a node learns another's version, though version 1 knows of no other: a hello names the *lowest* version that its sender
speaks, which version 1 compares with its own; hello and refusal keep version 1's shape for ever, since they are said before
anything is agreed. The highest travels in the top byte of the record's own version number, which every version only compares
and passes on. So it is known of every member, also of those that one has only heard of through nodes of version 1.

Rejected: a version field of the record. Nodes of version 1 would drop it from what they pass on, and two records of one
member, equal by number and different in content, would travel.
"""

from typing import Final

# What we speak. Version 1: everything up to the first handshake with versions. Version 2: writer ids in blocks, retirement.
PROTOCOL_VERSION: Final = 2
# The handshake is said in it.
FIRST_VERSION: Final = 1
# Below it a record counts its changes, of which no life has 16 million.
_COUNT_BITS: Final = 24


def lowest_spoken(version: int) -> int:
    """The oldest version that a node of `version` understands."""
    return max(FIRST_VERSION, version - 1)


def agree(one: int, other: int) -> int | None:
    """What nodes of these two versions speak with each other; None when nothing."""
    return min(one, other) if abs(one - other) <= 1 else None


def describe(version: int) -> str:
    """What a node of `version` speaks, for a log line."""
    lowest = lowest_spoken(version)
    return f"protocol version {version}" if lowest == version else f"protocol versions {lowest} to {version}"


def first_record_version(version: int) -> int:
    """Where the record of a node of `version` begins to count."""
    return (version - FIRST_VERSION) << _COUNT_BITS


def changes_of(record_version: int) -> int:
    """How often a record has changed in its life."""
    return record_version & ((1 << _COUNT_BITS) - 1)


def protocol_of(record_version: int) -> int:
    """The protocol version of the node whose record this is."""
    return (record_version >> _COUNT_BITS) + FIRST_VERSION
