"""Seeds as parameters of tests: the first of them always run, the others on request."""

import pytest
from _pytest.mark import ParameterSet


def seeds(quick: int, of: int) -> list[ParameterSet]:
    """0 to `of` - 1; those from `quick` on run with HYPOTHESIS_PROFILE=long (marker `long`)."""
    return [pytest.param(seed, marks=() if seed < quick else pytest.mark.long) for seed in range(of)]
