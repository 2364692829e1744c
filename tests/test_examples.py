"""The examples, run small on real nodes: what is served after each is as good as what plain torch learns, and as the others'.

`python examples/compare.py` does it with all events.
"""

import importlib
import runpy
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ekko
from ekko.config import load_config
from ekko.train.optimizers import initializer_of
from ekko.zoo import DLRM
from sim_cluster.demo.evaluation import auc
from sim_cluster.processes import LocalCluster

pytestmark = pytest.mark.processes
EXAMPLES = Path(__file__).parent.parent / "examples"
LINES_MAX = 60  # of a style
EVENTS = 6_400
# An AUC of 1,280 events is known to 0.015 (one standard deviation), and runs that differ in their first weights differ by up to
# 0.02: so these begin with the same weights, and differ by rounding. Of rows that nobody has learnt servers publish nothing,
# so that readers see zeros there, and not first weights.
GOOD = 0.65
SAME, SAME_BUT_UNSEEN = 0.003, 0.01


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    """The module that runs the examples; they import what lies beside them."""
    sys.path.insert(0, str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("compare")
    torch.set_num_threads(threads)
    sys.path.remove(str(EXAMPLES))
    for name in ("compare", "stream"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cluster(compare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with compare.Cluster(tmp_path_factory.mktemp("examples"), seeds=1) as cluster:
        cluster.start()
        yield cluster


def learnt(compare: ModuleType, rows: Mapping[str, Tensor] | None = None) -> float:
    """The AUC of a model that never left its trainer, with these first rows or torch's own."""
    stream = compare.Stream(EVENTS)
    torch.manual_seed(0)
    model = DLRM(stream.shape)
    for name, values in (rows or {}).items():
        model.tables[name].weight.data.copy_(values)
    dense = [*model.bottom.parameters(), *model.top.parameters()]
    optimizer = torch.optim.Adagrad([{"params": model.tables.parameters(), "lr": 0.1}, {"params": dense, "lr": 0.02}])
    for batch in stream.batches():
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(model(batch.dense, batch.ids), batch.labels).backward()
        optimizer.step()
    held_out = stream.held_out
    with torch.no_grad():
        return auc(held_out.labels.numpy(), model(held_out.dense, held_out.ids).numpy())


@pytest.fixture(scope="module")
def plain(compare: ModuleType) -> float:
    """The AUC of plain torch."""
    found = learnt(compare)
    assert found > GOOD
    return found


def served(compare: ModuleType, cluster: LocalCluster, model: str) -> float:
    with ekko.Reader(model, cluster["eu-1"].run_dir, wait=60.0) as reader:
        quality: float = compare.quality(reader, compare.Stream(EVENTS))
    return quality


def test_hooks_serve_what_plain_torch_learns(
    compare: ModuleType, cluster: LocalCluster, plain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["hooks.py", cluster["train-1"].local, "--model", "here", "--events", str(EVENTS)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(EXAMPLES / "hooks.py"), run_name="__main__")
    assert served(compare, cluster, "here") == pytest.approx(plain, abs=1e-6)


@pytest.mark.long  # two ranks and what they publish: tests/ekko/test_ranks_processes.py
def test_several_ranks_serve_what_one_learns(compare: ModuleType, cluster: LocalCluster, plain: float) -> None:
    assert served(compare, cluster, cluster.run("ddp_hooks", 0, EVENTS)) == pytest.approx(plain, abs=SAME)


def test_servers_serve_what_plain_torch_learns_from_their_first_rows(compare: ModuleType, cluster: LocalCluster) -> None:
    stream = compare.Stream(EVENTS)
    settings = tomllib.loads((EXAMPLES / "server.toml").read_text())["server"]["models"]["ctr"]["tables"]
    first = {
        name: torch.from_numpy(initializer_of(settings[name]["initializer"]).rows(name, np.arange(rows, dtype=np.uint64), 16))
        for name, rows in stream.shape.rows.items()
    }
    expected = learnt(compare, first)
    assert expected > GOOD
    assert served(compare, cluster, cluster.run("parameter_server", 0, EVENTS)) == pytest.approx(expected, abs=SAME_BUT_UNSEEN)


def test_the_servers_configuration_is_one() -> None:
    config = load_config(EXAMPLES / "server.toml")
    assert config.server is not None
    assert config.server.listen in (EXAMPLES / "parameter_server.py").read_text()
    assert config.node.local in (EXAMPLES / "parameter_server.py").read_text()


@pytest.mark.parametrize("style", ["hooks", "ddp_hooks", "parameter_server"])
def test_a_style_is_short(style: str) -> None:
    assert len((EXAMPLES / f"{style}.py").read_text().splitlines()) < LINES_MAX
