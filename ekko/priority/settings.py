"""How the rows of one model are weighed: `[models.NAME] priority = { ... }`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrioritySettings:
    """Of one model at its origin."""

    k: float = 99.0  # percent of its rows are ordinary, the others significant
    window_s: float = 60.0  # of what was published in so many seconds
    formula: str = "significance"  # or "loss_impact", the name of an entry point, or a file that ends with .wasm
    # A key that is created now weighs as a row that moves so many times as far as usual, and half as much a half-life later.
    fresh_weight: float = 8.0
    fresh_half_life_s: float = 600.0


DEFAULTS = PrioritySettings()
