"""Neighbouring protocol versions work together, others refuse each other, and an upgrade node by node loses nothing."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from p2p import messages as m
from p2p import wire
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.members.membership import Membership
from p2p.versions import FIRST_VERSION, PROTOCOL_VERSION, agree, first_record_version, lowest_spoken
from p2p.wire import table
from sim_cluster.checkers import Watch, check_converged
from sim_cluster.network import NetworkOptions
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, FAULTS, REGIONS, at_rest
from tests.p2p.golden import v1
from tests.p2p.test_machine import synced
from tests.p2p.test_wire import plain
from tests.seeds import seeds

GOLDEN: dict[str, list[str]] = json.loads((Path(__file__).parent / "golden" / "v1.json").read_text())
SEEDS = seeds(2, 4)


def frames_of(name: str) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in GOLDEN[name]]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_version_1_said_is_understood(name: str) -> None:
    envelope, message = wire.decode([memoryview(frame) for frame in frames_of(name)])
    assert envelope == v1.ENVELOPE
    assert plain(message) == plain(without_priority(v1.MESSAGES[name])), "in what scale it has weights, version 1 does not say"


def without_priority(message: m.Message) -> m.Message:
    if not isinstance(message, m.Batch | m.PullReply):
        return message
    return replace(message, columns=tuple(replace(section, priority=None) for section in message.columns))


@pytest.mark.parametrize("name", GOLDEN)
def test_what_we_say_to_version_1_are_its_own_bytes(name: str) -> None:
    assert [bytes(frame) for frame in wire.encode(v1.ENVELOPE, v1.MESSAGES[name])] == frames_of(name)


def test_every_kind_of_version_1_was_recorded() -> None:
    assert {kind.message for kind in table.KINDS if kind.since == 1} == {type(message) for message in v1.MESSAGES.values()}


# --- who speaks with whom ---------------------------------------------------------------------------------------------------


def pair(one: int, other: int) -> tuple[VirtualCluster, VirtualNode, VirtualNode]:
    """Two nodes of these versions; the second calls the first."""
    cluster = VirtualCluster(1)
    first = cluster.add("t1", "train", "train", protocol_version=one)
    second = cluster.add("eu1", "eu", seeds=["t1"], protocol_version=other)
    cluster.run(3_000)
    return cluster, first, second


@pytest.mark.parametrize("versions", [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2)], ids=str)
def test_neighbouring_versions_interoperate(versions: tuple[int, int]) -> None:
    cluster, first, second = pair(*versions)
    assert cluster.publish("t1", "item", [1, 2], 1.0)
    at_rest(cluster)
    for node, peer in ((first, second), (second, first)):
        assert node.machine is not None
        assert node.machine._core.links[peer.name].version == min(versions)
        assert node.machine._core.membership.members[peer.name].record.protocol == peer.protocol_version
        assert not node.rejected


@pytest.mark.parametrize("versions", [(1, 3), (3, 1)], ids=str)
def test_others_refuse_each_other_in_one_line(versions: tuple[int, int]) -> None:
    _, first, second = pair(*versions)
    assert first.machine is not None
    assert first.machine.counters.versions_refused == first.machine.counters.peers_refused >= 1
    ours, theirs = ("versions 2 to 3" if version == 3 else "version 1" for version in versions)
    line = f"the peer has protocol {theirs}, this node protocol {ours}: upgrade the older first"
    assert second.fatal == f"refused by the cluster: t1: {line}"
    assert [dict(note.fields)["reason"] for note in first.notes if note.name == "peer_refused"] == [line]


def test_a_newcomer_must_speak_with_everybody_who_is_there() -> None:
    cluster, *_ = pair(2, 1)
    third = cluster.add("us1", "us", seeds=["t1"], protocol_version=3)
    cluster.run(2_000)
    assert "node 'eu1' of the cluster protocol version 1: upgrade the older first" in third.fatal
    cluster.nodes["eu1"].protocol_version = 2
    cluster.crash("eu1")
    cluster.restart("eu1")
    cluster.run(2_000)
    cluster.restart("us1")
    cluster.run(2_000)
    assert synced(cluster, "us1")


def test_a_record_of_a_version_that_we_do_not_speak_is_ignored() -> None:
    """Somebody let it in who speaks with both; who hears of it there must not link to it."""
    cluster, first, second = pair(2, 2)
    record = m.MemberRecord("new", 5, 1, "us", "serve", "virtual://new", 1, version=first_record_version(4))
    assert first.machine is not None
    assert second.machine is not None
    link = first.machine._core.links["eu1"]
    envelope = m.Envelope(second.machine._core.options.boot, link.own_boot, version=2)
    first.machine.handle(m.MessageReceived(envelope, m.MemberNews((record,))), cluster.now())
    assert "new" not in first.machine._core.membership.members
    assert first.machine.counters.versions_refused == 1


def test_a_schema_that_version_1_cannot_read_keeps_it_out_in_one_line() -> None:
    cluster = VirtualCluster(1, model=ModelSpec("ctr", 8, {"item": TableSpec("item", 4, "int8")}, codec="int8"))
    first = cluster.add("t1", "train", "train")
    second = cluster.add("eu1", "eu", seeds=["t1"], protocol_version=1)
    cluster.run(3_000)
    line = "the peer has protocol version 1, and the cluster's schema needs version 2: upgrade the peer first"
    assert second.fatal == f"refused by the cluster: t1: {line}"
    assert first.machine is not None
    assert first.machine.counters.versions_refused >= 1
    assert first.machine.protocol_min(cluster.now()) == 2


def test_a_cluster_that_cannot_read_our_schema_is_to_be_upgraded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other direction: what version 1 answers to a model with a codec (as commit 9924b4a does) says nothing of versions."""

    def parse(entry: Any) -> Any:
        name, shards = msgpack.unpackb(entry.body)
        raise AssertionError(f"version 1 understood {name} {shards}")

    def adopt(self: Store, entries: Any) -> bool:
        if self is cluster.nodes["t1"].store:
            for entry in entries:
                try:
                    parse(entry)
                except ValueError as error:
                    raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
        return original(self, entries)

    original = Store.adopt
    monkeypatch.setattr(Store, "adopt", adopt)
    cluster = VirtualCluster(1, model=ModelSpec("ctr", 8, {"item": TableSpec("item", 4, "int8")}, codec="int8"))
    cluster.add("t1", "train", "train", protocol_version=1)
    second = cluster.add("eu1", "eu", seeds=["t1"])
    cluster.run(3_000)
    assert second.fatal == (
        "refused by the cluster: t1: the cluster has protocol versions below 2, and this node's schema needs version 2: "
        "upgrade all nodes of the cluster first "
        "(schema entry 'model' cannot be understood: too many values to unpack (expected 2))"
    )


def test_versions_that_agree() -> None:
    assert [agree(2, other) for other in (1, 2, 3, 4)] == [1, 2, 2, None]
    assert [lowest_spoken(version) for version in (1, 2, 3)] == [1, 1, 2]


# --- a later version says more ------------------------------------------------------------------------------------------------


def changed_kind(monkeypatch: pytest.MonkeyPatch, kind: type, **changes: object) -> None:
    kinds = [replace(one, **changes) if one.message is kind else one for one in table.KINDS]  # type: ignore[arg-type]
    monkeypatch.setattr(table, "KINDS", tuple(kinds))


def test_a_new_kind_is_not_said_to_an_old_node(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_kind(monkeypatch, m.RegisterIndex, since=2)
    index = m.RegisterIndex(v1.BOOTS, v1.BOOTS & 7, True)
    with pytest.raises(LocalProtocolError, match="RegisterIndex exists since protocol version 2, the link speaks 1"):
        wire.encode(m.Envelope(1, 2, version=1), index)
    with pytest.raises(RemoteProtocolError, match="unknown message type 13 in protocol version 1"):
        wire.decode([memoryview(frame) for frame in frames_of("RegisterIndex")])
    for version in (1, 2):
        cluster, first, _ = pair(2, version)
        assert first.machine is not None
        core = first.machine._core
        core.effects = []
        core.send(core.links["eu1"], index)
        assert len(core.effects) == core.counters.messages_unspoken ^ 1 == version - 1
        del cluster


def test_new_fields_are_left_out_for_an_old_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last field of an acknowledgement had come with version 2, and meant 99 before."""
    changed_kind(monkeypatch, m.Ack, added=((2, 99),))
    for version, expected in ((1, m.Ack(3, 99)), (2, m.Ack(3, 17))):
        frames = wire.encode(m.Envelope(1, 2, version=version), m.Ack(3, 17))
        assert wire.decode([memoryview(bytes(frame)) for frame in frames])[1] == expected


def test_a_batch_of_another_shape_is_encoded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_kind(monkeypatch, m.Batch, changed=(2,))
    batch = wire.seal(v1.MESSAGES["Batch"])  # type: ignore[arg-type]
    old, new = (wire.encode(m.Envelope(1, 2, version=version), batch) for version in (1, 2))
    assert new[1] is batch.body[0]
    assert old[1] is not batch.body[0]


def test_a_record_is_told_in_the_shape_in_which_it_was_heard() -> None:
    """`holds` came with version 2: what a node of version 1 passes on lacks it, and the full record replaces that."""
    holds = (m.Holding(5, 4, (1, 3)),)
    full = m.MemberRecord("us1", 5, 1, "us", "serve", "virtual://us1", 1, version=first_record_version(2), holds=holds)

    def over(version: int, record: m.MemberRecord) -> m.MemberRecord:
        frames = wire.encode(m.Envelope(1, 2, version=version), m.MemberNews((record,)))
        message = wire.decode([memoryview(bytes(frame)) for frame in frames])[1]
        assert isinstance(message, m.MemberNews)
        return message.members[0]

    heard = over(1, full)
    assert (heard.told, heard.holds, over(2, full).told) == (1, (), 2)
    assert over(2, heard).told == 1, "a guess was passed on as a fact"
    register = Membership(m.MemberRecord("eu1", 6, 1, "eu", "serve", "virtual://eu1", 1))
    assert register.learn(heard, 0)
    assert not register.learn(heard, 0)
    assert register.learn(over(2, full), 0), "the full record is news"
    assert register.members["us1"].record.holds == holds
    assert not register.learn(heard, 0)
    assert register.members["us1"].record.holds == holds


# --- rolling upgrade ----------------------------------------------------------------------------------------------------------


def listen(cluster: VirtualCluster, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The pairs (version of the receiver, version of a message that was sent to it) of all messages from here on."""
    heard: set[tuple[int, int]] = set()
    original = cluster.post.schedule

    def schedule(arrival_ms: int, sender: VirtualNode, target: VirtualNode, envelope: m.Envelope, shared: Any) -> None:
        assert target.machine is not None
        heard.add((target.machine._core.options.protocol_version, envelope.version))
        original(arrival_ms, sender, target, envelope, shared)

    monkeypatch.setattr(cluster.post, "schedule", schedule)
    return heard


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cluster_is_upgraded_node_by_node(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on, messages get lost, and every node restarts once, in an order of the seed; every third without its memory."""
    cluster = VirtualCluster(seed, FAULTS)
    heard = listen(cluster, monkeypatch)
    for region, names in REGIONS.items():
        for name in names:
            seeds = [] if name == "t1" else ["t1"]
            cluster.add(name, region, "train" if region == "train" else "serve", seeds, FIRST_VERSION)
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes)), "the old cluster never formed"
    watch = Watch(cluster)
    order = random.Random(seed).sample(list(cluster.nodes), len(cluster.nodes))
    step = 0
    for place, name in enumerate(order):
        for phase in range(20):
            step += 1
            if phase == 5:
                cluster.crash(name)
            if phase == 10:
                cluster.nodes[name].protocol_version = PROTOCOL_VERSION
                cluster.restart(name, keep_state=place % 3 != 2)
            if cluster.nodes["t1"].machine is not None:
                cluster.publish("t1", "item" if step % 3 else "user", [step % 40, (step * 7) % 40], float(step))
            cluster.run(100)
            assert watch.check() == "", f"seed {seed}, {cluster.now_ms} ms"
        cluster.run(3_000)
    cluster.options = CALM
    at_rest(cluster)
    assert watch.check_converged() == ""
    assert {(1, 1), (2, 1), (2, 2)} <= heard
    assert (1, 2) not in heard, "a node was sent a version that it does not speak"
    assert not any(node.rejected or node.fatal for node in cluster.nodes.values())

    def all_know() -> bool:
        return all(
            node.machine is not None and node.machine._core.membership.protocol_min(cluster.now_ms) == PROTOCOL_VERSION
            for node in cluster.nodes.values()
        )

    assert cluster.run_until(all_know, 20_000), "somebody takes a member for old"


def test_versions_are_known_of_members_that_were_only_heard_of() -> None:
    """Two new nodes that know each other by the gossip of an old one only."""
    cluster = VirtualCluster(3, NetworkOptions())
    cluster.add("t1", "train", "train", protocol_version=1)
    cluster.cut = {("eu1", "us1"), ("us1", "eu1")}
    for name, region in (("eu1", "eu"), ("us1", "us")):
        cluster.add(name, region, seeds=["t1"])
    cluster.run(5_000)
    for name, other in (("eu1", "us1"), ("us1", "eu1")):
        machine = cluster.nodes[name].machine
        assert machine is not None
        assert machine._core.membership.members[other].record.protocol == 2
        assert machine._core.membership.protocol_min(cluster.now_ms) == 1
    assert check_converged(cluster) == ""
