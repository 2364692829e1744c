"""Rows that are due: each once, in their order, and none forgotten or starved."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from p2p.busy import due
from p2p.busy.due import AGE_MS, IN_ORDER_SHARE, ROW_BYTES, DueRows
from p2p.classes import SIGNIFICANT, TAKEN_BACK

ROW = 16 + ROW_BYTES


def add(rows: DueRows, places: list[int], classes: list[int] | int = 0, now_ms: int = 0, table: int = 1) -> int:
    given_classes = np.full(len(places), classes, np.uint8) if isinstance(classes, int) else np.array(classes, np.uint8)
    return rows.add(table, 16, np.array(places, np.int64), given_classes, now_ms)


def taken(rows: DueRows, count: int) -> list[int]:
    return [place for one in rows.take(count * ROW) for place in one.places.tolist()]


def test_a_row_that_changes_while_it_waits_is_one_entry() -> None:
    rows = DueRows()
    assert add(rows, [1, 2, 2, 3]) == 0
    assert add(rows, [2, 3, 4, -1]) == 2 * ROW
    assert (rows.rows, rows.bytes) == (4, 4 * ROW)
    assert sorted(taken(rows, 9)) == [1, 2, 3, 4]
    assert (rows.rows, rows.bytes, taken(rows, 9)) == (0, 0, [])


def test_its_class_is_the_largest_since_it_left_last() -> None:
    rows = DueRows()
    add(rows, [1], 200)
    add(rows, [1], 130)
    (one,) = rows.take(9 * ROW)
    assert one.classes.tolist() == [200]
    add(rows, [1], 3)
    (one,) = rows.take(9 * ROW)
    assert one.classes.tolist() == [3]


def test_what_was_taken_back_goes_before_everything_and_what_is_significant_before_what_is_not() -> None:
    rows = DueRows()
    add(rows, list(range(100, 200)), 20, now_ms=0)
    add(rows, list(range(20, 40)), SIGNIFICANT + 40, now_ms=10)
    add(rows, list(range(10)), TAKEN_BACK, now_ms=20)
    assert sorted(taken(rows, 10)) == list(range(10))
    ten = taken(rows, 10)
    assert sum(place < 40 for place in ten) == 8
    assert [place for place in ten if place >= 100] == [100, 101]  # a fifth in order


def test_a_fifth_leaves_in_order_also_where_a_room_has_one_row() -> None:
    rows = DueRows()
    add(rows, list(range(100)), 1, now_ms=0)
    add(rows, list(range(100, 200)), SIGNIFICANT, now_ms=1)
    assert sum(taken(rows, 1)[0] < 100 for _ in range(100)) == 100 * IN_ORDER_SHARE


def test_a_row_that_comes_to_matter_more_leaves_earlier() -> None:
    rows = DueRows()
    add(rows, list(range(50)), 10)
    add(rows, [49], SIGNIFICANT, now_ms=5)
    assert 49 in taken(rows, 2)
    assert len(taken(rows, 99)) == 48


def test_within_a_kind_who_waited_longer_overtakes_who_matters_a_little_more() -> None:
    rows = DueRows()
    add(rows, list(range(40)), SIGNIFICANT, now_ms=0)
    add(rows, list(range(100, 140)), SIGNIFICANT + due.BAND_CLASSES, now_ms=AGE_MS - 1)
    assert sum(place >= 100 for place in taken(rows, 10)) == 8
    rows = DueRows()
    add(rows, list(range(40)), SIGNIFICANT, now_ms=0)
    add(rows, list(range(100, 140)), SIGNIFICANT + due.BAND_CLASSES, now_ms=AGE_MS + 1)
    assert max(taken(rows, 10)) < 40


def test_the_recorded_cycle_ends_under_any_load_of_what_matters_more() -> None:
    rows, number = DueRows(), 1_000
    add(rows, list(range(100)), 1)
    rows.record()
    left = 0
    while rows.recorded:
        number += 20
        add(rows, list(range(number, number + 20)), 250, now_ms=left + 1)
        left += len(taken(rows, 10))
    assert left <= 100 / IN_ORDER_SHARE


def test_only_what_was_due_when_it_was_recorded_belongs_to_a_cycle() -> None:
    rows = DueRows()
    add(rows, [1, 2, 3])
    rows.record()
    add(rows, [3, 4, 5], now_ms=1)
    assert rows.recorded == 3
    assert sorted(taken(rows, 3)) == [1, 2, 3]
    assert (rows.recorded, rows.rows) == (0, 2)
    add(rows, [1], now_ms=2)  # again: of the next one
    rows.record()
    assert rows.recorded == 3


def test_how_long_the_oldest_has_waited() -> None:
    rows = DueRows()
    add(rows, [1, 2], 1, now_ms=5)
    add(rows, [3], 255, now_ms=7)
    add(rows, [4], 128, now_ms=9)
    assert rows.since_ms() == {"ordinary": 5, "taken_back": 7, "significant": 9}
    assert rows.urgency == 2
    rows.take(ROW)
    assert rows.since_ms() == {"ordinary": 5, "significant": 9}
    rows.clear()
    assert (rows.since_ms(), rows.urgency) == ({}, -1)


def test_queues_stay_as_long_as_what_is_due() -> None:
    rows = DueRows()
    for round_ in range(300):
        for number in range(16):
            add(rows, list(range(100)), 16 * number, now_ms=round_)
        taken(rows, 200)
        assert sum(map(len, rows._queues)) <= 3 * due.DEAD_MAX


@given(st.integers(0, 10_000))
def test_whatever_happens_each_due_row_leaves_once(seed: int) -> None:
    rng, rows = random.Random(seed), DueRows()
    expected, recorded = set[tuple[int, int]](), set[tuple[int, int]]()
    for step in range(40):
        table = rng.randrange(2)
        places = [rng.randrange(30) for _ in range(rng.randint(1, 12))]
        add(rows, places, [rng.randrange(256) for _ in places], 3_000 * step, table)
        expected |= {(table, place) for place in places}
        if not rows.recorded:
            rows.record()
            recorded = set(expected)
        for one in rows.take(rng.randint(1, 9) * ROW) if rng.random() < 0.5 else ():
            for place in one.places.tolist():
                expected.remove((one.table, place))
                recorded.discard((one.table, place))
        assert (rows.rows, rows.recorded) == (len(expected), len(recorded))
    assert sum(len(one.places) for one in rows.take(1 << 30)) == len(expected)
