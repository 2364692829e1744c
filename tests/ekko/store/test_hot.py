"""What readers count: close to the truth, fading, shared by processes, and harmless whatever is in the file."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve.reader import Reader
from ekko.store import Store, layout
from ekko.store.hot import Heat, width_log2_for
from ekko.store.kernels import hot as kernels
from ekko.store.manifest import heat_name, hot_name
from ekko.store.memory import AnonymousMemory
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

U64 = NDArray[np.uint64]
ROWS = 100_000
HALF_LIFE_MS = 600_000.0
SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 2)})


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


@pytest.fixture
def store(run_dir: Path) -> Store:
    return Store.open(run_dir)


@pytest.fixture
def model(store: Store) -> ModelStore:
    model = store.add_model(SPEC, capacity_rows=1_000_000)
    keys = np.arange(ROWS, dtype=np.uint64)
    model.apply([RowColumns(table_id("item"), keys, np.ones((ROWS, 2), np.float32).view(np.uint8))], 10)
    return model


def zipf(count: int, exponent: float = 1.2, seed: int = 1) -> U64:
    """uint64[count]: keys of ROWS, the k-th of them k^exponent times rarer than the first."""
    weights = 1.0 / np.arange(1, ROWS + 1) ** exponent
    ranks = np.searchsorted(np.cumsum(weights / weights.sum()), np.random.default_rng(seed).random(count))
    return np.minimum(ranks, ROWS - 1).astype(np.uint64) * np.uint64(2_654_435_761) % np.uint64(ROWS)


def look_up(run_dir: Path, keys: U64, batch: int) -> None:
    with Reader("ctr", run_dir) as reader:
        for begin in range(0, keys.size, batch):
            reader.lookup("item", keys[begin : begin + batch])


def hot_path(run_dir: Path, store: Store) -> Path:
    return store._memory.path(hot_name(SPEC.id, table_id("item")))  # type: ignore[attr-defined]


# --- how close to the truth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [64, 1_000, 4_096, 100_000])
def test_the_hottest_keys_of_a_zipf_stream_are_found_with_how_often(model: ModelStore, run_dir: Path, batch: int) -> None:
    keys = zipf(4_000_000)
    for part in range(8):  # a fold between: what competes for one place does not do so each time
        look_up(run_dir, keys[part::8], batch)
        model.heat["item"].fold(1_000, HALF_LIFE_MS)
    found = model.heat["item"].hottest(100)
    names, counts = np.unique(keys, return_counts=True)
    truth = dict(zip(names.tolist(), counts.tolist(), strict=True))
    best = names[np.argsort(-counts)][:20].tolist()
    assert set(best) <= set(found.keys.tolist())
    assert list(found.requests) == sorted(found.requests, reverse=True)
    for key, estimate in zip(found.keys[:5].tolist(), found.requests[:5].tolist(), strict=True):
        # One in 512 is drawn: the fifth of 4 million has 200 samples, in 500 look-ups; five deviations are 0.4.
        assert truth[key] * 0.6 < estimate < truth[key] * 1.4, key
    stats = model.heat["item"].stats()
    assert stats.keys == keys.size
    assert stats.lookups == sum(-(-keys[part::8].size // batch) for part in range(8))
    assert stats.requests == pytest.approx(keys.size)


def test_short_look_ups_weigh_as_much_as_long_ones(model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        one, many = np.array([7], np.uint64), np.full(1_000, 8, np.uint64)
        for _ in range(600):
            for _ in range(100):
                reader.lookup("item", one)
            reader.lookup("item", many)
    model.heat["item"].fold(1_000, HALF_LIFE_MS)
    short, long = model.heat["item"].hotness(np.array([7, 8], np.uint64))
    # About 480 look-ups of one key are counted, and 78 of a thousand keys: over four deviations.
    assert 60_000 * 0.74 < short < 60_000 * 1.26
    assert 600_000 * 0.5 < long < 600_000 * 1.5


def test_the_sketch_is_never_too_low_and_hardly_ever_too_high() -> None:
    """The bound of Cormode and Muthukrishnan, on a sketch in which every key is counted."""
    memory = AnonymousMemory()
    heat = Heat.attach(1, ("hot", "heat"), memory, 0)
    assert heat.width_log2 == 12
    keys = zipf(200_000, 1.05)
    names, counts = np.unique(keys, return_counts=True)
    add_exactly(memory, heat, names, counts)
    heat.fold(1_000, HALF_LIFE_MS)
    excess = heat.hotness(names) - counts
    assert (excess >= 0).all()
    assert np.mean(excess > np.e / 4_096 * keys.size) <= np.exp(-4)
    assert excess.max() > 0, "a sketch of 4,096 counters a row that is exact for 50,000 keys counts nothing"


def add_exactly(memory: AnonymousMemory, heat: Heat, keys: U64, counts: NDArray[np.int64]) -> None:
    """Count in NumPy, by the layout's document, what readers draw samples of."""
    cells = memory.open("hot").words(layout.HOT.offset("cells"), 2 << heat.width_log2).view(np.uint32).reshape(4, -1)

    def mix(key: U64) -> U64:
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            key = (key ^ key >> np.uint64(33)) * np.uint64(multiplier)
        return key ^ key >> np.uint64(33)

    first = mix(keys ^ np.uint64(heat.seed))
    step = mix(first) | np.uint64(1)
    for row in range(4):
        np.add.at(cells[row], first + np.uint64(row) * step >> np.uint64(64 - heat.width_log2), counts.astype(np.uint32))
    memory.open("hot").words(layout.HOT.offset("keys"))[...] += np.uint64(counts.sum())


def test_absent_keys_are_counted_and_are_hot_too(model: ModelStore, run_dir: Path) -> None:
    gone = np.arange(0, 1_000, dtype=np.uint64)
    model.apply([RowColumns(table_id("item"), gone, np.empty((0, 8), np.uint8))], 11)
    keys = np.random.default_rng(3).permutation(np.repeat(np.array([5, 5_000, ROWS + 5, 2**64 - 1], np.uint64), 1_000_000))
    look_up(run_dir, keys, 500)
    model.heat["item"].fold(1_000, HALF_LIFE_MS)
    assert 3e6 * 0.8 < model.heat["item"].stats().misses < 3e6 * 1.2  # 550 look-ups are counted: 4.5 deviations
    assert set(model.heat["item"].hottest(4).keys.tolist()) == {5, 5_000, ROWS + 5, 2**64 - 1}


def test_padding_is_not_asked_for(model: ModelStore, run_dir: Path) -> None:
    keys = np.full((50, 40), 7, np.uint64)  # three quarters of it padding
    keys[:, ::4] = 5
    calls = 1_000
    with Reader("ctr", run_dir) as reader:
        for _ in range(calls):
            reader.lookup_pooled("item", keys, padding_key=7)
    heat = model.heat["item"]
    heat.fold(1_000, HALF_LIFE_MS)
    asked = calls * keys.size / 4
    assert heat.stats().keys == pytest.approx(asked, rel=0.001)
    hot = heat.hotness(np.array([5, 7], np.uint64))
    assert hot[1] == 0
    assert asked * 0.7 < hot[0] < asked * 1.3  # 250 look-ups are counted, ten samples each


def test_wider_tables_have_wider_sketches() -> None:
    assert [width_log2_for(rows) for rows in (0, 65_536, 66_000, 1_000_000, 1 << 40)] == [12, 12, 13, 16, 18]


# --- time ----------------------------------------------------------------------------------------------------------------


def test_what_was_counted_fades_by_half_per_half_life() -> None:
    memory = AnonymousMemory()
    heat = Heat.attach(1, ("hot", "heat"), memory, 1_000_000)
    key = np.array([42], np.uint64)
    add_exactly(memory, heat, key, np.array([1_000]))
    heat.fold(5_000, HALF_LIFE_MS)
    assert heat.hotness(key)[0] == 1_000
    for minute in range(1, 21):  # two half-lives, in small steps
        heat.fold(5_000 + minute * 60_000, HALF_LIFE_MS)
    assert heat.hotness(key)[0] == pytest.approx(250, rel=1e-3)
    assert heat.stats().requests == pytest.approx(250)
    assert heat.stats().keys == 1_000, "totals do not fade"
    add_exactly(memory, heat, key, np.array([100]))
    heat.fold(5_000 + 1_800_000, HALF_LIFE_MS)
    assert heat.hotness(key)[0] == pytest.approx(225, rel=1e-3)
    heat.fold(0, HALF_LIFE_MS)  # a clock that went back fades nothing
    assert heat.hotness(key)[0] == pytest.approx(225, rel=1e-3)


def test_a_key_that_is_hot_no_more_makes_room() -> None:
    memory = AnonymousMemory()
    heat = Heat.attach(1, ("hot", "heat"), memory, 1_000_000)
    heat._top[:2] = (1, 2)
    heat._word("top_count")[...] = 2
    add_exactly(memory, heat, np.array([2], np.uint64), np.array([8]))
    heat.fold(1_000, HALF_LIFE_MS)
    assert heat.hottest(10).keys.tolist() == [2]
    heat.fold(1_000 + 5 * 600_000, HALF_LIFE_MS)
    assert heat.hottest(10).keys.tolist() == []


# --- many processes ------------------------------------------------------------------------------------------------------

COUNTING = """
import sys
import numpy as np
from ekko.serve.reader import Reader

with Reader("ctr", sys.argv[1]) as reader:
    keys = np.full(4_096, int(sys.argv[2]), np.uint64)
    for _ in range(800):
        reader.lookup("item", keys)
"""


def test_processes_count_into_one_file_and_no_call_is_lost(model: ModelStore, run_dir: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", COUNTING, str(run_dir), str(key)]) for key in (1, 2, 2)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    heat = model.heat["item"]
    heat.fold(1_000, HALF_LIFE_MS)
    assert (heat.stats().lookups, heat.stats().keys) == (2_400, 2_400 * 4_096)
    one, two = heat.hotness(np.array([1, 2], np.uint64))
    # 400 and 800 look-ups are counted: five deviations.
    assert one == pytest.approx(800 * 4_096, rel=0.25)
    assert two == pytest.approx(1_600 * 4_096, rel=0.18)


def test_what_is_hot_outlives_the_daemon(model: ModelStore, store: Store, run_dir: Path) -> None:
    look_up(run_dir, np.full(1_000_000, 3, np.uint64), 1_000)
    model.heat["item"].fold(1_000, HALF_LIFE_MS)
    before = model.heat["item"].hottest(1)
    store.close()
    look_up(run_dir, np.full(1_000_000, 3, np.uint64), 1_000)  # nobody folds meanwhile
    resumed = Store.open(run_dir)
    assert resumed.resumed
    heat = resumed.models["ctr"].heat["item"]
    assert heat.hottest(1).requests.tolist() == before.requests.tolist()
    heat.fold(1_000, HALF_LIFE_MS)
    assert heat.hottest(1).requests[0] == pytest.approx(2_000_000, rel=0.3)


# --- who may write, and what ------------------------------------------------------------------------------------------------


def test_whoever_may_read_the_file_may_count(model: ModelStore, store: Store, run_dir: Path) -> None:
    assert hot_path(run_dir, store).stat().st_mode & 0o777 == 0o660
    heat = store._memory.path(heat_name(SPEC.id, table_id("item")))  # type: ignore[attr-defined]
    assert heat.stat().st_mode & 0o777 == 0o640, "what the daemon makes of it is its own"


@pytest.mark.parametrize("why", ["absent", "not ours", "empty", "another table", "cut short"])
def test_where_a_reader_cannot_count_it_reads_all_the_same(
    model: ModelStore, store: Store, run_dir: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hot_path(run_dir, store)
    match why:
        case "absent":
            path.unlink()
        case "not ours":  # these tests may run as root, whom no mode keeps out
            original = os.open

            def refusing(name: object, flags: int, *rest: int) -> int:
                if name == path and flags & os.O_RDWR:
                    raise PermissionError(13, "Permission denied")
                return original(name, flags, *rest)  # type: ignore[arg-type]

            monkeypatch.setattr(os, "open", refusing)
        case "empty":
            os.truncate(path, 0)
        case "another table":
            path.write_bytes(b"\xff" * path.stat().st_size)
        case "cut short":
            os.truncate(path, layout.PAGE_BYTES)
    with Reader("ctr", run_dir) as reader:
        assert not reader.counting
        assert reader.lookup("item", np.arange(50_000, dtype=np.uint64)).sum() == 100_000
    model.heat["item"].fold(1_000, HALF_LIFE_MS)
    assert model.heat["item"].stats().keys < 1 << 40


@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_reader_writes_does_not_harm_the_daemon(model: ModelStore, store: Store, run_dir: Path, seed: int) -> None:
    path, rng = hot_path(run_dir, store), np.random.default_rng(seed)
    size = path.stat().st_size
    heat = model.heat["item"]
    for now_ms in range(1_000, 9_000, 1_000):
        junk = rng.integers(0, 256, size, dtype=np.uint8) if now_ms % 2_000 else np.full(size, 255 * rng.integers(2), np.uint8)
        with path.open("r+b") as file:
            file.write(junk[: size if seed % 2 else rng.integers(size)].tobytes())
            if seed % 3 == 0:
                file.truncate(rng.integers(size))
        heat.fold(now_ms, HALF_LIFE_MS)
        top, stats = heat.hottest(2_000), heat.stats()
        assert top.keys.size <= layout.HEAT_TOP
        assert np.isfinite(top.requests).all()
        assert np.isfinite(heat.hotness(np.arange(10_000, dtype=np.uint64))).all()
        assert 0 <= stats.requests < 1e18
        assert 0 <= stats.misses < 1 << 63
    # And it is put right: who opens it now counts.
    heat.fold(10_000, HALF_LIFE_MS)
    with Reader("ctr", run_dir) as reader:
        assert reader.counting
    before = heat.stats().lookups
    look_up(run_dir, zipf(100_000), 1_000)
    heat.fold(11_000, HALF_LIFE_MS)
    assert heat.stats().lookups == before + 100


def test_a_counter_that_wraps_around_goes_on() -> None:
    memory = AnonymousMemory()
    heat = Heat.attach(1, ("hot", "heat"), memory, 1_000_000)
    key = np.array([42], np.uint64)
    for _ in range(5):
        add_exactly(memory, heat, key, np.array([2**30 + 2**29]))
        heat.fold(1_000, HALF_LIFE_MS)
    assert heat.hotness(key)[0] == pytest.approx(5 * (2**30 + 2**29))


def test_damaged_heat_is_begun_anew(model: ModelStore, store: Store, run_dir: Path) -> None:
    look_up(run_dir, np.full(1_000_000, 3, np.uint64), 1_000)
    model.heat["item"].fold(1_000, HALF_LIFE_MS)
    path = store._memory.path(heat_name(SPEC.id, table_id("item")))  # type: ignore[attr-defined]
    store.close()
    os.truncate(path, 5_000)
    resumed = Store.open(run_dir)
    assert resumed.resumed
    assert resumed.models["ctr"].heat["item"].stats().keys == 0


# --- the cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_counting_costs_next_to_nothing(model: ModelStore, run_dir: Path) -> None:
    """The bound here is loose, for a machine that is shared; `scripts/bench lookup` has the figure."""
    keys = zipf(4_096 * 50).reshape(-1, 4_096)
    out = np.empty((4_096, 2), np.float32)
    with Reader("ctr", run_dir) as reader:
        view = reader._table("item")

        def cost(count: object) -> float:
            view._count = count  # type: ignore[assignment]
            began = time.thread_time()
            for batch in keys:
                reader.lookup("item", batch, out=out)
            return time.thread_time() - began

        with_counting, without = zip(*[(cost(view.counter.count), cost(lambda *_: None)) for _ in range(9)], strict=True)
    assert min(with_counting) < 1.15 * min(without)
    assert kernels.PERIOD >= 4 * kernels.SAMPLE_GAP
