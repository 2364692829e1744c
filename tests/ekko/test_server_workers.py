"""Workers in step with each other, beyond the server's machine: whose key is known, who is late, and who was dropped."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from server_cluster import MODEL, ServerCluster, ServerSpec

from ekko.errors import ConfigError, ModelError, NodeUnreachable, PublishError
from ekko.model import training_name
from ekko.security import generate
from ekko.train import Client, WorkerDropped
from sim_cluster.processes import NodeSpec, wait_until

pytestmark = pytest.mark.processes

KEYS = np.arange(20, dtype=np.uint64)
ONES = np.ones((len(KEYS), 4), np.float32)
SOON_S = 60.0
START_S = 120.0  # with kernels that are not compiled yet, on a busy machine


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerCluster]:
    spec = ServerSpec(mode="sync", workers=2, more='worker_timeout = "8s"', anywhere=True)
    folder = tmp_path_factory.mktemp("keys")
    with ServerCluster(folder, [NodeSpec("train-1", "home", "train")], spec, encrypted=True) as cluster:
        cluster.start()
        wait_until(lambda: cluster.all_served, "every partition to be served", START_S)
        yield cluster


def connected(cluster: ServerCluster, worker: int, key: str = "worker", allow: str = "allowed_keys") -> Client:
    folder = cluster["train-1"].config_path.parents[1]
    keys = {"key_file": folder / f"{key}.key", "allow": folder / allow} if key else {}
    return Client(list(cluster.endpoints.values()), MODEL, worker, timeout=SOON_S, **keys)


def folder_of(cluster: ServerCluster) -> Path:
    return cluster["train-1"].config_path.parents[1]


def test_who_is_let_in_nowhere_is_told_why_and_need_not_wait(home: ServerCluster) -> None:
    folder = folder_of(home)
    generate(folder / "stranger.key")
    with pytest.raises(ConfigError, match="it does not know this worker's key: put its public key into the folder"):
        connected(home, 0, key="stranger")
    with pytest.raises(ConfigError, match="it lets in only who has a key: pass key_file and allow"):
        connected(home, 0, key="")
    (folder / "nobody").mkdir()
    with pytest.raises(ConfigError, match="the folder `allow` has no key of a server"):
        connected(home, 0, allow="nobody")
    with pytest.raises(ConfigError, match=r"^key_file: .*cannot be read"):
        connected(home, 0, key="none")
    wait_until(lambda: home["train-1"].status()["server"]["strangers"], "the stranger to be counted", SOON_S)


def test_who_waits_in_another_thread_ends_when_the_client_is_closed(home: ServerCluster) -> None:
    client = connected(home, 0)
    client.push({"item": (KEYS, ONES)})  # of a round that the other worker does not complete
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.flush)
        wait_until(waiting.running, "the thread to wait", SOON_S)
        client.close()
        with pytest.raises(PublishError, match=r"this client (was closed while it waited|is closed)"):
            waiting.result(SOON_S)


def test_a_worker_that_is_late_is_seen_and_one_that_was_dropped_goes_on(home: ServerCluster) -> None:
    with connected(home, 0) as quick, connected(home, 1) as slow:
        for client in (quick, slow):
            assert client.push({"item": (KEYS, ONES)}) == 1
        assert (quick.pull("item", KEYS) == -1.0).all(), "one step of both"
        with pytest.raises(ModelError, match="worker 1 was not dropped: it can go on as it is"):
            slow.rejoin()
        quick.push({"item": (KEYS, ONES)})  # as in mode "sync" nobody answers before the other one has pushed

        def told() -> bool:  # not of the round before: then both waited for each other, a moment each
            state = home.state("train-1")
            late = f'ekko_server_worker_late_seconds{{model="{MODEL}",worker="1"}}' in home["train-1"].metrics()
            return list(state.get("late_s", ())) == ["1"] and state["oldest_push_s"] > 0 and late

        wait_until(told, "the server to tell who is late", SOON_S)
        quick.flush()
        wait_until(lambda: home.state("train-1")["dropped"] == [1], "the status to tell of it", SOON_S)
        ahead = slow.pull_async({"item": KEYS})
        ahead.result()
        slow.push({"item": (KEYS, ONES)})
        with pytest.raises(WorkerDropped, match=r"worker 1 .* silent for too long.*1 of its pushes.*client\.rejoin\(\)"):
            slow.flush()
        with pytest.raises(WorkerDropped):
            slow.push({})
        assert slow.rejoin() == slow.clock == 2
        assert slow.lost == 1
        for client in (quick, slow):
            assert client.push({"item": (KEYS, ONES)}) == 3
        # Three steps of it, the second one of one worker.
        assert (slow.pull("item", KEYS) == -2.5).all()
        assert (quick.pull("item", KEYS) == -2.5).all()
        wait_until(lambda: home.state("train-1")["dropped"] == [], "nobody to be dropped any more", SOON_S)
    with pytest.raises(PublishError, match="is closed"):
        slow.rejoin()


def test_workers_of_a_model_that_was_dropped_are_told(home: ServerCluster) -> None:
    node = home["train-1"]
    with connected(home, 0) as client:
        assert node.post("/drop", {"model": f"{training_name(MODEL)}/item"})[0] == 200
        client._timeout_s = 2.0

        def told() -> bool:
            with pytest.raises(NodeUnreachable) as refused:
                client.pull("item", KEYS)
            return "'ctr.training' has table 'item' no more, which was dropped" in str(refused.value)

        wait_until(told, "the worker to hear why it waits", SOON_S)  # as long as nobody answers, it is told that
        client._timeout_s = SOON_S
        assert node.post("/drop", {"model": training_name(MODEL)})[0] == 200
        with pytest.raises(ModelError, match=r"does not train model 'ctr': it trains nothing"):
            client.pull("item", KEYS)
    server = node.status()["server"]
    assert server["failures"] == 1
    assert server["running"]
    assert "'ctr.training', was dropped: it is trained no more" in server["error"]
