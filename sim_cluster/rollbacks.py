"""Rollbacks in virtual time: the coordinator and the performer of the daemon, on nodes of a virtual cluster.

`Shell` is what `ekko.node.rollbacks` is in a daemon: it asks the protocol, brings answers back, and drives the clock. A witness
has an older store and a log beside its own (`ekko.delayed`), which outlive its process as its memory and its disk do.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ekko.delayed.store import DelayedStore
from ekko.generations import Generation
from ekko.model import TableSpec
from ekko.rollback.coordinator import Coordinator, CoordinatorOptions, witnesses_among
from ekko.rollback.diff import stamp_until
from ekko.rollback.facts import Rollback, Rollbacks, Step
from ekko.rollback.past import DelayedPast
from ekko.rollback.performer import Performer, Surroundings
from ekko.rollback.plan import MemoryPlans, read_plan
from ekko.rollback.scope import WHOLE, Scope
from ekko.store import Store
from p2p import messages as m
from p2p.identity.ledger import NodeRecord
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster

LOG_BYTES = 4 << 20
# How finely shells look; the daemon wakes at once.
TICK_MS = 5
STAMP_MAX = 1 << 64

Rows = dict[int, float]  # key -> value, of what is there


@dataclass(slots=True, eq=False)
class Shell:
    """The rollbacks of one node, over all its lives."""

    cluster: VirtualCluster
    name: str
    folder: Path | None = None  # of a witness: its disk
    verdict: Callable[[str, int], str] = lambda model, since_ms: ""
    healthy_until: Callable[[str], int | None] = lambda model: None
    automatic: bool = False
    plans: MemoryPlans = field(default_factory=MemoryPlans)
    notes: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    make_performer: type[Performer] = Performer
    coordinator: Coordinator | None = None
    delayed: DelayedStore | None = None
    _older: Store = field(default_factory=Store.anonymous)
    _life: tuple[int, int] = (0, 0)

    @property
    def node(self) -> VirtualNode:
        """Whose they are."""
        return self.cluster.nodes[self.name]

    def tick(self) -> None:
        """Bring answers, let timers fire, go on with what takes long; begin anew where the node has a new life."""
        node = self.node
        if node.machine is None or node.paused:
            return
        if self._life != (node.lives, node.losses):
            self._begin(lost=self._life[1] != node.losses)
        coordinator = self.coordinator
        assert coordinator is not None
        for performer in list(coordinator.performers.values()):
            for number in performer.waiting:
                if node.machine is not None and number in node.replies:
                    reply = node.replies.pop(number)
                    assert not isinstance(reply, m.Expelled | m.AboveTold), "nobody has asked for that"
                    coordinator.on_reply(reply, number, self.cluster.now_of(node))
        if node.machine is not None:
            coordinator.on_timer(self.cluster.now_of(node))
        while node.machine is not None and coordinator.work(self.cluster.now_of(node)):
            pass

    def request(self, to_ms: int, scope: Scope = WHOLE, *, dry: bool = False, force: bool = False) -> Rollback:
        """As an operator asks at this node.

        Raises:
            EkkoError: it is refused.
        """
        self.tick()
        assert self.coordinator is not None
        now = self.cluster.now_of(self.node)
        return self.coordinator.request(self.cluster.model.name, to_ms, scope, now, dry=dry, force=force)

    @property
    def facts(self) -> Rollbacks:
        """What the node knows."""
        return self.node.store.facts.of(Rollbacks)

    def advance(self, until_ms: int) -> None:
        """What the witness's role does when the model was judged healthy up to a moment."""
        assert self.delayed is not None
        held = None if self.coordinator is None else self.coordinator.cut_held(self._generation)
        self.delayed.advance(self.cluster.model.name, until_ms if held is None else min(until_ms, held))

    @property
    def _generation(self) -> Generation:
        return Generation.of(self.cluster.model)

    def _begin(self, *, lost: bool) -> None:
        node, cluster = self.node, self.cluster
        self._life = node.lives, node.losses
        around = None
        if self.folder is not None:
            if self.delayed is not None:
                self.delayed.log.close()
                self._older = Store.anonymous() if lost else self._older.reopened()
            self.delayed = DelayedStore.open(node.store, self._older, self.folder, LOG_BYTES)
            around = Surroundings(
                node.store,
                DelayedPast(self.delayed),
                self.plans,
                self._ask,
                self._tell,
                self.verdict,
                self.healthy_until,
                self._fence_of,
                lambda family: self._synced(),
                lambda payload_bytes: payload_bytes,
                lambda name, fields: self.notes.append((name, fields)),
            )
        rng = random.Random(f"{cluster.seed} {self.name} {node.lives}")
        options = CoordinatorOptions(self.name, self.folder is not None, self.automatic)
        self.coordinator = Coordinator(
            options,
            node.store,
            lambda: self.facts,
            self._tell,
            self._witnesses,
            self._synced,
            lambda: rng.getrandbits(32),
            around,
        )
        self.coordinator.make_performer = self.make_performer
        node.store.facts.on_change = self.coordinator.look_soon

    def _ask(self, make: Callable[[int], m.Event]) -> int:
        return self.cluster.ask(self.name, make) if self.node.machine is not None else 0

    def _tell(self, fact: Rollback) -> None:
        entries = self.node.store.facts.note(self.facts.having(fact))
        if entries and self.node.machine is not None:
            self.cluster.feed(self.node, self.node.machine, m.SchemaChanged(entries))

    def _fence_of(self, family: int) -> m.Fence | None:
        return None if self.node.machine is None else self.node.machine.fence_of(family)

    def _synced(self) -> bool:
        machine = self.node.machine
        return machine is not None and machine.status(self.cluster.now_of(self.node)).synced

    def _witnesses(self, model: Generation) -> tuple[str, ...]:
        machine, held = self.node.machine, self.node.store.models[model.name]
        if machine is None:
            return ()
        peers = machine.status(self.cluster.now_of(self.node)).peers
        own = self.name if self.folder is not None and held.holds_all else ""
        return witnesses_among(peers, held.spec, own)


def attach(cluster: VirtualCluster, shells: Iterable[Shell], first: Callable[[], None] = lambda: None) -> None:
    """Have these shells live with their nodes from now on; `first` comes before each of their looks."""
    every = list(shells)

    def tick() -> None:
        first()
        for shell in every:
            shell.tick()
        cluster.timeline.at(cluster.now_ms + TICK_MS, tick)

    tick()


# --- what must hold ---------------------------------------------------------------------------------------------------------


def held(node: VirtualNode, model: str, table: TableSpec) -> Rows:
    """The rows of a table on a node."""
    rows: Rows = {}
    store = node.store.models[model]
    for selection in store.scan_since(np.zeros(store.vector.shape, np.uint64)):
        if selection.table == table.id:
            found = store.read(selection.table, selection.slots)
            values = found.rows.view(np.float32)
            rows |= {int(key): float(row[0]) for key, row in zip(found.keys, values, strict=False)}
    return rows


@dataclass(frozen=True, slots=True)
class TakenBack:
    """A rollback that came to its end."""

    cut: int  # the stamp of the moment that it went back to
    fence: int  # whatever was written up to this stamp and after the cut does not count any more


def oracle(cluster: VirtualCluster, table: str, taken_back: Sequence[TakenBack], until: int = STAMP_MAX) -> Rows:
    """What there is, of all that was acknowledged up to a stamp, but what was taken back.

    Args:
        cluster: with its history.
        table: whose rows.
        taken_back: in order of time.
        until: the stamp.
    """
    before = [one for one in taken_back if one.fence < until]
    rows, since = (oracle(cluster, table, before[:-1], before[-1].cut), before[-1].fence) if before else ({}, 0)
    for write in sorted(cluster.history, key=lambda one: one.stamp):
        if write.table == table and since < write.stamp <= until:
            rows.pop(write.key, None)
            if not write.deleted:
                rows[write.key] = write.value
    return rows


def wrong_rows(cluster: VirtualCluster, taken_back: Sequence[TakenBack]) -> str:
    """Whether some living replica has other rows than it should; the first, in words."""
    for name, table in cluster.model.tables.items():
        due = oracle(cluster, name, taken_back)
        for node in cluster.nodes.values():
            found = held(node, cluster.model.name, table) if node.machine is not None else due
            if found != due:
                differ = sorted(set(found.items()) ^ set(due.items()))[:4]
                return f"{node.name} has other rows of {name} than it should, (key, value): {differ}"
    return ""


def taken_back(shell: Shell) -> list[TakenBack]:
    """The rollbacks of the model that a node knows to be done, in order."""
    record, model = NodeRecord.load(shell.node.ledger), shell.cluster.model
    done = [fact for fact in reversed(shell.facts.of(Generation.of(model))) if fact.step is Step.DONE and not fact.dry]
    return [TakenBack(stamp_until(fact.cut_ms), record.fences[model.id, fact.epoch].stamp) for fact in done]


def plan_left(shells: Iterable[Shell]) -> str:
    """Who has a plan though nothing is to be done; empty: nobody."""
    for shell in shells:
        plan = read_plan(shell.plans, Generation.of(shell.cluster.model)) if shell.folder is not None else None
        if plan is not None:
            plan.close()
            return shell.name
    return ""


def over(shell: Shell, step: Step = Step.DONE) -> Callable[[], bool]:
    """Whether a node knows that the last rollback of the model has come to this end."""

    def ended() -> bool:
        current = shell.facts.current(Generation.of(shell.cluster.model))
        return current is not None and current.step is step

    return ended
