"""`ekko status` shows a server: what it acts for, for whom it waits, and that it does not run."""

from typing import Any

from rich.console import Console

from ekko.companions.display import server_table
from ekko.companions.picture import ProcessPicture, ServerPicture

MODEL: dict[str, Any] = {
    "mode": "sync",
    "acting": [0, 3],
    "clocks": {"0": 12, "1": 11, "10": 14},
    "late_s": {"1": 61.2},
    "dropped": [3, 4],
    "pushes_waiting": 2,
    "pulls_waiting": 1,
    "ack_ms": [3.25, 40.0],
    "waiting_for": {"pushes": ["train-2"]},
    "trouble": "serve: [no] room",
}


def shown(picture: ServerPicture) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(server_table(picture.to_json()))
    return capture.get()


def test_what_it_does_and_whom_it_waits_for_is_shown() -> None:
    text = shown(ServerPicture("tcp://127.0.0.1:7950", ProcessPicture(True, 2, 1, state={"models": {"ctr": MODEL}})))
    for part in (
        "tcp://127.0.0.1:7950, ended 1 times",
        "sync",
        "0, 3",
        "0: 12, 1: 11, 10: 14",
        "worker 1, for 61 s",
        "not for worker 3, 4: dropped",
        "2, 1",
        "3.2, 40.0",
        "pushes: train-2",
        "[no] room",
    ):
        assert part in text, (part, text)


def test_one_that_does_not_run_says_why() -> None:
    assert "it does not run: server.listen: taken" in shown(
        ServerPicture("tcp://127.0.0.1:7950", ProcessPicture(error="server.listen: taken"))
    )
