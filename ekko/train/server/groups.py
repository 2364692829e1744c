r"""Groups: what waits becomes one step, goes to all holders, is served, and then answered.

    pushes wait -> Apply -> AwaitDurable -> Serve -> Pushed
                                     \__ the next group begins

One group at a time until it is durable, because two steps need not arrive at another holder in their order: a mark of the
later one could say there that a push of the earlier one counts, whose rows are lost with us. What that costs, the time until
all holders have a step, a group shares among all that wait. Where all who wait have several pushes under way at a time, as far
as is known, it waits for the others of them for a moment; who waits for each answer is not kept waiting.
"""

from typing import Final

from ekko.train.server import events as e
from ekko.train.server.core import Core, Group
from ekko.train.server.pending import Push
from ekko.train.server.tracks import Partition
from ekko.train.server.wire import ASYNC, SYNC
from ekko.train.server.workers import Workers

# Of one partition in one group: with its head below what the overlay sends as one message (4 MiB), so that a holder has of a
# step all rows in a partition or none. A single push that is larger is a group of its own; a round of mode "sync" is one group,
# whatever it takes, its gradients added up.
GROUP_BYTES_MAX: Final = 3 << 20
# Groups that are durable and not served yet; beyond it no further one is begun.
UNSERVED_MAX: Final = 64

# A worker that lately had several pushes under way waits for none of them: its next ones may share a group with what waits, for
# which that waits at most so long. A group costs all processes together some 2 ms, whatever is in it.
LINGER_MS: Final = 2

Taken = dict[int, list[Push]]  # by partition, in the order in which they count


class Groups:
    """The part of the machine that turns what waits into steps."""

    def __init__(self, core: Core, workers: Workers) -> None:
        self._core = core
        self._workers = workers
        self._unserved: list[Group] = []
        self._serving: list[Group] = []
        self._numbers = 0
        self._under_way: dict[int, int] = {}  # worker -> how many pushes it had without an answer, the most lately
        self._lingers_until_ms: int | None = None

    def next_ms(self) -> int | None:
        """When the pushes that wait for others have waited for long enough."""
        return self._lingers_until_ms

    def is_in_flight(self, partition: int) -> bool:
        """Whether something of a partition is under way."""
        groups = [*self._serving, *self._unserved]
        groups += [self._core.group] if self._core.group else []
        return any(group.touches(partition) for group in groups)

    # --- making one ---------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the next group, if there is something to do and none is under way."""
        core = self._core
        if core.group is not None or len(self._unserved) >= UNSERVED_MAX:
            self._lingers_until_ms = None
            return
        if not core.hellos and self._lingers():
            return
        marks: dict[tuple[int, int], e.Mark] = {}
        hellos: dict[int, int] = {}
        for worker, ask in core.hellos.items():
            if own := self._workers.marks_of(worker):
                hellos[worker] = ask
                marks |= {(mark.partition, worker): mark for mark in own}
            else:
                self._workers.welcome(worker, ask)
        core.hellos = {}
        taken = self._take_rounds() if core.settings.mode == SYNC else self._take_queue()
        for number, pushes in taken.items():
            for push in pushes:
                core.partitions[number].track(push.worker).applied = push.number
                marks[number, push.worker] = e.Mark(number, push.worker, push.life, push.number)
        if not marks:
            return
        self._numbers += 1
        group = Group(self._numbers, self._steps_of(taken), tuple(marks[place] for place in sorted(marks)), hellos)
        core.group = group
        for number, pushes in taken.items():
            for push in pushes:
                core.take(push, number)
        core.emit(e.Apply(group.number, group.steps, group.marks))

    def _lingers(self) -> bool:
        """Whether more is about to come, for which what waits may wait."""
        pending, self._lingers_until_ms = self._core.pending, None
        if self._core.settings.mode != ASYNC or not pending.pushes:
            return False
        lately = self._under_way
        now = {worker: len(pending.waiters_of(worker)) for worker in {push.worker for push in pending.pushes.values()}}
        until_ms = next(iter(pending.pushes.values())).since_ms + LINGER_MS
        if self._core.now_ms >= until_ms:
            lately |= now  # it was waited for more in vain
            return False
        lately |= {worker: max(lately.get(worker, 0), count) for worker, count in now.items()}
        if min(lately[worker] for worker in now) == 1 or all(count == lately[worker] for worker, count in now.items()):
            return False
        self._lingers_until_ms = until_ms
        return True

    def _take_queue(self) -> Taken:
        """Modes "async" and "bounded": all that waits, in the order in which it came, while there is room."""
        taken: Taken = {}
        size: dict[int, int] = {}
        for push in self._core.pending.pushes.values():
            share = push.bytes // push.shares
            if any(size.get(number, 0) + share > GROUP_BYTES_MAX and number in taken for number in push.left):
                break  # nothing overtakes it: its worker's next one must not be before it
            for number in sorted(push.left):
                taken.setdefault(number, []).append(push)
                size[number] = size.get(number, 0) + share
        return taken

    def _take_rounds(self) -> Taken:
        """Mode "sync": in each partition the next push of all workers, if all are there."""
        taken: Taken = {}
        for partition in self._core.acting():
            if pushes := self._round_of(partition):
                taken[partition.number] = pushes
        return taken

    def _round_of(self, partition: Partition) -> list[Push]:
        """The next push of each worker that is waited for, in the order of workers; empty: some are not there."""
        queued = {
            (push.worker, push.number): push for push in self._core.pending.pushes.values() if partition.number in push.left
        }
        wanted = [(worker, partition.track(worker).applied + 1) for worker in partition.counted()]
        return [queued[one] for one in wanted] if all(one in queued for one in wanted) else []

    def _steps_of(self, taken: Taken) -> tuple[e.Step, ...]:
        """Partitions with the same pushes are one step, so that nothing has to be divided for it."""
        same: dict[tuple[int, ...], list[int]] = {}
        for number in sorted(taken):
            same.setdefault(tuple(push.ask for push in taken[number]), []).append(number)
        summed = self._core.settings.mode == SYNC
        return tuple(e.Step(tuple(numbers), asks, summed) for asks, numbers in same.items())

    # --- its way ------------------------------------------------------------------------------------------------------------

    def on_applied(self, number: int, stamp: int) -> None:
        """It is in our node's memory: what the pushes brought is not needed any more."""
        core, group = self._core, self._core.group
        assert group is not None, f"group {number} is not under way"
        assert group.number == number, f"group {number} is not under way, {group.number} is"
        group.applied = True
        for mark in group.marks:
            core.partitions[mark.partition].track(mark.worker).stamps[mark.number] = stamp
        for ask in dict.fromkeys(ask for step in group.steps for ask in step.asks):
            if not core.pending.pushes[ask].left:
                core.forget(ask)
        core.emit(e.AwaitDurable(number, stamp))

    def on_durable(self, number: int) -> None:
        """All holders have it: it cannot be lost any more."""
        core, group = self._core, self._core.group
        assert group is not None, f"group {number} is not under way"
        assert group.number == number, f"group {number} is not under way, {group.number} is"
        core.group = None
        for mark in group.marks:
            track = core.partitions[mark.partition].track(mark.worker)
            track.durable = max(track.durable, mark.number)
            core.partitions[mark.partition].note_clocks()
        core.clocks_moved = True
        for worker, ask in group.hellos.items():
            self._workers.welcome(worker, ask)
        self._unserved.append(group)
        self._serve()

    def on_served(self, number: int) -> None:
        """Those who serve have it: whoever waits is answered."""
        assert self._serving, f"group {number} is not being served"
        assert self._serving[-1].number == number, f"group {number} is not being served"
        settled, self._serving = self._serving, []
        self._settle(settled)
        self._serve()

    def _serve(self) -> None:
        """Everything that is durable and not served becomes one step of the served model."""
        if self._serving or not self._unserved:
            return
        self._serving, self._unserved = self._unserved, []
        if any(group.steps for group in self._serving):
            self._core.emit(e.Serve(self._serving[-1].number))
        else:
            settled, self._serving = self._serving, []
            self._settle(settled)

    def _settle(self, groups: list[Group]) -> None:
        core = self._core
        for group in groups:
            for mark in group.marks:
                track = core.partitions[mark.partition].track(mark.worker)
                track.settled = max(track.settled, mark.number)
        for worker in dict.fromkeys(mark.worker for group in groups for mark in group.marks):
            for waiter in core.pending.waiters_of(worker):
                core.answer_if_settled(waiter)
        for group in groups:
            for mark in group.marks:
                core.partitions[mark.partition].track(mark.worker).forget_stamps()
