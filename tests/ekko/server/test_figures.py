"""What operators are told of a model's server: how long pushes wait, and for which worker."""

from types import SimpleNamespace

import pytest

from ekko.train.server import figures as module
from ekko.train.server import wire as w
from ekko.train.server.figures import LATE_S, Figures


def test_a_push_that_is_asked_again_waits_since_it_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))  # this module's: others go on in theirs
    figures = Figures("ctr")
    push = w.Push("ctr", 3, 1, 7, (0,), {})
    figures.push_came(1, push)
    now_s = 104.0
    figures.push_came(2, push)
    figures.answered(1, w.Failed(w.BUSY, "asked again"))
    assert figures.oldest_push_s(now_s) == 4.0
    figures.answered(2, w.Pushed(7, 1))
    assert figures.oldest_push_s(now_s) == 0.0
    assert figures.ack_ms() == [4_000.0, 4_000.0]
    assert figures.counts() == {"pulls": 0, "pushes": 2, "refused": 0, "busy": 1}
    assert not figures._times


def test_who_is_waited_for_is_told_since_when_and_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures("ctr")
    assert figures.waits_for({2, 1}, 10.0) == {1: 0.0, 2: 0.0}
    assert figures.waits_for({1}, 10.0 + LATE_S) == {1: LATE_S}
    assert figures.waits_for({1, 2}, 12.0 + LATE_S) == {1: LATE_S + 2, 2: 0.0}
    assert figures.waits_for(set(), 13.0 + LATE_S) == {}
    said = "".join(capsys.readouterr())  # to which of the two, whoever logged in this process before has settled
    assert said.count("worker_late") == 1
    assert said.count("worker_not_late") == 1
