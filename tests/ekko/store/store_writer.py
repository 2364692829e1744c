"""A process that writes a store, for tests that kill it or read beside it.

`store_writer.py overwrite|insert|paced RUN_DIR DIM COUNT [CODEC]`. All values of a row are the same and follow from its stamp,
so that tearing shows; key i is i. Prints "ready" when the first batch is written. One that is paced inserts, `PACE` batches for
each line on stdin.
"""

import sys
from pathlib import Path

import numpy as np

from ekko.codec import encode, rounded
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

MODEL = "ctr"
TABLE = "item"
WRITER = 3
BATCH = 64
PACE = 40
STAMP_MASK = (1 << 24) - 1


def value_of(stamps: np.ndarray, codec: str) -> np.ndarray:
    """What rows of these stamps are filled with: for float32 the low 24 bits; else what the codec makes of a small number."""
    if codec == "float32":
        return (stamps & np.uint64(STAMP_MASK)).astype(np.float32)
    tick = (stamps >> np.uint64(12)).astype(np.int64)
    # Of changing sign: a row of int8 that is one number has one level, and only its sign and its scale would tell.
    number = ((tick & 0x7F) + 1) * np.where(tick & 1, 1, -1)
    return rounded(codec, number.astype(np.float32)[:, None])[:, 0]


def write(model: ModelStore, keys: np.ndarray, stamp: int) -> None:
    spec = model.spec.tables[TABLE]
    value = value_of(np.array([stamp], np.uint64), spec.codec)[0]
    rows = encode(spec.codec, np.full((keys.size, spec.dim), value, np.float32))
    shards = np.unique(model.shards_of(keys))
    model.begin_write(stamp, shards)
    model.apply([RowColumns(table_id(TABLE), keys, rows)], stamp)
    model.vector[shards, WRITER] = stamp


def main(mode: str, run_dir: Path, dim: int, count: int, codec: str = "float32") -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec(MODEL, 8, {TABLE: TableSpec(TABLE, dim, codec)}, codec=codec))
    tick = (model.stamp_max >> 12) + 1
    begin = model.table_stats()[TABLE].rows
    first = np.arange(count) if mode == "overwrite" else np.arange(begin, begin + 1)
    write(model, first.astype(np.uint64), tick << 12 | WRITER)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    rng = np.random.default_rng(tick)
    while mode == "overwrite" or begin < count:
        tick += 1
        if mode == "overwrite":
            keys = rng.choice(count, min(BATCH, count), replace=False).astype(np.uint64)
        else:
            if mode == "paced" and begin // BATCH % PACE == 0:
                sys.stdin.readline()
            keys = np.arange(begin, min(begin + BATCH, count), dtype=np.uint64)
            begin += BATCH
        write(model, keys, tick << 12 | WRITER)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
