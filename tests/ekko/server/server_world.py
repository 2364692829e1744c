"""Servers in virtual time: the real machines, a shell that does what they decide on a model of the overlay, and faults.

One seed gives one run. While it runs it is checked that no two servers act for a partition, that each question is answered
once, that each round of mode "sync" has one push of each worker, in their order, and that no pull is answered before the clocks
that it waits for are durable. Afterwards, when all is well, that every worker comes to its end, that all nodes hold the same,
that no push is in any row twice or in some of its rows only, that every push that was answered is there, and that what is
served is what was learned.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.machine import Machine
from tests.ekko.server.server_overlay import Cell, Life, Node, Overlay, Place, Record

POLL_MS = 15
FAULTS_MS = 5_000
END_MS = 60_000

Push = tuple[int, int, int]  # worker, life, number


@dataclass(frozen=True)
class Options:
    """What a run is about."""

    mode: str = w.ASYNC
    servers: int = 2
    workers: int = 2
    partitions: int = 2
    staleness: int = 0
    target: int = 14  # pushes of each worker; and so many more after the last fault
    worker_timeout_ms: int = 0
    keys: int = 5
    slow: float = 0.0  # share of a shell's jobs that take long
    expulsions: float = 0.15  # share among faults


def keys_of(push: Push, partition: int, count: int) -> list[int]:
    """Which rows of a partition a push touches; those of one number and worker differ by life."""
    rng = random.Random(f"{push}/{partition}")
    return sorted(rng.sample(range(count), rng.choice((0, 1, 2, 3))))


@dataclass
class Process:
    """A server process: the machine, and what its shell has in hand."""

    machine: Machine
    node: Node
    life: w.ServerLife
    alive: bool = True
    asks: dict[int, Callable[[w.Answer], None]] = field(default_factory=dict)  # open: where the answer goes
    pulls: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    columns: dict[int, Push] = field(default_factory=dict)
    pushes: dict[int, tuple[Push, tuple[int, ...]]] = field(default_factory=dict)
    group: dict[int, dict[Place, int]] = field(default_factory=dict)  # what was published, and its stamp
    unserved: set[Place] = field(default_factory=set)
    reconciling: set[int] = field(default_factory=set)
    timer_ms: int | None = None


class World:
    """Everything that happens in one run."""

    def __init__(self, seed: int, options: Options, make: type[Machine] = Machine) -> None:
        self.rng = random.Random(seed)
        self.options, self.make = options, make
        names = [f"train-{number}" for number in range(options.servers)]
        self.overlay = Overlay(names, options.partitions, self.rng)
        self.settings = w.ModelSettings(
            options.partitions,
            64,
            options.mode,
            0 if options.mode == w.ASYNC else options.workers,
            options.staleness,
            {"item": 1},
            1,
        )
        self.endpoints = {name: f"tcp://{name}" for name in names}
        self.processes: dict[str, Process] = {}
        self.now_ms = 1
        self.asks = 0
        self.log: list[str] = []
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._submitted = 0
        self.faulty = True
        self.acts = 0

    # --- time ----------------------------------------------------------------------------------------------------------------

    def after(self, delay_ms: int, what: Callable[[], None]) -> None:
        self._submitted += 1
        heapq.heappush(self._queue, (self.now_ms + delay_ms, self._submitted, what))

    def run_until(self, end_ms: int, done: Callable[[], bool] = lambda: False) -> None:
        while self._queue and self._queue[0][0] <= end_ms and not done():
            self.now_ms, _, what = heapq.heappop(self._queue)
            what()
        self.now_ms = max(self.now_ms, end_ms) if not done() else self.now_ms

    def note(self, text: str) -> None:
        self.log.append(f"{self.now_ms:6d} {text}")

    def little(self) -> int:
        """A delay: short most of the time."""
        return self.rng.randint(1, 400) if self.faulty and self.rng.random() < 0.05 else self.rng.randint(1, 12)

    # --- the network ---------------------------------------------------------------------------------------------------------

    def send(self, receiver: str, make_event: Callable[[int], e.Event], reply: Callable[[w.Answer], None]) -> None:
        """A question to a server: it may be lost, late, or come twice; so may its answer."""
        for _ in range(2 if self.faulty and self.rng.random() < 0.05 else 1):
            if not (self.faulty and self.rng.random() < 0.05):
                self.after(self.little(), lambda: self._arrive(receiver, make_event, reply))

    def _arrive(self, receiver: str, make_event: Callable[[int], e.Event], reply: Callable[[w.Answer], None]) -> None:
        process = self.processes.get(receiver)
        if process is None or not process.alive:
            return
        self.asks += 1
        ask, event = self.asks, make_event(self.asks)
        process.asks[ask] = reply
        match event:
            case e.PushAsked(_, worker, life, number, partitions):
                process.columns[ask] = worker, life, number
                process.pushes[ask] = (worker, life, number), partitions
            case e.PullAsked(_, _, _, clock, partitions):
                process.pulls[ask] = clock, partitions
        self.feed(process, event)

    def _answer(self, process: Process, ask: int, answer: w.Answer) -> None:
        reply = process.asks.pop(ask)  # every question is answered once, or this fails
        if not (self.faulty and self.rng.random() < 0.05):
            self.after(self.little(), lambda: reply(answer))

    # --- a server's shell ----------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        node = self.overlay.nodes[name]
        if not node.up or (name in self.processes and self.processes[name].alive):
            return
        life = w.ServerLife(name, node.boot, node.boot, self.rng.getrandbits(60))
        machine = self.make(life, "ctr", self.settings, self.endpoints, self.options.worker_timeout_ms)
        process = self.processes[name] = Process(machine, node, life)
        self.note(f"{name} starts as {node.boot}")
        self.undo(node)
        self.feed(process, e.ViewChanged(tuple(node.lives.values())))

    def feed(self, process: Process, event: e.Event) -> None:
        if not process.alive:
            return
        effects = process.machine.handle(event, self.now_ms)
        if effects or not isinstance(event, e.TimerFired):
            self.note(f"{process.life.node} < {event}")
        for effect in effects:
            self.note(f"{process.life.node} > {effect}")
            self.perform(process, effect)
        self.check_actors()
        self._wind(process)

    def _wind(self, process: Process) -> None:
        """The timer, once for each moment."""
        wanted = process.machine.deadline_ms
        if wanted is not None and process.timer_ms != wanted:
            process.timer_ms = wanted

            def fire() -> None:
                if process.timer_ms == wanted:
                    process.timer_ms = None
                    self.feed(process, e.TimerFired())

            self.after(max(1, wanted - self.now_ms), fire)

    def perform(self, process: Process, effect: e.Effect) -> None:
        match effect:
            case e.Answer(ask, answer):
                process.pulls.pop(ask, None)
                if isinstance(answer, w.Pushed):
                    self._check_pushed(process, *process.pushes[ask])
                self._answer(process, ask, answer)
            case e.AnswerPull(ask, clock):
                self._answer_pull(process, ask, clock)
            case e.Discard(ask):
                del process.columns[ask]
            case e.Apply():
                self.later(process, lambda: self._apply(process, effect))
            case e.AwaitDurable(group, _):
                self._await_durable(process, group)
            case e.Serve(group):
                self._serve(process, group)
            case e.Load(partitions):
                self.later(process, lambda: self._load(process, partitions))
            case e.Reconcile(partitions):
                process.reconciling |= set(partitions)
                for place in sorted(self._rows(process.node, partitions), key=str):
                    self.after(self.little() * 5, lambda place=place: self._reconcile(process, place))  # type: ignore[misc]
            case e.Unload(partitions):
                process.reconciling -= set(partitions)
            case e.Flush(flush, partitions, node):
                self._flush(process, flush, partitions, node)
            case e.AskRelease(node, asker, partitions):
                self._ask_release(process, node, asker, partitions)
            case e.WorkerDropped():
                pass
            case e.Stop():
                process.alive = False
                self.after(self.little(), lambda: self.start_over(process.node))

    def later(self, process: Process, what: Callable[[], None]) -> None:
        slow = self.faulty and self.rng.random() < self.options.slow
        self.after(self.rng.randint(50, 500) if slow else self.little(), lambda: what() if process.alive else None)

    def _ask_release(self, process: Process, node: str, asker: w.ServerLife, partitions: tuple[int, ...]) -> None:
        def answered(answer: w.Answer) -> None:
            if isinstance(answer, w.Released):
                self.feed(process, e.ReleaseAnswered(answer.by, answer.asker, answer.partitions))

        self.send(node, lambda ask: e.ReleaseAsked(ask, asker, partitions), answered)

    def _answer_pull(self, process: Process, ask: int, clock: int) -> None:
        wanted, partitions = process.pulls.pop(ask)
        for number in partitions:
            dropped = process.machine.core.partitions[number].dropped
            for other in range(self.settings.workers):
                if other not in dropped:
                    durable = self.durable_number(process.node, number, other)
                    late = f"worker {other} has {durable} durable pushes in partition {number}"
                    assert durable >= wanted - self.options.staleness, f"a pull for clock {wanted} was answered while {late}"
        self._answer(process, ask, w.Pulled({}, clock))

    def _check_pushed(self, process: Process, push: Push, partitions: tuple[int, ...]) -> None:
        for number in partitions:
            durable = self.durable_number(process.node, number, push[0])
            assert durable >= push[2], f"{push} is acknowledged in partition {number}, where {durable} is durable"

    def durable_number(self, node: Node, partition: int, worker: int) -> int:
        """The last push of a worker in a partition that no holder can lose."""
        holders = [other for other in self.overlay.nodes.values() if other is node or other.life not in node.frozen]
        marks = [other.memory.get((partition, ("mark", worker))) for other in holders if not other.empty]
        return min((mark.value[1] if mark else 0 for mark in marks), default=0)  # type: ignore[index]

    def _apply(self, process: Process, effect: e.Apply) -> None:
        node, memory = process.node, process.node.memory
        self.acts += 1
        cells: dict[Place, object] = {}
        for step in effect.steps:
            for partition in step.partitions:
                self._check_round(process, partition, step)
                for ask in step.asks:
                    push = process.columns[ask]
                    for key in keys_of(push, partition, self.options.keys):
                        place = partition, key
                        known = cells.get(place, memory[place].value if place in memory else ())
                        cells[place] = (*known, push)  # type: ignore[misc]
        for mark in effect.marks:
            cells[mark.partition, ("mark", mark.worker)] = mark.life, mark.number
        for partition, _ in cells:
            self._check_acts(process, partition, "applies to")
        stamp = self.overlay.stamp(node, self.now_ms)
        before = {place: memory[place].value if place in memory else None for place in cells}
        self.remember(process, Record(node.memory_life, stamp, before))
        if self.faulty and self.rng.random() < 0.02:  # the node dies in the middle of it
            self.overlay.write(node, dict(self.rng.sample(sorted(cells.items(), key=str), len(cells) // 2)), stamp)
            self.note(f"{node.name} dies while it applies group {effect.group}")
            node.torn = True
            self.crash_node(node)
            return
        self.publish(node, cells, stamp)
        process.group[effect.group] = dict.fromkeys(cells, stamp)
        process.unserved |= {place for place in cells if not is_mark(place)}
        self.later(process, lambda: self.feed(process, e.Applied(effect.group, stamp)))

    def _check_acts(self, process: Process, partition: int, what: str) -> None:
        role = process.machine.roles[partition]
        assert role in ("acting", "draining"), f"{process.node.name} {what} partition {partition}, for which it is {role}"

    def remember(self, process: Process, record: Record | None) -> None:
        process.node.record = record

    def publish(self, node: Node, cells: dict[Place, object], stamp: int) -> None:
        """Locally at once, and to the other holders a part for each partition."""
        self.overlay.write(node, cells, stamp)
        origin = node.life
        for partition in sorted({place[0] for place in cells}):
            part = {place: Cell(stamp, value, origin) for place, value in cells.items() if place[0] == partition}
            for other in self.overlay.nodes.values():
                if other is not node and not (self.faulty and self.rng.random() < self.overlay.lost):
                    self.after(self.little(), lambda o=other, p=part: self.overlay.deliver(o, p, origin))  # type: ignore[misc]

    def _check_round(self, process: Process, partition: int, step: e.Step) -> None:
        assert step.summed == (self.options.mode == w.SYNC)
        if step.summed:
            pushes = [process.columns[ask] for ask in step.asks]
            expected = list(process.machine.core.partitions[partition].counted())
            assert [push[0] for push in pushes] == expected, f"a round of {pushes}, expected one push each of {expected}"
            assert len({push[2] for push in pushes}) == 1, f"a round of several numbers: {pushes}"

    def _await_durable(self, process: Process, group: int) -> None:
        def look() -> None:
            if self.overlay.lacking(process.node, process.group[group]):
                self.after(POLL_MS, lambda: look() if process.alive else None)
                return
            self.remember(process, None)
            del process.group[group]
            self.feed(process, e.Durable(group))

        self.later(process, look)

    def _serve(self, process: Process, group: int) -> None:
        places, process.unserved = process.unserved, set()

        def done() -> None:
            for partition, _ in places:
                self._check_acts(process, partition, "serves")
            self._publish_served(process.node, rows)
            self.feed(process, e.Served(group))

        for partition, _ in places:
            self._check_acts(process, partition, "serves")
        rows = {place: process.node.memory[place].value for place in places}
        self.later(process, done)

    def _publish_served(self, node: Node, rows: dict[Place, object]) -> None:
        stamp = self.overlay.stamp(node, self.now_ms)
        if node.up and node.life not in self.overlay.expelled:
            for place, value in rows.items():
                known = self.overlay.served.get(place)
                if known is None or known.stamp < stamp:
                    self.overlay.served[place] = Cell(stamp, value, node.life)

    def _reconcile(self, process: Process, place: Place) -> None:
        served = self.overlay.served.get(place)
        row = process.node.memory.get(place)
        if process.alive and place[0] in process.reconciling and row and (served is None or served.value != row.value):
            self._publish_served(process.node, {place: row.value})

    def _rows(self, node: Node, partitions: tuple[int, ...]) -> list[Place]:
        return [place for place in node.memory if place[0] in partitions and not is_mark(place)]

    def _load(self, process: Process, partitions: tuple[int, ...]) -> None:
        def look() -> None:
            memory = process.node.memory
            stamps = {place: cell.stamp for place, cell in memory.items() if place[0] in partitions}
            if self.overlay.lacking(process.node, stamps):
                self.after(POLL_MS, lambda: look() if process.alive else None)
                return
            marks = [
                e.Mark(place[0], place[1][1], *cell.value)  # type: ignore[index, misc]
                for place, cell in memory.items()
                if place[0] in partitions and is_mark(place)
            ]
            self.feed(process, e.Loaded(partitions, tuple(marks)))

        look()

    def undo(self, node: Node) -> None:
        """A step that did not become durable is taken back, as far as it is in memory and nobody wrote since."""
        record, node.record, node.torn = node.record, None, False
        if record is None or record.memory_life != node.memory_life:
            return
        written = [p for p in record.before if p in node.memory and node.memory[p].stamp == record.stamp]
        if written:
            cells = {place: record.before[place] for place in written}
            cells = {place: (0, 0) if value is None and is_mark(place) else value or () for place, value in cells.items()}
            self.publish(node, cells, self.overlay.stamp(node, self.now_ms))
            self.note(f"{node.name} takes back {written}")

    def _flush(self, process: Process, flush: int, partitions: tuple[int, ...], name: str) -> None:
        def look() -> None:
            memory = process.node.memory
            stamps = {place: cell.stamp for place, cell in memory.items() if place[0] in partitions}
            if not self.overlay.has(name, stamps):
                self.after(POLL_MS, lambda: look() if process.alive else None)
            else:
                self.feed(process, e.Flushed(flush))

        self.later(process, look)

    # --- faults --------------------------------------------------------------------------------------------------------------

    def crash_process(self, name: str) -> None:
        if name in self.processes:
            self.processes[name].alive = False
            self.note(f"server {name} crashes")

    def crash_node(self, node: Node) -> None:
        self.crash_process(node.name)
        self.overlay.crash(node)
        self.note(f"node {node.name} crashes")

    def start_over(self, node: Node) -> None:
        """It was expelled, and will join anew."""
        self.crash_node(node)
        self.overlay.lose_memory(node)

    def restart_node(self, node: Node) -> None:
        """It comes back, if it has its memory or there is somebody to join."""
        others = any(other.up for other in self.overlay.nodes.values() if other is not node)
        if node.up or not (others or self.overlay.is_whole(node)):
            return
        self.overlay.restart(node)
        self.note(f"node {node.name} is back as {node.boot}")
        self._tell_of(node)

    def _tell_of(self, node: Node) -> None:
        for other in self.overlay.nodes.values():
            if other is not node:
                self.after(self.little() * 20, lambda other=other: self.hear(other, node.name))  # type: ignore[misc]

    def hear(self, node: Node, other: str) -> None:
        """A node learns of the latest life of another one, and its server is told."""
        if node.up:
            self.overlay.learn(node, other)
            process = self.processes.get(node.name)
            if process is not None and process.life.boot == node.boot:
                self.feed(process, e.ViewChanged((node.lives[other],)))

    def expel(self, node: Node) -> None:
        life = node.life
        self.note(f"{life} is expelled")
        self.overlay.expel(life)
        told = self.rng.choice([other for other in self.overlay.nodes.values() if other is not node])
        self._hear_of_expulsion(told, life)
        for other in self.overlay.nodes.values():
            self.after(self.little() * 20, lambda other=other: self._hear_of_expulsion(other, life))  # type: ignore[misc]

    def _hear_of_expulsion(self, node: Node, life: Life) -> None:
        if not node.up:
            return  # it starts over when it is back
        self.overlay.freeze(node, life)
        if node.life == life:
            self.hear(node, node.name)
            if node.name not in self.processes or not self.processes[node.name].alive:
                self.start_over(node)
        else:
            self.hear(node, life[0])

    def tick(self) -> None:
        """What the overlay does by itself, again and again."""
        self.overlay.compare()
        for life in list(self.overlay.expelled):
            if self.overlay.retire(life):
                self.note(f"{life} is gone")
                for node in self.overlay.nodes.values():
                    if node.up:
                        self.after(self.little() * 20, lambda node=node, gone=life[0]: self.hear(node, gone))  # type: ignore[misc]
        self.after(25, self.tick)

    # --- checks --------------------------------------------------------------------------------------------------------------

    def check_actors(self) -> None:
        for partition in range(self.options.partitions):
            actors = [
                name
                for name, process in self.processes.items()
                if process.alive and partition in process.machine.core.primaries.acting
                if (name, process.life.boot) not in self.overlay.expelled
            ]
            assert len(actors) <= 1, f"two act for partition {partition}: {actors}"


def is_mark(place: Place) -> bool:
    return isinstance(place[1], tuple)
