"""The documentation is run: its files are valid, and the tutorial does what it says, on real nodes."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from pydantic import BaseModel
from starlette.routing import Route

from ekko.config import ModelSection, NodeConfig, NodeSection, load_config
from ekko.config.sections import (
    DeviceSection,
    HealthSection,
    LinkSection,
    SecuritySection,
    ServerModelSection,
    ServerSection,
    ServerTableSection,
    SinkSection,
    SnapshotsSection,
    TableSection,
)
from ekko.http import make_app
from ekko.store import Store
from ekko.torch import track
from sim_cluster.processes import free_ports, wait_until

ROOT = Path(__file__).parent.parent
DEADLINE_S = 120
# What the trainer does between two commands of the tutorial's section on generations.
NEXT_GENERATION = """
import numpy as np, ekko
with ekko.Publisher("tcp://127.0.0.1:7700", model="ctr-2026-11-22", tables={"item": 8}) as publisher:
    publisher.wait(publisher.publish("item", [1], np.ones((1, 8), np.float32)), scope="all")
"""


def blocks(document: str, language: str) -> Iterator[tuple[str, str]]:
    """(label, text) of each fenced block of a language."""
    yield from re.findall(rf"^```{language} ?(\S*)\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def patient(text: str) -> str:
    """As the document has it, but for a machine that is busy with other tests."""
    text = text.replace('scope="all")', f'scope="all", timeout={DEADLINE_S})')
    return text.replace("flush_reports()", f"flush_reports({DEADLINE_S})")


def test_the_readme_shows_a_valid_configuration(tmp_path: Path) -> None:
    texts = [text for _, text in blocks("README.md", "toml")]
    assert len(texts) == 1
    path = tmp_path / "node.toml"
    path.write_text(texts[0])
    assert load_config(path).node.id == "eu-1"


def settings_of(section: type[BaseModel], prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name in section.model_fields}


def test_the_reference_lists_every_setting_and_nothing_else() -> None:
    text = (ROOT / "docs/reference/configuration.md").read_text()
    listed = re.findall(r"^\| `((?:node|models|links|snapshots|health|device|server|sinks|security)\.[^`]+)` \|", text, re.M)
    sections = {
        "node": NodeSection,
        "models.NAME": ModelSection,
        'links."A/B"': LinkSection,
        "snapshots": SnapshotsSection,
        "health": HealthSection,
        "device": DeviceSection,
        "server": ServerSection,
        "server.models.NAME": ServerModelSection,
        "server.models.NAME.tables.TABLE": ServerTableSection,
        "sinks.NAME": SinkSection,
        "security": SecuritySection,
    }
    assert {prefix.partition(".")[0] for prefix in sections} == NodeConfig.model_fields.keys()
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for prefix, section in sections.items() for name in settings_of(section, prefix)}
    for name in TableSection.model_fields:
        assert f"{name} =" in text, name


def test_the_reference_lists_every_path_of_the_server() -> None:
    text = (ROOT / "docs/reference/configuration.md").read_text()
    listed = {path for row in re.findall(r"^\| (`.*?) \|", text, re.M) for path in re.findall(r"`(?:POST )?(/\w+)[`?]", row)}
    assert listed == {route.path for route in make_app(Mock()).routes if isinstance(route, Route)}


def test_the_reference_lists_every_argument_of_track() -> None:
    text = (ROOT / "docs/reference/training.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text.partition("| argument | meaning |")[2].partition("\n\n")[0], re.M)
    assert sorted(listed) == sorted(inspect.signature(track).parameters)


@pytest.mark.parametrize("document", ["README.md", "docs/reference/training.md"])
def test_python_in_a_document_compiles(document: str) -> None:
    texts = [text for _, text in blocks(document, "python")]
    assert len(texts) >= 2
    for text in texts:
        compile(text, document, "exec")


@pytest.mark.processes
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    fixed = sorted(set(re.findall(r"127\.0\.0\.1:(7[789]0[01])", (ROOT / "docs/tutorial.md").read_text())))
    ports = dict(zip(fixed, map(str, free_ports(len(fixed))), strict=True))

    def moved(text: str) -> str:
        return re.sub(r"(127\.0\.0\.1:)(7[789]0[01])", lambda found: found[1] + ports[found[2]], text)

    for name, text in blocks("docs/tutorial.md", "toml"):
        if "/" not in name:  # those of the second half have machines of their own
            (tmp_path / name).write_text(moved(text))
    nodes = []
    try:
        for name, http in (("train.toml", "7900"), ("serve.toml", "7901")):
            command = [sys.executable, "-m", "ekko.cli", "node", "--config", name]
            with (tmp_path / f"{name}.log").open("wb") as log:
                nodes.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT))
            wait_ready(ports[http], nodes[-1], tmp_path / f"{name}.log")
        texts = blocks("docs/tutorial.md", "python")
        script = "".join(text for name, text in texts if not name.endswith(".py"))  # one process: CI is short of time
        subprocess.run([sys.executable, "-c", patient(moved(script))], cwd=tmp_path, check=True, timeout=DEADLINE_S)
        status = [sys.executable, "-m", "ekko.cli", "status", "--config", "serve.toml"]
        shown = subprocess.run(status, cwd=tmp_path, check=True, timeout=DEADLINE_S, capture_output=True, text=True).stdout
        assert "train-1" in shown
        wait_until(lambda: events_judged(ports["7900"]) > 1_000, "the other node to have the answers' figures", DEADLINE_S)
        for line in next(text for _, text in blocks("docs/tutorial.md", "sh") if text.startswith("ekko health")).splitlines():
            health = [sys.executable, "-m", "ekko.cli", *shlex.split(line, comments=True)[1:]]
            shown = subprocess.run(health, cwd=tmp_path, check=True, timeout=DEADLINE_S, capture_output=True, text=True).stdout
            assert "ctr" in shown
        generations = next(text for _, text in blocks("docs/tutorial.md", "sh") if text.startswith("ekko alias"))
        for line in generations.splitlines():
            if not line.startswith("ekko "):
                subprocess.run(
                    [sys.executable, "-c", patient(moved(NEXT_GENERATION))], cwd=tmp_path, check=True, timeout=DEADLINE_S
                )
                continue
            command = [sys.executable, "-m", "ekko.cli", *shlex.split(line, comments=True)[1:]]
            subprocess.run(command, cwd=tmp_path, check=True, timeout=DEADLINE_S)
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(DEADLINE_S)
        for name in ("train-1", "eu-1"):
            remove_memory(tmp_path / "run" / name)


@pytest.mark.processes
def test_rows_change_on_the_tutorials_second_machine(tmp_path: Path) -> None:
    """Both machines are this one: each has a folder, ports of its own, and none of the other's secrets."""
    machines = {name: tmp_path / name for name in ("machine-1", "machine-2")}
    peers = dict(zip(("10.0.0.1", "10.0.0.2"), free_ports(2), strict=True))
    nodes, watcher, trainer = [], None, None
    own: dict[str, dict[str, int]] = {}

    def moved(machine: str, text: str) -> str:
        text = re.sub(r"(10\.0\.0\.[12]):7800", lambda found: f"127.0.0.1:{peers[found[1]]}", text)
        return re.sub(r"127\.0\.0\.1:(7[79]00)", lambda found: f"127.0.0.1:{own[machine][found[1]]}", text)

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name, folder in machines.items():
        folder.mkdir()
        own[name] = dict(zip(("7700", "7900"), free_ports(2), strict=True))
        for label, text in blocks("docs/tutorial.md", "sh"):
            if label == name:
                subprocess.run(["bash", "-ec", text], cwd=folder, check=True, timeout=DEADLINE_S, env=environment)
    for name, folder in machines.items():
        for other in machines.values():
            for public in folder.glob("*.pub"):
                shutil.copy(public, other / "allow")
        for label, text in blocks("docs/tutorial.md", "toml"):
            if label.startswith(name):
                (tmp_path / label).write_text(moved(name, text))
        for label, text in blocks("docs/tutorial.md", "python"):
            if label.endswith(".py"):
                (folder / label).write_text(patient(moved(name, text)))
    try:
        for name, config in (("machine-1", "train.toml"), ("machine-2", "serve.toml")):
            log = machines[name] / "node.log"
            command = [sys.executable, "-m", "ekko.cli", "node", "--config", config]
            with log.open("wb") as out:
                nodes.append(subprocess.Popen(command, cwd=machines[name], stdout=out, stderr=subprocess.STDOUT))
            wait_ready(str(own[name]["7900"]), nodes[-1], log)
        watch = [sys.executable, "watch.py", "run/keyed", str(DEADLINE_S)]
        watcher = subprocess.Popen(watch, cwd=machines["machine-2"], stdout=subprocess.PIPE, text=True)
        train = [sys.executable, "train.py"]
        trainer = subprocess.Popen(train, cwd=machines["machine-1"])
        assert watcher.stdout is not None
        for line in watcher.stdout:  # they end, and so does the test, if no row ever changes
            if int(line.split()[0]) > 0:
                break
            if trainer.poll() == 0:  # before the watcher began: it counts what changes from then on
                trainer = subprocess.Popen(train, cwd=machines["machine-1"])
        else:
            pytest.fail("no row changed on the second machine")
        assert trainer.wait(DEADLINE_S) == 0
    finally:
        for process in [*nodes, *(process for process in (watcher, trainer) if process is not None)]:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)  # closes what it wrote to
        for folder in machines.values():
            if (folder / "run" / "keyed").exists():
                remove_memory(folder / "run" / "keyed")


def wait_ready(port: str, node: subprocess.Popen[bytes], log: Path) -> None:
    def ready() -> bool:
        assert node.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return True
        except OSError:
            return False

    wait_until(ready, f"the node of {log.name} to be ready", DEADLINE_S)


def events_judged(port: str) -> float:
    """Of the online model, as a node knows them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=DEADLINE_S) as answer:
        events: float = json.load(answer)["health"]["ctr"]["arms"]["online"]["events"]
    return events


def remove_memory(run_dir: Path) -> None:
    Store.open(run_dir).destroy()
