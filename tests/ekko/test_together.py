"""`Reader.together`: look-ups and tensors of one moment, beside processes that write all the time; and what would break it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.errors import ModelError, StoreError
from ekko.model import DENSE_DIM, DENSE_SPEC, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.serve import consistency
from ekko.serve.consistency import Moment
from ekko.serve.reader import Reader
from ekko.serve.together import State
from ekko.store import Store
from ekko.store.batches import UNSETTLED_AHEAD
from p2p.replica import RowColumns
from p2p.stamps import make_stamp
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec

HERE = Path(__file__).parent
KEYS = 400  # of each writer of step_writer.py
LOOK_UPS = 60
TRAINED = 300  # rows of counting_trainer.py
DEADLINE_S = 100  # below that of a test
NODES = (NodeSpec("train-1", "home", "train"), NodeSpec("eu-1", "eu"))
MODELS = {"ctr": ModelTables({"item": 16, "user": 4}, capacity_rows=1_000)}


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


@contextmanager
def process(script: str, *arguments: str) -> Iterator[None]:
    command = [sys.executable, str(HERE / script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "ready\n"
            yield
        finally:
            started.kill()


def several(look: Callable[[], list[set[float]]], enough: Callable[[list[list[set[float]]]], bool]) -> list[list[set[float]]]:
    """What look-ups showed until it is enough: of each, some sets that have one number each if they are of one step."""
    seen: list[list[set[float]]] = []
    deadline = time.monotonic() + DEADLINE_S
    while not enough(seen):
        assert time.monotonic() < deadline, f"not enough after {len(seen)} look-ups"
        try:
            seen.append(look())
        except StoreError as error:  # between two batches there may be no time, on a busy machine
            if "no consistent look-up" not in str(error):
                raise
    return seen


def mixed(seen: list[list[set[float]]]) -> bool:
    return any(len(numbers) != 1 for look in seen for numbers in look)


def many(seen: list[list[set[float]]]) -> bool:
    return len(seen) >= LOOK_UPS and seen[0] != seen[-1]


# --- a writer that applies one batch after the other to the store, without a pause


def of_both_writers(state: State) -> list[set[float]]:
    """One look-up says what the next one asks for, and tensors come last."""
    shown: list[set[float]] = [set(), set()]
    first = state.lookup("item", np.arange(2 * KEYS))
    keys = np.arange(2 * KEYS)[(first[:, 0] > 0)]
    pooled = state.lookup_pooled("user", keys[:, None], mode="sum")
    for place in (0, 1):
        tensor = state.dense(f"top.{place + 3}")
        part = slice(place * KEYS, (place + 1) * KEYS)
        shown[place] = {float(value) for values in (first[part], pooled[part], tensor) for value in np.unique(values)}
    return shown


def test_all_look_ups_and_tensors_are_of_one_moment(run_dir: Path) -> None:
    with process("store/step_writer.py", str(run_dir), str(KEYS)), Reader("ctr", run_dir) as reader:
        seen = several(lambda: reader.together(of_both_writers, timeout=5.0), many)
    assert not mixed(seen)
    numbers = [[min(numbers) for numbers in look] for look in seen]
    assert numbers == sorted(numbers)  # and none goes back


def test_planted_bug_a_look_up_does_not_see_whether_its_moment_is_over(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Moment, "check", lambda self: None)
    with process("store/step_writer.py", str(run_dir), str(KEYS)), Reader("ctr", run_dir) as reader:
        several(lambda: reader.together(of_both_writers), mixed)


def test_planted_bug_a_moment_may_have_half_a_step(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word, watch = consistency._UNSETTLED, consistency.watch_word
    monkeypatch.setattr(consistency, "watch_word", lambda address: 0 if address % 4096 == word else watch(address))
    with process("store/step_writer.py", str(run_dir), str(KEYS)), Reader("ctr", run_dir) as reader:
        several(lambda: reader.together(of_both_writers), mixed)


# --- what it does with one caller and a writer that is told when


SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 2)}, {"top": TensorSpec("top", (300,), "float32")})
DAY_MS = 1_700_000_000_000


class Written:
    """A store whose writer is this test."""

    def __init__(self, run_dir: Path) -> None:
        self.model = Store.open(run_dir).add_model(SPEC)

    def put(self, value: float, at_ms: int, *, rows: bool = True, tensor: slice | None = None) -> int:
        """A step at a moment: both rows of the table, some rows of the tensor."""
        stamp = make_stamp(DAY_MS + at_ms, 0, 3)
        columns = []
        if rows:
            values = np.full((2, 2), value, np.float32)
            columns.append(RowColumns(table_id("item"), np.arange(2, dtype=np.uint64), values.view(np.uint8)))
        if tensor is not None:
            keys = SPEC.tensors["top"].keys[tensor]
            columns.append(RowColumns(DENSE_SPEC.id, keys, np.full((len(keys), DENSE_DIM), value, np.float32).view(np.uint8)))
        self.model.apply(columns, stamp)
        self.model.frontier[3] = stamp
        self.model.set_synced_until(0)
        return stamp


@pytest.fixture
def written(run_dir: Path) -> Written:
    return Written(run_dir)


def test_a_function_is_ended_at_the_look_up_that_a_batch_came_into_and_called_again(written: Written, run_dir: Path) -> None:
    written.put(1, 0, tensor=slice(None))
    begun, ended = [], []

    def read(state: State) -> tuple[float, float]:
        begun.append(state)
        first = state.lookup("item", [0])[0, 0]
        if len(begun) < 3:
            written.put(1 + len(begun), len(begun), tensor=slice(None))
        second = state.dense("top")[299]
        ended.append(state)
        return float(first), float(second)

    with Reader("ctr", run_dir) as reader:
        assert reader.together(read, timeout=30.0) == (3.0, 3.0)
        assert (len(begun), len(ended)) == (3, 1)
        with pytest.raises(ModelError, match="was used after its function"):
            begun[-1].lookup("item", [0])


def test_what_hides_that_a_moment_is_over_does_not_get_far(written: Written, run_dir: Path) -> None:
    written.put(1, 0, tensor=slice(None))
    calls = []

    def read(state: State) -> float:
        calls.append(float(state.lookup("item", [0])[0, 0]))
        if len(calls) == 1:
            written.put(2, 1, tensor=slice(None))
        with suppress(Exception):
            state.lookup("item", [1])
        return calls[-1]

    with Reader("ctr", run_dir) as reader:
        assert reader.together(read, timeout=30.0) == 2.0


def test_how_much_newer_rows_may_be_than_tensors(written: Written, run_dir: Path) -> None:
    tensors_stamp = written.put(1, 0, tensor=slice(None))
    with Reader("ctr", run_dir) as reader:

        def read(state: State) -> tuple[int, int]:
            state.lookup_many({"item": [0, 1, 7]})
            state.dense("top")
            return state.rows_stamp, state.tensors_stamp

        def pooled(state: State) -> float:
            state.dense_many(["top"])
            return float(state.lookup_pooled("item", [[0, 1]])[0, 0])

        assert reader.together(read, newer_ms=0) == (tensors_stamp, tensors_stamp)
        rows_stamp = written.put(2, 40)
        assert reader.together(read) == reader.together(read, newer_ms=40) == (rows_stamp, tensors_stamp)
        assert reader.together(pooled, newer_ms=40) == 4.0
        for look in (read, pooled):
            with pytest.raises(StoreError, match=r"within 0\.01 s: rows are 40 ms newer than the dense tensors: let"):
                reader.together(look, newer_ms=39, timeout=0.01)
        assert reader.together(lambda state: state.dense("top"), newer_ms=0).shape == (300,)
        written.put(2, 80, rows=False, tensor=slice(0, 1))  # nothing else of it changed
        assert reader.together(pooled, newer_ms=0) == 4.0


def test_what_a_caller_does_wrong_is_told_at_once(written: Written, run_dir: Path) -> None:
    written.put(1, 0, tensor=slice(None))
    with Reader("ctr", run_dir) as reader:
        for wrong in ({"newer_ms": -1}, {"newer_ms": float("nan")}, {"timeout": -1}):
            with pytest.raises(ModelError, match=next(iter(wrong))):
                reader.together(lambda state: state.tensors, **wrong)
        with pytest.raises(ModelError, match="has no dense tensor 'bottom': it has 'top'"):
            reader.together(lambda state: state.dense("bottom"))
        with pytest.raises(ModelError, match="has no table 'user'"):
            reader.together(lambda state: state.lookup_pooled("user", [[1]]))
        with pytest.raises(ZeroDivisionError):
            reader.together(lambda state: 1 / 0)
        written.model._word("unsettled")[...] = UNSETTLED_AHEAD
        with pytest.raises(StoreError, match=r"within 0\.01 s: the node is catching up"):
            reader.together(lambda state: state.tensors, timeout=0.01)


# --- a trainer, and a node in another region


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("together")
    with LocalCluster(folder, NODES, models=MODELS, delays_ms={"home/eu": 5.0}) as cluster:
        cluster.start()
        yield cluster


def of_the_trainer(state: State) -> list[set[float]]:
    keys = np.arange(TRAINED)
    values = [state.lookup("item", keys[:7]), *state.dense_many().values(), state.lookup("item", keys)]
    values += state.lookup_many({"user": keys[::-1]}).values()
    assert state.rows_stamp <= state.tensors_stamp
    return [{float(value) for one in values for value in np.unique(one)}]


def rows_and_tensors(state: State) -> list[set[float]]:
    rows, tensors = state.lookup("item", np.arange(TRAINED)), state.dense_many()
    return [set(np.unique(rows).tolist()), {float(value) for one in tensors.values() for value in np.unique(one)}]


@pytest.mark.processes
def test_rows_fit_the_tensors_that_were_trained_with_them(cluster: LocalCluster) -> None:
    with process("counting_trainer.py", cluster["train-1"].local, "3"):
        for node in NODES:
            with ekko.Reader("ctr", cluster[node.id].run_dir, wait=60.0) as reader:
                fitting = several(lambda: reader.together(of_the_trainer, newer_ms=0, timeout=5.0), many)
                assert not mixed(fitting), node.id
                # Without newer_ms they are of one moment: rows of one step, and the tensors that were published last by then.
                seen = several(lambda: reader.together(rows_and_tensors), lambda seen: many(seen) and apart(seen))
                assert not mixed(seen), node.id
                assert all(min(rows) >= min(tensors) for rows, tensors in seen)


def apart(seen: list[list[set[float]]]) -> bool:
    return any(rows != tensors for rows, tensors in seen)


@pytest.mark.processes
def test_planted_bugs_tensors_that_do_not_fit_are_noticed(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    local = cluster["train-1"].local
    with ekko.Reader("ctr", cluster["eu-1"].run_dir, wait=60.0) as reader:
        with process("counting_trainer.py", local, "1", "apart"):  # published before their rows
            several(lambda: reader.together(of_the_trainer, newer_ms=0, timeout=5.0), mixed)
        monkeypatch.setattr(State, "_check", lambda self: self._moment.check())  # whatever their stamps
        with process("counting_trainer.py", local, "3"):
            several(lambda: reader.together(rows_and_tensors, newer_ms=0, timeout=5.0), apart)
