"""Faults of nodes and of links between them as they happen to a virtual cluster: each begins, and ends by itself.

What ends is what began: who was down already when a fault came is not started again by its end, unless another fault's end is
due. Faults of messages are the network's (`sim_cluster.network`).
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

from ekko.store import Store
from p2p import messages as m
from p2p.identity.ledger import NodeRecord
from p2p.versions import FIRST_VERSION, PROTOCOL_VERSION
from sim_cluster import comings, fences
from sim_cluster.network import LinkOptions, pair_of
from sim_cluster.node import VirtualNode
from sim_cluster.scenario import FaultEvent, draw_hold
from sim_cluster.snapshots import Snapshot
from sim_cluster.virtual import VirtualCluster

SNAPSHOT_MS: Final = 700

Undo = Callable[[], None]


class Disturbances:
    """The faults of one run.

    Args:
        cluster: what they happen to.
        usual: links between regions as they are without faults, where they are not like all.
        limited: names of nodes that drop rows for want of room.
    """

    def __init__(self, cluster: VirtualCluster, usual: Mapping[str, LinkOptions], limited: Iterable[str]) -> None:
        self.cluster = cluster
        self._usual = usual
        self._limited = frozenset(limited)
        self._ends: list[tuple[int, int, Undo]] = []  # when what began ends, and how

    def begin(self, event: FaultEvent) -> None:
        """A fault happens, unless it cannot: to who is down, say."""
        undo = self._begun(event)
        if undo is not None:
            self._later(event.at_ms + event.for_ms, undo)

    def end(self, until_ms: int) -> None:
        """Those end that are due."""
        # Two may end at the same moment with the same number, since numbers are those of the list when they began.
        due = sorted((end for end in self._ends if end[0] <= until_ms), key=lambda end: end[:2])
        self._ends = [end for end in self._ends if end[0] > until_ms]
        for _, _, undo in due:
            undo()

    def _later(self, at_ms: int, what: Undo) -> None:
        self._ends.append((at_ms, len(self._ends), what))

    def _begun(self, event: FaultEvent) -> Undo | None:
        """Begin it; how it ends, or None: it did not begin, or sees to its end itself."""
        match event.kind:
            case "crash" | "lose" | "away" | "hold" | "upgrade" | "leave" | "kill":
                return self._end_life(event)
            case "expel" | "generation" | "fence":
                return self._operate(event)
            case "restore":
                return self._snapshot(event)
            case "pause" | "clock":
                return self._disturb_machine(event)
            case "congested":
                return self._narrow(event)
            case _:
                cut = self._cut(event)
                return lambda: self.cluster.cut.difference_update(cut)

    # --- lives that end

    def _end_life(self, event: FaultEvent) -> Undo | None:
        cluster, node, name = self.cluster, self.cluster.nodes[event.node], event.node
        if event.kind == "upgrade":
            node.protocol_version = PROTOCOL_VERSION  # of its next life
        if node.machine is None:
            return None  # it is down already
        match event.kind:
            case "upgrade":
                cluster.leave(name)
                return lambda: self._start_again(name)
            case "leave":
                if node.paused:
                    return None
                cluster.leave(name)
                return lambda: self._start_again(name)
            case "kill":
                if node.fuse is not None:
                    return None
                cluster.kill_within(name, event.amount)
                return lambda: self._end_kill(name)
            case "hold":
                if node.role == "train":  # who writes everything holds everything
                    return None
                cluster.crash(name)
                return lambda: self._hold_otherwise(name, event.amount)
        cluster.crash(name)
        return lambda: self._start_again(name, keep_state=event.kind != "lose")

    def _hold_otherwise(self, name: str, amount: int) -> None:
        node, rng = self.cluster.nodes[name], random.Random(f"{name} holds {amount}")
        if node.machine is None:
            models = self.cluster.models.values()
            node.hold = {spec.name: tuple(sorted(draw_hold(spec.partitions, rng))) for spec in models}
            self.cluster.restart(name)

    def _end_kill(self, name: str) -> None:
        """Start again who was killed; who did too little to be killed in the middle of it is killed now."""
        node = self.cluster.nodes[name]
        if node.machine is not None and node.fuse is None:
            return  # it was killed otherwise meanwhile, and runs again
        if node.machine is not None:
            self.cluster.crash(name)
        self._start_again(name)

    def _start_again(self, name: str, keep_state: bool = True) -> None:
        if self.cluster.nodes[name].machine is None:  # the end of another fault may have come before
            self.cluster.restart(name, keep_state)

    def _snapshot(self, event: FaultEvent) -> Undo | None:
        """A snapshot is begun; a moment later it goes on, and in the end it is all that the node has."""
        cluster, node = self.cluster, self.cluster.nodes[event.node]
        # Of nodes that drop rows for want of room virtual snapshots do not know in which shards.
        if node.machine is None or node.paused or node.fuse is not None or event.node in self._limited:
            return None
        store, snapshot, losses = node.store, Snapshot(node.store, cluster.models), node.losses
        snapshot.take_vectors()
        snapshot.take_rows(0, 2)
        taken = False

        def go_on() -> None:
            nonlocal taken
            if node.store is store and node.machine is not None:
                snapshot.take_rows(1, 2)
                snapshot.take_floors()
                taken = True

        def restore() -> None:
            # None of a life that a start-over ended is restored, nor one with more of a retired writer than was left of it
            # (decision 0033).
            retired = NodeRecord.load(node.ledger).retired.values()
            if node.machine is None or not taken or node.losses != losses or snapshot.has_more_than_left(retired):
                return
            cluster.crash(node.name)
            node.store = Store.anonymous()
            snapshot.restore(node.store)
            node.losses += 1
            cluster.forget_lost()
            cluster.boot(node)

        self._later(event.at_ms + min(event.for_ms // 2, SNAPSHOT_MS), go_on)
        return restore

    # --- what operators do

    def _operate(self, event: FaultEvent) -> Undo | None:
        cluster, node = self.cluster, self.cluster.nodes[event.node]
        if node.machine is None or node.paused:
            return None
        if event.kind == "expel":
            cut = self._cut(event)
            return lambda: self._expel(event, cut)
        if not comings.understood(cluster):
            return None
        if event.kind == "generation":
            comings.begin(cluster, node, event.amount)
            return lambda: comings.end(cluster, event.amount)
        fences.begin(cluster, node, event.amount)
        self._later(event.at_ms + event.for_ms // 2, lambda: fences.go_on(cluster, event.amount))
        return lambda: self._lift(event)

    def _expel(self, event: FaultEvent, cut: set[tuple[str, str]]) -> None:
        """An operator expels who was cut off, as the command lets him; then that node is back."""
        cluster, node = self.cluster, self.cluster.nodes[event.node]
        others = [one for one in cluster.nodes.values() if one is not node]
        asked = next((one for one in others if one.machine is not None and not one.paused), None)
        # Who runs version 1 would not be let in again afterwards: operators upgrade first (decision 0020).
        if asked is not None and all(one.protocol_version > FIRST_VERSION for one in cluster.nodes.values()):
            reply = cluster.request(asked.name, lambda number: m.ExpelRequested(number, event.node))
            if isinstance(reply, m.Expelled):
                cluster.note_expelled(event.node)
        if event.amount % 2 and node.machine is not None:
            cluster.crash(event.node)
            cluster.restart(event.node)
        cluster.cut.difference_update(cut)

    def _lift(self, event: FaultEvent) -> None:
        """The fence that began at a node ends; so does its absence, if it was killed."""
        fences.end(self.cluster)
        if event.amount % 2:
            self._end_kill(event.node)

    # --- machines and links

    def _disturb_machine(self, event: FaultEvent) -> Undo | None:
        cluster, node = self.cluster, self.cluster.nodes[event.node]
        if event.kind == "clock":
            cluster.shift_clock(event.node, event.amount)
            return lambda: cluster.shift_clock(event.node, -event.amount)
        if node.machine is None or node.paused:
            return None
        cluster.pause(event.node)
        return lambda: cluster.resume(event.node)

    def _narrow(self, event: FaultEvent) -> Undo:
        """All links between a node's region and others carry little."""
        cluster = self.cluster
        narrow = {pair: replace(old, rate_bytes_per_ms=event.amount) for pair, old in self._pairs(cluster.nodes[event.node])}
        cluster.options = replace(cluster.options, links={**cluster.options.links, **narrow})
        return lambda: self._widen(narrow)

    def _pairs(self, node: VirtualNode) -> list[tuple[str, LinkOptions]]:
        """Of a node's region and others, with what they are like now."""
        others = sorted({one.region for one in self.cluster.nodes.values()} - {node.region})
        pairs = [pair_of(node.region, other) for other in others]
        return [(pair, self.cluster.options.links.get(pair, LinkOptions())) for pair in pairs]

    def _widen(self, narrow: Mapping[str, LinkOptions]) -> None:
        """A congestion ends: its links are as wide as before all of them."""
        usual = {pair: self._usual.get(pair, LinkOptions()) for pair in narrow}
        links = {**self.cluster.options.links, **usual}
        self.cluster.options = replace(self.cluster.options, links=links)

    def _cut(self, event: FaultEvent) -> set[tuple[str, str]]:
        """Cut the links that an event is about; those that were not cut before."""
        cut = self._links_of(event) - self.cluster.cut
        self.cluster.cut |= cut
        return cut

    def _links_of(self, event: FaultEvent) -> set[tuple[str, str]]:
        names = [name for name in self.cluster.nodes if name != event.node]
        into = {(other, event.node) for other in names} if event.kind in ("isolate", "deaf", "expel") else set()
        out = {(event.node, other) for other in names} if event.kind in ("isolate", "mute", "expel") else set()
        if event.kind == "one-way":
            out = {(event.node, event.other)}
        if event.kind == "split":
            region = self.cluster.nodes[event.node].region
            inside = [node.name for node in self.cluster.nodes.values() if node.region == region]
            outside = [node.name for node in self.cluster.nodes.values() if node.region != region]
            into, out = {(a, b) for a in outside for b in inside}, {(b, a) for a in outside for b in inside}
        return into | out
