"""Real nodes with parameter servers: a rollback of the served model takes back what the servers have, too."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from typer.testing import CliRunner

import ekko
from ekko.cli import app
from ekko.config.sections import ServerModelSection
from ekko.errors import EkkoError, ModelError
from ekko.model import MARKS_TABLE, SHARDS_DEFAULT
from ekko.train import Client
from ekko.train.server.events import Apply, Mark, Step
from ekko.train.server.rows import TrainingRows
from ekko.train.server.schema import trained_model
from ekko.train.server.wire import Push
from sim_cluster.processes import NodeProcess, NodeSpec, wait_until
from tests.ekko.settled import WITHIN_S, known_moment
from tests.ekko.training_processes import TrainingCluster, table_settings

pytestmark = pytest.mark.processes
NODES = [
    NodeSpec("home-1", "home", "train"),
    NodeSpec("home-2", "home", "train"),
    NodeSpec("eu-1", "eu"),
    NodeSpec("wit-1", "eu", "witness", settings={"delay": "0s", "log_bytes": "64MB"}),
]
DIM = 4
TABLES = {
    "item": table_settings(DIM, {"name": "adagrad", "lr": 0.1}, {"name": "zeros"}),
    "user": table_settings(DIM, {"name": "adam", "lr": 0.1}, {"name": "zeros"}),
}
MODEL = {"mode": "async", "partitions": 2, "tables": TABLES}
KEYS = np.arange(64, dtype=np.uint64)
BORN = KEYS + np.uint64(1_000)  # of bad pushes
OTHERS = KEYS + np.uint64(2_000)  # that a worker trains on all the while
ALTERED = np.array([5_000], np.uint64)  # is served as it was not trained
PUSHES = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    with TrainingCluster(tmp_path_factory.mktemp("rollback"), NODES, MODEL) as cluster:
        cluster.start()
        yield cluster


def rollback(cluster: TrainingCluster, node: str, *arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(app, ["rollback", *arguments, "--http", cluster[node].http, "--json"])
    if done.exception is not None:
        raise done.exception
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def push(client: Client, keys: np.ndarray, slope: float) -> None:
    for _ in range(PUSHES):
        client.push({table: (keys, np.full((len(keys), DIM), slope, np.float32)) for table in TABLES})
    client.flush()


def rows(cluster: TrainingCluster, node: str, model: str = "ctr", suffix: str = "") -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each table: the rows of `KEYS` and `BORN`, and which are there."""
    with ekko.Reader(model, run_dir=cluster[node].run_dir, wait=60.0) as reader:
        found = [reader.lookup(table + suffix, np.concatenate([KEYS, BORN]), stamps=True) for table in TABLES]
    return [(values, stamps > 0) for values, stamps in found]


def same(one: list[tuple[np.ndarray, np.ndarray]], other: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    return all(np.array_equal(a, b) for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True))


def both_have_the_same(cluster: TrainingCluster) -> bool:
    """Whether the servers' nodes have the same of `KEYS`, `BORN` and `ALTERED`."""
    one, other = (
        [
            *rows(cluster, node, "ctr.training"),
            *rows(cluster, node, "ctr.training", ".state"),
            (items(cluster, node, ALTERED, "ctr.training"), np.empty(0)),
        ]
        for node in cluster.endpoints
    )
    return same(one, other)


def items(cluster: TrainingCluster, node: str, keys: np.ndarray, model: str = "ctr") -> np.ndarray:
    with ekko.Reader(model, run_dir=cluster[node].run_dir, wait=60.0) as reader:
        return reader.lookup("item", keys)


class Going(threading.Thread):
    """A worker that trains on until it is told to stop."""

    def __init__(self, endpoints: list[str]) -> None:
        super().__init__()
        self.end = threading.Event()
        self.clock = 0
        self.failure: BaseException | None = None
        self._endpoints = endpoints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        try:
            with Client(self._endpoints, "ctr", 1, timeout=120.0) as client:
                while not self.end.is_set():
                    client.push({table: (OTHERS, np.ones((len(OTHERS), DIM), np.float32)) for table in TABLES})
                    client.flush()
                    self.clock = client.clock
        except BaseException as failure:  # noqa: BLE001 - the test says it
            self.failure = failure


def test_what_servers_learned_wrong_is_gone_everywhere_and_stays_gone(cluster: TrainingCluster) -> None:
    endpoints = list(cluster.endpoints.values())
    with Client(endpoints, "ctr", 0, timeout=120.0) as client, Going(endpoints) as going:
        push(client, KEYS, 1.0)
        going.start()
        push(client, ALTERED, 1.0)
        wait_until(lambda: both_have_the_same(cluster), "each server has the other's half, too", WITHIN_S)
        trained = items(cluster, "home-1", ALTERED, "ctr.training")
        with ekko.Publisher(cluster["home-1"].local, model="ctr") as publisher:  # as if served rows were of another moment
            publisher.publish("item", ALTERED, trained + 1)
        good, state = (rows(cluster, "home-1", "ctr.training", suffix) for suffix in ("", ".state"))
        nodes = [node for node in cluster.nodes if node != "wit-1"]
        for node in nodes:  # an answered push is served at its server's node, and soon elsewhere
            wait_until(lambda node=node: same(rows(cluster, node), good), f"{node} serves what is trained", WITHIN_S)
        assert all(there[: len(KEYS)].all() and not there[len(KEYS) :].any() for _, there in good)
        moment = known_moment(cluster["wit-1"], "ctr", "ctr.training")
        push(client, np.concatenate([KEYS, BORN]), -1_000.0)
        wait_until(lambda: not same(rows(cluster, "home-1"), good), "what is wrong is served", WITHIN_S)

        done = rollback(cluster, "eu-1", "ctr", "--to", moment, "--yes")
        assert done["step"] == "done"
        for node in nodes:  # at once: writers go on only when both are back
            assert same(rows(cluster, node), good), node
        for node in cluster.endpoints:
            assert same(rows(cluster, node, "ctr.training"), good), node
            assert same(rows(cluster, node, "ctr.training", ".state"), state), node
        assert np.array_equal(client.pull("item", KEYS), good[0][0][: len(KEYS)])

        # Servers compare what they have with what is served, and serve it: the moments of the two need not be one.
        wait_until(lambda: (items(cluster, "eu-1", ALTERED) == trained).all(), "what is trained is served", 90)
        before = going.clock
        wait_until(lambda: going.clock > before + 10 or going.failure is not None, "another worker goes on", 90)
        going.end.set()
        going.join()
        assert going.failure is None
        for node in nodes:
            assert same(rows(cluster, node), good), node
        # One more step of Adagrad, from the state that there was.
        push(client, KEYS, 1.0)
        steps = sum(0.1 / np.sqrt(step) for step in range(1, 2 * PUSHES + 1))
        for node in cluster.endpoints:  # served rows leave a moment after the push is answered
            wait_until(lambda node=node: np.allclose(rows(cluster, node)[0][0][: len(KEYS)], -steps, 1e-5), "it is served", 90)
    check_what_was_begun_before(cluster["home-1"])


def check_what_was_begun_before(node: NodeProcess) -> None:
    """What a server was at when its model was taken back, on a node where one was, and beside a server that rests."""
    trained = TrainingRows(
        trained_model("ctr", ServerModelSection.model_validate(MODEL), SHARDS_DEFAULT), node.run_dir, node.local
    )
    try:
        keys, marks = np.array([9_000], np.uint64), (Mark(0, 900, 1, 1), Mark(1, 900, 1, 1))
        pushed = Push("ctr", 900, 1, 1, (0, 1), {"item": (keys, np.ones((1, DIM), np.float32))}, 1.0)
        prepared = trained.prepare(Apply(1, (Step((0, 1), (1,), False),), marks), {1: pushed})
        trained.publish(prepared)  # and say that the answer is lost
        there = trained.reader.lookup("item", keys)
        trained.publisher.look_back(0)
        with pytest.raises(ModelError, match="rolled back"):
            trained.publish(prepared)
        left = trained.left_of(prepared, marks)
        assert left is not None
        assert [table for table, _, _ in left.columns] == [MARKS_TABLE], "rows are as the rollback left them"
        trained.publish(left)
        assert trained.has(marks)
        assert np.array_equal(trained.reader.lookup("item", keys), there)

        trained.publisher.look_back(0)
        with pytest.raises(ModelError, match="rolled back"):
            trained.take_back()
        assert trained.take_back() is not None, "once it has looked what was taken back"
        assert trained.reader.lookup("item", keys, stamps=True)[1][0] == 0
        trained.undo.clear()
    finally:
        trained.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ctr.training", "--to", "1m ago"], "is what servers keep of 'ctr': take 'ctr' back, and both are"),
        (["ctr", "--to", "1m ago", "--writer", "home-1"], "is trained by servers.*leave --writer out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(cluster: TrainingCluster, arguments: list[str], said: str) -> None:
    with pytest.raises(EkkoError, match=said) as refused:
        rollback(cluster, "eu-1", *arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.long
def test_without_a_witness_of_what_is_trained_it_is_refused(tmp_path: Path) -> None:
    with TrainingCluster(tmp_path, [NODES[0], NODES[3]], MODEL, witnessed=False) as cluster:
        cluster.start()
        with pytest.raises(
            EkkoError, match=r"no witness that is alive holds all of 'ctr\.training'.*partitions = 2 into the file"
        ):
            rollback(cluster, "wit-1", "ctr", "--to", "1m ago", "--dry-run")
