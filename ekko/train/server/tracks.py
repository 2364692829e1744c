"""How far each worker has come in one partition, and for whom the others wait."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from ekko.train.server.events import Mark
from ekko.train.server.wire import ASYNC, SYNC, ModelSettings


class Role(Enum):
    """What we are to a partition."""

    AWAY = auto()  # somebody else acts for it, or nobody does
    LOADING = auto()
    LEAVING = auto()  # loading, and not wanted any more
    ACTING = auto()
    DRAINING = auto()  # nothing new is taken; what is in flight is finished


@dataclass(slots=True)
class Track:
    """One worker in one partition. Numbers of pushes: settled <= durable <= applied <= accepted."""

    life: int = 0
    accepted: int = 0  # the last one that was taken in; the next one has to be its successor
    applied: int = 0  # in a step that was begun
    durable: int = 0  # at all holders
    settled: int = 0  # and at those who serve: it may be answered
    stamps: dict[int, int] = field(default_factory=dict)  # of pushes that are applied and not settled

    def forget_stamps(self) -> None:
        """Of what is settled, and therefore answered."""
        self.stamps = {number: stamp for number, stamp in self.stamps.items() if number > self.settled}


@dataclass(slots=True)
class Partition:
    """One partition of the model, as far as we act for it."""

    number: int
    settings: ModelSettings
    role: Role = Role.AWAY
    tracks: dict[int, Track] = field(default_factory=dict)  # by worker
    dropped: set[int] = field(default_factory=set)  # workers that nobody waits for until they say hello
    waiting_ms: int | None = None  # since when somebody has waited for another worker here
    _clock: int | None = None  # as it was computed last, which takes a look at every worker; None: something has changed

    def load(self, marks: Iterable[Mark]) -> None:
        """Begin with what is stored, all of which is durable."""
        self.role, self.waiting_ms, self._clock = Role.ACTING, None, None
        self.tracks = {m.worker: Track(m.life, m.number, m.number, m.number, m.number) for m in marks}
        self.dropped = set()
        if self.settings.mode == SYNC:
            # There the marks of all workers move together: whose lags was dropped by who acted before us.
            furthest = max((track.durable for track in self.tracks.values()), default=0)
            self.dropped = {worker for worker in range(self.settings.workers) if self.durable_of(worker) < furthest}

    def unload(self) -> None:
        """Forget all of it."""
        self.role, self.waiting_ms, self._clock = Role.AWAY, None, None
        self.tracks, self.dropped = {}, set()

    def track(self, worker: int) -> Track:
        """Of a worker, from now on."""
        return self.tracks.setdefault(worker, Track())

    def life_of(self, worker: int) -> int:
        """Life of a worker as it is recorded, or about to be."""
        return self.tracks[worker].life if worker in self.tracks else 0

    def durable_of(self, worker: int) -> int:
        """Number of the last push of a worker that is durable."""
        return self.tracks[worker].durable if worker in self.tracks else 0

    def is_under_way(self, worker: int) -> bool:
        """Whether a push of a worker was taken that is not durable."""
        track = self.tracks.get(worker)
        return track is not None and track.durable < track.accepted

    def counted(self) -> Iterator[int]:
        """Workers for whom the others wait, ascending."""
        if self.settings.mode == ASYNC:
            return iter(())
        return (worker for worker in range(self.settings.workers) if worker not in self.dropped)

    def clock(self) -> int:
        """The smallest clock of all workers that are waited for; in mode "async" of all that ever pushed."""
        if self._clock is None:
            workers = iter(self.tracks) if self.settings.mode == ASYNC else self.counted()
            furthest = max(map(self.durable_of, self.tracks), default=0)
            self._clock = min(map(self.durable_of, workers), default=furthest)
        return self._clock

    def note_clocks(self) -> None:
        """Something of a worker became durable, or whether it is waited for has changed."""
        self._clock = None

    def may_pull(self, clock: int) -> bool:
        """Whether all workers that are waited for have come far enough for one whose last push was `clock`."""
        return self.clock() >= clock - self.settings.staleness or not self.behind(clock)

    def behind(self, clock: int) -> set[int]:
        """Workers for whom a pull of one whose last push was `clock` waits."""
        return {worker for worker in self.counted() if self.durable_of(worker) < clock - self.settings.staleness}

    def rejoins_at(self, worker: int) -> int:
        """The number from which a worker goes on that had been dropped: where the others are."""
        others = [self.durable_of(other) for other in self.counted() if other != worker]
        return max(self.durable_of(worker), min(others, default=0))
