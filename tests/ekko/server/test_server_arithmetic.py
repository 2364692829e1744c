"""The arithmetic of groups of pushes without a node: places of keys, and what several groups come to for those who serve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.config.sections import ServerModelSection
from ekko.train.server.arithmetic import TableWork, Unit, place
from ekko.train.server.rows import Changed, _each_once
from ekko.train.server.schema import trained_model
from ekko.train.server.serving import _merged

DIM, PARTITIONS = 8, 4
MODEL = trained_model(
    "ctr",
    ServerModelSection(partitions=PARTITIONS, tables={"item": {"dim": DIM, "optimizer": {"name": "adagrad", "lr": 0.1}}}),
    64,
)
TABLE = MODEL.tables["item"]
ALL = tuple(range(PARTITIONS))
Pushes = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=4)


@given(Pushes, st.integers(0, 1_000))
def test_a_group_does_what_its_pushes_do_one_after_another(pushes: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, state = rng.standard_normal((31, DIM), dtype=np.float32), np.ones((31, DIM), np.float32)
    wanted, wanted_state = rows.copy(), state.copy()
    units = []
    for one in pushes:
        keys, gradients = _each_once(np.array(one, np.uint64), rng.standard_normal((len(one), DIM), dtype=np.float32))
        assert len(set(keys.tolist())) == len(keys)
        at = keys.astype(np.int64)
        own, kept = wanted[at], wanted_state[at]
        TABLE.optimizer.apply(own, kept, gradients, step=1, rate=1.0)
        wanted[at], wanted_state[at] = own, kept
        units.append(Unit(keys, gradients, float("nan"), ALL))
    keys = place(units, MODEL)
    assert sorted(keys.tolist()) == sorted({key for one in pushes for key in one})
    if len(units) > 1:
        assert (np.diff(MODEL.partition_of(keys)) >= 0).all(), "rows of a partition lie together"
    at, there = keys.astype(np.int64), np.ones(len(keys), np.bool_)
    work = TableWork(TABLE, units, keys, rows[at], there, state[at], there, {})
    keys, own, kept, _ = work.compute(MODEL.partition_of)
    assert own.tobytes() == wanted[at].tobytes()
    assert kept.tobytes() == wanted_state[at].tobytes()


def test_keys_that_come_once_are_taken_as_they_come() -> None:
    keys, gradients = np.array([9, 3, 5], np.uint64), np.ones((3, DIM), np.float32)
    assert _each_once(keys, gradients) == (keys, gradients)


@given(st.lists(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=20), min_size=2, max_size=4))
def test_of_groups_that_are_served_together_the_newest_row_of_each_key_goes(groups: list[list[int]]) -> None:
    newest: dict[int, float] = {}
    moved: dict[int, float] = {}
    given_groups = []
    for number, one in enumerate(groups):
        newest |= {key: 100.0 * number + key for key in one}
        moved = {key: moved.get(key, 0.0) + (1.0 if key in one else 0.0) for key in {*moved, *one}}
        rows = np.repeat(np.array([[100.0 * number + key] for key in one], np.float32), DIM, axis=1)
        given_groups.append({"item": Changed(np.array(one, np.uint64), rows, np.ones(len(one), np.float32))})
    merged = _merged(given_groups)["item"]
    keys = merged.keys.tolist()
    assert sorted(keys) == sorted(newest)
    assert merged.rows[:, 0].tolist() == pytest.approx([newest[key] for key in keys])
    assert merged.significance.tolist() == [moved[key] for key in keys]
