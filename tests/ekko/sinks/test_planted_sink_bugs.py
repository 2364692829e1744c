"""Each way to do it wrong is noticed by the conformance suite; the sink that does it right passes."""

import pytest

from ekko.serve import sink_conformance
from ekko.serve.sink_conformance import Case, kills
from tests.ekko.sinks.plain_sink import Bug, PlainSubject

# Its store is in this process, where what is forked does not reach it.
CASES = [case for case in sink_conformance.CASES if case.__module__ != kills.__name__]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_plain_sink_passes(case: Case) -> None:
    case(PlainSubject())


@pytest.mark.parametrize("bug", Bug, ids=lambda bug: bug.name.lower())
def test_a_bug_is_noticed(bug: Bug) -> None:
    for case in CASES:
        try:
            case(PlainSubject(bug))
        except AssertionError:
            return
    pytest.fail("nothing was noticed")
