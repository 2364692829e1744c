"""`consistent=True`: of each writer whole steps, in all tables, beside a process that applies them; and what would break it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import ModelError, StoreError
from ekko.serve import consistency, reader
from ekko.serve.reader import Reader
from ekko.store import Store, patience
from ekko.store.batches import UNSETTLED_AHEAD

KEYS = 400  # of each writer
LOOK_UPS = 100
DEADLINE_S = 60


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that does not run for a second or two, on a busy machine, is not dead."""
    monkeypatch.setattr(patience, "ROW_DEADLINE_S", DEADLINE_S)


@contextmanager
def writer(run_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    script = str(Path(__file__).parent / "store" / "step_writer.py")
    with subprocess.Popen([sys.executable, script, str(run_dir), str(KEYS)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def steps_seen(look: Callable[[], list[np.ndarray]]) -> list[list[set[float]]]:
    """Of so many look-ups, and until there was another step, by writer: the numbers of the steps whose values were there."""
    seen: list[list[set[float]]] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(seen) < LOOK_UPS or seen[0] == seen[-1]:
        assert time.monotonic() < deadline, f"in {len(seen)} look-ups there was no other step"
        try:
            answer = look()
        except StoreError as error:  # between two batches there may be no time, on a busy machine
            if "no consistent look-up" not in str(error) or time.monotonic() > deadline:
                raise
            continue
        seen.append([{value for rows in answer for value in rows[place : place + KEYS].ravel()} for place in (0, KEYS)])
    return seen


def halves(seen: list[list[set[float]]]) -> int:
    """Look-ups that showed a writer between two of its steps."""
    return sum(any(len(numbers) != 1 for numbers in look) for look in seen)


def shows_halves(run_dir: Path, *, consistent: bool = True) -> bool:
    """Whether sooner or later a look-up does: how soon the two meet is the machine's."""
    deadline = time.monotonic() + DEADLINE_S
    with writer(run_dir):
        while time.monotonic() < deadline:
            if halves(of_two_tables(run_dir, consistent=consistent)):
                return True
    return False


def of_two_tables(run_dir: Path, *, consistent: bool = True) -> list[list[set[float]]]:
    keys = np.arange(2 * KEYS)
    with Reader("ctr", run_dir) as reader:

        def look() -> list[np.ndarray]:
            return list(reader.lookup_many({"item": keys, "user": keys}, consistent=consistent).values())

        return steps_seen(look)


def test_every_answer_is_of_whole_steps_in_all_tables(run_dir: Path) -> None:
    with writer(run_dir):
        seen = of_two_tables(run_dir)
    assert halves(seen) == 0
    numbers = [[min(numbers) for numbers in look] for look in seen]
    assert numbers == sorted(numbers)  # and never goes back
    assert numbers[0] != numbers[-1]


def test_of_one_table_and_pooled_too(run_dir: Path) -> None:
    keys = np.arange(2 * KEYS)
    with writer(run_dir), Reader("ctr", run_dir) as reader:
        assert halves(steps_seen(lambda: [reader.lookup("item", keys, consistent=True)])) == 0
        pooled = steps_seen(lambda: [reader.lookup_pooled("item", keys[:, None], mode="mean", consistent=True)])
        assert halves(pooled) == 0


def with_dense(run_dir: Path, *, consistent: bool) -> list[list[set[float]]]:
    keys = np.arange(2 * KEYS)
    with Reader("ctr", run_dir) as reader:

        def look() -> list[np.ndarray]:
            rows, tensors = reader.lookup_with_dense({"item": keys}, ["top.3", "top.4"], consistent=consistent)
            # Of each writer what is in the tensor takes the place of one of its rows.
            for place, tensor in zip((0, KEYS), tensors.values(), strict=True):
                rows["item"][place, 0], rows["item"][place, 1] = tensor.min(), tensor.max()
            return list(rows.values())

        return steps_seen(look)


def test_a_tensor_is_of_the_same_step_as_rows(run_dir: Path) -> None:
    with writer(run_dir):
        assert halves(with_dense(run_dir, consistent=True)) == 0
        deadline = time.monotonic() + DEADLINE_S
        while not halves(with_dense(run_dir, consistent=False)):
            assert time.monotonic() < deadline, "without, both are always of one step: this test sees nothing"
        with Reader("ctr", run_dir) as reader:
            assert len({float(value) for value in reader.dense("top.3", consistent=True).ravel()}) == 1
            with pytest.raises(ModelError, match=r"no dense tensor 'top': it has 'top.3', 'top.4'"):
                reader.lookup_with_dense({}, ["top"])


def test_without_it_answers_show_half_steps(run_dir: Path) -> None:
    assert shows_halves(run_dir, consistent=False)


def test_planted_bug_the_epoch_is_not_looked_at_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "unchanged", lambda address, value: True)
    assert shows_halves(run_dir)


def test_planted_bug_unsettled_is_not_looked_at(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word, watch = consistency._UNSETTLED, consistency.watch_word
    monkeypatch.setattr(consistency, "watch_word", lambda address: 0 if address % 4096 == word else watch(address))
    assert shows_halves(run_dir)  # between the two parts of a step


def test_a_writer_killed_in_mid_step_leaves_an_error_until_it_is_back(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "DEADLINE_S", 0.02)
    with writer(run_dir) as process, Reader("ctr", run_dir) as reader:
        process.kill()
        process.wait()
        model = Store.open(run_dir).models["ctr"]
        header = model._word("batch_epoch")
        header[...] |= np.uint64(1)  # as if it had been a little later
        model._word("unsettled")[...] = UNSETTLED_AHEAD  # and between the parts of a step: both may be left behind
        with pytest.raises(StoreError, match=r"was killed in the middle of one: .*; the node is catching up: it has rows"):
            reader.lookup("item", [1], consistent=True)
        assert reader.lookup("item", [1]).any()
        again = Store.open(run_dir).models["ctr"]
        for writer_id in (3, 4):
            again.frontier[writer_id] = again.stamp_max  # what the node pulls
        again.set_synced_until(0)
        reader.lookup("item", [1], consistent=True)


def test_other_look_ups_do_not_look_at_the_words(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "between_batches", lambda *_: pytest.fail("only for consistent look-ups"))
    with writer(run_dir), Reader("ctr", run_dir) as plain:
        plain.lookup("item", [1])
        plain.lookup_many({"item": [1]})
        plain.lookup_pooled("item", [[1]])
