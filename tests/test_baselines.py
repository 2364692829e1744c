"""The opponents of the benchmarks are treated fairly, and none gets away with losing a batch."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.baselines import fleet, servers, sides, spent
from benchmarks.baselines.load import Load
from sim_cluster.processes import wait_until

LOAD = Load(2_000, 50, 4)


def test_every_key_is_published_once_in_a_cycle() -> None:
    batches = LOAD.batches()
    keys = np.concatenate([batches.keys_of(number) for number in range(LOAD.cycle)])
    assert np.array_equal(np.sort(keys), np.arange(LOAD.table_rows, dtype=np.uint64))


def test_a_lost_batch_is_noticed() -> None:
    batches = replace(LOAD.batches(), round=2)
    table = np.zeros((LOAD.table_rows, LOAD.dim), np.float32)
    former = replace(batches, round=1)
    count = 3 * LOAD.cycle
    for number in range(count):
        table[former.keys_of(number)] = former.rows_of(number)  # an earlier round, with the same keys
    for number in range(count):
        if number != count - 7:
            table[batches.keys_of(number)] = batches.rows_of(number)
    assert fleet.differences(lambda keys: table[keys], batches, count) == 1


def test_the_publisher_waits_for_the_slowest() -> None:
    counters = np.zeros(4, np.uint64)
    counters[3] = 1000  # one replica is fast, the other has applied nothing
    numbers = fleet._paced(counters, until=float("inf"))
    assert [next(numbers) for _ in range(sides.WINDOW)] == list(range(sides.WINDOW))
    assert next(numbers) is None
    counters[2] = 1
    assert next(numbers) == sides.WINDOW


def test_a_missing_server_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "apt-get install nats-server" in str(servers.absent("nats"))


@pytest.mark.processes
@pytest.mark.parametrize("side", sides.SIDES)
def test_a_round_of_each(side: str, tmp_path: Path) -> None:
    kind = sides.SIDES[side].server
    if kind is not None and (missing := servers.absent(kind)):
        pytest.skip(missing)
    with fleet.Fleet(LOAD, replicas=2) as workers:
        if kind is None:
            _check_round(workers.round(side, servers.free_ports(1)[0], 0.05))
        else:
            with servers.server(kind, tmp_path) as port:
                _check_round(workers.round(side, port, 0.05))


def _check_round(one: spent.Round) -> None:
    assert one.rows_per_s == pytest.approx(one.batches * LOAD.batch_rows / one.seconds)
    assert {role: len(own) for role, own in one.spent_s.items()} == {"publisher": 1, "replica": 2}
    assert all(seconds > 0 for own in one.spent_s.values() for seconds in own)


def test_processor_time_of_others_is_counted() -> None:
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = spent.stopwatch({"worker": [worker.pid], "us": [os.getpid()]})
        wait_until(lambda: watch()["worker"][0] > 0.1, "a busy process spends time", 60.0)
        assert watch()["us"][0] < watch()["worker"][0]
    finally:
        worker.kill()
        worker.wait()


def test_who_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    idle = spent.Round(1.0, 1_000, 10.0, {"publisher": [1.0], "leader": [4.0], "leaf": [3.0, 3.0]})
    busy = spent.Round(1.0, 1_000, 10.0, {"publisher": [3.0], "leader": [9.0], "leaf": [3.0, 5.0]})
    assert spent.limit_of([idle]) == "leader"
    assert spent.limit_of([busy, busy, idle]) == "all"
    cells = {str(cell["role"]): cell for cell in spent.figures_of("ours", [busy])}
    assert cells["all"]["cpu_ms_per_batch"] == pytest.approx(20.0)
    assert cells["leaf"]["cpu_ms_per_batch"] == pytest.approx(4.0)  # of one of them
    assert cells["leader"]["cores_busy"] == pytest.approx(0.9)
    assert [role for role, cell in cells.items() if cell["limits"]] == ["all"]
