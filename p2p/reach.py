"""`wait`: learning that a stamp is visible at other nodes.

The publisher's node asks every live holder in scope to say when its frontier reaches the stamp, for each partition that the
step touched (R21); it need not ask itself, since a node holds what it writes. A question is repeated until its deadline, so
a lost answer or a restarted peer costs a moment, not the promise; the answer counts for the life that gave it. Who was silent
when the wait began is not waited for, and is named in its answer, however it ends.

By the same questions a node learns who has caught up with a whole model: for every writer that it knows, it asks for the
newest stamp up to which it has everything itself. While it has not caught up itself, it is the one who lags, and asks nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from p2p import messages as m
from p2p.core import Core, Keyspace, reached
from p2p.errors import LocalProtocolError
from p2p.link.links import Link
from p2p.members.membership import HOLDER_ROLES
from p2p.placement import may_hold
from p2p.replica import Place

REPEAT_MS = 250
WAITS_MAX = 1_024
QUESTIONS_MAX = 4_096
# Of one wait: partitions of a step, or writers times partitions of a model. Each is asked of every holder four times a second.
QUESTIONS_OF_WAIT_MAX = 1_024
# A question that its asker no longer repeats is dropped.
QUESTION_LIFE_MS = 4 * REPEAT_MS
DROPPED = "the model was dropped while this waited for it"


@dataclass(slots=True, eq=False)
class _Wait:
    request: int
    deadline_ms: int
    repeat_ms: int
    family: int | None = None  # about all of this one; None, too, as soon as the questions are known
    questions: dict[int, "_Question"] = field(default_factory=dict)  # by query
    silent: tuple[str, ...] = ()  # suspects when the questions began: not waited for, but named


@dataclass(slots=True, eq=False)
class _Question:
    """What a wait asks of the holders of one keyspace: whether they have this stamp."""

    keyspace: Keyspace
    stamp: int
    lagging: dict[str, None]


@dataclass(slots=True, eq=False)
class Reach:
    """Waits of local publishers, and questions of peers."""

    core: Core
    waits: list[_Wait] = field(default_factory=list)
    questions: dict[tuple[str, int], tuple[m.ReachQuery, int]] = field(default_factory=dict)  # (node, query) -> until ms
    _queries: int = 0

    def wait(self, request: m.WaitRequested, now: m.Now) -> None:
        """Start a wait, or answer at once.

        Raises:
            LocalProtocolError: unknown keyspace, a stamp that was never written here, or too many waits.
        """
        core = self.core
        if request.keyspace not in core.families:
            raise LocalProtocolError(f"keyspace {request.keyspace} does not exist on this node")
        touched = core.touched_by(request.keyspace, request.stamp)
        if not touched:
            raise LocalProtocolError(f"stamp {request.stamp} was not published on this node: wait at the node that stored it")
        wait = self._opened(request.request, request.timeout_ms, now)
        self._begin(wait, [(keyspace, request.stamp) for keyspace in touched], request.scope, now)
        self.waits.append(wait)
        self._finish(now)

    def wait_caught_up(self, request: m.CaughtUpRequested, now: m.Now) -> None:
        """Start a wait until this node and all live holders of a family have what is here of it, or answer at once.

        Raises:
            LocalProtocolError: unknown family, or too many waits.
        """
        if request.family not in self.core.families:
            raise LocalProtocolError(f"keyspace {request.family} does not exist on this node")
        wait = self._opened(request.request, request.timeout_ms, now)
        wait.family = request.family
        self._begin_family(wait, now)
        self.waits.append(wait)
        self._finish(now)

    def _opened(self, request: int, timeout_ms: int, now: m.Now) -> _Wait:
        if len(self.waits) >= WAITS_MAX:
            self.core.counters.waits_refused += 1
            raise LocalProtocolError(f"{WAITS_MAX} waits are open on this node already: wait for fewer stamps at a time")
        return _Wait(request, now.monotonic_ms + timeout_ms, now.monotonic_ms)

    def _begin_family(self, wait: _Wait, now: m.Now) -> None:
        """Ask about a family, once this node has caught up with it."""
        assert wait.family is not None
        family = self.core.families[wait.family]
        if not all(keyspace.synced for keyspace in family):
            wait.repeat_ms = now.monotonic_ms + REPEAT_MS
            return
        wait.family = None
        wanted = [
            (keyspace, stamp)
            for keyspace in family
            for stamp in keyspace.knowledge.frontier[keyspace.knowledge.writers].tolist()
            if stamp
        ]
        self._begin(wait, wanted, m.Scope.ALL, now)

    def _begin(self, wait: _Wait, wanted: Sequence[tuple[Keyspace, int]], scope: m.Scope, now: m.Now) -> None:
        """Ask the holders in scope of each keyspace for its stamp."""
        if len(wanted) > QUESTIONS_OF_WAIT_MAX:
            raise LocalProtocolError(f"{len(wanted)} writers and partitions to ask about, limit {QUESTIONS_OF_WAIT_MAX}")
        silent: dict[str, None] = {}
        holders: dict[Place, dict[str, None]] = {}
        for keyspace, stamp in wanted:
            place = keyspace.replica.place
            if place not in holders:
                holders[place], suspects = self.holders(scope, keyspace, now)
                silent |= suspects
            self._queries += 1
            wait.questions[self._queries] = _Question(keyspace, stamp, dict(holders[place]))
        wait.silent = tuple(sorted(silent))
        self._ask(wait, now)

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped: who waits for it is told so, and peers hear the like from their own nodes."""
        for wait in [one for one in self.waits if any(q.keyspace.replica.keyspace == keyspace for q in one.questions.values())]:
            self._refuse(wait, DROPPED)
        for key in [key for key, (question, _) in self.questions.items() if question.keyspace == keyspace]:
            del self.questions[key]

    def holders(self, scope: m.Scope, keyspace: Keyspace, now: m.Now) -> tuple[dict[str, None], dict[str, None]]:
        """The other holders in scope that a wait counts: the living, and the suspects."""
        core, place = self.core, keyspace.replica.place
        nodes: dict[str, None] = {}
        silent: dict[str, None] = {}
        if scope is m.Scope.LOCAL:
            return nodes, silent
        regions = None if scope is m.Scope.ALL else core.options.region
        for node in sorted(core.membership.members):
            record = core.membership.members[node].record
            if record.left or regions not in (None, record.region) or record.role not in HOLDER_ROLES:
                continue
            if may_hold(record, place):
                (nodes if core.membership.alive(node, now.monotonic_ms) else silent)[node] = None
        # Just restarted, we know few; who was there before is waited for until it counts as silent (R21).
        nodes |= dict.fromkeys(peer.node for peer in core.expected(now) if regions in (None, peer.region))
        # Away for so long that the register forgot it, and neither left nor expelled: a member still.
        silent |= {
            peer.node: None
            for peer in core.record.peers.values()
            if peer.node not in nodes and peer.node not in core.membership.members
            if regions in (None, peer.region) and peer.role in HOLDER_ROLES
        }
        return nodes, silent

    def counts(self, node: str, place: Place) -> bool:
        """Whether a node may hold this, as far as is known."""
        member = self.core.membership.members.get(node)
        return member is None or may_hold(member.record, place)

    def on_reached(self, link: Link, query: int, now: m.Now) -> None:
        """A peer has it."""
        for wait in self.waits:
            if query in wait.questions:
                wait.questions[query].lagging.pop(link.node, None)
                self._finish(now)
                return

    def on_query(self, link: Link, query: m.ReachQuery, now: m.Now) -> None:
        """A peer asks; answer now or when it is so."""
        keyspace = self.core.keyspaces.get(query.keyspace)
        if keyspace is not None and reached(keyspace, query.stamp):
            self.core.send(link, m.Reached(query.query))
        elif len(self.questions) < QUESTIONS_MAX or (link.node, query.query) in self.questions:
            self.questions[link.node, query.query] = (query, now.monotonic_ms + QUESTION_LIFE_MS)

    def on_progress(self, keyspace: Keyspace) -> None:
        """A frontier of this keyspace moved: answer whom it satisfies."""
        if not self.questions:
            return
        number = keyspace.replica.keyspace
        for (node, query), (question, _) in list(self.questions.items()):
            if question.keyspace == number and reached(keyspace, question.stamp):
                del self.questions[node, query]
                link = self.core.links.get(node)
                if link is not None:
                    self.core.send(link, m.Reached(query))

    def on_timer(self, now: m.Now) -> None:
        """Repeat open questions, end overdue waits, drop questions nobody repeats."""
        for wait in list(self.waits):
            if wait.family is None:
                self._ask(wait, now)
            elif wait.family not in self.core.families:
                self._refuse(wait, DROPPED)
            elif now.monotonic_ms >= wait.repeat_ms:
                try:
                    self._begin_family(wait, now)
                except LocalProtocolError as error:
                    self._refuse(wait, str(error))
        self._finish(now)
        for key in [key for key, (_, until_ms) in self.questions.items() if now.monotonic_ms >= until_ms]:
            del self.questions[key]

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        if not self.waits:
            return None
        return min(min(wait.deadline_ms, wait.repeat_ms) for wait in self.waits)

    def _ask(self, wait: _Wait, now: m.Now) -> None:
        if now.monotonic_ms < wait.repeat_ms:
            return
        wait.repeat_ms = now.monotonic_ms + REPEAT_MS
        for query, question in wait.questions.items():
            replica = question.keyspace.replica
            for node in list(question.lagging):
                if not self.counts(node, replica.place):
                    del question.lagging[node]  # by now we know what it holds
                elif (link := self.core.link(node)) is not None:
                    self.core.send(link, m.ReachQuery(replica.keyspace, query, question.stamp))

    def _finish(self, now: m.Now) -> None:
        for wait in list(self.waits):
            lagging = self._lagging(wait)
            if lagging and now.monotonic_ms < wait.deadline_ms:
                continue
            self.core.emit(m.WaitEnded(wait.request, lagging, wait.silent))
            self.waits.remove(wait)

    def _lagging(self, wait: _Wait) -> tuple[str, ...]:
        """Who has not answered yet, in order."""
        if wait.family is not None:
            return (self.core.options.node,)
        return tuple(dict.fromkeys(node for question in wait.questions.values() for node in question.lagging))

    def _refuse(self, wait: _Wait, why: str) -> None:
        self.waits.remove(wait)
        self.core.emit(m.Refused(wait.request, why))
