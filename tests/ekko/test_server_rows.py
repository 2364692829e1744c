"""Rows of a server beside a real node: the arithmetic of groups, what a crash leaves half done, and what is served."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import ekko
from ekko.config.sections import ServerModelSection
from ekko.train.optimizers import aggregate
from ekko.train.server.events import Apply, Mark, Step
from ekko.train.server.rows import TrainingRows
from ekko.train.server.schema import (
    MARKS_TABLE,
    STATE_SUFFIX,
    STEPS_SUFFIX,
    numbers_of,
    own_keys,
    trained_model,
    training_spec,
    words_of,
)
from ekko.train.server.serving import ServedRows
from ekko.train.server.undo import Before
from ekko.train.server.wire import Push
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec

pytestmark = pytest.mark.processes

PARTITIONS, SHARDS, DIM = 4, 64, 8
ALL = tuple(range(PARTITIONS))
TABLES: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": {"name": "sgd", "lr": 0.5}, "initializer": {"name": "normal", "std": 0.1, "seed": 3}},
    "grad": {"optimizer": {"name": "adagrad", "lr": 0.1, "initial_accumulator": 0.1}},
    "adam": {"optimizer": {"name": "adam", "lr": 0.01}},
    "rare": {"optimizer": {"name": "sgd", "lr": 1.0}, "admission": 3},
}
SECTION = ServerModelSection(partitions=PARTITIONS, tables={name: {"dim": DIM, **table} for name, table in TABLES.items()})


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    spec = training_spec("ctr", SECTION, SHARDS)
    models = {
        "ctr": ModelTables(dict.fromkeys(TABLES, DIM), codec="float16"),
        spec.name: ModelTables({table.name: table.dim for table in spec.tables.values()}, partitions=PARTITIONS),
    }
    folder = tmp_path_factory.mktemp("rows")
    with LocalCluster(folder, [NodeSpec("train-1", "home", "train")], models=models) as cluster:
        cluster.start()
        yield cluster["train-1"]


@pytest.fixture
def rows(node: NodeProcess) -> Iterator[TrainingRows]:
    opened = TrainingRows(trained_model("ctr", SECTION, SHARDS), node.run_dir, node.local)
    opened.undo.clear()
    yield opened
    opened.close()


_groups = iter(range(1, 1_000))
_keys = iter(range(0, 1 << 40, 1 << 20))


def fresh_keys(count: int) -> np.ndarray:
    """Keys that no test before used."""
    return np.arange(count, dtype=np.uint64) + np.uint64(next(_keys))


def push(tables: dict[str, tuple[np.ndarray, np.ndarray]], partitions: tuple[int, ...] = ALL, rate: float = np.nan) -> Push:
    return Push("ctr", 0, 1, 1, partitions, tables, rate)


def group(*steps: Step, marks: tuple[Mark, ...] = ()) -> Apply:
    return Apply(next(_groups), steps, marks)


def carry_out(rows: TrainingRows, wanted: Apply, pushes: dict[int, Push]) -> Any:
    prepared = rows.prepare(wanted, pushes)
    rows.publish(prepared)
    rows.undo.clear()
    return prepared


def gradients(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal((count, DIM), dtype=np.float32)


@pytest.mark.parametrize("table", ["plain", "grad", "adam"])
@pytest.mark.parametrize("summed", [False, True])
def test_a_group_is_what_the_optimiser_does_push_by_push(rows: TrainingRows, table: str, summed: bool) -> None:
    rng, keys = np.random.default_rng(5), fresh_keys(60)
    trained = rows.model.tables[table]
    expected = trained.initializer.rows(table, keys, DIM)
    state = trained.optimizer.initial_state(expected)
    had = int(numbers_of(rows.reader.lookup(table + STEPS_SUFFIX, rows_of_steps())).max()) if table == "adam" else 0
    for number in range(4):
        pushes = {}
        for ask in (1, 2, 3):
            chosen = rng.choice(keys, 40)  # some twice
            pushes[ask] = push({table: (chosen, gradients(rng, 40))}, rate=0.25 if ask == 2 and not summed else np.nan)
        carry_out(rows, group(Step(ALL, (1, 2, 3), summed)), pushes)
        units = [[1, 2, 3]] if summed else [[1], [2], [3]]
        for place, asks in enumerate(units):
            parts = [pushes[ask].tables[table] for ask in asks]
            unique, total = aggregate([part[0] for part in parts], [part[1] for part in parts])
            at = np.searchsorted(keys, unique)
            weights, kept = expected[at], state[at]
            rate = 0.25 / trained.rate if asks == [2] else 1.0
            step = had + number * len(units) + place + 1
            trained.optimizer.apply(weights, kept, np.ascontiguousarray(total), step=step, rate=rate)
            expected[at], state[at] = weights, kept
        assert rows.pull({table: keys})[table].tobytes() == expected.tobytes()
    if trained.state_dim:
        held, stamps = rows.reader.lookup(table + STATE_SUFFIX, keys, stamps=True)
        assert held[stamps != 0].tobytes() == state[stamps != 0].tobytes()
        assert (stamps != 0).sum() > 50


def rows_of_steps() -> np.ndarray:
    return np.ascontiguousarray(own_keys(SHARDS, PARTITIONS)[:, 0])


def test_a_push_that_was_divided_counts_in_each_part_once(rows: TrainingRows) -> None:
    keys = fresh_keys(50)
    ones = np.ones((50, DIM), np.float32)
    some, others = (0, 2), (1, 3)
    before = rows.pull({"plain": keys})["plain"]
    pushes = {1: push({"plain": (keys, ones)})}
    carry_out(rows, group(Step(some, (1,), False)), pushes)
    moved = rows.pull({"plain": keys})["plain"]
    belongs = np.isin(rows.model.partition_of(keys), some)
    assert (moved[belongs] == before[belongs] - np.float32(0.5)).all()
    assert (moved[~belongs] == before[~belongs]).all()
    carry_out(rows, group(Step(others, (1,), False)), pushes)
    assert (rows.pull({"plain": keys})["plain"] == before - np.float32(0.5)).all()


def test_marks_come_back_as_they_were_put(rows: TrainingRows) -> None:
    marks = (Mark(0, 7, (1 << 63) - 5, 12), Mark(3, 7, 17, (1 << 62) + 3), Mark(3, 1_023, 2, 65_536))
    carry_out(rows, group(marks=marks), {})
    assert [mark for mark in rows.marks([0, 3]) if mark.worker in (7, 1_023)] == list(marks)
    numbers = np.array([0, 1, 65_535, 65_536, (1 << 64) - 1], np.uint64)
    assert numbers_of(words_of(numbers)).tolist() == numbers.tolist()


@pytest.mark.parametrize("published", ["grad", MARKS_TABLE, ""])
def test_what_a_crash_leaves_half_done_is_taken_back(rows: TrainingRows, node: NodeProcess, published: str) -> None:
    """The node has this table of the step when it ends, or all of it and nobody else."""
    old, new = fresh_keys(20), fresh_keys(20)
    ones = np.ones((40, DIM), np.float32)
    carry_out(rows, group(Step(ALL, (1,), False), marks=(Mark(1, 5, 9, 1),)), {1: push({"grad": (old, ones[:20])})})
    both = np.concatenate([old, new])
    before = rows.reader.lookup("grad", both, stamps=True)[0], rows.reader.lookup("grad" + STATE_SUFFIX, both)
    prepared = rows.prepare(group(Step(ALL, (1,), False), marks=(Mark(1, 5, 9, 2),)), {1: push({"grad": (both, ones)})})
    prepared.columns = [column for column in prepared.columns if published in ("", column[0])]
    rows.publish(prepared)
    half = rows.reader.lookup("grad", both).tobytes() != before[0].tobytes(), Mark(1, 5, 9, 2) in rows.marks([1])
    assert half == (published in ("", "grad"), published in ("", MARKS_TABLE))
    again = TrainingRows(rows.model, node.run_dir, node.local)  # the process that is started next
    try:
        assert again.take_back() is not None
        again.undo.clear()
        rows_now, stamps = again.reader.lookup("grad", both, stamps=True)
        assert rows_now.tobytes() == before[0].tobytes()
        assert (stamps[20:] == 0).all(), "rows that there were none of are gone again"
        assert again.reader.lookup("grad" + STATE_SUFFIX, both).tobytes() == before[1].tobytes()
        assert Mark(1, 5, 9, 1) in again.marks([1])
        assert again.take_back() is None
    finally:
        again.close()


def test_a_step_that_is_there_is_told_from_one_that_is_not(rows: TrainingRows) -> None:
    keys = fresh_keys(5)
    marks = (Mark(0, 6, 3, 1), Mark(2, 6, 3, 1))
    ones = {1: push({"plain": (keys, np.ones((5, DIM), np.float32))})}
    prepared = rows.prepare(group(Step(ALL, (1,), False), marks=marks), ones)
    assert not rows.has(marks)
    rows.publish(prepared)
    assert rows.has(marks)
    assert not rows.has((*marks, Mark(1, 6, 3, 1)))
    assert rows.has((Mark(0, 6, 3, 0), *marks)), "of two of one worker in one partition the last one is stored"


def test_a_record_that_is_written_over_is_none_until_it_is_whole(rows: TrainingRows, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Before("plain", fresh_keys(4), np.ones((4, DIM), np.float32), np.ones(4, np.bool_))
    rows.undo.write([whole])
    assert rows.undo.read()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rows.undo, "_array", killed)
        with pytest.raises(KeyboardInterrupt):
            rows.undo.write([whole])
    assert not rows.undo.read()


def test_rows_of_partitions_that_were_handed_over_meanwhile_are_not_served(rows: TrainingRows, node: NodeProcess) -> None:
    keys = fresh_keys(200)
    served = ServedRows(rows, node.run_dir, node.local)
    carry_out(rows, group(Step(ALL, (1,), False)), {1: push({"plain": (keys, np.ones((200, DIM), np.float32))})})
    asked = iter([frozenset(ALL)])  # ours when it begins, and others' when it comes to the rows
    served.reconcile(lambda: next(asked, frozenset((3,))))
    with ekko.Reader("ctr", run_dir=node.run_dir) as reader:
        _, stamps = reader.lookup("plain", keys, stamps=True)
    assert ((stamps != 0) == (rows.model.partition_of(keys) == 3)).all()
    served.close()


def test_keys_are_admitted_once_they_were_pushed_often_enough(rows: TrainingRows) -> None:
    keys = fresh_keys(10)
    ones = {"rare": (keys, np.ones((10, DIM), np.float32))}
    for ask, expected in ((1, 0.0), (2, 0.0), (3, -1.0), (4, -2.0)):
        carry_out(rows, group(Step(ALL, (ask,), False)), {ask: push(ones)})
        assert (rows.pull({"rare": keys})["rare"] == expected).all(), ask
    assert rows.counts.not_admitted == 20


def test_a_row_that_would_be_no_number_stays_as_it_was(rows: TrainingRows) -> None:
    keys = fresh_keys(3)
    start = np.array([[1.0] * DIM, [3e38] * DIM, [1.0] * DIM], np.float32)
    carry_out(rows, group(Step(ALL, (1,), False)), {1: push({"plain": (keys, start)})})
    before = rows.pull({"plain": keys})["plain"]
    again = start.copy()
    again[1] = -3.4e38
    for _ in range(3):
        carry_out(rows, group(Step(ALL, (1,), False)), {1: push({"plain": (keys, again)})})
    after = rows.pull({"plain": keys})["plain"]
    assert np.isfinite(after).all()
    assert (after[[0, 2]] == before[[0, 2]] - np.float32(1.5)).all()
    assert rows.counts.not_finite


def test_what_is_trained_is_served_in_the_served_codec_and_what_was_left_out_is_found(
    rows: TrainingRows, node: NodeProcess
) -> None:
    rng, keys = np.random.default_rng(1), fresh_keys(300)
    served = ServedRows(rows, node.run_dir, node.local)
    with ekko.Reader("ctr", run_dir=node.run_dir) as reader:
        for _ in range(2):
            served.add(
                carry_out(rows, group(Step(ALL, (1,), False)), {1: push({"plain": (keys, gradients(rng, 300))})}).changed
            )
        served.publish()
        trained = rows.pull({"plain": keys})["plain"]
        assert (reader.lookup("plain", keys) == trained.astype(np.float16)).all()
        assert served.counts.served == 300, "two groups are one step of it"
        # A server that ends here has trained what it has not served.
        lost = carry_out(rows, group(Step(ALL, (1,), False)), {1: push({"plain": (keys[:50], gradients(rng, 50))})})
        assert set(lost.changed) == {"plain"}
        served.reconcile(lambda: frozenset((0, 1)))
        trained = rows.pull({"plain": keys})["plain"].astype(np.float16)
        ours = np.isin(rows.model.partition_of(keys), (0, 1))
        differ = (reader.lookup("plain", keys) != trained).any(axis=1)
        assert not differ[ours].any()
        assert differ[~ours].any(), "partitions of others are theirs"
        served.reconcile(lambda: frozenset(ALL))
        assert (reader.lookup("plain", keys) == trained).all()
        before = served.counts.reconciled
        served.reconcile(lambda: frozenset(ALL))
        assert served.counts.reconciled == before
    served.close()


def test_what_is_trained_and_what_is_served_of_it_are_one_request_where_nothing_older_is_due(
    rows: TrainingRows, node: NodeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, keys = np.random.default_rng(2), fresh_keys(40)
    served = ServedRows(rows, node.run_dir, node.local)
    pushes = {1: push({"plain": (keys, gradients(rng, 40)), "grad": (keys, gradients(rng, 40))})}
    first = rows.prepare(group(Step(ALL, (1,), False)), pushes)
    with monkeypatch.context() as patched:
        patched.setattr("ekko.train.connection.LOCAL_MESSAGE_BYTES_MAX", 4_096)
        assert served.publish_pair(first) is None, "each may be published alone"
    stored = served.publish_pair(first)
    rows.undo.clear()
    assert stored is not None
    assert stored.everywhere
    assert stored.second is not None
    assert stored.second > stored.stamp
    second = rows.prepare(group(Step(ALL, (1,), False)), pushes)
    rows.publish(second)
    served.add(second.changed)
    third = rows.prepare(group(Step(ALL, (1,), False)), pushes)
    assert served.publish_pair(third) is None, "what is due would be published after it, and be older"
    served.publish()
    assert served.publish_pair(third) is not None
    rows.undo.clear()
    assert served.counts.served == 240
    with ekko.Reader("ctr", run_dir=node.run_dir) as reader:
        for table in ("plain", "grad"):
            assert (reader.lookup(table, keys) == rows.pull({table: keys})[table].astype(np.float16)).all()
    served.close()
