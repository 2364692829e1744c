"""A worker's client beside real servers: what it refuses, what it waits for, and rows that it reads where they lie."""

import copy
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

import ekko.train
from ekko.errors import ConfigError, EkkoError, ModelError, NodeUnreachable, PublishError
from ekko.train import Client
from sim_cluster.processes import NodeSpec, free_ports, wait_until
from tests.ekko.training_processes import TrainingCluster, table_settings

pytestmark = pytest.mark.processes

KEYS = np.arange(100, dtype=np.uint64)
NODES = (NodeSpec("home-1", "home", "train"), NodeSpec("home-2", "home", "train"))
ONES = np.ones((100, 4), np.float32)
MODEL = {
    "mode": "async",
    "partitions": 4,
    "tables": {
        "item": table_settings(4, {"name": "sgd", "lr": 1.0}),
        "user": table_settings(2, {"name": "adagrad", "lr": 0.1}, {"name": "zeros"}),
    },
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    with TrainingCluster(tmp_path_factory.mktemp("servers"), NODES, MODEL) as nodes:
        nodes.start()
        Client(list(nodes.endpoints.values()), "ctr", 0).close()  # servers begin after their nodes: tests do not wait for that
        yield nodes


@pytest.fixture
def client(cluster: TrainingCluster) -> Iterator[Client]:
    with Client(list(cluster.endpoints.values())[:1], "ctr", 0, timeout=60.0) as own:
        yield own


def test_what_is_pushed_is_pulled_by_all(cluster: TrainingCluster, client: Client) -> None:
    before = client.pull("item", KEYS)
    assert before.std() > 0, "the initializer's"
    number = client.push({"item": (KEYS, ONES), "user": (KEYS[:3], ONES[:3, :2])})
    twice = np.concatenate([KEYS[:50], KEYS[:50]])
    assert client.push({"item": (twice, ONES)}, rate=1) == number + 1 == client.clock
    assert client.flush() == client.stamp > 0
    after = client.pull("item", KEYS)
    assert np.array_equal(after[50:], before[50:] - 1)
    np.testing.assert_allclose(after[:50], before[:50] - 3, atol=1e-6)
    assert np.array_equal(client.pull("item", KEYS[::-1]), after[::-1])
    with Client(list(cluster.endpoints.values())[1:], "ctr", 1) as other:
        rows = other.pull_async({"user": KEYS[:4], "item": KEYS}).result()
        assert np.array_equal(rows["item"], after)
        np.testing.assert_allclose(rows["user"][:, 0], [-0.1, -0.1, -0.1, 0])


def test_a_worker_that_starts_again_goes_on_with_its_clock(cluster: TrainingCluster) -> None:
    endpoints = list(cluster.endpoints.values())
    with Client(endpoints, "ctr", 5) as first:
        assert first.clock == 0
        for _ in range(3):
            first.push({})
    with Client(endpoints, "ctr", 5) as second:
        assert second.clock == 3


@pytest.mark.parametrize(
    ("push", "kind", "complaint"),
    [
        ({"films": (KEYS, ONES)}, ModelError, "unknown table 'films': the servers of model 'ctr' have 'item', 'user'"),
        ({"item": (KEYS, ONES[:, :3])}, ModelError, r"gradients of table 'item' have shape \(100, 3\): expected \(100, 4\)"),
        ({"item": (KEYS[:9], ONES)}, PublishError, "table 'item' was given 9 keys and 100 gradients"),
        (
            {"item": (KEYS, ONES.astype(np.float64))},
            ModelError,
            "gradients of table 'item' have dtype float64: expected float32",
        ),
        (
            {"item": (KEYS, ONES * np.nan)},
            PublishError,
            "gradients of table 'item' contain NaN or infinity.*nothing was pushed",
        ),
        ([("item", KEYS)], ModelError, r"a push of something else than a dict, table -> \(keys, gradients\)"),
        ({"item": ONES}, ModelError, r"a push of something else than a dict, table -> \(keys, gradients\)"),
        ({"item": (KEYS.astype(np.float32), ONES)}, ModelError, "keys of table 'item' have dtype float32"),
        ({"item": (-KEYS.astype(np.int64), ONES)}, PublishError, "keys of table 'item' contain -99"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(client: Client, push: dict[str, object], kind: type, complaint: str) -> None:
    before = client.clock
    with pytest.raises(kind, match=complaint):
        client.push(push)  # type: ignore[arg-type]
    assert client.clock == before


def test_other_mistakes_are_said(client: Client, cluster: TrainingCluster) -> None:
    with pytest.raises(ModelError, match="unknown table 'films'"):
        client.pull("films", KEYS)
    with pytest.raises(ModelError, match="a pull of list: expected a dict, table -> keys"):
        client.pull_async([KEYS])  # type: ignore[arg-type]
    for rate in (float("nan"), -1, "0.1"):
        with pytest.raises(PublishError, match=f"rate is {rate!r}"):
            client.push({}, rate=rate)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot be copied or pickled: make one in each process"):
        copy.deepcopy(client)
    endpoint = next(iter(cluster.endpoints.values()))
    for arguments, complaint in (
        ((endpoint, "ctr", 0), "endpoints are 'tcp://.*expected a list"),
        ((["http://x"], "ctr", 0), "endpoints: expected tcp"),
        (([endpoint], "ctr", -1), "worker is -1"),
        ((["tcp://10.0.0.1:7900"], "ctr", 0), "is beyond this machine, and connections there are encrypted"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            Client(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'films'"):
        Client([endpoint], "films", 0, timeout=60.0)
    with pytest.raises(NodeUnreachable, match=r"the servers of model 'ctr' did not take this worker in within 0.3 s"):
        Client([f"tcp://127.0.0.1:{free_ports(1)[0]}"], "ctr", 0, timeout=0.3)
    own = Client([endpoint], "ctr", 7)
    own.close()
    with pytest.raises(PublishError, match="this client is closed"):
        own.pull("item", KEYS)


def test_a_client_that_was_replaced_ends(cluster: TrainingCluster) -> None:
    endpoints = list(cluster.endpoints.values())
    old = Client(endpoints, "ctr", 8)
    with Client(endpoints, "ctr", 8) as new:
        new.push({})
    old.push({})
    with pytest.raises(ModelError, match="worker 8 of model 'ctr' began anew in another process"):
        old.flush()
    old.close()


def test_rows_are_read_where_they_lie(cluster: TrainingCluster, client: Client) -> None:
    client.push({"item": (KEYS, ONES)})
    client.flush()
    far = np.arange(5_000, 5_010, dtype=np.uint64)  # nobody trained them
    with Client(list(cluster.endpoints.values()), "ctr", 2, run_dir=cluster["home-2"].run_dir) as beside:
        assert np.array_equal(beside.pull("item", KEYS), client.pull("item", KEYS))
        mixed = np.concatenate([far[:5], KEYS, far[5:]])
        assert np.array_equal(beside.pull("item", mixed), client.pull("item", mixed))
        for _ in range(10):
            number = beside.push({"item": (KEYS, ONES)})
            beside.flush()
            assert np.array_equal(beside.pull("item", KEYS), client.pull("item", KEYS)), number

        def without_message() -> bool:
            asked = beside.requests
            beside.pull("item", KEYS)
            return beside.requests == asked

        wait_until(without_message, "rows to be read without a message, as they are while the node says that it lives", 60.0)
    with pytest.raises(ConfigError, match=r"run_dir: .* is not that of a node that trains model 'ctr'"):
        Client(list(cluster.endpoints.values()), "ctr", 2, run_dir=cluster.nodes["home-1"].folder)


def test_memory_of_a_node_that_went_away_is_not_read(cluster: TrainingCluster, client: Client) -> None:
    with Client(list(cluster.endpoints.values()), "ctr", 3, run_dir=cluster["home-2"].run_dir, timeout=60.0) as beside:
        beside.pull("item", KEYS)
        os.kill(cluster["home-2"].pid, signal.SIGSTOP)
        try:
            wait_until(lambda: beside._beside is not None and beside._beside.rows({"item": KEYS}) is None, "it is old", 60.0)
        finally:
            os.kill(cluster["home-2"].pid, signal.SIGCONT)
        assert np.array_equal(beside.pull("item", KEYS), client.pull("item", KEYS))


def test_keys_may_change_while_their_rows_are_under_way(client: Client) -> None:
    keys = KEYS.copy()
    expected = client.pull("item", KEYS)
    pull = client.pull_async({"item": keys})
    keys[:] = 0
    client._asked.tick(1e12)  # nobody answers in time: it is asked again
    assert np.array_equal(pull.result()["item"], expected)


class Held:
    """Gradients that are taken once."""

    def __init__(self) -> None:
        self.parts = [("item", KEYS, ONES)]

    def take(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        taken, self.parts = self.parts, []
        return taken

    def finite(self, scale: float) -> bool:
        return True


def test_a_step_that_finds_no_room_keeps_its_gradients(cluster: TrainingCluster) -> None:
    source = Held()
    with Client(list(cluster.endpoints.values()), "ctr", 9, outstanding=1, timeout=60.0) as own:
        before = own.pull("item", KEYS)
        own.attach(source)
        own._timeout_s = 0.2
        for node in cluster.endpoints:
            os.kill(cluster[node].pid, signal.SIGSTOP)
        try:
            own.push({})
            with pytest.raises(PublishError, match="rate is -1"):
                own.step(rate=-1)
            with pytest.raises(NodeUnreachable, match="did not answer a push"):
                own.step()
        finally:
            for node in cluster.endpoints:
                os.kill(cluster[node].pid, signal.SIGCONT)
        own._timeout_s = 60.0
        own.step()
        own.flush()
        assert np.array_equal(own.pull("item", KEYS), before - 1)


def test_names_are_where_users_look_for_them() -> None:
    assert ekko.train.Client is Client
    with pytest.raises(AttributeError):
        _ = ekko.train.Servant
    assert issubclass(ModelError, EkkoError)
