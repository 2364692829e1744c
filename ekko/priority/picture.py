"""What a node says of how it weighs the rows of a model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PriorityPicture:
    """What a node weighed of one model that is published at it."""

    formula: str
    k: float
    threshold: float | None  # None: too few rows were seen so far
    rows: int
    significant: int
    share: float  # of the model among what readers ask for, relative to the average of models
    failures: int = 0  # of the formula
    steps_without: int = 0  # tables of steps that the built-in formula weighed instead
    last_failure: str = ""
