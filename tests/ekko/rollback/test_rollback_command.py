"""What `ekko rollback` says and refuses, before any node is asked or after one has answered."""

from typing import Any

import pytest

from ekko.errors import ConfigError
from ekko.rollback import cli
from ekko.rollback.moments import HEALTHY

NOW_MS = 1_790_000_000_000


def told(**changes: Any) -> dict[str, Any]:
    """A rollback as a node's HTTP tells it."""
    return {
        "model": "ctr",
        "epoch": "0000000100000002",
        "step": "fencing",
        "dry": False,
        "automatic": False,
        "asked_by": "s1",
        "witness": "w1",
        "requested_ms": NOW_MS,
        "to_ms": HEALTHY,
        "cut_ms": 0,
        "reason": "",
        "rows": 0,
        "deletions": 0,
        "others": 0,
        "payload_bytes": 0,
        "at_risk": 0,
    } | changes


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "to its last healthy state"),
        ({"to_ms": NOW_MS - 60_000}, "to 2026-09-21T14:12:20.000Z"),
        ({"to_ms": NOW_MS - 60_000, "cut_ms": NOW_MS - 61_000}, "to 2026-09-21T14:12:19.000Z"),
    ],
)
def test_the_history_says_which_moment(
    known: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "ask_node", lambda address, path: {"rollbacks": [told(**known)]})
    cli.rollback("ctr", http="127.0.0.1:1")
    assert f"ctr  fencing  {expected}  asked at s1" in capsys.readouterr().out


@pytest.mark.parametrize("alone", [{"finish": True}, {"at_risk": "0000000100000002"}])
@pytest.mark.parametrize(
    "beside", [{"to": "healthy"}, {"table": ["item"]}, {"dry_run": True}, {"force": True}, {"keys": "1:2"}]
)
def test_what_does_something_else_is_refused_beside_what_takes_back(alone: dict[str, Any], beside: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing is taken back"):
        cli.rollback("ctr", http="127.0.0.1:1", **alone, **beside)
