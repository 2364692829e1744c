"""Rules of the servers that are left out, one at a time: the swarm has to notice each of them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from ekko.train.server import events as e
from ekko.train.server.core import Core
from ekko.train.server.groups import Groups
from ekko.train.server.pending import Push
from ekko.train.server.primaries import Primaries
from ekko.train.server.pushes import Pushes
from ekko.train.server.tracks import Partition
from ekko.train.server.workers import Workers
from tests.ekko.server.server_overlay import Node, Overlay
from tests.ekko.server.server_world import Process, World
from tests.ekko.server.test_server_swarm import run

SEEDS = 150
Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: dict[str, tuple[str, int, Plant]] = {}


def plant(kind: str, seed: int = 0) -> Callable[[Plant], Plant]:
    """A bug, the kind of swarm that is to find it, and the seed from which on to look for it, to save time."""

    def add(one: Plant) -> Plant:
        PLANTS[one.__name__] = kind, seed, one
        return one

    return add


# --- the machine ---------------------------------------------------------------------------------------------------------


@plant("async")
def acknowledged_before_it_is_durable(patch: pytest.MonkeyPatch) -> None:
    real = Groups.on_applied

    def on_applied(self: Groups, number: int, stamp: int) -> None:
        real(self, number, stamp)
        assert self._core.group is not None
        self._settle([self._core.group])

    patch.setattr(Groups, "on_applied", on_applied)


@plant("async")
def numbers_are_not_recorded_with_the_rows(patch: pytest.MonkeyPatch) -> None:
    real = Groups.begin

    def begin(self: Groups) -> None:
        real(self)
        out = self._core.out
        out[:] = [replace(one, marks=()) if isinstance(one, e.Apply) and one.steps else one for one in out]

    patch.setattr(Groups, "begin", begin)


@plant("handing-over")
def released_before_it_is_drained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Groups, "is_in_flight", lambda self, partition: False)


@plant("handing-over")
def released_before_it_is_served(patch: pytest.MonkeyPatch) -> None:
    def is_in_flight(self: Groups, partition: int) -> bool:
        return self._core.group is not None and self._core.group.touches(partition)

    patch.setattr(Groups, "is_in_flight", is_in_flight)


@plant("handing-over")
def taken_over_on_suspicion(patch: pytest.MonkeyPatch) -> None:
    """Who has not released a partition when it was asked for a second time counts as gone."""
    real = Primaries.on_timer

    def on_timer(self: Primaries, now_ms: int) -> list[object]:
        for partition, turn in enumerate(self._turns):
            if turn.stage == "asking":
                turn.released |= set(self._owed(partition))
        return [*real(self, now_ms), *self._review(now_ms)]

    patch.setattr(Primaries, "on_timer", on_timer)


@plant("handing-over", 120)
def taken_over_before_what_is_left_is_here(patch: pytest.MonkeyPatch) -> None:
    def is_gone(self: Primaries, node: str) -> bool:
        return node in self._lives and self._lives[node].expelled

    patch.setattr(Primaries, "_is_gone", is_gone)


@plant("async")
def a_stale_life_is_accepted(patch: pytest.MonkeyPatch) -> None:
    real = Core.is_stranger

    def is_stranger(self: Core, ask: int, worker: int, life: int) -> bool:
        return real(self, ask, worker, max(life, self.lives.get(worker, 0)))

    patch.setattr(Core, "is_stranger", is_stranger)
    patch.setattr(Pushes, "_is_of_life", lambda self, partition, asked: True)


@plant("alone")
def a_life_is_not_recorded(patch: pytest.MonkeyPatch) -> None:
    real = Workers.marks_of

    def marks_of(self: Workers, worker: int) -> list[e.Mark]:
        real(self, worker)
        return []

    patch.setattr(Workers, "marks_of", marks_of)


@plant("bounded")
def a_pull_is_answered_a_clock_too_early(patch: pytest.MonkeyPatch) -> None:
    real = Partition.may_pull
    patch.setattr(Partition, "may_pull", lambda self, clock: real(self, clock - 1))


@plant("sync")
def a_pull_is_answered_before_it_is_durable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Partition, "durable_of", lambda self, worker: self.tracks[worker].applied if worker in self.tracks else 0)


@plant("sync")
def a_round_is_in_the_order_of_arrival(patch: pytest.MonkeyPatch) -> None:
    real = Groups._round_of

    def round_of(self: Groups, partition: Partition) -> list[Push]:
        return sorted(real(self, partition), key=lambda push: push.ask)

    patch.setattr(Groups, "_round_of", round_of)


@plant("sync")
def a_round_goes_on_without_who_is_late(patch: pytest.MonkeyPatch) -> None:
    real = Partition.counted
    patch.setattr(Partition, "counted", lambda self: iter([worker for worker in real(self) if worker]))


@plant("async")
def a_push_that_comes_again_is_not_answered(patch: pytest.MonkeyPatch) -> None:
    real = Core.answer_if_settled

    def answer_if_settled(self: Core, waiter: object) -> None:
        if waiter.ask not in self.pending.pushes and not self.now_ms % 3:  # type: ignore[attr-defined]
            self.pending.drop_waiter(waiter)  # type: ignore[arg-type]
            return
        real(self, waiter)  # type: ignore[arg-type]

    patch.setattr(Core, "answer_if_settled", answer_if_settled)


@plant("async")
def a_push_that_comes_again_is_applied_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pushes, "_is_new", lambda self, track, number: number > track.durable)
    patch.setattr(Pushes, "_is_next", lambda self, track, number: number <= track.accepted + 1)


@plant("async")
def a_push_is_taken_before_the_one_that_it_follows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pushes, "_is_next", lambda self, track, number: True)


@plant("sync-dropping", 23)
def who_was_dropped_goes_on_in_its_life(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "is_dropped", lambda self, ask, worker, parts: False)


# --- the shell -----------------------------------------------------------------------------------------------------------


@plant("async")
def what_a_crash_left_half_done_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(World, "remember", lambda self, process, record: None)


@plant("async", 115)
def a_step_in_flight_is_taken_back(patch: pytest.MonkeyPatch) -> None:
    real = World._load

    def load(self: World, process: Process, partitions: tuple[int, ...]) -> None:
        self.undo(process.node)
        real(self, process, partitions)

    patch.setattr(World, "_load", load)


@plant("async")
def who_is_silent_is_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    real = Overlay.lacking

    def lacking(self: Overlay, node: Node, cells: dict[object, int]) -> list[str]:
        return [name for name in real(self, node, cells) if self.nodes[name].up]  # type: ignore[arg-type]

    patch.setattr(Overlay, "lacking", lacking)


@pytest.mark.parametrize("name", PLANTS)
def test_the_swarm_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, seed, bug = PLANTS[name]
    bug(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        run_all(kind, seed)


def run_all(kind: str, first: int) -> None:
    for seed in range(first, first + SEEDS):
        run(kind, seed)
