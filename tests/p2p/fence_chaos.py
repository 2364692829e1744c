"""Scenarios of fences: a model's writers are stopped while all else goes wrong, and nothing acknowledged is lost (R13)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from unittest import mock

import numpy as np

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.identity import ledger
from p2p.identity.ledger import NodeRecord
from p2p.messages.fences import CLOSED
from p2p.pushing import push
from p2p.pushing.groups import LINGER_MS
from p2p.replica import RowColumns
from p2p.stamps import writer_of
from sim_cluster.checkers import Watch
from sim_cluster.fences import check_fences, lifted_everywhere
from sim_cluster.history import Write
from sim_cluster.network import NetworkOptions
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, REGIONS, at_rest, check_claims
from tests.p2p.retirement_chaos import give_up, isolate, two_trainers, writer_at
from tests.p2p.writer_chaos import caught_up, formed, record_of, writes

LOSSY = NetworkOptions(1, 30, 40, loss_probability=0.1, repeat_probability=0.1, reorder_probability=0.2)
TRAINERS = ("t1", "t2")


def ask(cluster: VirtualCluster, at: str, epoch: int = 0, expel_after_ms: int | None = None) -> int:
    """Fence the model at a node; the request's number."""
    family = cluster.model.id
    return cluster.ask(at, lambda number: m.FenceRequested(number, family, epoch, "a test", expel_after_ms))


def answer(cluster: VirtualCluster, at: str, request: int) -> m.Reply | None:
    """What became of a request so far."""
    return cluster.nodes[at].replies.get(request)


def closed(cluster: VirtualCluster, at: str, request: int, limit_ms: int = 30_000, step_ms: int = 10) -> m.Fenced:
    """Wait until the fence is closed; nothing above it may be anywhere from then on."""

    def fenced() -> bool:
        assert check_fences(cluster) == "", f"seed {cluster.seed}, {cluster.now_ms} ms: {check_fences(cluster)}"
        return isinstance(answer(cluster, at, request), m.Fenced | m.Refused)

    assert cluster.run_until(fenced, limit_ms, step_ms), f"seed {cluster.seed}: {answer(cluster, at, request)}"
    reply = answer(cluster, at, request)
    assert isinstance(reply, m.Fenced), f"seed {cluster.seed}: {reply}"
    return reply


def fence(cluster: VirtualCluster, at: str, epoch: int = 0, **options: int) -> m.Fenced:
    """Fence the model, and wait until that is done."""
    return closed(cluster, at, ask(cluster, at, epoch, **options))


def lift(cluster: VirtualCluster, at: str, epoch: int) -> None:
    """Let everybody write again, and wait until all know."""
    family = cluster.model.id
    reply = cluster.request(at, lambda number: m.LiftRequested(number, family, epoch))
    assert isinstance(reply, m.Lifted), f"seed {cluster.seed}: {reply}"
    assert cluster.run_until(lambda: lifted_everywhere(cluster) == "", 30_000), lifted_everywhere(cluster)


def restore(cluster: VirtualCluster, at: str, keys: Sequence[int], value: float, epoch: int) -> int:
    """Write rows back behind the fence; the stamp, 0 where it was refused."""
    spec = cluster.model.tables["item"]
    rows = encode(spec.codec, np.full((len(keys), spec.dim), value, np.float32))
    columns = (RowColumns(spec.id, np.array(keys, np.uint64), rows),)
    request = cluster.ask(at, lambda number: m.PublishRequested(number, cluster.model.id, columns, through_fence=epoch))
    reply = answer(cluster, at, request)
    if not isinstance(reply, m.Published):
        return 0
    cluster.history += [Write("item", key, reply.stamp, False, value, cluster.model.name) for key in keys]
    return reply.stamp


def restores(cluster: VirtualCluster, at: str, keys: Sequence[int], value: float, epoch: int) -> int:
    """The same, as soon as the node knows that the fence is closed."""
    stamps: list[int] = []
    wrote = cluster.run_until(lambda: bool(stamps.append(restore(cluster, at, keys, value, epoch)) or stamps[-1]), 10_000)
    assert wrote, f"seed {cluster.seed}: {at} cannot restore"
    return stamps[-1]


def fenced_at(cluster: VirtualCluster) -> dict[str, int]:
    """The stage of the last fence, as each live node knows it; -1: it knows of none."""
    found = {}
    for node in cluster.nodes.values():
        if node.machine is not None:
            known = node.machine.fence_of(cluster.model.id)
            found[node.name] = -1 if known is None else known.stage
    return found


def try_to_write(cluster: VirtualCluster, step: int) -> None:
    """Each training node that runs publishes something, or is refused."""
    for place, name in enumerate(TRAINERS):
        if name in cluster.nodes and cluster.nodes[name].machine is not None:
            cluster.publish(
                name, "item" if step % 3 else "user", [(step * 7 + place * k) % 40 for k in range(3)], step + place / 10
            )


def resumed(cluster: VirtualCluster, before: dict[str, tuple[int, int]]) -> None:
    """Everybody writes again, under another nonce than before, and in the end all hold the same."""
    for name, (_, nonce) in before.items():
        writes(cluster, name)
        assert writer_at(cluster, name)[1] != nonce, f"seed {cluster.seed}: {name} goes on under the id that was stopped"
    at_rest(cluster)
    check_claims(cluster)


def writers_are_stopped_in_mid_stream(seed: int) -> None:
    """On a bad network two training nodes write, often faster than messages leave; a serving node fences, and restores."""
    cluster = two_trainers(seed)
    watch, before = Watch(cluster), {name: writer_at(cluster, name) for name in TRAINERS}
    cluster.options = LOSSY
    for step in range(20):
        try_to_write(cluster, step)
        cluster.run(LINGER_MS // 2)
    acknowledged = len(cluster.history)
    at = ("us2", "eu1", "t1")[seed % 3]
    request = ask(cluster, at)
    for step in range(20, 30):
        try_to_write(cluster, step)
        cluster.run(7)
        assert check_fences(cluster) == "", check_fences(cluster)
    done = closed(cluster, at, request)
    assert len(cluster.history) >= acknowledged
    refused = len(cluster.history)
    try_to_write(cluster, 31)
    assert len(cluster.history) == refused, f"seed {seed}: a step was stored behind the fence"
    for step in range(5):
        assert restores(cluster, "t1", range(step, step + 6), -1.0 - step, done.epoch) > done.stamp
        cluster.run(100)
        assert watch.check() == "", f"seed {seed}, {cluster.now_ms} ms"
        assert check_fences(cluster) == "", check_fences(cluster)
    cluster.options = CALM
    at_rest(cluster)
    assert watch.check_converged() == ""
    lift(cluster, "us3", done.epoch)
    resumed(cluster, before)
    assert watch.check_converged() == ""


def stages_at(cluster: VirtualCluster) -> set[int]:
    """How far the writers are that were stopped, as any node knows it. The fence does not wait for the last stage."""
    return {one.stage for node in cluster.nodes.values() for one in NodeRecord.load(node.ledger).retired.values()}


def nothing_acknowledged_is_lost(seed: int) -> None:
    """Push loses everything of the last steps of both, and one region has heard of none: all of them are left, all the same."""
    cluster = two_trainers(seed)
    cut = {("t1", name) for name in REGIONS["us"]} | {("t2", name) for name in (*REGIONS["eu"], "t1")}
    cluster.cut |= cut
    cluster.options = NetworkOptions(loss_probability=0.6)
    for step in range(12):
        try_to_write(cluster, step)
        cluster.run(1 + step % 9)
    try_to_write(cluster, 12)  # these are held, to be sent with others, in the moment in which the fence comes
    try_to_write(cluster, 13)
    due = {(write.table, write.key): write.stamp for write in cluster.history}
    cluster.cut, cluster.options = set(), CALM
    done = fence(cluster, TRAINERS[seed % 2])
    assert stages_at(cluster) <= {m.FLOORED, m.DONE}, f"seed {seed}: closed before it is known what is left of each writer"
    for node in cluster.nodes.values():
        for (table, key), stamp in due.items():
            replica = node.store.models["ctr"]
            rows = replica.read_keys(cluster.model.tables[table].id, np.array([key], np.uint64))
            assert rows.stamps is not None
            assert rows.stamps.tolist() == [stamp], f"seed {seed}: {node.name} lost {table} {key}"
    assert cluster.run_until(lambda: stages_at(cluster) == {m.DONE}, 5_000), f"seed {seed}: {stages_at(cluster)}"
    lift(cluster, "eu2", done.epoch)
    at_rest(cluster)


def held_steps_do_not_leave(seed: int) -> None:
    """A training node that hears of a fence while some of its steps wait to be sent with others sends none of them."""
    cluster = two_trainers(seed)
    cluster.publish("t1", "item", [1], 1.0)
    stamps = {cluster.publish("t1", "item", [2 + seed], 1.0), cluster.publish("t1", "user", [3], 1.0)}
    assert 0 not in stamps
    sent: list[m.Batch] = []
    original = cluster.post.transmit

    def transmit(sender: VirtualNode, address: str, envelope: m.Envelope, message: m.Message) -> bool:
        if isinstance(message, m.Batch) and message.origin == sender.name == "t1" and message.stamp in stamps:
            sent.append(message)
        return original(sender, address, envelope, message)

    with mock.patch.object(cluster.post, "transmit", transmit):
        done = fence(cluster, "t1" if seed % 2 else "us1")
        cluster.run(500)
    # It may have come to hear of it when they had left, but not where it asked for it itself.
    assert not sent or not seed % 2, f"seed {seed}: a step left behind the fence"
    lift(cluster, "us1", done.epoch)
    at_rest(cluster)


def whoever_coordinates_dies(seed: int) -> None:
    """Who asked for the fence, or who brings it about, is killed in the middle of something, and again while it is restored."""
    cluster = two_trainers(seed)
    watch, before = Watch(cluster), {name: writer_at(cluster, name) for name in TRAINERS}
    victim, at = ("eu1", "us2") if seed % 2 else ("us1", "us1")
    for step in range(5):
        try_to_write(cluster, step)
        cluster.run(3)
    request = ask(cluster, at, epoch=7)
    cluster.kill_within(victim, 1 + seed * 5 % 37)
    for step in range(5, 15):
        try_to_write(cluster, step)
        cluster.run(20)
        assert check_fences(cluster) == "", check_fences(cluster)
        assert watch.check() == ""
    if cluster.nodes[victim].machine is not None:
        cluster.crash(victim)
    cluster.run(1_000)
    again = ask(cluster, "eu2", epoch=7)
    cluster.restart(victim, keep_state=seed % 3 != 0)
    closed(cluster, "eu2", again)
    del request
    restore(cluster, "t2", range(10), -1.0, 7)
    cluster.kill_within("t2", 1 + seed * 3 % 20)
    for step in range(10):
        if cluster.nodes["t2"].machine is not None:
            restore(cluster, "t2", range(step, step + 4), -2.0, 7)
        cluster.run(100)
        assert check_fences(cluster) == "", check_fences(cluster)
    restores(cluster, "t1", range(12), -3.0, 7)  # somebody else goes on
    if cluster.nodes["t2"].machine is not None:
        cluster.crash("t2")
    cluster.restart("t2", keep_state=seed % 2 == 0)
    cluster.run(3_000)
    assert cluster.run_until(lambda: watch.check_converged() == "", 30_000), watch.check_converged()
    assert check_fences(cluster) == "", check_fences(cluster)
    lift(cluster, "t2", 7)
    resumed(cluster, before)


def a_training_node_restarts(seed: int) -> None:
    """With its memory or without; it does not go on under its id, whether it heard of the fence before or after."""
    cluster = two_trainers(seed)
    before = {name: writer_at(cluster, name) for name in TRAINERS}
    cut = seed % 2 == 0
    if cut:
        isolate(cluster, "t2")  # it writes on until it hears of the fence
    request = ask(cluster, "us1")
    cluster.run(20)
    try_to_write(cluster, 3)
    cluster.run(2_000)
    cluster.crash("t2")
    cluster.run(500)
    cluster.restart("t2", keep_state=seed % 4 < 2)
    try_to_write(cluster, 4)
    cluster.run(30)
    cluster.cut = set()
    done = closed(cluster, "us1", request)
    count = len(cluster.history)
    for step in range(5):
        try_to_write(cluster, step)
        cluster.crash("t2")
        cluster.restart("t2")
        try_to_write(cluster, step)
        cluster.run(300)
        assert check_fences(cluster) == "", f"seed {seed}: {check_fences(cluster)}"
    assert len(cluster.history) == count, f"seed {seed}: a step was stored behind the fence"
    formed(cluster)
    lift(cluster, "us1", done.epoch)
    resumed(cluster, before)


def the_whole_cluster_restarts(seed: int) -> None:
    """Everybody is killed while the fence closes or stands, and finds it in the ledger: nobody writes until it is lifted."""
    cluster = two_trainers(seed)
    before = {name: writer_at(cluster, name) for name in TRAINERS}
    ask(cluster, "us1", epoch=4)
    cluster.run((5, 25, 2_000)[seed % 3])
    for name in cluster.nodes:
        cluster.crash(name)
    cluster.run(1_000)
    for name in cluster.nodes:
        cluster.restart(name)
    formed(cluster)
    count = len(cluster.history)
    try_to_write(cluster, 1)
    assert len(cluster.history) == count, f"seed {seed}: a step was stored behind the fence"
    done = fence(cluster, "eu2", epoch=4)
    restores(cluster, "t2", range(5), -1.0, done.epoch)
    lift(cluster, "us1", done.epoch)
    resumed(cluster, before)


def nodes_join_in_the_middle(seed: int) -> None:
    """A serving node and a training node come while the fence closes, and others while it stands."""
    cluster = two_trainers(seed)
    cluster.options = LOSSY
    request = ask(cluster, "us1")
    cluster.run(1 + seed % 40)
    cluster.add("ap1", "ap", seeds=["us3"])
    cluster.add("t3", "ap", "train", ["us3"])
    done = closed(cluster, "us1", request)
    cluster.add("ap2", "ap", seeds=["eu1"])
    cluster.add("t4", "eu", "train", ["eu2"])
    cluster.options = CALM
    for step in range(30):
        for name in ("t3", "t4"):
            cluster.publish(name, "item", [step], 1.0)
        cluster.run(100)
        assert check_fences(cluster) == "", check_fences(cluster)
    restores(cluster, "t4", [1, 2], -1.0, done.epoch)
    formed(cluster)
    at_rest(cluster)
    lift(cluster, "ap2", done.epoch)
    resumed(cluster, dict.fromkeys(("t1", "t2", "t3", "t4"), (0, 0)))


def who_is_silent_is_named_and_let_go(seed: int) -> None:
    """A member is cut off, and writes on; the fence waits and names it. Asked to, it lets go of it, which starts over."""
    cluster = two_trainers(seed)
    isolate(cluster, "t2")
    cluster.publish("t2", "item", [100, 101], 1.0)
    request = ask(cluster, "us1", epoch=3)
    cluster.run(15_000)
    waits = answer(cluster, "us1", request)
    assert isinstance(waits, m.FenceWaits), f"seed {seed}: {waits}"
    assert waits.nodes == ("t2",), f"seed {seed}: {waits}"
    assert CLOSED not in fenced_at(cluster).values(), f"seed {seed}: closed without a report of everybody"
    cluster.publish("t2", "item", [102], 1.0)
    if seed % 2:  # it comes back in time, and all that it wrote is left
        cluster.cut = set()
        closed(cluster, "us1", request)
        assert {write.key for write in cluster.history} >= {100, 101, 102}
    else:
        ask(cluster, "us2", epoch=3, expel_after_ms=1_000)
        assert cluster.run_until(lambda: bool(expelled(cluster, "us2")), 30_000), f"seed {seed}: nobody was let go"
        cluster.note_expelled("t2")
        closed(cluster, "us1", request)
        cluster.cut = set()
        assert cluster.run_until(lambda: started_over(cluster, "t2"), 30_000), f"seed {seed}: it goes on with what it knew"
    assert cluster.run_until(lambda: caught_up(cluster, "t2"), 30_000)
    assert check_fences(cluster) == "", check_fences(cluster)
    lift(cluster, "us1", 3)
    resumed(cluster, {"t1": (0, 0), "t2": (0, 0)})


def expelled(cluster: VirtualCluster, at: str) -> list[m.Note]:
    """Whom a node has let go of."""
    return [note for note in cluster.nodes[at].notes if note.name == "node_expelled"]


def started_over(cluster: VirtualCluster, name: str) -> bool:
    """Whether a node has dropped what it held."""
    return any(note.name == "started_over" for note in cluster.nodes[name].notes)


def two_fence_at_once(seed: int) -> None:
    """On two sides of a split, with equal epochs or different ones: the larger wins everywhere, and the other is told so."""
    cluster = two_trainers(seed)
    cluster.cut = {(a, b) for a in REGIONS["us"] for b in (*REGIONS["eu"], *TRAINERS)}
    cluster.cut |= {(b, a) for a, b in cluster.cut}
    first, second = ask(cluster, "eu1", epoch=5), ask(cluster, "us1", epoch=5 + seed % 2)
    try_to_write(cluster, 1)
    cluster.run(1_000)
    assert CLOSED not in fenced_at(cluster).values()
    cluster.cut = set()
    closed(cluster, "us1", second)
    if seed % 2:
        reply = answer(cluster, "eu1", first)
        assert isinstance(reply, m.Refused), reply
        assert "epoch 6 has taken its place" in reply.reason
    else:
        closed(cluster, "eu1", first)
    lift(cluster, "t1", 5 + seed % 2)
    resumed(cluster, {"t1": (0, 0), "t2": (0, 0)})


def a_later_fence_stops_who_restores(seed: int) -> None:
    """A rollback is begun anew while the first one still writes; both their rows are kept, and the first writes no more."""
    cluster = two_trainers(seed)
    cluster.options = LOSSY
    first = fence(cluster, "eu1")
    restores(cluster, "t1", range(10), -1.0, first.epoch)
    second = ask(cluster, "us1")
    cluster.run(40)
    restore(cluster, "t1", range(5), -2.0, first.epoch)
    done = closed(cluster, "us1", second)
    assert done.epoch > first.epoch
    assert not restore(cluster, "t1", range(5), -3.0, first.epoch), f"seed {seed}: a restorer goes on behind a later fence"
    restores(cluster, "t2", range(5), -4.0, done.epoch)
    cluster.options = CALM
    at_rest(cluster)
    lift(cluster, "t1", done.epoch)
    resumed(cluster, {"t1": (0, 0), "t2": (0, 0)})


def who_was_away_for_all_of_it_returns(seed: int) -> None:
    """It left on purpose, so that nobody waits for it. With what all others have it goes on; with more, it starts over: of a
    writer that all know, or of one that nobody has ever heard of.
    """
    cluster = two_trainers(seed)
    kind, away = seed % 3, "t3" if seed % 3 == 2 else "t2"
    if kind == 2:
        cluster.add("t3", "eu", "train", ["t1"])
        formed(cluster)
        cluster.run(2_000)
    with mock.patch.object(push.Push, "_forward") if kind else nullcontext():
        assert not kind or cluster.publish(away, "item", [100, 101], 2.0)
        cluster.leave(away)
    cluster.run(2_000)
    give_up(cluster, away)
    done = fence(cluster, "us1")
    restores(cluster, "t1", range(5), -1.0, done.epoch)
    if seed % 2:
        others = cluster.nodes.pop(away)
        lift(cluster, "us1", done.epoch)
        cluster.nodes[away] = others
        writes(cluster, "t1")
    cluster.restart(away)
    if kind:
        assert cluster.run_until(lambda: started_over(cluster, away), 30_000), f"seed {seed}: it keeps what only it had"
    assert cluster.run_until(lambda: caught_up(cluster, away), 30_000)
    cluster.run(3_000)
    assert check_fences(cluster) == "", f"seed {seed}: {check_fences(cluster)}"
    assert bool(kind) == started_over(cluster, away), f"seed {seed}: {away} started over, though it had nothing more"
    if not seed % 2:
        lift(cluster, "us1", done.epoch)
    resumed(cluster, dict.fromkeys(("t1", away), (0, 0)))


def a_divided_model_is_fenced(seed: int) -> None:
    """Each partition has holders of its own, and a coordinator; the model is fenced when all of them are done."""
    tables = {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}
    cluster = VirtualCluster(seed, LOSSY, ModelSpec("ctr", 8, tables, partitions=4))
    holds: dict[str, tuple[int, ...]] = {"eu1": (0, 1), "eu2": (2, 3), "us1": (1, 2), "us2": (0, 3), "us3": (0, 1, 2, 3)}
    for name, region in (
        ("t1", "train"),
        ("t2", "eu"),
        ("eu1", "eu"),
        ("eu2", "eu"),
        ("us1", "us"),
        ("us2", "us"),
        ("us3", "us"),
    ):
        role = "train" if name.startswith("t") else "serve"
        hold = {"ctr": holds[name]} if name in holds else None
        cluster.add(name, region, role, [] if name == "t1" else ["t1"], hold=hold)
    formed(cluster)
    for name in TRAINERS:
        writes(cluster, name)
    before = {name: writer_at(cluster, name) for name in TRAINERS}
    for step in range(10):
        try_to_write(cluster, step)
        cluster.run(3)
    request = ask(cluster, "us1")
    cluster.run(1 + seed)
    cluster.crash("us2")
    cluster.run(300)
    try_to_write(cluster, 11)
    cluster.restart("us2")
    done = closed(cluster, "us1", request)
    restores(cluster, "t2", range(40), -1.0, done.epoch)
    cluster.options = CALM
    at_rest(cluster)
    assert check_fences(cluster) == "", check_fences(cluster)
    lift(cluster, "eu2", done.epoch)
    resumed(cluster, before)


def the_model_is_dropped_meanwhile(seed: int) -> None:
    """Nobody waits for its fence any more, and other models are as they were."""
    other = ModelSpec("other", 4, {"item": TableSpec("item", 2)})
    cluster = VirtualCluster(seed, LOSSY if seed % 2 else CALM, more_models=[other])
    for region, names in REGIONS.items():
        for name in names:
            cluster.add(name, region, "train" if region == "train" else "serve", [] if name == "t1" else ["t1"])
    formed(cluster)
    writes(cluster, "t1")
    assert cluster.publish("t1", "item", [1], 1.0, model="other")
    isolate(cluster, "us3")  # so that it does not close
    family = other.id
    request = cluster.ask("eu1", lambda number: m.FenceRequested(number, family))
    cluster.run(200)
    assert not cluster.publish("t1", "item", [2], 1.0, model="other")
    assert cluster.publish("t1", "item", [2], 1.0), f"seed {seed}: the fence of one model stops writers of another"
    cluster.cut = set() if seed % 2 else cluster.cut
    dropping = cluster.nodes["us1"]
    dropping.store.drop_model("other", cluster.now_of(dropping).unix_ms)
    assert dropping.machine is not None
    cluster.feed(dropping, dropping.machine, m.SchemaChanged())
    cluster.run(3_000)
    assert isinstance(answer(cluster, "eu1", request), m.Refused | m.Fenced), answer(cluster, "eu1", request)
    cluster.cut = set()
    cluster.history = [write for write in cluster.history if write.model != "other"]
    del cluster.models["other"]
    cluster.run(5_000)
    writes(cluster, "t1")
    at_rest(cluster)


def clocks_differ(seed: int) -> None:
    """Epochs are no times: a fence asked for by a node whose clock is behind stops writers whose clocks are ahead."""
    cluster = two_trainers(seed)
    cluster.shift_clock("t1", 14_000)
    cluster.shift_clock("us1", -14_000)
    cluster.run(2_000)
    for step in range(10):
        try_to_write(cluster, step)
        cluster.run(10)
    done = fence(cluster, "us1")
    assert done.stamp >= max(write.stamp for write in cluster.history) >> 12 << 12
    cluster.run(500)
    stamp = restores(cluster, "t2", range(40), -1.0, done.epoch)
    assert stamp > max(write.stamp for write in cluster.history[:-40]), f"seed {seed}: what is restored is older than what was"
    at_rest(cluster)
    lift(cluster, "t1", done.epoch)
    resumed(cluster, {"t1": (0, 0), "t2": (0, 0)})


def fences_come_often(seed: int) -> None:
    """Each takes a fresh id of every writer, and of who restores; ids are used again, and blocks are not used up (R12)."""
    cluster = two_trainers(seed)
    blocks = {name: len(record_of(cluster.nodes[name]).blocks) for name in cluster.nodes}
    for epoch in range(1, 13):
        assert fence(cluster, "us1").epoch == epoch
        restores(cluster, "t1", [epoch], -1.0, epoch)
        cluster.run(300)
        lift(cluster, "us1", epoch)
        for name in TRAINERS:
            writes(cluster, name)
        cluster.run(1_000)
    at_rest(cluster)
    now = {name: len(record_of(cluster.nodes[name]).blocks) for name in cluster.nodes}
    assert sum(now.values()) >= sum(blocks.values()) - 2, f"seed {seed}: blocks of ids went from {blocks} to {now}"
    assert len({writer_of(write.stamp) for write in cluster.history}) <= 16
    assert len(record_of(cluster.nodes["eu1"]).fences) == ledger.FENCES_OF_FAMILY_MAX


SCENARIOS: tuple[Callable[[int], None], ...] = (
    writers_are_stopped_in_mid_stream,
    nothing_acknowledged_is_lost,
    held_steps_do_not_leave,
    whoever_coordinates_dies,
    a_training_node_restarts,
    the_whole_cluster_restarts,
    nodes_join_in_the_middle,
    who_is_silent_is_named_and_let_go,
    two_fence_at_once,
    a_later_fence_stops_who_restores,
    who_was_away_for_all_of_it_returns,
    a_divided_model_is_fenced,
    the_model_is_dropped_meanwhile,
    clocks_differ,
    fences_come_often,
)
