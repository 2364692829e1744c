"""What a publisher sends, and every mistake of its caller, against a real local endpoint with a scripted node behind it."""

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

import ekko
from ekko import endpoint
from ekko.codec import encode
from ekko.endpoint import CLIENT_QUEUE_MAX, REQUESTS_PER_TURN_MAX, LocalEndpoint
from ekko.errors import ConfigError, EkkoError, ModelError, NodeUnreachable, PublishError
from ekko.local import (
    REOPEN,
    Answer,
    Failed,
    MalformedError,
    Open,
    Opened,
    Ping,
    Pong,
    PublishStep,
    Request,
    Stored,
    Wait,
    Waited,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from ekko.model import table_id
from ekko.restored import RestoredAsk, RestoredPage
from ekko.train.connection import COPY_BYTES_MAX, Connection
from ekko.train.publisher import Publisher
from ekko.train.step import _Change, _column_of
from p2p.messages import Scope
from p2p.transport import Buffer

F32 = np.float32


@dataclass
class ScriptedNode:
    """Stands in for the daemon: remembers what came, and answers what the test says."""

    tables: dict[str, int] = field(default_factory=lambda: {"item": 4, "user": 2})
    stamp: int = 100
    lost_memory: bool = False
    silent: bool = False
    gate: threading.Event | None = None  # requests wait for it
    lagging: tuple[str, ...] = ()
    silent_ones: tuple[str, ...] = ()
    codec: str = "float32"
    requests: list[Request] = field(default_factory=list)

    def handle_request(self, number: int, request: Request) -> Answer | None:
        if isinstance(request, RestoredAsk):
            return RestoredPage(0, 0)
        self.requests.append(request)
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.silent:
            return None
        match request:
            case Open(model="absent"):
                raise ModelError("unknown model 'absent'")
            case Open(tables=tables):
                self.lost_memory = False
                self.tables.update({name: dim for name, dim, _ in tables or ()})
                return Opened("n1", "eu", 64, self.tables, {}, 7, self.codec)
            case PublishStep() if self.lost_memory:
                return Failed(REOPEN, "unknown table")
            case PublishStep():
                self.stamp += 1
                return Stored(self.stamp)
            case Wait():
                return Waited(self.lagging, self.silent_ones)
            case Ping():
                return Pong("n1")

    @property
    def steps(self) -> list[PublishStep]:
        return [request for request in self.requests if isinstance(request, PublishStep)]

    def rows(self, table: str, width: int) -> dict[int, list[float] | None]:
        """Key -> row of the last step's column of one table; None for a delete."""
        (column,) = [c for c in self.steps[-1].columns if c.table == table_id(table)]
        rows = column.rows.view(F32).reshape(-1, width)
        assert len(set(column.keys.tolist())) == len(column.keys)
        return {int(key): rows[i].tolist() if i < len(rows) else None for i, key in enumerate(column.keys)}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ScriptedNode]:
    script = ScriptedNode()
    with serving(script, tmp_path):
        yield script


@contextlib.contextmanager
def serving(handler: endpoint.Handler, folder: Path) -> Iterator[LocalEndpoint]:
    """A local endpoint in a thread of its own."""
    ready = threading.Event()
    served = LocalEndpoint(address_of(folder), handler)
    loop: asyncio.AbstractEventLoop
    enough: asyncio.Event

    async def serve() -> None:
        nonlocal loop, enough
        loop, enough = asyncio.get_running_loop(), asyncio.Event()
        served.start()
        ready.set()
        await enough.wait()  # also where it is set at once
        served.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    try:
        yield served
    finally:
        loop.call_soon_threadsafe(enough.set)
        thread.join()


def address_of(folder: Path) -> str:
    return f"ipc://{folder}/local"


@pytest.fixture
def publisher(node: ScriptedNode, tmp_path: Path) -> Iterator[Publisher]:
    with ekko.Publisher(address_of(tmp_path), model="ctr", tables={"item": 4, "user": 2}) as publisher:
        yield publisher


def rows(count: int, dim: int = 4) -> np.ndarray[Any, Any]:
    return np.arange(count * dim, dtype=F32).reshape(count, dim)


def test_a_batch_of_one_table(node: ScriptedNode, publisher: Publisher) -> None:
    before = time.monotonic_ns()
    assert publisher.publish("item", [5, 3], rows(2)) == 101
    assert node.rows("item", 4) == {5: [0, 1, 2, 3], 3: [4, 5, 6, 7]}
    assert before <= node.steps[0].published_ns <= time.monotonic_ns()
    assert publisher.last_stamp == 101


def test_a_step_is_one_batch_under_one_stamp(node: ScriptedNode, publisher: Publisher) -> None:
    tensor = np.arange(600, dtype=F32).reshape(2, 300)
    with publisher.step() as step:
        step.publish("item", [1], rows(1))
        step.delete("user", [9])
        step.publish_dense("top.0.weight", tensor)
    assert step.stamp == 101
    assert len(node.steps) == 1
    assert node.rows("user", 2) == {9: None}
    dense = list(node.rows("_dense", 256).values())
    assert len(dense) == 3
    np.testing.assert_array_equal(np.concatenate(dense)[:600], tensor.reshape(-1))
    assert [(t.name, t.shape, t.dtype) for t in node.steps[0].tensors] == [("top.0.weight", (2, 300), "float32")]


@pytest.mark.parametrize("count", [10, COPY_BYTES_MAX // 16 + 1], ids=["copied", "handed over"])
def test_arrays_are_the_callers_again_when_publish_returns(node: ScriptedNode, publisher: Publisher, count: int) -> None:
    keys, rows = np.arange(count, dtype=np.uint64), np.ones((count, 4), F32)
    publisher.publish("item", keys, rows)
    keys[:], rows[:] = 0, 2
    column = node.steps[0].columns[0]
    assert np.array_equal(column.keys, np.arange(count))
    assert (column.rows.view(F32) == 1).all()


def test_an_exception_inside_a_step_publishes_nothing(node: ScriptedNode, publisher: Publisher) -> None:
    with pytest.raises(ZeroDivisionError), publisher.step() as step:  # noqa: PT012 - the block is what is tested
        step.publish("item", [1], rows(1))
        _ = 1 / 0
    assert node.steps == []
    with pytest.raises(PublishError, match="not published"):
        _ = step.stamp
    with pytest.raises(PublishError, match="has ended"):
        step.delete("item", [1])


def test_a_step_takes_the_values_at_the_call(node: ScriptedNode, publisher: Publisher) -> None:
    buffer, keys = rows(1), np.array([1], np.uint64)
    with publisher.step() as step:
        step.publish("item", keys, buffer)
        buffer += 100
        keys += np.uint64(1)
    assert node.rows("item", 4) == {1: [0, 1, 2, 3]}


def test_of_duplicate_keys_the_last_counts(node: ScriptedNode, publisher: Publisher) -> None:
    publisher.publish("item", [1, 2, 1], rows(3))
    assert node.rows("item", 4) == {2: [4, 5, 6, 7], 1: [8, 9, 10, 11]}


def test_of_publish_and_delete_the_later_call_counts(node: ScriptedNode, publisher: Publisher) -> None:
    with publisher.step() as step:
        step.publish("item", [1, 2], rows(2))
        step.delete("item", [2, 3])
        step.publish("item", [3], rows(1))
    assert node.rows("item", 4) == {1: [0, 1, 2, 3], 2: None, 3: [0, 1, 2, 3]}


@given(
    calls=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 5), min_size=1, max_size=6)), min_size=1, max_size=6),
)
def test_a_step_means_its_calls_in_order(calls: list[tuple[bool, list[int]]]) -> None:
    expected: dict[int, float | None] = {}
    changes = []
    for number, (live, keys) in enumerate(calls):
        values = np.array([[number * 10 + i] for i in range(len(keys))], F32)
        changes.append(_Change(np.array(keys, np.uint64), encode("float32", values) if live else None, None))
        expected.update({key: float(values[i, 0]) if live else None for i, key in enumerate(keys)})
    column, _ = _column_of(1, changes)
    values = column.rows.view(F32).reshape(-1)
    got = {int(key): float(values[i]) if i < len(values) else None for i, key in enumerate(column.keys)}
    assert len(column.keys) == len(got)
    assert got == expected


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8"])
def test_rows_leave_in_the_codec_that_the_node_names(node: ScriptedNode, tmp_path: Path, codec: str) -> None:
    node.codec = codec
    tensor = np.full((3,), 1 / 3, F32)
    with ekko.Publisher(address_of(tmp_path), model="ctr") as publisher:
        assert publisher.codec == codec
        values = np.linspace(-1, 1, 12, dtype=F32).reshape(3, 4)
        with publisher.step() as step:
            step.publish("item", [1, 2, 1], values)
            step.delete("item", [9])
            step.publish_dense("w", tensor)
    (sent,) = node.steps
    assert sent.codec == codec
    item, dense = sent.columns
    assert item.keys.tolist() == [2, 1, 9]
    assert item.rows.tobytes() == encode(codec, values)[1:].tobytes()
    assert dense.rows.view(F32)[0, :3].tolist() == tensor.tolist(), "dense tensors are float32 whatever the codec"


def test_what_a_codec_cannot_hold_is_refused(node: ScriptedNode, tmp_path: Path) -> None:
    node.codec = "float16"
    values = rows(3)
    values[1, 2] = -65_520
    with ekko.Publisher(address_of(tmp_path), model="ctr") as publisher:
        with pytest.raises(PublishError, match=r"from 65520 on, which float16 cannot hold: 1 of 3 rows, .* \(key 8\)"):
            publisher.publish("item", [7, 8, 9], values)
        values[1, 2] = np.nan
        with pytest.raises(PublishError, match="NaN or infinity: 1 of 3 rows"):
            publisher.publish("item", [7, 8, 9], values)
        assert node.steps == []
        values[1, 2] = -65_519
        publisher.publish("item", [7, 8, 9], values)
    assert len(node.steps) == 1


def test_a_codec_that_changed_meanwhile_is_an_error_and_not_a_wrong_row(node: ScriptedNode, publisher: Publisher) -> None:
    publisher.publish("item", [1], rows(1))
    node.codec, node.lost_memory = "bfloat16", True
    with pytest.raises(PublishError, match="now has model 'ctr' in codec 'bfloat16', this publisher began with 'float32'"):
        publisher.publish("item", [1], rows(1))
    assert len(node.steps) == 2


def test_an_unknown_codec_is_refused_before_any_node_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="codec 'fp16': there are 'float32'"):
        ekko.Publisher(address_of(tmp_path), model="ctr", codec="fp16", timeout=60)


def test_an_empty_batch_is_no_step(node: ScriptedNode, publisher: Publisher) -> None:
    assert publisher.publish("item", [], []) == 7  # the node's last stamp, from before
    assert publisher.publish("item", np.empty(0, np.int64), np.empty((0, 4), F32)) == 7
    assert publisher.delete("item", []) == 7
    with publisher.step() as step:
        pass
    assert step.stamp == 7
    publisher.publish("item", [1], rows(1))
    assert publisher.publish("item", [], []) == 101
    assert len(node.steps) == 1


def test_significance_travels_with_its_row(node: ScriptedNode, publisher: Publisher) -> None:
    with publisher.step() as step:
        step.publish("item", [1, 2, 1], rows(3), significance=[0.1, 0.2, 0.3])
        step.delete("item", [7])
    (column,), (significance,) = node.steps[0].columns, node.steps[0].significance
    assert significance is not None
    told = dict(zip(column.keys.tolist(), significance.tolist(), strict=True))
    assert told == pytest.approx({2: 0.2, 1: 0.3, 7: np.nan}, nan_ok=True), "of what is deleted, nobody said anything"
    publisher.publish("item", [3], rows(1))
    assert node.steps[1].significance == (None,)


def test_torch_tensors_are_taken(node: ScriptedNode, publisher: Publisher) -> None:
    torch = pytest.importorskip("torch")
    publisher.publish("item", torch.tensor([4, 2]), torch.nn.Parameter(torch.ones(2, 4)))
    assert node.rows("item", 4) == {4: [1.0] * 4, 2: [1.0] * 4}
    with pytest.raises(ModelError, match=r"bfloat16.*use \.float\(\)"):
        publisher.publish("item", [1], torch.ones(1, 4, dtype=torch.bfloat16))
    with pytest.raises(ModelError, match=r"float64.*astype"):
        publisher.publish("item", [1], torch.ones(1, 4, dtype=torch.float64))
    with pytest.raises(ModelError, match=r"device meta.*\.cpu\(\)"):
        publisher.publish("item", [1], torch.ones(1, 4, device="meta"))


NAN = np.array([[1, 2, 3, 4], [1, np.nan, 3, 4]], F32)
MISTAKES: list[tuple[Callable[[Publisher], object], type[EkkoError], str]] = [
    (lambda p: p.publish("itme", [1], rows(1)), ModelError, r"unknown table 'itme' of model 'ctr': known: item, user"),
    (lambda p: p.publish("_dense", [1], rows(1, 256)), ModelError, r"unknown table '_dense'"),
    (lambda p: p.delete("itme", [1]), ModelError, r"unknown table 'itme'"),
    (lambda p: p.publish("item", [1], rows(1, 5)), ModelError, r"shape \(1, 5\): expected \(1, 4\)"),
    (lambda p: p.publish("item", [1], rows(1)[0]), ModelError, r"shape \(4,\): expected \(1, 4\)"),
    (
        lambda p: p.publish("item", [1], [[1.0, 2.0, 3.0, 4.0]]),
        ModelError,
        r"float64: expected float32; use \.astype\(np\.float32\)",
    ),
    (lambda p: p.publish("item", [1], rows(1).astype(np.float16)), ModelError, r"float16: expected float32"),
    (lambda p: p.publish("item", [1], rows(1).astype(">f4")), ModelError, r">f4: expected float32"),
    (lambda p: p.publish("item", [1], [[1], [2, 3]]), ModelError, r"are not an array"),
    (lambda p: p.publish("item", [1, 2, 3], NAN), PublishError, r"3 keys and 2 rows"),
    (lambda p: p.publish("item", [1, 8], NAN), PublishError, r"NaN or infinity: 1 of 2 rows, first at index 1 \(key 8\)"),
    (lambda p: p.publish("item", [1, 8], NAN / 0), PublishError, r"NaN or infinity: 2 of 2 rows"),
    (lambda p: p.publish("item", [1.0], rows(1)), ModelError, r"keys .* dtype float64"),
    (lambda p: p.publish("item", [True], rows(1)), ModelError, r"keys .* dtype bool"),
    (lambda p: p.publish("item", ["a"], rows(1)), ModelError, r"keys .* dtype <U1"),
    (lambda p: p.publish("item", [[1]], rows(1)), ModelError, r"keys .* shape \(1, 1\)"),
    (lambda p: p.publish("item", [-3], rows(1)), PublishError, r"keys .* contain -3"),
    (lambda p: p.publish("item", [1 << 70], rows(1)), ModelError, r"keys .* dtype object"),
    (lambda p: p.publish("item", [1], rows(1), significance=[1.0, 2.0]), PublishError, r"significance .* shape \(2,\)"),
    (lambda p: p.publish("item", [1], rows(1), significance=[np.nan]), PublishError, r"significance .* NaN"),
    (lambda p: p.publish("item", [1], rows(1), significance=[-1.0]), PublishError, r"significance .* negative"),
    (lambda p: p.publish_dense("w", np.ones(3)), ModelError, r"float64: only float32 .*astype"),
    (lambda p: p.publish_dense("w", np.array([np.inf], F32)), PublishError, r"tensor 'w' contains NaN or infinity"),
    (lambda p: p.publish_dense("a b", np.ones(1, F32)), ModelError, r"tensor name 'a b' is not usable"),
    (lambda p: p.wait(5, scope="planet"), PublishError, r"expected 'local', 'region' or 'all'"),  # type: ignore[arg-type]
    (lambda p: p.wait(-5), PublishError, r"expected what publish\(\) returned"),
    (lambda p: p.wait(None), PublishError, r"expected what publish\(\) returned"),  # type: ignore[arg-type]
    (lambda p: p.wait(5, timeout=-1), PublishError, r"timeout is -1"),
]


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(("call", "kind", "complaint"), MISTAKES)
def test_a_mistake_is_told_at_the_call_and_publishes_nothing(
    node: ScriptedNode, publisher: Publisher, call: Callable[[Publisher], object], kind: type[EkkoError], complaint: str
) -> None:
    with np.errstate(all="ignore"), pytest.raises(kind, match=complaint) as caught:
        call(publisher)
    assert "\n" not in str(caught.value)
    assert node.steps == []
    publisher.publish("item", [1], rows(1))  # and the publisher lives on


def test_a_mistake_inside_a_step_publishes_nothing(node: ScriptedNode, publisher: Publisher) -> None:
    with pytest.raises(PublishError, match="NaN"), publisher.step() as step:  # noqa: PT012 - the block is what is tested
        step.publish("user", [1], rows(1, 2))
        step.publish("item", [1, 8], NAN)
    assert node.steps == []


def test_a_tensor_keeps_its_shape(node: ScriptedNode, publisher: Publisher) -> None:
    publisher.publish_dense("w", np.float32(3.0))  # a scalar is a tensor too
    assert node.steps[0].tensors[0].shape == ()
    with pytest.raises(ModelError, match=r"shape \(2,\): it was published with shape \(\)"):
        publisher.publish_dense("w", np.ones(2, F32))


def test_what_is_wrong_with_the_publisher_itself(node: ScriptedNode, tmp_path: Path) -> None:
    address = address_of(tmp_path)
    with pytest.raises(ModelError, match="unknown model 'absent'"):
        ekko.Publisher(address, model="absent")
    with pytest.raises(ModelError, match=r"table 'item' has dim 1\.5"):
        ekko.Publisher(address, model="ctr", tables={"item": 1.5})  # type: ignore[dict-item]
    with pytest.raises(ModelError, match="reserved"):
        ekko.Publisher(address, model="ctr", tables={"_dense": 256})
    with pytest.raises(ModelError, match="model name 'c t r' is not usable"):
        ekko.Publisher(address, model="c t r", tables={})
    with pytest.raises(ModelError, match="shards = 0"):
        ekko.Publisher(address, model="ctr", tables={}, shards=0)
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT or ipc://PATH"):
        ekko.Publisher("127.0.0.1:7700", model="ctr")
    with pytest.raises(ConfigError, match="timeout is 0"):
        ekko.Publisher(address, model="ctr", timeout=0)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "ipc://{folder}/nobody"])
def test_nobody_there(tmp_path: Path, address: str) -> None:
    started = time.monotonic()
    with pytest.raises(NodeUnreachable, match=r"no node answers at .* within 0\.2 s: start it"):
        ekko.Publisher(address.format(folder=tmp_path), model="ctr", timeout=0.2)
    assert time.monotonic() - started < 20


def test_a_node_that_stops_answering(node: ScriptedNode, tmp_path: Path) -> None:
    with ekko.Publisher(address_of(tmp_path), model="ctr", timeout=60) as publisher:
        node.silent = True
        publisher._timeout = 0.5  # not for the answers that come
        with pytest.raises(NodeUnreachable, match=r"did not answer within 0\.5 s"):
            publisher.publish("item", [1], rows(1))
        node.silent, publisher._timeout = False, 60
        # Whenever the node comes to the first: it is not its answer that this gets.
        assert publisher.publish("item", [1], rows(1)) == node.stamp


def test_a_node_that_lost_its_memory_is_told_again(node: ScriptedNode, publisher: Publisher) -> None:
    node.lost_memory = True
    assert publisher.publish("item", [1], rows(1)) == 101
    assert [type(request) for request in node.requests] == [Open, PublishStep, Open, PublishStep]


def test_waiting(node: ScriptedNode, publisher: Publisher) -> None:
    stamp = publisher.publish("item", [1], rows(1))
    assert publisher.wait(stamp, "all", timeout=1.0) == ()
    assert node.requests[-1] == Wait("ctr", stamp, Scope.ALL, 1000, named=True)
    node.lagging = ("eu-2", "us-1")
    with pytest.raises(TimeoutError, match=r"not yet visible on eu-2, us-1 after 1 s$"):
        publisher.wait(stamp, "region", timeout=1.0)
    assert publisher.wait(0) == ()  # nothing published is visible everywhere


def test_a_wait_says_whom_nobody_waited_for(node: ScriptedNode, publisher: Publisher) -> None:
    node.silent_ones = ("as-1", "us-2")
    assert publisher.wait(1, "all", timeout=1.0) == ("as-1", "us-2")
    node.lagging = ("eu-2",)
    with pytest.raises(TimeoutError, match="visible on eu-2 after 1 s; silent, and not waited for: as-1, us-2"):
        publisher.wait(1, "all", timeout=1.0)


def test_publisher_and_node_of_neighbouring_releases_wait(
    node: ScriptedNode, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.silent_ones = ("as-1",)
    publisher._silent_named = False  # as the release before asks
    assert publisher.wait(1, "all", timeout=1.0) == ()
    node.lagging = ("eu-2",)
    with pytest.raises(TimeoutError, match=r"eu-2, as-1 \(silent\) after"):
        publisher.wait(1, "all", timeout=1.0)
    node.lagging = ()
    publisher._silent_named = True
    decode = endpoint.decode_request

    def refuse_version_2(frames: Sequence[Buffer]) -> tuple[int, Request]:
        number, request = decode(frames)
        if isinstance(request, Wait) and request.named:
            raise MalformedError("local protocol version 2 met version 1: use one release of ekko for both", number)
        return number, request

    monkeypatch.setattr(endpoint, "decode_request", refuse_version_2)
    before = len(node.requests)
    assert publisher.wait(1, "all", timeout=1.0) == ()
    assert publisher.wait(1, "all", timeout=1.0) == ()
    assert [request.named for request in node.requests[before:] if isinstance(request, Wait)] == [False, False]


def test_a_closed_publisher_says_so(publisher: Publisher) -> None:
    publisher.close()
    publisher.close()
    for call in (lambda: publisher.publish("item", [1], rows(1)), lambda: publisher.wait(1), publisher.step):
        with pytest.raises(PublishError, match="publisher is closed"):
            call()


def test_threads_share_a_publisher(node: ScriptedNode, publisher: Publisher) -> None:
    stamps: list[int] = []

    def work(base: int) -> None:
        stamps.extend(publisher.publish("item", [base + i], rows(1)) for i in range(50))

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stamps) == list(range(101, 301))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_gets_connections_of_its_own(node: ScriptedNode, publisher: Publisher) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            publisher.publish("item", [1], rows(1))
            publisher.close()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert publisher.publish("item", [2], rows(1)) == 102


def test_a_step_over_the_message_limit_is_refused(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ekko.train.connection.LOCAL_MESSAGE_BYTES_MAX", 1000)
    with pytest.raises(PublishError, match="one step may have 1000: publish it as several steps"):
        publisher.publish("item", np.arange(100), rows(100))
    publisher.publish("item", [1], rows(1))


def test_junk_on_the_endpoint_changes_nothing(node: ScriptedNode, publisher: Publisher, tmp_path: Path) -> None:
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.linger = 1000
        socket.connect(address_of(tmp_path))
        for junk in ([b""], [b"\xc1"], [b"a" * 100, b""], [b""] * 50):
            socket.send_multipart(junk)
    assert publisher.publish("item", [1], rows(1)) == 101


def test_a_burst_is_served_to_its_end(node: ScriptedNode, tmp_path: Path) -> None:
    """More requests than one turn serves, all there before the first is answered: no later signal brings the rest."""
    clients, each = 6, CLIENT_QUEUE_MAX // 2
    assert clients * each > 2 * REQUESTS_PER_TURN_MAX
    node.gate = threading.Event()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(zmq.Context.instance().socket(zmq.DEALER)) for _ in range(clients)]
        for socket in sockets:
            socket.linger = 0
            socket.connect(address_of(tmp_path))
            for number in range(each):
                socket.send_multipart(encode_request(number, Ping()))
        for socket in sockets:  # a connection takes its messages in order: this one's handshake is over
            assert socket.poll(60_000, zmq.POLLOUT)
        node.gate.set()
        for socket in sockets:
            for number in range(each):
                assert socket.poll(60_000, zmq.POLLIN), f"no answer to request {number}"
                assert decode_answer(socket.recv()) == (number, Pong("n1"))


def test_a_late_answer_to_an_older_request_is_dropped(tmp_path: Path) -> None:
    with zmq.Context.instance().socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(address_of(tmp_path))

        def answer() -> None:
            client, header = router.recv_multipart()
            number, _ = decode_request([header])
            for each, stamp in ((number - 1, 66), (number, 77)):
                router.send_multipart([client, encode_answer(each, Stored(stamp))])

        thread = threading.Thread(target=answer)
        thread.start()
        with contextlib.closing(Connection(address_of(tmp_path))) as connection:
            assert connection.request(Ping(), 60.0) == Stored(77)
        thread.join()


def step_frames() -> list[bytes]:
    """A request of three rows of table 3."""
    column, _ = _column_of(3, [_Change(np.arange(3, dtype=np.uint64), encode("float32", rows(3)), None)])
    return [bytes(frame) for frame in encode_request(5, PublishStep("ctr", (column,)))]


def test_columns_are_aligned_wherever_their_frames_begin() -> None:
    header, *frames = step_frames()
    shifted = [memoryview(b"x" + frame)[1:] for frame in frames]
    _, step = decode_request([header, *shifted])
    assert isinstance(step, PublishStep)
    assert step.columns[0].keys.flags.aligned
    assert step.columns[0].keys.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda frames: [*frames, b""], "more frames than its header says"),
        (lambda frames: frames[:-1], "fewer frames than its header says"),
        (lambda frames: [*frames[:-1], frames[-1][:-4]], "44 bytes where 48 were announced"),
    ],
)
def test_a_step_and_its_header_must_agree(damage: Callable[[list[bytes]], list[bytes]], complaint: str) -> None:
    with pytest.raises(MalformedError, match=complaint) as caught:
        decode_request(damage(step_frames()))
    assert caught.value.number == 5


def test_another_release_is_told_so(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ekko.train.connection.encode_request", lambda number, _: [msgpack.packb([3, number, "publish", {}])])
    with pytest.raises(PublishError, match="version 3 met version 2: use one release"):
        publisher.publish("item", [1], rows(1))


def test_a_bug_in_the_node_costs_one_request(node: ScriptedNode, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int, request: Request) -> Answer | None:
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(node, "handle_request", fail)
        with pytest.raises(PublishError, match="the node failed at this request: KeyError"):
            publisher.publish("item", [1], rows(1))
    assert publisher.publish("item", [1], rows(1)) == 101


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_decoding_junk_raises_only_malformed(frames: list[bytes]) -> None:
    for call in (lambda: decode_request(frames), lambda: decode_answer(frames[0] if frames else b"")):
        with pytest.raises(MalformedError):
            call()


@given(st.data())
def test_a_damaged_request_raises_only_malformed(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in step_frames()]
    frame = data.draw(st.sampled_from(frames))
    if data.draw(st.booleans()):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    else:
        del frame[data.draw(st.integers(0, len(frame) - 1)) :]
    with contextlib.suppress(MalformedError):
        decode_request(frames)


def test_importing_ekko_loads_nothing_heavy() -> None:
    heavy = "zmq", "numpy", "numba", "torch", "pydantic"
    code = f"import sys, ekko; print([m for m in {heavy} if m in sys.modules]); ekko.Reader; print('zmq' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_a_table_may_be_given_with_the_time_that_its_rows_live(node: ScriptedNode, tmp_path: Path) -> None:
    tables = {"item": {"dim": 4, "ttl": "30d"}, "user": 2}
    with ekko.Publisher(address_of(tmp_path), "ctr", tables=tables) as publisher:
        assert publisher.tables == {"item": 4, "user": 2}
    assert node.requests == [Open("ctr", (("item", 4, 30 * 86_400), ("user", 2, None)))]
    for wrong in ({"dim": 4, "ttl": "0d"}, {"dim": 4, "ttl": -1}, {"dim": 4, "ttl": 1.5}, {"ttl": "3d"}, {"dim": 4, "age": 1}):
        with pytest.raises(ekko.ModelError, match="expected"):
            ekko.Publisher(address_of(tmp_path), "ctr", tables={"item": wrong})


def test_what_names_no_codec_is_said_as_version_1_said_it() -> None:
    """Publisher and node may be of neighbouring releases while a cluster is upgraded."""
    column, _ = _column_of(3, [_Change(np.arange(3, dtype=np.uint64), encode("float32", rows(3)), None)])
    opened = Opened("n1", "eu", 64, {"item": 4}, {}, 7)
    said = [
        encode_request(5, Open("ctr", (("item", 4, None),), 8))[0],
        encode_request(5, PublishStep("ctr", (column,), (), 9))[0],
        encode_answer(5, opened),
    ]
    assert [msgpack.unpackb(frame) for frame in said] == [
        [1, 5, "open", "ctr", [["item", 4]], 8],
        [1, 5, "publish", "ctr", [[3, 3, 3, 16, False]], [], 9],
        [1, 5, "opened", "n1", "eu", 64, [["item", 4]], [], 7],
    ]
    half = dataclasses.replace(opened, codec="float16")
    assert decode_answer(encode_answer(5, half)) == (5, half)
    assert msgpack.unpackb(encode_answer(5, half))[0] == 2
    mortal = Open("ctr", (("item", 4, 60), ("user", 2, None)))
    assert decode_request(encode_request(5, mortal)) == (5, mortal)
    assert msgpack.unpackb(encode_request(5, mortal)[0])[0] == 2
    for codec in (None, "float32", "int8"):
        request = Open("ctr", None, None, codec)
        assert decode_request(encode_request(5, request)) == (5, request)
    with pytest.raises(MalformedError, match="codec"):
        decode_request([msgpack.packb([2, 5, "open", "ctr", None, None, "int9"])])
