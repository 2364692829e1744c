"""Heartbeats: who lives, what changed among the members, what everybody holds, and what time it is.

Each interval a node sends a heartbeat to a few members (`Membership.targets`). It carries the sender's record, a bounded number
of other nodes' counters, records that changed lately, a digest of the register, and what the sender holds of each keyspace, by
which the receiver notices that it must pull. A record that changes is also passed on at once, a few milliseconds' worth in one
message, so that trees agree soon after a join. What all that misses, the digest finds: indexes are compared, records sent.

A node whose wall clock differs too much from what the others say refuses to publish (R14), since its stamps would be refused
everywhere, or win over everything.
"""

import numpy as np

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.identity.retirement import Retirement
from p2p.link.links import Link
from p2p.members import membership
from p2p.members.introductions import Introductions
from p2p.members.membership import FANOUT, HEARTBEAT_MS
from p2p.pulling.incomplete import note_standing, standing_of
from p2p.pulling.pull import Pull
from p2p.sizes import SUMMARY_ITEMS_MAX, fitting, items_of
from p2p.stamps import AHEAD_MS_MAX, unix_ms_of

# Heartbeats more each interval for the sake of partitions, one of which none of the usual receivers may hold.
PARTNERS_MAX = FANOUT
# A member that left on purpose is called at every so many of our heartbeats, and a silent one is asked to answer.
CALL_LEFT_BEATS = 4
# Records that change together, in a restart of many, travel together; the more there are, the longer it pays to collect them.
NEWS_DELAY_MS = 10
NEWS_MEMBERS = 50
# A timer this late means that we were not running, and that silence is our own.
LATE_MS = HEARTBEAT_MS // 2
# Beats in a row in which nobody of several was heard: then others should not route through us.
DEAF_BEATS = 6
# Half of what makes a stamp unacceptable (R14): a clock this far off is refused here before it is refused elsewhere.
CLOCK_ERROR_MS_MAX = AHEAD_MS_MAX // 2


class Gossip:
    """The part of the machine that keeps the register current."""

    def __init__(self, core: Core, pull: Pull, introductions: Introductions, retirement: Retirement) -> None:
        self._retirement = retirement
        self._core = core
        self._pull = pull
        self._introductions = introductions
        self.beat_ms = 0  # monotonic time of the next heartbeat
        self._news_ms: int | None = None  # when changed records are passed on
        self._index_ms = -HEARTBEAT_MS  # when we last asked for a comparison of registers
        self._heard = 0  # messages since our last beat
        self._silent_beats = 0
        self._clock_off = False
        self._summary_next = 0  # which keyspace's comes first in the next heartbeat

    def next_ms(self, now_ms: int) -> int:
        """When the timer is wanted next."""
        if not self._core.membership.news:
            self._news_ms = None
        elif self._news_ms is None:
            self._news_ms = now_ms + NEWS_DELAY_MS * (1 + len(self._core.membership.members) // NEWS_MEMBERS)
        return self.beat_ms if self._news_ms is None else min(self.beat_ms, self._news_ms)

    def on_timer(self, now: m.Now) -> None:
        """Beat, and pass news on, when it is time."""
        if now.monotonic_ms >= self.beat_ms:
            self.beat_ms = now.monotonic_ms + HEARTBEAT_MS
            self._beat(now)
        elif self._news_ms is not None and now.monotonic_ms >= self._news_ms:
            news = m.MemberNews((self._core.own_record(), *self._take_news()))
            targets = self._core.membership.targets(now.monotonic_ms, self._core.rng)
            for node in dict.fromkeys([*targets, *self._introductions.take_admitted()]):
                self._send(node, news)

    def note_heard(self) -> None:
        """A message of some member came."""
        self._heard += 1

    def note_late(self, late_ms: int) -> None:
        """We did not run for so long."""
        if late_ms >= LATE_MS:
            self._core.membership.suspicion.excuse(late_ms)
            self._core.note("late", late_ms=late_ms)

    # --- sending

    def _beat(self, now: m.Now) -> None:
        core = self._core
        register = core.membership
        self._look_at_ourselves(now)
        for record in register.expire(now.monotonic_ms):
            link = core.links.get(record.node)
            if link is not None:
                self._introductions.drop_link(link)
            core.emit(m.Forget(record.address))
        core.record.save_peers()
        register.beat()
        beat = self._heartbeat(now)
        for node in dict.fromkeys([*register.targets(now.monotonic_ms, core.rng), *self._partners(now)]):
            self._send(node, beat)
        # Both sides of a split suspect each other: somebody has to call.
        suspects = register.suspects()
        if suspects:
            record = register.members[core.rng.choice(suspects)].record
            if register.own.heartbeat % CALL_LEFT_BEATS == 0:  # what it says of itself counts, whatever we were told of it
                self._introductions.say_hello(record.address, 0, answer_wanted=True, now=now)
            envelope = m.Envelope(core.options.boot, record.boot, version=core.version_with(record))
            core.emit(m.Send(record.address, envelope, beat))
        left = register.left()
        if left and register.own.heartbeat % CALL_LEFT_BEATS == 0:
            # It may come back without knowing anybody: the first node of a cluster has no seeds.
            record = register.members[core.rng.choice(left)].record
            self._introductions.say_hello(record.address, 0, answer_wanted=True, now=now)
        self._introductions.face_other_life(now)
        self._introductions.call_contacts(now)
        self._introductions.call_missing(now)

    def _partners(self, now: m.Now) -> list[m.NodeId]:
        """For some partitions that we hold somebody who holds it, too: only such peers can be compared with us."""
        core = self._core
        places = [k.replica.place for k in core.keyspaces.values() if k.replica.place.partitions > 1]
        drawn = core.rng.sample(places, min(PARTNERS_MAX, len(places)))
        rings = [core.membership.partners(now.monotonic_ms, place) for place in drawn]
        return [core.rng.choice(fingers) for fingers in rings if fingers]

    def _look_at_ourselves(self, now: m.Now) -> None:
        """Whether the beat that ends went as it should, and whether our clock is right."""
        core = self._core
        # One silent peer says nothing of us; several at once do.
        alone = self._heard == 0 and core.membership.live_count(now.monotonic_ms) > 1
        self._silent_beats = self._silent_beats + 1 if alone else 0
        core.membership.suspicion.judge(not alone)
        core.deaf = self._silent_beats >= DEAF_BEATS
        self._heard = 0
        error_ms, peers = core.membership.suspicion.clock_error_ms(now.unix_ms, now.monotonic_ms)
        off = abs(error_ms) >= CLOCK_ERROR_MS_MAX
        if off and not self._clock_off:
            core.note("clock_off", alarm=True, error_ms=error_ms, peers=peers)
        self._clock_off = off

    def _heartbeat(self, now: m.Now) -> m.Heartbeat:
        core = self._core
        register = core.membership
        own = core.own_record()
        boots, counters = register.suspicion.counters(membership.COUNTERS_MAX, core.rng.getrandbits(16))
        summaries = self._summaries(now)
        return m.Heartbeat(
            own,
            self._take_news(),
            core.schema_digest,
            now.unix_ms,
            summaries,
            register.digest(now.monotonic_ms),
            boots,
            counters,
            core.writers.cluster,
            core.retired_digest,
            tuple(standing_of(core.keyspaces[summary.keyspace]) for summary in summaries),
        )

    def _take_news(self) -> tuple[m.MemberRecord, ...]:
        return tuple(self._core.newest(record) for record in self._core.membership.take_news())

    def _summaries(self, now: m.Now) -> tuple[m.KeyspaceSummary, ...]:
        """Of all keyspaces, or of as many as fit; the next heartbeat goes on where this one ends."""
        keyspaces = list(self._core.keyspaces.values())
        told: list[m.KeyspaceSummary] = []
        left = SUMMARY_ITEMS_MAX
        first = self._summary_next % max(1, len(keyspaces))
        for keyspace in (*keyspaces[first:], *keyspaces[:first]):
            summary = self._summary(keyspace, now)
            left -= items_of(summary)
            if left < 0 and told:
                break
            told.append(summary)
        self._summary_next = first + len(told) if len(told) < len(keyspaces) else 0
        return tuple(told)

    def _summary(self, keyspace: Keyspace, now: m.Now) -> m.KeyspaceSummary:
        vector, strays = self._pull.digests(keyspace, now)
        writers = keyspace.knowledge.writers.tolist()
        frontier = tuple((w, int(keyspace.knowledge.frontier[w])) for w in writers if keyspace.knowledge.frontier[w])
        return m.KeyspaceSummary(keyspace.replica.keyspace, vector, strays, frontier)

    def _send(self, node: m.NodeId, message: m.Message) -> None:
        link = self._core.link(node)
        if link is not None:
            self._core.send(link, message)

    # --- receiving

    def on_heartbeat(self, link: Link, beat: m.Heartbeat, now: m.Now) -> None:
        """A member lives, and tells what it knows.

        Raises:
            RemoteProtocolError: it is not the sender's own.
        """
        core = self._core
        register = core.membership
        if beat.member.boot != link.boot or beat.member.node != link.node:
            raise RemoteProtocolError(f"heartbeat of {beat.member.node!r} over the link of {link.node!r}")
        core.writers.adopt_cluster(beat.cluster)
        self._retirement.compare(link, beat.retired_digest, now)
        self._introductions.learn((beat.member,), now, link.node)
        if beat.members:
            self._introductions.learn(beat.members, now, columns=beat.columns)
        member = register.members.get(link.node)
        if member is not None and member.record.boot == link.boot:
            register.suspicion.note_clock(member.slot, beat.unix_ms, now.monotonic_ms)
        register.hear(beat.boots, beat.counters, now.monotonic_ms)
        for counter in beat.counters[beat.boots == np.uint64(register.own.boot)].tolist():
            register.overtake(counter)
        waited = now.monotonic_ms - self._index_ms >= HEARTBEAT_MS
        # A record that is on its way explains a difference; only when nothing moves is it worth a comparison.
        if waited and register.quiet and not beat.members and beat.register_digest != register.digest(now.monotonic_ms):
            self._index_ms = now.monotonic_ms
            core.send(link, m.RegisterIndex(*register.index(now.monotonic_ms), answer_wanted=True))
        if beat.schema_digest != core.schema_digest and link.allowance.admits_answer("schema", now.monotonic_ms):
            core.send(link, m.SchemaUpdate(tuple(core.host.schema())))
        for summary, standing in zip(beat.summaries, beat.standing or (0,) * len(beat.summaries), strict=True):
            note_standing(core, link.boot, summary.keyspace, standing)
            self._pull.on_summary(link, summary, now, keeps=bool(standing & m.KEEPS))

    def on_index(self, link: Link, index: m.RegisterIndex, now: m.Now) -> None:
        """A peer's register differs from ours: send what it lacks, and ask for what we lack."""
        core = self._core
        if not link.allowance.admits_answer("register" if index.answer_wanted else "own register", now.monotonic_ms):
            return
        if link.version >= 2:  # version 1 believes that who has left does not take it back
            self._correct(link, index)
        records, ahead = core.membership.missing_in(index.boots, index.versions, now.monotonic_ms)
        while records:
            part = records[: min(membership.RECORDS_MAX, fitting(records))]
            records = records[len(part) :]
            core.send(link, m.MemberNews(tuple(core.newest(record) for record in part)))
        if ahead and index.answer_wanted:
            core.send(link, m.RegisterIndex(*core.membership.index(now.monotonic_ms), answer_wanted=False))

    def _correct(self, link: Link, index: m.RegisterIndex) -> None:
        """A peer that talks to us does not count us among the living, or knows of a later record of ours than we do."""
        core = self._core
        own = core.own_record()
        told = index.versions[index.boots == np.uint64(own.boot)]
        version = int(told.max()) if len(told) else own.version
        if not own.left and (version > own.version or not len(told)) and core.membership.refute(version):
            core.counters.refuted += 1
            core.send(link, m.MemberNews((core.own_record(),)))

    def clock_agrees(self, now: m.Now) -> bool:
        """Whether somebody has told us the time lately, and our clock is near the median of what was told."""
        error_ms, peers = self._core.membership.suspicion.clock_error_ms(now.unix_ms, now.monotonic_ms)
        return peers > 0 and abs(error_ms) < CLOCK_ERROR_MS_MAX

    def check_clock(self, now: m.Now) -> None:
        """Refuse to write by a clock that the others do not share, or in a future that it shared once (R14).

        Raises:
            LocalProtocolError: it differs too much from the median of theirs; or the next stamp, which follows all before it,
                would be so far ahead that nobody took it.
        """
        error_ms, peers = self._core.membership.suspicion.clock_error_ms(now.unix_ms, now.monotonic_ms)
        if abs(error_ms) >= CLOCK_ERROR_MS_MAX:
            raise LocalProtocolError(
                f"this node's clock is {abs(error_ms) / 1000:.1f} s {'ahead of' if error_ms > 0 else 'behind'} the median of "
                f"{peers} peers, limit {CLOCK_ERROR_MS_MAX / 1000:.0f} s: set the clock (NTP), then publish again"
            )
        ahead_ms = unix_ms_of(self._core.clock.last) - now.unix_ms
        if ahead_ms > AHEAD_MS_MAX:
            raise LocalProtocolError(
                f"this node's last stamp is {ahead_ms / 1000:.1f} s ahead of its clock, which was set back since, and no peer "
                f"takes one later than {AHEAD_MS_MAX / 1000:.0f} s ahead: publish when the clock has come so far, or begin "
                "anew with an empty run_dir"
            )
