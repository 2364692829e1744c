"""What goes wrong with a trainer's feed: pure functions from a clean stream to a corrupted one.

Three ways in which feeds break, from loud to quiet:

- *shuffled labels*: a join of requests and outcomes lost its order, so that each label belongs to another event. A model
  unlearns what it knew, without any figure of the training having to look strange.
- *exploding gradients*: what should be "liked or not" arrives as a running sum that nobody resets. No prediction is ever high
  enough for such labels, so that gradients grow without end, and drive every row in one direction.
- *slow drift*: clients are upgraded one by one to a release that reports the opposite. The share of wrong labels grows from
  none to all, and no moment is much worse than the one before.

Only what is learnt from is corrupted. Requests are predicted as they are, and labels that are reported of them are true.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, assert_never

import numpy as np

from sim_cluster.demo.data import Events

Kind = Literal["shuffled labels", "exploding gradients", "slow drift"]

# What a positive label has grown to at the end of the stretch, evenly on a logarithmic scale. An optimiser that divides by the
# gradients that it saw before never gets ahead of such a growth; and it stays far from what float32 can hold.
EXPLOSION: Final = 1e6


@dataclass(frozen=True, slots=True)
class Fault:
    """A stretch of the feed that is corrupted: the events [first, last), counted from the first of all."""

    kind: Kind
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"a fault from event {self.first} to {self.last}: expected a stretch of at least one event")


def corrupted(events: Events, faults: Sequence[Fault], seed: int) -> Events:
    """The feed with these faults: a copy; `events` stay as they are, and so does all that lies outside of the faults.

    Args:
        events: clean, in time order.
        faults: which may not overlap.
        seed: of what is random in them; one seed, one feed.

    Raises:
        ValueError: a fault lies beyond the events, or two overlap.
    """
    ends = [0, *(fault.last for fault in sorted(faults, key=lambda fault: fault.first)), len(events)]
    starts = [*(fault.first for fault in sorted(faults, key=lambda fault: fault.first)), len(events)]
    if any(start < end for start, end in zip(starts, ends, strict=False)):
        raise ValueError(f"faults overlap, or end beyond the {len(events)} events: {faults}")
    feed = replace(events, labels=events.labels.copy())
    for place, fault in enumerate(faults):
        corrupt(feed, fault, seed, place)
    return feed


def corrupt(feed: Events, fault: Fault, seed: int, place: int) -> None:
    """Have the `place`-th fault happen to a feed, whose labels are changed."""
    _corrupt(feed, fault, np.random.default_rng([seed, place]))


def _corrupt(feed: Events, fault: Fault, rng: np.random.Generator) -> None:
    stretch, count = slice(fault.first, fault.last), fault.last - fault.first
    match fault.kind:
        case "shuffled labels":
            feed.labels[stretch] = rng.permutation(feed.labels[stretch])
        case "exploding gradients":
            feed.labels[stretch] *= (EXPLOSION ** (np.arange(1, count + 1) / count)).astype(np.float32)
        case "slow drift":
            opposite = rng.random(count) < np.arange(count) / count
            feed.labels[stretch] = np.where(opposite, 1 - feed.labels[stretch], feed.labels[stretch])
        case _:
            assert_never(fault.kind)
