"""What the parts of a server's machine share: settings, partitions, what waits, and what is to be done."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.pending import Pending, Push, Waiter
from ekko.train.server.primaries import Primaries
from ekko.train.server.tracks import Partition, Role


@dataclass(slots=True)
class Group:
    """Pushes and hellos that become one step."""

    number: int
    steps: tuple[e.Step, ...] = ()
    marks: tuple[e.Mark, ...] = ()
    hellos: dict[int, int] = field(default_factory=dict)  # worker -> ask
    applied: bool = False  # then the columns of its pushes are not needed any more

    def touches(self, partition: int) -> bool:
        """Whether the step has rows of a partition, marks included."""
        return any(mark.partition == partition for mark in self.marks)


class Core:
    """State of one model on one server. Arguments as of `Machine`."""

    def __init__(
        self, own: w.ServerLife, model: str, settings: w.ModelSettings, endpoints: Mapping[str, str], worker_timeout_ms: int
    ) -> None:
        self.settings = settings
        self.worker_timeout_ms = worker_timeout_ms
        self.primaries = Primaries(own, model, settings.partitions, sorted(endpoints))
        self.partitions = [Partition(number, settings) for number in range(settings.partitions)]
        self.pending = Pending()
        self.lives: dict[int, int] = {}  # of workers: the latest that is known
        self.seen_ms: dict[int, int] = {}  # when something of this life came last
        self.hellos: dict[int, int] = {}  # worker -> ask
        self.group: Group | None = None  # being applied, or on its way to the other holders
        self.clocks_moved = False  # so that pulls that wait are looked at again
        self.now_ms = 0
        self.out: list[e.Effect] = []
        self._servers = tuple(sorted(endpoints.items()))

    def emit(self, *effects: e.Effect) -> None:
        """These are to be carried out, after those before."""
        self.out += effects

    def fail(self, ask: int, kind: str, reason: str) -> None:
        """Refuse a request."""
        self.emit(e.Answer(ask, w.Failed(kind, reason)))

    def serving(self) -> w.Serving:
        """Who serves what, as far as we know."""
        places = {node: place for place, (node, _) in enumerate(self._servers)}
        return w.Serving(self._servers, tuple(places[node] for node in self.primaries.believed()))

    def acting(self) -> list[Partition]:
        """Partitions for which something may be begun."""
        return [partition for partition in self.partitions if partition.role is Role.ACTING]

    def refuses(self, ask: int, partitions: Iterable[int]) -> bool:
        """Whether a request touches what we do not act for; it is answered then."""
        if (most := max(partitions)) >= len(self.partitions):
            self.fail(ask, w.SETTINGS, f"partition {most}: the model has {len(self.partitions)}, numbered from 0")
            return True
        roles = {self.partitions[number].role for number in partitions}
        if roles <= {Role.ACTING}:
            return False
        if roles <= {Role.ACTING, Role.LOADING}:
            self.fail(ask, w.BUSY, "this server is about to take over: ask again in a moment")
        else:
            self.emit(e.Answer(ask, w.NotPrimary(self.serving())))
        return True

    def is_stranger(self, ask: int, worker: int, life: int) -> bool:
        """Whether a request is not of the latest life of a worker; it is answered then."""
        known = self.lives.get(worker, 0)
        if self.settings.workers and worker >= self.settings.workers:
            self.fail(ask, w.SETTINGS, f"worker {worker}: there are {self.settings.workers}, numbered from 0")
        elif life < known:
            self.fail_stale(ask, worker)
        elif life > known or not known:  # lives begin with 1
            self.fail(ask, w.HELLO, f"worker {worker} has not said hello to this server")
        else:
            self.seen_ms[worker] = self.now_ms
            return False
        return True

    def is_dropped(self, ask: int, worker: int, parts: Iterable[Partition]) -> bool:
        """Whether others went on without this life of a worker; it is answered then."""
        if not any(worker in part.dropped and part.life_of(worker) == self.lives[worker] for part in parts):
            return False
        reason = f"worker {worker} was silent for too long, and the others went on without it: begin it anew"
        self.fail(ask, w.DROPPED, f"{reason}; what it pushed and has no answer to may be lost")
        return True

    def fail_stale(self, ask: int, worker: int) -> None:
        """Refuse somebody whose place another one has taken."""
        reason = f"worker {worker} has begun a later life, so that this process is replaced, and ends: {self.lives[worker]}"
        self.fail(ask, w.STALE, reason)

    # --- pushes that wait ---------------------------------------------------------------------------------------------------

    def take(self, push: Push, partition: int) -> None:
        """The part of a push in this partition does not wait any more: it is in a step, or nobody wants it."""
        push.left.discard(partition)
        group = self.group
        needed = group is not None and not group.applied and any(push.ask in step.asks for step in group.steps)
        if not push.left and not needed:
            self.forget(push.ask)

    def forget(self, ask: int) -> None:
        """The columns of a push are not needed any more."""
        self.pending.drop_push(ask)
        self.emit(e.Discard(ask))

    def answer_if_settled(self, waiter: Waiter) -> None:
        """Tell who waits that his push counts, once it does in all partitions."""
        for number in sorted(waiter.left):
            track = self.partitions[number].track(waiter.worker)
            if track.settled >= waiter.number:
                waiter.left.discard(number)
                waiter.stamp = max(waiter.stamp, track.stamps.get(waiter.number, 0))
        if not waiter.left:
            self.pending.drop_waiter(waiter)
            self.emit(e.Answer(waiter.ask, w.Pushed(waiter.number, waiter.stamp)))
