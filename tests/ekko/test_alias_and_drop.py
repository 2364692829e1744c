"""`ekko alias` and `ekko drop` with real processes: a new generation is loaded beside the old one, switched to, and back."""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ekko
from ekko.errors import ModelError
from ekko.store.manifest import prefix_of
from ekko.store.store import MEMORY_DIR
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until
from tests.everywhere import PATIENCE_S, everywhere

pytestmark = pytest.mark.processes
KEYS = np.arange(500, dtype=np.uint64)
OLD, NEW = "ctr-1", "ctr-2"
DIMS = {OLD: {"item": 4, "user": 2}, NEW: {"item": 6, "user": 3}}
VALUE = {OLD: 1.0, NEW: 2.0}


def run(*arguments: str, at: NodeProcess) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ekko.cli", *arguments, "--http", at.http]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def answer(*arguments: str, at: NodeProcess) -> Any:
    done = run(*arguments, "--json", at=at)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def complaint(*arguments: str, at: NodeProcess) -> str:
    done = run(*arguments, at=at)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[LocalCluster]:
    """A training node and a serving node, with the old generation."""
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path, nodes, models={OLD: ModelTables(DIMS[OLD], capacity_rows=1_000)}) as cluster:
        cluster.start()
        yield cluster


def train(cluster: LocalCluster, model: str) -> None:
    with ekko.Publisher(cluster["train-1"].local, model=model, timeout=PATIENCE_S, tables=DIMS[model]) as publisher:
        with publisher.step() as step:
            for table, dim in DIMS[model].items():
                step.publish(table, KEYS, np.full((len(KEYS), dim), VALUE[model], np.float32))
        everywhere(publisher, step.stamp)


def look_up(run_dir: Path, stop: Event, told: Any) -> None:
    """Look up under load; each answer must be of one generation, whole. Tells which one it is whenever that changes."""
    last = ""
    with ekko.Reader("ctr", run_dir=run_dir, wait=PATIENCE_S) as reader:
        while not stop.is_set():
            rows = reader.lookup_many({"item": KEYS, "user": KEYS})
            values = {float(one) for part in rows.values() for one in (part.min(), part.max())}
            dims = {table: part.shape[1] for table, part in rows.items()}
            generation = next((name for name in DIMS if DIMS[name] == dims), f"a mixture: {dims}")
            if values != {VALUE.get(generation)}:
                generation = f"{generation} with values {values}"
            if generation != last:
                told.put(generation)
                last = generation


def files_of(node: NodeProcess) -> int:
    return len(list(MEMORY_DIR.glob(f"{prefix_of(node.run_dir)}-*")))


def test_a_generation_with_another_schema_takes_over_and_goes_back_under_load(pair: LocalCluster) -> None:
    trainer, server = pair["train-1"], pair["serve-1"]
    train(pair, OLD)
    assert answer("alias", "ctr", OLD, at=trainer)["before"] is None
    context = multiprocessing.get_context("spawn")
    stop, told = context.Event(), [context.Queue(), context.Queue()]
    readers = [
        context.Process(target=look_up, args=(node.run_dir, stop, queue))
        for node, queue in zip((trainer, server), told, strict=True)
    ]
    for reader in readers:
        reader.start()

    def all_see(generation: str) -> None:
        """Each reader saw it next, before anything else: what follows would pass unseen by one that stood still."""
        assert [queue.get(timeout=PATIENCE_S) for queue in told] == [generation] * 2

    try:
        all_see(OLD)
        before = files_of(server)
        train(pair, NEW)  # beside the old one, while it serves
        assert files_of(server) > before

        def stands_for(model: str) -> bool:
            return all(node.status()["aliases"]["ctr"]["model"] == model for node in pair.nodes.values())

        switched = answer("alias", "ctr", NEW, at=server)
        assert (switched["model"], switched["before"], switched["silent"]) == (NEW, OLD, [])
        assert switched["switches_ms"] > time.time() * 1000 - 60_000
        wait_until(lambda: stands_for(NEW), "the alias is switched everywhere", PATIENCE_S)
        all_see(NEW)
        assert "stands for model 'ctr-2'" in complaint("drop", NEW, at=trainer)
        assert "way back of alias 'ctr'" in complaint("drop", OLD, at=trainer)
        assert answer("alias", "ctr", "--back", at=trainer)["model"] == OLD
        wait_until(lambda: stands_for(OLD), "the alias is back everywhere", PATIENCE_S)
        all_see(OLD)
        answer("alias", "ctr", NEW, at=trainer)
        wait_until(lambda: stands_for(NEW), "the alias is switched again", PATIENCE_S)
        all_see(NEW)
        with (
            ekko.Reader(OLD, run_dir=server.run_dir) as reader,
            ekko.Publisher(trainer.local, model=OLD, timeout=PATIENCE_S) as publisher,
        ):
            assert answer("drop", OLD, "--force", at=trainer)["bytes"] > 0
            wait_until(lambda: OLD not in server.status()["models"], "the other node has dropped it", PATIENCE_S)
            with pytest.raises(ModelError, match="'ctr-1' was dropped"):
                reader.lookup("item", KEYS)
            with pytest.raises(ModelError, match="'ctr-1' was dropped"):
                publisher.publish("item", KEYS, np.ones((len(KEYS), 4), np.float32))
        wait_until(lambda: files_of(server) == before, "its memory is given back", PATIENCE_S)
        assert "no way back" in complaint("alias", "ctr", "--back", at=trainer)
    finally:
        stop.set()
        for reader in readers:
            reader.join(PATIENCE_S)
            reader.kill()
            reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
    for queue in told:
        assert queue.empty(), queue.get()  # who has ended has written all that it told


def test_an_alias_that_some_node_could_not_follow_is_refused(pair: LocalCluster) -> None:
    trainer = pair["train-1"]
    train(pair, OLD)
    assert "has no model 'nothing': it has 'ctr-1'" in complaint("alias", "ctr", "nothing", at=trainer)
    assert "there is no alias 'ctr'" in complaint("alias", "ctr", "--back", at=trainer)
    assert "give either" in complaint("alias", "ctr", at=trainer)
    with ekko.Publisher(trainer.local, model="empty", timeout=PATIENCE_S, tables={"item": 4}):
        assert "is empty" in complaint("alias", "ctr", "empty", at=trainer)
    answer("alias", "ctr", OLD, at=trainer)
    assert "already" in complaint("alias", "ctr", OLD, at=trainer)
    with pytest.raises(ModelError, match="'ctr' is an alias, now of model 'ctr-1'"):
        ekko.Publisher(trainer.local, model="ctr", timeout=PATIENCE_S, tables={"item": 4})
    listed = answer("alias", at=pair["serve-1"])
    assert {name: one["model"] for name, one in listed.items()} == {"ctr": OLD}
    assert "alias 'ctr' stands for model 'ctr-1': use --force" in complaint("drop", "ctr-1/user", at=trainer)
    assert "'ctr' (an alias, now of model 'ctr-1': name that)" in complaint("drop", "ctr/user", at=trainer)
    assert answer("alias", "ctr", "--remove", at=trainer)["model"] is None


@pytest.mark.long
def test_a_table_is_dropped_everywhere_and_may_be_begun_again(pair: LocalCluster) -> None:
    trainer, server = pair["train-1"], pair["serve-1"]
    train(pair, OLD)
    assert "has no table 'shop'" in complaint("drop", f"{OLD}/shop", at=trainer)
    with (
        ekko.Reader(OLD, run_dir=server.run_dir) as reader,
        ekko.Publisher(trainer.local, model=OLD, timeout=PATIENCE_S) as publisher,
    ):
        assert reader.lookup("user", [1]).tolist() == [[VALUE[OLD]] * 2]
        assert answer("drop", f"{OLD}/user", at=server)["bytes"] > 0
        wait_until(lambda: "user" not in reader.tables, "the node has dropped it", PATIENCE_S)
        with pytest.raises(ModelError, match="has table 'user' no more, which was dropped"):
            reader.lookup("user", [1])
        wait_until(lambda: "user" not in trainer.status()["models"][OLD]["tables"], "the other one, too", PATIENCE_S)
        with pytest.raises(ModelError, match="table 'user' of model 'ctr-1' was dropped"):
            publisher.publish("user", [1], np.ones((1, 2), np.float32))
        publisher.publish("item", [1], np.full((1, 4), 5.0, np.float32))
        server.stop()
        with ekko.Publisher(trainer.local, model=OLD, timeout=PATIENCE_S, tables={"user": 3}) as again:
            again.publish("user", [9], np.full((1, 3), 6.0, np.float32))
        server.start()  # the configuration still names it, as it was
        server.wait_ready()
        wait_until(lambda: reader.tables.get("user") == 3, "the node has the new one", PATIENCE_S)
        wait_until(
            lambda: reader.lookup("user", [1, 9])[:, 0].tolist() == [0.0, 6.0], "and its rows, and no others", PATIENCE_S
        )


@pytest.mark.long
def test_who_was_away_drops_it_on_return_and_the_name_may_be_used_again(pair: LocalCluster) -> None:
    trainer, server = pair["train-1"], pair["serve-1"]
    train(pair, OLD)
    server.kill()
    answer("drop", OLD, at=trainer)
    with ekko.Publisher(trainer.local, model=OLD, timeout=PATIENCE_S, tables={"item": 3}) as publisher:  # with another schema
        publisher.publish("item", [1], np.full((1, 3), 7.0, np.float32))
        server.start()

        def follows() -> bool:
            with ekko.Reader(OLD, run_dir=server.run_dir, wait=PATIENCE_S) as reader:
                return dict(reader.tables) == {"item": 3} and reader.lookup("item", [1]).tolist() == [[7.0] * 3]

        wait_until(follows, "the node that was away has the new one", PATIENCE_S)
    for node in (trainer, server):
        node.stop()
        node.start()  # the configuration still names it, with its former tables
        node.wait_ready()
        assert dict(ekko.Reader(OLD, run_dir=node.run_dir, wait=PATIENCE_S).tables) == {"item": 3}
