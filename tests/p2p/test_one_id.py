"""Two processes with one node id: the members follow the later one, so the earlier one ends."""

import dataclasses
from typing import Any

import pytest

from p2p.core import MachineOptions
from p2p.machine import Machine
from p2p.members.introductions import OTHER_LIFE_MS, Introductions
from p2p.messages import Envelope, Hello, MemberRecord, Refusal, Send
from sim_cluster.virtual import VirtualCluster
from tests.p2p.retirement_chaos import isolate
from tests.p2p.test_hostile import machine_of
from tests.p2p.test_machine import start, synced


def make(options: MachineOptions, *rest: Any) -> Machine:
    """The node that the simulator calls t1b believes to be t1."""
    return Machine(dataclasses.replace(options, node="t1") if options.node == "t1b" else options, *rest)


def test_of_two_processes_with_one_id_the_earlier_one_ends() -> None:
    cluster = VirtualCluster(1, make_machine=make)
    for name, region, role in (("t1", "train", "train"), ("eu1", "eu", "serve"), ("us1", "us", "serve")):
        cluster.add(name, region, role, [] if name == "t1" else ["t1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    isolate(cluster, "t1")
    cluster.run(15_000)
    cluster.add("t1b", "train", "train", ["eu1"])  # its replacement, elsewhere, under the same id
    assert cluster.run_until(lambda: synced(cluster, "t1b"))
    cluster.run(1_000)
    assert cluster.nodes["t1"].machine is not None
    cluster.cut.clear()
    assert cluster.run_until(lambda: cluster.nodes["t1"].machine is None, OTHER_LIFE_MS + 5_000)
    assert "another process with node id 't1' was started later, at virtual://t1b" in cluster.nodes["t1"].fatal
    assert cluster.publish("t1b", "item", [1], 1.0)
    assert cluster.nodes["t1b"].machine is not None


@pytest.mark.parametrize("farewell", [True, False])
def test_a_replacement_whose_clock_is_behind_is_told_of_the_life_before(farewell: bool) -> None:
    """It listens elsewhere and has no ledger, so that it cannot know how late it has to begin."""
    cluster = VirtualCluster(1, make_machine=make)
    for name, region, role in (("eu1", "eu", "serve"), ("t1", "train", "train"), ("us1", "us", "serve")):
        cluster.add(name, region, role, [] if name == "eu1" else ["eu1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    if farewell:
        cluster.leave("t1")
    else:
        cluster.crash("t1")
    cluster.run(10_000)
    cluster.add("t1b", "train", "train", ["eu1"])
    core = machine_of(cluster, "t1b")._core
    core.membership.own = dataclasses.replace(core.membership.own, boot_ms=core.membership.own.boot_ms - 60_000)
    cluster.run(OTHER_LIFE_MS + 2_000)
    for name in ("eu1", "us1"):
        register = machine_of(cluster, name)._core.membership
        assert register.members["t1"].record.boot == core.options.boot
        assert register.alive("t1", cluster.now_ms)


def told_of(cluster: VirtualCluster, record: MemberRecord, answers: bool = True) -> str:
    """Members tell us1 of its own id, and whoever that is may answer its call; why it ended."""
    introductions: Introductions = machine_of(cluster, "us1")._introductions
    core = introductions._core
    core.effects, introductions._other_life, introductions._face_ms = [], None, 0
    introductions._note_own(record, cluster.now())
    called = [effect.address for effect in core.effects if isinstance(effect, Send) and isinstance(effect.message, Hello)]
    if answers and called == [record.address]:
        introductions.on_refusal(Envelope(record.boot, core.options.boot), Refusal("node id in use"), None)
    return "".join(getattr(effect, "reason", "") for effect in core.effects)


def test_what_does_not_end_a_node() -> None:
    cluster = start()
    core = machine_of(cluster, "us1")._core
    own = core.membership.own
    other = dataclasses.replace(own, boot=7, boot_ms=own.boot_ms + 1, heartbeat=10, address="virtual://other")
    assert "another process" in told_of(cluster, other)
    assert told_of(cluster, other, answers=False) == "", "nobody is there"
    assert core.membership.own.boot_ms == own.boot_ms
    assert told_of(cluster, dataclasses.replace(other, boot_ms=own.boot_ms - 1)) == "", "earlier"
    for nobody in (
        dataclasses.replace(other, left=True),
        dataclasses.replace(other, address=own.address),
        dataclasses.replace(other, boot=core.record.lives[0] ^ 2),
    ):
        core.record.lives.append(nobody.boot if nobody.boot != 7 else 0)
        nobody = dataclasses.replace(nobody, boot_ms=core.membership.own.boot_ms + 1)
        assert told_of(cluster, nobody) == "", "it cannot answer"
        assert core.membership.own.boot_ms == nobody.boot_ms + 1, "so ours is the later life"
    assert core.record.boot_ms == core.membership.own.boot_ms
