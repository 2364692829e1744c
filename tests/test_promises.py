"""Each cell of docs/reference/promises.md: what `publish` and `wait` returning promise (R21), and what they do not.

Crashes of processes are real; machines and regions are lost in virtual time, with all that they held. A cell that promises
nothing has a test that loses the step: were it never lost, the table would promise too little.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import ekko
from p2p import messages as m
from p2p.members import membership
from sim_cluster.checkers import check_converged, contents
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until
from sim_cluster.virtual import VirtualCluster

ROOT = Path(__file__).parent.parent
HOME = ("t1", "home1", "home2")
ABROAD = ("eu1", "eu2")
MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000)}
KEY = 7
DEADLINE_S = 60.0

# --- processes -----------------------------------------------------------------------------------------------------------

PUBLISH_AND_DIE = """
import os, signal, sys
import numpy as np
import ekko

publisher = ekko.Publisher(sys.argv[1], model="ctr")
stamp = publisher.publish("item", [7], np.full((1, 4), 3, np.float32))
if sys.argv[2] != "publish":
    publisher.wait(stamp, sys.argv[2], 60.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
WHAT = ["publish", "local", "region", "all"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[LocalCluster]:
    """A training node and a serving one of another region."""
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path, nodes, models=MODELS) as cluster:
        cluster.start()
        yield cluster


def value_at(node: NodeProcess) -> float:
    with closing(ekko.Reader("ctr", run_dir=node.run_dir)) as reader:
        return float(reader.lookup("item", [KEY])[0, 0])


@pytest.mark.processes
def test_a_publisher_that_dies_loses_nothing_that_was_published(pair: LocalCluster) -> None:
    for number, what in enumerate(WHAT):
        with ekko.Publisher(pair["train-1"].local, model="ctr") as publisher:
            publisher.wait(publisher.delete("item", [KEY]), "all", DEADLINE_S)
        assert value_at(pair["serve-1"]) == 0, number
        child = subprocess.run([sys.executable, "-c", PUBLISH_AND_DIE, pair["train-1"].local, what], check=False, timeout=120)
        assert child.returncode == -signal.SIGKILL
        assert value_at(pair["train-1"]) == 3
        wait_until(lambda: value_at(pair["serve-1"]) == 3, f"the other node has it after {what}", DEADLINE_S)


@pytest.mark.processes
def test_a_daemon_that_dies_keeps_what_was_published_and_sends_it_when_it_is_back(pair: LocalCluster) -> None:
    """The other node is down until the publisher's is dead, so that nothing could be on its way already."""
    train, serve = pair["train-1"], pair["serve-1"]
    with ekko.Publisher(train.local, model="ctr") as publisher:
        publisher.wait(publisher.publish("item", [1], np.ones((1, 4), np.float32)), "all", DEADLINE_S)
        serve.kill()
        stamp = publisher.publish("item", [KEY], np.full((1, 4), 3, np.float32))
        publisher.wait(stamp, "local", DEADLINE_S)
        train.kill()
        assert value_at(train) == 3, "readers go on while their daemon is dead"
        assert value_at(serve) == 0, "it was sent before: the test shows nothing"
        train.start()
        serve.start()
        train.wait_ready()
        serve.wait_ready()
        assert train.status()["node"]["resumed"]
        wait_until(lambda: value_at(serve) == 3, "the other node has it", DEADLINE_S)
        publisher.wait(stamp, "all", DEADLINE_S)


@pytest.mark.processes
def test_a_daemon_that_dies_after_wait_all_is_not_needed_any_more(pair: LocalCluster) -> None:
    with ekko.Publisher(pair["train-1"].local, model="ctr") as publisher:
        stamp = publisher.publish("item", [KEY], np.full((1, 4), 3, np.float32))
        assert publisher.wait(stamp, "all", DEADLINE_S) == ()
    pair["train-1"].kill()
    assert value_at(pair["serve-1"]) == 3


# --- machines and regions ------------------------------------------------------------------------------------------------


def start(home: tuple[str, ...] = HOME, abroad: tuple[str, ...] = ABROAD) -> VirtualCluster:
    """A trainer and others in its region, and a region abroad, that know each other."""
    cluster = VirtualCluster(5)
    for name in (*home, *abroad):
        cluster.add(
            name, "home" if name in home else "eu", "train" if name == "t1" else "serve", [] if name == "t1" else ["t1"]
        )
    cluster.publish("t1", "item", [1], 1.0)
    assert cluster.run_until(lambda: check_converged(cluster) == "")
    cluster.run(2_000)
    return cluster


def cut(cluster: VirtualCluster, some: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Let nothing pass from `some` to `others`, nor back."""
    cluster.cut |= {pair for a in some for b in others for pair in ((a, b), (b, a))}


def wait(cluster: VirtualCluster, stamp: int, scope: m.Scope) -> m.WaitEnded:
    number = cluster.ask("t1", lambda request: m.WaitRequested(request, cluster.model.id, stamp, scope, 1_000))
    assert cluster.run_until(lambda: number in cluster.nodes["t1"].replies, 3_000, 1)
    reply = cluster.nodes["t1"].replies[number]
    assert isinstance(reply, m.WaitEnded)
    return reply


def lose(cluster: VirtualCluster, names: tuple[str, ...]) -> None:
    """The machines are gone, and come back empty once the network is whole."""
    for name in names:
        cluster.crash(name)
    cluster.run(100)
    cluster.cut.clear()
    for name in names:
        cluster.restart(name, keep_state=False)
    assert cluster.run_until(lambda: check_converged(cluster) == ""), check_converged(cluster)
    cluster.run(1_000)


def holders(cluster: VirtualCluster) -> list[str]:
    """Who has the step."""
    item = cluster.model.tables["item"].id
    return [name for name, node in cluster.nodes.items() if (item, KEY) in contents(node.store, "ctr")]


def test_published_on_a_machine_that_is_lost_before_it_sent_anything_is_lost() -> None:
    cluster = start()
    cut(cluster, ("t1",), (*HOME[1:], *ABROAD))
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    assert wait(cluster, stamp, m.Scope.LOCAL).lagging == ()
    assert holders(cluster) == ["t1"]
    lose(cluster, ("t1",))
    assert holders(cluster) == [], "publish and wait(local) promise more than the table says"


def test_published_in_a_region_that_is_lost_before_it_sent_anything_is_lost() -> None:
    cluster = start()
    cut(cluster, HOME, ABROAD)
    cluster.publish("t1", "item", [KEY], 3.0)
    cluster.run(200)
    lose(cluster, HOME)
    assert holders(cluster) == []


def test_what_left_the_machine_before_it_was_lost_is_kept() -> None:
    """Not a promise of `publish`, but what is to be expected of it: milliseconds later others have the step."""
    cluster = start()
    cluster.publish("t1", "item", [KEY], 3.0)
    cluster.run(40)
    lose(cluster, ("t1",))
    assert holders(cluster) == [*HOME, *ABROAD]


def test_what_the_region_has_outlives_the_machine() -> None:
    cluster = start()
    cut(cluster, HOME, ABROAD)
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    assert wait(cluster, stamp, m.Scope.REGION) == m.WaitEnded(wait_number(cluster), (), ())
    assert holders(cluster) == [*HOME], "others have it too: the test shows nothing"
    lose(cluster, ("t1",))
    assert holders(cluster) == [*HOME, *ABROAD]


def wait_number(cluster: VirtualCluster) -> int:
    """Of the wait that ended last."""
    return max(number for number, reply in cluster.nodes["t1"].replies.items() if isinstance(reply, m.WaitEnded))


def test_what_only_the_region_has_is_lost_with_it() -> None:
    cluster = start()
    cut(cluster, HOME, ABROAD)
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    assert wait(cluster, stamp, m.Scope.REGION).lagging == ()
    lose(cluster, HOME)
    assert holders(cluster) == []


def test_a_region_of_one_node_promises_no_more_than_that_node() -> None:
    cluster = start(home=("t1",))
    cut(cluster, ("t1",), ABROAD)
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    assert wait(cluster, stamp, m.Scope.REGION) == m.WaitEnded(wait_number(cluster), (), ())
    lose(cluster, ("t1",))
    assert holders(cluster) == []


@pytest.mark.parametrize("lost", [("t1",), HOME], ids=["machine", "region"])
def test_what_all_have_outlives_the_machine_and_the_region(lost: tuple[str, ...]) -> None:
    cluster = start()
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    ended = wait(cluster, stamp, m.Scope.ALL)
    assert (ended.lagging, ended.silent) == ((), ())
    assert holders(cluster) == [*HOME, *ABROAD], "when the wait ends, all have it already"
    lose(cluster, lost)
    assert holders(cluster) == [*HOME, *ABROAD]


def test_wait_does_not_end_well_while_a_live_holder_lacks_it() -> None:
    cluster = start()
    cut(cluster, HOME, ABROAD)
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    assert wait(cluster, stamp, m.Scope.REGION).lagging == ()
    assert wait(cluster, stamp, m.Scope.ALL).lagging == ABROAD


def test_what_was_waited_for_without_the_silent_is_lost_with_those_who_answered() -> None:
    """Suspects are named; whoever needs them to have the step must look at the names."""
    cluster = start()
    cut(cluster, HOME, ABROAD)
    cluster.run(membership.SILENCE_MS_MAX + 1_000)
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    ended = wait(cluster, stamp, m.Scope.ALL)
    assert (ended.lagging, ended.silent) == ((), ABROAD)
    lose(cluster, HOME)
    assert holders(cluster) == []


def test_when_every_machine_is_lost_so_is_all_memory() -> None:
    cluster = start()
    stamp = cluster.publish("t1", "item", [KEY], 3.0)
    assert wait(cluster, stamp, m.Scope.ALL).lagging == ()
    lose(cluster, (*HOME, *ABROAD))
    assert holders(cluster) == []


# --- the document --------------------------------------------------------------------------------------------------------


def test_every_test_that_the_promises_name_is_there() -> None:
    text = (ROOT / "docs/reference/promises.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows] == ["`publish`", '`wait("local")`', '`wait("region")`', '`wait("all")`']
    for row in rows:
        for cell in row.strip().strip("|").split("|")[1:]:
            assert re.search(r"\[\d\]", cell), f"a cell without a test: {cell}"
    notes = dict(re.findall(r"^(\d)\. .*?((?:`test_\w+`(?:, )?)+)$", text, re.M))
    assert set(re.findall(r"\[(\d)\]", text)) <= set(notes)
    named = {name for note in notes.values() for name in re.findall(r"test_\w+", note)}
    assert len(named) >= 12
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in sorted(named) if f"def {name}(" not in sources]
    assert not missing
