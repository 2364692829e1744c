"""When a deleted or expired row may be forgotten for good: what is causally stable (R5).

A tombstone guards its key against older versions that may still come from somewhere. It may go when nobody can bring one that
we would not recognise: when every member that is not expelled, away ones included, has said that it has everything of the
tombstone's writer up to it, and we have everything up to it of every writer that any of them knows of. Later versions of the
key are newer; earlier ones our vector covers, so they are known for ghosts (T6). Whoever lacks the tombstone and comes back
later is below our loss floor, and gets whole shards (`p2p.pulling.whole`).

*Who has everything* is the frontier: all that a writer wrote up to it, in any shard, is here. It moves without rows, too, as
idle writers send batches that say "nothing since", and never goes beyond what the vector says of a stamp that was written.

*A new writer* cannot write below what was collected. It caught up from a member, so its clock is above all that this member had
seen (`p2p.pulling.intake.observe`, and `clock_floor` of those that were given ids). Either that member had the tombstone by
then; or it reported later, and then it named the newcomer's life, whose own report was waited for, and that named its writer.

*Telling.* One coordinator for each keyspace, the first living holder by name. It asks the others for reports while it, or
anybody who says so, keeps tombstones; when all have reported in their current lives, it tells everybody how far everybody is.
What it tells stays true, so it may be lost, late or repeated. Reports are kept in memory only: after a restart of the
coordinator, or under another one, who is away has not reported, and what it had not reported before stays until it is back, or
expelled. Without tombstones nothing of this is sent.
"""

from dataclasses import dataclass, field

import numpy as np

from p2p import messages as m
from p2p import wire
from p2p.core import Core, Keyspace
from p2p.errors import FullError
from p2p.link.links import Link
from p2p.placement import may_hold
from p2p.replica import U64
from p2p.stamps import WRITERS_MAX, check_not_ahead

# Rows that go with one heartbeat, some hundred microseconds.
ROWS_MAX = 4_096
# A round through the tables that found nothing more begins again after so many times the interval: it reads every row's header.
PAUSE_ROUNDS = 6


@dataclass(frozen=True, slots=True, eq=False)
class _Report:
    """What a member's life has said."""

    reached: dict[int, int]  # by writer
    boots: frozenset[int]


@dataclass(slots=True, eq=False)
class _State:
    """What is known of one keyspace."""

    next_ms: int = 0  # of the interval
    wanted_ms: int | None = None  # when somebody last said that it keeps tombstones
    reports: dict[int, _Report] = field(default_factory=dict)  # by boot, as coordinator
    reached: dict[int, int] = field(default_factory=dict)  # how far everybody has everything, by writer
    held_up_by: tuple[str, ...] = ()
    held_up_ms: int = 0  # since when, monotonic
    pause_ms: int = 0  # no look at the tables before


@dataclass(frozen=True, slots=True)
class HeldUp:
    """What keeps tombstones from being collected: members, and since when (monotonic)."""

    nodes: tuple[str, ...]
    since_ms: int


class Collection:
    """The part of the machine that lets go of deleted rows."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._states: dict[int, _State] = {}  # by keyspace

    @property
    def reports(self) -> int:
        """Reports that are kept, of the keyspace with most."""
        return max((len(state.reports) for state in self._states.values()), default=0)

    def held_up(self, keyspace: int) -> HeldUp | None:
        """Who keeps this keyspace's tombstones from being collected."""
        state = self._states.get(keyspace)
        return HeldUp(state.held_up_by, state.held_up_ms) if state is not None and state.held_up_by else None

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._states.pop(keyspace, None)

    def on_beat(self, now: m.Now) -> None:
        """Called at every heartbeat."""
        if not self._core.options.collect_ms:
            return
        for number, keyspace in self._core.keyspaces.items():
            waiting = keyspace.replica.collectable > 0
            if not waiting and number not in self._states:
                continue
            state = self._states.setdefault(number, _State())
            if waiting:
                self._collect(keyspace, state, now)
            self._gather(keyspace, state, waiting, now)

    # --- collecting

    def _collect(self, keyspace: Keyspace, state: _State, now: m.Now) -> None:
        if not state.reached or now.monotonic_ms < state.pause_ms:
            return
        until = stable_until(keyspace, state.reached)
        try:
            collected = keyspace.replica.collect(until, self._sure_unix_ms(now), ROWS_MAX)
        except FullError:  # for the floor, of which the first row that goes needs all: they stay until there is room
            state.pause_ms = now.monotonic_ms + PAUSE_ROUNDS * self._core.options.collect_ms
            return
        self._core.counters.rows_collected += collected.rows
        if collected.done:
            state.pause_ms = now.monotonic_ms + (PAUSE_ROUNDS if not collected.rows else 1) * self._core.options.collect_ms

    def _sure_unix_ms(self, now: m.Now) -> int:
        """No later than our peers' clocks say (R14): a clock that jumped ahead must not let live rows expire for good.

        A member to whom nobody has told the time lately is not sure of anything: 0, nothing expires.
        """
        error_ms, peers = self._core.membership.suspicion.clock_error_ms(now.unix_ms, now.monotonic_ms)
        if not peers and (self._core.membership.members or self._core.record.peers):
            return 0
        return now.unix_ms - max(0, error_ms)

    # --- learning what is stable

    def _gather(self, keyspace: Keyspace, state: _State, waiting: bool, now: m.Now) -> None:
        core, every_ms = self._core, self._core.options.collect_ms
        if now.monotonic_ms < state.next_ms:
            return
        state.next_ms = now.monotonic_ms + every_ms
        told = state.wanted_ms is not None and now.monotonic_ms - state.wanted_ms < 3 * every_ms
        if not waiting and not told:
            del self._states[keyspace.replica.keyspace]
            return
        # Nodes of version 1 cannot report, and cannot be sent whole shards.
        if not keyspace.synced or core.membership.protocol_min_known() < wire.since(m.StableAsk):
            return
        coordinator = self._coordinator(keyspace, now)
        if coordinator is None:
            self._conclude(keyspace, state, now)
            self._tell_all(keyspace, m.StableAsk(keyspace.replica.keyspace), now)
            return
        state.reports.clear()
        if (link := core.link(coordinator)) is not None:
            core.send(link, self._report(keyspace, waiting))

    def _coordinator(self, keyspace: Keyspace, now: m.Now) -> m.NodeId | None:
        """The first living holder by name; None when it is us."""
        holders = self._core.membership.holders(now.monotonic_ms, keyspace.replica.place)
        first = min((holder.node for holder in holders), default=self._core.options.node)
        return None if first == self._core.options.node else first

    def _tell_all(self, keyspace: Keyspace, message: m.Message, now: m.Now) -> None:
        core = self._core
        for record in core.membership.live(now.monotonic_ms):
            if may_hold(record, keyspace.replica.place) and (link := core.link(record.node)) is not None:
                core.send(link, message)

    def _report(self, keyspace: Keyspace, waiting: bool) -> m.StableReport:
        reached = reached_of(keyspace)
        writers = np.array(sorted(reached), np.uint16)
        boots = np.array(sorted(self._holders(keyspace)), np.uint64)
        stamps = np.array([reached[writer] for writer in writers.tolist()], np.uint64)
        return m.StableReport(keyspace.replica.keyspace, waiting, writers, stamps, boots)

    def _holders(self, keyspace: Keyspace) -> dict[int, m.NodeId]:
        """Lives of the other members that hold a keyspace, or may; also of those that are away for however long."""
        core, place = self._core, keyspace.replica.place
        members = core.membership.members
        lives = {one.record.boot: node for node, one in members.items() if may_hold(one.record, place)}
        lives |= {absent.boot: node for node, absent in core.record.absent.items() if node not in members}
        return {boot: node for boot, node in lives.items() if boot not in core.record.expelled}

    def on_ask(self, link: Link, ask: m.StableAsk) -> None:
        """Somebody coordinates."""
        keyspace = self._core.keyspaces.get(ask.keyspace)
        if keyspace is not None:
            self._core.send(link, self._report(keyspace, keyspace.replica.collectable > 0))

    def on_report(self, link: Link, report: m.StableReport, now: m.Now) -> None:
        """A member says how far it has everything.

        Raises:
            RemoteProtocolError: it has something of the future; nothing is changed.
        """
        check_not_ahead(int(report.reached.max(initial=np.uint64(0))), now.unix_ms)
        keyspace = self._core.keyspaces.get(report.keyspace)
        if keyspace is None:
            return
        state = self._states.setdefault(report.keyspace, _State())
        if report.waiting:
            state.wanted_ms = now.monotonic_ms
        reached = dict(zip(report.writers.tolist(), report.reached.tolist(), strict=True))
        state.reports[link.boot] = _Report(reached, frozenset(report.boots.tolist()))

    def _conclude(self, keyspace: Keyspace, state: _State, now: m.Now) -> None:
        """As coordinator: how far is everybody?"""
        core = self._core
        lives = self._holders(keyspace)
        state.reports = {boot: report for boot, report in state.reports.items() if boot in lives}
        missing = [node for boot, node in lives.items() if boot not in state.reports]
        missing += [
            node for node in core.record.peers if node not in core.membership.members and node not in core.record.absent
        ]
        # Of newcomers that we have not met. Of a life that ended its node's next one has told, or will.
        told = frozenset().union(*(report.boots for report in state.reports.values()))
        strangers = told - lives.keys() - core.record.expelled.keys() - {core.options.boot}
        missing += [f"life {boot:016x}" for boot in sorted(strangers)]
        held_up_by = tuple(sorted(set(missing)))[: wire.HELD_UP_MAX]
        self._note_held_up(state, held_up_by, now)
        reached: dict[int, int] = {}
        if not held_up_by:
            own = reached_of(keyspace)
            everybody = [own, *(report.reached for report in state.reports.values())]
            writers = sorted(set().union(*everybody))
            reached = {writer: min(one.get(writer, 0) for one in everybody) for writer in writers}
            state.reached = reached
        ids = np.array(list(reached), np.uint16)
        stamps = np.array(list(reached.values()), np.uint64)
        self._tell_all(keyspace, m.Stable(keyspace.replica.keyspace, ids, stamps, held_up_by), now)

    def on_stable(self, link: Link, told: m.Stable, now: m.Now) -> None:
        """The coordinator tells how far everybody is.

        Raises:
            RemoteProtocolError: everybody has something of the future; nothing is changed.
        """
        check_not_ahead(int(told.reached.max(initial=np.uint64(0))), now.unix_ms)
        keyspace = self._core.keyspaces.get(told.keyspace)
        if keyspace is None or self._coordinator(keyspace, now) != link.node:
            return
        state = self._states.get(told.keyspace)
        if state is None:
            return  # nothing here waits for it
        self._note_held_up(state, told.held_up_by, now)
        if len(told.writers):
            state.reached = dict(zip(told.writers.tolist(), told.reached.tolist(), strict=True))

    def _note_held_up(self, state: _State, nodes: tuple[str, ...], now: m.Now) -> None:
        if nodes and not state.held_up_by:
            state.held_up_ms = now.monotonic_ms
        state.held_up_by = nodes


def reached_of(keyspace: Keyspace) -> dict[int, int]:
    """Writer -> up to where everything of it is here, of all that are known; 0: nothing yet."""
    knowledge = keyspace.knowledge
    reached = {writer: int(knowledge.frontier[writer]) for writer in knowledge.writers.tolist()}
    for writer, floor in knowledge.settled.items():
        if knowledge.is_settled(writer):  # there will never be more of it
            reached[writer] = max(int(knowledge.frontier[writer]), int(floor.max(initial=np.uint64(0))))
    return reached


def stable_until(keyspace: Keyspace, everybody: dict[int, int]) -> U64:
    """uint64[WRITERS_MAX]: up to where a row of each writer may be collected.

    Args:
        keyspace: here.
        everybody: up to where all members have everything, of each writer that any of them knows.
    """
    knowledge = keyspace.knowledge
    named = {*everybody, *knowledge.writers.tolist()}
    open_ = [writer for writer in named if not knowledge.is_settled(writer)]
    covered = min((int(knowledge.frontier[writer]) for writer in open_), default=None)
    until = np.zeros(WRITERS_MAX, np.uint64)
    for writer, stamp in everybody.items():
        until[writer] = stamp if covered is None else min(stamp, covered)
    return until
