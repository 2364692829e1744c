"""The paper's configurations as parameters of tests: the last of them has all that the others have."""

from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet

ALWAYS = ("leaders", "push")


def quick_first(presets: Iterable[str]) -> list[ParameterSet]:
    """Those that always run, and the steps on the way to them, which run on request (marker `long`)."""
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.long) for name in presets]
