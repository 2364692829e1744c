"""One model on one server, as a state machine: `events` in, effects out; no I/O, no clock, no threads.

Think of a notary with one pen. Letters that come while he writes pile up; then he takes the whole pile, enters all of it in one
go, sends the page to the other houses, and when all have it he writes the receipts.

This module puts the parts together, and takes partitions over and gives them up: `primaries` decides for whom it is, `pushes`
and `pulls` take requests in, `groups` makes steps of them, `workers` knows who is there.
"""

from collections.abc import Iterable, Mapping
from typing import assert_never

from ekko.train.server import events as e
from ekko.train.server import primaries as p
from ekko.train.server import wire as w
from ekko.train.server.core import Core
from ekko.train.server.groups import Groups
from ekko.train.server.pulls import Pulls
from ekko.train.server.pushes import Pushes
from ekko.train.server.tracks import Partition, Role
from ekko.train.server.workers import Workers


class Machine:
    """Decides for one model on one server.

    Args:
        own: our life: the node beside us, and this process.
        model: its name.
        settings: of the model.
        endpoints: node id -> endpoint of every server of the model, our own included, as all of them are configured.
        worker_timeout_ms: in modes "bounded" and "sync": who is silent for so long is not waited for; 0: for ever.
    """

    def __init__(
        self,
        own: w.ServerLife,
        model: str,
        settings: w.ModelSettings,
        endpoints: Mapping[str, str],
        worker_timeout_ms: int = 0,
    ) -> None:
        self.core = Core(own, model, settings, endpoints, worker_timeout_ms)
        self._workers = Workers(self.core)
        self._groups = Groups(self.core, self._workers)
        self._pushes = Pushes(self.core)
        self._pulls = Pulls(self.core)
        self._stopped = False

    def handle(self, event: e.Event, now_ms: int) -> list[e.Effect]:
        """Advance by one event.

        Args:
            event: what happened.
            now_ms: of a clock that never goes back, milliseconds.

        Returns:
            Effects to carry out, in order.
        """
        if self._stopped:
            return []
        self.core.now_ms = now_ms
        self._dispatch(event)
        if not self._stopped:
            self._advance()
        out, self.core.out = self.core.out, []
        return out

    @property
    def deadline_ms(self) -> int | None:
        """When `TimerFired` is wanted next; None: not at all."""
        moments = self.core.primaries.deadline_ms, self._pulls.next_ms(), self._workers.next_ms(), self._groups.next_ms()
        return None if self._stopped else min((ms for ms in moments if ms is not None), default=None)

    def serving(self) -> w.Serving:
        """The answer to `wire.WhoServes`."""
        return self.core.serving()

    @property
    def roles(self) -> dict[int, str]:
        """For an operator: "away", "loading", "acting", "draining", by partition."""
        return {partition.number: partition.role.name.lower() for partition in self.core.partitions}

    def late(self) -> set[int]:
        """Workers that others wait for now."""
        return self._workers.late()

    @property
    def dropped(self) -> list[int]:
        """Workers that nobody waits for until they say hello."""
        return sorted(set().union(*(partition.dropped for partition in self.core.acting())))

    def _dispatch(self, event: e.Event) -> None:
        core, primaries = self.core, self.core.primaries
        match event:
            case e.PushAsked():
                self._pushes.on_push(event)
            case e.PullAsked():
                self._pulls.on_pull(event)
            case e.HelloAsked():
                self._workers.on_hello(event)
            case e.Applied(group, stamp):
                self._groups.on_applied(group, stamp)
            case e.Durable(group):
                self._groups.on_durable(group)
            case e.Served(group):
                self._groups.on_served(group)
            case e.Loaded(partitions, marks):
                self._on_loaded(partitions, marks)
            case e.ViewChanged():
                self._follow(primaries.on_view(event, core.now_ms))
            case e.ReleaseAsked():
                self._follow(primaries.on_release_asked(event, core.now_ms))
            case e.ReleaseAnswered():
                self._follow(primaries.on_release_answered(event, core.now_ms))
            case e.Flushed():
                self._follow(primaries.on_flushed(event, core.now_ms))
            case e.TimerFired():
                self._follow(primaries.on_timer(core.now_ms))
                self._pulls.expire()
                self._workers.drop_silent()
            case _:
                assert_never(event)

    def _advance(self) -> None:
        """Do what has become possible."""
        self._groups.begin()
        self._pulls.answer_due()
        self._unload_drained()
        self._workers.note_waiting()

    # --- acting for partitions ----------------------------------------------------------------------------------------------

    def _follow(self, effects: Iterable[p.Effect]) -> None:
        for effect in effects:
            match effect:
                case p.Begin(partitions):
                    for number in partitions:
                        self.core.partitions[number].role = Role.LOADING
                    self.core.emit(e.Load(partitions))
                case p.End(partitions):
                    for number in partitions:
                        self._end(self.core.partitions[number])
                case e.Stop():
                    self._stopped = True
                    self.core.emit(effect)
                case _:
                    self.core.emit(effect)

    def _on_loaded(self, partitions: tuple[int, ...], marks: tuple[e.Mark, ...]) -> None:
        begun: list[int] = []
        for number in partitions:
            partition = self.core.partitions[number]
            if partition.role is Role.LEAVING:
                partition.role = Role.DRAINING  # nothing of it is in flight
                continue
            assert partition.role is Role.LOADING, (number, partition.role)
            partition.load(mark for mark in marks if mark.partition == number)
            begun.append(number)
            for worker, track in partition.tracks.items():
                self.core.lives[worker] = max(self.core.lives.get(worker, 0), track.life)
        if begun:
            self.core.emit(e.Reconcile(tuple(begun)))

    def _end(self, partition: Partition) -> None:
        """Take nothing new for a partition, and send away who waits for something that is not under way."""
        core, number = self.core, partition.number
        partition.role = Role.LEAVING if partition.role is Role.LOADING else Role.DRAINING
        for push in [push for push in core.pending.pushes.values() if number in push.left]:
            core.take(push, number)
        for waiter in list(core.pending.waiters.values()):
            if number in waiter.left and waiter.number > partition.track(waiter.worker).applied:
                core.pending.drop_waiter(waiter)
                core.emit(e.Answer(waiter.ask, w.NotPrimary(core.serving())))
        self._pulls.send_away(number)

    def _unload_drained(self) -> None:
        """Let go of partitions of which nothing is in flight any more."""
        drained = tuple(
            partition.number
            for partition in self.core.partitions
            if partition.role is Role.DRAINING and not self._groups.is_in_flight(partition.number)
        )
        if drained:
            for number in drained:
                self.core.partitions[number].unload()
            self.core.emit(e.Unload(drained))
            self._follow(self.core.primaries.drained(drained, self.core.now_ms))
