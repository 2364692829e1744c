"""Workers of the simulated servers: they pull, push, repeat what is not answered, die, and come back as others."""

from dataclasses import dataclass, field

from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.primaries import line_of
from tests.ekko.server.server_world import World

RETRY_MS = 250
STEP_MS = 20
OUTSTANDING_MAX = 3


@dataclass
class Ledger:
    """What workers were told, for the end of a run."""

    last: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)  # (worker, life) -> where it began, by partition
    acknowledged: set[tuple[int, int, int, int]] = field(default_factory=set)  # worker, life, number, partition
    sent: int = 0


class Worker:
    """One life of one worker: a loop of pull and push, as `wire` says."""

    def __init__(self, world: World, ledger: Ledger, worker: int, life: int) -> None:
        self.world, self.ledger = world, ledger
        self.worker, self.life = worker, life
        self.alive = True
        self.ended = False  # replaced, or dropped
        names = sorted(world.endpoints)
        self.believed = [line_of("ctr", partition, names)[0] for partition in range(world.options.partitions)]
        self.last: dict[int, int] = {}
        self.number = 0
        self.open: dict[int, set[int]] = {}  # pushes without an answer: partitions
        self.pulling: set[int] = set()
        self.pulled = 0  # number of the last push after which a pull was answered
        self.busy_ms = 0

    @property
    def target(self) -> int:
        return self.world.options.target

    @property
    def is_done(self) -> bool:
        return bool(self.last) and len(self.last) == len(self.believed) and self.number >= self.target and not self.open

    def start(self) -> None:
        self.world.note(f"worker {self.worker} begins life {self.life}")
        self.loop()

    def loop(self) -> None:
        """Ask for whatever is not answered; all of it again after a while."""
        if not self.alive or self.ended:
            return
        if len(self.last) < len(self.believed):
            self.hello()
        elif self.is_async or self.pulled >= self.number:
            self.push_next()
            self.push_open()
        else:
            self.push_open()
            self.pull()
        self.world.after(self.world.rng.randint(RETRY_MS // 2, RETRY_MS), self.loop)

    @property
    def is_async(self) -> bool:
        return self.world.options.mode == w.ASYNC

    def on_answer(self, answer: w.Answer) -> bool:
        """What all answers have in common. Returns whether it was a good one."""
        if not self.alive or self.ended:
            return False
        match answer:
            case w.NotPrimary(serving):
                self.learn(serving)
            case w.Failed(w.HELLO):
                self.last = {}
            case w.Failed(w.STALE | w.DROPPED):
                self.ended = True
            case w.Failed(w.BUSY | w.GAP):
                pass
            case w.Failed(kind, reason):
                raise AssertionError(f"worker {self.worker} was refused: {kind}: {reason}")
            case _:
                return True
        return False

    def learn(self, serving: w.Serving) -> None:
        names = [node for node, _ in serving.servers]
        self.believed = [names[place] for place in serving.primaries]

    def ask_anybody(self) -> None:
        """Nobody answered: another server may know better."""
        if self.world.rng.random() < 0.3:
            process = self.world.processes.get(self.world.rng.choice(sorted(self.world.endpoints)))
            if process is not None and process.alive:
                self.learn(process.machine.serving())

    # --- hello ---------------------------------------------------------------------------------------------------------------

    def hello(self) -> None:
        self.ask_anybody()
        for node in dict.fromkeys(self.believed):
            self.world.send(node, lambda ask: e.HelloAsked(ask, self.worker, self.life), self.on_welcome)

    def on_welcome(self, answer: w.Answer) -> None:
        if not self.on_answer(answer) or not isinstance(answer, w.Welcome) or len(self.last) == len(self.believed):
            return
        self.learn(answer.serving)
        self.last |= {partition: last for partition, last in enumerate(answer.last) if last >= 0}
        began = self.ledger.last.setdefault((self.worker, self.life), {})
        for partition, last in self.last.items():
            began.setdefault(partition, last)
        if len(self.last) == len(self.believed) and not self.number:
            self.number = self.pulled = min(self.last.values())

    # --- pulls ---------------------------------------------------------------------------------------------------------------

    def pull(self) -> None:
        self.ask_anybody()
        self.pulling = self.pulling or set(range(len(self.believed)))
        wanted, clock = sorted(self.pulling), self.number
        for node in dict.fromkeys(self.believed[partition] for partition in wanted):
            parts = tuple(partition for partition in wanted if self.believed[partition] == node)

            def on_pulled(answer: w.Answer, parts: tuple[int, ...] = parts) -> None:
                if self.on_answer(answer) and isinstance(answer, w.Pulled) and clock == self.number:
                    self.pulling -= set(parts)
                    if not self.pulling and self.pulled < clock:
                        self.pulled = clock
                        self.world.after(STEP_MS, self.next_step)

            self.world.send(
                node,
                lambda ask, parts=parts: e.PullAsked(ask, self.worker, self.life, clock, parts, 1_000),  # type: ignore[misc]
                on_pulled,
            )

    def next_step(self) -> None:
        if self.alive and not self.ended and len(self.last) == len(self.believed):
            self.push_next()
            self.push_open()

    # --- pushes --------------------------------------------------------------------------------------------------------------

    def push_next(self) -> None:
        may = len(self.open) < OUTSTANDING_MAX and (self.is_async or self.pulled >= self.number)
        if may and self.number < self.target:
            self.number += 1
            began = self.ledger.last[self.worker, self.life]
            self.open[self.number] = {p for p in range(len(self.believed)) if self.number > began[p]}
            if not self.open[self.number]:
                del self.open[self.number]  # all of it counts already, from a former life
            if not self.is_async:
                self.pulling = set()

    def push_open(self) -> None:
        if self.open:
            self.ask_anybody()
        for number in sorted(self.open):
            for node in dict.fromkeys(self.believed[partition] for partition in sorted(self.open[number])):
                parts = tuple(sorted(p for p in self.open[number] if self.believed[p] == node))
                if not parts:
                    continue

                def on_pushed(answer: w.Answer, number: int = number, parts: tuple[int, ...] = parts) -> None:
                    if self.on_answer(answer) and isinstance(answer, w.Pushed):
                        assert answer.number == number
                        self.ledger.acknowledged |= {(self.worker, self.life, number, p) for p in parts}
                        left = self.open.get(number)
                        if left is not None:
                            left -= set(parts)
                            if not left:
                                del self.open[number]
                                self.loop_soon()

                self.ledger.sent += 1
                self.world.send(
                    node,
                    lambda ask, n=number, parts=parts: e.PushAsked(ask, self.worker, self.life, n, parts, 1_000),  # type: ignore[misc]
                    on_pushed,
                )

    def loop_soon(self) -> None:
        if self.is_async:
            self.world.after(STEP_MS, self.next_step)
        elif not self.open and len(self.last) == len(self.believed) and self.pulled < self.number:
            self.pull()
