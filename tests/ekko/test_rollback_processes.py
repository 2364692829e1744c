"""Real nodes: `ekko rollback` at any of them, from the request to the moment at which writers go on."""

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import ekko
from ekko.cli import app
from ekko.errors import EkkoError, ModelError
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, wait_until
from tests.ekko.settled import WITHIN_S, everywhere, is_lifted, known_moment

pytestmark = pytest.mark.processes
MODELS = {"ctr": ModelTables({"item": 4, "user": 2}, capacity_rows=1_000)}
KEYS = np.arange(64, dtype=np.uint64)
NODES = [
    NodeSpec("train-1", "us", "train"),
    NodeSpec("serve-1", "eu"),
    NodeSpec("wit-1", "eu", "witness", settings={"delay": "0s", "log_bytes": "64MB"}),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("rollback"), NODES, models=MODELS) as cluster:
        cluster.start()
        yield cluster


def rollback(cluster: LocalCluster, node: str, *arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(app, ["rollback", *arguments, "--http", cluster[node].http, "--json"])
    if done.exception is not None:
        raise done.exception
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def values(cluster: LocalCluster, node: str, table: str = "item") -> list[float]:
    with closing(ekko.Reader("ctr", run_dir=cluster[node].run_dir)) as reader:
        return reader.lookup(table, KEYS)[:, 0].tolist()


def fill(publisher: ekko.Publisher, value: float) -> int:
    for table, dim in (("item", 4), ("user", 2)):
        stamp = publisher.publish(table, KEYS, np.full((len(KEYS), dim), value, np.float32))
    return everywhere(publisher, stamp)


def good_and_bad(cluster: LocalCluster, publisher: ekko.Publisher, value: float) -> str:
    """Rows that are right, then wrong, and the moment in between."""
    fill(publisher, value)
    moment = known_moment(cluster["wit-1"], "ctr")
    fill(publisher, -1_000.0)
    publisher.delete("item", KEYS[:8])
    publisher.publish("item", KEYS[:4] + np.uint64(1_000), np.full((4, 4), -1_000, np.float32))
    return moment


def test_what_was_wrong_is_gone_everywhere_and_writers_go_on(cluster: LocalCluster) -> None:
    with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher:
        moment = good_and_bad(cluster, publisher, 1.0)
        known_moment(cluster["wit-1"], "ctr")  # for a forecast nobody waits for what is on its way
        plan = rollback(cluster, "serve-1", "ctr", "--to", moment, "--dry-run")
        assert (plan["rows"], plan["deletions"], plan["at_risk"]) == (132, 4, 0)
        assert values(cluster, "serve-1")[-1] == -1_000.0
        done = rollback(cluster, "serve-1", "ctr", "--to", moment, "--yes")
        assert (done["step"], done["rows"], done["witness"]) == ("done", 132, "wit-1")
        assert rollback(cluster, "serve-1", "--at-risk", str(done["epoch"]))["rows"] == []
        for node in ("train-1", "serve-1", "wit-1"):
            assert values(cluster, node) == [1.0] * 64
            assert values(cluster, node, "user") == [1.0] * 64
            with closing(ekko.Reader("ctr", run_dir=cluster[node].run_dir)) as reader:
                assert not reader.lookup("item", KEYS[:4] + np.uint64(1_000)).any()
        wait_until(lambda: is_lifted(cluster["train-1"], "ctr"), "writers go on here", WITHIN_S)
        restored = publisher.restored()
        assert sum(len(one.keys) for one in restored) == 132
        fill(publisher, 2.0)
        assert values(cluster, "serve-1") == [2.0] * 64
    for node in ("train-1", "serve-1"):
        wait_until(lambda node=node: _last(cluster, node)["over"], "all have heard that it is over", WITHIN_S)
    history = rollback(cluster, "train-1", "ctr")["rollbacks"]
    assert isinstance(history, list)
    assert history[0]["step"] == "done"
    assert _last(cluster, "serve-1") == history[0]
    shown = CliRunner().invoke(app, ["health", "ctr", "--http", cluster["serve-1"].http]).stdout
    assert "by wit-1: 132 rows" in shown


def _last(cluster: LocalCluster, node: str) -> dict[str, object]:
    """The last rollback, as the node has heard of it."""
    known: dict[str, object] = cluster[node].status()["rollbacks"]["ctr"]
    return known


def test_a_part_of_it_is_taken_back(cluster: LocalCluster) -> None:
    with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher:
        moment = good_and_bad(cluster, publisher, 3.0)
        done = rollback(cluster, "train-1", "ctr", "--to", moment, "--table", "user", "--keys", ":32", "--writer", "train-1")
        assert done["rows"] == 32
        assert values(cluster, "serve-1", "user") == [3.0] * 32 + [-1_000.0] * 32
        assert values(cluster, "serve-1")[-1] == -1_000.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cvr", "--to", "5m ago"], "unknown model 'cvr' at node 'serve-1': known: 'ctr'"),
        (["ctr", "--to", "5m ago", "--table", "shop"], "model 'ctr' has no table 'shop': it has 'item', 'user'"),
        (["ctr", "--to", "5m ago", "--writer", "serve-1"], "node 'serve-1' has not written model 'ctr'"),
        (["ctr", "--to", "healthy", "--dry-run"], "was never judged healthy: say a time"),
        (["ctr", "--to", "2030-01-01"], "lies ahead of now"),
        (["ctr", "--table", "item"], "give --to TIME"),
        (["--at-risk", "ff"], "no rollback 00000000000000ff that is done is known here"),
        (["--at-risk", "x"], "epoch is 'x': expected 1 to 16 hexadecimal digits"),
        (["ctr", "--finish"], "no rollback of model 'ctr' waits for a verdict"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(cluster: LocalCluster, arguments: list[str], said: str) -> None:
    with pytest.raises(EkkoError, match=said) as refused:
        rollback(cluster, "serve-1", *arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.long
def test_a_witness_that_is_killed_goes_on(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, NODES, models=MODELS) as cluster:
        cluster.start()
        _kill_in_the_middle(cluster)


def _kill_in_the_middle(cluster: LocalCluster) -> None:
    with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher:
        moment = good_and_bad(cluster, publisher, 4.0)
        cluster["serve-1"].pause()
        status, _ = cluster["wit-1"].post(
            "/rollback", {"model": "ctr", "to_ms": _ms(moment), "tables": [], "writer": "", "keys": None}
        )
        assert status == 200
        wait_until(lambda: _refused(publisher), "writers are stopped", WITHIN_S)
        cluster["wit-1"].kill()
        cluster["serve-1"].resume()
        cluster["wit-1"].start()
        cluster["wit-1"].wait_ready()
        wait_until(lambda: _last(cluster, "serve-1")["over"], "the rollback is over", WITHIN_S)
        assert values(cluster, "serve-1") == [4.0] * 64
        wait_until(lambda: is_lifted(cluster["train-1"], "ctr"), "writers go on here", WITHIN_S)
        publisher.restored()
        fill(publisher, 5.0)


def _ms(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1_000)


def _refused(publisher: ekko.Publisher) -> bool:
    try:
        publisher.publish("user", KEYS[:1], np.zeros((1, 2), np.float32))
    except ModelError as error:
        return "is taken back" in str(error)
    return False


def test_without_a_witness_nobody_knows(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, NODES[:1], models=MODELS) as alone:
        alone.start()
        with pytest.raises(EkkoError, match=r"no witness is alive in this cluster.*run a node with role"):
            rollback(alone, "train-1", "ctr", "--to", "1m ago")
