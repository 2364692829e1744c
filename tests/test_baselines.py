"""The opponents of the benchmarks are treated fairly, and none gets away with losing a batch."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.baselines import fleet, servers, sides
from benchmarks.baselines.load import Load

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
            assert workers.round(side, servers.free_ports(1)[0], 0.05) > 0
        else:
            with servers.server(kind, tmp_path) as port:
                assert workers.round(side, port, 0.05) > 0
