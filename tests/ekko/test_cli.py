"""The command line: exit codes, and one line for each mistake."""

import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from ekko import cli
from ekko.display import print_status
from ekko.errors import NodeFailed
from ekko.version import __version__
from tests.ekko.test_config import GOOD

Capture = pytest.CaptureFixture[str]
REGISTER = cli.register_commands


@pytest.fixture(autouse=True)
def no_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of other packages are added once for each call otherwise."""
    monkeypatch.setattr(cli, "register_commands", lambda: None)


def run(*arguments: str) -> int:
    """Exit code of `ekko ARGUMENTS`."""
    before = sys.argv
    sys.argv = ["ekko", *arguments]
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = before
    return int(caught.value.code or 0)


def error_line(capture: Capture) -> str:
    """What was written to stderr: one line, no traceback."""
    text = capture.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


def test_version(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"ekko {__version__}\n"


def test_help_names_the_commands_and_their_options(capsys: Capture) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "node" in text
    assert "status" in text
    assert run("node", "--help") == 0
    text = capsys.readouterr().out
    assert "--config" in text
    assert "Exit codes" in text
    assert run("status", "--help") == 0
    assert "--http" in capsys.readouterr().out


def test_a_mistake_in_the_configuration(capsys: Capture, tmp_path: Path) -> None:
    assert run("node", "--config", str(tmp_path / "absent.toml")) == 2
    assert error_line(capsys).startswith(f"ekko: {tmp_path}/absent.toml: cannot be read")
    path = tmp_path / "node.toml"
    path.write_text(GOOD.replace('role = "serve"', 'rolle = "serve"'))
    assert run("node", "--config", str(path)) == 2
    assert "node.toml:4: node.rolle: unknown setting; did you mean 'role'?" in error_line(capsys)


def test_check_starts_nothing(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(GOOD)
    assert run("node", "--config", str(path), "--check") == 0
    assert "fine: node 'eu-1'" in capsys.readouterr().out
    assert not (tmp_path / "state").exists()


def test_usage_errors(capsys: Capture) -> None:
    assert run("node") == 2
    assert run("nonsense") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--http", "127.0.0.1:1", "--config", "x"]])
def test_status_wants_one_address(capsys: Capture, arguments: list[str]) -> None:
    assert run("status", *arguments) == 2
    assert "either --config FILE or --http HOST:PORT" in error_line(capsys)


def test_status_of_nobody(capsys: Capture) -> None:
    assert run("status", "--http", "127.0.0.1:9") == 2
    assert "no node answers at http://127.0.0.1:9: [Errno 111] Connection refused: start it" in error_line(capsys)
    assert run("status", "--http", "127.0.0.1") == 2
    assert "expected HOST:PORT" in error_line(capsys)


@contextmanager
def answering(body: bytes, code: int = 200) -> Iterator[str]:
    """A server that answers every GET so; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("body", "code"), [(b"<html>", 200), (b"[]", 200), (b"{}", 404)])
def test_status_of_something_else(capsys: Capture, body: bytes, code: int) -> None:
    with answering(body, code) as address:
        assert run("status", "--http", address) == 2
    assert address in error_line(capsys)


STATUS = {
    "node": {
        "id": "eu-1",
        "region": "eu",
        "role": "serve",
        "address": "tcp://127.0.0.1:1",
        "run_dir": "/r",
        "version": "1",
        "boot": "00",
        "cluster": "00",
        "uptime_s": 3725.2,
        "resumed": True,
    },
    "ready": False,
    "waiting_for": ["the cluster"],
    "synced": False,
    "members": [
        {
            "node": "t-1",
            "region": "us",
            "role": "train",
            "address": "tcp://127.0.0.1:2",
            "alive": False,
            "hold": {"ctr": [0, 1, 2, 3]},
        }
    ],
    "models": {
        "ctr": {
            "shards": 64,
            "partitions": 4,
            "hold": [0, 3],
            "codec": "float16",
            "synced": False,
            "staleness_ms": 1234,
            "open_steps": 0,
            "steps_dropped": 0,
            "pulling_from": "t-1",
            "rows": 1_000_000,
            "bytes": 3 << 30,
            "tables": {"item": {"dim": 16, "rows": 1_000_000, "tombstones": 5, "bytes": 3 << 30}},
            "tensors": {},
        }
    },
    "peers": [
        {
            "node": "t-1",
            "rows_in": 5,
            "rows_out": 0,
            "bytes_in": 2048,
            "bytes_out": 0,
            "bytes_in_flight": 0,
            "batches_skipped": 0,
        }
    ],
    "queues": [{"name": "waits", "fill": 1, "bound": 1024}],
    "counters": {},
    "rejected": {"00ff": 3},
}


def test_status_as_json_is_the_answer(capsys: Capture) -> None:
    with answering(json.dumps(STATUS).encode()) as address:
        assert run("status", "--http", address, "--json") == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_for_people() -> None:
    console = Console(width=150, record=True, force_terminal=False, file=sys.stderr)
    print_status(STATUS, console)
    text = console.export_text()
    for part in (
        "eu-1",
        "waiting for the cluster",
        "1 h 2 min 5 s",
        "silent",
        "1,000,000",
        "3.0 GiB",
        "1,234 ms",
        "pulling from t-1",
        "0, 3 of 4",
        "ctr: all of 4",
    ):
        assert part in text, part
    assert "2.0 KiB" in text
    assert "00ff: 3" in text


def test_the_tables_of_a_status_fit_a_narrow_terminal() -> None:
    console = Console(width=80, file=io.StringIO())
    delays = {"rows": 1_000, "p50_ms": 12.5, "p99_ms": 90_125.0}
    ctr = STATUS["models"]["ctr"] | {"row_delays": {"significant": delays, "ordinary": delays | {"rows": 99_000}}}
    failed = {"formula": "mine", "failures": 3, "steps_without": 7, "last_failure": "ValueError: returned shape (3,)"}
    busy = {
        "mode": "state",
        "backlog_rows": 12_345,
        "backlog_bytes": 1 << 20,
        "oldest_ms": {"ordinary": 9_500},
        "bytes_saved": 4096,
        "credit_bytes": 3 << 20,
        "no_credit": "acknowledgement late",
        "round_trip_ms": 181,
        "path_bytes_per_s": 1_250_000.0,
    }
    peers = [STATUS["peers"][0] | busy]
    print_status(STATUS | {"models": STATUS["models"] | {"ctr": ctr | {"priority": failed}}, "peers": peers}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in (
        "1,000,000",
        "100,000",
        "1.00 %",
        "90.1 s",
        "12,345 rows",
        "ordinary 9.5 s",
        "4.0 KiB",
        "10.0 Mbit/s",
        "3.0 MiB",
        "acknowledgement late",
        "formula 'mine' failed 3 times",
        "weighed 7 tables",
    ):
        assert part in " ".join(text.split()), part


def test_status_shows_rows_on_a_device_and_why_there_are_none() -> None:
    console = Console(width=120, file=io.StringIO())
    cache = {"size": 1_234, "capacity": 65_536, "looked_up": 1_000, "missed": 125, "assigned": 77}
    models = {"ctr": {"item": cache, "user": {}}}
    device = {"name": "cuda:0", "serving": True, "reason": "", "behind_ms": 12, "models": models}
    print_status(STATUS | {"device": device}, console)
    print_status(STATUS | {"device": device | {"serving": False, "reason": "no [room]", "models": {}}}, console)
    text = " ".join(console.file.getvalue().replace("│", "").split())  # type: ignore[attr-defined]
    assert "Rows on cuda:0, at most 0.0 s behind" in text
    assert "ctr item 1,234 65,536 1,000 87.5% 77" in text
    assert "all rows are served from the host: no [room]" in text


def test_status_of_a_node_that_starts(capsys: Capture) -> None:
    with answering(b'{"ready": false, "waiting_for": ["kernels"]}') as address:
        assert run("status", "--http", address) == 0
    assert "it waits for: kernels" in capsys.readouterr().out


def test_a_node_that_stops_to_protect_its_data_exits_3(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> dict[str, Any]:
        raise NodeFailed("refused by the cluster")

    monkeypatch.setattr(cli, "fetch_status", fail)
    assert run("status", "--http", "127.0.0.1:9") == 3
    assert error_line(capsys) == "ekko: refused by the cluster\n"


def test_a_command_that_cannot_be_loaded_says_so_when_called(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    cli._register_broken("demo", "the command 'demo' cannot be loaded: no torch")
    assert run("demo", "--quick", "5") == 2
    assert error_line(capsys) == "ekko: the command 'demo' cannot be loaded: no torch\n"


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if not (below := getattr(command, "commands", {})) or command.invoke_without_command:
            yield " ".join((*path, name)), command
        if below:
            yield from commands(command, (*path, name))


def test_every_command_speaks_json_and_says_what_its_arguments_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ("registered_commands", "registered_groups"):
        monkeypatch.setattr(cli.app, names, list(getattr(cli.app, names)))
    REGISTER()
    found = dict(commands(typer.main.get_command(cli.app)))
    assert {"node", "snapshot", "snapshot list", "sim run", "demo"} <= found.keys()
    for name, command in found.items():
        assert command.help, name
        assert "--json" in {option for parameter in command.params for option in parameter.opts}, name
        assert [parameter.name for parameter in command.params if not parameter.help] == [], name


def test_a_check_and_a_key_as_json(tmp_path: Path, capsys: Capture) -> None:
    assert run("keygen", "--out", str(tmp_path / "eu-1.key"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"secret": f"{tmp_path}/eu-1.key", "public": f"{tmp_path}/eu-1.pub"}
