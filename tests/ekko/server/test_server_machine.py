"""What the machine does, step by step: a push from its coming to its answer, clocks, lives, bounds, handing over."""

from dataclasses import replace

import pytest

from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.groups import LINGER_MS
from ekko.train.server.machine import Machine
from ekko.train.server.pending import PULL_BYTES_MAX, PULLS_MAX, PUSHES_MAX, QUEUE_BYTES_MAX
from ekko.train.server.primaries import line_of
from ekko.train.server.pulls import PULL_WAIT_MS_MAX

SETTINGS = w.ModelSettings(2, 64, w.ASYNC, 0, 0, {"item": 4}, 7)
BOTH = (0, 1)


def life_of(node: str) -> w.ServerLife:
    return w.ServerLife(node, 1, sum(node.encode()), 9)


def node_life(node: str, *, gone: bool = False, boot_ms: int = 1) -> e.NodeLife:
    return e.NodeLife(node, boot_ms, sum(node.encode()), frozenset(BOTH), gone, gone)


class Alone:
    """A machine that acts for everything, since no other server is there."""

    def __init__(self, settings: w.ModelSettings = SETTINGS, timeout_ms: int = 0, marks: tuple[e.Mark, ...] = ()) -> None:
        self.machine = Machine(life_of("a"), "ctr", settings, {"a": "tcp://a"}, timeout_ms)
        self.now_ms = self.asks = 0
        assert self.handle(e.ViewChanged((node_life("a"),))) == [e.Load(BOTH)]
        assert self.handle(e.Loaded(BOTH, marks)) == [e.Reconcile(BOTH)]

    def handle(self, event: e.Event) -> list[e.Effect]:
        return self.machine.handle(event, self.now_ms)

    def hello(self, worker: int, life: int = 1) -> w.Answer:
        """As far as it takes to be welcome."""
        self.asks += 1
        return self.finish(self.handle(e.HelloAsked(self.asks, worker, life)))[self.asks]

    def push(
        self, worker: int, number: int, life: int = 1, partitions: tuple[int, ...] = BOTH, size: int = 8
    ) -> list[e.Effect]:
        self.asks += 1
        return self.handle(e.PushAsked(self.asks, worker, life, number, partitions, size))

    def pull(self, worker: int, clock: int, life: int = 1, size: int = 8) -> list[e.Effect]:
        self.asks += 1
        return self.handle(e.PullAsked(self.asks, worker, life, clock, BOTH, size))

    def finish(self, effects: list[e.Effect]) -> dict[int, w.Answer]:
        """Do what is to be done until nothing is; answers by ask."""
        answers: dict[int, w.Answer] = {}
        while effects:
            effect, *effects = effects
            match effect:
                case e.Apply(group):
                    effects += self.handle(e.Applied(group, 100 + group))
                case e.AwaitDurable(group):
                    effects += self.handle(e.Durable(group))
                case e.Serve(group):
                    effects += self.handle(e.Served(group))
                case e.Answer(ask, answer):
                    answers[ask] = answer
                case e.AnswerPull(ask, clock):
                    answers[ask] = w.Pulled({}, clock)
        return answers


def failure(effects: list[e.Effect]) -> str:
    """The kind of the one refusal among effects."""
    kinds = [effect.answer.kind for effect in effects if isinstance(effect, e.Answer) if isinstance(effect.answer, w.Failed)]
    assert len(kinds) == 1, effects
    return kinds[0]


def test_a_push_is_answered_when_it_is_applied_durable_and_served() -> None:
    alone = Alone()
    assert alone.hello(0) == w.Welcome(SETTINGS, alone.machine.serving(), (0, 0))
    marks = e.Mark(0, 0, 1, 1), e.Mark(1, 0, 1, 1)
    assert alone.push(0, 1) == [e.Apply(2, (e.Step(BOTH, (2,), False),), marks)]
    assert alone.handle(e.Applied(2, 55)) == [e.Discard(2), e.AwaitDurable(2, 55)]
    assert alone.handle(e.Durable(2)) == [e.Serve(2)]
    assert alone.handle(e.Served(2)) == [e.Answer(2, w.Pushed(1, 55))]


def test_what_comes_while_a_group_is_under_way_is_one_group() -> None:
    alone = Alone()
    for worker in range(3):
        alone.hello(worker)
    alone.push(0, 1)
    assert alone.push(1, 1) == []
    assert alone.push(0, 2, partitions=(0,)) == []
    assert alone.push(2, 1, partitions=(1,)) == []
    assert alone.handle(e.Applied(4, 1)) == [e.Discard(4), e.AwaitDurable(4, 1)]
    serve, apply = alone.handle(e.Durable(4))
    assert serve == e.Serve(4)
    assert isinstance(apply, e.Apply)
    assert apply.steps == (e.Step((0,), (5, 6), False), e.Step((1,), (5, 7), False))
    assert [(mark.partition, mark.worker, mark.number) for mark in apply.marks] == [(0, 0, 2), (0, 1, 1), (1, 1, 1), (1, 2, 1)]


def test_a_push_that_comes_twice_counts_once_and_is_answered() -> None:
    alone = Alone()
    alone.hello(0)
    alone.push(0, 1)
    again = alone.push(0, 1)
    assert again == [e.Discard(3), e.Answer(2, w.Failed(w.BUSY, "asked again"))]
    assert alone.finish([e.AwaitDurable(2, 1)] if alone.handle(e.Applied(2, 9)) else []) == {3: w.Pushed(1, 9)}
    late = alone.push(0, 1)
    assert late == [e.Discard(4), e.Answer(4, w.Pushed(1, 0))]


def test_a_push_after_one_that_was_refused_is_refused() -> None:
    alone = Alone()
    alone.hello(0)
    assert failure(alone.push(0, 2)) == w.GAP
    assert alone.finish(alone.push(0, 1)) == {3: w.Pushed(1, 102)}


def test_a_later_life_shuts_the_former_out() -> None:
    alone = Alone()
    alone.hello(0, life=5)
    assert failure(alone.push(0, 1, life=6)) == w.HELLO
    alone.push(0, 1, life=5)
    alone.push(0, 2, life=5)  # waits
    alone.asks += 1
    effects = alone.handle(e.HelloAsked(alone.asks, 0, 6))
    assert failure(alone.push(0, 3, life=5)) == w.STALE
    assert [type(effect) for effect in effects] == [e.Discard, e.Answer, e.Answer]  # both pushes of life 5 are refused
    answers = alone.finish(alone.handle(e.Applied(2, 1)))
    welcome = answers[5]
    assert isinstance(welcome, w.Welcome)
    assert welcome.last == (1, 1)  # what was under way was finished
    assert alone.finish(alone.push(0, 2, life=6)).popitem()[1] == w.Pushed(2, 104)


def test_clocks_of_bounded_staleness() -> None:
    settings = replace(SETTINGS, mode=w.BOUNDED, workers=2, staleness=1)
    alone = Alone(settings)
    alone.hello(0), alone.hello(1)
    assert alone.pull(0, 1) == [e.AnswerPull(3, 0)]
    alone.finish(alone.push(0, 1))
    alone.finish(alone.push(0, 2))
    assert alone.pull(0, 2) == []  # worker 1 is two behind
    apply, *_ = alone.push(1, 1)
    assert isinstance(apply, e.Apply)
    assert alone.handle(e.Applied(apply.group, 7)) == [e.Discard(7), e.AwaitDurable(apply.group, 7)]
    assert e.AnswerPull(6, 1) in alone.handle(e.Durable(apply.group))  # not before it is durable


def test_a_round_of_mode_sync_is_summed_in_the_order_of_workers() -> None:
    alone = Alone(replace(SETTINGS, mode=w.SYNC, workers=3))
    for worker in range(3):
        alone.hello(worker)
    assert alone.push(2, 1) == alone.push(0, 1) == []
    (apply,) = alone.push(1, 1)
    assert isinstance(apply, e.Apply)
    assert apply.steps == (e.Step(BOTH, (5, 6, 4), True),)


def test_who_is_silent_is_dropped_and_goes_on_where_the_others_are() -> None:
    alone = Alone(replace(SETTINGS, mode=w.SYNC, workers=2), timeout_ms=1_000)
    alone.hello(0), alone.hello(1)
    alone.push(0, 1)
    assert alone.machine.deadline_ms == 1_000
    alone.now_ms = 1_000
    dropped, *effects = alone.handle(e.TimerFired())
    assert dropped == e.WorkerDropped(1, BOTH)
    assert alone.finish(effects) == {3: w.Pushed(1, 103)}
    alone.finish(alone.push(0, 2))
    assert failure(alone.push(1, 1)) == w.DROPPED
    refused = alone.hello(1)  # in the same life, or one that was long on its way
    assert isinstance(refused, w.Failed)
    assert refused.kind == w.DROPPED
    welcome = alone.hello(1, life=2)
    assert isinstance(welcome, w.Welcome)
    assert welcome.last == (2, 2)
    assert alone.push(0, 3) == []  # it is waited for again
    assert alone.push(1, 3, life=2) != []


def test_who_has_a_push_under_way_is_not_dropped() -> None:
    alone = Alone(replace(SETTINGS, mode=w.SYNC, workers=2), timeout_ms=1_000)
    alone.hello(0), alone.hello(1)
    alone.push(0, 1)
    assert alone.push(1, 1) != []  # a group, of which nobody hears for long
    assert alone.pull(0, 1) == []
    alone.now_ms = 5_000
    assert alone.handle(e.TimerFired()) == []


def test_queues_have_bounds_and_say_so() -> None:
    alone = Alone(replace(SETTINGS, mode=w.SYNC, workers=2))
    alone.hello(0), alone.hello(1)
    for number in range(1, PUSHES_MAX + 1):
        assert alone.push(0, number) == []
    assert failure(alone.push(0, PUSHES_MAX + 1)) == w.BUSY
    for _ in range(PULLS_MAX):
        assert alone.pull(0, 9) == []
    assert failure(alone.pull(0, 9)) == w.BUSY
    assert failure(alone.push(1, 1, size=QUEUE_BYTES_MAX)) == w.BUSY
    assert alone.pull(1, 0) == [e.AnswerPull(alone.asks, 0)]  # what need not wait needs no room
    assert alone.pull(1, 9, size=PULL_BYTES_MAX - PULLS_MAX * 8) == []
    assert failure(alone.pull(1, 9)) == w.BUSY
    alone.now_ms = PULL_WAIT_MS_MAX
    assert alone.machine.deadline_ms == PULL_WAIT_MS_MAX
    assert len([effect for effect in alone.handle(e.TimerFired()) if isinstance(effect, e.Answer)]) == PULLS_MAX + 1
    assert not alone.machine.core.pending.pull_bytes


def test_what_was_stored_goes_on() -> None:
    alone = Alone(marks=(e.Mark(0, 3, 8, 20), e.Mark(1, 3, 8, 21)))
    assert failure(alone.push(3, 21, life=7)) == w.STALE
    assert alone.push(3, 21, life=8) == [e.Apply(1, (e.Step((0,), (2,), False),), (e.Mark(0, 3, 8, 21),))]


def is_in_one_line(nodes: str) -> bool:
    return line_of("ctr", 0, nodes) == line_of("ctr", 1, nodes)


def test_a_partition_is_handed_over_when_nothing_of_it_is_in_flight() -> None:
    # Two nodes that stand in one line for both partitions.
    first, second = next(line_of("ctr", 0, "a" + other) for other in "bcdefgh" if is_in_one_line("a" + other))
    machine = Machine(life_of(second), "ctr", SETTINGS, {first: "tcp://first", second: "tcp://second"})
    gone = node_life(first, gone=True)
    assert machine.handle(e.ViewChanged((gone, node_life(second))), 0) == [e.Load(BOTH)]
    machine.handle(e.Loaded(BOTH, (e.Mark(0, 0, 1, 0), e.Mark(1, 0, 1, 0))), 0)
    machine.handle(e.PushAsked(1, 0, 1, 1, (0,), 8), 0)
    machine.handle(e.PushAsked(2, 0, 1, 1, (1,), 8), 0)  # waits
    back = node_life(first, boot_ms=2)
    effects = machine.handle(e.ViewChanged((back,)), 0)
    assert [effect.ask for effect in effects if isinstance(effect, e.Answer)] == [2]
    assert e.Unload((1,)) in effects
    asker = w.ServerLife(first, 2, back.boot, 4)
    assert machine.handle(e.ReleaseAsked(3, asker, BOTH), 0) == [e.Flush(1, (1,), first)]
    machine.handle(e.Applied(1, 5), 0)
    assert machine.handle(e.Durable(1), 0) == [e.Serve(1)]
    effects = machine.handle(e.Served(1), 0)
    assert effects == [e.Answer(1, w.Pushed(1, 5)), e.Unload((0,)), e.Flush(2, (0,), first)]
    machine.handle(e.Flushed(1), 0)
    assert machine.handle(e.Flushed(2), 0) == [e.Answer(3, w.Released(second, asker, BOTH))]


def test_columns_are_let_go_of_however_a_push_ends() -> None:
    """A part of a push is applied, and on its way to the others, when the partition of its other part is given up."""
    alone = Alone(replace(SETTINGS, mode=w.SYNC, workers=2))
    alone.hello(0), alone.hello(1)
    alone.push(1, 1, partitions=(1,))
    apply, *_ = alone.push(0, 1)
    assert isinstance(apply, e.Apply)
    assert apply.steps == (e.Step((1,), (4, 3), True),)
    assert e.Discard(4) not in alone.handle(e.Applied(apply.group, 1))  # its part of partition 0 waits
    alone.asks += 1
    assert e.Discard(4) in alone.handle(e.HelloAsked(alone.asks, 0, 2))
    assert not alone.machine.core.pending.bytes


def test_who_does_not_act_says_who_does() -> None:
    machine = Machine(life_of("a"), "ctr", SETTINGS, {"a": "tcp://a", "b": "tcp://b"})
    machine.handle(e.ViewChanged((node_life("a"),)), 0)
    (answer,) = machine.handle(e.PullAsked(1, 0, 1, 0, BOTH, 8), 0)
    assert isinstance(answer, e.Answer)
    assert isinstance(answer.answer, w.NotPrimary)


def test_an_expelled_server_stops_for_good() -> None:
    alone = Alone()
    (stop,) = alone.handle(e.ViewChanged((node_life("a", gone=True),)))
    assert isinstance(stop, e.Stop)
    assert alone.push(0, 1) == []
    with pytest.raises(AssertionError, match="not under way"):
        Alone().handle(e.Applied(1, 1))


def asks_of(effects: list[e.Effect]) -> list[tuple[int, ...]]:
    """Of each group that is begun, whose pushes are in it."""
    return [step.asks for effect in effects if isinstance(effect, e.Apply) for step in effect.steps]


def test_pushes_of_a_worker_that_waits_for_none_of_them_share_a_group() -> None:
    alone = Alone()
    alone.hello(1)
    first = alone.push(1, 1)
    assert asks_of(first) == [(2,)], "nothing is known of it: it is not kept waiting"
    assert alone.push(1, 2) == alone.push(1, 3) == []
    assert set(alone.finish(first)) == {2, 3, 4}, "no more of it is expected than it had under way"
    assert asks_of(alone.push(1, 4)) == []
    assert alone.machine.deadline_ms == LINGER_MS
    assert asks_of(alone.push(1, 5)) == []
    begun = alone.push(1, 6)
    assert asks_of(begun) == [(5, 6, 7)], "all are there"
    assert alone.machine.deadline_ms is None
    assert set(alone.finish(begun)) == {5, 6, 7}


def test_no_push_lingers_for_long_or_again_for_what_did_not_come() -> None:
    alone = Alone()
    alone.hello(1)
    first = alone.push(1, 1)
    alone.push(1, 2)
    alone.finish(first)
    assert asks_of(alone.push(1, 3)) == []
    alone.now_ms += LINGER_MS - 1
    assert alone.handle(e.TimerFired()) == []
    alone.now_ms += 1
    begun = alone.handle(e.TimerFired())
    assert asks_of(begun) == [(4,)]
    alone.finish(begun)
    assert asks_of(alone.push(1, 4)) == [(5,)], "it waits for each answer by now"


def test_who_waits_for_each_answer_is_not_kept_waiting() -> None:
    alone = Alone()
    alone.hello(1)
    alone.hello(2)
    first = alone.push(1, 1)
    alone.push(1, 2)
    alone.finish(first)
    assert asks_of(alone.push(1, 3)) == []
    assert asks_of(alone.push(2, 1)) == [(5, 6)], "nor for another worker's pushes"
