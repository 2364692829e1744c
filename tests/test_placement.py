"""Partitions with real processes: each row is on exactly the nodes that hold its partition, bit for bit, whatever happens."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.errors import ModelError, PublishError
from ekko.model import SHARDS_DEFAULT
from ekko.store import layout
from ekko.store.kernels.index import shards_of
from sim_cluster.demo.verify import Contents, contents
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until

pytestmark = pytest.mark.processes

PARTITIONS = 2
MODELS = {"ctr": ModelTables({"item": 8, "user": 4}, capacity_rows=1_000, partitions=PARTITIONS)}
HOLDS = {"train-1": [0, 1], "eu-1": [0], "eu-2": [1], "us-1": [1]}
KEYS = np.arange(600, dtype=np.uint64)
DEADLINE_S = 60.0


def partition_of(keys: np.ndarray) -> np.ndarray:
    out = np.empty(len(keys), np.int64)
    shards_of(np.ascontiguousarray(keys, np.uint64), SHARDS_DEFAULT, out)
    return out % PARTITIONS


def part(held: Contents, hold: list[int]) -> dict[str, bytes]:
    """The rows of some partitions, as bytes; of a tombstone the value is blanked, which is whatever was there before."""
    found = {}
    for table, rows in held.items():
        mine = rows[np.isin(partition_of(rows["key"]), hold)].copy()
        mine["data"][(mine["flags"] & layout.FLAG_TOMBSTONE) != 0] = np.zeros(1, mine["data"].dtype)
        found[table] = mine.tobytes()
    return found


def equal(cluster: LocalCluster, holds: dict[str, list[int]]) -> bool:
    """Every node holds what the training node holds of its partitions, and nothing else."""
    origin = contents(cluster["train-1"].run_dir, "ctr")
    return all(part(contents(node.run_dir, "ctr"), [0, 1]) == part(origin, holds[name]) for name, node in cluster.nodes.items())


def publish(publisher: ekko.Publisher, keys: np.ndarray, value: float) -> int:
    with publisher.step() as step:
        step.publish("item", keys, np.full((len(keys), 8), value, np.float32))
        step.publish("user", keys, np.full((len(keys), 4), -value, np.float32))
    return step.stamp


def restart_with(node: NodeProcess, seeds: list[str], hold: list[int]) -> None:
    """Stop a node, if it runs, and start it with another `hold`."""
    if node.running:
        node.stop()
    node.spec = replace(node.spec, hold={"ctr": hold})
    node.write_config(seeds, MODELS, {})
    node.start()
    node.wait_ready()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    roles = {"train-1": "train"}
    nodes = [NodeSpec(name, name[:2], roles.get(name, "serve"), {"ctr": hold}) for name, hold in HOLDS.items()]
    with LocalCluster(tmp_path, nodes, models=MODELS) as cluster:
        cluster.start()
        yield cluster


def test_each_row_is_on_exactly_the_holders(cluster: LocalCluster) -> None:
    seeds = [cluster["train-1"].peers]
    first, second = (KEYS[partition_of(KEYS) == partition] for partition in range(PARTITIONS))
    with closing(ekko.Publisher(cluster["train-1"].local, "ctr")) as publisher:
        for value in range(10):
            publish(publisher, KEYS[value * 50 :], float(value))
        publisher.wait(publisher.delete("item", KEYS[:40]), "all", DEADLINE_S)
        assert equal(cluster, HOLDS)
        _readers_say_what_is_here(cluster["eu-1"], first, second)
        _status_says_who_holds_what(cluster)

        # R21: a wait counts the holders of what its step touched, and no others.
        cluster["eu-1"].pause()
        publisher.wait(publish(publisher, second, 20.0), "all", DEADLINE_S)
        waited = publisher.look(publish(publisher, first, 21.0), "all", 1.0)
        assert waited.lagging + waited.silent == ("eu-1",)  # silent, if all of this took long
        cluster["eu-1"].resume()
        publisher.wait(publisher.last_stamp, "all", DEADLINE_S)

        # Killed, and behind when it returns.
        cluster["eu-1"].kill()
        cluster["us-1"].kill()
        for value in range(5):
            publish(publisher, KEYS, 30.0 + value)
        for name in ("eu-1", "us-1"):
            cluster[name].start()
            cluster[name].wait_ready()
        wait_until(lambda: equal(cluster, HOLDS), "the killed nodes to catch up", DEADLINE_S)

        # More is held after a restart: pulled before the node is ready. Less: the rows are gone, and what they took is free.
        restart_with(cluster["eu-2"], seeds, [0, 1])
        holds = HOLDS | {"eu-2": [0, 1]}
        assert equal(cluster, holds), "ready before the new partition was there"
        with closing(ekko.Reader("ctr", cluster["eu-2"].run_dir)) as reader:
            assert (reader.lookup("item", first)[:, 0] == 34.0).all()
            restart_with(cluster["eu-2"], seeds, [0])
            holds = HOLDS | {"eu-2": [0]}
            wait_until(lambda: equal(cluster, holds), "partition 1 to be gone", DEADLINE_S)
            assert reader.hold == (0,)
            assert (reader.lookup("item", first)[:, 0] == 34.0).all()
            with pytest.raises(ModelError, match=r"in partitions \[1\]"):
                reader.lookup("item", second)
        publisher.wait(publish(publisher, KEYS, 40.0), "all", DEADLINE_S)
        assert equal(cluster, holds)


def _readers_say_what_is_here(node: NodeProcess, first: np.ndarray, second: np.ndarray) -> None:
    with closing(ekko.Reader("ctr", node.run_dir)) as reader:
        # Which writers live is known from the next heartbeat on.
        wait_until(lambda: reader.staleness_ms() is not None, "staleness is known", DEADLINE_S)
        assert (reader.partitions, reader.hold) == (2, (0,))
        assert (reader.partition_of(KEYS) == partition_of(KEYS)).all()
        assert reader.lookup("user", first[-5:]).tolist() == [[-9.0] * 4] * 5
        with pytest.raises(ModelError, match=r"keys of table 'user' are in partitions \[1\] .* holds \[0\] of 2: ask a node"):
            reader.lookup("user", second[:1])
    with closing(ekko.Reader("ctr", node.run_dir, unheld="absent")) as reader:
        rows, stamps = reader.lookup("user", np.array([first[-1], second[-1]]), stamps=True)
        assert rows[:, 0].tolist() == [-9.0, 0.0]
        assert stamps[0] > 0 == stamps[1]
        assert reader.staleness_ms() is not None


def _status_says_who_holds_what(cluster: LocalCluster) -> None:
    for name, node in cluster.nodes.items():
        wait_until(lambda node=node: _holds_known(node) == HOLDS, f"{name} to know who holds what", DEADLINE_S)
        status = node.status()
        assert status["models"]["ctr"]["hold"] == HOLDS[name]
        assert status["counters"]["batches_unknown"] == 0, f"{name} was sent what it does not hold"
        wait_until(lambda node=node: _staleness_ms(node) is not None, f"{name} to know how far it is behind", DEADLINE_S)  # type: ignore[misc]
        assert f'ekko_partitions_held{{model="ctr"}} {len(HOLDS[name])}.0' in node.metrics()


def _staleness_ms(node: NodeProcess) -> float | None:
    known: float | None = node.status()["models"]["ctr"]["staleness_ms"]
    return known


def _holds_known(node: NodeProcess) -> dict[str, object]:
    return {member["node"]: member["hold"].get("ctr") for member in node.status()["members"]}


def test_a_node_holds_what_it_writes(tmp_path: Path) -> None:
    """R22: publishing what is held elsewhere is refused at the call, whole, with the remedy."""
    first, second = (KEYS[partition_of(KEYS) == partition] for partition in range(PARTITIONS))
    with LocalCluster(tmp_path, [NodeSpec("train-1", "eu", "train", {"ctr": [1]})], models=MODELS) as cluster:
        cluster.start()
        node = cluster["train-1"]
        with closing(ekko.Publisher(node.local, "ctr")) as publisher:
            with pytest.raises(
                PublishError, match=r"rows of table 'item' belong to partitions \[0\] .* add them to models.ctr.hold"
            ):
                publish(publisher, KEYS, 1.0)
            stamp = publish(publisher, second, 2.0)
            publisher.wait(stamp, "all", DEADLINE_S)
        with closing(ekko.Reader("ctr", node.run_dir)) as reader:
            assert (reader.lookup("item", second)[:, 0] == 2.0).all()
            with pytest.raises(ModelError, match="partitions"):
                reader.lookup("item", first)


@pytest.mark.long
def test_a_partition_that_nobody_else_holds_is_served(tmp_path: Path) -> None:
    """A node must not wait for ever for somebody to catch up with."""
    nodes = [NodeSpec("train-1", "eu", "train", {"ctr": [0]}), NodeSpec("eu-1", "eu", "serve", {"ctr": [1]})]
    with LocalCluster(tmp_path, nodes, models=MODELS) as cluster:
        begin = time.monotonic()
        cluster.start()
        assert time.monotonic() - begin > 5.0, "it did not look for others at all"
