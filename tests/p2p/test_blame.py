"""Who is shut out, and that a correct neighbour is not (R17, decision 0007)."""

import asyncio
import dataclasses

import numpy as np
import pytest

from ekko.model import table_id
from p2p import messages as m
from p2p.errors import AheadError, RemoteProtocolError
from p2p.link.allowance import SELECTION_MS, SELECTIONS_MAX
from p2p.link.conduct import CALLS_MAX, REJECTED_MAX
from p2p.members.introductions import ANSWERS_MAX
from p2p.replica import RowColumns
from p2p.runtime import STRANGERS_MAX
from p2p.stamps import make_stamp
from p2p.transport import zmq
from sim_cluster.processes import free_ports
from tests.p2p.keyed import BOOTS, MODEL, KeyedNode, record_of, with_node

NO_CLAIMS = m.ShardClaims(np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint16))


def batch_of(stamp: int, prev: int, origin: str = "t1") -> m.Batch:
    return m.Batch(MODEL.id, origin, "train", 9, 9, stamp, prev, 0, NO_CLAIMS, ())


def send_batches(node: KeyedNode, ahead_ms: int) -> None:
    """More of them than anybody may send that are wrong."""
    prev = 0
    for number in range(REJECTED_MAX + 1):
        stamp = make_stamp(node.clock().unix_ms + ahead_ms + number, 0, 9)
        node.come("us1", batch_of(stamp, prev), sequence=number + 1)
        prev = stamp


def say_the_time(node: KeyedNode, unix_ms: int) -> None:
    for name, boot in BOOTS.items():
        node.come(name, m.Heartbeat(record_of(name, boot, "train" if name == "t1" else "serve"), (), 0, unix_ms, ()))


@pytest.mark.parametrize("told", [True, False])
def test_a_node_whose_own_clock_is_behind_blames_nobody(told: bool) -> None:
    """A virtual machine that was suspended wakes with an old wall clock."""

    async def body(node: KeyedNode) -> None:
        right = node.clock().unix_ms
        node.unix_ms -= 61_000
        if told:
            say_the_time(node, right)
        send_batches(node, 61_000)
        assert sum(node.runtime.rejected.values()) == REJECTED_MAX + 1, "refused they are"
        assert node.runtime.conduct.admits("us1", node.now_ms)

    with_node(body)


def test_who_sends_from_the_future_is_blamed_by_a_clock_that_agrees_with_the_others() -> None:
    async def body(node: KeyedNode) -> None:
        say_the_time(node, node.clock().unix_ms)
        send_batches(node, 61_000)
        assert not node.runtime.conduct.admits("us1", node.now_ms)

    with_node(body)


def test_a_stamp_from_the_future_is_a_fault_of_the_message_all_the_same() -> None:
    assert issubclass(AheadError, RemoteProtocolError)


def test_rows_of_a_table_that_is_not_known_yet_are_counted_and_blamed_on_nobody() -> None:
    async def body(node: KeyedNode) -> None:
        keys = np.array([1], np.uint64)
        shards = node.machine._core.keyspaces[MODEL.id].replica.shards_of(keys).astype(np.uint32)
        prev = 0
        for number in range(REJECTED_MAX + 1):
            stamp = make_stamp(node.clock().unix_ms, number, 9)
            claims = m.ShardClaims(shards, np.array([prev], np.uint64), np.zeros(1, np.uint16), np.ones(1, np.uint16))
            rows = RowColumns(table_id("new"), keys, np.zeros((1, 16), np.uint8))
            node.come("us1", m.Batch(MODEL.id, "t1", "train", 9, 9, stamp, prev, 1, claims, (rows,)), sequence=number + 1)
            prev = stamp
        assert node.machine.counters.batches_unknown == REJECTED_MAX + 1
        assert node.runtime.conduct.shut_outs == 0
        assert not node.runtime.rejected

    with_node(body)


@pytest.mark.parametrize("kind", ["ack", "reply", "batch"])
def test_who_repeats_what_nobody_wants_without_end_is_shut_out(kind: str) -> None:
    async def body(node: KeyedNode) -> None:
        nothing = np.empty(0, np.uint16), np.empty((8, 0), np.uint64), np.empty(0, np.uint64)
        messages: dict[str, m.Message] = {
            "ack": m.Ack(1, 1),
            "reply": m.PullReply(MODEL.id, 99, 0, False, (), *nothing),
            "batch": batch_of(1 << 40 | 9, 0, "evil"),
        }
        for number in range(300):
            node.come("evil", messages[kind], sequence=0 if kind == "ack" else number + 1)
        # Its hello, and that a session begins, count too.
        assert 299 <= node.runtime.conduct._records["evil"].calls <= 302 < CALLS_MAX

    with_node(body)


def test_addresses_that_a_peer_invents_do_not_take_all_sockets() -> None:
    """The lives of one node may be many, and each names an address."""

    async def body(node: KeyedNode) -> None:
        members = set(node.transport.addresses)
        for number in range(2 * STRANGERS_MAX):
            node.now_ms += 100  # slowly: at once only a few are answered at all
            life = dataclasses.replace(record_of("evil", 10_000 + number), address=f"tcp://10.9.{number >> 8}.{number & 255}:1")
            node.come("evil", m.Heartbeat(life, (), 0, 0, ()), boot=life.boot)
        assert len(node.transport.addresses - members) <= STRANGERS_MAX
        assert members <= node.transport.addresses, "members stay connected"

    with_node(body)


def test_strangers_are_answered_so_many_a_beat() -> None:
    async def body(node: KeyedNode) -> None:
        sent = len(node.transport.sent)
        for number in range(4 * ANSWERS_MAX):
            life = dataclasses.replace(record_of("evil", 10_000 + number), address=f"tcp://10.9.9.{number}:1")
            node.come("evil", m.Heartbeat(life, (), 0, 0, ()), boot=life.boot)
        assert len(node.transport.sent) == sent + ANSWERS_MAX

    with_node(body)


def test_a_flood_of_pulls_makes_a_bounded_number_of_selections() -> None:
    async def body(node: KeyedNode) -> None:
        nothing = np.empty(0, np.uint16), np.empty((8, 0), np.uint64), np.empty(0, np.uint64)
        for number in range(10 * SELECTIONS_MAX):
            node.come("evil", m.PullRequest(MODEL.id, number, *nothing, 8))
        assert node.machine.counters.pulls_served == SELECTIONS_MAX
        node.now_ms += 2 * SELECTION_MS
        node.come("evil", m.PullRequest(MODEL.id, number + 1, *nothing, 8))
        assert node.machine.counters.pulls_served == SELECTIONS_MAX + 1, "patience pays"
        node.come("us1", m.PullRequest(MODEL.id, 1, *nothing, 8))
        assert node.machine.counters.pulls_served == SELECTIONS_MAX + 2, "others are served"

    with_node(body)


def test_a_member_finds_room_among_sockets_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "PEERS_MAX", 5)

    async def main() -> None:
        transport = zmq.ZmqTransport("tcp://127.0.0.1:0")
        await transport.start(lambda *_: None)
        try:
            addresses = [f"tcp://127.0.0.1:{port}" for port in free_ports(6)]  # nobody's, of other tests either
            for address in addresses:
                transport.send(address, [b"x"])
            assert list(transport._peers) == addresses[1:]
        finally:
            await transport.close()

    asyncio.run(main())
