"""Never two that act for a partition, whatever is lost, late, repeated or restarted; and one of them once all is well.

The world draws from a seed: servers that crash, alone or with their nodes; lives that are expelled, of which nodes hear at
different moments; messages that are lost, late and repeated. After each step nobody acts for a partition beside another one,
both of lives that are not expelled. Then faults end, everybody hears everything, and each partition must get the first in line.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from ekko.train.server import events as e
from ekko.train.server.primaries import ASK_AGAIN_MS, Begin, Effect, End, Primaries, line_of
from ekko.train.server.wire import Released, ServerLife
from tests.conftest import PROFILE

SEEDS = 2_000 if PROFILE == "long" else 80
STEPS = 220


@dataclass
class Server:
    """One server process and what its node knows."""

    primaries: Primaries | None = None  # None: it is down
    known: dict[str, e.NodeLife] = field(default_factory=dict)
    draining: list[tuple[int, ...]] = field(default_factory=list)
    flushing: list[int] = field(default_factory=list)
    stopped: bool = False


class World:
    """All servers of one model, and an adversary."""

    def __init__(self, seed: int, make: Callable[..., Primaries] = Primaries) -> None:
        self.rng = random.Random(seed)
        self.make = make
        self.names = [f"train-{number}" for number in range(self.rng.randint(2, 4))]
        self.partitions = self.rng.randint(1, 3)
        self.everywhere = self.rng.random() < 0.6  # whether all nodes hold everything
        self.lives: dict[str, e.NodeLife] = {}  # as they are; who learns of it when is the adversary's choice
        self.servers = {name: Server() for name in self.names}
        self.messages: list[tuple[str, e.ReleaseAsked | e.ReleaseAnswered]] = []
        self.asks: dict[int, tuple[str, str]] = {}  # ask -> (who asked, who was asked)
        self.now_ms = self.count = 0
        self.log: list[str] = []

    # --- what the adversary may do ------------------------------------------------------------------------------------------

    def boot(self, name: str) -> None:
        """The node begins a life; it joins, so that it knows of every life that is there."""
        life = self.lives.get(name)
        everything = frozenset(range(self.partitions))
        some = frozenset(p for p in everything if self.rng.random() < 0.8) or everything
        self.count += 1
        self.lives[name] = e.NodeLife(name, self.count, self.rng.getrandbits(60), everything if self.everywhere else some)
        known = self.servers[name].known
        for other, theirs in self.lives.items():
            before = known.get(other)
            if before is None or (theirs.boot_ms, theirs.boot) > (before.boot_ms, before.boot):
                known[other] = replace(theirs, expelled=False, gone=False)
        self.servers[name] = Server(None, known)
        self.log.append(f"{name} boots as {self.lives[name].boot_ms} after {life and life.boot_ms}")

    def start(self, name: str) -> None:
        """The server process begins, beside a node that is there."""
        life, server = self.lives[name], self.servers[name]
        own = ServerLife(name, life.boot_ms, life.boot, self.rng.getrandbits(60))
        server.primaries = self.make(own, "ctr", self.partitions, self.names)
        server.draining, server.flushing, server.stopped = [], [], False
        self.log.append(f"{name} starts")
        self.perform(name, server.primaries.on_view(e.ViewChanged(tuple(server.known.values())), self.now_ms))

    def crash(self, name: str) -> None:
        self.servers[name].primaries = None
        self.log.append(f"{name} crashes")
        if self.rng.random() < 0.5 or self.lives[name].expelled:
            self.boot(name)

    def expel(self, name: str) -> None:
        self.lives[name] = replace(self.lives[name], expelled=True)
        self.log.append(f"{name} is expelled as {self.lives[name].boot_ms}")

    def learn(self, name: str, other: str, gone: bool) -> None:
        """A node hears of another one's latest life; that it is gone is known after that it is expelled."""
        server, truth = self.servers[name], self.lives[other]
        known = server.known.get(other)
        same = known is not None and known.boot == truth.boot
        heard = same and known is not None and known.expelled
        server.known[other] = replace(truth, expelled=truth.expelled, gone=gone and heard)
        if server.primaries is not None:
            self.perform(name, server.primaries.on_view(e.ViewChanged((server.known[other],)), self.now_ms))

    def step(self) -> None:
        """One thing happens."""
        rng, name = self.rng, self.rng.choice(self.names)
        server = self.servers[name]
        self.now_ms += rng.randint(0, ASK_AGAIN_MS // 2)
        what = rng.random()
        if name not in self.lives:
            self.boot(name)
        elif server.primaries is None:
            if what < 0.5:
                self.start(name)
        elif what < 0.03:
            self.crash(name)
        elif what < 0.05:
            self.expel(name)
            if rng.random() < 0.5:
                self.crash(name)
        elif what < 0.3:
            if (other := rng.choice(self.names)) in self.lives:
                self.learn(name, other, gone=rng.random() < 0.5)
        elif what < 0.45:
            self.perform(name, server.primaries.on_timer(self.now_ms))
        elif what < 0.6:
            self.work(name)
        elif self.messages:
            self.deliver(rng.randrange(len(self.messages)), lost=rng.random() < 0.15, again=rng.random() < 0.15)

    # --- how it happens -----------------------------------------------------------------------------------------------------

    def work(self, name: str) -> None:
        """What was in flight is done, or a flush is."""
        server = self.servers[name]
        assert server.primaries is not None
        if server.draining and self.rng.random() < 0.6:
            self.perform(name, server.primaries.drained(server.draining.pop(0), self.now_ms))
        elif server.flushing:
            flush = server.flushing.pop(self.rng.randrange(len(server.flushing)))
            self.perform(name, server.primaries.on_flushed(e.Flushed(flush), self.now_ms))

    def deliver(self, index: int, *, lost: bool, again: bool) -> None:
        receiver, message = self.messages[index] if again else self.messages.pop(index)
        server = self.servers[receiver]
        if lost or server.primaries is None:
            return
        if isinstance(message, e.ReleaseAsked):
            self.count += 1
            self.asks[self.count] = message.asker.node, receiver
            asked = e.ReleaseAsked(self.count, message.asker, message.partitions)
            self.perform(receiver, server.primaries.on_release_asked(asked, self.now_ms))
        else:
            self.perform(receiver, server.primaries.on_release_answered(message, self.now_ms))

    def perform(self, name: str, effects: list[Effect]) -> None:
        server = self.servers[name]
        for effect in effects:
            self.log.append(f"{name}: {effect}")
            match effect:
                case e.AskRelease(node, asker, partitions):
                    self.messages.append((node, e.ReleaseAsked(0, asker, partitions)))
                case e.Answer(ask, Released(by, asker, partitions)):
                    back, asked = self.asks.pop(ask)  # every ask is answered once, or this fails
                    assert asked == by == name
                    self.messages.append((back, e.ReleaseAnswered(by, asker, partitions)))
                case e.Flush(flush):
                    server.flushing.append(flush)
                case End(partitions):
                    server.draining.append(partitions)
                case Begin(partitions):
                    assert partitions
                case e.Stop():
                    server.stopped = True
        self.check()

    def check(self) -> None:
        for partition in range(self.partitions):
            actors = [
                name
                for name, server in self.servers.items()
                if server.primaries is not None and partition in server.primaries.acting
                if server.primaries.own.boot == self.lives[name].boot and not self.lives[name].expelled
            ]
            assert len(actors) <= 1, f"two act for partition {partition}: {actors}"

    def settle(self) -> None:
        """Faults end: who is down or expelled comes back, everybody hears everything, nothing is lost."""
        for name in self.names:
            if name not in self.lives or self.lives[name].expelled or self.servers[name].stopped:
                self.servers[name].primaries = None
                self.boot(name)
        for name in self.names:
            if self.servers[name].primaries is None:
                self.start(name)
        for _ in range(60):
            self.now_ms += ASK_AGAIN_MS
            for name in self.names:
                for other in self.names:
                    self.learn(name, other, gone=False)
                for _ in range(8):
                    self.work(name)
                primaries = self.servers[name].primaries
                assert primaries is not None
                self.perform(name, primaries.on_timer(self.now_ms))
            while self.messages:
                self.deliver(0, lost=False, again=False)
        for partition in range(self.partitions):
            holders = [name for name in line_of("ctr", partition, self.names) if partition in self.lives[name].holds]
            acting = [n for n, server in self.servers.items() if server.primaries and partition in server.primaries.acting]
            assert acting == holders[:1], f"partition {partition} is served by {acting}, not by {holders[:1]}"
            for server in self.servers.values():
                assert server.primaries is not None
                believed = server.primaries.believed()[partition]
                assert not holders or believed == holders[0], f"{believed} is believed to act for {partition}"


def run(seed: int, make: Callable[..., Primaries] = Primaries) -> int:
    """Returns how often somebody began to act.

    Raises:
        AssertionError: with the seed and what happened last.
    """
    world = World(seed, make)
    try:
        for _ in range(STEPS):
            world.step()
        world.settle()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(world.log[-40:])) from None
    return sum("Begin(" in line for line in world.log)


def run_all(make: type[Primaries]) -> None:
    for seed in range(10 * SEEDS):
        run(seed, make)


def test_never_two_act_and_one_does_once_all_is_well() -> None:
    assert sum(map(run, range(SEEDS))) > 3 * SEEDS, "hardly anybody ever acted: the test tests nothing"


class TakesOverWhenExpelledIsNotHeard(Primaries):
    """A suspicion: who was asked twice and did not answer counts as gone."""

    def _owed(self, partition: int) -> list[str]:
        return [node for node in super()._owed(partition) if node in self._lives and self.rng_like(node)]

    def rng_like(self, node: str) -> bool:
        return (self._ask_again_ms or 0) < 4 * ASK_AGAIN_MS


class CountsReleasesToFormerLives(Primaries):
    def _is_to_us(self, answer: e.ReleaseAnswered) -> bool:
        return answer.asker.node == self.own.node


class ReleasesBeforeItIsDrained(Primaries):
    def _serve_asker(self, asker):  # type: ignore[no-untyped-def]
        if asker.ask is None:
            return []
        asker.clean |= {p for p in asker.wanted if self._may_release(asker.life, p)}
        ask, asker.ask = asker.ask, None
        return [e.Answer(ask, Released(self.own.node, asker.life, tuple(sorted(asker.clean & asker.wanted))))]


class GoneIsForEver(Primaries):
    """A life that came after one that was gone is taken for gone, too."""

    def _is_gone(self, node: str) -> bool:
        self.__dict__.setdefault("was_gone", set())
        if super()._is_gone(node):
            self.__dict__["was_gone"].add(node)
        return node in self.__dict__["was_gone"]


class AsksNobody(Primaries):
    def _owed(self, partition: int) -> list[str]:
        return []


@pytest.mark.parametrize("planted", [TakesOverWhenExpelledIsNotHeard, ReleasesBeforeItIsDrained, GoneIsForEver, AsksNobody])
def test_a_rule_that_is_left_out_is_noticed(planted: type[Primaries]) -> None:
    with pytest.raises(AssertionError, match=r"two act|is served by|is believed"):
        run_all(planted)


@pytest.mark.parametrize("make", [Primaries, CountsReleasesToFormerLives])
def test_a_release_that_comes_a_life_late_counts_for_nothing(make: type[Primaries]) -> None:
    """Rare in the world above: X asks, is expelled before the answer comes, Y takes over, X is back and hears the answer."""
    first, second = line_of("ctr", 0, ["a", "b"])
    of_first, of_second = e.NodeLife(first, 1, 11, frozenset({0})), e.NodeLife(second, 1, 22, frozenset({0}))
    x, y = (make(ServerLife(life.node, 1, life.boot, 5), "ctr", 1, ["a", "b"]) for life in (of_first, of_second))
    assert x.on_view(e.ViewChanged((of_first, of_second)), 0) == [e.AskRelease(second, x.own, (0,))]
    y.on_view(e.ViewChanged((of_first, of_second)), 0)
    assert y.on_release_asked(e.ReleaseAsked(1, x.own, (0,)), 0) == [e.Flush(1, (0,), first)]
    late = Released(second, x.own, (0,))
    assert y.on_flushed(e.Flushed(1), 0) == [e.Answer(1, late)]
    assert y.on_view(e.ViewChanged((replace(of_first, expelled=True, gone=True),)), 0) == [Begin((0,))]
    back = replace(of_first, boot_ms=2, boot=33)
    x = make(ServerLife(first, 2, 33, 6), "ctr", 1, ["a", "b"])
    x.on_view(e.ViewChanged((back, of_second)), 0)
    x.on_release_answered(e.ReleaseAnswered(second, late.asker, late.partitions), 0)
    assert y.acting == (0,)
    assert x.acting == (() if make is Primaries else (0,)), "the planted bug makes it two"


def test_the_line_divides_evenly_and_moves_little() -> None:
    names = [f"train-{number}" for number in range(4)]
    firsts = [line_of("ctr", partition, names)[0] for partition in range(64)]
    assert min(map(firsts.count, names)) >= 8
    without = [line_of("ctr", partition, names[:3])[0] for partition in range(64)]
    assert all(now == then for now, then in zip(without, firsts, strict=True) if then != names[3])
