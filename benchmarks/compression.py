"""`compression`: what zstd gains on a batch of trained rows, what it takes, and below which rate of a link that pays.

The rows are those of the demo's model after it learnt some of MovieLens-100K (or of generated events, where that cannot be had:
see `dataset`), and beside them normally distributed ones. A batch is 1,000 different rows with their keys, in the frames in
which it would travel.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import F32, Figure
from ekko.codec import encode
from ekko.model import CODECS
from p2p import messages as m
from p2p import wire
from p2p.link.compression import EXPAND_SHARE
from p2p.link.wrapping import unwrap, wrap, wrapped_frames
from p2p.replica import RowColumns
from sim_cluster.demo import data
from sim_cluster.demo.learning import Learner

TARGETS: dict[str, str] = {}
EVENTS, EVENTS_QUICK = 20_000, 600
BATCH_ROWS = 1_000
REPEATS, REPEATS_QUICK = 200, 5
DIM_NORMAL = 64


def run(quick: bool) -> dict[str, Figure]:
    """Measure each codec on both kinds of rows."""
    events = data.load(synthetic=quick)
    learner = Learner(events, seed=0)
    learner.train_offline(EVENTS_QUICK if quick else EVENTS, lambda _: None)
    tables = learner.model.tables.values()
    trained = np.concatenate([table.get_parameter("weight").detach().numpy() for table in tables])
    normal = np.random.default_rng(0).standard_normal((2 * BATCH_ROWS, DIM_NORMAL), dtype=np.float32)
    repeats = REPEATS_QUICK if quick else REPEATS
    kinds = {"trained": trained, "normal": normal}
    cells = [_measure(name, codec, rows, repeats) for name, rows in kinds.items() for codec in CODECS]
    saved: dict[str, Figure] = {f"saved_{cell['codec']}": cell["saved"] for cell in cells if cell["rows"] == "trained"}
    return {**saved, "dataset": events.name, "cells": cells}


def _measure(name: str, codec: str, rows: F32, repeats: int) -> dict[str, float | int | str]:
    chosen = np.random.default_rng(1).permutation(len(rows))[:BATCH_ROWS]
    columns = RowColumns(1, chosen.astype(np.uint64), encode(codec, np.ascontiguousarray(rows[chosen])))
    claims = m.ShardClaims(np.zeros(1, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.uint16), np.ones(1, np.uint16))
    envelope = m.Envelope(1, 2, 1, 1, version=2)
    plain = wire.encode(envelope, wire.seal(m.Batch(1, "t", "r", 0, 1, 1 << 22, 0, 1, claims, (columns,))))
    size = sum(memoryview(frame).nbytes for frame in plain)
    sent = [memoryview(bytes(frame)) for frame in wrapped_frames(plain[0], wrap(plain[1:]))]
    wrap_ns = _fastest_ns(lambda: wrap(plain[1:]), repeats) / size
    unwrap_ns = _fastest_ns(lambda: unwrap(sent), repeats) / size
    saved = 1 - sum(frame.nbytes for frame in sent) / size
    return {
        "rows": name,
        "codec": codec,
        "bytes": size,
        "saved": saved,
        "wrap_ns_per_byte": wrap_ns,
        "unwrap_ns_per_byte": unwrap_ns,
        "pays_below_mbps": max(0.0, saved / (wrap_ns * (1 + EXPAND_SHARE)) * 8_000),
    }


def _fastest_ns(work: Callable[[], Any], repeats: int) -> int:
    """Of the processor's time: what it takes where nothing is in the way."""
    fastest = 1 << 62
    for _ in range(repeats):
        begin = time.thread_time_ns()
        work()
        fastest = min(fastest, time.thread_time_ns() - begin)
    return fastest
