"""Scenarios of expulsion and retirement: who is gone, what is left of him, and what happens when he comes back (R13)."""

from collections.abc import Callable
from unittest import mock

from p2p import messages as m
from p2p.link.links import Link
from p2p.members import membership
from p2p.members.membership import SILENCE_MS_MAX
from p2p.pulling.pull import Pull
from p2p.stamps import writer_of
from sim_cluster.checkers import Watch, contents
from sim_cluster.history import still_held
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, FAULTS, REGIONS, at_rest, form
from tests.p2p.writer_chaos import caught_up, formed, writes

SERVING = ("eu1", "eu2", "us1", "us2", "us3")


def two_trainers(seed: int) -> VirtualCluster:
    """The usual six nodes and a second training node, which have both written."""
    cluster = form(seed)
    cluster.add("t2", "eu", "train", ["t1"])
    formed(cluster)
    for name in ("t1", "t2"):
        writes(cluster, name)
    cluster.publish("t2", "item", range(200, 220), 1.0)  # and nobody else writes these
    at_rest(cluster)
    cluster.run(1_000)
    return cluster


def writer_at(cluster: VirtualCluster, name: str) -> tuple[int, int]:
    """(id, nonce) under which a node writes."""
    identity = cluster.nodes[name].store.models["ctr"].writer
    assert identity is not None
    return identity.writer, identity.nonce


def isolate(cluster: VirtualCluster, name: str) -> None:
    """Nothing passes between a node and the others."""
    others = [other for other in cluster.nodes if other != name]
    cluster.cut |= {(name, other) for other in others} | {(other, name) for other in others}


def expel(cluster: VirtualCluster, name: str, at: str) -> None:
    """The operator expels a node; what nobody else holds of it is given up."""
    reply = cluster.request(at, lambda number: m.ExpelRequested(number, name))
    assert isinstance(reply, m.Expelled), f"seed {cluster.seed}: {reply}"
    give_up(cluster, name)


def give_up(cluster: VirtualCluster, name: str) -> None:
    """What only this node holds counts as lost from here on."""
    others = [node.store for node in cluster.nodes.values() if node.name != name]
    cluster.history = still_held(cluster.history, others, cluster.models)


def stages(cluster: VirtualCluster, writer: int, nonce: int) -> dict[str, int]:
    """How far each live node thinks that the retirement of a writer has come."""
    found = {}
    for node in cluster.nodes.values():
        if node.machine is not None:
            retired = node.machine._core.record.retired.get((cluster.model.id, writer, nonce))
            found[node.name] = -1 if retired is None else retired.stage
    return found


def retired_everywhere(cluster: VirtualCluster, writer: int, nonce: int, limit_ms: int = 60_000) -> None:
    """Wait until everybody is done with a writer; then its entry has left all vectors, and its id is free."""

    def done() -> bool:
        return set(stages(cluster, writer, nonce).values()) == {m.DONE}

    assert cluster.run_until(done, limit_ms), f"seed {cluster.seed}: stages {stages(cluster, writer, nonce)}"

    def left() -> bool:
        machines = [node.machine for node in cluster.nodes.values() if node.machine is not None]
        machines = [
            one for one in machines if not one._core.writers.nonce_of(cluster.model.id, writer)
        ]  # else it is used again
        vectors = [machine._core.keyspaces[cluster.model.id].knowledge.writers for machine in machines]
        return not any(writer in vector for vector in vectors)

    assert cluster.run_until(left, limit_ms), f"seed {cluster.seed}: the entry stays in a vector"
    floors = set()
    for node in cluster.nodes.values():
        if node.machine is not None:
            floors.add(node.machine._core.record.retired[cluster.model.id, writer, nonce].floor.tobytes())
            assert node.machine._core.writers.nonce_of(cluster.model.id, writer) != nonce, "the id is not free"
    assert len(floors) == 1, f"seed {cluster.seed}: nodes disagree on what was left of the writer"


def a_dead_writer_is_retired(seed: int) -> None:
    """It died in mid-push, with its last step at one region only, as strays; the coordinator may die on the way, too.

    No heartbeat starts a pull meanwhile: retirement has to find by itself what is left of the writer.
    """
    cluster = two_trainers(seed)
    watch = Watch(cluster)
    writer, nonce = writer_at(cluster, "t2")
    cluster.options = NetworkOptions(loss_probability=1.0)
    cluster.publish("t2", "item", [210], 2.0)
    cluster.run(10)  # else the next step would wait for others, to share a message with them
    cluster.options = CALM
    cluster.cut |= {("t2", name) for name in (*REGIONS["eu"], "t1")} | {(name, "eu1") for name in REGIONS["us"]}
    cluster.cut |= {(one, other) for one in REGIONS["us"] for other in (*REGIONS["eu"], "t1")}
    cluster.publish("t2", "item", [210, 211], 3.0)
    cluster.run(12)
    cluster.crash("t2")
    held = [contents(cluster.nodes[name].store, "ctr") for name in ("eu1", "us1")]
    assert held[0] != held[1], "the scenario did not leave strays"
    cluster.options = FAULTS
    with mock.patch.object(Pull, "on_summary"):
        cluster.run(SILENCE_MS_MAX + 3_000)
        expel(cluster, "t2", "eu2")
        cluster.run(1_000)
        cluster.cut = set()
        for step in range(40):
            cluster.publish("t1", "item", [step % 30], float(step))
            cluster.run(200)
            assert watch.check() == "", f"seed {seed}, {cluster.now_ms} ms"
            if step == 5 + seed and seed % 2:
                cluster.crash("eu1")  # it coordinates
            if step == 30 and seed % 2:
                cluster.restart("eu1", keep_state=seed % 4 == 1)
        cluster.options = CALM
        del cluster.nodes["t2"]
        if seed % 2 == 0:
            retired_everywhere(cluster, writer, nonce)
    retired_everywhere(cluster, writer, nonce)
    at_rest(cluster)
    no_strays(cluster)
    cluster.add("ap1", "ap", seeds=["us1"])  # a newcomer gets what it wrote, though no vector names it
    cluster.run(3_000)
    at_rest(cluster)
    retired_everywhere(cluster, writer, nonce)
    assert watch.check_converged() == ""


def no_strays(cluster: VirtualCluster) -> None:
    """No node holds a row above its vector."""
    for node in cluster.nodes.values():
        for replica in node.store.models.values():
            assert replica.stray_digest() == 0, f"seed {cluster.seed}: {node.name} holds rows above its vector"


def an_expelled_writer_returns(seed: int) -> None:
    """It was cut off and wrote on; it comes back, in its old life or a new one on its old memory, and drops its tail."""
    cluster = two_trainers(seed)
    writer, nonce = writer_at(cluster, "t2")
    isolate(cluster, "t2")
    assert cluster.publish("t2", "item", [100, 101], 2.0)
    cluster.run(SILENCE_MS_MAX + 2_000)
    assert cluster.publish("t2", "item", [1, 102], 3.0)
    expel(cluster, "t2", "us2")
    cluster.run(8_000)
    if seed % 2:
        cluster.crash("t2")
        cluster.restart("t2")
    cluster.cut = set()
    assert cluster.run_until(lambda: any(note.name == "started_over" for note in cluster.nodes["t2"].notes), 30_000), (
        f"seed {seed}: it goes on with what it knew"
    )
    fields = dict(next(note for note in cluster.nodes["t2"].notes if note.name == "started_over").fields)
    assert "expelled" in str(fields["reason"])
    assert fields["rows_lost"] == (4 if seed % 2 == 0 else fields["rows_lost"])
    assert cluster.run_until(lambda: caught_up(cluster, "t2"), 30_000)
    writes(cluster, "t2")
    assert writer_at(cluster, "t2")[1] != nonce
    retired_everywhere(cluster, writer, nonce)
    at_rest(cluster)
    assert_tail_is_gone(cluster, (100, 101, 102))
    writes(cluster, "t1")
    at_rest(cluster)


def assert_tail_is_gone(cluster: VirtualCluster, keys: tuple[int, ...]) -> None:
    item = cluster.model.tables["item"].id
    for node in cluster.nodes.values():
        tail = {(item, key) for key in keys} & contents(node.store, "ctr").keys()
        assert not tail, f"seed {cluster.seed}: {node.name} holds rows of an expelled writer: {tail}"


def a_late_batch_of_a_retired_writer_arrives(seed: int) -> None:
    """It was on its way for minutes; nobody takes it, in whatever stage the retirement is."""
    cluster = two_trainers(seed)
    writer, nonce = writer_at(cluster, "t2")
    isolate(cluster, "t2")
    late: list[m.Batch] = []
    original = cluster.post.transmit

    def transmit(sender: object, address: str, envelope: m.Envelope, message: m.Message) -> bool:
        if isinstance(message, m.Batch) and message.writer == writer and message.columns:
            late.append(message)
        return original(sender, address, envelope, message)  # type: ignore[arg-type]

    with mock.patch.object(cluster.post, "transmit", transmit):
        assert cluster.publish("t2", "item", [100], 2.0)
    assert late, "the scenario caught no batch"
    cluster.crash("t2")
    cluster.run(SILENCE_MS_MAX + 2_000)
    expel(cluster, "t2", "us2")
    del cluster.nodes["t2"]
    for round_ in range(40):
        node = cluster.nodes[SERVING[round_ % len(SERVING)]]
        assert node.machine is not None
        link: Link | None = node.machine._core.link("t1")
        if link is not None and stages(cluster, writer, nonce)[node.name] >= 0:
            envelope = m.Envelope(link.boot, link.own_boot, link.session_in + 1, 1, version=2)
            cluster.feed(node, node.machine, m.MessageReceived(envelope, late[0]))
        cluster.run(250)
    retired_everywhere(cluster, writer, nonce)
    at_rest(cluster)
    assert_tail_is_gone(cluster, (100,))


def a_node_returns_with_more_than_was_left(seed: int) -> None:
    """A serving node alone had got the writer's last steps; it left on purpose, so that nobody waits for it."""
    cluster = two_trainers(seed)
    writer, nonce = last_steps_at_one_node(cluster)
    cluster.cut = set()
    cluster.leave("us3")
    cluster.run(8_000)
    expel(cluster, "t2", "us2")
    del cluster.nodes["t2"]
    give_up(cluster, "us3")
    retired_everywhere(cluster, writer, nonce)
    cluster.restart("us3")
    assert cluster.run_until(lambda: any(note.name == "started_over" for note in cluster.nodes["us3"].notes), 30_000), (
        f"seed {seed}: it keeps more than was left of the writer"
    )
    retired_everywhere(cluster, writer, nonce)
    at_rest(cluster)
    assert_tail_is_gone(cluster, tuple(range(100, 112)))


def last_steps_at_one_node(cluster: VirtualCluster) -> tuple[int, int]:
    """The second trainer dies, and only us3, which is cut off, has its last steps; its writer id and nonce."""
    writer, nonce = writer_at(cluster, "t2")
    for name in ("t2", "us3"):
        isolate(cluster, name)
    cluster.cut -= {("t2", "us3"), ("us3", "t2")}
    for step in range(12):
        assert cluster.publish("t2", "item", [100 + step, 1], 2.0 + step)
        cluster.run(1_000)
    cluster.crash("t2")
    item = cluster.model.tables["item"].id
    assert any((item, 100 + step) in contents(cluster.nodes["us3"].store, "ctr") for step in range(12)), (
        "the scenario left us3 nothing that the others lack"
    )
    return writer, nonce


def who_is_away_is_waited_for(seed: int) -> None:
    """It died with what nobody else has of a writer, and was silent for so long that it is called no more; the others restarted
    meanwhile, and know of it from their disks only. What it brings, when it is back, is a part of what was left.
    """
    with mock.patch.object(membership, "FORGET_MS", 20_000):
        cluster = two_trainers(seed)
        writer, nonce = last_steps_at_one_node(cluster)
        held = contents(cluster.nodes["us3"].store, "ctr").keys()
        cluster.crash("us3")
        cluster.cut = set()
        cluster.run(8_000)
        for name in ("t1", *SERVING):
            if name != "us3" and seed % 2:
                cluster.crash(name)
                cluster.restart(name)
                cluster.run(2_000)
        expel(cluster, "t2", "us2")
        del cluster.nodes["t2"]
        cluster.run(30_000)
        assert m.FLOORED not in stages(cluster, writer, nonce).values(), f"seed {seed}: not all were asked what they have"
        cluster.restart("us3")
        retired_everywhere(cluster, writer, nonce)
        at_rest(cluster)
        for node in cluster.nodes.values():
            assert held <= contents(node.store, "ctr").keys(), f"seed {seed}: {node.name} lacks what only us3 had"


def an_id_is_used_again(seed: int) -> None:
    """When all are done with its first owner; the new one's steps are taken everywhere, the old one's nowhere."""
    cluster = two_trainers(seed)
    writer, nonce = writer_at(cluster, "t2")
    isolate(cluster, "t2")
    cluster.run(SILENCE_MS_MAX + 2_000)
    expel(cluster, "t2", "us2")
    cluster.crash("t2")
    t2 = cluster.nodes.pop("t2")
    retired_everywhere(cluster, writer, nonce)
    cluster.nodes["t2"] = t2
    cluster.cut = set()
    cluster.restart("t2", keep_state=False)
    cluster.run(5_000)
    stamp = writes(cluster, "t2")
    assert writer_of(stamp) == writer, f"seed {seed}: the scenario used another id"
    cluster.publish("t2", "item", range(30), 9.0)
    at_rest(cluster)
    no_strays(cluster)
    cluster.add("ap1", "ap", seeds=["us1"])
    cluster.run(3_000)
    cluster.publish("t2", "item", range(5, 20), 10.0)
    at_rest(cluster)
    conflicts = [node.name for node in cluster.nodes.values() if any(note.name == "writer_conflict" for note in node.notes)]
    assert not conflicts, f"seed {seed}: alarms at {conflicts}"


def who_is_away_for_long_is_expelled(seed: int) -> None:
    """Without an operator, also when the others restart meanwhile; who comes back in time is not."""
    cluster = VirtualCluster(seed)
    cluster.expel_after_ms = 60_000
    for region, names in REGIONS.items():
        for name in names:
            cluster.add(name, region, "train" if region == "train" else "serve", [] if name == "t1" else ["t1"])
    cluster.add("t2", "eu", "train", ["t1"])
    formed(cluster)
    for name in ("t1", "t2"):
        writes(cluster, name)
    at_rest(cluster)
    cluster.run(2_000)
    writer, nonce = writer_at(cluster, "t2")
    cluster.crash("t2")
    cluster.crash("us3")
    cluster.run(40_000)
    for name in SERVING[:4]:
        cluster.crash(name)
        cluster.restart(name)
    cluster.restart("us3")
    cluster.run(80_000)  # the coordinator has to witness all of it in one life
    t2 = cluster.nodes.pop("t2")
    retired_everywhere(cluster, writer, nonce)
    assert not any(note.name == "started_over" for note in cluster.nodes["us3"].notes)
    cluster.nodes["t2"] = t2
    cluster.restart("t2")
    assert cluster.run_until(lambda: any(note.name == "started_over" for note in t2.notes), 30_000)
    at_rest(cluster)


SCENARIOS: tuple[Callable[[int], None], ...] = (
    a_dead_writer_is_retired,
    an_expelled_writer_returns,
    a_late_batch_of_a_retired_writer_arrives,
    a_node_returns_with_more_than_was_left,
    who_is_away_is_waited_for,
    an_id_is_used_again,
    who_is_away_for_long_is_expelled,
)
