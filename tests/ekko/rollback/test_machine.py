"""The state machine: in whatever order answers come, are lost, or the witness dies, nothing is done too early or by half."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from ekko.generations import Generation
from ekko.rollback import machine as r
from ekko.rollback.facts import PER_MILLE, Rollback, Step
from ekko.rollback.plan import Summary

CTR = Generation("ctr")
BATCHES = 20


def fact(**more: object) -> Rollback:
    return Rollback(CTR, 1 << 32, Step.FENCING, 1_000, 2_000, "train", witness="w1", **more)  # type: ignore[arg-type]


@dataclass
class World:
    """A cluster in a nutshell, whose answers may be lost or late, and in which the witness may die at any moment."""

    seed: int
    make: Callable[..., r.Machine] = r.Machine
    judged: bool = True
    verdicts: tuple[str, ...] = ("corrupted", "uncertain", "healthy")
    now_ms: int = 0
    told: Rollback = field(default_factory=fact)
    fenced: bool = False
    covered: bool = False  # all of F is at the witness
    plan: Summary | None = None  # durable
    compared_covered: bool = True  # the plan was made when all of F was there
    written: set[int] = field(default_factory=set)
    restored: set[int] = field(default_factory=set)  # batches that every replica has
    lifted: bool = False
    mistakes: list[str] = field(default_factory=list)
    lives: int = 1

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.answers: list[tuple[int, int, r.Event]] = []
        self.count = 0
        self._start()

    def _start(self) -> None:
        self.answers.clear()
        self.machine = self.make(self.told, judged=self.judged)
        self.feed(r.Begun(self.plan))

    def feed(self, event: r.Event) -> None:
        for effect in self.machine.handle(event, self.now_ms, self.now_ms + 1_000_000):
            self.carry_out(effect)

    def answer(self, event: r.Event, sure: bool = False) -> None:
        if sure or self.rng.random() > 0.2:
            self.count += 1
            self.answers.append((self.now_ms + self.rng.randint(0, 300), self.count, event))

    def carry_out(self, effect: r.Effect) -> None:
        match effect:
            case r.Tell(told):
                assert told.version > self.told.version
                self.told = told
            case r.Fence():
                if self.lifted:
                    self.mistakes.append("fenced again after it was lifted")
                self.fenced = self.fenced or self.rng.random() < 0.7
                self.answer(r.Fenced() if self.fenced else r.FenceWaits(("serve",)))
            case r.LookCovered():
                self.covered = self.covered or self.rng.random() < 0.3
                self.answer(r.Covered(self.covered), sure=True)
            case r.MakePlan():
                self.compared_covered = self.fenced and self.covered
                self.answer(r.Planned(Summary(900, BATCHES, 100), 5), sure=True)
            case r.Write(batch):
                if self.plan is None:
                    self.mistakes.append("wrote before the plan was durable")
                self.written.add(batch)
                self.answer(r.Written(batch) if self.rng.random() < 0.9 else r.NotWritten(batch, "busy"), sure=True)
            case r.AskEverywhere():
                self.restored |= {batch for batch in self.written if self.rng.random() < 0.8}
                behind = () if self.restored == self.written else ("serve",)
                self.answer(r.Everywhere(behind, ("away",)))
            case r.AskVerdict():
                self.answer(r.Judged(self.rng.choice(self.verdicts) if self.judged else ""))
            case r.Lift():
                if self.plan is not None and self.restored != set(range(BATCHES)):
                    self.mistakes.append("lifted before all was restored")
                if self.told.share != PER_MILLE:
                    self.mistakes.append("lifted while the traffic is kept away")
                self.lifted = True
                self.answer(r.Lifted())
            case r.End():
                self.plan = None

    def run(self, crashes: int = 0, limit: int = 4_000) -> "World":
        for _ in range(limit):
            if self.machine.over:
                break
            if crashes and self.rng.random() < 0.02:
                crashes -= 1
                self.lives += 1
                self._start()
                continue
            deadline_ms = self.machine.deadline_ms
            assert deadline_ms is not None
            self.answers.sort()
            if self.answers and self.answers[0][0] <= deadline_ms:
                self.now_ms, _, event = self.answers.pop(0)
                if isinstance(event, r.Planned):  # durable at this moment
                    self.plan = event.summary
                    if not self.compared_covered:
                        self.mistakes.append("compared before everything was there")
                self.feed(event)
            else:
                self.now_ms = max(self.now_ms, deadline_ms)
                self.feed(r.TimerFired())
        return self


@pytest.mark.parametrize("judged", [False, True])
def test_it_ends_well_whatever_is_lost_and_whoever_dies(judged: bool) -> None:
    lives = 0
    for seed in range(150):
        world = World(seed, judged=judged).run(crashes=seed % 5)
        assert world.mistakes == [], f"seed {seed}"
        assert world.machine.over, f"seed {seed}: {world.told}"
        assert world.told.step is Step.DONE
        assert world.restored == set(range(BATCHES))
        assert world.lifted
        assert world.plan is None
        assert world.told.share == PER_MILLE
        lives += world.lives
    assert lives > 220


class LiftsEarly(r.Machine):
    def _ask_everywhere(self, now_ms: int) -> None:
        self._on_everywhere((), (), now_ms, now_ms)


class ComparesEarly(r.Machine):
    def _look_covered(self, now_ms: int) -> None:
        self._covered = True
        self._on_covered(now_ms, now_ms)


class ForgetsItsPlan(r.Machine):
    def _on_begun(self, plan: Summary | None, now_ms: int, unix_ms: int) -> None:
        self._plan = plan or Summary(900, BATCHES, 100)
        self._enter(Step.FENCING, now_ms, unix_ms, share=0)
        self._fence(now_ms)


@pytest.mark.parametrize(
    ("planted", "mistake"),
    [
        (LiftsEarly, "lifted before all was restored"),
        (ComparesEarly, "compared before everything was there"),
        (ForgetsItsPlan, "wrote before the plan was durable"),
    ],
)
def test_a_planted_bug_is_noticed(planted: type[r.Machine], mistake: str) -> None:
    assert any(mistake in World(seed, planted).run().mistakes for seed in range(20))


def test_what_cannot_be_lets_writers_go_on_and_says_why() -> None:
    world = World(1)
    world.answers.clear()
    for event in (r.Fenced(), r.Covered(True), r.Impossible("there is no mark: choose a later time")):
        world.feed(event)
    world.run()
    assert world.lifted
    assert (world.told.step, world.told.reason) == (Step.FAILED, "there is no mark: choose a later time")
    assert world.told.share == PER_MILLE


def test_who_is_superseded_says_no_more_and_keeps_out() -> None:
    machine = r.Machine(fact(), judged=True)
    machine.handle(r.Begun(), 0, 0)
    assert machine.handle(r.Superseded(), 1, 1) == [r.End()]
    assert machine.over
    assert machine.handle(r.Fenced(), 2, 2) == []


def test_a_dry_run_stops_nobody() -> None:
    machine = r.Machine(fact(dry=True), judged=True)
    first = machine.handle(r.Begun(), 0, 0)
    last = machine.handle(r.Planned(Summary(900, 2, 10, 1, 999, 3), 40), 1, 1)
    assert [type(effect) for effect in first + last] == [r.Tell, r.MakePlan, r.Tell, r.End]
    told = machine.fact
    assert (told.step, told.rows, told.deletions, told.payload_bytes, told.at_risk, told.estimate_ms, told.cut_ms) == (
        *(Step.DONE, 10, 1, 999, 3, 40),
        900,
    )


def test_a_model_that_stays_corrupted_is_not_let_go_until_an_operator_says_so() -> None:
    world = World(3, verdicts=("corrupted",)).run(limit=3_000)
    assert world.told.step is Step.PROBING
    assert not world.lifted
    world.feed(r.Finish())
    world.run()
    assert world.told.step is Step.DONE


def test_without_anything_to_write_it_still_waits_for_the_others() -> None:
    machine = r.Machine(fact(), judged=False)
    for event in (r.Begun(), r.Fenced(), r.Covered(True)):
        machine.handle(event, 0, 0)
    assert r.AskEverywhere() in machine.handle(r.Planned(Summary(900), 0), 0, 0)
