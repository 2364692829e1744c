"""What an operator writes: moments and key ranges."""

import numpy as np
import pytest

from ekko.errors import ConfigError
from ekko.rollback.moments import HEALTHY, parse_moment, show_moment
from ekko.rollback.request import rollback_request
from ekko.rollback.scope import KEY_END, Scope, parse_keys
from p2p.stamps import make_stamp

NOW_MS = 1_800_000_000_000


@pytest.mark.parametrize(
    ("text", "moment_ms"),
    [
        ("healthy", HEALTHY),
        ("5m ago", NOW_MS - 300_000),
        ("90s", NOW_MS - 90_000),
        ("1.5h ago", NOW_MS - 5_400_000),
        ("2026-11-23T10:15:00Z", 1_795_428_900_000),
        ("2026-11-23 10:15", 1_795_428_900_000),
        ("2026-11-23T12:15:00+02:00", 1_795_428_900_000),
    ],
)
def test_moments(text: str, moment_ms: int) -> None:
    assert parse_moment(text, NOW_MS) == moment_ms
    if moment_ms:
        assert parse_moment(show_moment(moment_ms), NOW_MS) == moment_ms


@pytest.mark.parametrize("text", ["yesterday", "", "5 minutes", "2126-01-01", "5m from now", "999999999d ago", "-5m"])
def test_no_moments(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--to .*: .*expected"):
        parse_moment(text, NOW_MS)


@pytest.mark.parametrize(
    ("text", "keys"), [("1:9", (1, 9)), ("5:", (5, KEY_END)), (":7", (0, 7)), (f"0:{KEY_END}", (0, KEY_END))]
)
def test_key_ranges(text: str, keys: tuple[int, int]) -> None:
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["9:1", "3", "a:b", "4:4", f"0:{KEY_END + 1}", "-1:4", ""])
def test_no_key_ranges(text: str) -> None:
    with pytest.raises(ConfigError, match="--keys"):
        parse_keys(text)


def test_a_scope_means_keys_and_whoever_wrote_the_row_last() -> None:
    keys = np.array([1, 5, 9, 2**64 - 1], np.uint64)
    stamps = np.array([make_stamp(NOW_MS, 0, writer) for writer in (3, 4, 3, 3)], np.uint64)
    assert Scope().mask(keys, stamps).tolist() == [True] * 4
    assert Scope(key_first=5, key_end=10).mask(keys, stamps).tolist() == [False, True, True, False]
    assert Scope(writer="train", writers=(3,), key_first=2).mask(keys, stamps).tolist() == [False, False, True, True]
    assert str(Scope(("item",), "train", (3,), 5, 10)) == "table item, writer train, keys 5:10"


@pytest.mark.parametrize("to_ms", [True, -1, "0", 1.0])
def test_a_moment_over_http_is_a_number_of_milliseconds(to_ms: object) -> None:
    body = {"model": "ctr", "to_ms": 5, "tables": [], "writer": "", "keys": None}
    assert rollback_request(body) is not None
    assert rollback_request({**body, "to_ms": to_ms}) is None
