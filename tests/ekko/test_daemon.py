"""Real nodes in processes of their own: from publisher to reader, over HTTP, through stops, kills and mistakes."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

import ekko
from ekko.codec import encode, rounded
from ekko.errors import ModelError, NodeUnreachable, PublishError
from ekko.local import REOPEN, Failed, PublishStep, Stored
from ekko.metrics import COUNTERS, UPDATE_DELAY
from ekko.model import table_id
from ekko.train.connection import Connection
from p2p.link.compression import TRIALS_MIN
from p2p.replica import RowColumns
from sim_cluster.demo.verify import contents
from sim_cluster.processes import READY_S_MAX, Delays, LocalCluster, ModelTables, NodeProcess, NodeSpec, free_ports, wait_until
from tests.everywhere import PATIENCE_S, everywhere

pytestmark = pytest.mark.processes
F32 = np.float32
MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000)}


def rows(value: float, count: int = 1, dim: int = 4) -> np.ndarray[Any, Any]:
    return np.full((count, dim), value, F32)


def publisher_of(node: NodeProcess, model: str = "ctr", *, timeout: float = PATIENCE_S, **options: Any) -> ekko.Publisher:
    return ekko.Publisher(node.local, model=model, timeout=timeout, **options)


def get(node: NodeProcess, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://{node.http}{path}", timeout=PATIENCE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A training node and a serving node that are ready."""
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path_factory.mktemp("pair"), nodes, models=MODELS) as cluster:
        cluster.start()
        yield cluster


@pytest.fixture
def single(tmp_path: Path) -> Iterator[NodeProcess]:
    """A training node of its own that is ready."""
    with LocalCluster(tmp_path, [NodeSpec("solo", "eu", "train")], models=MODELS) as cluster:
        cluster.start()
        yield cluster["solo"]


# --- two nodes ------------------------------------------------------------------------------------------------------------


def test_a_step_reaches_the_readers_of_both_nodes(pair: LocalCluster) -> None:
    tensor = np.arange(600, dtype=F32).reshape(2, 300)
    with publisher_of(pair["train-1"]) as publisher:
        with publisher.step() as step:
            step.publish("item", [1, 2], rows(0.5, 2))
            step.publish_dense("top.0.weight", tensor)
        everywhere(publisher, step.stamp)
        for node in pair.nodes.values():
            with closing(ekko.Reader("ctr", run_dir=node.run_dir)) as reader:
                out, stamps = reader.lookup("item", np.array([1, 9], np.uint64), stamps=True)
                assert out.tolist() == [[0.5] * 4, [0.0] * 4]
                assert stamps.tolist() == [step.stamp, 0]
                np.testing.assert_array_equal(reader.dense("top.0.weight"), tensor)
        stamp = publisher.delete("item", [1])
        everywhere(publisher, stamp)
        with closing(ekko.Reader("ctr", run_dir=pair["serve-1"].run_dir)) as reader:
            assert reader.lookup("item", np.array([1], np.uint64)).tolist() == [[0.0] * 4]


def test_rows_live_as_long_as_their_table_says_on_both_nodes(pair: LocalCluster) -> None:
    tables, keys = {"item": {"dim": 2, "ttl": "2s"}, "lasting": 2}, np.arange(50, dtype=np.uint64)
    with publisher_of(pair["train-1"], "mortal", tables=tables) as publisher, ExitStack() as readers:

        def published() -> None:
            with publisher.step() as step:
                step.publish("item", keys, rows(1.0, 50, 2))
                step.publish("lasting", keys, rows(1.0, 50, 2))
            everywhere(publisher, step.stamp)

        published()
        seeing = [readers.enter_context(closing(ekko.Reader("mortal", run_dir=node.run_dir))) for node in pair.nodes.values()]

        def seen(table: str) -> list[float]:
            return [float(reader.lookup(table, keys).mean()) for reader in seeing]

        def seen_alive() -> bool:
            published()
            return seen("item") == [1.0, 1.0]

        wait_until(seen_alive, "readers to be quicker than rows expire", PATIENCE_S)
        wait_until(lambda: seen("item") == [0.0, 0.0], "the rows to expire", PATIENCE_S)
        assert seen("lasting") == [1.0, 1.0]
        wait_until(seen_alive, "the rows to come back with an update", PATIENCE_S)


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8"])
def test_rows_of_a_codec_are_the_same_everywhere_and_come_back_as_they_are(pair: LocalCluster, codec: str) -> None:
    values = np.random.default_rng(0).standard_normal((50, 6)).astype(F32)
    keys, name = np.arange(50, dtype=np.uint64), f"as-{codec}"
    with publisher_of(pair["train-1"], name, tables={"item": 6}, codec=codec) as publisher:
        everywhere(publisher, publisher.publish("item", keys, values))
        for node in pair.nodes.values():
            with closing(ekko.Reader(name, run_dir=node.run_dir)) as reader:
                seen = reader.lookup("item", keys)
                assert seen.tobytes() == rounded(codec, values).tobytes()
        before = contents(pair["train-1"].run_dir, name)["item"]["data"]
        everywhere(publisher, publisher.publish("item", keys, seen))  # what was read, again
        for node in pair.nodes.values():
            assert contents(node.run_dir, name)["item"]["data"].tobytes() == before.tobytes()
    with publisher_of(pair["train-1"], name, tables={"more": 3}) as publisher:
        assert publisher.codec == codec, "a table that comes later has its model's codec"
    with pytest.raises(ModelError, match=f"model '{name}' has codec '{codec}', not 'float32'"):
        publisher_of(pair["train-1"], name, tables={"item": 6}, codec="float32")
    assert pair["train-1"].status()["models"][name]["codec"] == codec


def test_a_step_in_another_codec_is_sent_back(pair: LocalCluster) -> None:
    """bfloat16 is as wide as float16: by their size alone such rows would pass."""
    with publisher_of(pair["train-1"], "half", tables={"item": 4}, codec="float16"):
        pass
    column = RowColumns(table_id("item"), np.array([1], np.uint64), encode("bfloat16", rows(1)))
    with closing(Connection(pair["train-1"].local)) as connection:
        for codec, kind in (("bfloat16", Failed), ("float32", Failed), ("float16", Stored)):
            answer = connection.request(PublishStep("half", (column,), codec=codec), PATIENCE_S)
            assert isinstance(answer, kind)
            assert isinstance(answer, Stored) or answer.kind == REOPEN


def test_rows_that_compress_go_compressed_to_another_region(pair: LocalCluster) -> None:
    keys, train, serve = np.arange(5_000, dtype=np.uint64), pair["train-1"], pair["serve-1"]
    before, rejected = train.status()["counters"], serve.status()["rejected"]
    with publisher_of(train, "even", tables={"item": 16}) as publisher:
        values = itertools.count(1)

        def a_dozen_went_compressed() -> bool:
            """More than are tried in two minutes where it does not pay, as one might seem not to that took long by chance."""
            everywhere(publisher, publisher.publish("item", keys, rows(next(values), len(keys), 16)))
            return gained("before") >= 12 * keys.size * (8 + 64)

        def gained(what: str) -> int:
            name = f"compression_bytes_{what}"
            return int(train.status()["counters"][name]) - int(before[name])

        wait_until(a_dozen_went_compressed, "a dozen steps to go compressed", 2 * PATIENCE_S)
        with closing(ekko.Reader("even", run_dir=serve.run_dir)) as reader:
            assert (reader.lookup("item", keys) == next(values) - 1).all()
    assert gained("saved") > 0.6 * gained("before")  # keys are not all alike
    assert serve.status()["rejected"] == rejected


def test_rows_that_hardly_compress_are_left_alone_after_a_few_trials(pair: LocalCluster) -> None:
    train, keys = pair["train-1"], np.arange(1_000, dtype=np.uint64)
    before = train.status()["counters"]
    with publisher_of(train, "noise", tables={"item": 64}) as publisher:
        rng = np.random.default_rng(0)
        for _ in range(30):  # one after the other: a link that is full looks slow, which makes compressing worth its time
            everywhere(publisher, publisher.publish("item", keys, rng.standard_normal((1_000, 64), dtype=F32)))
    counters = train.status()["counters"]
    tried = sum(counters[f"compression_{name}"] - before[f"compression_{name}"] for name in ("messages", "in_vain"))
    assert TRIALS_MIN <= tried < TRIALS_MIN + 12  # and now and then again, at times that double


def test_nodes_that_name_different_codecs_refuse_each_other_in_one_line(tmp_path: Path) -> None:
    first = LocalCluster(
        tmp_path, [NodeSpec("first", "eu", "train")], models={"ctr": ModelTables({"item": 4}, codec="float16")}
    )
    with first as cluster:
        cluster.start()
        other = NodeProcess(NodeSpec("other", "us"), tmp_path / "other", free_ports(3))
        other.write_config([cluster["first"].peers], {"ctr": ModelTables({}, codec="bfloat16")}, {})
        other.start()
        try:
            wait_until(lambda: not other.running, "the newcomer's end", PATIENCE_S)
            last = other.log_path.read_text().splitlines()[-1]
            assert last == (
                "ekko: refused by the cluster: first: model 'ctr' has codec 'float16', not 'bfloat16': "
                "a model's codec is the same on all nodes"
            )
            assert cluster["first"].running
        finally:
            other.stop()
            other.remove_memory()


def test_a_table_and_a_model_may_come_while_nodes_run(pair: LocalCluster) -> None:
    train, serve = pair["train-1"], pair["serve-1"]
    with publisher_of(train, "fresh", tables={"word": 3}, shards=8) as publisher:
        everywhere(publisher, publisher.publish("word", [5], rows(1, 1, 3)))
    with publisher_of(train, "fresh", tables={"pair": 2}) as publisher:
        assert publisher.tables == {"word": 3, "pair": 2}
        everywhere(publisher, publisher.publish("pair", [6], rows(2, 1, 2)))
    with closing(ekko.Reader("fresh", run_dir=serve.run_dir, wait=PATIENCE_S)) as reader:
        assert reader.lookup("word", np.array([5], np.uint64)).tolist() == [[1.0] * 3]
        assert reader.lookup("pair", np.array([6], np.uint64)).tolist() == [[2.0] * 2]
    assert [get(node, "/readyz")[0] for node in (train, serve)] == [200, 200]
    assert serve.status()["models"]["fresh"]["shards"] == 8


def test_what_a_node_refuses(pair: LocalCluster) -> None:
    train, serve = pair["train-1"], pair["serve-1"]
    with pytest.raises(PublishError, match="node 'serve-1' has role 'serve': publish to a node with role 'train'"):
        publisher_of(serve)
    with pytest.raises(ModelError, match="unknown model 'absent' at node 'train-1': known: 'ctr'"):
        publisher_of(train, "absent")
    with pytest.raises(ModelError, match=r"table 'item' of model 'ctr' has dim 4, not dim 5"):
        publisher_of(train, tables={"item": 5})
    with pytest.raises(ModelError, match="model 'ctr' has 64 shards, not 2"):
        publisher_of(train, shards=2)
    with publisher_of(train) as publisher, pytest.raises(PublishError, match="was not published on this node"):
        publisher.wait(1 << 63)


def test_what_a_node_says_over_http(pair: LocalCluster) -> None:
    train, serve = pair["train-1"], pair["serve-1"]
    with publisher_of(train) as publisher:
        told: list[Delays] = []

        def five_steps_are_five_delays() -> bool:
            since = serve.delays().next
            for number in range(5):
                publisher.publish("item", [100 + number], rows(1))
            everywhere(publisher, publisher.last_stamp)
            told.append(serve.delays(since))
            return len(told[-1].delays_ms) == 5

        # What a node that stood still gets by a pull, or in state mode, is no batch.
        wait_until(five_steps_are_five_delays, "each of five steps to be one delay", PATIENCE_S)
        delays = told[-1]
    assert all(0 < delay < PATIENCE_S * 1000 for delay in delays.delays_ms)
    assert serve.delays(delays.next).delays_ms == []

    wait_until(lambda: serve.status()["synced"], "every model has caught up", PATIENCE_S)  # one that came lately, too
    status = serve.status()
    assert (status["ready"], status["synced"], status["waiting_for"]) == (True, True, [])
    assert {member["node"]: member["alive"] for member in status["members"]} == {"serve-1": True, "train-1": True}
    assert status["models"]["ctr"]["tables"]["item"]["rows"] >= 5
    assert status["models"]["ctr"]["staleness_ms"] < PATIENCE_S * 1000
    (peer,) = status["peers"]
    assert peer["rows_in"] >= 5
    assert peer["bytes_in"] >= 5 * (8 + 16)

    lines = serve.metrics().splitlines()
    samples = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    assert samples[f'{UPDATE_DELAY}_count{{origin_region="us"}}'] >= 5
    assert samples['ekko_staleness_ms{model="ctr"}'] < PATIENCE_S * 1000
    assert samples['ekko_peer_rows_total{direction="in",peer="train-1",region="us"}'] >= 5
    assert samples['ekko_peer_bytes_total{direction="in",peer="train-1",region="us"}'] > 0
    assert all(f"{name}_total" in samples for name in COUNTERS)
    for queue in status["queues"]:
        assert samples[f'ekko_queue_fill{{queue="{queue["name"]}"}}'] <= samples[f'ekko_queue_bound{{queue="{queue["name"]}"}}']
    assert samples['ekko_queue_fill{queue="update_cache"}'] >= 5
    assert "# TYPE ekko_rejected_frames_total counter" in lines


def test_the_other_answers(pair: LocalCluster) -> None:
    node = pair["train-1"]
    assert get(node, "/healthz") == (200, b'{"alive":true}')
    assert get(node, "/readyz") == (200, b'{"ready":true,"waiting_for":[]}')
    assert get(node, "/delays?since=x")[0] == 400
    assert get(node, "/delays?since=" + "9" * 30)[0] == 400
    assert get(node, "/nothing")[0] == 404


def test_junk_from_a_peer_is_counted_and_changes_nothing(pair: LocalCluster) -> None:
    serve = pair["serve-1"]
    rejected = sum(serve.status()["rejected"].values())
    with zmq.Context.instance().socket(zmq.DEALER) as peer:
        peer.linger = 1000
        peer.connect(serve.peers)
        for junk in ([b"\x00" * 100], [b"junk", b"junk"], [b""] * 3):
            peer.send_multipart(junk)
        wait_until(lambda: sum(serve.status()["rejected"].values()) >= rejected + 3, "three messages rejected", PATIENCE_S)
    with publisher_of(pair["train-1"]) as publisher:
        everywhere(publisher, publisher.publish("item", [1], rows(1)))
    assert "ekko_rejected_frames_total{" in serve.metrics()


def test_status_on_the_command_line(pair: LocalCluster) -> None:
    serve = pair["serve-1"]
    command = [sys.executable, "-m", "ekko.cli", "status"]
    shown = subprocess.run([*command, "--config", str(serve.config_path)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert shown.returncode == 0, shown.stderr
    for part in ("serve-1", "train-1", "ctr", "item", "open_steps"):
        assert part in shown.stdout
    told = subprocess.run([*command, "--http", serve.http, "--json"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert json.loads(told.stdout)["node"]["id"] == "serve-1"


# --- stops and starts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(single: NodeProcess, number: signal.Signals) -> None:
    os.kill(single.pid, number)
    # `stop` would send another signal, which ends it as one ends any process that is about to leave.
    wait_until(lambda: not single.running, "the node's end", PATIENCE_S)
    assert single.stop() == 0
    records = [json.loads(line) for line in single.log_path.read_text().splitlines()]
    assert records[-1]["event"] == "node_stopped"
    assert {record["this_node"] for record in records} == {"solo"}


@pytest.mark.parametrize("hard", [False, True], ids=["stopped", "killed"])
def test_publisher_and_reader_live_through_a_restart(single: NodeProcess, hard: bool) -> None:
    with publisher_of(single, timeout=2.0) as publisher, closing(ekko.Reader("ctr", run_dir=single.run_dir)) as reader:

        def published(key: int) -> int:
            """Its stamp; a node that stood still for two seconds is asked again, as the message of the exception says."""
            stamps: list[int] = []

            def answered() -> bool:
                with suppress(NodeUnreachable):
                    stamps.append(publisher.publish("item", [key], rows(key)))
                return bool(stamps)

            wait_until(answered, "the node to answer", PATIENCE_S)
            return stamps[0]

        before = published(1)
        if hard:
            single.kill()
        else:
            assert single.stop() == 0
        with pytest.raises(NodeUnreachable, match=r"within 2 s"):
            publisher.publish("item", [2], rows(2))
        assert reader.lookup("item", np.array([1], np.uint64)).tolist() == [[1.0] * 4]
        single.start()
        single.wait_ready()
        assert single.status()["node"]["resumed"]
        after = published(2)
        assert after > before
        out, stamps = reader.lookup("item", np.array([1, 2], np.uint64), stamps=True)
        assert out[:, 0].tolist() == [1.0, 2.0]
        assert stamps.tolist() == [before, after]


def test_a_publisher_tells_a_node_that_lost_its_memory_again(single: NodeProcess) -> None:
    with publisher_of(single, tables={"extra": 2}) as publisher:
        publisher.publish("extra", [1], rows(1, 1, 2))
        single.kill()
        single.remove_memory()
        single.start()
        single.wait_ready()
        assert not single.status()["node"]["resumed"]
        publisher.publish("extra", [2], rows(2, 1, 2))
        with closing(ekko.Reader("ctr", run_dir=single.run_dir)) as reader:
            assert reader.lookup("extra", np.array([1, 2], np.uint64))[:, 0].tolist() == [0.0, 2.0]


# --- mistakes of the operator -------------------------------------------------------------------------------------------------


def failure_of(node: NodeProcess) -> tuple[int, str]:
    """Exit code and the one line of a node that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "ekko.cli", "node", "--config", str(node.config_path)],
        capture_output=True,
        text=True,
        timeout=READY_S_MAX,
    )
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ekko: ")]
    return done.returncode, line


@pytest.mark.parametrize("setting", ["peers", "local", "http"])
def test_a_port_that_is_taken(tmp_path: Path, setting: str) -> None:
    with LocalCluster(tmp_path, [NodeSpec("solo", "eu", "train")]) as cluster, socket.socket() as other:
        node = cluster["solo"]
        address = {"peers": node.peers, "local": node.local, "http": node.http}[setting].removeprefix("tcp://")
        other.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        other.listen()
        code, line = failure_of(node)
    assert code == 2
    assert line.startswith(f"ekko: node.{setting}: ")
    assert address in line
    assert line.endswith("or choose another port")


def test_a_second_node_on_one_run_dir(single: NodeProcess, tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "second", [NodeSpec("second", "eu", "train")]) as cluster:
        second = cluster["second"]
        text = second.config_path.read_text().replace(str(second.run_dir), str(single.run_dir))
        second.config_path.write_text(text)
        code, line = failure_of(second)
    assert code == 2
    assert f"{single.run_dir} is in use by another node (process {single.pid})" in line
    assert get(single, "/readyz")[0] == 200


def test_a_second_node_with_one_id(single: NodeProcess, tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "twin", [NodeSpec("solo", "eu")]) as cluster:
        twin = cluster["solo"]
        text = twin.config_path.read_text().replace("seeds = []", f'seeds = ["{single.peers}"]')
        twin.config_path.write_text(text)
        code, line = failure_of(twin)
    assert code == 3
    assert "node id 'solo' is in use by a live node" in line
    assert get(single, "/readyz")[0] == 200


def test_a_model_that_contradicts_what_is_stored(single: NodeProcess) -> None:
    assert single.stop() == 0
    single.config_path.write_text(single.config_path.read_text().replace('"item" = 4', '"item" = 5'))
    code, line = failure_of(single)
    assert code == 2
    assert line.startswith("ekko: models.ctr: table 'item' of model 'ctr' has dim 4")
    assert "change the configuration" in line


def test_a_step_that_finds_no_room_is_refused_whole(single: NodeProcess) -> None:
    assert single.stop() == 0
    text = single.config_path.read_text()
    limited = text.replace('[models."ctr"]', '[models."ctr"]\ncapacity_bytes = "3MB"')
    assert limited != text
    single.config_path.write_text(limited.replace("3MB", "2MB"))
    code, line = failure_of(single)
    assert (code, "without any row" in line) == (2, True), line
    single.config_path.write_text(limited.replace("3MB", "6MB"))
    single.start()
    single.wait_ready()
    keys = np.arange(40_000, dtype=np.uint64)
    with publisher_of(single) as publisher, closing(ekko.Reader("ctr", run_dir=single.run_dir)) as reader:
        publisher.publish("item", keys[:1_000], rows(1, 1_000))
        with pytest.raises(PublishError, match=r"node 'solo': model 'ctr' is full: .* 39000 new rows need .* is 6000000"):
            publisher.publish("item", keys, rows(2, 40_000))
        publisher.publish("item", keys[:1_000], rows(3, 1_000))  # what is there is updated
        assert reader.lookup("item", keys[:1_001])[:, 0].tolist() == [3.0] * 1_000 + [0.0]
    status = single.status()
    assert status["counters"]["publishes_refused_full"] == 1
    model = status["models"]["ctr"]
    assert model["bytes"] <= model["capacity_bytes"] == 6_000_000
    assert "ekko_publishes_refused_full_total 1.0" in get(single, "/metrics")[1].decode()


def test_a_node_that_is_full_drops_what_comes_and_says_so(tmp_path: Path) -> None:
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path, nodes, models=MODELS) as cluster:
        cluster.start()
        small = cluster["serve-1"]
        assert small.stop() == 0
        text = small.config_path.read_text()
        small.config_path.write_text(text.replace('[models."ctr"]', '[models."ctr"]\ncapacity_bytes = "6MB"'))
        small.start()
        small.wait_ready()
        keys = np.arange(40_000, dtype=np.uint64)
        with publisher_of(cluster["train-1"]) as publisher:
            publisher.publish("item", keys[:1_000], rows(1, 1_000))
            publisher.publish("item", keys, rows(2, 40_000))
            everywhere(publisher, publisher.publish("item", keys[:1_000], rows(3, 1_000)))
        with closing(ekko.Reader("ctr", run_dir=small.run_dir)) as reader:
            held = reader.lookup("item", keys)[:, 0]
        assert set(held[1_000:].tolist()) == {0.0, 2.0}
        assert set(held[:1_000].tolist()) == {3.0}  # what it had is updated
        model, counters = small.status()["models"]["ctr"], small.status()["counters"]
        # Each at least once: what is lost on its way, or due when the link was busy, comes again.
        assert counters["rows_refused_full"] >= np.count_nonzero(held == 0) > 0
        assert model["bytes"] <= model["capacity_bytes"]
        assert model["incomplete_shards"] > 0
        assert cluster["train-1"].status()["models"]["ctr"]["rows"] == 40_000


def test_a_damaged_ledger(single: NodeProcess) -> None:
    assert single.stop() == 0
    (single.run_dir / "ledger").write_bytes(b"\xc1 not a ledger")
    code, line = failure_of(single)
    assert code == 2
    assert "is damaged" in line


def test_a_node_that_finds_no_cluster_is_alive_and_not_ready(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, [NodeSpec("train-1", "us", "train"), NodeSpec("lone", "eu")]) as cluster:
        lone = cluster["lone"]
        lone.start()

        def waits_for_the_cluster() -> bool:
            try:
                return get(lone, "/readyz") == (
                    503,
                    b'{"ready":false,"waiting_for":["the cluster: this node has not caught up with it yet"]}',
                )
            except OSError:
                return False

        wait_until(waits_for_the_cluster, "only the cluster is missing", PATIENCE_S)
        assert get(lone, "/healthz")[0] == 200
        assert lone.stop() == 0
