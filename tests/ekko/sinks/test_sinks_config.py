"""`[sinks]`: each mistake is one line with its place and its remedy; what is shown of sinks, in which no password is."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ekko.cli import app
from ekko.companions.display import sinks_table
from ekko.companions.metrics import sink_metrics
from ekko.companions.picture import ProcessPicture, SinkPicture
from ekko.config import load_config
from ekko.config.sink_checks import SINKS_MAX
from ekko.errors import ConfigError
from ekko.sinks.target import check_target, shown

NODE = """\
[node]
id = "eu-1"
region = "eu"
role = "serve"
run_dir = "state"
peers = "tcp://127.0.0.1:7801"
local = "tcp://127.0.0.1:7701"
http = "127.0.0.1:7901"
"""
REDIS = '[sinks.cache]\nmodel = "ctr"\ntarget = "redis://:secret@127.0.0.1:6379/0"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(NODE + text)
    return path


def test_what_is_right_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = '[sinks.own]\nmodel = "ctr"\ntarget = "mine.sinks:make"\ntables = ["item"]\n'
    config = load_config(write(tmp_path, REDIS + own))
    assert config.sinks["own"].tables == ["item"]
    assert config.sinks["cache"].prefix == "ekko"
    monkeypatch.setenv("EKKO_SINKS__CACHE__TARGET", "redis://:another@127.0.0.1:6379/0")
    assert "another" in load_config(write(tmp_path, REDIS)).sinks["cache"].target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            REDIS.replace("redis://:secret@127.0.0.1:6379/0", "mongo"),
            "11: sinks.cache.target: 'mongo' is no sink: expected redis",
        ),
        (REDIS.replace("6379", "port"), "11: sinks.cache.target: no address of a redis"),
        (REDIS.replace(":secret@127.0.0.1:6379", ""), "11: sinks.cache.target: 'redis:///0' names no redis"),
        (REDIS.replace('"ctr"', '"no/name"'), "10: sinks.cache.model: model name 'no/name' is not usable"),
        (REDIS.replace("target", "to"), "11: sinks.cache.to: unknown setting"),
        ('[sinks.cache]\nmodel = "ctr"\n', "9: sinks.cache.target: missing; add `target = ...` to [sinks.cache]"),
        (REDIS + "tables = []\n", "12: sinks.cache.tables: there is none: name some, or leave this out to feed all"),
        (REDIS + 'tables = ["a b"]\n', "12: sinks.cache.tables: table name 'a b' is not usable"),
        (REDIS + REDIS.replace("cache", "two"), "12: sinks.two: feeds the same model into the same redis as sinks.cache"),
        ('[sinks.own]\nmodel = "ctr"\ntarget = "a:b"\nprefix = "x"\n', "12: sinks.own.prefix: only a redis has one"),
        (REDIS.replace("cache", '"a b"'), 'sinks."a b": sink name'),
        ("".join(REDIS.replace("cache", f"s{n}") for n in range(SINKS_MAX + 1)), f"sinks: there may be {SINKS_MAX}, not 17"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as failed:
        load_config(write(tmp_path, text))
    assert said in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    "target",
    [
        "redis://u:secret/x@h:1/0",
        "redis://:12/secret@h/0",
        "redis://h:1/secret@h/0",
        "redis://u:[secret]@h/0",
        "reds://:secret@h",
    ],
)
def test_no_password_is_in_an_error(target: str) -> None:
    with pytest.raises(ConfigError) as failed:
        check_target(target)
    assert "secret" not in str(failed.value)
    assert "expected redis://" in str(failed.value)


def test_what_is_not_installed_ends_the_start(tmp_path: Path) -> None:
    path = write(tmp_path, '[sinks.own]\nmodel = "ctr"\ntarget = "no_such_package.sinks:make"\n')
    done = CliRunner().invoke(app, ["node", "--config", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == (
        "sinks.own.target: 'no_such_package.sinks:make' needs the package no_such_package, which is not installed: install it, "
        "or set PYTHONPATH"
    )


def test_a_node_cannot_find_what_is_in_no_module(tmp_path: Path) -> None:
    path = write(tmp_path, '[sinks.own]\nmodel = "ctr"\ntarget = "__main__:make"\n')
    done = CliRunner().invoke(app, ["node", "--config", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(
        "sinks.own.target: '__main__:make' is in no module: a node runs it in a process of its own"
    )


STATE = {"rows": 1_500, "deleted": 3, "forgotten": 0, "tensors": 0, "batches": 9, "coalesced": 40, "overflows": 1, "walks": 2}
STATE |= {"retries": 4, "rows_per_s": 75, "walking": False, "sweeping": False, "error": "", "late_ms": 3, "place": [1, 1, 9]}


def picture(**state: object) -> SinkPicture:
    target = shown("redis://me:secret@127.0.0.1:6379/0?password=secret")
    return SinkPicture("cache", "ctr", target, ProcessPicture(True, 2, 1, state=STATE | state), 40, 12_300, "redis: refused", 5)


@pytest.mark.parametrize(
    ("one", "parts"),
    [
        (picture(), ("redis://127.0.0.1:6379/0", "1,500", "75", "40", "12.3", "follows, ended 1 times", "redis: refused")),
        (picture(error="redis: [no] way"), ("it fails, ended 1 times: redis: [no] way",)),
        (picture(walking=True), ("all rows are sent",)),
        (SinkPicture("cache", "ctr", "a:b", ProcessPicture(error="x"), last_error="x"), ("it does not run: x", "-")),
    ],
)
def test_status_shows_it(one: SinkPicture, parts: tuple[str, ...]) -> None:
    said = json.loads(json.dumps(one.to_json()))
    console = Console(width=250)
    with console.capture() as capture:
        console.print(sinks_table({"cache": said}))
    for part in parts:
        assert part in capture.get(), (part, capture.get())
    assert "secret" not in capture.get() + json.dumps(said)


def test_metrics_have_it() -> None:
    families = {family.name: family for family in sink_metrics([picture(), picture(error="no")])}
    up = [sample.value for sample in families["ekko_sink_up"].samples]
    assert up == [1, 0]
    assert families["ekko_sink_behind_rows"].samples[0].labels == {"sink": "cache", "model": "ctr"}
    assert families["ekko_sink_behind_seconds"].samples[0].value == 12.3
    assert families["ekko_sink_rows"].samples[0].value == 1_500
