"""With keys nobody speaks in another's name, whatever boot a message claims (decision 0006)."""

import dataclasses

import numpy as np
import pytest

from p2p import messages as m
from p2p import wire
from p2p.link.conduct import REJECTED_MAX
from p2p.replica import RowColumns
from p2p.stamps import make_stamp
from tests.p2p.keyed import BOOTS, MODEL, KeyedNode, hello_of, record_of, with_node

ITEM = MODEL.tables["item"].id


def pull_of_t1(node: KeyedNode) -> int:
    """Have the node ask t1; returns the number of the request."""
    machine = node.machine
    machine._pull._asked.clear()
    machine._core.effects = []
    link = machine._core.link("t1")
    assert link is not None
    machine._pull.ask(machine._core.keyspaces[MODEL.id], link, node.clock(), "test")
    return machine._pull._requests


def test_nobody_says_goodbye_for_another_node() -> None:
    async def body(node: KeyedNode) -> None:
        node.come("evil", m.Leave("t1"), boot=BOOTS["t1"])
        assert "t1" in node.alive()
        assert node.machine.counters.impostors == 1
        node.come("t1", m.Leave("t1"))
        assert "t1" not in node.alive()

    with_node(body)


def test_nobody_answers_a_pull_for_another_node() -> None:
    async def body(node: KeyedNode) -> None:
        stamp = make_stamp(node.clock().unix_ms, 0, 7)
        claims = np.array([7], np.uint16), np.full((8, 1), stamp, np.uint64), np.array([stamp], np.uint64)
        reply = m.PullReply(MODEL.id, pull_of_t1(node), 0, True, (), *claims)
        frontier = node.machine._core.keyspaces[MODEL.id].knowledge.frontier
        node.come("evil", reply, boot=BOOTS["t1"], sequence=1)
        assert frontier[7] == 0
        node.come("t1", reply, sequence=1)
        assert frontier[7] == stamp

    with_node(body)


@pytest.mark.parametrize("message", [m.SessionBroken(1), m.Ack(1, 1), m.Refusal("no"), m.Retirements((), ())])
def test_who_speaks_for_another_is_shut_out_and_the_other_is_not(message: m.Message) -> None:
    async def body(node: KeyedNode) -> None:
        for _ in range(REJECTED_MAX + 1):
            node.come("evil", message, boot=BOOTS["t1"])
        assert not node.runtime.conduct.admits("evil", node.now_ms)
        assert node.runtime.conduct.admits("t1", node.now_ms)

    with_node(body)


def test_gossip_that_gives_a_boot_to_somebody_else_does_not_silence_its_owner() -> None:
    """Evil hears of a newcomer first, and tells that the newcomer's life is another node's."""

    async def body(node: KeyedNode) -> None:
        node.come("evil", m.MemberNews((record_of("ghost", 200),)))
        node.transport.come("new", m.Envelope(200, 5), hello_of(record_of("new", 200)))
        node.come("new", m.Leave("new"), boot=200)
        assert "new" not in node.alive()
        assert node.machine.counters.impostors == 0

    with_node(body)


def test_a_strangers_heartbeat_is_its_own() -> None:
    async def body(node: KeyedNode) -> None:
        sent = len(node.transport.sent)
        ghost = dataclasses.replace(record_of("ghost", 300), address="tcp://10.9.9.9:1")
        node.come("evil", m.Heartbeat(ghost, (), 0, 0, ()), boot=300)
        assert len(node.transport.sent) == sent, "nobody is called because somebody else says so"

    with_node(body)


def test_a_founder_that_asked_nobody_is_not_ended_by_a_refusal() -> None:
    async def body(node: KeyedNode) -> None:
        rows = RowColumns(ITEM, np.array([1], np.uint64), np.ones((1, 16), np.uint8))
        node.runtime.submit(m.PublishRequested(1, MODEL.id, (rows,)))
        node.transport.come(
            "evil", m.Envelope(102, 0), dataclasses.replace(hello_of(record_of("evil", 102)), constants=(1, 2, 3))
        )
        told = [wire.decode([memoryview(bytes(f)) for f in frames])[1] for _, frames in node.transport.sent]
        assert any(isinstance(message, m.Refusal) for message in told)
        node.come("evil", m.Refusal("no"))
        assert not any(isinstance(effect, m.Fatal) for effect in node.effects)

    with_node(body, peers=False, role="train", seeds=())
