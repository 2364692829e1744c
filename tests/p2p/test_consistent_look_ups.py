"""R19 in virtual time: of a writer, a consistent look-up shows a whole step, on every node and under every fault."""

import random
from collections.abc import Iterable
from unittest import mock

import numpy as np
import pytest

from ekko.codec import encode
from ekko.errors import StoreError
from ekko.model import ModelSpec, TableSpec
from ekko.serve import consistency
from ekko.serve.consistency import between_batches
from ekko.store.batches import BatchMarks
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p import wire
from p2p.busy import state_mode
from p2p.pulling import outbox
from p2p.replica import RowColumns
from sim_cluster.virtual import VirtualCluster, VirtualNode
from tests.p2p.chaos import CALM, FAULTS, at_rest, form
from tests.p2p.plants import Scenario, expect_caught

KEYS = 40  # of each writer, in each table
WRITERS = {"t1": 0, "t2": 1_000}  # where its keys begin
TABLES = {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}
COLLECT_MS = 400


def step(cluster: VirtualCluster, writer: str, value: float, *, delete: bool) -> None:
    """Give every row of a writer another value, or delete all of them, as one step."""
    node = cluster.nodes[writer]
    keys = np.arange(WRITERS[writer], WRITERS[writer] + KEYS, dtype=np.uint64)
    columns = []
    for spec in TABLES.values():
        rows = encode(spec.codec, np.full((0 if delete else KEYS, spec.dim), value, np.float32))
        columns.append(RowColumns(spec.id, keys, rows.reshape(-1, spec.row_bytes)))
    if node.machine is not None and "ctr" in node.store.models:
        family = node.store.models["ctr"].spec.id
        cluster.ask(writer, lambda number: m.PublishRequested(number, family, tuple(columns)))


def shown(model: ModelStore) -> list[set[float]] | None:
    """The values that a consistent look-up of everything shows of each writer; None: the node is catching up."""
    header = model._header.address

    def gather() -> list[set[float]]:
        seen: list[set[float]] = []
        for begin in WRITERS.values():
            keys = np.arange(begin, begin + KEYS, dtype=np.uint64)
            seen.append({value for table in TABLES for value in model.lookup(table, keys)[0].ravel().tolist()})
        return seen

    try:
        return between_batches("ctr", header, gather)
    except StoreError as error:
        if "catching up: it has rows of steps that have not arrived as a whole" not in str(error):
            raise
        return None


def look(cluster: VirtualCluster, nodes: Iterable[VirtualNode] | None = None) -> tuple[int, int]:
    """Ask all nodes, or these; how many answered, and how many were catching up.

    Raises:
        AssertionError: an answer shows a writer between two of its steps.
    """
    answered = behind = 0
    for node in cluster.nodes.values() if nodes is None else nodes:
        seen = shown(node.store.models["ctr"])
        behind += seen is None
        answered += seen is not None
        for writer, values in zip(WRITERS, seen or [], strict=False):
            assert len(values) == 1, f"seed {cluster.seed}, {cluster.now_ms} ms: {node.name} shows {values} of {writer}"
    return answered, behind


def steps_under_faults(seed: int, partitions: int = 1) -> tuple[int, int]:
    """Two writers overwrite and delete all they have, while messages are cut small, lost and late, tombstones go,
    and a node is away, is killed, or comes back empty.
    """
    model = ModelSpec("ctr", 8, dict(TABLES), partitions=partitions)
    total = np.zeros(2, np.int64)
    with (
        mock.patch.object(wire, "BATCH_BYTES_MAX", 300),
        mock.patch.object(outbox, "CHUNK_BYTES_MAX", 600),
        mock.patch.object(consistency, "DEADLINE_S", 0.0),
        mock.patch.object(consistency, "ATTEMPTS_AT_ONCE", 1_000),
    ):
        cluster = form(seed, FAULTS, model)
        cluster.collect_ms = COLLECT_MS
        cluster.add("t2", "eu", "train", ["t1"])
        cluster.run(6_000)
        for number in range(40):
            writer = ("t1", "t2")[number % 3 == 0]
            step(cluster, writer, float(number + 1), delete=number % 4 == 3)
            if number % 10 == 2:
                away = ("us1", "eu1")[number % 20 == 2]
                cluster.cut = {pair for other in cluster.nodes if other != away for pair in ((away, other), (other, away))}
            elif number % 10 == 7:
                cluster.cut = set()
            elif number % 10 == 8:
                cluster.crash("us2")
                cluster.restart("us2", keep_state=number % 20 == 8)
            for _ in range(30):
                cluster.run(5 + number % 3 * 10)
                total += look(cluster)
        cluster.cut, cluster.options = set(), CALM
        at_rest(cluster)
        # What differs no more in rows may still be pulled: a node knows that it has all of a step only by a claim.
        everybody = len(cluster.nodes), 0
        assert cluster.run_until(lambda: look(cluster) == everybody, 20_000, 100), f"seed {seed}: somebody is catching up"
    answered, behind = total.tolist()
    return answered, behind


@pytest.mark.parametrize(("seed", "partitions"), [(1, 1), pytest.param(2, 1, marks=pytest.mark.long), (3, 2)])
def test_an_answer_shows_whole_steps_under_every_fault(seed: int, partitions: int) -> None:
    answered, behind = steps_under_faults(seed, partitions)
    assert answered > 300  # else nothing was shown
    assert behind > 300


def test_a_node_that_is_behind_raises_until_it_has_all_of_the_step() -> None:
    """Some parts of a step are lost on their way to one node, which is then cut off from whoever could repair that."""
    with (
        mock.patch.object(wire, "BATCH_BYTES_MAX", 300),
        mock.patch.object(consistency, "DEADLINE_S", 0.0),
    ):
        cluster = form(4, CALM, ModelSpec("ctr", 8, dict(TABLES)))
        cluster.run(6_000)
        step(cluster, "t1", 1.0, delete=False)
        at_rest(cluster)
        node = cluster.nodes["us3"].store.models["ctr"]
        wait_until_it_shows(cluster, node, {1.0})
        cluster.options = FAULTS
        step(cluster, "t1", 2.0, delete=False)
        assert cluster.run_until(lambda: shown(node) is None, 1_000, 1), "nothing of the step has arrived"
        cluster.cut = {(other, "us3") for other in cluster.nodes if other != "us3"}
        cluster.run(2_000)
        keys = np.arange(KEYS, dtype=np.uint64)
        values = {value for table in TABLES for value in node.lookup(table, keys)[0].ravel().tolist()}
        assert values == {1.0, 2.0}  # what it would have shown
        assert shown(node) is None
        cluster.cut, cluster.options = set(), CALM
        wait_until_it_shows(cluster, node, {2.0})


def wait_until_it_shows(cluster: VirtualCluster, node: ModelStore, values: set[float]) -> None:
    def shows() -> bool:
        seen = shown(node)
        return seen is not None and seen[0] == values

    assert cluster.run_until(shows, 20_000, 5)


def steps_over_narrow_links(seed: int) -> tuple[int, int]:
    """Rows of both writers come by priority, fast and slowly: how many look-ups of who is fed so answered, how many did not."""
    model = ModelSpec("ctr", 8, dict(TABLES))
    rng = random.Random(seed)
    total = np.zeros(2, np.int64)
    with (
        mock.patch.object(state_mode, "CHUNK_BYTES_MAX", 700),
        mock.patch.object(consistency, "DEADLINE_S", 0.0),
        mock.patch.object(consistency, "ATTEMPTS_AT_ONCE", 1_000),
    ):
        cluster = form(seed, CALM, model)
        cluster.add("t2", "eu", "train", ["t1"])
        cluster.run(6_000)
        for pair in (("eu", "home"), ("home", "us"), ("eu", "us")):
            cluster.set_rate(*pair, 15_000.0)  # a step takes more than the 75 ms in which it would pass whole
        for number in range(40):
            step(cluster, ("t1", "t2")[number % 3 == 0], float(number + 1), delete=number % 8 == 7)
            for _ in range(rng.choice((5, 30, 60))):
                cluster.run(10)
                fed = [node for node in cluster.nodes.values() if is_fed(node)]
                total += look(cluster, fed)
        at_rest(cluster)
    answered, behind = total.tolist()
    return answered, behind


def is_fed(node: VirtualNode) -> bool:
    """Whether a link towards it is in state mode."""
    return node.machine is not None and any(keyspace.feeds for keyspace in node.machine._core.keyspaces.values())


def test_a_link_in_state_mode_shows_whole_steps_between_its_claims() -> None:
    answered, behind = steps_over_narrow_links(1)
    assert answered > 300  # what is due has all come, again and again
    assert behind > 300


def what_is_ahead_is_settled(patch: pytest.MonkeyPatch) -> None:
    """Rows of steps that are not here as a whole are shown."""
    patch.setattr(BatchMarks, "_find_ahead", lambda self: set())


def two_writers_overwrite_and_delete(seed: int) -> None:
    steps_under_faults(seed)


def rows_come_by_priority(seed: int) -> None:
    steps_over_narrow_links(seed)


@pytest.mark.parametrize("scenario", [two_writers_overwrite_and_delete, rows_come_by_priority])
def test_a_planted_bug_is_noticed(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(what_is_ahead_is_settled, scenario, monkeypatch, 3)
