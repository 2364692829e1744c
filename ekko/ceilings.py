"""Publishing above what a dead run may have left behind, as publishers of one machine ask their node for it (R24).

A trainer that goes on from a checkpoint publishes some rows again, from the model as it was then. They must win over what its
former life published after the checkpoint, wherever that is by now. So its node asks all others for the largest stamp they
have, and mints above it from then on (`p2p.ceilings`).
"""

from typing import Any

from p2p.values import dataclass


@dataclass(frozen=True, slots=True)
class AboveAsk:
    """Mint above `stamp`, and above all that any region holds of a model; answer after `timeout_ms` at the latest."""

    model: str
    stamp: int
    timeout_ms: int
    incarnation: int = 0  # of the model that the publisher opened


@dataclass(frozen=True, slots=True)
class Above:
    """Whatever the node mints from now on is above `stamp`. See `p2p.messages.ceilings.AboveTold`."""

    stamp: int
    heard: tuple[str, ...]  # regions of which some node told what it has
    unheard: tuple[str, ...]  # regions of which none did: rows of the dead run may be there that are above
    silent: tuple[str, ...]  # nodes that did not, in regions of both kinds


def ask_body(ask: AboveAsk) -> list[object]:
    """A question in a header."""
    return ["above", ask.model, ask.stamp, ask.timeout_ms, ask.incarnation]


def answer_body(answer: Above) -> list[object]:
    """An answer in a header."""
    return ["above", answer.stamp, answer.heard, answer.unheard, answer.silent]


def answer_of(stamp: int, heard: Any, unheard: Any, silent: Any) -> Above:
    """An answer from a header."""
    return Above(stamp, tuple(map(str, heard)), tuple(map(str, unheard)), tuple(map(str, silent)))
