"""What is said of fences (`p2p.identity.fence`): the fact that nodes tell each other; local requests, and answers."""

from typing import Final

from p2p.values import dataclass

# Epochs are small numbers, or times: 63 bits are enough for either.
EPOCH_BITS: Final = 63
# What an operator may say of a fence, for people.
NOTE_CHARS_MAX: Final = 200
# Nodes that write back one after another while a fence stands, each under an id of its own: one that crashed and the next.
RESTORERS_MAX: Final = 64

# Stages of a fence.
CLOSING, CLOSED, LIFTED = range(3)


@dataclass(frozen=True, slots=True)
class Restorer:
    """Who writes behind a fence: a fresh writer id, bound to its nonce, and a stamp that all of its own are above."""

    writer: int
    nonce: int
    since: int


@dataclass(frozen=True, slots=True)
class Fence:
    """All writers of a family were stopped; of several fences of one family the one of the largest epoch counts.

    Fences merge: of two versions of one fence the later stage counts, the smaller `stamp`, the larger `until`, and all
    restorers of both.
    """

    family: int
    epoch: int
    stage: int = CLOSING
    stamp: int = 0  # from `CLOSED` on: the newest stamp that its coordinator had seen; who writes later writes above it
    until: int = 0  # `LIFTED`: the same of who lifted it
    restorers: tuple[Restorer, ...] = ()  # sorted by writer and nonce
    note: str = ""

    @property
    def key(self) -> tuple[int, int]:
        """What tells it apart from others."""
        return self.family, self.epoch

    def lets_pass(self, writer: int, nonce: int) -> bool:
        """Whether a writer of the family may write while the fence stands."""
        return self.stage == LIFTED or any((one.writer, one.nonce) == (writer, nonce) for one in self.restorers)


@dataclass(frozen=True, slots=True, eq=False)
class FenceReport:
    """The sender is stopped, and knows this of all that was retired. Since protocol version 2."""

    family: int
    epoch: int
    retired_digest: int  # over all that it knows of expulsions, retirements and fences
    reached: bool  # all that is left of the family's writers is there, and nothing more
    boots: tuple[int, ...]  # lives of the members that it knows of, those that are away included


# --- requests of a local process ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FenceRequested:
    """Stop all writers of a family, and say when all members hold the same of it; answered with `Fenced`.

    Asked again with the same epoch, by whichever node, it is the same fence. Epoch 0: the next one. A member that is not heard
    for `expel_after_ms` meanwhile is expelled; None: it is waited for, and named (`FenceWaits`).
    """

    request: int
    family: int
    epoch: int = 0
    note: str = ""
    expel_after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class LiftRequested:
    """Let the writers of a family write again; answered with `Lifted`. Any node may ask, at any stage."""

    request: int
    family: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """Answer to `FenceRequested`: every member holds the same of all writers, and refuses what is above."""

    request: int
    family: int
    epoch: int
    stamp: int  # whoever writes behind the fence writes above it


@dataclass(frozen=True, slots=True)
class FenceWaits:
    """On the way to `Fenced`, whenever this changes: whom the fence waits for."""

    request: int
    family: int
    epoch: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lifted:
    """Answer to `LiftRequested`: it is decided, durably, and told."""

    request: int
    family: int
    epoch: int


def merged(one: Fence, other: Fence) -> Fence:
    """What two versions of a fence say together, in whatever order they come."""
    stamps = [stamp for stamp in (one.stamp, other.stamp) if stamp]
    restorers = sorted({*one.restorers, *other.restorers}, key=lambda who: (who.writer, who.nonce, who.since))
    return Fence(
        one.family,
        one.epoch,
        max(one.stage, other.stage),
        min(stamps, default=0),
        max(one.until, other.until),
        tuple(restorers[:RESTORERS_MAX]),
        max(one.note, other.note),
    )
