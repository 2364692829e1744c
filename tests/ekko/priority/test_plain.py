"""The compiled way to weigh rows against the plain one: equal to the bit, over streams of steps of all kinds."""

import numpy as np
import pytest

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec
from ekko.priority.mean import RecentMean
from ekko.priority.memory import KeyMemory
from ekko.priority.origin import ModelPriority, class_of
from ekko.priority.settings import PrioritySettings
from ekko.priority.threshold import BINS, COUNTED_TOGETHER, Percentile, threshold_of
from ekko.store import Store
from p2p.messages import Now
from p2p.replica import RowColumns
from p2p.stamps import make_stamp
from tests.ekko.priority import plain

F32 = np.float32
DIM = 4
SPEC = TableSpec("item", DIM)
UNIX_MS = 1_700_000_000_000
KEYS = 4_000


def drawn_step(rng: np.random.Generator) -> tuple[RowColumns, np.ndarray | None]:
    """Rows and deletes, some of them new, of any scale, with or without a word on how much they matter."""
    count = int(rng.integers(COUNTED_TOGETHER, KEYS))
    live = count if rng.random() < 0.6 else int(rng.integers(0, count))
    keys = rng.choice(KEYS, count, replace=False).astype(np.uint64)
    rows = (rng.standard_normal((live, DIM)) * 10.0 ** rng.integers(-20, 20)).astype(F32)
    if rng.random() < 0.1 and live:
        rows[rng.integers(live)] = rng.choice([np.nan, np.inf, 3e38])
    if rng.random() < 0.1:
        rows[:] = 0
    said = None if rng.random() < 0.5 else rng.lognormal(rng.integers(-20, 20), rng.integers(0, 4), count).astype(F32)
    if said is not None and rng.random() < 0.3:
        said[rng.random(count) < rng.random()] = np.nan
    return RowColumns(SPEC.id, keys, encode("float32", rows) if live else np.empty((0, 4 * DIM), np.uint8)), said


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_classes_are_those_of_the_plain_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = PrioritySettings(
        k=float(rng.choice([50, 90, 99, 99.9])),
        fresh_weight=float(rng.choice([0.0, 8.0])),
        fresh_half_life_s=float(rng.choice([1.0, 600.0])),
    )
    model = Store.anonymous().add_model(ModelSpec("ctr", 8, {"item": SPEC}))
    compiled, slow = ModelPriority(model, settings), plain.PlainPriority(model.tables_by_id[SPEC.id], settings)
    now_ms, fresh = 1_000, 0
    for number in range(40):
        column, said = drawn_step(rng)
        share = float(rng.choice([1.0, 0.3, 7.0]))
        wanted = slow.classify(column, said, now_ms, share)
        (found,) = compiled.classify([column], [said], Now(now_ms, UNIX_MS + now_ms), share)
        assert found.priority is not None
        assert found.priority.tolist() == wanted.tolist(), number
        assert compiled._percentile.threshold == slow.threshold
        assert {kind: (mean._sum, mean._count) for kind, mean in compiled._means.items()} == {
            kind: (mean.sum, mean.count) for kind, mean in slow.means.items()
        }
        model.apply([column], make_stamp(UNIX_MS + now_ms, number, 3))
        now_ms += int(rng.choice([1, 30, 5_000, 100_000]))
        fresh += len(set(wanted.tolist())) > 2
    assert fresh > 20, "most steps have rows of several classes"
    assert compiled.picture(1.0).rows > 40 * COUNTED_TOGETHER


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 127, 128, 129, 136, 137, 1_000, 8_191, 8_192, 8_193, 20_000])
def test_a_mean_adds_up_as_numpy_does(count: int) -> None:
    rng = np.random.default_rng(count)
    mean, slow = RecentMean(60.0), plain.PlainMean(60.0)
    for ms in (0, 10, 50_000):
        values = rng.lognormal(0, 6, count).astype(F32)  # some far above a hundred times the mean
        mean.add(values, ms)
        if count:
            np.testing.assert_array_equal(slow.relative(values, ms), mean.relative(values))
    assert (mean._sum, mean._count) == (slow.sum, slow.count)


def test_what_is_remembered_of_keys_is_what_the_plain_way_remembers() -> None:
    rng = np.random.default_rng(1)
    memory, slow = KeyMemory(), plain.PlainMemory()
    assert memory.recall(3, np.arange(5, dtype=np.uint64), 7.0).tolist() == [7.0] * 5
    for table in (3, 0xFFFF_FFFF, 3):
        keys, values = rng.integers(0, 1 << 64, 300_000, np.uint64), rng.random(300_000).astype(F32)
        memory.note(table, keys, values)
        slow.note(table, keys, values)
        np.testing.assert_array_equal(memory.recall(table, keys, -np.inf), slow.recall(table, keys))
        np.testing.assert_array_equal(memory.recall(5, keys, -np.inf), slow.recall(5, keys))


@pytest.mark.parametrize("above", [0.5, 0.01, 1e-3])
def test_thresholds_and_classes_are_those_of_the_plain_way(above: float) -> None:
    rng = np.random.default_rng(2)
    histograms = [rng.multinomial(int(rng.integers(1, 10_000)), rng.dirichlet(np.full(BINS, 0.01))) for _ in range(30)]
    top, bottom = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    top[-1], bottom[0] = 9_000, 9_000
    for histogram in [*histograms, top, bottom]:
        assert threshold_of(histogram, above) == plain.threshold_of(histogram, above)
    logarithms = np.concatenate([rng.uniform(-64, 64, 5_000), np.arange(-64, 64, 1 / 32)]).astype(F32)
    for threshold in (None, 0.0, -3.7, 1 / 16, 63.9):
        found, significant = class_of(logarithms, threshold)
        assert found.tolist() == plain.class_of(logarithms, threshold).tolist()
        assert significant == np.count_nonzero(found >= 128)


def test_bins_count_as_numpy_counts() -> None:
    rng = np.random.default_rng(3)
    percentile = Percentile(99, 60)
    logarithms = np.concatenate([rng.uniform(-64, 64, 5_000), np.arange(-64, 64.01, 1 / 32), [64.0, -64.0]]).astype(F32)
    percentile.add(logarithms, 0)
    np.testing.assert_array_equal(percentile.histogram, np.bincount(plain.bins_of(logarithms), minlength=BINS))
