"""Classes at the origin: which rows of a step stand out, whoever says how much they matter."""

import numpy as np
import pytest

from ekko.codec import encode
from ekko.errors import PublishError
from ekko.model import DENSE_SPEC, ModelSpec, TableSpec, TensorSpec
from ekko.priority.origin import ModelPriority, Priorities, check_significance
from ekko.priority.settings import PrioritySettings
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.classes import FOREMOST_ORDINARY, LEAST, MOST, NOT_KNOWN, SIGNIFICANT
from p2p.messages import Now
from p2p.replica import RowColumns
from p2p.stamps import make_stamp

F32 = np.float32
DIM = 8
SPEC = TableSpec("item", DIM)
ROWS = 10_000
UNIX_MS = 1_700_000_000_000
OLD = PrioritySettings(fresh_weight=0.0)


class Origin:
    """Publishes to one model in memory, with a clock of its own."""

    def __init__(self, settings: PrioritySettings = OLD, share: float = 1.0) -> None:
        self.model: ModelStore = Store.anonymous().add_model(ModelSpec("ctr", 8, {"item": SPEC}))
        self.priority = ModelPriority(self.model, settings)
        self.share = share
        self.ms = 1_000
        self.writes = 0

    def classify(self, columns: list[RowColumns], said: list[np.ndarray | None]) -> list[np.ndarray]:
        now = Now(self.ms, UNIX_MS + self.ms)
        found = self.priority.classify(columns, said, now, self.share)
        assert [one.keys is given.keys for one, given in zip(found, columns, strict=True)]
        self.writes += 1
        self.model.apply(found, make_stamp(UNIX_MS + self.ms, self.writes % 1000, 3))
        classes = [one.priority for one in found]
        assert all(one is not None and one.dtype == np.uint8 for one in classes)
        return classes  # type: ignore[return-value]

    def publish(self, keys: object, rows: np.ndarray, said: object = None) -> np.ndarray:
        """Classes of one table's rows; `rows` of fewer keys delete the others."""
        column = RowColumns(SPEC.id, np.asarray(keys, np.uint64), encode("float32", np.ascontiguousarray(rows, F32)))
        return self.classify([column], [None if said is None else np.asarray(said, F32)])[0]


def full(count: int, value: float = 0.0) -> np.ndarray:
    return np.full((count, DIM), value, F32)


def begun(settings: PrioritySettings = OLD, share: float = 1.0) -> Origin:
    """With all rows stored, and a minute of ordinary movement seen."""
    origin = Origin(settings, share)
    rng = np.random.default_rng(5)
    keys = np.arange(ROWS)
    origin.publish(keys, full(ROWS))
    for _ in range(8):
        origin.ms += 10_000
        origin.publish(keys, rng.exponential(1, (ROWS, 1)) * full(ROWS, 1.0))
    return origin


def test_rows_that_move_far_are_significant() -> None:
    origin = begun()
    now = origin.model.lookup("item", np.arange(1_000, dtype=np.uint64))[0]
    moved = now + 1
    moved[7] += 50
    classes = origin.publish(np.arange(1_000), moved)
    assert classes[7] >= SIGNIFICANT + 16
    assert (np.delete(classes, 7) < SIGNIFICANT).all()
    again = origin.publish(np.arange(1_000), moved)
    assert (again == LEAST).all(), "what does not change need not hurry"


def test_what_the_publisher_says_comes_before_what_moves() -> None:
    origin = begun()
    rng = np.random.default_rng(6)
    said = rng.exponential(1e-6, ROWS)
    for _ in range(3):
        classes = origin.publish(np.arange(ROWS), full(ROWS, 5.0), said)
    assert 0.005 < (classes >= SIGNIFICANT).mean() <= 0.015
    assert said[classes >= SIGNIFICANT].min() > said[classes < SIGNIFICANT].max()


def test_what_is_not_said_of_some_rows_is_looked_at() -> None:
    origin = begun()
    rows = origin.model.lookup("item", np.arange(1_000, dtype=np.uint64))[0] + 1
    rows[7] += 50
    said = np.full(1_000, 1e-3)
    said[:500] = np.nan
    for _ in range(3):
        rows += 1
        rows[7] += 50
        classes = origin.publish(np.arange(1_000), rows, said)
    assert classes[7] >= SIGNIFICANT
    assert (np.delete(classes, 7) < SIGNIFICANT).all()


def test_scale_does_not_matter() -> None:
    """Models of other gradient scales get the same classes."""
    rng = np.random.default_rng(7)
    weights = rng.lognormal(0, 2, (5, 2_000))
    classes = []
    for scale in (1e-12, 1.0, 1e12):
        origin = Origin()
        classes.append(np.array([origin.publish(np.arange(2_000), full(2_000), one * scale) for one in weights]))
    assert (np.abs(classes[0].astype(int) - classes[1]) <= 1).all(), "up to rounding"
    assert (np.abs(classes[2].astype(int) - classes[1]) <= 1).all()


def test_before_anything_is_known_rows_are_ordinary() -> None:
    origin = Origin()
    assert (origin.publish(np.arange(100), full(100, 3.0)) == NOT_KNOWN).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_constant_gradients_make_nothing_stand_out(value: float) -> None:
    origin = Origin()
    for _ in range(3):
        classes = origin.publish(np.arange(1_000), full(1_000), np.full(1_000, value))
    assert (classes < SIGNIFICANT).all()


def test_an_exploding_gradient_does_not_hide_all_others_for_long() -> None:
    origin = begun()
    rng = np.random.default_rng(8)
    said = rng.exponential(1, 1_000)
    origin.publish(np.arange(1_000), full(1_000), said)
    assert (origin.publish(np.arange(10), full(10), np.full(10, 1e38)) == MOST).all()
    for _ in range(30):
        origin.ms += 5_000
        classes = origin.publish(np.arange(1_000), full(1_000), said)
    assert 0.004 < (classes >= SIGNIFICANT).mean() < 0.02


def test_a_new_key_is_significant_and_ages() -> None:
    origin = begun(PrioritySettings(fresh_weight=8.0, fresh_half_life_s=10))
    new = origin.publish([ROWS + 1], full(1, 0.001))
    assert new[0] >= SIGNIFICANT, "no reader has anything of it"
    old = origin.publish([1], origin.model.lookup("item", np.array([1], np.uint64))[0] + 0.001)
    assert old[0] < SIGNIFICANT
    fading = []
    for number in range(4):
        origin.ms += 10_000
        fading.append(int(origin.publish([ROWS + 1], full(1, 0.002 + number / 1_000))[0]))
    assert fading == sorted(fading, reverse=True)
    assert fading[0] == pytest.approx(int(new[0]) - 8, abs=1), "half as fresh is eight classes less"
    assert fading[-1] < SIGNIFICANT
    assert origin.publish([ROWS + 1], full(0))[0] < SIGNIFICANT, "what is deleted is not fresh"
    assert origin.publish([ROWS + 1], full(1, 0.002))[0] >= SIGNIFICANT, "it is created again"


def test_keys_are_new_also_where_the_publisher_says_what_matters() -> None:
    origin = begun(PrioritySettings(fresh_weight=8.0, fresh_half_life_s=10))
    said = np.random.default_rng(4).exponential(1, 1_000)
    for _ in range(3):
        origin.publish(np.arange(1_000), full(1_000), said)
    assert origin.publish([ROWS + 1], full(1), [0.01])[0] >= SIGNIFICANT
    origin.ms += 60_000
    assert origin.publish([ROWS + 1], full(1), [0.01])[0] < SIGNIFICANT
    origin.publish([ROWS + 1], full(0), [0.01])
    assert origin.publish([ROWS + 1], full(1), [0.01])[0] >= SIGNIFICANT, "it was deleted meanwhile"


def test_a_delete_counts_as_the_way_to_zero() -> None:
    origin = begun()
    origin.publish([1], full(1, 1000.0))
    assert origin.publish([1, 2], full(0))[0] >= SIGNIFICANT


@pytest.mark.parametrize(("share", "shift"), [(1.0, 0), (2.0, 8), (0.5, -8), (0.0, -48), (1e-9, -48)])
def test_a_model_that_is_asked_for_more_goes_first(share: float, shift: int) -> None:
    plain, shared = begun(), begun(share=share)
    rows = np.random.default_rng(9).exponential(1, (1_000, 1)) * full(1_000, 1.0)
    one, other = plain.publish(np.arange(1_000), rows), shared.publish(np.arange(1_000), rows)
    clear = (one > 60) & (one < MOST - 10)
    assert clear.sum() > 500
    assert (other[clear].astype(int) - one[clear] == shift).all()


def test_rows_of_dense_tensors_leave_together_behind_what_is_significant() -> None:
    """However far each moved: half a tensor is not what was learnt. And rows of tables are weighed without them."""
    origin, plain = begun(), begun()
    tensor = TensorSpec("w", (1_000 * 256,), "float32")
    origin.model.add_tensor(tensor)
    rng = np.random.default_rng(10)
    for _ in range(3):
        rows = rng.exponential(1, (tensor.rows, 1)).astype(F32) * np.ones((tensor.rows, 256), F32)
        (classes,) = origin.classify([RowColumns(DENSE_SPEC.id, tensor.keys, encode("float32", rows))], [None])
        assert set(classes.tolist()) == {FOREMOST_ORDINARY}
    rows = rng.exponential(1, (1_000, 1)) * full(1_000, 1.0)
    assert (origin.publish(np.arange(1_000), rows) == plain.publish(np.arange(1_000), rows)).all()


def test_rows_that_a_parameter_server_trains_leave_together() -> None:
    """All of a step has to arrive before its push is answered, however far each row moved."""
    store = Store.anonymous()
    model = store.add_model(ModelSpec("ctr.training", 8, {"item": SPEC}, partitions=2))
    rows = np.arange(5, dtype=F32)[:, None] * full(5, 1.0)
    column = RowColumns(SPEC.id, np.arange(5, dtype=np.uint64), encode("float32", rows))
    (found,) = Priorities(store.models).classify(model, [column], [None], Now(1, UNIX_MS))
    assert found.priority is not None
    assert found.priority.tolist() == [FOREMOST_ORDINARY] * 5


def test_rows_that_drift_slowly_have_a_loss_too() -> None:
    """Each step of row 3 is ordinary; what readers without its steps lose is not."""
    origin = begun(PrioritySettings(formula="loss_impact", fresh_weight=0.0))
    rows = origin.model.lookup("item", np.arange(1_000, dtype=np.uint64))[0]
    typical = float(np.abs(np.random.default_rng(5).exponential(1, 1000)).mean())
    classes = []
    for _ in range(60):
        origin.ms += 100
        rows[3] += 0.3 * typical
        classes.append(int(origin.publish([3], rows[3:4])[0]))
    first = next(i for i, one in enumerate(classes) if one >= SIGNIFICANT)
    assert 3 < first < 59, classes
    assert classes[:first] == sorted(classes[:first])
    assert classes[first + 1] < SIGNIFICANT, "the origin begins anew once the row is sent first"


def test_one_row_steps_and_idle_times() -> None:
    origin = begun()
    for number in range(300):
        assert origin.publish([number], full(1, 1.0)).shape == (1,)
    origin.ms += 3_600_000
    assert origin.publish([5], full(1, 900.0))[0] >= SIGNIFICANT, "the threshold outlives a pause"


@pytest.mark.parametrize("bad", [-1.0, np.inf, -np.inf])
def test_a_weight_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(PublishError, match=r"significance of table 'item' contains negative numbers or infinity"):
        check_significance("item", np.array([1.0, bad], F32))
    check_significance("item", np.array([0.0, np.nan, 3e38], F32))


def test_models_that_are_gone_are_forgotten() -> None:
    store = Store.anonymous()
    one = store.add_model(ModelSpec("one", 8, {"item": SPEC}))
    two = store.add_model(ModelSpec("two", 8, {"item": SPEC}))
    priorities = Priorities(store.models, {"one": PrioritySettings(k=50)})
    column = RowColumns(SPEC.id, np.arange(5, dtype=np.uint64), encode("float32", full(5)))
    priorities.classify(one, [column], [None], Now(1, UNIX_MS))
    picture = priorities.picture(one)
    assert picture is not None
    assert (picture.k, picture.rows) == (50, 5)
    assert priorities.picture(two) is None
    store.drop_model("one", 5)
    priorities.classify(two, [column], [None], Now(1, UNIX_MS))
    assert list(priorities._of) == [two.spec.id]
