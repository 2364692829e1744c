"""Clients that are broken or mean: each request has one answer, nothing is kept, and an honest worker's pushes count."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ekko.config.sections import ServerModelSection
from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.checks import refusal_of_hello, refusal_of_pull, refusal_of_push
from ekko.train.server.machine import Machine
from ekko.train.server.pulls import PULL_WAIT_MS_MAX
from ekko.train.server.schema import trained_model

PARTITIONS, DIM, NOW_US = 2, 4, 1_000_000
BOTH = tuple(range(PARTITIONS))
TABLES = {"item": {"dim": DIM, "optimizer": {"name": "sgd", "lr": 0.1}}}
HONEST = 0

numbers = st.one_of(st.integers(0, 6), st.sampled_from([w.NUMBER_MAX, w.NUMBER_MAX - 1, 1 << 40]))
workers = st.one_of(st.integers(0, 3), st.just(w.WORKERS_MAX - 1))
partitions = st.sampled_from([(0,), (1,), (0, 1), (5,), (0, 63)])
keys = st.lists(st.one_of(st.integers(0, 20), st.just((1 << 64) - 1)), max_size=5).map(lambda some: np.array(some, np.uint64))
names = st.sampled_from(["item", "_marks", "item.state", "nobody"])


@st.composite
def pushes(draw: st.DrawFn) -> w.Push:
    own = draw(keys)
    values = np.full((len(own), draw(st.sampled_from([DIM, DIM, 3]))), draw(st.sampled_from([1.0, np.nan, np.inf])), np.float32)
    number = max(1, draw(numbers))
    return w.Push("ctr", draw(workers), draw(numbers), number, draw(partitions), {draw(names): (own, values)})


requests = st.one_of(
    pushes(),
    st.builds(lambda *rest: w.Hello("ctr", *rest), workers, numbers),
    st.builds(
        lambda worker, life, clock, parts, name, own: w.Pull("ctr", worker, life, clock, parts, {name: own}),
        st.one_of(workers, st.just(w.OBSERVER)),
        numbers,
        numbers,
        partitions,
        names,
        keys,
    ),
    st.builds(
        lambda node, boot, parts: w.Release("ctr", w.ServerLife(node, boot, boot, 1), parts, 7),
        st.sampled_from(["a", "b", "stranger"]),
        numbers,
        partitions,
    ),
)


class Server:
    """A machine behind the checks of its shell, and jobs that are done when the test says so."""

    def __init__(self, mode: str) -> None:
        section = ServerModelSection(partitions=PARTITIONS, tables=TABLES, mode=mode, workers=0 if mode == w.ASYNC else 2)
        self.model = trained_model("ctr", section, 64)
        self.machine = Machine(w.ServerLife("a", 1, 1, 9), "ctr", self.model.settings, {"a": "tcp://a", "b": "tcp://b"})
        self.now_ms = self.asks = 0
        self.answers: dict[int, w.Answer | None] = {}
        self.columns: set[int] = set()
        self.jobs: list[e.Event] = []
        own, gone = e.NodeLife("a", 1, 1, frozenset(BOTH)), e.NodeLife("b", 1, 1, frozenset(BOTH), True, True)
        self.feed(e.ViewChanged((own, gone)))
        self.work()

    def feed(self, event: e.Event) -> None:
        for effect in self.machine.handle(event, self.now_ms):
            match effect:
                case e.Answer(ask, answer):
                    self.answer(ask, answer)
                case e.AnswerPull(ask, clock):
                    self.answer(ask, w.Pulled({}, clock))
                case e.Discard(ask):
                    self.columns.remove(ask)
                case e.Apply(group, steps, _):
                    assert {ask for step in steps for ask in step.asks} <= self.columns
                    self.jobs.append(e.Applied(group, 100 + group))
                case e.AwaitDurable(group):
                    self.jobs.append(e.Durable(group))
                case e.Serve(group):
                    self.jobs.append(e.Served(group))
                case e.Load(own):
                    self.jobs.append(e.Loaded(own, ()))
                case e.Flush(flush):
                    self.jobs.append(e.Flushed(flush))

    def answer(self, ask: int, answer: w.Answer) -> None:
        assert self.answers[ask] is None, "one answer each"
        self.answers[ask] = answer

    def ask(self, request: w.Request) -> int:
        self.asks += 1
        ask = self.asks
        self.answers[ask] = None
        match request:
            case w.Hello(_, worker, life):
                self.take(ask, refusal_of_hello(request, NOW_US), e.HelloAsked(ask, worker, life))
            case w.Pull():
                event = e.PullAsked(ask, request.worker, request.life, request.clock, request.partitions, 64)
                self.take(ask, refusal_of_pull(self.model, request), event)
            case w.Push():
                self.columns.add(ask)
                event = e.PushAsked(ask, request.worker, request.life, request.number, request.partitions, 64)
                self.take(ask, refusal_of_push(self.model, request), event)
            case w.Release(_, asker, own, _):
                self.take(ask, None, e.ReleaseAsked(ask, asker, own))
        return ask

    def take(self, ask: int, refusal: w.Failed | None, event: e.Event) -> None:
        if refusal is None:
            self.feed(event)
        else:
            self.columns.discard(ask)
            self.answer(ask, refusal)

    def work(self) -> None:
        while self.jobs:
            self.feed(self.jobs.pop(0))


def honest(number: int) -> w.Push:
    own = np.arange(8, dtype=np.uint64)
    return w.Push("ctr", HONEST, NOW_US, number, BOTH, {"item": (own, np.ones((8, DIM), np.float32))})


@given(st.sampled_from([w.ASYNC, w.SYNC]), st.lists(st.tuples(requests, st.booleans()), max_size=40))
@settings(deadline=None)
def test_whatever_comes_has_one_answer_and_leaves_nothing(mode: str, asked: list[tuple[w.Request, bool]]) -> None:
    server = Server(mode)
    number, waiting = 0, 0
    server.ask(w.Hello("ctr", HONEST, NOW_US))
    server.work()
    for request, works in asked:
        if getattr(request, "worker", None) == HONEST and getattr(request, "life", 0) >= NOW_US:
            continue  # who has a worker's number and a later life is that worker
        server.ask(request)
        if works:
            server.work()
            if mode == w.ASYNC:
                number += 1
                waiting = server.ask(honest(number))
                server.work()
                answer = server.answers[waiting]
                assert isinstance(answer, w.Pushed), answer
                assert answer.number == number
    server.work()
    server.now_ms += PULL_WAIT_MS_MAX
    server.feed(e.TimerFired())
    server.work()
    pending = server.machine.core.pending
    assert len(pending.pushes) <= len(server.columns), "of rounds that nobody completes"
    assert server.columns == set(pending.pushes)
    open_asks = {ask for ask, answer in server.answers.items() if answer is None}
    assert open_asks == set(pending.waiters)
    assert not pending.pulls
    assert pending.pull_bytes == 0
    if mode == w.ASYNC:
        assert not open_asks
        assert pending.bytes == 0


def test_a_life_that_no_later_one_could_follow_is_refused() -> None:
    refusal = refusal_of_hello(w.Hello("ctr", 1, w.NUMBER_MAX), NOW_US)
    assert refusal is not None
    assert refusal.kind == w.REFUSED
    assert "is in the future: set the worker's clock" in refusal.reason
    assert refusal_of_hello(w.Hello("ctr", 1, NOW_US + 1_000_000), NOW_US) is None
