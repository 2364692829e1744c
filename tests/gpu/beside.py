"""Look-ups beside writes on the model twin: worlds whose every row is known, and what may be met in them.

Each world is a cache of few buckets, so that launches meet, and every version of every row ever written is remembered. A check
raises AssertionError when a reader got what was never written, or the memory ends otherwise than in the reference.
"""

import ctypes
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko import codec as store_codec
from gpu import layout, reference, sources
from gpu.kernels import launchers
from gpu.layout import Memory, PooledJob, Shape
from gpu.twin import build
from gpu.twin.twin import HostTwin, Schedule, TwinKernel

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

# Several launches at once, all of their lanes. Of a block of 256 most lanes would do nothing: launches here use smaller ones.
BLOCK = 64
LANES_MAX = 1024
ACCESSES_MAX = 1_000_000  # ten times what a scenario takes: lanes that wait for each other are told to


def plants() -> dict[str, int]:
    """Name -> number, as plants.cuh has them."""
    text = (sources.FOLDER / "plants.cuh").read_text().split("enum Plant {")[1].split("}")[0]
    names = [line.split(",")[0].strip() for line in text.splitlines() if line.strip()]
    return {name: number for number, name in enumerate(names)}


class Model(HostTwin):
    """The model twin, with a bug planted or with none."""

    def __init__(self, seed: int, plant: str = "NONE", accesses_max: int = ACCESSES_MAX) -> None:
        """Sanitised where the process is; see test_sanitised_kernels.py."""
        self.seed = seed
        schedule = Schedule(lanes_max=LANES_MAX, accesses_max=accesses_max)
        super().__init__("model", seed, schedule, sanitise=build.sanitised_process())
        self._plant = plant

    def kernel(self, source: str, name: str, defines: Mapping[str, int | str] | None = None) -> TwinKernel:
        if self._plant == "NONE":
            return super().kernel(source, name, defines)
        defines = {"EKKO_PLANTS": 1}
        library = build.kernels(sources.load(source.removesuffix(".cu"), defines), "model", sanitise=self._sanitise)
        ctypes.c_uint32.in_dll(ctypes.CDLL(str(library)), "ekko_plant").value = plants()[self._plant]
        return super().kernel(source, name, defines)


class World:
    """A cache on the twin, the same in the reference, and all versions."""

    def __init__(self, twin: Model, shape: Shape, seed: int) -> None:
        self.twin = twin
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.there = reference.new_memory(shape)
        self.versions: dict[tuple[int, int], bytes] = {}
        self.here = Memory(
            shape,
            twin.zeros(shape.slots, np.uint8),
            twin.zeros((shape.slots, layout.HEADER_BYTES), np.uint8),
            twin.zeros((shape.slots, shape.stride), np.uint8),
            twin.zeros(layout.COUNTERS, np.uint64),
        )
        self.held: list[Any] = []  # what launches that did not run yet point to

    # --- what to write
    def new_keys(self, count: int) -> U64:
        return self.rng.integers(0, 2**64, count, np.uint64)

    def keys_for(self, bucket: int, count: int) -> U64:
        """Keys that belong to one bucket."""
        found: list[int] = []
        while len(found) < count:
            keys = self.new_keys(64 * self.shape.buckets)
            found += keys[layout.bucket_of(layout.mix64(keys), self.shape.buckets) == bucket].tolist()
        return np.array(found[:count], np.uint64)

    def full(self) -> U64:
        """Keys that fill every slot."""
        return np.concatenate([self.keys_for(bucket, layout.BUCKET_SLOTS) for bucket in range(self.shape.buckets)])

    def batch(self, keys: U64, stamp: int) -> tuple[U64, U64, U8]:
        """Keys sorted as batches are, stamps near `stamp`, random rows; remembered."""
        keys = keys[np.argsort(layout.mix64(keys))]
        stamps = stamp + self.rng.integers(0, 5, len(keys)).astype(np.uint64)
        values = self.rng.standard_normal((len(keys), self.shape.dim)).astype(np.float32)
        rows = np.array(store_codec.encode(self.shape.codec, values)).reshape(len(keys), self.shape.row_bytes)
        for key, version, row in zip(keys.tolist(), stamps.tolist(), rows, strict=True):
            self.versions[key, version] = row.tobytes()
        return keys, stamps, rows

    def up(self, *arrays: NDArray[Any]) -> list[Any]:
        made = [self.twin.upload(np.ascontiguousarray(array)) for array in arrays]
        self.held += made
        return made

    def new(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        array = self.twin.empty(shape, dtype)
        self.held.append(array)
        return array

    # --- writes, both here and in the reference
    def insert(self, keys: U64, stamps: U64, rows: U8, stream: Any = None, *, score: int = 1, admit: bool = True) -> Any:
        outcomes, expected = self.new(len(keys), np.uint8), np.empty(len(keys), np.uint8)
        on = self.up(keys, stamps, rows)
        launchers.insert(self.twin, self.here, *on, None, outcomes, score=score, admit=admit, stream=stream)
        reference.insert(self.there, keys, stamps, rows, None, expected, score=score, admit=admit)
        return lambda: _equal("outcomes of insert", outcomes, expected)

    def apply(self, keys: U64, stamps: U64, rows: U8, stream: Any = None) -> Any:
        outcomes, expected = self.new(len(keys), np.uint8), np.empty(len(keys), np.uint8)
        launchers.apply(self.twin, self.here, *self.up(keys, stamps, rows), outcomes, stream=stream)
        reference.apply(self.there, keys, stamps, rows, expected)
        return lambda: _equal("outcomes of apply", outcomes, expected)

    def erase(self, keys: U64, stamps: U64, stream: Any = None) -> Any:
        outcomes, expected = self.new(len(keys), np.uint8), np.empty(len(keys), np.uint8)
        launchers.erase(self.twin, self.here, *self.up(keys, stamps), outcomes, stream=stream)
        reference.erase(self.there, keys, stamps, expected)
        return lambda: _equal("outcomes of erase", outcomes, expected)

    def begin(self, keys: U64, stamp: int = 100, **how: Any) -> None:
        """Insert rows with nobody beside."""
        self.insert(*self.batch(keys, stamp), **how)
        self.twin.synchronize()

    def check_memory(self, *, scores: bool = True) -> None:
        """The memory is as in the reference. `scores`: no look-up touched them."""
        self.twin.synchronize()
        _equal("digests", self.here.digests, self.there.digests)
        headers = np.asarray(self.here.headers).view(layout.HEADER)[:, 0]
        for name in ("key", "stamp", "lock", *(["score"] if scores else [])):
            _equal(name, headers[name], reference.headers_of(self.there)[name])
        _equal("rows", self.here.rows, self.there.rows)
        for counter in (layout.SIZE, layout.EVICTED, *range(layout.OUTCOME_FIRST, layout.OUTCOME_FIRST + layout.OUTCOMES)):
            _equal(f"counter {counter}", self.here.counters[counter], self.there.counters[counter])

    # --- reads
    def lookup(self, keys: U64, stream: Any = None, *, policy: int | None = None) -> Any:
        """Launch a look-up; call what is returned, after the twin ran, to check it. A policy: it scores what it reads, too."""
        count, dim = len(keys), self.shape.dim
        rows, stamps = self.new((count, dim), np.float32), self.new(count, np.uint64)
        missed, missed_count = self.new(count, np.int64), self.twin.zeros(1, np.uint64)
        on_twin = self.up(keys)[0]
        launchers.lookup(
            self.twin, self.here, on_twin, rows, stamps, missed, missed_count, policy=policy, tick=9, stream=stream
        )

        if policy is not None:
            unused = (
                np.empty((count, dim), np.float32),
                np.empty(count, np.uint64),
                np.empty(count, np.int64),
                np.zeros(1, np.uint64),
            )
            reference.lookup(self.there, keys, *unused, policy=policy, tick=9)

        def check(always_there: U64 | None = None) -> None:
            lost = np.flatnonzero(stamps == 0)
            _equal("missed", np.sort(missed[: int(missed_count[0])]), lost)
            for i, stamp in enumerate(stamps.tolist()):
                self._check_row(int(keys[i]), stamp, rows[i])
            if always_there is not None:
                wrongly = np.isin(keys[lost], always_there).sum()
                crossed = int(self.here.counters[layout.CROSSED])
                assert wrongly <= crossed, f"{wrongly} keys were missed that were there all the time, and {crossed} crossed"

        return check

    def pooled(self, keys: U64, offsets: list[int], stream: Any = None, *, mode: str = "sum") -> Any:
        """As `lookup`, for bags; each bag's sum must be one of versions that were."""
        bags = len(offsets) - 1
        out = self.new((bags, self.shape.dim), np.float32)
        missed, missed_count = self.new(len(keys), np.int64), self.twin.zeros(1, np.uint64)
        on = self.up(keys, np.array(offsets, np.int64))
        buffer = self.new((bags, self.shape.dim), np.float32)
        job = PooledJob(self.here, None, 9, *on, None, out, missed, missed_count, buffer)  # type: ignore[arg-type]
        launchers.pooled(self.twin, [job], mode=layout.MODES[mode], stream=stream)

        def check() -> None:
            lost = set(missed[: int(missed_count[0])].tolist())
            assert len(lost) == int(missed_count[0])
            for bag in range(bags):
                members = range(offsets[bag], offsets[bag + 1])
                read = [self._values_of(int(keys[i])) for i in members if i not in lost]
                sums = [self._sum(rows, len(members), mode) for rows in product(*read)]
                assert any((one.view(np.uint32) == out[bag].view(np.uint32)).all() for one in sums), (
                    f"bag {bag} is no sum of versions that were"
                )

        return check

    def export(self, stream: Any = None) -> Any:
        room = self.shape.slots
        columns = [self.new(room, np.uint64) for _ in range(3)]
        rows, count = self.new((room, self.shape.row_bytes), np.uint8), self.twin.zeros(1, np.uint64)
        launchers.export(
            self.twin,
            self.here,
            *columns,
            rows,
            count,
            first_bucket=0,
            buckets=self.shape.buckets,
            newer_than=0,
            stream=stream,
        )

        def check() -> None:
            for i in range(int(count[0])):
                key, stamp = int(columns[0][i]), int(columns[1][i])
                if stamp:
                    assert self.versions.get((key, stamp)) == rows[i].tobytes(), f"row {i} of the export was never written"

        return check

    def _check_row(self, key: int, stamp: int, row: NDArray[np.float32]) -> None:
        if not stamp:
            assert not row.view(np.uint32).any(), f"key {key:#x} was missed, and its row is not zeros"
            return
        written = self.versions.get((key, stamp))
        assert written is not None, f"key {key:#x} never had stamp {stamp}"
        assert (self._decoded(written).view(np.uint32) == row.view(np.uint32)).all(), (
            f"key {key:#x}: the row is not that of stamp {stamp}"
        )

    def _values_of(self, key: int) -> list[NDArray[np.float32]]:
        return [self._decoded(row) for (of, _), row in self.versions.items() if of == key]

    def _decoded(self, row: bytes) -> NDArray[np.float32]:
        return reference.decode(self.shape, np.frombuffer(row, np.uint8)[None])[0]

    def _sum(self, rows: tuple[NDArray[np.float32], ...], count: int, mode: str) -> NDArray[np.float32]:
        total = np.zeros(self.shape.dim, np.float32)
        for row in rows:
            total = total + row
        return total / np.float32(max(1, count)) if mode == "mean" else total


def _equal(what: str, found: Any, expected: Any) -> None:
    wrong = np.argwhere(np.atleast_1d(found) != np.atleast_1d(expected))
    assert not len(wrong), f"{what}: {len(wrong)} differ from what they should be, first at {wrong[0].tolist()}"


# --- what runs beside what. Each takes a twin, plays one run, and raises when something is wrong.
def look_beside_apply(twin: Model, codec: str = "float32", dim: int = 16) -> None:
    world = World(twin, Shape(1, dim, codec), twin.seed)
    keys = world.keys_for(0, 24)
    world.begin(keys)
    reading, writing = twin.stream(), twin.stream()
    changed = keys[:8]
    checks = [world.apply(*world.batch(changed, stamp), writing) for stamp in (200, 300, 250)]
    asked = np.concatenate([changed, keys, changed, world.new_keys(2)])
    looks = [world.lookup(asked, reading) for _ in range(2)]
    twin.synchronize()
    for check in checks:
        check()
    for look in looks:
        look(keys)
    world.check_memory()


def look_beside_inserts(twin: Model, codec: str = "float32", dim: int = 16) -> None:
    """Slots change hands under the reader."""
    world = World(twin, Shape(1, dim, codec), twin.seed)
    old, new, newer = np.split(world.keys_for(0, 32 + 6 + 6), [32, 38])
    world.begin(old)
    reading, writing = twin.stream(), twin.stream()
    checks = [
        world.insert(*world.batch(new, 200), writing, score=2),
        world.insert(*world.batch(newer, 300), writing, score=3),
        world.insert(*world.batch(np.concatenate([new, old[:4]]), 400), writing, score=4),
    ]
    looks = [world.lookup(np.concatenate([new, old, newer]), reading) for _ in range(2)]
    twin.synchronize()
    for check in checks:
        check()
    for look in looks:
        look()
    world.check_memory()


def look_beside_removals(twin: Model) -> None:
    world = World(twin, Shape(2, 20, "float16"), twin.seed)
    keys = world.full()
    world.begin(keys)
    reading, writing = twin.stream(), twin.stream()
    some = keys[:24]
    stamps = np.where(np.arange(24) % 4, 200, 50).astype(np.uint64)  # of four, one is older than the row
    checks = [world.erase(some, stamps, writing), world.insert(*world.batch(keys[8:16], 500), writing, score=5)]
    launchers.sweep(twin, world.here, score=1, hashed=1 << 62, stream=writing)
    reference.sweep(world.there, score=1, hashed=1 << 62)
    checks.append(world.insert(*world.batch(keys[:6], 600), writing, score=6))
    looks = [world.lookup(keys, reading), world.lookup(keys, reading)]
    twin.synchronize()
    for check in checks:
        check()
    for look in looks:
        look()
    world.check_memory()


def look_for_key_zero(twin: Model) -> None:
    """A slot that is emptied has key 0 from then on, which is a key like others: those who ask for it must not get the row."""
    world = World(twin, Shape(1, 4, "float32"), twin.seed)
    keys = world.new_keys(1 << 14)
    zero = np.zeros(64, np.uint64)
    keys = keys[layout.digest_of(layout.mix64(keys)) == layout.digest_of(layout.mix64(zero[:1]))][:20]
    world.begin(keys)
    reading, writing = twin.stream(), twin.stream()
    check = world.erase(keys, np.full(len(keys), 200, np.uint64), writing)
    looks = [world.lookup(zero, reading), world.lookup(zero, reading), world.export(reading)]
    twin.synchronize()
    check()
    for look in looks:
        look()
    world.check_memory()


def pool_beside_apply(twin: Model, codec: str = "int8", dim: int = 12) -> None:
    world = World(twin, Shape(1, dim, codec), twin.seed)
    keys = world.keys_for(0, 8)
    world.begin(keys)
    reading, writing = twin.stream(), twin.stream()
    for stamp in (200, 300):
        world.apply(*world.batch(keys, stamp), writing)
    asked = np.concatenate([keys, keys[:4], world.new_keys(1)])
    looks = [world.pooled(asked, [0, 3, 3, 5, 8, 11, 13], reading, mode=mode) for mode in ("sum", "mean")]
    twin.synchronize()
    for look in looks:
        look()
    world.check_memory()


def export_beside_apply(twin: Model) -> None:
    world = World(twin, Shape(1, 10, "float16"), twin.seed)
    keys = world.keys_for(0, 20)
    world.begin(keys)
    reading, writing = twin.stream(), twin.stream()
    for stamp in (200, 300):
        world.apply(*world.batch(keys, stamp), writing)
    exports = [world.export(reading), world.export(reading)]
    twin.synchronize()
    for export in exports:
        export()
    world.check_memory()


def _two_writers(world: World, parts: list[U64], score: int) -> None:
    """Insert two batches at once, and look at what came of it."""
    twin, outcomes = world.twin, []
    for part in parts:
        names, stamps, rows = world.batch(part, 200)
        outcomes.append(world.new(len(names), np.uint8))
        on = world.up(names, stamps, rows)
        launchers.insert(twin, world.here, *on, None, outcomes[-1], score=score, admit=True, stream=twin.stream())
    look = world.lookup(np.concatenate(parts), twin.stream())
    twin.synchronize()
    look()
    for told in outcomes:
        assert np.isin(told, [layout.ASSIGNED, layout.INSERTED, layout.REPLACED]).all(), "an insert was lost"
    headers = np.asarray(world.here.headers).view(layout.HEADER)[:, 0]
    _equal("digests", world.here.digests, layout.digest_of(layout.mix64(headers["key"])))
    assert len(set(headers["key"].tolist())) == world.shape.slots, "a key has two slots"
    after = world.lookup(headers["key"].copy())
    twin.synchronize()
    after(headers["key"])


def two_writers(twin: Model) -> None:
    """Not how caches are used: two launches that insert at once into one bucket. Even so nothing is lost."""
    world = World(twin, Shape(1, 8, "float32"), twin.seed)
    keys = world.keys_for(0, 32 + 20)
    world.begin(keys[:32], score=1)
    _two_writers(world, [keys[28:42], keys[42:]], score=9)
    headers = np.asarray(world.here.headers).view(layout.HEADER)[:, 0]
    assert np.isin(keys[32:], headers["key"]).all(), "an insert was lost"


def two_writers_at_par(twin: Model) -> None:
    """The same where all rows score the same: of each bucket both want the lowest slot, to assign to it or to take it."""
    world = World(twin, Shape(8, 8, "float32"), twin.seed)
    world.begin(world.full())
    lowest = np.asarray(world.here.headers).view(layout.HEADER)[:: layout.BUCKET_SLOTS, 0]["key"]
    newcomers = np.concatenate([world.keys_for(bucket, 2) for bucket in range(8)])
    _two_writers(world, [lowest, newcomers], score=1)


def two_appliers(twin: Model) -> None:
    """Two launches that apply at once, to the same keys: each takes what the other has not, and the newest rows stay."""
    world = World(twin, Shape(1, 8, "float32"), twin.seed)
    keys = world.keys_for(0, 20)
    world.begin(keys)
    older, newer = world.batch(keys, 200), world.batch(keys, 300)
    outcomes = []
    for names, stamps, rows in (older, newer):
        outcomes.append(world.new(len(names), np.uint8))
        launchers.apply(twin, world.here, *world.up(names, stamps, rows), outcomes[-1], stream=twin.stream())
    look = world.lookup(keys, twin.stream())
    twin.synchronize()
    look(keys)
    assert np.isin(outcomes[0], [layout.ASSIGNED, layout.KEPT]).all()
    assert (np.asarray(outcomes[1]) == layout.ASSIGNED).all(), "a newer row was not taken"
    after = world.lookup(newer[0])
    twin.synchronize()
    after(keys)
    headers = np.asarray(world.here.headers).view(layout.HEADER)[:, 0]
    _equal("stamps", np.sort(headers["stamp"][headers["stamp"] != 0]), np.sort(newer[1]))


def alone(twin: Model) -> None:
    """Each kernel by itself, at full load: stamps older and newer, scores, keys that share a digest."""
    world = World(twin, Shape(2, 6, "float32"), twin.seed)
    keys = world.full()
    world.begin(keys)
    for stamp in (200, 150, 300):  # the second is older than the first
        world.apply(*world.batch(keys[::3], stamp))
    asked = np.concatenate([keys, world.new_keys(10), keys[:40], keys[:3]])  # some three times
    for policy in layout.POLICIES.values():
        look = world.lookup(asked[: len(asked) - 9 * policy], policy=policy)
        twin.synchronize()
        look(keys)
    world.check_memory()
    newcomers = world.new_keys(24)
    world.insert(*world.batch(newcomers, 400), score=1 << 40)
    world.insert(*world.batch(world.new_keys(8), 400), score=0, admit=False)
    world.insert(*world.batch(world.new_keys(8), 400), score=1 << 33, admit=False)
    world.erase(newcomers[:10], np.where(np.arange(10) % 2, 500, 399).astype(np.uint64))
    world.insert(*world.batch(world.new_keys(12), 500), score=1 << 33)
    world.check_memory()


SCENARIOS = (
    alone,
    look_beside_apply,
    look_beside_inserts,
    look_beside_removals,
    look_for_key_zero,
    pool_beside_apply,
    export_beside_apply,
    two_writers,
    two_writers_at_par,
    two_appliers,
)
