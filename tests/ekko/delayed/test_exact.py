"""What is told of a moment is what was, whatever happens to the messages and to the node (decision 0047)."""

from pathlib import Path

import pytest

from ekko.delayed.history import History
from tests.ekko.delayed.exact import moments_are_told_exactly


@pytest.mark.parametrize("seed", range(3))
def test_moments_are_told_exactly(seed: int, tmp_path: Path) -> None:
    moments_are_told_exactly(seed, tmp_path)


def test_so_they_are_after_a_loss(tmp_path: Path) -> None:
    moments_are_told_exactly(0, tmp_path, lossy=True)


def test_so_they_are_where_links_are_full_and_coalesce(tmp_path: Path) -> None:
    moments_are_told_exactly(0, tmp_path, busy=True)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3, 40))
@pytest.mark.parametrize("lossy", [False, True])
def test_many_seeds(seed: int, lossy: bool, tmp_path: Path) -> None:
    moments_are_told_exactly(seed, tmp_path, lossy=lossy)


def expect_caught(tmp_path: Path, *, lossy: bool = False) -> None:
    for seed in range(8):
        try:
            moments_are_told_exactly(seed, tmp_path / str(seed), lossy=lossy)
        except AssertionError:
            return
    pytest.fail("nobody noticed")


def test_planted_bug_claims_without_steps_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "note_coalesced", lambda self, since: None)
    expect_caught(tmp_path)


def test_planted_bug_strays_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = History.mark

    def without_complete(self, synced_until_ms, frontiers, newest) -> None:  # type: ignore[no-untyped-def]
        mark(self, synced_until_ms, frontiers, newest)
        self.complete = max(self.complete, int(newest.max()))

    monkeypatch.setattr(History, "mark", without_complete)
    expect_caught(tmp_path)


def test_planted_bug_a_lost_part_of_the_log_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "lose", lambda self, newest: None)
    expect_caught(tmp_path, lossy=True)
