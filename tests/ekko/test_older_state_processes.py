"""Real nodes that keep an older state: what a baseline's readers see, what a witness keeps over a kill."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.delayed.store import DelayedStore
from ekko.errors import StoreError
from ekko.node.delaying import HEALTHY_DIR, LOG_DIR
from ekko.store import Store
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until
from tests.everywhere import PATIENCE_S, everywhere

pytestmark = pytest.mark.processes
DELAY_S = 2.0
MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000)}
KEYS = np.arange(16, dtype=np.uint64)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    nodes = [
        NodeSpec("train-1", "us", "train"),
        NodeSpec("base-1", "eu", "baseline", settings={"delay": f"{DELAY_S:g}s", "log_bytes": "64MB"}),
        NodeSpec("wit-1", "eu", "witness", settings={"delay": "0s", "log_bytes": "64MB"}),
    ]
    with LocalCluster(tmp_path_factory.mktemp("older"), nodes, models=MODELS) as cluster:
        cluster.start()
        yield cluster


def value(reader: ekko.Reader) -> float:
    return float(reader.lookup("item", KEYS[:1])[0, 0])


def consistent(reader: ekko.Reader) -> bool:
    with suppress(StoreError):
        return reader.lookup("item", KEYS, consistent=True).shape == (len(KEYS), 4)
    return False


def stepping(publisher: ekko.Publisher, stop: threading.Event, told: list[tuple[float, float]]) -> None:
    """Publish one step after the other; each row says which one it is."""
    number = 0
    while not stop.is_set():
        number += 1
        told.append((time.time(), float(number)))  # before any reader can see it
        publisher.publish("item", KEYS, np.full((len(KEYS), 4), number, np.float32))
        time.sleep(0.02)


def test_readers_of_a_baseline_see_what_was_published_a_while_ago_and_nothing_newer(cluster: LocalCluster) -> None:
    base, told, stop = cluster["base-1"], list[tuple[float, float]](), threading.Event()
    with ekko.Publisher(cluster["train-1"].local, model="ctr", timeout=PATIENCE_S) as publisher:
        thread = threading.Thread(target=stepping, args=(publisher, stop, told))
        thread.start()
        try:
            with closing(ekko.Reader("ctr", run_dir=base.run_dir)) as reader:
                wait_until(lambda: value(reader) > 0, "the first step is old enough", PATIENCE_S)
                for _ in range(100):
                    seen, at = value(reader), time.time()
                    published = next(moment for moment, number in told if number == seen)
                    assert at - published >= DELAY_S, "it is newer than it should be"
                    assert at - published < DELAY_S + PATIENCE_S
                    staleness = reader.staleness_ms()
                    assert staleness is not None
                    assert DELAY_S * 1000 <= staleness < (DELAY_S + PATIENCE_S) * 1000
                    time.sleep(0.01)
                wait_until(lambda: consistent(reader), "a look-up while no batch stands still half-way", PATIENCE_S)
        finally:
            stop.set()
            thread.join()
        everywhere(publisher, publisher.publish("item", KEYS, np.full((16, 4), 7.0, np.float32)))
    status = base.status()
    assert status["node"]["role"] == "baseline"
    older = status["delayed"]["models"]["ctr"]
    assert older["until_ms"] <= time.time() * 1000 - DELAY_S * 1000
    assert status["delayed"]["losses"] == 0
    assert "ekko_delayed_until_seconds{" in base.metrics()
    wait_until(
        lambda: base.status()["models"]["ctr"]["tables"]["item"]["reads"]["lookups"] > 100, "reads are counted", PATIENCE_S
    )


def test_a_witness_that_is_killed_in_mid_write_goes_on_where_it_was(cluster: LocalCluster) -> None:
    witness, told, stop = cluster["wit-1"], list[tuple[float, float]](), threading.Event()
    with ekko.Publisher(cluster["train-1"].local, model="ctr", timeout=PATIENCE_S) as publisher:
        thread = threading.Thread(target=stepping, args=(publisher, stop, told))
        thread.start()
        try:
            wait_until(lambda: len(told) > 80, "some steps", PATIENCE_S)
            witness.kill()
            killed = time.time()
            time.sleep(0.5)
            witness.start()
            witness.wait_ready()
            back, more = time.time(), len(told) + 60
            wait_until(lambda: len(told) > more, "some more steps", PATIENCE_S)
        finally:
            stop.set()
            thread.join()
        publisher.wait(publisher.publish("item", KEYS, np.full((16, 4), -1.0, np.float32)), "local")
        with closing(ekko.Reader("ctr", run_dir=witness.run_dir)) as reader:
            wait_until(lambda: value(reader) == -1.0, "a witness's readers see what is current", PATIENCE_S)
    assert witness.status()["delayed"]["losses"] == 0
    witness.stop()
    check_past(witness, told, killed, back)


def check_past(witness: NodeProcess, told: list[tuple[float, float]], killed: float, back: float) -> None:
    """What its store and its log say of moments before and after the kill."""
    current, older = Store.open(witness.run_dir), Store.open(Path(witness.run_dir) / HEALTHY_DIR)
    delayed = DelayedStore.open(current, older, Path(witness.run_dir) / LOG_DIR, 64_000_000)
    try:
        assert delayed.losses == 0
        item = current.models["ctr"].spec.tables["item"].id
        before = after = 0
        for (began, number), (following, _) in itertools.pairwise(told):
            wanted_ms = int(following * 1000) - 1
            if delayed.valid_cut("ctr", wanted_ms) != wanted_ms or following - began < 0.015:
                continue
            versions = delayed.at("ctr", wanted_ms, item, KEYS)
            seen = set(versions.rows.view(np.float32)[:, 0].tolist())
            # The step that began before this moment was stamped before it, unless the publisher was kept waiting.
            assert seen <= {number, number - 1}, (began - killed, seen, number)
            before, after = before + (began < killed), after + (began > back)
        assert before > 20, "moments before the kill are known"
        assert after > 20, "moments after it are, too"
    finally:
        delayed.close()
        current.close()
