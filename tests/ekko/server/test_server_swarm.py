"""Servers and workers under faults drawn from seeds, in virtual time: what was acknowledged counts once, and all go on.

`EKKO_SERVER_SEEDS=first:last` runs those of each kind; a seed that fails says how to run it again.
"""

import os
from dataclasses import replace

import pytest

from ekko.train.server import wire as w
from ekko.train.server.machine import Machine
from tests.conftest import PROFILE
from tests.ekko.server.server_workers import Ledger, Worker
from tests.ekko.server.server_world import END_MS, FAULTS_MS, Options, World, is_mark, keys_of

FIRST, LAST = map(int, os.environ.get("EKKO_SERVER_SEEDS", "0:300" if PROFILE == "long" else "0:8").split(":"))
KINDS = {
    "async": Options(w.ASYNC, servers=3, workers=3, partitions=3),
    "bounded": Options(w.BOUNDED, servers=2, workers=3, staleness=2, worker_timeout_ms=1_500),
    "sync": Options(w.SYNC, servers=3, workers=2),
    "sync-dropping": Options(w.SYNC, servers=2, workers=3, worker_timeout_ms=1_200),
    "handing-over": Options(w.ASYNC, servers=3, workers=4, partitions=2, slow=0.3, expulsions=0.6),
    "alone": Options(w.ASYNC, servers=1, workers=3),
}


class Swarm(World):
    """A world with workers, and faults until some moment."""

    def __init__(self, seed: int, options: Options, make: type[Machine] = Machine) -> None:
        super().__init__(seed, options, make)
        self.ledger = Ledger()
        self.lives = 0
        self.workers: dict[int, Worker] = {}
        self.all_workers: list[Worker] = []

    def begin_worker(self, worker: int) -> None:
        self.lives += 1
        one = self.workers[worker] = Worker(self, self.ledger, worker, self.lives)
        self.all_workers.append(one)
        one.start()

    def fault(self) -> None:
        if not self.faulty:
            return
        rng, nodes = self.rng, list(self.overlay.nodes.values())
        node, what = rng.choice(nodes), rng.random()
        if what < self.options.expulsions:
            if node.life not in self.overlay.expelled and self.overlay.may_lose(node):
                self.expel(node)
        elif (what := rng.random()) < 0.25:
            self.crash_process(node.name)
        elif what < 0.45:
            if node.up:
                self.crash_node(node)
        elif what < 0.6:
            if node.up and self.overlay.may_lose(node):
                self.crash_node(node)
                self.overlay.lose_memory(node)
                self.note(f"{node.name} lost its memory")
        else:
            one = self.workers[rng.randrange(self.options.workers)]
            one.alive = one.alive and rng.random() < 0.4  # else it goes on beside its successor, until it is told
            self.note(f"worker {one.worker} ends as {one.life}")
            self.after(rng.randint(1, 600), lambda: self.begin_worker(one.worker))
        self.after(rng.randint(50, 900), self.fault)

    def nurse(self) -> None:
        """What supervisors do: who is down is started after a while."""
        for name, node in self.overlay.nodes.items():
            if not node.up and self.rng.random() < (0.06 if node.empty and self.faulty else 0.2):
                self.restart_node(node)
            elif node.up and self.rng.random() < 0.3 and node.life not in self.overlay.expelled:
                self.start(name)
        for worker in list(self.workers.values()):
            if worker.ended and worker is self.workers[worker.worker]:
                self.begin_worker(worker.worker)
        self.after(100, self.nurse)

    def run(self) -> None:
        for name in self.endpoints:
            self.after(self.little(), lambda name=name: self.start(name))  # type: ignore[misc]
        for worker in range(self.options.workers):
            self.begin_worker(worker)
        self.after(300, self.fault)
        self.tick()
        self.nurse()
        self.run_until(FAULTS_MS)
        self.note("faults end")
        self.faulty = False
        furthest = max((worker.number for worker in self.all_workers), default=0)
        self.options = replace(self.options, target=furthest + 5)
        self.run_until(self.now_ms + END_MS, lambda: all(worker.is_done for worker in self.workers.values()))
        stuck = {n: (one.number, one.last, one.open) for n, one in self.workers.items() if not one.is_done}
        assert not stuck, f"workers do not come to their end: {stuck}"
        self.run_until(self.now_ms + 5_000)
        # A node that was away until just now may have heard only then that it was expelled, and start over once more.
        while self.now_ms < END_MS and not all(node.up and not node.empty for node in self.overlay.nodes.values()):
            self.run_until(self.now_ms + 5_000)
        self.check_end()

    def check_end(self) -> None:
        overlay, keys = self.overlay, self.options.keys
        # Who was expelled shortly before may not know it yet, or not be back.
        nodes = [node for node in overlay.nodes.values() if node.up and node.life not in overlay.expelled]
        for node in nodes:
            assert {p: c.value for p, c in node.memory.items()} == {p: c.value for p, c in nodes[0].memory.items()}, "apart"
        rows = {place: cell.value for place, cell in nodes[0].memory.items() if not is_mark(place)}
        found: dict[tuple[tuple[int, int, int], int], set[object]] = {}
        for (partition, key), value in rows.items():
            assert isinstance(value, tuple)
            assert len({(push[0], push[2]) for push in value}) == len(value), (
                f"a push counts twice in {partition, key}: {value}"
            )
            of_worker = [push for worker in range(self.options.workers) for push in value if push[0] == worker]
            assert of_worker == sorted(of_worker, key=lambda push: (push[0], push[2])), f"pushes out of order in {value}"
            for push in value:
                found.setdefault((push, partition), set()).add(key)
        for (push, partition), where in found.items():
            assert where == set(keys_of(push, partition, keys)), f"{push} is in {where} of its rows only"
        for worker, life, number, partition in sorted(self.ledger.acknowledged):
            push = worker, life, number
            if number > self.ledger.last[worker, life][partition] and keys_of(push, partition, keys):
                assert (push, partition) in found, f"{push} was acknowledged in partition {partition} and is lost"
        served = {place: cell.value for place, cell in overlay.served.items() if cell.value}
        assert served == {place: value for place, value in rows.items() if value}, "what is served is not what was learned"
        for process in self.processes.values():
            if process.alive and (process.life.node, process.life.boot) not in overlay.expelled:  # else it does not know yet
                assert not process.asks, f"{process.life.node} owes answers: {process.asks}"
                assert not process.columns, f"{process.life.node} keeps columns: {process.columns}"
                assert not process.machine.core.pending.bytes


def run(kind: str, seed: int, make: type[Machine] = Machine) -> Swarm:
    """One run.

    Raises:
        AssertionError: with how to run it again, and what happened last.
    """
    swarm = Swarm(seed, KINDS[kind], make)
    try:
        swarm.run()
    except AssertionError as error:
        again = f"EKKO_SERVER_SEEDS={seed}:{seed + 1} python -m pytest {__file__} -k '{kind}'"
        raise AssertionError(f"{error}\nagain: {again}\n" + "\n".join(swarm.log[-60:])) from error
    return swarm


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_acknowledged_counts_once_and_all_go_on(kind: str) -> None:
    acts = acknowledged = 0
    for seed in range(FIRST, LAST):
        swarm = run(kind, seed)
        acts, acknowledged = acts + swarm.acts, acknowledged + len(swarm.ledger.acknowledged)
    assert acts > 8 * (LAST - FIRST), f"{acts} groups: hardly anything happened"
    assert acknowledged > 25 * (LAST - FIRST), f"{acknowledged} pushes were acknowledged: hardly anything happened"
