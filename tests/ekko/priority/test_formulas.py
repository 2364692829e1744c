"""Formulas of users: what they get wrong costs them their say, and nobody else anything."""

import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import ConfigError
from ekko.priority import functions, guard
from ekko.priority.guard import Guarded
from ekko.priority.stopping import stopped_after
from ekko.priority.updates import Updates, significance
from p2p.stamps import make_stamp

F32 = np.float32
COUNT = 1_000
UNIX_MS = 1_700_000_000_000

HEAD = """(module (memory (export "memory") 1)
  (func (export "priority") (param $rows i32) (param $keys i32) (param $significance i32) (param $freshness i32)
    (param $age i32) (param $interval i32) (param $moved i32) (param $drift i32) (param $out i32) (local $i i32) """
# Twice the significance of each row, plus its freshness.
GOOD = (
    HEAD
    + """
  (block $done (loop $next
    (br_if $done (i32.ge_u (local.get $i) (local.get $rows)))
    (f32.store (i32.add (local.get $out) (i32.shl (local.get $i) (i32.const 2)))
      (f32.add
        (f32.mul (f32.const 2) (f32.load (i32.add (local.get $significance) (i32.shl (local.get $i) (i32.const 2)))))
        (f32.load (i32.add (local.get $freshness) (i32.shl (local.get $i) (i32.const 2))))))
    (local.set $i (i32.add (local.get $i) (i32.const 1)))
    (br $next)))))"""
)
LOOPING = HEAD + "(loop $ever (br $ever))))"
TRAPPING = HEAD + "unreachable))"
OUTSIDE = HEAD + "(f32.store (i32.const -4) (f32.const 1))))"
# Asks for memory until there is none, and then insists.
GREEDY = (
    HEAD
    + """(loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) (f32.store (i32.mul (i32.const 65536)
    (memory.size)) (f32.const 1))))"""
)
NEGATIVE = HEAD + "(f32.store (local.get $out) (f32.const -1))))"


def updates(count: int = COUNT) -> Updates:
    rng = np.random.default_rng(count)
    columns = [rng.exponential(1, count).astype(F32) for _ in range(5)]
    keys = np.arange(count, dtype=np.uint64)
    before = np.where(keys % 3, np.uint64(make_stamp(UNIX_MS - 2_500, 0, 3)), np.uint64(0))
    return Updates("ctr", "item", keys, *columns, before, UNIX_MS)


def test_the_interval_is_since_the_version_before() -> None:
    assert updates(4).interval_s.tolist() == [np.inf, 2.5, 2.5, np.inf]


class Clock:
    """Seconds, as a formula makes them pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timeless(formula: Guarded) -> Guarded:
    """Where the test is not about time: a busy machine makes anything slow, now and then."""
    formula._clock = formula._processor = Clock()
    return formula


def module(folder: Path, text: str) -> Guarded:
    path = folder / "formula.wat"
    path.write_text(text)
    formula = functions.formula_of(str(path))
    assert isinstance(formula, Guarded)
    return timeless(formula)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("moved", "tests.ekko.priority.test_formulas:by_movement", functions.GROUP),
        EntryPoint("counting", "tests.ekko.priority.test_formulas:Counting", functions.GROUP),
        EntryPoint("missing", "tests.ekko.priority.test_formulas:nothing_of_that_name", functions.GROUP),
        EntryPoint("number", "tests.ekko.priority.test_formulas:COUNT", functions.GROUP),
    ]
    monkeypatch.setattr(functions, "entry_points", lambda group: [one for one in points if one.group == group])


def by_movement(rows: Updates) -> np.ndarray:
    return rows.moved


class Counting:
    """Weighs a row by how often its formula was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, rows: Updates) -> np.ndarray:
        self.asked += 1
        return np.full(rows.keys.size, self.asked)


# --- entry points -----------------------------------------------------------------------------------------------------------


def test_a_package_offers_a_formula(offered: None) -> None:
    rows = updates()
    assert functions.formula_of("moved")(rows).tolist() == rows.moved.tolist()
    one, other = functions.formula_of("counting"), functions.formula_of("counting")
    assert [one(rows)[0], one(rows)[0], other(rows)[0]] == [1, 2, 1], "each model has its own"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "absent",
            r"there is no priority formula 'absent': there are 'counting', 'loss_impact', 'missing'.*or name a .wasm file",
        ),
        ("missing", r"formula 'missing' \(tests.*\) cannot be loaded: AttributeError"),
        ("number", r"formula 'number' .* is a int: expected a function"),
        ("/nowhere/at/all.wasm", r"all.wasm' cannot be used: .*No such file"),
    ],
)
def test_a_formula_that_is_none_is_refused(offered: None, name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        functions.formula_of(name)


def failing(rows: Updates) -> np.ndarray:
    raise RuntimeError("no idea")


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (failing, "RuntimeError: no idea"),
        (lambda rows: rows.moved[:-1], r"shape \(999,\): expected \(1000,\)"),
        (lambda rows: 5.0, r"shape \(\)"),
        (lambda rows: rows.moved.reshape(-1, 1), r"shape \(1000, 1\)"),
        (lambda rows: -rows.moved, "negative"),
        (lambda rows: rows.moved * np.nan, "NaN"),
        (lambda rows: rows.moved * 1e30 * 1e30, "infinity"),
        (lambda rows: ["a"] * COUNT, "returned <U1: expected float32"),
        (lambda rows: None, "returned object"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_formula_that_fails_is_counted_and_replaced(formula: Callable[[Updates], np.ndarray], reason: str) -> None:
    rows, guarded = updates(), timeless(Guarded("mine", formula, significance))
    assert (guarded(rows) == significance(rows)).all()
    assert (guarded.failures, guarded.steps_without) == (1, 1)
    assert re.search(reason, guarded.last_failure)


def test_one_that_fails_again_and_again_is_asked_less_and_less() -> None:
    asked = []
    guarded = timeless(Guarded("mine", lambda rows: asked.append(1) or failing(rows), significance))  # type: ignore[func-returns-value]
    for _ in range(1_000):
        guarded(updates(2))
    assert len(asked) == guarded.failures == 10, "after 1, 2, 4, ... steps"
    assert guarded.steps_without == 1_000


def test_one_that_recovers_is_asked_as_before() -> None:
    good = [False]
    guarded = timeless(Guarded("mine", lambda rows: rows.moved if good[0] else failing(rows), significance))
    rows = updates()
    for _ in range(4):
        guarded(rows)
    good[0] = True
    assert any((guarded(rows) == rows.moved).all() for _ in range(8))
    assert (guarded(rows) == rows.moved).all()
    good[0] = False
    guarded(rows)
    good[0] = True
    guarded(rows)  # rests for one step
    assert (guarded(rows) == rows.moved).all()


@pytest.mark.parametrize("asleep", [False, True])
def test_a_slow_one_has_a_twentieth_of_the_nodes_time(asleep: bool) -> None:
    wall, processor, asked, takes = Clock(), Clock(), [], [0.3]

    def slow(rows: Updates) -> np.ndarray:
        asked.append(wall.now)
        wall.now += takes[0]
        processor.now += 0 if asleep else takes[0]
        return rows.moved

    guarded, rows = Guarded("mine", slow, significance, wall, processor), updates(10)
    assert (guarded(rows) == rows.moved).all(), "it was waited for"
    spent, begin = 0.0, wall.now
    while wall.now < begin + 100:
        before, wall.now = wall.now, wall.now + 0.001
        guarded(rows)
        spent += max(0.0, wall.now - before - 0.001)
    assert spent <= 0.05 * 100 + takes[0]
    assert len(asked) == guarded.failures >= 15
    assert guarded.steps_without > 90_000
    assert guarded.last_failure == "too slow: 300 ms for 10 rows, allowed are 20 ms"
    takes[0], wall.now = 0.001, wall.now + 10
    failures = guarded.failures
    assert all((guarded(rows) == rows.moved).all() for _ in range(5)), "once it is quick, it is asked each time"
    assert guarded.failures == failures
    many = updates(40_000)
    takes[0] = 0.3
    assert all((guarded(many) == many.moved).all() for _ in range(2)), "of many rows it may take longer"


@pytest.mark.timeout(120, method="thread")  # else the timer is pytest's own
def test_one_that_never_comes_back_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(rows: Updates) -> np.ndarray:
        while True:
            with suppress(Exception):
                list(range(100))

    guarded, rows = Guarded("mine", endless, significance), updates(10)
    monkeypatch.setattr(guard, "STOPPED_AFTER_S", 0.1)
    begin = time.monotonic()
    assert (guarded(rows) == significance(rows)).all()
    assert time.monotonic() - begin < 50
    assert (guarded.failures, guarded.steps_without) == (1, 1)
    assert "interrupted after 0.1 s" in guarded.last_failure
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    # Who uses the signal for something else keeps it; and other threads have no timer.
    mine = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        with stopped_after(0.001):
            assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, mine)


# --- WebAssembly ------------------------------------------------------------------------------------------------------------

pytest.importorskip("wasmtime")


@pytest.mark.parametrize("count", [1, COUNT, 40_000])
def test_a_module_weighs_rows(tmp_path: Path, count: int) -> None:
    formula, rows = module(tmp_path, GOOD), updates(count)
    for _ in range(2):
        assert (formula(rows) == 2 * rows.significance + rows.freshness).all()
    assert formula.failures == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(LOOPING, "fuel", id="looping"),
        pytest.param(TRAPPING, "unreachable", id="trapping"),
        pytest.param(OUTSIDE, "out of bounds", id="outside"),
        pytest.param(GREEDY, "out of bounds", id="greedy"),
        pytest.param(NEGATIVE, "negative", id="negative"),
    ],
)
def test_a_module_that_misbehaves_is_counted_and_replaced(tmp_path: Path, text: str, reason: str) -> None:
    formula, rows = module(tmp_path, text), updates()
    for _ in range(3):
        assert (formula(rows) == significance(rows)).all()
    assert (formula.failures, formula.steps_without) == (2, 3)
    assert reason in formula.last_failure


def test_a_greedy_module_gets_no_more_than_it_may(tmp_path: Path) -> None:
    from ekko.priority.wasm import MEMORY_BYTES_MAX, WasmFormula

    path = tmp_path / "greedy.wat"
    path.write_text(HEAD + "(loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))))")
    formula = WasmFormula(path)
    formula(updates(10))
    assert formula._instance is not None
    assert formula._instance._memory.data_len(formula._instance._store) <= MEMORY_BYTES_MAX


def test_after_a_trap_a_module_begins_anew(tmp_path: Path) -> None:
    """It counts its calls in memory, and traps in the third."""
    text = HEAD + (
        "(i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))"
        "(if (i32.eq (i32.load (i32.const 0)) (i32.const 3)) (then unreachable))"
        "(f32.store (local.get $out) (f32.convert_i32_u (i32.load (i32.const 0))))))"
    )
    formula, rows = module(tmp_path, text), updates(1)
    one = [formula(rows)[0] for _ in range(2)]
    formula(rows)  # traps
    formula(rows)  # rests
    assert one == [formula(rows)[0] for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("(module (func", "cannot be used"),
        ('(module (import "wasi" "clock" (func)))', "imports wasi.clock: a priority formula gets nothing but arrays"),
        ("(module)", "does not export a 32-bit memory"),
        ('(module (memory (export "memory") 1))', "does not export a function 'priority' of 9 i32"),
        ('(module (memory (export "memory") 1) (func (export "priority") (param i32)))', "of 9 i32 that returns nothing"),
    ],
)
def test_a_module_that_is_no_formula_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        module(tmp_path, text)


def test_a_module_that_asks_for_too_much_at_once_never_starts(tmp_path: Path) -> None:
    formula, rows = module(tmp_path, GOOD.replace('(memory (export "memory") 1)', '(memory (export "memory") 2000)')), updates()
    assert (formula(rows) == significance(rows)).all()
    assert formula.failures == 1
