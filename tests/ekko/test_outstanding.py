"""A worker's requests in virtual time, against servers that lose, repeat, refuse, forget, die and hand over.

Whatever happens on the way: each push counts once in each partition, in order, with all of its gradients; and a pull brings the
rows of exactly its keys.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from ekko.errors import EkkoError, WorkerDropped
from ekko.serve.following import partitions_of
from ekko.train import requests
from ekko.train.outstanding import Outstanding
from ekko.train.server import wire as w

SHARDS = 16
DIMS = {"item": 2, "user": 3}
ENDPOINTS = ("tcp://a", "tcp://b", "tcp://c")
END_S = 600.0


def row_of(table: str, keys: np.ndarray) -> np.ndarray:
    """What servers answer for keys: float32[n, dim] that says which keys they are."""
    return np.repeat(keys.astype(np.float32)[:, None], DIMS[table], axis=1) + len(table)


@dataclass
class Faults:
    loss: float = 0.0
    repeat: float = 0.0
    busy: float = 0.0
    forget: float = 0.0  # a server does not know the worker any more
    moves: int = 0  # how often primaries change


@dataclass
class Servers:
    """All servers of a model: what they have applied outlives each of them, as a spare's rows do."""

    rng: random.Random
    faults: Faults
    partitions: int
    mode: str = w.ASYNC
    primaries: list[int] = field(default_factory=list)
    believed: dict[int, list[int]] = field(default_factory=dict)  # of a server: who is primary of what
    known: dict[int, bool] = field(default_factory=dict)
    applied: dict[int, list[int]] = field(default_factory=dict)  # partition -> numbers of pushes, in the order applied
    gradients: dict[tuple[int, int, str], tuple[list[int], np.ndarray]] = field(default_factory=dict)
    life: int = 0
    dropped: bool = False  # the worker was, in this life
    healed: bool = False

    def __post_init__(self) -> None:
        self.primaries = [self.rng.randrange(len(ENDPOINTS)) for _ in range(self.partitions)]
        self.believed = {server: list(self.primaries) for server in range(len(ENDPOINTS))}
        self.applied = {partition: [] for partition in range(self.partitions)}

    @property
    def settings(self) -> w.ModelSettings:
        return w.ModelSettings(self.partitions, SHARDS, self.mode, 0, 0, dict(DIMS), 7)

    def move(self) -> None:
        """A partition gets another primary; the others hear of it at some time."""
        partition, server = self.rng.randrange(self.partitions), self.rng.randrange(len(ENDPOINTS))
        self.primaries[partition] = server
        for knows in {server, self.rng.randrange(len(ENDPOINTS))}:
            self.believed[knows][partition] = server

    def tell(self) -> None:
        for server in self.believed:
            self.believed[server] = list(self.primaries)

    def drop(self) -> None:
        """The worker was silent for too long: where the others are is where it goes on."""
        self.dropped = True
        furthest = max(numbers[-1] if numbers else 0 for numbers in self.applied.values()) + self.rng.randrange(3)
        for partition, numbers in self.applied.items():
            if partition % 2 and furthest > (numbers[-1] if numbers else 0):
                numbers.append(furthest)  # of nobody: the rounds that it missed

    def serving(self, server: int) -> w.Serving:
        named = tuple((endpoint[-1], endpoint) for endpoint in ENDPOINTS)
        return w.Serving(named, tuple(self.believed[server]))

    def answer(self, server: int, request: w.Request) -> w.Answer:
        own = {partition for partition in range(self.partitions) if self.primaries[partition] == server}
        match request:
            case w.WhoServes():
                return self.serving(server)
            case w.Hello(_, _, life):
                if life < self.life:
                    return w.Failed(w.STALE, f"the largest life is {self.life}")
                if life > self.life:
                    self.dropped, self.known = False, {}
                if self.dropped:
                    return w.Failed(w.DROPPED, "was silent for too long: begin it anew")
                self.life, self.known[server] = life, True
                last = (self.applied[one][-1] if self.applied[one] else 0 for one in range(self.partitions))
                return w.Welcome(self.settings, self.serving(server), tuple(n if p in own else -1 for p, n in enumerate(last)))
            case w.Pull() | w.Push():
                if not set(request.partitions) <= own:
                    return w.NotPrimary(self.serving(server))
                if not self.healed and self.rng.random() < self.faults.busy:
                    return w.Failed(w.BUSY, "too much waits")
                if not self.healed and self.rng.random() < self.faults.forget:
                    self.known[server] = False
                if not self.known.get(server) or request.life != self.life:
                    return w.Failed(w.HELLO, "who is this")
                if self.dropped and isinstance(request, w.Push):
                    return w.Failed(w.DROPPED, "was silent for too long: begin it anew")
                return self._pulled(request) if isinstance(request, w.Pull) else self._pushed(request)
        raise AssertionError(request)

    def _pulled(self, pull: w.Pull) -> w.Answer:
        touched = {one for keys in pull.tables.values() for one in partitions_of(keys, SHARDS, self.partitions).tolist()}
        assert tuple(sorted(touched)) == pull.partitions, "partitions of all keys, and of no others"
        return w.Pulled({table: row_of(table, keys) for table, keys in pull.tables.items()}, pull.clock)

    def _pushed(self, push: w.Push) -> w.Answer:
        for partition in push.partitions:
            done = self.applied[partition][-1] if self.applied[partition] else 0
            if push.number > done + 1:
                return w.Failed(w.GAP, f"{done} was the last")
        for partition in push.partitions:
            if self.applied[partition] and push.number <= self.applied[partition][-1]:
                continue
            self.applied[partition].append(push.number)
            for table, (keys, values) in push.tables.items():
                mine = partitions_of(keys, SHARDS, self.partitions) == partition
                self.gradients[push.number, partition, table] = keys[mine].tolist(), values[mine].copy()
        for table, (keys, _) in push.tables.items():
            assert set(partitions_of(keys, SHARDS, self.partitions).tolist()) <= set(push.partitions), table
        return w.Pushed(push.number, push.number << 12)


class Network:
    """Virtual time between one worker and the servers."""

    def __init__(self, seed: int, faults: Faults, partitions: int = 4) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.servers = Servers(self.rng, faults, partitions)
        self.asked = Outstanding("ctr", 0, 1, ENDPOINTS[:1])
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._last_s: dict[int, float] = {}  # when the last request arrives at a server
        self._back_s: dict[int, float] = {}  # when the last answer of a server arrives

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._count, what))

    def post(self) -> None:
        """Put what is to be sent on the wire: lost, late, or twice."""
        for send in self.asked.drain():
            server = ENDPOINTS.index(send.endpoint)
            copies = 1 + (not self.servers.healed and self.rng.random() < self.faults.repeat)
            for _ in range(copies):
                if self.servers.healed or self.rng.random() >= self.faults.loss:
                    # A connection keeps the order; what comes twice comes over two.
                    delay_s = max(self._last_s.get(server, 0.0) - self.now_s, 0.0) + self.rng.random() * 0.01
                    if copies == 1:
                        self._last_s[server] = self.now_s + delay_s
                    self.later(delay_s, lambda send=send, server=server: self._arrive(server, send))  # type: ignore[misc]

    def _arrive(self, server: int, send: requests.Send) -> None:
        answer = self.servers.answer(server, send.request)
        if self.servers.healed or self.rng.random() >= self.faults.loss:
            delay_s = max(self._back_s.get(server, 0.0) - self.now_s, 0.0) + self.rng.random() * 0.01
            self._back_s[server] = self.now_s + delay_s
            self.later(delay_s, lambda: self.asked.answered(send.endpoint, send.number, answer, self.now_s))

    def run_until(self, condition: Callable[[], bool]) -> None:
        self.asked.tick(self.now_s)
        self.post()
        while not condition():
            assert self.now_s < END_S, "nothing happens any more"
            assert self.asked.failure is None, self.asked.failure
            due = self.asked.deadline_s(self.now_s)
            if self._events and self._events[0][0] <= due:
                self.now_s, _, what = heapq.heappop(self._events)
                what()
            else:
                assert due < np.inf, "nobody waits for anything"
                self.now_s = max(due, self.now_s)
                self.asked.tick(self.now_s)
            self.post()


def batch(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    columns = {}
    for table, dim in DIMS.items():
        keys = rng.integers(0, 50, rng.integers(0, 12)).astype(np.uint64)
        columns[table] = keys, rng.standard_normal((len(keys), dim), dtype=np.float32)
    return columns


FAULTS = {
    "none": Faults(),
    "loss": Faults(loss=0.2, repeat=0.2),
    "busy": Faults(busy=0.5, forget=0.1),
    "moves": Faults(moves=20),
    "all": Faults(loss=0.1, repeat=0.1, busy=0.2, forget=0.05, moves=20),
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", FAULTS)
def test_each_push_counts_once_and_each_pull_brings_its_rows(kind: str, seed: int) -> None:
    faults = FAULTS[kind]
    network = Network(seed, faults, partitions=1 + seed % 5)
    asked, servers = network.asked, network.servers
    network.run_until(lambda: asked.joined)
    assert asked.clock == 0
    for move in range(faults.moves):
        network.later(0.1 * move, servers.move)
        network.later(0.1 * move + 0.3, servers.tell)
    rng = np.random.default_rng(seed)
    steps, pushed = 30, []
    for number in range(1, steps + 1):
        keys = {table: rng.integers(0, 50, rng.integers(0, 20)).astype(np.uint64) for table in DIMS}
        pulling = asked.pull(keys, number - 1, network.now_s)
        network.run_until(lambda pulling=pulling: pulling.done)  # type: ignore[misc]
        for table, wanted in keys.items():
            assert np.array_equal(pulling.rows[table], row_of(table, wanted))
        pushed.append(batch(rng))
        asked.push(number, pushed[-1], float("nan"), network.now_s)
        network.run_until(lambda: asked.pushes < 4)
    servers.tell()
    servers.healed = True
    network.run_until(lambda: asked.pushes == 0)
    assert asked.stamp == steps << 12
    for partition, numbers in servers.applied.items():
        assert numbers == list(range(1, steps + 1)), partition
    for number, columns in enumerate(pushed, 1):
        for table, (keys, values) in columns.items():
            partitions = partitions_of(keys, SHARDS, servers.partitions)
            for partition in range(servers.partitions):
                mine = partitions == partition
                found = servers.gradients.get((number, partition, table), ([], np.empty((0, DIMS[table]))))
                assert found[0] == keys[mine].tolist()
                assert np.array_equal(found[1], values[mine])
    if kind == "none":
        assert asked.retries == 0
    elif kind != "moves":
        assert asked.retries > 0, "the faults do nothing"


def test_a_worker_that_starts_again_goes_on_where_all_partitions_are() -> None:
    network = Network(1, Faults(), partitions=3)
    network.servers.applied = {0: [1, 2, 3], 1: [1, 2], 2: [1, 2, 3]}
    network.run_until(lambda: network.asked.joined)
    assert network.asked.clock == 2


def test_a_life_that_is_not_the_largest_is_raised() -> None:
    network = Network(1, Faults())
    network.servers.life = 50
    network.run_until(lambda: network.asked.joined)
    assert network.servers.life == 51


@pytest.mark.parametrize("reason", ["", " ", "the largest life is 7²", f"it is {w.NUMBER_MAX}", "-1"])
def test_a_life_that_servers_do_not_tell_ends_the_worker(reason: str) -> None:
    network = Network(1, Faults())
    asked = network.asked
    asked.tick(0.0)
    (who,) = asked.drain()
    asked.answered(who.endpoint, who.number, network.servers.serving(0), 0.0)
    hello = next(send for send in asked.drain() if isinstance(send.request, w.Hello))
    asked.answered(hello.endpoint, hello.number, w.Failed(w.STALE, reason), 0.0)
    assert "began anew in another process" in str(asked.failure)


def test_a_worker_that_was_replaced_ends() -> None:
    network = Network(1, Faults())
    network.run_until(lambda: network.asked.joined)
    network.servers.life = 99
    network.asked.pull({"item": np.array([1], np.uint64)}, 0, network.now_s)
    with pytest.raises(AssertionError, match="began anew in another process"):
        network.run_until(lambda: False)
    assert isinstance(network.asked.failure, EkkoError)


@pytest.mark.parametrize("seed", range(6))
def test_a_worker_that_was_dropped_goes_on_where_the_others_are(seed: int) -> None:
    faults = FAULTS["all"]
    network = Network(seed, faults, partitions=1 + seed % 4)
    asked, servers = network.asked, network.servers
    network.run_until(lambda: asked.joined)
    rng, lost, rejoined = np.random.default_rng(seed), 0, 0
    number, began = 0, dict.fromkeys(range(servers.partitions), 0)
    while rejoined < 5 or number < 25:
        if rejoined < 5 and rng.random() < 0.2:
            servers.drop()
        number += 1
        asked.push(number, batch(rng), float("nan"), network.now_s)
        pulling = asked.pull({"item": np.arange(9, dtype=np.uint64)}, number, network.now_s)
        network.run_until(lambda: asked.pushes < 3 or asked.failure is not None)
        if asked.failure is None:
            continue
        assert isinstance(asked.failure, WorkerDropped), asked.failure
        assert pulling.failure is asked.failure or pulling.done
        under_way, rejoined = asked.pushes, rejoined + 1
        lost += asked.rejoin(1, network.now_s)  # a clock that was set back
        assert not asked.pushes
        network.run_until(lambda: asked.joined)
        number = asked.clock
        assert number == min(numbers[-1] if numbers else 0 for numbers in servers.applied.values())
        began = {partition: numbers[-1] if numbers else 0 for partition, numbers in servers.applied.items()}
        assert under_way
    servers.healed = True
    network.run_until(lambda: asked.pushes == 0)
    assert lost >= rejoined
    for partition, numbers in servers.applied.items():
        assert numbers == sorted(set(numbers)), "each once, in order"
        assert set(range(began[partition] + 1, number + 1)) <= set(numbers), "all of this life"


def test_who_was_dropped_is_told_what_to_do() -> None:
    network = Network(1, Faults())
    asked = network.asked
    network.run_until(lambda: asked.joined)
    network.servers.drop()
    asked.push(1, {}, float("nan"), network.now_s)
    network.run_until(lambda: asked.failure is not None)
    said = str(asked.failure)
    assert "worker 0 of model 'ctr' was silent for too long" in said
    assert "1 of its pushes had no answer and may be lost: call client.rejoin()" in said


def test_servers_that_lost_answered_pushes_are_found_out() -> None:
    network = Network(1, Faults(), partitions=2)
    asked = network.asked
    network.run_until(lambda: asked.joined)
    for number in (1, 2):
        asked.push(number, {}, float("nan"), network.now_s)
    network.run_until(lambda: asked.pushes == 0)
    network.servers.applied = {0: [1], 1: [1, 2]}
    network.servers.known.clear()
    asked.push(3, {}, float("nan"), network.now_s)
    with pytest.raises(AssertionError, match="up to 1 in partition 0, and had answered 2: they lost some"):
        network.run_until(lambda: False)


@pytest.mark.parametrize("mode", [w.SYNC, w.ASYNC])
def test_servers_that_wait_for_us_hear_of_us_while_another_one_is_away(mode: str) -> None:
    """Where workers wait for each other, who is silent is dropped: a worker that a dead server holds up is not dead."""
    network = Network(1, Faults(), partitions=3)
    network.servers.mode = mode
    network.servers.primaries = [0, 1, 1]
    network.servers.tell()
    asked = network.asked
    network.run_until(lambda: asked.joined)
    keys = np.arange(50, dtype=np.uint64)
    pulling = asked.pull({"item": keys}, 0, network.now_s)
    heard: list[w.Request] = []
    for _ in range(40):  # the first server is away
        network.now_s += 0.1
        asked.tick(network.now_s)
        for send in asked.drain():
            if send.endpoint != ENDPOINTS[0]:
                heard.append(send.request)
                answer = network.servers.answer(ENDPOINTS.index(send.endpoint), send.request)
                asked.answered(send.endpoint, send.number, answer, network.now_s)
    assert not pulling.done
    hellos = [request for request in heard if isinstance(request, w.Hello)]
    assert bool(hellos) == (mode == w.SYNC)
    assert len(hellos) < 40
    assert asked.failure is None


def test_who_asks_for_a_pull_that_was_given_up_is_told() -> None:
    """Two tables of one pull are two waits: after the first one was given up, the second would wait for nothing."""
    network = Network(1, Faults())
    network.run_until(lambda: network.asked.joined)
    pulling = network.asked.pull({"item": np.arange(9, dtype=np.uint64)}, 0, network.now_s)
    network.asked.cancel(pulling)
    assert pulling.done
    assert "was given up: begin another one" in str(pulling.failure)
    arrived = network.asked.pull({"item": np.arange(9, dtype=np.uint64)}, 0, network.now_s)
    network.run_until(lambda: arrived.done)
    network.asked.cancel(arrived)
    assert arrived.failure is None


def test_settings_that_servers_refuse_are_said() -> None:
    network = Network(1, Faults())
    network.asked.tick(0.0)
    (send,) = network.asked.drain()
    network.asked.answered(send.endpoint, send.number, w.Failed(w.SETTINGS, "there is no model 'ctr' here"), 0.0)
    assert "there is no model 'ctr' here" in str(network.asked.failure)


def test_large_pulls_and_pushes_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "COLUMN_BYTES_MAX", 400)
    network = Network(3, Faults(), partitions=4)
    asked = network.asked
    network.run_until(lambda: asked.joined)
    keys = np.arange(200, dtype=np.uint64)
    pulling = asked.pull({"item": keys, "user": keys[::2]}, 0, network.now_s)
    network.run_until(lambda: pulling.done)
    assert np.array_equal(pulling.rows["item"], row_of("item", keys))
    assert np.array_equal(pulling.rows["user"], row_of("user", keys[::2]))
    some = keys[:40]
    asked.push(1, {"item": (some, row_of("item", some))}, float("nan"), network.now_s)
    network.run_until(lambda: asked.pushes == 0)
    assert sum(len(found) for found, _ in network.servers.gradients.values()) == 40
    asked.push(2, {"item": (keys, row_of("item", keys))}, float("nan"), network.now_s)
    assert "push smaller batches, or give the model more partitions" in str(asked.failure)
