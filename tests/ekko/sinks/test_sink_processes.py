"""`ekko sink` beside real nodes, into a real Redis: updates, kills of each of them, a rollback, memory that is lost."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import redis
from typer.testing import CliRunner

import ekko
from benchmarks.baselines import servers
from ekko.cli import app
from ekko.errors import ConfigError, ModelError
from ekko.serve.sink import Sink
from ekko.sinks import RedisRows
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, wait_until
from tests.ekko.sinks.plain_sink import PlainSink, PlainStore

pytestmark = pytest.mark.processes
MODELS = {"ctr": ModelTables({"item": 4, "user": 2}, capacity_rows=1_000)}
NODES = [
    NodeSpec("train-1", "us", "train"),
    NodeSpec("serve-1", "eu"),
    NodeSpec("wit-1", "eu", "witness", settings={"delay": "0s", "log_bytes": "64MB"}),
]
KEYS = np.arange(300, dtype=np.uint64)
TIMEOUT_S = 120.0  # a process that starts on a very busy machine included


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if reason := servers.absent("redis"):
        pytest.skip(reason)
    with servers.server("redis", tmp_path_factory.mktemp("redis")) as port:
        yield f"redis://127.0.0.1:{port}/0"


class Process:
    """`ekko sink` of serve-1. Use as a context manager."""

    def __init__(self, cluster: LocalCluster, url: str, folder: Path) -> None:
        self._command = ["sink", "ctr", url, "--config", str(cluster["serve-1"].config_path), "--every", "1", "--json"]
        self._log = folder / "sink.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "ekko.cli", *self._command]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def stop(self) -> dict[str, object]:
        self._process.send_signal(signal.SIGTERM)
        said, _ = self._process.communicate(timeout=TIMEOUT_S)
        assert self._process.returncode == 0, self._log.read_text()
        answer: dict[str, object] = json.loads(said)
        return answer

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()


def fill(publisher: ekko.Publisher, value: float, keys: np.ndarray[tuple[int], np.dtype[np.uint64]] = KEYS) -> None:
    for table, dim in (("item", 4), ("user", 2)):
        stamp = publisher.publish(table, keys, np.full((len(keys), dim), value, np.float32))
    publisher.wait(stamp, "all", TIMEOUT_S)


class Pair:
    """serve-1, and Redis, which `ekko sink` keeps as it is."""

    def __init__(self, cluster: LocalCluster, rows: RedisRows, folder: Path) -> None:
        self._node = cluster["serve-1"]
        self._rows = rows
        self._log = folder / "sink.log"

    def same(self, value: float) -> bool:
        """Rows and stamps of all keys; and the last key has what was published last."""
        try:
            with closing(ekko.Reader("ctr", self._node.run_dir)) as reader:
                for table in reader.tables:
                    mine, stamps = reader.lookup(table, KEYS, stamps=True)
                    theirs, their_stamps = self._rows.lookup(table, KEYS)
                    if not ((mine == theirs).all() and (stamps == their_stamps).all() and theirs[-1, 0] == value):
                        return False
        except ModelError:  # a table has not been told of yet, or the node has just begun
            return False
        return True

    def wait(self, value: float, what: str) -> None:
        try:
            wait_until(lambda: self.same(value), what, TIMEOUT_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}: the sink says {self._log.read_text()[-2_000:]}") from None


def test_redis_is_as_the_node_is_whoever_is_killed(redis_url: str, tmp_path: Path) -> None:
    with (
        LocalCluster(tmp_path / "cluster", NODES[:2], models=MODELS) as cluster,
        closing(RedisRows(redis_url, "ctr")) as rows,
    ):
        cluster.start()
        train, serve, pair = cluster["train-1"], cluster["serve-1"], Pair(cluster, rows, tmp_path)
        with ekko.Publisher(train.local, model="ctr") as publisher, Process(cluster, redis_url, tmp_path) as sink:
            fill(publisher, 1.0)
            pair.wait(1.0, "the first state")
            publisher.delete("item", KEYS[:50])
            fill(publisher, 2.0, KEYS[40:])
            pair.wait(2.0, "updates and deletions")
            sink.kill()
            fill(publisher, 3.0, KEYS[100:])
            publisher.delete("user", KEYS[:10])
            sink.start()
            pair.wait(3.0, "what was published while no sink was there")
            serve.kill()
            for table, dim in (("item", 4), ("user", 2)):
                publisher.publish(table, KEYS, np.full((300, dim), 4.0, np.float32))
            serve.start()
            serve.wait_ready()
            pair.wait(4.0, "what came after the node's kill")
            serve.kill()
            serve.remove_memory()
            serve.start()
            serve.wait_ready()
            fill(publisher, 5.0, KEYS[200:])
            pair.wait(5.0, "what came after the node's memory was lost")
            with closing(redis.Redis.from_url(redis_url)) as server:
                server.flushall()
            publisher.publish("item", KEYS[:1], np.full((1, 4), 6.0, np.float32))
            pair.wait(5.0, "all of it again, in an empty redis")
            said = sink.stop()
            assert said["model"] == "ctr"
            assert said["retries"]


@pytest.mark.long
def test_a_rollback_goes_through(redis_url: str, tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "cluster", NODES, models=MODELS) as cluster, closing(RedisRows(redis_url, "ctr")) as rows:
        cluster.start()
        pair = Pair(cluster, rows, tmp_path)
        with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher, Process(cluster, redis_url, tmp_path):
            fill(publisher, 2.0)
            pair.wait(2.0, "what is right")
            time.sleep(0.5)
            moment = datetime.now(UTC).isoformat()
            time.sleep(0.5)
            fill(publisher, -1_000.0)
            publisher.delete("user", KEYS[:10])
            pair.wait(-1_000.0, "what is wrong")
            arguments = ["rollback", "ctr", "--to", moment, "--yes", "--http", cluster["wit-1"].http, "--json"]
            assert CliRunner().invoke(app, arguments).exit_code == 0
            pair.wait(2.0, "the rollback")
            assert rows.lookup("user", KEYS)[0].min() == 2.0


# --- the command's words --------------------------------------------------------------------------------------------------


def make_plain() -> Sink:
    return PlainSink(PlainStore())


def make_nothing() -> None:
    return None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ctr", "redis://x", "--run-dir", ".", "--config", "x"], "give either --config FILE or --run-dir DIR"),
        (["ctr", "redis://x"], "give either --config FILE or --run-dir DIR"),
        (["ctr", "mongo", "--run-dir", "."], "'mongo' is no sink: expected redis://HOST:PORT/DATABASE, or MODULE:FUNCTION"),
        (["ctr", "redis://x:port/0", "--run-dir", "."], "no address of a redis"),
        (["ctr", "no.such:thing", "--run-dir", "."], "'no.such:thing' cannot be loaded: No module named 'no'"),
        (["ctr", f"{__name__}:no_such", "--run-dir", "."], "cannot be loaded"),
        (["ctr", f"{__name__}:make_nothing", "--run-dir", "."], "returned a NoneType: expected an ekko.serve.Sink"),
        (["no/name", f"{__name__}:make_plain", "--run-dir", "."], "model"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["sink", *arguments])
    assert isinstance(done.exception, ConfigError | ModelError)
    assert said in str(done.exception)
