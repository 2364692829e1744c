"""How urgent a row is: a byte that its origin gives it once, and that everybody carries unchanged.

A class says on a scale of logarithms how far a row's priority is above the threshold of its model at its origin: 8 classes are
a factor of two. What a priority is, only the origin knows (`ekko.priority`); here are the numbers that all nodes share.

    0          not known: counts as ordinary; also a section of rows without classes
    1 .. 127   ordinary, from least to most
    128 .. 254 significant: at the threshold, and above
    255        taken back: the rows of a rollback, before everything else
"""

from typing import Final

NOT_KNOWN: Final = 0
LEAST: Final = 1
SIGNIFICANT: Final = 128
MOST: Final = 254
TAKEN_BACK: Final = 255
# So many classes apart, one priority is twice the other: 9 % a class, and 15 doublings on either side of the threshold.
PER_DOUBLING: Final = 8
