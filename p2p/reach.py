"""`wait`: learning that a stamp is visible at other nodes.

The publisher's node asks every live holder in scope to say when its frontier reaches the stamp. A question is repeated until
its deadline, so a lost answer or a restarted peer costs a moment, not the promise; the answer counts for the life that gave it
(R21).
"""

from dataclasses import dataclass, field

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import LocalProtocolError
from p2p.links import Link
from p2p.stamps import writer_of

REPEAT_MS = 250
WAITS_MAX = 1_024
QUESTIONS_MAX = 4_096
# A question that its asker no longer repeats is dropped.
QUESTION_LIFE_MS = 4 * REPEAT_MS


@dataclass(slots=True, eq=False)
class _Wait:
    request: int
    keyspace: int
    stamp: int
    deadline_ms: int
    lagging: dict[str, None]  # node ids that have not answered, in order
    silent: tuple[str, ...]  # suspects at the time of the call: not waited for, but named
    repeat_ms: int


@dataclass(slots=True, eq=False)
class Reach:
    """Waits of local publishers, and questions of peers."""

    core: Core
    waits: dict[int, _Wait] = field(default_factory=dict)
    questions: dict[tuple[str, int], tuple[m.ReachQuery, int]] = field(default_factory=dict)  # (node, query) -> until ms
    _queries: int = 0

    def wait(self, request: m.WaitRequested, now: m.Now) -> None:
        """Start a wait, or answer at once.

        Raises:
            LocalProtocolError: unknown keyspace, a stamp that was never written here, or too many waits.
        """
        core = self.core
        keyspace = core.keyspaces.get(request.keyspace)
        if keyspace is None:
            raise LocalProtocolError(f"keyspace {request.keyspace} does not exist on this node")
        if not reached(keyspace, request.stamp):
            raise LocalProtocolError(f"stamp {request.stamp} was not published on this node: wait at the node that stored it")
        if len(self.waits) >= WAITS_MAX:
            core.counters.waits_refused += 1
            raise LocalProtocolError(f"{WAITS_MAX} waits are open on this node already: wait for fewer stamps at a time")
        nodes: list[str] = []
        silent: list[str] = []
        if request.scope is not m.Scope.LOCAL:
            for node in sorted(core.membership.members):
                record = core.membership.members[node].record
                in_scope = request.scope is m.Scope.ALL or record.region == core.options.region
                if record.left or not in_scope:
                    continue
                (nodes if core.membership.alive(node, now.monotonic_ms) else silent).append(node)
            # Just restarted, we know few; who was there before is waited for until it counts as silent (R21).
            everywhere = request.scope is m.Scope.ALL
            nodes += [peer.node for peer in core.expected(now) if everywhere or peer.region == core.options.region]
        self._queries += 1
        deadline_ms = now.monotonic_ms + request.timeout_ms
        wait = _Wait(
            request.request, request.keyspace, request.stamp, deadline_ms, dict.fromkeys(nodes), tuple(silent), now.monotonic_ms
        )
        self.waits[self._queries] = wait
        self._ask(self._queries, wait, now)
        self._finish(now)

    def on_reached(self, link: Link, query: int, now: m.Now) -> None:
        """A peer has it."""
        wait = self.waits.get(query)
        if wait is not None:
            wait.lagging.pop(link.node, None)
            self._finish(now)

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
        for query, wait in self.waits.items():
            self._ask(query, wait, now)
        self._finish(now)
        for key in [key for key, (_, until_ms) in self.questions.items() if now.monotonic_ms >= until_ms]:
            del self.questions[key]

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        return min((min(w.deadline_ms, w.repeat_ms) for w in self.waits.values()), default=None)

    def _ask(self, query: int, wait: _Wait, now: m.Now) -> None:
        if now.monotonic_ms < wait.repeat_ms:
            return
        wait.repeat_ms = now.monotonic_ms + REPEAT_MS
        for node in wait.lagging:
            link = self.core.link(node)
            if link is not None:
                self.core.send(link, m.ReachQuery(wait.keyspace, query, wait.stamp))

    def _finish(self, now: m.Now) -> None:
        for query, wait in list(self.waits.items()):
            if not wait.lagging:
                self.core.emit(m.WaitEnded(wait.request, ()))
            elif now.monotonic_ms >= wait.deadline_ms:
                silent = tuple(f"{node} (silent)" for node in wait.silent)
                self.core.emit(m.WaitEnded(wait.request, (*wait.lagging, *silent)))
            else:
                continue
            del self.waits[query]


def reached(keyspace: Keyspace, stamp: int) -> bool:
    """Whether everything that the stamp's writer wrote up to it is visible here."""
    return int(keyspace.knowledge.frontier[writer_of(stamp)]) >= stamp
