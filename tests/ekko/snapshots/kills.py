"""kill -9 at random points of applying, collecting and snapshotting, and every restart compared with an oracle.

`python -m tests.ekko.snapshots.kills [ROUNDS] [SEED]`, or `scripts/kills`. Two real processes share a store: one applies a
stream of steps that follows from the seed, and between them lets go of what was deleted, so that slots change hands; the other
takes snapshots, increments and full ones in turn. Each round kills them at random moments, in some only after both have come to
something, which on a busy machine takes a while. Then either the memory is intact,
and is attached to: it must hold what the stream says up to its frontier, and of the step after that some whole rows. Or it is
lost: the newest sound snapshot must hold exactly what it claims, and nothing that never was; the rest is pulled from a store
that has everything. After either, the stream goes on.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.snapshots.folders import LocalFolder
from ekko.snapshots.load import Wanted, open_or_restore
from ekko.snapshots.take import Plan, take
from ekko.store import Store, patience, warm
from ekko.store.images import StoreImage
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX

MODEL, TABLE, SHARDS, DIM, KEYS, WRITER = "ctr", "item", 8, 16, 20_000, 3
STEP_KEYS = 200
DELETES = 0.2  # of steps
COLLECTS = 0.3  # of steps are followed by letting go of some deleted rows
COLLECT_ROWS = 300
TABLE_BYTES = 256 << 20
ALIVE_S_MAX = 0.12  # so long both processes live at most
LONG = 0.3  # of rounds last until so many steps are applied and another snapshot is whole; then the kills may come
LONG_STEPS = 100
LONG_S_MAX = 120.0
LOST = 0.4  # of rounds lose the memory
KEPT = 2
Rows = dict[int, tuple[int, bytes | None]]  # key -> (stamp, row; None: deleted)


def step_of(seed: int, tick: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys uint64[n] and rows float32[live, DIM] of a step; without rows the keys are deleted."""
    rng = np.random.default_rng((seed, tick))
    keys = rng.choice(KEYS, STEP_KEYS, replace=False).astype(np.uint64)
    live = 0 if rng.random() < DELETES else STEP_KEYS
    return keys, np.full((live, DIM), tick, np.float32)


def apply_step(model: ModelStore, seed: int, tick: int) -> None:
    keys, rows = step_of(seed, tick)
    stamp = tick << 12 | WRITER
    shards = np.unique(model.shards_of(keys))
    model.begin_write(stamp, shards)
    model.apply([RowColumns(table_id(TABLE), keys, encode("float32", rows))], stamp)
    model.vector[shards, WRITER] = stamp
    model.frontier[WRITER] = stamp


def contents(model: ModelStore) -> Rows:
    out: Rows = {}
    for selection in model.scan_since(np.zeros((SHARDS, WRITERS_MAX), np.uint64)):
        rows = model.read(selection.table, selection.slots)
        assert rows.stamps is not None
        assert np.unique(rows.keys).size == rows.keys.size, "a key is there twice"
        for i, (key, stamp) in enumerate(zip(rows.keys.tolist(), rows.stamps.tolist(), strict=True)):
            out[key] = (stamp, rows.rows[i].tobytes() if i < len(rows.rows) else None)
    keys = np.array(list(out), np.uint64)
    _, stamps = model.lookup(TABLE, keys)  # the index finds what the scan finds
    assert stamps.tolist() == [0 if row is None else stamp for stamp, row in out.values()]
    return out


def collect(model: ModelStore) -> None:
    """Let go of some deleted rows, of all steps that are whole: nobody else has to know of them (R5)."""
    until = np.zeros(WRITERS_MAX, np.uint64)
    until[WRITER] = model.frontier[WRITER]
    model.collect(until, 0, COLLECT_ROWS)


def is_equal(model: ModelStore, held: Rows, key: int, expected: tuple[int, bytes | None]) -> bool:
    """Whether the key's version is this one; a deleted one may be gone, which the loss floor then says."""
    if key in held or expected[1] is not None:
        return held.get(key, (0, None)) == expected
    shard = int(model.shards_of(np.array([key], np.uint64))[0])
    return int(model.loss_floor[shard, WRITER]) >= expected[0]


@dataclass
class Oracle:
    """What the stream has written up to a tick, as a store that has everything, and as a dictionary."""

    seed: int
    tick: int = 0
    rows: Rows = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store.anonymous(table_bytes_max=TABLE_BYTES)
        self.model = self.store.add_model(SPEC)

    def advance(self, tick: int) -> None:
        while self.tick < tick:
            self.tick += 1
            keys, rows = step_of(self.seed, self.tick)
            for i, key in enumerate(keys.tolist()):
                self.rows[key] = (self.tick << 12 | WRITER, rows[i].tobytes() if len(rows) else None)
            apply_step(self.model, self.seed, self.tick)


SPEC = ModelSpec(MODEL, SHARDS, {TABLE: TableSpec(TABLE, DIM)})


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the parent is told by the exit code
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return pid


def _write(run_dir: Path, seed: int) -> None:
    store = Store.attach(run_dir, table_bytes_max=TABLE_BYTES)
    assert store is not None
    model = store.models[MODEL]
    tick, rng = int(model.frontier[WRITER]) >> 12, random.Random(os.getpid())
    while True:
        tick += 1
        apply_step(model, seed, tick)
        if rng.random() < COLLECTS:
            collect(model)


def _snapshot(run_dir: Path, folder: LocalFolder, seed: int) -> None:
    rng = random.Random(seed)
    patience.ROW_DEADLINE_S = LONG_S_MAX  # the writer may be killed in mid-row some time before us
    while True:
        take(run_dir, folder, "a", Plan(3600.0, KEPT), "full" if rng.random() < 0.3 else "auto")


@dataclass
class Seen:
    """What a run met, so that one that tests nothing shows."""

    attached: int = 0
    restored: int = 0
    from_increments: int = 0
    began_empty: int = 0
    half_steps: int = 0
    unfinished: int = 0  # snapshots that a kill left without manifest
    gone: int = 0  # deleted keys that were found to be gone
    slots_reused: int = 0  # at most, in one memory
    steps: int = 0


def run(rounds: int, seed: int, directory: Path) -> Seen:
    """Kill so many times; raises AssertionError at the first restart that is not exact."""
    warm()
    rng, seen = random.Random(seed), Seen()
    run_dir, folder = directory / "run", LocalFolder(directory / "snapshots")
    oracle = Oracle(seed)
    store = Store.open(run_dir, table_bytes_max=TABLE_BYTES)
    store.add_model(SPEC, KEYS)
    store.close()
    try:
        for number in range(rounds):
            _round(rng, seen, run_dir, folder, oracle, f"seed {seed}, round {number}")
    finally:
        if (left := Store.attach(run_dir, table_bytes_max=TABLE_BYTES)) is not None:
            left.destroy()
    seen.steps = oracle.tick
    return seen


def _come_to_something(run_dir: Path, folder: LocalFolder, whole: set[str]) -> None:
    """Return when steps were applied, and a snapshot is whole that is not among these."""
    image = StoreImage(run_dir)
    (entry,) = image.manifest.models
    model = image.model(entry)

    def reached() -> int:
        return int(model.knowledge().frontiers[0, WRITER]) >> 12

    steps, deadline = reached() + LONG_STEPS, time.monotonic() + LONG_S_MAX
    while reached() < steps or not _whole(folder) - whole:
        assert time.monotonic() < deadline, f"step {reached()} of {steps}, snapshots {_whole(folder)}"
        time.sleep(0.002)


def _whole(folder: LocalFolder) -> set[str]:
    return {name for name in folder.names() if folder.has(f"{name}/manifest.json")}


def _round(rng: random.Random, seen: Seen, run_dir: Path, folder: LocalFolder, oracle: Oracle, where: str) -> None:
    whole = _whole(folder)
    writer = _fork(lambda: _write(run_dir, oracle.seed))
    snapshots = _fork(lambda: _snapshot(run_dir, folder, rng.getrandbits(32)))
    if rng.random() < LONG:
        _come_to_something(run_dir, folder, whole)
    time.sleep(rng.random() * ALIVE_S_MAX)
    victims = [writer, snapshots] if rng.random() < 0.5 else [snapshots, writer]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
        if rng.random() < 0.5:
            time.sleep(rng.random() * ALIVE_S_MAX / 4)  # the other one lives on for a moment
    for victim in victims:
        _, status = os.waitpid(victim, 0)
        assert os.WIFSIGNALED(status), f"{where}: a process ended by itself"
    seen.unfinished += len({*folder.names()} - _whole(folder))
    lost = rng.random() < LOST
    store = Store.attach(run_dir, table_bytes_max=TABLE_BYTES)
    assert store is not None, f"{where}: memory that only lost its writer is intact"
    model = store.models[MODEL]
    reached = int(model.frontier[WRITER]) >> 12
    oracle.advance(reached)
    if lost:
        store.destroy()
        store, model = _restore(seen, run_dir, folder, oracle, where)
    else:
        _check_attached(seen, model, oracle, where)
        seen.attached += 1
        if reached:  # as if its writer's half step were pulled: what is claimed and absent would be a ghost
            model.vector[:, WRITER] = np.minimum(model.vector[:, WRITER], np.uint64(reached - 1 << 12 | WRITER))
            apply_step(model, oracle.seed, reached)
    held = contents(model)
    for key in {*held, *oracle.rows}:
        assert is_equal(model, held, key, oracle.rows[key]), f"{where}: key {key} is {held.get(key)}, not {oracle.rows[key]}"
    seen.gone += len(oracle.rows) - len(held)
    seen.slots_reused = max(seen.slots_reused, model.table(table_id(TABLE)).slots_reused)
    assert model.stamp_max >= reached << 12
    store.close()


def _check_attached(seen: Seen, model: ModelStore, oracle: Oracle, where: str) -> None:
    """All of it but the last step, and of that any of its rows, each whole."""
    held, last = contents(model), oracle.tick << 12 | WRITER
    for key in {*held, *oracle.rows}:
        expected = oracle.rows.get(key, (0, None))
        if is_equal(model, held, key, expected):
            continue
        assert expected[0] == last, f"{where}: key {key} is {held.get(key)}, not {expected}"
        assert held.get(key, (0, None))[0] < last, f"{where}: key {key} is torn"
        seen.half_steps += 1


def _restore(seen: Seen, run_dir: Path, folder: LocalFolder, oracle: Oracle, where: str) -> tuple[Store, ModelStore]:
    """The memory is lost: the newest snapshot, then a pull of the rest."""
    restored = open_or_restore(run_dir, [folder], Wanted({MODEL: SPEC}), table_bytes_max=TABLE_BYTES)
    assert not restored.refused, f"{where}: {restored.refused}"
    store = restored.store
    model = store.add_model(SPEC, KEYS)
    if restored.snapshot is None:
        seen.began_empty += 1
    else:
        seen.restored += 1
        seen.from_increments += b'"parent":"' in folder.get(f"{restored.snapshot}/manifest.json", 1 << 24)
    held = contents(model)
    keys = np.array(list(oracle.rows), np.uint64)
    shards = model.shards_of(keys)
    for key, shard in zip(keys.tolist(), shards.tolist(), strict=True):
        newest = oracle.rows[key]
        if newest[0] <= int(model.vector[shard, WRITER]):
            correct = is_equal(model, held, key, newest)
            assert correct, f"{where}: key {key} is claimed, and is {held.get(key)}, not {newest}"
    for key, (stamp, row) in held.items():
        written, rows = step_of(oracle.seed, stamp >> 12)
        assert key in written, f"{where}: key {key} never had stamp {stamp}"
        assert row == (rows[0].tobytes() if len(rows) else None), f"{where}: key {key} is torn"
    assert int(model.frontier[WRITER]) <= int(model.vector[:, WRITER].max(initial=0))
    for selection in oracle.model.changed_since(model.vector):
        model.apply([oracle.model.read(selection.table, selection.slots)], 0)
    model.vector[...] = np.maximum(model.vector, oracle.model.vector)
    model.frontier[...] = np.maximum(model.frontier, oracle.model.frontier)
    return store, model


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with TemporaryDirectory(prefix="ekko-kills-") as folder:
        begin = time.monotonic()
        sys.stdout.write(f"{rounds} kills, seed {seed}: every restart exact: {run(rounds, seed, Path(folder))}\n")
        sys.stdout.write(f"{time.monotonic() - begin:.0f} s\n")
