"""Minting above what others hold: for a trainer that goes on from a checkpoint, maybe on another machine (R24).

What the dead run wrote after the checkpoint may have larger stamps than what this node would mint next: its node's clock may
have been ahead of ours. Such a row would win over newer ones for as long as the clocks differ. So every live holder is asked
for the largest stamp that it has, and our clock goes above all of them. A holder counts once all that it holds is here, too:
then whoever asked can see which rows the dead run touched. Questions are repeated until then, or until time is up.

It is enough that one holder of a region answered for the region to count as heard, as the rule has it; those that did not are
named. Rejected: to wait until our clock has passed all that another clock may have said (R14), which takes a minute and a half.
"""

from dataclasses import dataclass, field
from typing import Final

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.link.links import Link
from p2p.pulling.pull import Pull
from p2p.reach import QUESTIONS_OF_WAIT_MAX, REPEAT_MS, Reach
from p2p.stamps import AHEAD_MS_MAX, check_not_ahead, unix_ms_of

# Trainers that begin at the same moment at one node: the ranks of one machine.
REQUESTS_MAX: Final = 64


@dataclass(slots=True, eq=False)
class _Request:
    asked: m.AboveRequested
    deadline_ms: int
    questions: dict[int, "_Question"]  # by query
    repeat_ms: int


@dataclass(slots=True, eq=False)
class _Question:
    """What is asked of the holders of one keyspace."""

    keyspace: Keyspace
    open: dict[str, str]  # node -> region: not answered, or ahead of us
    done: set[str]  # regions of which somebody has answered; our own, since we are of it


@dataclass(slots=True, eq=False)
class Ceilings:
    """Requests of local publishers to mint above what others hold, and the same questions of peers."""

    core: Core
    pull: Pull
    reach: Reach
    requests: list[_Request] = field(default_factory=list)
    _queries: int = 0

    def begin(self, asked: m.AboveRequested, now: m.Now) -> None:
        """Start to ask, or answer at once.

        Raises:
            LocalProtocolError: unknown family, too much to ask, or a stamp that our clock must not follow.
        """
        core = self.core
        family = core.families.get(asked.family)
        if not family:
            raise LocalProtocolError(f"keyspace {asked.family} does not exist on this node")
        if len(self.requests) >= REQUESTS_MAX:
            raise LocalProtocolError(f"{REQUESTS_MAX} trainers are being started at this node already: try again later")
        if len(family) > QUESTIONS_OF_WAIT_MAX:
            raise LocalProtocolError(f"{len(family)} partitions to ask about, limit {QUESTIONS_OF_WAIT_MAX}")
        ahead_ms = unix_ms_of(asked.stamp) - now.unix_ms
        if ahead_ms > AHEAD_MS_MAX:
            raise LocalProtocolError(
                f"stamp {asked.stamp} is {ahead_ms} ms ahead of this node's clock, limit {AHEAD_MS_MAX}: one of the two clocks "
                "was wrong; set this machine's clock, or begin without that checkpoint's stamp"
            )
        core.clock.observe(asked.stamp)
        questions: dict[int, _Question] = {}
        for keyspace in family:
            nodes, suspects = self.reach.holders(m.Scope.ALL, keyspace, now)
            self._queries += 1
            questions[self._queries] = _Question(keyspace, self._regions({**nodes, **suspects}), {core.options.region})
        self.requests.append(_Request(asked, now.monotonic_ms + asked.timeout_ms, questions, now.monotonic_ms))
        self.on_timer(now)

    def _regions(self, nodes: dict[str, None]) -> dict[str, str]:
        """Node -> its region."""
        register, peers = self.core.membership.members, self.core.record.peers
        return {node: register[node].record.region if node in register else peers[node].region for node in nodes}

    def on_ask(self, link: Link, ask: m.CeilingAsk, now: m.Now) -> None:
        """A peer asks what we hold."""
        keyspace = self.core.keyspaces.get(ask.keyspace)
        if keyspace is None:
            return
        vector, strays = self.pull.digests(keyspace, now)
        known = keyspace.knowledge
        newest = zip(known.writers.tolist(), known.vector[:, known.writers].max(axis=0).tolist(), strict=True)
        writers = tuple((writer, stamp) for writer, stamp in newest if stamp)
        self.core.send(link, m.CeilingTold(ask.query, _largest(keyspace), vector, strays, writers))

    def on_told(self, link: Link, told: m.CeilingTold, now: m.Now) -> None:
        """A peer says what it holds; it counts once we hold that, too.

        Raises:
            RemoteProtocolError: the stamp is too far in our future (R14).
        """
        for request in self.requests:
            question = request.questions.get(told.query)
            if question is None or link.node not in question.open:
                continue
            check_not_ahead(told.stamp, now.unix_ms)
            if any(stamp > told.stamp for _, stamp in told.writers):
                raise RemoteProtocolError("a ceiling below what its sender's vector says")
            self.core.clock.observe(told.stamp)
            if self._has_all(question.keyspace, told, now):
                question.done.add(question.open.pop(link.node))
                self._finish(now)
            return

    def _has_all(self, keyspace: Keyspace, told: m.CeilingTold, now: m.Now) -> bool:
        """Whether all that a peer holds is here."""
        vector, strays = self.pull.digests(keyspace, now)
        if told.stray_digest not in (0, strays):
            return False
        frontier = keyspace.knowledge.frontier
        return told.vector_digest == vector or all(int(frontier[writer]) >= stamp for writer, stamp in told.writers)

    def on_timer(self, now: m.Now) -> None:
        """Repeat open questions, and end requests whose time is up."""
        for request in list(self.requests):
            gone = [q for q in request.questions.values() if q.keyspace.replica.keyspace not in self.core.keyspaces]
            if gone:
                self.requests.remove(request)
                self.core.emit(m.Refused(request.asked.request, "the model was dropped while this asked for its stamps"))
            elif now.monotonic_ms >= request.repeat_ms:
                request.repeat_ms = now.monotonic_ms + REPEAT_MS
                self._ask(request)
        self._finish(now)

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        return min((min(one.deadline_ms, one.repeat_ms) for one in self.requests), default=None)

    def _ask(self, request: _Request) -> None:
        for query, question in request.questions.items():
            replica = question.keyspace.replica
            for node in list(question.open):
                if not self.reach.counts(node, replica.place):
                    del question.open[node]  # by now we know what it holds
                elif (link := self.core.link(node)) is not None:
                    self.core.send(link, m.CeilingAsk(replica.keyspace, query))

    def _finish(self, now: m.Now) -> None:
        for request in list(self.requests):
            if now.monotonic_ms < request.deadline_ms and any(self._is_open(q, now) for q in request.questions.values()):
                continue
            self.requests.remove(request)
            self.core.emit(self._answer(request))

    def _is_open(self, question: _Question, now: m.Now) -> bool:
        """Whether somebody is waited for: who lives, or may be on its way; in a region that nobody answered for, everyone."""
        register = self.core.membership
        return any(
            region not in question.done or node not in register.members or register.alive(node, now.monotonic_ms)
            for node, region in question.open.items()
        )

    def _answer(self, request: _Request) -> m.AboveTold:
        # A region has to have answered for each keyspace that somebody there holds.
        open_ = [{region for region in q.open.values() if region not in q.done} for q in request.questions.values()]
        unheard = set().union(*open_)
        heard = set().union(*(q.done for q in request.questions.values())) - unheard
        silent = {node for q in request.questions.values() for node in q.open}
        stamp = max(self.core.clock.last, request.asked.stamp)
        return m.AboveTold(request.asked.request, stamp, tuple(sorted(heard)), tuple(sorted(unheard)), tuple(sorted(silent)))


def _largest(keyspace: Keyspace) -> int:
    """No row or claim here has a larger stamp."""
    return max(keyspace.replica.stamp_max, int(keyspace.knowledge.frontier.max()))
