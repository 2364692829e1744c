"""Fences with a rule switched off, one at a time: some scenario must notice (R13, R15)."""

from typing import Any

import pytest

from p2p import messages as m
from p2p.core import Core
from p2p.identity.fence import Fencing
from p2p.identity.ledger import NodeRecord
from p2p.pushing.push import Push
from tests.p2p.fence_chaos import (
    held_steps_do_not_leave,
    nothing_acknowledged_is_lost,
    the_whole_cluster_restarts,
    who_was_away_for_all_of_it_returns,
    writers_are_stopped_in_mid_stream,
)
from tests.p2p.plants import Plant, Scenario, expect_caught

SEEDS = 4


def nobody_is_asked_whether_he_is_done(patch: pytest.MonkeyPatch) -> None:
    """The fence is closed without waiting for reports."""
    patch.setattr(Fencing, "_reached", lambda *_: True)
    patch.setattr(Fencing, "_missing", lambda *_: ())


def who_has_heard_what_is_left_counts_as_having_it(patch: pytest.MonkeyPatch) -> None:
    """A member says that it is done when it knows F, and not when it holds it."""
    patch.setattr(Fencing, "_holds", staticmethod(lambda _, retired: retired.stage != m.FROZEN))


def writers_go_on_under_their_ids(patch: pytest.MonkeyPatch) -> None:
    """Who is stopped keeps its writer id, and uses it again."""
    patch.setattr(Core, "stop_writing", lambda *_: None)


def a_restart_forgets_the_fence(patch: pytest.MonkeyPatch) -> None:
    """The ledger does not keep what was stopped."""
    load = NodeRecord.load.__func__  # type: ignore[attr-defined]

    def forgetful(cls: type[NodeRecord], ledger: Any) -> NodeRecord:
        record: NodeRecord = load(cls, ledger)
        record.fences.clear()
        record.retired.clear()
        return record

    patch.setattr(NodeRecord, "load", classmethod(forgetful))


def held_steps_leave_after_all(patch: pytest.MonkeyPatch) -> None:
    """A step that waited for others leaves when its time is over, behind the fence."""
    patch.setattr(Push, "_drop_held", lambda *_: None)


def who_restores_is_not_named(patch: pytest.MonkeyPatch) -> None:
    """What is written back carries an id that the fence does not let pass."""

    def become(self: Any, _fence: m.Fence, keyspaces: Any, now: m.Now) -> None:
        self._allotment.become_writer(keyspaces, now)

    patch.setattr(Fencing, "_become_restorer", become)


def only_ones_own_writer_is_stopped_without_retiring_it(patch: pytest.MonkeyPatch) -> None:
    """Nobody's writer is retired, so that nothing is laid together."""
    patch.setattr(Fencing, "_writers_of", lambda *_: [])


def what_nobody_knew_of_is_kept(patch: pytest.MonkeyPatch) -> None:
    """Who was away for all of a fence keeps what nobody else ever saw."""
    patch.setattr(Fencing, "_holds_old", lambda *_: False)


def publishers_are_not_refused(patch: pytest.MonkeyPatch) -> None:
    """A node stores steps of a fenced model under a fresh id."""
    check = Fencing.check_step

    def lenient(self: Any, step: m.PublishRequested, now: m.Now) -> None:
        if step.through_fence:
            check(self, step, now)

    patch.setattr(Fencing, "check_step", lenient)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (nobody_is_asked_whether_he_is_done, writers_are_stopped_in_mid_stream),
        (who_has_heard_what_is_left_counts_as_having_it, writers_are_stopped_in_mid_stream),
        (writers_go_on_under_their_ids, writers_are_stopped_in_mid_stream),
        (a_restart_forgets_the_fence, the_whole_cluster_restarts),
        (held_steps_leave_after_all, held_steps_do_not_leave),
        (who_restores_is_not_named, writers_are_stopped_in_mid_stream),
        (only_ones_own_writer_is_stopped_without_retiring_it, nothing_acknowledged_is_lost),
        (what_nobody_knew_of_is_kept, who_was_away_for_all_of_it_returns),
        (publishers_are_not_refused, writers_are_stopped_in_mid_stream),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)
