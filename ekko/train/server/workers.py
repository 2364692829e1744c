"""Workers: their lives, how they are welcomed, and who is not waited for any more.

A hello is recorded like a push, in the same rows, and answered when that is durable. Otherwise a server that takes over would
know the former life only, and a push of it that was late on its way could take the place of one of the later life.
"""

from itertools import chain

from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.core import Core
from ekko.train.server.tracks import Partition, Role
from ekko.train.server.wire import SYNC


class Workers:
    """The part of the machine that knows who is there."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def on_hello(self, asked: e.HelloAsked) -> None:
        """A worker begins a life, or shows that it lives. Answered when the group that comes next is durable."""
        core, worker = self._core, asked.worker
        if core.lives.get(worker, 0) < asked.life and not (core.settings.workers and worker >= core.settings.workers):
            self._begin_life(worker, asked.life)
        if core.is_stranger(asked.ask, worker, asked.life) or core.is_dropped(asked.ask, worker, core.acting()):
            return
        if worker in core.hellos:
            core.fail(core.hellos[worker], w.BUSY, "asked again")
        core.hellos[worker] = asked.ask

    def _begin_life(self, worker: int, life: int) -> None:
        """What waits of former lives is dropped; what is under way is finished."""
        core = self._core
        core.lives[worker] = life
        for push in [push for push in core.pending.pushes.values() if push.worker == worker]:
            for number in sorted(push.left):
                track = core.partitions[number].track(worker)
                track.accepted = track.applied
                core.take(push, number)
        for waiter in core.pending.waiters_of(worker):
            core.pending.drop_waiter(waiter)
            core.fail_stale(waiter.ask, worker)
        for ask in [pull.ask for pull in core.pending.pulls.values() if pull.worker == worker]:
            core.pending.drop_pull(ask)
            core.fail_stale(ask, worker)
        if worker in core.hellos:
            core.fail_stale(core.hellos.pop(worker), worker)

    def marks_of(self, worker: int) -> list[e.Mark]:
        """What has to be durable before a worker is welcome: its life, and where it goes on if it had been dropped."""
        marks: list[e.Mark] = []
        for partition in self._core.acting():
            track, life = partition.track(worker), self._core.lives[worker]
            dropped = worker in partition.dropped
            if track.life == life:
                continue
            number = partition.rejoins_at(worker) if dropped else track.durable
            partition.dropped.discard(worker)
            partition.note_clocks()
            track.life, track.accepted, track.applied = life, number, number
            marks.append(e.Mark(partition.number, worker, life, number))
        return marks

    def welcome(self, worker: int, ask: int) -> None:
        """Everything of a worker that is not durable has been dropped, or never was taken."""
        core = self._core
        last = (part.durable_of(worker) if part.role is Role.ACTING else -1 for part in core.partitions)
        core.emit(e.Answer(ask, w.Welcome(core.settings, core.serving(), tuple(last))))

    # --- silence ------------------------------------------------------------------------------------------------------------

    def note_waiting(self) -> None:
        """Notice where somebody waits for another worker, and where nobody does any more."""
        if not self._core.worker_timeout_ms:
            return
        pending, acting = self._core.pending, self._core.acting()
        waited: set[int] = set()
        for numbers in chain((pull.partitions for pull in pending.pulls.values()), (p.left for p in pending.pushes.values())):
            waited.update(numbers)
            if len(waited) >= len(acting):
                break  # most requests are for all partitions
        for partition in acting:
            if partition.number not in waited:
                partition.waiting_ms = None
            elif partition.waiting_ms is None:
                partition.waiting_ms = self._core.now_ms

    def next_ms(self) -> int | None:
        """When the next one has been silent for too long, or somewhat earlier."""
        moments: list[int] = []
        for partition in self._core.acting():
            if partition.waiting_ms is not None:
                first = partition.waiting_ms + self._core.worker_timeout_ms
                # Until then it is nobody's turn, and to look at every worker would take longer than all the rest of an event.
                moments += [first] if first > self._core.now_ms else self._limits(partition).values()
        return min(moments, default=None)

    def _limits(self, partition: Partition) -> dict[int, int]:
        """When who is waited for, and has nothing here, is not waited for any more: worker -> ms."""
        if partition.waiting_ms is None:
            return {}
        core, number = self._core, partition.number
        here = {push.worker for push in core.pending.pushes.values() if number in push.left}
        here |= {pull.worker for pull in core.pending.pulls.values() if number in pull.partitions} | core.hellos.keys()
        here |= {worker for worker in partition.tracks if partition.is_under_way(worker)}
        since = {worker: max(core.seen_ms.get(worker, 0), partition.waiting_ms) for worker in partition.counted()}
        return {worker: ms + core.worker_timeout_ms for worker, ms in since.items() if worker not in here}

    def late(self) -> set[int]:
        """Workers that somebody waits for now: a pull for their clock, or in mode "sync" a push for theirs."""
        late: set[int] = set()
        pending, in_step = self._core.pending, self._core.settings.mode == SYNC
        for partition in self._core.acting():
            number = partition.number
            clocks = [pull.clock for pull in pending.pulls.values() if number in pull.partitions]
            waited_for = partition.behind(max(clocks, default=0))
            waiting = {push.worker for push in pending.pushes.values() if number in push.left}
            if in_step and waiting:
                waited_for |= set(partition.counted()) - waiting
            late |= {worker for worker in waited_for if not partition.is_under_way(worker)}
        return late

    def drop_silent(self) -> None:
        """Go on without who has been silent for too long."""
        dropped: dict[int, list[int]] = {}
        for partition in self._core.acting():
            for worker, limit in self._limits(partition).items():
                if self._core.now_ms >= limit:
                    partition.dropped.add(worker)
                    partition.note_clocks()
                    self._core.clocks_moved = True
                    dropped.setdefault(worker, []).append(partition.number)
        for worker, partitions in dropped.items():
            self._core.emit(e.WorkerDropped(worker, tuple(partitions)))
