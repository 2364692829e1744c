"""How urgent a row is: a byte that its origin gives it once, and that everybody carries unchanged.

A class says on a scale of logarithms how far a row's priority is above the threshold of its model at its origin: 8 classes are
a factor of two. What a priority is, only the origin knows (`ekko.priority`); here are the numbers that all nodes share.

    0          not known: counts as ordinary; also a section of rows without classes
    1 .. 127   ordinary, from least to most
    128 .. 254 significant: at the threshold, and above
    255        taken back: the rows of a rollback, before everything else
"""

from collections.abc import Iterable
from typing import Final

import numpy as np

from p2p.replica import U64, RowColumns

NOT_KNOWN: Final = 0
LEAST: Final = 1
FOREMOST_ORDINARY: Final = 127
SIGNIFICANT: Final = 128
MOST: Final = 254
TAKEN_BACK: Final = 255
# So many classes apart, one priority is twice the other: 9 % a class, and 15 doublings on either side of the threshold.
PER_DOUBLING: Final = 8


def significant_rows(columns: Iterable[RowColumns]) -> int:
    """How many of these rows are at the threshold or above."""
    return sum([int(np.count_nonzero(one.priority >= SIGNIFICANT)) for one in columns if one.priority is not None])


def significant_by_step(columns: Iterable[RowColumns], stamps: U64) -> list[int]:
    """The same for each step of a group, by its stamp; the rows have stamps of their own."""
    counts = np.zeros(len(stamps), np.int64)
    for one in columns:
        if one.priority is not None and one.stamps is not None:
            chosen = one.stamps[one.priority >= SIGNIFICANT]
            counts += np.bincount(np.searchsorted(stamps, chosen), minlength=len(stamps))
    return counts.tolist()
