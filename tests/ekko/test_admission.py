"""Feature admission: never late, hardly ever early, bounded, and kept by what is in use."""

from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.errors import ConfigError, ModelError
from ekko.train.admission import Admission
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec


def keys_of(*keys: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(keys, np.uint64)


def admitted(admission: Admission, keys: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> list[int]:
    mask = admission.admit(keys)
    return keys.tolist() if mask is None else keys[mask].tolist()


def test_a_key_is_admitted_at_its_nth_touch_and_stays() -> None:
    admission = Admission(3, keys=1_000)
    seen = [admitted(admission, keys_of(5, 6)) for _ in range(2)]
    assert seen == [[], []]
    assert admission.held_back == 4
    assert admitted(admission, keys_of(5)) == [5]
    assert admitted(admission, keys_of(5, 7)) == [5]
    assert admitted(admission, keys_of(6)) == [6]
    assert admission.held_back == 5


def test_from_the_first_touch_all_go() -> None:
    admission = Admission(1)
    assert admission.admit(keys_of(1, 2, 2)) is None
    assert admission.held_back == 0


def test_a_key_that_occurs_twice_in_a_call_is_touched_once_and_its_last_row_counts() -> None:
    admission = Admission(2, keys=1_000)
    keys = keys_of(4, 4, 9, 4)
    first = admission.admit(keys)
    assert first is not None
    assert not first.any()
    second = admission.admit(keys)
    assert second is not None
    assert second.tolist() == [False, False, True, True]


@pytest.mark.parametrize("needed", [2, 3, 10])
def test_never_late_and_hardly_ever_early(needed: int) -> None:
    rng = np.random.default_rng(needed)
    admission, truth = Admission(needed, keys=20_000), Counter[int]()
    early = asked = 0
    for _ in range(200):
        batch = np.unique(rng.zipf(1.1, 500).astype(np.uint64) % np.uint64(20_000))
        truth.update(batch.tolist())
        mask = admission.admit(batch)
        chosen = np.ones(batch.size, np.bool_) if mask is None else mask
        due = np.array([truth[key] >= needed for key in batch.tolist()])
        assert chosen[due].all(), "late"
        early += int(np.count_nonzero(chosen & ~due))
        asked += int(np.count_nonzero(~due))
    assert asked > 5_000
    assert early <= 0.01 * asked


def test_what_is_in_use_stays_and_the_rest_is_forgotten_in_bounded_memory() -> None:
    admission = Admission(2, keys=1_000)
    size = admission._young.nbytes
    hot = np.arange(100, dtype=np.uint64)
    admission.admit(hot)
    admission.admit(hot)
    cold = keys_of(999_999)
    admission.admit(cold)
    for begin in range(1_000, 50_000, 500):  # fifty generations of keys that are seen once
        fresh = np.arange(begin, begin + 500, dtype=np.uint64)
        mask = admission.admit(fresh)
        assert mask is not None
        assert mask.mean() < 0.02
        assert admission.admit(hot) is None, "what is in use was forgotten"
    assert admitted(admission, cold) == [], "what was seen once long ago is remembered for ever"
    assert admission._young.nbytes == admission._old.nbytes == size


@pytest.mark.parametrize(("touches", "keys"), [(0, 10), (256, 10), (True, 10), (2.0, 10), (2, 0), (2, 1 << 31)])
def test_numbers_out_of_range_are_refused(touches: int, keys: int) -> None:
    with pytest.raises(ConfigError, match="expected a whole number from 1 to"):
        Admission(touches, keys)


@pytest.mark.processes
def test_a_publisher_holds_rows_back_and_then_sends_the_newest(tmp_path: Path) -> None:
    models = {"ctr": ModelTables({"item": 2, "user": 2})}
    with LocalCluster(tmp_path, [NodeSpec("solo", "eu", "train")], models=models) as cluster:
        cluster.start()
        address = cluster["solo"].local
        with pytest.raises(ModelError, match="unknown table 'shop'"):
            ekko.Publisher(address, model="ctr", admission={"shop": 2})
        with (
            ekko.Publisher(address, model="ctr", admission={"item": 3}) as publisher,
            closing(ekko.Reader("ctr", run_dir=cluster["solo"].run_dir)) as reader,
        ):
            for touch in range(1, 5):
                with publisher.step() as step:
                    for table in ("item", "user"):
                        step.publish(table, [8], np.full((1, 2), touch, np.float32), [1.0])
                assert reader.lookup("item", [8])[0, 0] == (0 if touch < 3 else touch)
                assert reader.lookup("user", [8])[0, 0] == touch
            assert publisher.rows_held_back == 2
            before = publisher.last_stamp
            assert publisher.publish("item", [9], np.ones((1, 2), np.float32)) == before, "nothing is left: not a step"
            assert publisher.delete("item", [8, 10]) > before, "deletes always go"
            assert reader.lookup("item", [8])[0, 0] == 0
            publisher.publish("item", [8], np.full((1, 2), 9, np.float32))
            assert reader.lookup("item", [8])[0, 0] == 9
            with pytest.raises(ModelError, match="expected float32"):
                publisher.publish("item", [11], np.ones((1, 2)))  # what would be held back is checked all the same
