"""Above which stamp must somebody mint who goes on from an older state? (`p2p.ceilings`)"""

from p2p.messages.envelope import NodeId
from p2p.values import dataclass


@dataclass(frozen=True, slots=True)
class CeilingAsk:
    """Tell me what you hold of a keyspace, as far as stamps go."""

    keyspace: int
    query: int


@dataclass(frozen=True, slots=True)
class CeilingTold:
    """No row and no claim of the keyspace has a larger stamp at the sender; and what tells whether the receiver has it all."""

    query: int
    stamp: int
    vector_digest: int  # 128 bits over the vector
    stray_digest: int  # 128 bits over the rows held above it (R8); 0: none
    writers: tuple[tuple[int, int], ...]  # (writer, largest stamp of it in the vector)


@dataclass(frozen=True, slots=True)
class AboveRequested:
    """From now on mint above `stamp` and above all that any region holds of a family; answered with `AboveTold` (R24)."""

    request: int
    family: int
    stamp: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class AboveTold:
    """Answer to `AboveRequested`: whatever is minted here from now on is above `stamp`.

    Of the regions in `heard` some holder told what it has, and it is here. Of those in `unheard` nobody did, in time or at all:
    rows may be there that are above. `silent` are all holders of which neither is known, in regions of both kinds.
    """

    request: int
    stamp: int
    heard: tuple[str, ...]
    unheard: tuple[str, ...]
    silent: tuple[NodeId, ...]
