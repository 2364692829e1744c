"""Stamps are ordered by time, and a clock never mints one that it should not."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import RemoteProtocolError
from p2p.stamps import AHEAD_MS_MAX, EPOCH_MS, StampClock, check_not_ahead, make_stamp, unix_ms_of, writer_of

moments = st.integers(EPOCH_MS + 1, EPOCH_MS + (1 << 41))
writers = st.integers(0, 4095)


@given(moments, st.integers(0, 1023), writers)
def test_stamp_takes_apart_into_what_it_was_made_of(unix_ms: int, counter: int, writer: int) -> None:
    stamp = make_stamp(unix_ms, counter, writer)
    assert stamp < 1 << 64
    assert (unix_ms_of(stamp), writer_of(stamp)) == (unix_ms, writer)


@given(st.lists(st.tuples(moments, writers), min_size=2, max_size=50))
def test_minted_stamps_strictly_increase_whatever_the_wall_clock_does(readings: list[tuple[int, int]]) -> None:
    clock = StampClock()
    minted = [clock.mint(now_ms, writer) for now_ms, writer in readings]
    # Even without the writer's bits, so that any two writers of one node are ordered too.
    ticks = [stamp >> 12 for stamp in minted]
    assert all(a < b for a, b in itertools.pairwise(ticks))


@given(moments, st.integers(0, (1 << 64) - (1 << 24)), writers)
def test_clock_never_runs_behind_a_stamp_it_has_seen(now_ms: int, seen: int, writer: int) -> None:
    clock = StampClock()
    clock.observe(seen)
    if seen >> 12 < (1 << 52) - 1:
        assert clock.mint(now_ms, writer) > seen


def test_counter_overflow_borrows_from_the_milliseconds() -> None:
    clock = StampClock()
    now_ms = EPOCH_MS + 5_000
    minted = [clock.mint(now_ms, 7) for _ in range(1_025)]
    assert unix_ms_of(minted[1023]) == now_ms
    assert unix_ms_of(minted[1024]) == now_ms + 1
    assert clock.mint(now_ms + 1, 7) > minted[1024]


def test_clock_follows_the_wall_clock_again_once_that_catches_up() -> None:
    clock = StampClock()
    clock.mint(EPOCH_MS + 10_000, 1)
    assert unix_ms_of(clock.mint(EPOCH_MS + 2_000, 1)) == EPOCH_MS + 10_000
    assert unix_ms_of(clock.mint(EPOCH_MS + 20_000, 1)) == EPOCH_MS + 20_000


def test_stamp_from_the_future_is_refused_at_the_limit_and_not_before() -> None:
    now_ms = EPOCH_MS + 1_000_000
    check_not_ahead(make_stamp(now_ms + AHEAD_MS_MAX, 0, 0), now_ms)
    with pytest.raises(RemoteProtocolError, match="ahead of our clock"):
        check_not_ahead(make_stamp(now_ms + AHEAD_MS_MAX + 1, 0, 0), now_ms)
