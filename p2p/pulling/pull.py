"""Anti-entropy by version vector: repair, joins, and what push lost.

The asker sends its vector; the answerer reads its own vector, selects every row above the asker's, streams the rows, and
sends its vector last. The asker applies chunks as they come (rows claim nothing) and merges the vector only when every chunk
of the answer was applied (theorem T1). Rows held above the answerer's own vector, its strays, are above the asker's too or
known there already, so they travel by the same selection (R8).

Above a gap the asker often has the steps that came after it. It names those of which it has all rows in a shard, and their rows
are left out of the answer: exactly these, by stamp and shard, not all that is older or younger than something.

When is a pull due? Three signs: a batch's claim has waited for a gap longer than a grace; a peer said a heartbeat ago
that a writer's frontier lies above what ours has reached by now; or digests of vector and strays differ although neither
side moved between two heartbeats. In a busy cluster digests always differ for a moment, which is why the third sign waits.
Without push pulls are regular (`p2p.paper.schedule`), and none of these counts but a difference in strays, where rounds by
shard versions (`p2p.paper.rounds`) would not see it.
"""

from dataclasses import dataclass, field

import numpy as np

from p2p import messages as m
from p2p import wire
from p2p.core import Core, Keyspace
from p2p.errors import RemoteProtocolError
from p2p.link.links import Link
from p2p.members.leaves import LeafNews, source_beside
from p2p.paper.round_answers import RoundAnswers
from p2p.paper.rounds import Rounds
from p2p.paper.shard_versions import OwnVersions
from p2p.placement import may_hold
from p2p.pulling import full
from p2p.pulling.incomplete import complete_source, is_incomplete, note_incomplete
from p2p.pulling.intake import WholeArrivals, check_rows, check_writers, observe, take_rows
from p2p.pulling.outbox import STREAMS_MAX, Outbox
from p2p.pulling.pull_answers import PullAnswers
from p2p.replica import U64
from p2p.stamps import AHEAD_MS_MAX, unix_ms_of, writer_of

# A step that is not whole is looked at after this long. As a rule the rest of it has come by then, and costs no look.
GAP_LOOK_MS = 20
# Messages of one tree come in order. One that was overtaken on its own tree is missing; where the view just changed, or one of
# them was repeated, that heals by itself within this. A pull may cost a scan.
GAP_GRACE_MS = 50
# Those of other trees are merely late: behind a busy card the messages of one step lie this far apart, and a pull for what is
# on its way anyway makes the card busier. Only a last step that nothing follows waits so long for its repair.
LATE_GRACE_MS = 1_000
# A gap that a pull did not close is asked about again after twice the time, this many times: an answer may cost a scan.
GAP_DOUBLINGS_MAX = 5
# Every so many times it is the step's origin that is asked.
ORIGIN_EVERY = 4
# After this many it is given up: whoever had the missing step is gone, and what is left of it spreads as strays (R8).
GAP_TRIES_MAX = 8
# Lives and keyspaces of which we remember when we last got everything.
PULLED_MAX = 65_536
# Lives of which we remember that their last answer brought nothing; of more, who was asked longest ago may be asked again.
IN_VAIN_MAX = 64
# An answer that stands still this long is given up, and asked of somebody else. One behind another waits.
PULL_SILENCE_MS = 3_000
# A question that brought nothing for so long, then for twice as long, and so on, is asked again, since it may be lost; longer
# than most round trips. Who has it lets it be. It says how far we are by now, which counts where it waits for its answer.
REPEAT_MS = 250
REPEATS_SINCE = 2
# A partition that nobody else among the living has held for so long is served as it is: its other holders may be gone for good.
PARTITION_ALONE_MS = 10_000
# Finding strays is a scan when the update cache does not reach back; peers compare once a heartbeat, so more would be wasted.
STRAY_SCAN_MS = 450
# Why a pull is asked for, when a claim waits.
GAP = "gap"


@dataclass(slots=True, eq=False)
class _Asked:
    """A pull on its way."""

    node: str
    boot: int
    request: int
    writers: np.ndarray[tuple[int], np.dtype[np.uint16]]
    base: U64  # uint64[shards, w], our vector when we asked; since then it has only grown
    next_chunk: int
    deadline_ms: int
    asked_ms: int
    repeats: int = 0
    whole: WholeArrivals = field(default_factory=WholeArrivals)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A peer's last summary of a keyspace, and our own state when it came."""

    summary: m.KeyspaceSummary
    own: tuple[int, int]  # digests of our vector and strays
    frontier: tuple[int, ...]  # ours, of the writers in the summary
    keeps: bool  # it holds all that it says, and drops none of it


class Pull:
    """The pulling part of the machine: asks, and notices when to ask; `answers` is the other side."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._asked: dict[int, _Asked] = {}  # by keyspace: one at a time
        self._seen: dict[tuple[str, int, int], _Seen] = {}  # (node, boot, keyspace)
        self.outboxes: dict[str, Outbox] = {}  # by node
        self.answers = PullAnswers(core, self.outboxes)
        self.versions = OwnVersions(core.options.boot, core.rng)
        self.rounds = Rounds(core, self.versions)
        self.round_answers = RoundAnswers(core, self.versions, self.outboxes)
        self._leaf_news = LeafNews(core, self._told_by)
        self._requests = 0
        self._pulled_ms: dict[tuple[int, int], int] = {}  # (boot, keyspace) -> when we asked, of the last that was completed

        # By keyspace: lives whose answers have brought nothing since some answer did.
        self._in_vain: dict[int, dict[int, None]] = {}

    @property
    def asking(self) -> dict[int, str]:
        """Keyspace -> node of the pull on its way."""
        return {keyspace: asked.node for keyspace, asked in self._asked.items()}

    @property
    def summaries(self) -> int:
        """Heartbeats' summaries that are kept, to be compared with the next."""
        return len(self._seen)

    # --- asking

    def ask(self, keyspace: Keyspace, link: Link, now: m.Now, why: str) -> None:
        """Pull a keyspace from a peer that holds it, unless a pull of it is on its way."""
        number = keyspace.replica.keyspace
        if full.pauses(keyspace, now):
            return
        if is_incomplete(self._core, link.boot, number):
            link = complete_source(self._core, keyspace, now, tuple(self._in_vain.get(number, ()))) or link
        if number in self._asked or sum(asked.node == link.node for asked in self._asked.values()) >= STREAMS_MAX:
            return  # more would be refused; the next heartbeat is soon enough
        self._requests += 1
        request = self._question(keyspace, self._requests)
        self._asked[number] = _Asked(
            link.node,
            link.boot,
            self._requests,
            request.writers,
            request.vector,
            0,
            now.monotonic_ms + PULL_SILENCE_MS,
            now.monotonic_ms,
        )
        self._core.counters.pulls_started += 1
        self._core.note("pull_started", peer=link.node, keyspace=number, why=why)
        self._core.send(link, request)

    def tell_vector(self, keyspace: Keyspace, link: Link, request: int) -> int:
        """Answer a parent in state mode (`p2p.busy.feeds`); 0 stands for a new question. Returns the question's number."""
        if not request:
            self._requests += 1
            request = self._requests
        asked = self._asked.get(keyspace.replica.keyspace)
        if asked is not None and asked.boot == link.boot and not asked.next_chunk and keyspace.synced:
            self._abandon(keyspace.replica.keyspace, "the peer sends it by priority")
        self._core.send(link, self._question(keyspace, request, backlog=True))
        return request

    def _question(self, keyspace: Keyspace, number: int, *, backlog: bool = False) -> m.PullRequest:
        knowledge = keyspace.knowledge
        writers = knowledge.writers
        nonces = [self._core.writers.nonce_of(keyspace.replica.place.family, writer) for writer in writers.tolist()]
        return m.PullRequest(
            keyspace.replica.keyspace,
            number,
            writers,
            np.ascontiguousarray(knowledge.vector[:, writers]),
            knowledge.frontier[writers],
            knowledge.shards,
            np.array(nonces, np.uint64),
            self._core.retired_digest,
            knowledge.known_steps(wire.KNOWN_BYTES_MAX),
            backlog,
        )

    def _repeat(self, now: m.Now) -> None:
        """Ask again where nothing has come. Whichever question is answered, its base is not above our vector now (T1)."""
        for number, asked in self._asked.items():
            due_ms = self._repeat_ms(asked)
            if due_ms is not None and now.monotonic_ms >= due_ms:
                asked.repeats += 1
                self._core.send(self._core.by_boot[asked.boot], self._question(self._core.keyspaces[number], asked.request))

    def _repeat_ms(self, asked: _Asked) -> int | None:
        """When a question is asked again, if nothing comes; None: never."""
        link = self._core.by_boot.get(asked.boot)
        # Without push questions come regularly; and version 1 would begin its answer anew.
        if asked.next_chunk or link is None or link.version < REPEATS_SINCE or not self._core.options.sync.push:
            return None
        return asked.asked_ms + REPEAT_MS * ((2 << asked.repeats) - 1)

    def on_reply(self, link: Link, reply: m.PullReply, now: m.Now) -> int:
        """Apply one chunk; with the last one, merge the answerer's vector.

        Returns:
            How many of its rows were new here.

        Raises:
            RemoteProtocolError: rows that do not fit, or stamps from the future; the pull is given up.
        """
        core = self._core
        asked = self._asked.get(reply.keyspace)
        if asked is None or (asked.boot, asked.request) != (link.boot, reply.request):
            return 0
        if reply.chunk != asked.next_chunk:
            self._abandon(reply.keyspace, "a chunk is missing")
            return 0
        keyspace = core.keyspaces[reply.keyspace]
        try:
            self._check_reply(keyspace, reply, now)
        except RemoteProtocolError:
            self._abandon(reply.keyspace, "a chunk was refused")
            raise
        if not core.same_writers(link.node, keyspace.replica.place.family, reply.bound.tolist(), reply.nonces.tolist()):
            self._abandon(reply.keyspace, "the answer knows a writer under another nonce")
            return 0
        asked.next_chunk += 1
        self._put_off_silence(link, now)
        asked.whole.begin(keyspace, reply.whole)
        new = take_rows(core, keyspace, reply.columns, now)
        if new is None:
            self._abandon(reply.keyspace, "there is no room for it")
            full.call_off(core, link, last=reply.last)
            return 0
        if not asked.whole.note(core, keyspace, reply.columns, reply.floor, now):
            self._abandon(reply.keyspace, "there is no room for the loss floor")
            full.call_off(core, link, last=reply.last)
        elif reply.last and not asked.whole.finish(core, keyspace, reply.writers, reply.vector, now):
            self._abandon(reply.keyspace, "there is no room for the loss floor")
        elif reply.last:
            observe(core, reply.vector, reply.frontier)
            self._complete(keyspace, asked, reply, now)
        return new

    def _put_off_silence(self, link: Link, now: m.Now) -> None:
        """A chunk came. A peer streams one answer after the other (`p2p.pulling.outbox`): its other ones wait for this."""
        for asked in self._asked.values():
            if asked.boot == link.boot:
                asked.deadline_ms = now.monotonic_ms + PULL_SILENCE_MS

    def _complete(self, keyspace: Keyspace, asked: _Asked, reply: m.PullReply, now: m.Now) -> None:
        base = np.zeros_like(reply.vector)
        ours = np.searchsorted(reply.writers, asked.writers)
        for column, place in enumerate(ours.tolist()):
            if place < len(reply.writers) and reply.writers[place] == asked.writers[column]:
                base[:, place] = asked.base[:, column]
        self._note_news(keyspace, asked.boot, reply)
        keyspace.knowledge.learn_reply(reply.writers, base, reply.vector, reply.frontier)
        full.note_room(self._core, keyspace, now)
        self._note_caught_up(keyspace, now)
        del self._asked[reply.keyspace]
        while len(self._pulled_ms) >= PULLED_MAX:
            del self._pulled_ms[next(iter(self._pulled_ms))]
        self._pulled_ms[asked.boot, reply.keyspace] = asked.asked_ms
        self._core.counters.pulls_completed += 1
        self._core.note("pull_completed", peer=asked.node, keyspace=reply.keyspace, chunks=asked.next_chunk)

    def _note_news(self, keyspace: Keyspace, boot: int, reply: m.PullReply) -> None:
        """Whether an answer brings what was not known here: else others are asked before its sender is again."""
        number = reply.keyspace
        if (
            reply.vector > keyspace.knowledge.vector[:, reply.writers]
        ).any():  # frontiers move with each beat of an idle writer
            self._in_vain.pop(number, None)
            return
        in_vain = self._in_vain.setdefault(number, {})
        in_vain.pop(boot, None)
        in_vain[boot] = None  # the last one
        while len(in_vain) > IN_VAIN_MAX:
            del in_vain[next(iter(in_vain))]

    def _check_reply(self, keyspace: Keyspace, reply: m.PullReply, now: m.Now) -> None:
        if reply.vector.shape[0] != keyspace.knowledge.shards:
            raise RemoteProtocolError(f"vector of {reply.vector.shape[0]} shards, expected {keyspace.knowledge.shards}")
        floor = () if reply.floor is None else (reply.floor.stamps,)
        check_rows(keyspace, reply.columns, (reply.vector, reply.frontier, *floor), now)
        check_writers(keyspace, reply.writers)
        asked = self._asked[reply.keyspace]
        asked.whole.check(keyspace.knowledge.shards, reply.whole, reply.last, reply.floor)

    def _abandon(self, keyspace: int, why: str) -> None:
        asked = self._asked.pop(keyspace, None)
        if asked is not None:
            self._core.counters.pulls_abandoned += 1
            self._core.note("pull_abandoned", peer=asked.node, keyspace=keyspace, why=why)

    def abandon_all(self, why: str) -> None:
        """Give up every pull that is on its way, and every answer."""
        for keyspace in list(self._asked):
            self._abandon(keyspace, why)
        for node in self.outboxes:
            self.answers.drop_streams(node)

    def asked_ms(self, boot: int, keyspace: int) -> int:
        """When we asked this life for what we have got from it last, monotonic; -1: never."""
        return self._pulled_ms.get((boot, keyspace), -1)

    def frontier_told(self, keyspace: int, writer: int) -> int:
        """How far anybody said that it has everything of a writer."""
        summaries = [seen.summary for key, seen in self._seen.items() if key[2] == keyspace]
        return max((stamp for summary in summaries for w, stamp in summary.frontier if w == writer), default=0)

    def abandon_from(self, node: str, why: str) -> None:
        """Give up every pull from a peer whose session or life ended."""
        self.rounds.abandon_from(node, why)
        for keyspace in [keyspace for keyspace, asked in self._asked.items() if asked.node == node]:
            self._abandon(keyspace, why)

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped: neither a question nor an answer of ours is worth anything any more."""
        self._abandon(keyspace, "it was dropped")
        self._in_vain.pop(keyspace, None)
        for seen in [key for key in self._seen if key[2] == keyspace]:
            del self._seen[seen]
        for pulled in [key for key in self._pulled_ms if key[1] == keyspace]:
            del self._pulled_ms[pulled]
        for outbox in self.outboxes.values():
            outbox.streams.pop(keyspace, None)
        self.answers.forget_keyspace(keyspace)
        self.rounds.forget_keyspace(keyspace)
        self.round_answers.forget_keyspace(keyspace)
        self.versions.by_keyspace.pop(keyspace, None)

    def abandon_answered(self, link: Link, reply: m.PullReply | m.ShardsReply, why: str) -> None:
        """Give up what this is an answer to, if we still wait for it."""
        if isinstance(reply, m.ShardsReply):
            self.rounds.abandon_answered(link, reply, why)
        elif (asked := self._asked.get(reply.keyspace)) and (asked.boot, asked.request) == (link.boot, reply.request):
            self._abandon(reply.keyspace, why)

    def on_incomplete(self, link: Link, told: m.Incomplete, now: m.Now) -> None:
        """A peer has dropped live rows of a keyspace: what we asked of it we ask of somebody who has not (R11)."""
        keyspace = self._core.keyspaces.get(told.keyspace)
        if keyspace is None:
            return
        note_incomplete(self._core, link.boot, told.keyspace)
        asked = self._asked.get(told.keyspace)
        if asked is not None and (asked.boot, asked.request) == (link.boot, told.request):
            self._abandon(told.keyspace, "the peer has dropped rows")
            other = complete_source(self._core, keyspace, now, tuple(self._in_vain.get(told.keyspace, ())))
            if other is not None:
                self.ask(keyspace, other, now, "redirected")
        elif told.request:
            self.rounds.abandon_from(link.node, "the peer has dropped rows")

    def kept_by(self, record: m.MemberRecord, keyspace: int) -> m.KeyspaceSummary | None:
        """What this life of a member has of a keyspace and keeps, as it said last; None: it did not say that."""
        seen = self._seen.get((record.node, record.boot, keyspace))
        return seen.summary if seen is not None and seen.keeps else None

    # --- noticing

    def on_summary(self, link: Link, summary: m.KeyspaceSummary, now: m.Now, *, keeps: bool = False) -> None:
        """Compare a peer's heartbeat with what we hold, and pull when it shows that we lack something."""
        core = self._core
        keyspace = core.keyspaces.get(summary.keyspace)
        if keyspace is None:
            return
        own = self.digests(keyspace, now)
        key = (link.node, link.boot, summary.keyspace)
        before = self._seen.get(key)
        reached = tuple(int(keyspace.knowledge.frontier[writer]) for writer, _ in summary.frontier)
        seen = self._seen[key] = _Seen(summary, own, reached, keeps)
        equal = (summary.vector_digest, summary.stray_digest) == own
        if equal:
            full.note_room(core, keyspace, now)
            self._note_caught_up(keyspace, now)
        if summary.vector_digest == own[0]:
            _learn_frontier(keyspace, summary, now)
            # What we write from now on is above what this peer has seen, so that nothing that it collects is above it (R5).
            core.clock.observe(max((int(keyspace.knowledge.frontier[writer]) for writer, _ in summary.frontier), default=0))
        if not keyspace.synced:
            if not equal or not core.options.sync.push:  # without push no batch will move the frontier
                self.ask(keyspace, source_beside(core, keyspace, link, now), now, "joining")
        elif not equal and before is not None:
            why = self._why_pull(keyspace, before, seen)
            # What a leaf said a heartbeat ago a holder may say by now.
            if why and self._leaf_news.may_ask(keyspace, link, before.summary, now):
                self.ask(keyspace, link, now, why)

    def _told_by(self, record: m.MemberRecord, keyspace: int) -> m.KeyspaceSummary | None:
        """What this life of a member said of a keyspace last."""
        seen = self._seen.get((record.node, record.boot, keyspace))
        return None if seen is None else seen.summary

    def _why_pull(self, keyspace: Keyspace, before: _Seen, seen: _Seen) -> str:
        """What a peer's summaries, a heartbeat ago and now, say that we lack; an empty string when nothing does."""
        sync, summary, own = self._core.options.sync, seen.summary, seen.own
        if sync.push:
            if keyspace.gap_writer is not None:
                return ""  # it is known, and being repaired
            known, now_ms = keyspace.knowledge.frontier, self._core.now_ms
            for (writer, stamp), reached in zip(before.summary.frontier, before.frontier, strict=True):
                if keyspace.feeds and keyspace.fed_with(writer, now_ms):
                    continue  # it is queued for us (R16)
                # Whose frontier has moved is late, not cut off: steps come in order, and the rest is on its way. A busy node is
                # where its writer was a heartbeat ago or more, and would pull what waits in its socket.
                if stamp > int(known[writer]) == reached:
                    return "frontier behind"
        still = (before.summary.vector_digest, before.summary.stray_digest, before.own) == (
            summary.vector_digest,
            summary.stray_digest,
            own,
        )
        if still and sync.push:
            return "" if keyspace.is_fed(self._core.now_ms) else "digests differ"
        # Rounds compare versions, which stand for vectors only. Regular pulls by vector bring strays anyway.
        if still and sync.shard_versions and summary.stray_digest != own[1]:
            return "strays differ"
        return ""

    def _note_caught_up(self, keyspace: Keyspace, now: m.Now) -> None:
        """We hold what a peer held. It may be as new as we are: what living writers are known to have written counts too."""
        if keyspace.synced or any(peer.role == "train" for peer in self._core.expected(now)):
            return
        frontier = keyspace.knowledge.frontier
        known = self._core.membership.live_writers(now.monotonic_ms, keyspace.replica.place)
        # What a writer with a wrong clock says is refused everywhere, so nobody can wait for it (R14).
        told = [w for w in known if unix_ms_of(w.last_stamp) - now.unix_ms <= AHEAD_MS_MAX]
        # Writing goes on: what was written when we first looked is enough. In one of several partitions, the frontier
        # would be behind the writer's newest stamp, which may be of another one, for ever.
        for writer in told:
            keyspace.goal.setdefault(writer.writer, writer.last_stamp)
        keyspace.synced = all(int(frontier[w.writer]) >= keyspace.goal[w.writer] for w in told)

    def next_ms(self, now_ms: int) -> int | None:
        """When `check_gaps` has something to do: a new gap is looked at, one that was seen is asked about, a question given up.

        Exactly then, since where messages get lost some step is open most of the time: a look every 20 ms was a fifth of all
        that a node did.
        """
        moments: list[int] = []
        if self._asked:
            moments += [asked.deadline_ms for asked in self._asked.values()]
            moments += [due_ms for asked in self._asked.values() if (due_ms := self._repeat_ms(asked)) is not None]
        for number, keyspace in self._core.keyspaces.items():
            if not keyspace.knowledge.open_steps:
                keyspace.gap_look_ms = None
            elif not self._is_same_gap(keyspace):
                if keyspace.gap_look_ms is None:
                    keyspace.gap_look_ms = now_ms + GAP_LOOK_MS
                moments.append(keyspace.gap_look_ms)
            elif number not in self._asked:
                moments.append(keyspace.gap_since_ms + self._grace_ms(keyspace))
        until_ms = self.answers.next_ms()
        if until_ms is not None:
            moments.append(until_ms)
        return min(moments) if moments else None

    def check_gaps(self, now: m.Now) -> None:
        """Pull where a claim has waited too long; give up pulls that stand still. Called on the timer."""
        for number in [k for k, asked in self._asked.items() if now.monotonic_ms >= asked.deadline_ms]:
            if (keyspace := self._core.keyspaces.get(number)) is not None:
                keyspace.gap_silent = self._asked[number].node
            self._abandon(number, "no answer")
        self._repeat(now)
        for keyspace in self._core.keyspaces.values():
            self._check_gap(keyspace, now)
            self.answers.on_progress(keyspace, now)
            if not keyspace.synced and keyspace.replica.place.partitions > 1:
                self._check_alone(keyspace, now)

    def _check_alone(self, keyspace: Keyspace, now: m.Now) -> None:
        """Nobody to catch up with: of those who live, nobody else holds this partition."""
        core, place = self._core, keyspace.replica.place
        live = core.membership.live(now.monotonic_ms)
        if not live or core.expected(now) or any(may_hold(record, place) for record in live):
            keyspace.alone_since_ms = None
        elif keyspace.alone_since_ms is None:
            keyspace.alone_since_ms = now.monotonic_ms
        elif now.monotonic_ms - keyspace.alone_since_ms >= PARTITION_ALONE_MS:
            keyspace.synced = True
            core.note("partition_alone", alarm=True, keyspace=place.family, partition=place.partition)

    def _check_gap(self, keyspace: Keyspace, now: m.Now) -> None:
        knowledge = keyspace.knowledge
        keyspace.gap_look_ms = None
        if not self._is_same_gap(keyspace):
            if keyspace.gap_writer is not None:  # what came was above that gap, and maybe below the next one
                keyspace.gap_trees, keyspace.gap_upstream = 0, False
            keyspace.gap_writer = writer_of(knowledge.oldest_open) if knowledge.open_steps else None
            keyspace.gap_frontier = 0 if keyspace.gap_writer is None else int(knowledge.frontier[keyspace.gap_writer])
            keyspace.gap_since_ms, keyspace.gap_tries = now.monotonic_ms, 0
        if keyspace.gap_writer is None or keyspace.replica.keyspace in self._asked:
            return
        if keyspace.feeds and keyspace.fed_with(keyspace.gap_writer, now.monotonic_ms):
            keyspace.gap_since_ms = now.monotonic_ms  # it is queued for us (R16)
            return
        if now.monotonic_ms - keyspace.gap_since_ms < self._grace_ms(keyspace):
            return
        if keyspace.gap_tries >= GAP_TRIES_MAX:
            knowledge.give_up(keyspace.gap_writer)
            return
        # The batch's sender: it is near. If it has the same gap it asks above our region, and we wait for what it gets
        # (`PullAnswers`). So what the origin sends once is not asked of it by every node; but now and then it is, in case, and
        # where the sender left the last question unanswered: it may not hear us, though we hear it.
        turn = keyspace.gap_tries % ORIGIN_EVERY == ORIGIN_EVERY - 1
        asks_origin = keyspace.gap_silent == keyspace.gap_peer or (turn and keyspace.gap_silent != keyspace.gap_origin)
        first, second = keyspace.gap_origin if asks_origin else keyspace.gap_peer, keyspace.gap_origin
        keyspace.gap_silent = ""
        link = self._core.link(first) or self._core.link(second)
        keyspace.gap_since_ms = now.monotonic_ms
        keyspace.gap_tries += 1
        if link is not None and self._core.membership.alive(link.node, now.monotonic_ms):
            self._core.counters.gaps += 1
            self.ask(keyspace, link, now, GAP)

    @staticmethod
    def _grace_ms(keyspace: Keyspace) -> int:
        """How long the gap that we saw last may stay open, since then or since we asked for it."""
        writer = keyspace.gap_writer
        overtaken = keyspace.gap_trees_all in (1, keyspace.gap_trees) or (
            writer is not None and keyspace.knowledge.claims_wait(writer)
        )
        first_ms = GAP_GRACE_MS if overtaken else LATE_GRACE_MS
        # A long grace is not doubled beyond what a short one comes to: a step that nobody has any more is given up as soon.
        return min(first_ms << keyspace.gap_tries, GAP_GRACE_MS << GAP_DOUBLINGS_MAX)

    @staticmethod
    def _is_same_gap(keyspace: Keyspace) -> bool:
        """Whether the gap that we saw last is still open: its writer's frontier stands where it stood, and steps wait above it.

        Not that the same step waits longest: of too many the oldest is dropped, and a grace that begins anew with each would
        never end.
        """
        knowledge, writer = keyspace.knowledge, keyspace.gap_writer
        return writer is not None and int(knowledge.frontier[writer]) == keyspace.gap_frontier and knowledge.awaits(writer)

    def digests(self, keyspace: Keyspace, now: m.Now) -> tuple[int, int]:
        """Digests of our vector and of our strays; the scan for strays runs only when there may be some, and not often."""
        if keyspace.strays_possible and now.monotonic_ms - keyspace.stray_digest_ms >= STRAY_SCAN_MS:
            keyspace.stray_digest = keyspace.replica.stray_digest()
            keyspace.stray_digest_ms = now.monotonic_ms
            keyspace.strays_possible = keyspace.stray_digest != 0
        return keyspace.knowledge.digest(), keyspace.stray_digest

    def forget(self, node: str) -> None:
        """A peer's life ended: drop what was meant for it and what it had told us."""
        self.answers.forget(node)
        self.abandon_from(node, "the peer began a new life")
        self.rounds.forget(node)
        for key in [key for key in self._seen if key[0] == node]:
            del self._seen[key]


def _learn_frontier(keyspace: Keyspace, summary: m.KeyspaceSummary, now: m.Now) -> None:
    """Somebody with our vector has everything of a writer up to some step, so we do.

    Steps without rows move a frontier and no vector. If the last of them, before its writer died, had reached only some, these
    would be ahead for ever, and the others would pull whenever a heartbeat finds a batch on its way.
    """
    knowledge = keyspace.knowledge
    ahead = [
        (w, stamp)
        for w, stamp in summary.frontier
        if stamp > int(knowledge.frontier[w]) and w not in knowledge.settled and unix_ms_of(stamp) - now.unix_ms <= AHEAD_MS_MAX
    ]
    if ahead:
        knowledge.learn_frontier(np.array([w for w, _ in ahead], np.uint16), np.array([stamp for _, stamp in ahead], np.uint64))
