"""Of which moments a model's older state is known exactly.

A *cut* is a stamp: the state at a cut has, of each key, the newest version up to it. The log has every version that came here,
but a version may never come: an answer to a pull, and a backlog, bring of each key the newest version only, and claim more than
they bring. What they leave out is *hidden*: a version h of a writer w that lies above w's frontier here before that claim, and
below the row that took its place, which is here by then. Hence the rule: where a claim of w that came without its steps is
merged, and w's frontier was f, the cuts from f to the newest row that is here are *blurred*. Pushed steps hide nothing.

Blurred besides, as long as it lasts: between the frontier of a writer and its newest row here (its strays, R15), and whatever a
loss has taken (`lose`). Cuts above `complete`, up to where everything of every live writer is here, are not known yet, and
those below `until`, up to where the older state has come, not any more.

Pure: no I/O, no clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p.stamps import EPOCH_MS, make_stamp, unix_ms_of

U64 = NDArray[np.uint64]

STAMP_MAX: Final = (1 << 64) - 1
# Blurred stretches; more are joined, which blurs what lies between them.
BLURS_MAX: Final = 64
# The frontier is looked at again when it has come so far: finer is only work.
MARK_MS: Final = 100


def cut_of(unix_ms: int) -> int:
    """The cut of a moment: all that was written in or before this millisecond; of one that no stamp reaches, everything."""
    return min(make_stamp(max(unix_ms + 1, EPOCH_MS + 1), 0, 0) - 1, STAMP_MAX)


def unix_ms_of_cut(cut: int) -> int:
    """The last millisecond that is in a cut as a whole."""
    return unix_ms_of(cut + 1) - 1


@dataclass(slots=True, eq=False)
class History:
    """Of one model. Stamps all; a blur (a, b) are the cuts c with a <= c < b."""

    until: int = 0  # the older state has everything up to here that came
    target: int = 0  # where it is being brought, before it is there; what it has lies between
    complete: int = 0  # everything of every live writer up to here is here
    newest: int = 0  # of all rows that came
    compare_at: int | None = None  # part of the log is lost: both stores are compared once the older one may have come so far
    frontiers: dict[tuple[int, int], int] = field(default_factory=dict)  # (partition, writer) -> as it was at the last mark
    strays: list[tuple[int, int]] = field(default_factory=list)  # blurred as long as they are
    blurs: list[tuple[int, int]] = field(default_factory=list)  # ascending, apart

    # --- what happens

    def note_rows(self, newest: int) -> None:
        """Rows came, of stamps up to this."""
        self.newest = max(self.newest, newest)

    def note_coalesced(self, since: Mapping[int, int]) -> None:
        """Claims came without their steps: writer -> its frontier before."""
        self.blur(min(since.values()) + 1, self.newest)

    def is_due(self, synced_until_ms: int) -> bool:
        """Whether a mark at this moment would say more than the last one."""
        return synced_until_ms >= unix_ms_of(self.complete) + MARK_MS

    def mark(self, synced_until_ms: int, frontiers: U64, newest: U64) -> None:
        """Take note of how far everything is here.

        Args:
            synced_until_ms: everything of every live writer up to this moment is; 0: that is not known.
            frontiers: uint64[partitions held, WRITERS_MAX], now.
            newest: uint64[WRITERS_MAX], the newest row here of each writer.
        """
        self.frontiers = _sparse(frontiers)
        covered = frontiers.min(axis=0, initial=np.iinfo(np.uint64).max)  # of a model that only others hold
        ahead = np.flatnonzero(newest > covered)
        self.strays = [(int(covered[writer]) + 1, int(newest[writer])) for writer in ahead.tolist()]
        if synced_until_ms:
            # In its last millisecond there may be more.
            self.complete = max(self.complete, cut_of(synced_until_ms - 1))

    def resume(self, frontiers: U64) -> None:
        """The process before this one may have ended between a claim and its note: as if all that moved were claimed."""
        moved = [self.frontiers.get(key, 0) for key, now in _sparse(frontiers).items() if now > self.frontiers.get(key, 0)]
        if moved:
            self.blur(min(moved) + 1, self.newest)

    def blur(self, begin: int, end: int) -> None:
        """The cuts from `begin` to below `end` are not known exactly."""
        if begin >= end:
            return
        joined = sorted([*self.blurs, (begin, end)])
        self.blurs = [joined[0]]
        for first, last in joined[1:]:
            if first <= self.blurs[-1][1]:
                self.blurs[-1] = self.blurs[-1][0], max(self.blurs[-1][1], last)
            else:
                self.blurs.append((first, last))
        while len(self.blurs) > BLURS_MAX:
            gaps = [after[0] - before[1] for before, after in zip(self.blurs, self.blurs[1:], strict=False)]
            at = gaps.index(min(gaps))
            self.blurs[at : at + 2] = [(self.blurs[at][0], self.blurs[at + 1][1])]

    def lose(self, newest: int) -> None:
        """Versions up to `newest` are lost that have not been applied: nothing above the older state is known before both
        stores were compared.
        """
        self.blur(self.until + (self.target <= self.until), STAMP_MAX)
        self.compare_at = max(newest, self.compare_at or 0)

    def compared(self, newest: int) -> None:
        """Both stores were compared; what was changed since, up to `newest`, may have had versions that are lost."""
        self.compare_at = None
        self.blurs = [(begin, min(end, newest)) for begin, end in self.blurs if begin < newest]

    def begin_advance(self, cut: int) -> None:
        """The older state is being brought to a cut."""
        self.target = max(self.target, cut)

    def end_advance(self, cut: int) -> None:
        """It is there."""
        self.until = max(self.until, cut)
        self.blurs = [blur for blur in self.blurs if blur[1] > self.until]

    # --- what is asked

    def valid_cut(self, wanted: int) -> int | None:
        """The newest cut up to `wanted` of which the state is known exactly; None: there is none any more, or yet."""
        cut = min(wanted, self.complete)
        for begin, end in sorted([*self.blurs, *self.strays], reverse=True):
            # One that begins later may reach over the end of one that begins earlier; the order makes up for it.
            if begin <= cut < end:
                cut = begin - 1
        return cut if cut >= max(self.until, self.target, 1) else None

    def exact_until(self) -> int:
        """Up to where the older state has everything of every live writer."""
        cut = min(self.until, self.complete)
        for begin, end in sorted(self.blurs, reverse=True):
            if begin <= cut < end:
                cut = begin - 1
        return cut

    # --- to be written down

    def to_json(self) -> dict[str, Any]:
        """For `from_json`, in a process after this one."""
        return {
            "until": self.until,
            "target": self.target,
            "complete": self.complete,
            "newest": self.newest,
            "compare_at": self.compare_at,
            "frontiers": [[*key, stamp] for key, stamp in self.frontiers.items()],
            "blurs": self.blurs,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "History":
        """What `to_json` made."""
        frontiers = {(partition, writer): stamp for partition, writer, stamp in raw["frontiers"]}
        blurs = [(begin, end) for begin, end in raw["blurs"]]
        numbers = {name: raw[name] for name in ("until", "target", "complete", "newest", "compare_at")}
        return cls(**numbers, frontiers=frontiers, blurs=blurs)


def _sparse(frontiers: U64) -> dict[tuple[int, int], int]:
    """(partition, writer) -> stamp, of those that have any."""
    places = np.nonzero(frontiers)
    return dict(zip(zip(*(axis.tolist() for axis in places), strict=True), frontiers[places].tolist(), strict=True))
