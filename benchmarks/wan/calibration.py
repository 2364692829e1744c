"""What work costs on this machine: the real kernels, codec, machine and socket, timed one by one before anything is simulated.

CPU time of this thread, the smallest of several rounds: others who use the machine make a round longer, never shorter. What is
paid for each row is measured in a table that fits no cache of the processor, as the model that it stands for would not.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import zmq

from benchmarks.common import distinct_keys
from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p import wire
from p2p.knowledge import Knowledge
from p2p.machine import Machine
from p2p.paper.sync import PUSH, SHARD_VERSIONS, SyncOptions
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX
from sim_cluster.costs import CostTable
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

ROUNDS = 9
WRITER = 1
TABLE = TableSpec("rows", 36)
ROWS, ROWS_QUICK = 400_000, 20_000
BATCH = 10_000
SHARDS = 8_192


def calibrate(quick: bool) -> CostTable:
    """Measure everything; a table of 20,000 rows when quick."""
    rows, shards = _rows(ROWS_QUICK if quick else ROWS), _shards()
    nodes = 9 if quick else 30
    once = _messages(nodes, steps=50 if quick else 200)
    rounds = _rounds(nodes, 256 if quick else 1_024, 20, shards["answer_shard"])
    send, receive = _socket()
    return CostTable(
        batch=once["batch"],
        call=once["call"],
        timer=once["timer"],
        publish=once["publish"],
        send=send + once["encode"],
        receive=receive + once["decode"],
        **rows,
        **shards,
        **rounds,
    )


def _best(work: Callable[[], object], count: int) -> float:
    """Nanoseconds of thread CPU time for each of `count`, after one round to warm up."""
    best = float("inf")
    for number in range(ROUNDS + 1):
        begin = time.thread_time_ns()
        work()
        if number:
            best = min(best, time.thread_time_ns() - begin)
    return best / count


def _rows(total: int) -> dict[str, float]:
    """Costs for each row."""
    model = Store.anonymous().add_model(ModelSpec("calibration", 64, {TABLE.name: TABLE}), total)
    keys = distinct_keys(total, 1)
    for begin in range(0, total, BATCH):
        model.apply([_columns(keys[begin : begin + BATCH])], 1 << 12 | WRITER)
    rng = np.random.default_rng(1)
    stamp = 1 << 12 | WRITER

    def apply() -> None:
        nonlocal stamp
        stamp += 1 << 12
        model.apply([chosen], stamp)

    # Other rows each time would have to be drawn within the time that is measured; these lie too far apart to stay cached.
    chosen = _columns(rng.choice(keys, BATCH, replace=False))
    everything = np.zeros((model.shards, WRITERS_MAX), np.uint64)
    ahead = everything + (1 << 62)
    apply_row = _best(apply, BATCH)
    behind = everything.copy()
    behind[:, WRITER] = stamp - (1 << 12)  # it lacks the last step only
    slots = model.changed_since(behind)[0].slots
    assert len(slots) == BATCH, f"{len(slots)} rows changed, not {BATCH}"
    assert model.cache_stats().misses == 0
    scan_row = _best(lambda: model.scan_since(ahead), total)
    walked = model.cache_stats().cached
    walk_entry = _best(lambda: model.changed_since(ahead), walked)
    select_row = max(0.0, _best(lambda: model.changed_since(behind), BATCH) - walk_entry * walked / BATCH)
    columns = model.read(TABLE.id, slots)
    nothing = np.empty(0, np.uint16), np.empty((64, 0), np.uint64), np.empty(0, np.uint64)
    reply = m.PullReply(model.keyspace, 1, 0, False, (columns,), *nothing)
    frames = [memoryview(bytes(frame)) for frame in wire.encode(_ENVELOPE, reply)]
    return {
        "apply_row": apply_row,
        "check_row": _best(lambda: wire.decode(frames), BATCH) + _best(lambda: model.shards_of(columns.keys), BATCH),
        "encode_row": _best(lambda: wire.encode(_ENVELOPE, reply), BATCH),
        "read_row": _best(lambda: model.read(TABLE.id, slots), BATCH),
        "scan_row": scan_row,
        "walk_entry": walk_entry,
        "select_row": select_row,
    }


def _columns(keys: np.ndarray) -> RowColumns:
    return RowColumns(TABLE.id, keys, np.ones((len(keys), TABLE.dim), np.float32).view(np.uint8))


_ENVELOPE = m.Envelope(1, 2, 3, 4)


def _shards() -> dict[str, float]:
    """Costs for each shard, of a model with many shards and one writer."""
    model: ModelStore = Store.anonymous().add_model(ModelSpec("shards", SHARDS, {TABLE.name: TABLE}))
    model.vector[:, WRITER] = 1 << 12 | WRITER
    model.frontier[WRITER] = 1 << 12 | WRITER
    knowledge = Knowledge(model.vector, model.frontier)
    writers, every = knowledge.writers, np.arange(SHARDS, dtype=np.uint32)
    column = np.ascontiguousarray(model.vector[:, writers])
    ones = np.ones(SHARDS, np.uint16)
    stamp = 1 << 12 | WRITER

    base = np.zeros((SHARDS, WRITERS_MAX), np.uint64)

    def answer() -> None:
        base[:, writers] = column
        model.changed_since(base)
        base[:, writers] = 0
        np.ascontiguousarray(model.vector[:, writers])

    def learn_step() -> None:
        nonlocal stamp
        previous, stamp = stamp, stamp + (1 << 12)
        prev = model.vector[every, WRITER].copy()
        knowledge.learn_step(stamp, previous, SHARDS, every, prev, ones - 1, ones)

    return {
        "claim": _best(learn_step, SHARDS),
        "ask_shard": _best(lambda: np.ascontiguousarray(model.vector[:, writers]), SHARDS),
        "answer_shard": _best(answer, SHARDS),
        "learn_shard": _best(lambda: knowledge.learn_reply(writers, column, column, knowledge.frontier[writers]), SHARDS),
        "digest_shard": _best(knowledge.digest, SHARDS),
    }


class _TimedMachine(Machine):
    """Keeps how long each event of a kind took, nanoseconds of CPU time. A timer that begins rounds counts apart."""

    taken: ClassVar[dict[str, list[int]]] = defaultdict(list)

    def handle(self, event: m.Event, now: m.Now) -> list[m.Effect]:
        begin = time.thread_time_ns()
        effects = super().handle(event, now)
        taken = time.thread_time_ns() - begin
        kind = type(event.message if isinstance(event, m.MessageReceived) else event).__name__
        rounds = sum(isinstance(effect, m.Send) and isinstance(effect.message, m.VersionsWanted) for effect in effects)
        if rounds and isinstance(event, m.TimerFired):
            self.taken["Round"].append(taken // rounds)
        else:
            self.taken[kind].append(taken)
        return effects


def _timed_cluster(nodes: int, shards: int, sync: SyncOptions, steps: int) -> dict[str, float]:
    """Medians of the machine's own time, by kind of event, in a cluster that publishes steps of one row."""
    model = ModelSpec("calibration", shards, {"rows": TABLE})
    cluster = VirtualCluster(1, NetworkOptions(), model, sync=sync, make_machine=_TimedMachine)
    for number in range(nodes):
        cluster.add(f"n{number}", f"r{number // 3}", "serve" if number else "train", ["n0"] if number else [])
    cluster.run(5_000)
    _TimedMachine.taken.clear()
    for step in range(steps):
        cluster.publish("n0", "rows", [step], 1.0)
        cluster.run(50)
    return {kind: float(np.median(times)) for kind, times in _TimedMachine.taken.items()}


def _rounds(nodes: int, more: int, steps: int, answer_shard: float) -> dict[str, float]:
    """Costs for each shard of the model in rounds by shard versions: what more shards cost more."""
    few, many = (_timed_cluster(nodes, shards, SHARD_VERSIONS, steps) for shards in (64, 64 + more))

    def slope(kind: str) -> float:
        return max(0.0, (many[kind] - few[kind]) / more)

    return {
        "begin_shard": slope("Round"),
        "versions_shard": slope("VersionsWanted"),
        "list_shard": slope("VersionList"),
        "wanted_shard": max(0.0, slope("ShardsWanted") - answer_shard),
        "reply_shard": slope("ShardsReply"),
    }


def _messages(nodes: int, steps: int) -> dict[str, float]:
    """Costs for each message, whatever it holds."""
    taken = _timed_cluster(nodes, 64, PUSH, steps)
    calls = [taken[kind] for kind in ("Heartbeat", "Ack") if kind in taken]
    batch = m.Batch(1, "n0", "r0", WRITER, 1, 1 << 12 | WRITER, 0, 1, _ONE_CLAIM, (_columns(np.ones(1, np.uint64)),))
    sealed = wire.seal(batch)
    frames = [memoryview(bytes(frame)) for frame in wire.encode(_ENVELOPE, sealed)]

    def repeat(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: [work() for _ in range(200)]

    return {
        "batch": taken["Batch"] + taken["BatchReady"],
        "call": sum(calls) / len(calls),
        "timer": taken["TimerFired"],
        "publish": taken["PublishRequested"],
        "encode": _best(repeat(lambda: wire.encode(_ENVELOPE, sealed)), 200),
        "decode": _best(repeat(lambda: wire.decode(frames)), 200),
    }


_ONE_CLAIM = m.ShardClaims(np.zeros(1, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.uint16), np.ones(1, np.uint16))


def _socket() -> tuple[float, float]:
    """Nanoseconds that this thread spends on sending and on receiving one message of four frames over loopback."""
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    try:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        push.connect(f"tcp://127.0.0.1:{port}")
        frames = [bytes(48), bytes(100), bytes(80), bytes(1_440)]
        push.send_multipart(frames)
        pull.recv_multipart()
        count = 200
        send = receive = float("inf")
        for _ in range(ROUNDS):
            begin = time.thread_time_ns()
            for _ in range(count):
                push.send_multipart(frames)
            send = min(send, time.thread_time_ns() - begin)
            begin = time.thread_time_ns()
            for _ in range(count):
                pull.recv_multipart()
            receive = min(receive, time.thread_time_ns() - begin)
        return send / count, receive / count
    finally:
        context.destroy(linger=0)
