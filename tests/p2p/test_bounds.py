"""What a peer may ask for and send at all: questions have a price, and credit is an upper bound at both ends."""

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import links
from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.links import Link
from p2p.sync import SHARD_VERSIONS
from sim_cluster.checkers import check_converged
from sim_cluster.virtual import VirtualCluster
from tests.p2p.test_hostile import link_of, machine_of
from tests.p2p.test_machine import counters, start, synced
from tests.p2p.test_peer_bounds import effects_of

SHARDS = 4_096


def unasked_chunk(cluster: VirtualCluster) -> m.PullReply:
    """A chunk of an answer that nobody waits for."""
    nothing = np.empty(0, np.uint16), np.zeros((8, 0), np.uint64), np.empty(0, np.uint64)
    return m.PullReply(cluster.model.id, 1, 1, False, (), *nothing)


def paper_cluster() -> VirtualCluster:
    model = ModelSpec("ctr", SHARDS, {"item": TableSpec("item", 4)})
    cluster = VirtualCluster(1, model=model, sync=SHARD_VERSIONS)
    cluster.add("t1", "train", "train")
    cluster.add("eu1", "eu", seeds=["t1"])
    assert cluster.run_until(lambda: synced(cluster, "eu1"))
    cluster.publish("t1", "item", list(range(64)), 1.0)
    cluster.run(2_000)
    return cluster


@pytest.mark.parametrize("kind", ["versions", "shards"])
def test_questions_of_a_round_have_a_price(kind: str) -> None:
    """Each may be about all shards, and none of them costs its sender credit."""
    cluster = paper_cluster()
    number = cluster.model.id
    every = np.arange(SHARDS, dtype=np.uint32)
    nothing = np.empty(0, np.uint16), np.empty((SHARDS, 0), np.uint64)
    before = counters(cluster, "t1").pulls_refused
    answers = 0
    for request in range(1, 1_001):
        asked = m.VersionsWanted(number, request, 0) if kind == "versions" else m.ShardsWanted(number, request, every, *nothing)
        effects = effects_of(cluster, "t1", "eu1", asked)
        answers += sum(isinstance(effect, m.Send) for effect in effects)
    admitted = links.SELECTIONS_MAX * links.SELECTION_MS // (links.ROUND_MS + SHARDS // links.ROUND_SHARDS_PER_MS) + 1
    assert 0 < answers <= admitted
    assert counters(cluster, "t1").pulls_refused - before >= 1_000 - admitted
    cluster.run(2_000)  # paid by then: the rounds of a correct peer go on
    cluster.publish("t1", "item", [7], 2.0)
    assert cluster.run_until(lambda: check_converged(cluster) == "", 5_000)


def test_a_correct_sender_never_overruns_however_its_sessions_break() -> None:
    sender, receiver = Link("b", 2, "b:1", "eu", own_boot=1), Link("a", 1, "a:1", "us", own_boot=2)
    for lost_first in (True, False) * 3:  # a hole, and then all that credit still allows, each of it twice
        first = True
        while sender.has_credit():
            envelope = sender.next_envelope(1 << 20)
            if not (first and lost_first):
                for _ in range(2):
                    receiver.on_arrival(envelope)
                    assert not receiver.overruns(1 << 20)
            first = False
        sender.restart_session()


def test_what_goes_on_without_credit_is_dropped_and_counted() -> None:
    """After a hole nothing is acknowledged, so a correct peer comes to a halt."""
    cluster = start()
    link = link_of(cluster, "eu1", "t1")
    machine = machine_of(cluster, "eu1")
    rejected = 0
    chunk = unasked_chunk(cluster)
    for number in range(10 * links.CREDIT_MESSAGES_MAX):
        envelope = m.Envelope(link.boot, machine._core.options.boot, link.session_in + (number == 0), 5 + number, version=2)
        try:
            machine.handle(m.MessageReceived(envelope, chunk), cluster.now())
        except RemoteProtocolError:
            rejected += 1
    assert rejected >= 7 * links.CREDIT_MESSAGES_MAX
    assert counters(cluster, "eu1").credit_overruns == rejected
    envelope = m.Envelope(link.boot, machine._core.options.boot, link.session_in + 1, 1, version=2)
    machine.handle(m.MessageReceived(envelope, chunk), cluster.now())  # a new session has credit of its own


def test_each_new_session_counts_as_a_call() -> None:
    cluster = start()
    link = link_of(cluster, "eu1", "t1")
    machine = machine_of(cluster, "eu1")
    chunk = unasked_chunk(cluster)
    for session in range(link.session_in + 1, link.session_in + 4):
        envelope = m.Envelope(link.boot, machine._core.options.boot, session, 1, version=2)
        effects = machine.handle(m.MessageReceived(envelope, chunk), cluster.now())
        assert m.Unwanted() in effects
