"""Members that are gone for good, and what they wrote: expulsion of a life, retirement of its writers (R13).

Think of an author who has died with a part of the manuscript on the desk. The publishers agree first to print nothing more
under the name, then lay together what each of them has got, and from then on that is the whole work: whoever turns up with
further pages later throws them away, and starts with a fresh copy.

*Expulsion* names a life (its boot nonce) of a node. It is decided by the operator or after a long absence
(`p2p.identity.absence`), told to everybody, kept for ever, and makes the life a stranger: its records and its knowledge are
refused. Who learns that its own life, or an earlier one whose memory it still uses, was expelled drops what it holds and joins
anew (`StartOver`).

*Retirement* of a writer goes through three stages, each told to everybody and kept:

    FROZEN   nobody takes batches of it any more, and every member reports what it holds of it (rows above the vector included)
    FLOORED  one coordinator, the first living holder by name, has pulled from each who reported more than it held itself; what
             it holds now is all that there is: F. Members pull up to F and say so
    DONE     all have reached F. The entry leaves vectors, digests and pulls, and the id may be bound to another nonce

The same happens to all writers of a family at once when it is fenced for a rollback (`p2p.identity.fence`): there the nodes
live on, stop writing in the moment in which they hear of it, and go on under fresh ids afterwards. So does whoever finds that
the writer that it uses is retired: nothing of it would be taken any more.

Two nodes pull from each other only while they agree on all this (a digest in the request), so that what was refused once cannot
come back by way of somebody who does not know yet. Who holds more than F of a writer, because it was away, starts over: the
rule's "reset that shard", for all shards at once, since a node that was away for so long lacks more than that.

A coordinator that dies is replaced by the next one by name, which asks again: reports are repeated until the stage changes.
Of two floors the one of the later stage counts, then the larger.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import LocalProtocolError
from p2p.identity.absence import Absence, absent_of
from p2p.identity.ledger import Absent
from p2p.link.links import Link
from p2p.members.membership import HEARTBEAT_MS
from p2p.messages import DONE, FLOORED, FROZEN
from p2p.pulling.pull import Pull
from p2p.replica import PARTITIONS_MAX, U64
from p2p.stamps import WRITERS_MAX, check_not_ahead

# Kept for ever and told to every newcomer. A cluster that needs more expels a node a day for eleven years. A writer makes an
# entry, and where its model is divided one more for each partition: a thousand writers of models with 64 of them.
EXPELLED_MAX = 4_096
RETIRED_MAX = 65_536
# Floors kept: of all keyspaces, and of those that are not held here, whose number of shards is whatever a peer says. They are
# in the ledger, too, which has 16 MiB. 8 MiB are those of 16,384 writers of models of 64 shards.
FLOOR_BYTES_MAX = 8 << 20
STRANGE_FLOOR_BYTES_MAX = 2 << 20
# Sets that differ are told in full, cut into messages of about so much and about so many entries of at most ten items each.
TOLD_BYTES_MAX = 1 << 20
TOLD_ENTRIES_MAX = 4_096
# So many stages that begin at once are told one by one in the log.
FOLLOWED_NOTES_MAX = 64
# Reports are repeated, since any of them and its receiver may be lost.
REPORT_MS = 2 * HEARTBEAT_MS

Key = tuple[int, int, int]  # keyspace, writer, nonce
News = tuple[m.Fence | None, m.Fence]  # a fence as it was known before, if it was, and as it is now


class Retirement:
    """The part of the machine that lets go of members and writers."""

    def __init__(self, core: Core, pull: Pull) -> None:
        self._core = core
        self._pull = pull
        self._absence = Absence(core)
        self._reports: dict[Key, dict[int, tuple[U64, int]]] = {}  # of this stage, by life: what it holds, when we heard
        self._open = self._find_open()
        self._report_ms = 0
        self._told_ms = -HEARTBEAT_MS
        self._farewell_ms = -HEARTBEAT_MS
        self._apart: dict[int, None] = {}  # lives that we expelled and that expelled us, of which a person was told
        # What `p2p.identity.fence` has to do with it: which writers new fences stop, what follows from them, and that we know
        # the same as somebody else.
        self.stopped_by: Callable[[Sequence[News]], Sequence[m.Retired]] = lambda _: ()
        self.follow_fences: Callable[[Sequence[News], m.Now], None] = lambda *_: None
        self.on_agreed: Callable[[m.Now], bool] = lambda _: True

    # --- deciding

    def expel(self, request: m.ExpelRequested, now: m.Now) -> None:
        """The operator says that a node will not come back as it was. Raises as `let_go`."""
        self._core.emit(m.Expelled(request.request, request.node, self.let_go(request.node, now, "by the operator")))

    def let_go(self, node: m.NodeId, now: m.Now, why: str) -> int:
        """Expel the life of a node that we saw last; returns how many writers are retired with it.

        Raises:
            LocalProtocolError: it is us, it is alive, nobody knows it, or nodes of version 1 would not understand.
        """
        core = self._core
        member, absent = core.membership.members.get(node), core.record.absent.get(node)
        if node == core.options.node:
            raise LocalProtocolError(f"node {node!r} cannot expel itself: ask another node")
        if core.membership.alive(node, now.monotonic_ms):
            raise LocalProtocolError(f"node {node!r} is alive: stop it first, then expel it")
        if core.membership.protocol_min_known(but=node) < 2:
            raise LocalProtocolError(
                "some node, silent ones included, has protocol version 1, which knows no expulsion: upgrade all nodes first"
            )
        if member is None and absent is None:
            if any(expelled.node == node for expelled in core.record.expelled.values()):
                raise LocalProtocolError(f"node {node!r} was expelled already, and has not come back since")
            raise LocalProtocolError(f"no node {node!r} is known here, present or absent: look at the members in `ekko status`")
        if member is not None:
            absent = absent_of(member.record, member.record.left)
        assert absent is not None
        if not self._has_room(absent):
            raise LocalProtocolError(
                f"{len(core.record.expelled)} lives were expelled in this cluster already, with {len(core.record.retired)} "
                "entries of their writers, and no more can be kept"
            )
        return self._expel(absent, now, why)

    def _has_room(self, absent: Absent) -> bool:
        """Whether its expulsion can be kept without another's being dropped."""
        core = self._core
        entries = sum(self._entries_of(writer.keyspace) for writer in absent.writers)
        return len(core.record.expelled) < EXPELLED_MAX and len(core.record.retired) + entries <= RETIRED_MAX

    def _entries_of(self, family: int) -> int:
        """How many entries a writer of a family takes."""
        held = self._core.families.get(family)
        partitions = PARTITIONS_MAX if held is None else held[0].replica.place.partitions
        return 1 if partitions == 1 else 1 + partitions

    def check_room(self, family: int, writers: int) -> None:
        """Refuse to retire so many writers of a family that is held here, where they could not be kept.

        Raises:
            LocalProtocolError: naming the bound.
        """
        core = self._core
        entries = len(core.record.retired) + writers * self._entries_of(family)
        shards = sum(keyspace.knowledge.shards for keyspace in core.families[family])
        floors = floor_bytes(core) + 8 * writers * shards
        if entries > RETIRED_MAX or floors > FLOOR_BYTES_MAX:
            raise LocalProtocolError(
                f"{writers} writers of this model would be retired: their record would have {entries} entries and "
                f"{floors >> 20} MiB, and can have {RETIRED_MAX} and {FLOOR_BYTES_MAX >> 20}: load it as a new generation"
            )

    def _expel(self, absent: Absent, now: m.Now, why: str) -> int:
        """Returns how many writers are retired with it."""
        core = self._core
        expulsion = m.Expulsion(absent.node, absent.boot, absent.boot_ms)
        # The family's own number is a keyspace's where it has one partition; else whoever holds some puts in theirs (`learn`).
        retired = [
            m.Retired(writer.keyspace, writer.keyspace, writer.writer, writer.nonce, FROZEN) for writer in absent.writers
        ]
        core.note("node_expelled", alarm=True, node=absent.node, why=why, writers=len(absent.writers))
        self.learn(m.Retirements((expulsion,), tuple(retired)), None, now)
        return len(absent.writers)

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped: nobody reports on it any more. Who wrote it stays retired there."""
        for key in [key for key in self._reports if key[0] == keyspace]:
            del self._reports[key]

    # --- learning

    def on_retirements(self, told: m.Retirements, source: Link | None, now: m.Now) -> None:
        """A peer, or somebody whom we do not know any more, tells what it knows.

        Raises:
            RemoteProtocolError: a floor lies in the future; nothing is changed.
        """
        for retired in told.retired:
            check_not_ahead(int(retired.floor.max(initial=np.uint64(0))), now.unix_ms)
        for fence in told.fences:
            since = max((restorer.since for restorer in fence.restorers), default=0)
            check_not_ahead(max(fence.stamp, fence.until, since), now.unix_ms)
        self.learn(told, source, now)

    def on_farewell(self, told: m.Retirements, sender_boot: int, now: m.Now) -> None:
        """Somebody who is no peer of ours any more says that we are none of his; anything else of strangers means nothing.

        Whom we have expelled before has no say: two sides that expelled each other stay apart until an operator decides.

        Raises:
            RemoteProtocolError: as `on_retirements`.
        """
        core = self._core
        if not any(expulsion.boot in core.record.lives for expulsion in told.expulsions):
            return
        other = core.record.expelled.get(sender_boot)
        if other is None:
            self.on_retirements(told, None, now)
        elif sender_boot not in self._apart:
            self._apart[sender_boot] = None
            core.note(
                "expelled_each_other",
                alarm=True,
                node=other.node,
                remedy="both sides go on by themselves: stop the nodes of one, remove their run_dir, and start them again",
            )

    def learn(self, told: m.Retirements, source: Link | None, now: m.Now) -> None:
        """Merge what a peer knows, or we decided; durable before anything follows from it."""
        core = self._core
        record = core.record
        told_lives = [one for one in told.expulsions if one.boot not in record.expelled]
        record.expelled.update((one.boot, one) for one in told_lives)
        dropped = len(record.trim_expelled(EXPELLED_MAX))
        new = [one for one in told_lives if one.boot in record.expelled]
        for expulsion in new:
            absent = record.absent.get(expulsion.node)
            if absent is not None and absent.boot == expulsion.boot:
                del record.absent[expulsion.node]
        fences = record.merge_fences(told.fences, self._families)
        core.fences.update((fence.family, fence) for _, fence in fences if record.fence(fence.family) is fence)
        self._forget_fences()
        named = (*told.retired, *self.stopped_by(fences))
        own = (
            m.Retired(keyspace.replica.keyspace, retired.family, retired.writer, retired.nonce, FROZEN)
            for retired in named
            for keyspace in core.families.get(retired.family, ())
        )
        merged: dict[Key, m.Retired] = {}
        refused, room = 0, _Room(core)
        for retired in chain(named, own):
            if not room.admits(retired):
                refused += 1
            elif self._merge(retired):
                room.take(retired)
                merged[retired.key] = retired
            if len(record.retired) >= 2 * RETIRED_MAX:  # a message names more than are kept
                dropped += self._trim()
        dropped += self._trim()
        changed = [retired for key, retired in merged.items() if key in record.retired]
        if refused or dropped:  # one note for all: a message has room for more entries than an event may have effects
            core.counters.retirements_refused += refused + dropped
            core.note(
                "retirements_full", alarm=True, bound=RETIRED_MAX, floor_bytes=FLOOR_BYTES_MAX, refused=refused, dropped=dropped
            )
        if not new and not changed and not fences:
            return
        record.save()
        core.retired_digest = record.retired_digest()
        self._open = self._find_open()
        self._pull.abandon_all("what was retired has changed")
        core.retired_changed()
        self._tell(m.Retirements(tuple(new), tuple(changed), tuple(fence for _, fence in fences)), source, now)
        for expulsion in new:
            self._drop(expulsion)
        if record.is_expelled():
            self.start_over(now, "this node was expelled")
            return
        for retired in changed:
            if len(changed) <= FOLLOWED_NOTES_MAX and retired.keyspace in core.keyspaces:
                core.note("writer_retired", keyspace=retired.keyspace, writer=retired.writer, stage=retired.stage)
            self._follow(retired, now)
        if len(changed) > FOLLOWED_NOTES_MAX:
            core.note("writers_retired", entries=len(changed))
        # Fences first: that all who hold a writer's floor have said so lets the coordinator close a fence, and what is told of
        # the writers next changes what such reports have to agree with.
        self.follow_fences(fences, now)
        self._look(changed, now)

    def _families(self) -> set[int]:
        """Of which the schema tells; nodes that agree on the schema agree on this, whatever each of them holds."""
        return {entry.keyspace for entry in self._core.host.schema()}

    def _forget_fences(self) -> None:
        """What the record does not keep counts no more."""
        core, kept = self._core, {family for family, _ in self._core.record.fences}
        for family in [family for family in core.fences if family not in kept]:
            del core.fences[family]

    def _trim(self) -> int:
        """Keep what everybody keeps of too much; how many entries were dropped."""
        dropped = len(self._core.record.trim_retired(RETIRED_MAX))
        if dropped:
            self._core.writers.remember_retired()
        return dropped

    def _merge(self, told: m.Retired) -> bool:
        """Whether this is news; there is room for it."""
        retired = self._core.record.retired
        known = retired.get(told.key)
        keyspace = self._core.keyspaces.get(told.keyspace)
        if keyspace is not None and len(told.floor) not in (0, keyspace.knowledge.shards):
            return False  # of a keyspace that was made anew with other shards
        if known is not None and len(known.floor) and len(told.floor) not in (0, len(known.floor)):
            return False  # the same, or a lie, of one that is not held here
        if known is None:
            retired[told.key] = told
            self._core.writers.note_retired(told.family, told.writer, told.nonce)
            return True
        if told.stage < known.stage or (told.stage == known.stage and not _above(told.floor, known.floor)):
            return False
        floor = told.floor if told.stage > known.stage else np.maximum(told.floor, known.floor)
        retired[told.key] = replace(told, floor=floor)
        return True

    def _drop(self, expulsion: m.Expulsion) -> None:
        """An expelled life is a stranger."""
        core = self._core
        link = core.by_boot.get(expulsion.boot)
        if link is not None:
            self._pull.forget(link.node)
            core.drop_link(link)
        member = core.membership.members.get(expulsion.node)
        if member is not None and member.record.boot == expulsion.boot:
            core.membership.forget(expulsion.node)
            core.record.part(expulsion.node)
        elif member is None:
            core.record.part(expulsion.node)  # not met in this life, or silent for long

    def _follow(self, retired: m.Retired, now: m.Now) -> None:
        """A stage began."""
        core = self._core
        keyspace = core.keyspaces.get(retired.keyspace)
        self._reports.pop(retired.key, None)
        if keyspace is None:
            return
        bound = core.writers.nonce_of(retired.family, retired.writer)
        if bound not in (0, retired.nonce):
            return  # the id is in use again, so what we hold of it is of another nonce, and at or above this floor
        keyspace.knowledge.give_up(retired.writer)
        own = keyspace.replica.writer
        if own is not None and own.nonce == retired.nonce:
            core.stop_writing(retired.family)
        if retired.stage == FROZEN:
            return
        if _above(self.held(keyspace, retired.writer), retired.floor):
            self.start_over(now, f"this node holds more of writer {retired.writer} than was left of it when it was retired")
        elif retired.stage == DONE:
            if retired.keyspace == retired.family:  # of a family in partitions we may not know who is done with the others
                core.writers.release(retired.family, retired.writer, retired.nonce)
            keyspace.knowledge.retire(retired.writer, retired.floor)

    def start(self, now: m.Now) -> None:
        """The node is up; it may have learned in its former life that it does not belong here any more."""
        if self._core.record.is_expelled():
            self.start_over(now, "this node was expelled")

    def start_over(self, now: m.Now, why: str) -> None:
        """Drop everything and join anew; what nobody else has got is lost, and counted."""
        record = self._core.record
        rows = sum(self._tail(keyspace) for keyspace in self._core.keyspaces.values())
        if record.is_expelled():
            # Who is no member has no say. What it decided while it was cut off is void unless a member knows it, too: then
            # it hears of it again before it pulls anything, like every newcomer.
            forgotten = tuple(one.node for one in record.expelled.values() if one.boot not in record.lives)
            if forgotten:
                self._core.note("expulsions_forgotten", nodes=forgotten)
            record.expelled = {boot: one for boot, one in record.expelled.items() if boot in record.lives}
            record.retired.clear()
            record.fences.clear()
            record.save()
        self._core.emit(
            m.StartOver(
                f"{why}: it drops what it holds and joins anew. {rows} rows that it wrote and that no peer is known to have "
                "are lost with it",
                rows,
            )
        )

    def _tail(self, keyspace: Keyspace) -> int:
        """Rows of our own writer that no peer is known to have."""
        identity = keyspace.replica.writer
        if identity is None:
            return 0
        told = self._pull.frontier_told(keyspace.replica.keyspace, identity.writer)
        base = _only(keyspace, identity.writer, np.full(keyspace.knowledge.shards, told, np.uint64))
        return sum(len(selection.slots) for selection in keyspace.replica.scan_since(base))

    # --- telling

    def compare(self, link: Link, digest: int, now: m.Now) -> bool:
        """Whether a peer knows the same, and we may go on with what we hold; if it does not, it is told, and tells in turn."""
        own = self._core.retired_digest
        if digest == own:
            return self.on_agreed(now)
        if own and now.monotonic_ms - self._told_ms >= HEARTBEAT_MS:
            self._told_ms = now.monotonic_ms
            self.tell_all(link.address, link.envelope())
        return False

    def tell_stranger(self, address: str, boot: int, now: m.Now) -> None:
        """An expelled life calls: tell it everything, at most once a beat for all of them, since that may be megabytes."""
        if now.monotonic_ms - self._farewell_ms >= HEARTBEAT_MS:
            self._farewell_ms = now.monotonic_ms
            self.tell_all(address, m.Envelope(self._core.options.boot, boot))

    def tell_all(self, address: str, envelope: m.Envelope) -> None:
        """Send everything to one node, which may be a stranger."""
        record = self._core.record
        told = m.Retirements(tuple(record.expelled.values()), tuple(record.retired.values()), tuple(record.fences.values()))
        for part in _parts(told):
            self._core.emit(m.Send(address, replace(envelope, version=2), part))

    def _tell(self, told: m.Retirements, source: Link | None, now: m.Now) -> None:
        parts = list(_parts(told))
        for link in self._core.neighbours(now):
            for part in parts if link is not source else ():
                self._core.send(link, part)

    # --- the stages

    def on_timer(self, now: m.Now) -> None:
        """Called at every heartbeat."""
        for absent in self._absence.on_beat(now):
            if self._has_room(absent):
                self._expel(absent, now, f"absent for {self._core.options.expel_after_ms // 1000} s")
        self._retire_former(now)
        open_ = [retired for retired in self._core.record.retired.values() if retired.stage != DONE]
        if not open_ or now.monotonic_ms < self._report_ms:
            return
        self._report_ms = now.monotonic_ms + REPORT_MS
        self._look(open_, now)

    def _find_open(self) -> dict[int, None]:
        """Keyspaces of which some writer's retirement is under way."""
        return dict.fromkeys(one.keyspace for one in self._core.record.retired.values() if one.stage != DONE)

    def _look(self, open_: Iterable[m.Retired], now: m.Now) -> None:
        """Report on these to whoever coordinates them; of those that we coordinate, begin the next stage where all is ready."""
        ours: dict[int, None] = {}
        for retired in open_:
            keyspace = self._core.keyspaces.get(retired.keyspace)
            if keyspace is None or not keyspace.synced or retired.stage == DONE:
                continue
            coordinator = self._coordinator(keyspace, now)
            if coordinator is None:
                ours[retired.keyspace] = None
            elif (link := self._core.link(coordinator)) is not None:
                self._report(keyspace, retired, link, now)
        for number in ours:
            self._advance(self._core.keyspaces[number], now)

    def on_pulled(self, number: int, now: m.Now) -> None:
        """A pull of this keyspace brought all that it was to bring."""
        if number not in self._open:
            return
        self.follow_fences((), now)
        self._look([retired for retired in self._core.record.retired.values() if retired.keyspace == number], now)

    def _retire_former(self, now: m.Now) -> None:
        """Writers of ours that were lost with our memory write no more, and nothing may wait for them (R4, R5)."""
        core, record = self._core, self._core.record
        if not record.own or core.membership.protocol_min_known() < 2:
            return
        for (family, writer), nonce in list(record.own.items()):
            keyspaces = core.families.get(family)
            if keyspaces is None or not all(keyspace.synced for keyspace in keyspaces):
                continue
            identity = keyspaces[0].replica.writer
            # Only once it has a successor: until then we may not even know that we have lost anything.
            if identity is None or identity.nonce == nonce:
                continue
            del record.own[family, writer]
            record.note_change()
            if not core.writers.is_retired(family, writer, nonce) and core.writers.nonce_of(family, writer) == nonce:
                core.note("former_writer_retired", keyspace=family, writer=writer)
                self.learn(m.Retirements((), (m.Retired(family, family, writer, nonce, FROZEN),)), None, now)

    def _coordinator(self, keyspace: Keyspace, now: m.Now) -> m.NodeId | None:
        """The first living holder by name; None when it is us."""
        core = self._core
        holders = core.membership.holders(now.monotonic_ms, keyspace.replica.place)
        first = min((holder.node for holder in holders), default=core.options.node)
        return None if first == core.options.node else first

    def _report(self, keyspace: Keyspace, retired: m.Retired, link: Link, now: m.Now) -> None:
        """Say what we hold of a frozen writer, or that we have reached its floor."""
        held = self.held(keyspace, retired.writer)
        if retired.stage == FLOORED:
            held = keyspace.knowledge.vector[:, retired.writer].copy()
            if _above(retired.floor, held):
                self._pull.ask(keyspace, link, now, "up to the floor of a retired writer")
        self._core.send(link, m.RetireReport(retired.keyspace, retired.writer, retired.nonce, retired.stage, held))

    def on_report(self, link: Link, report: m.RetireReport, now: m.Now) -> None:
        """A member says what it holds; kept for when all have.

        Raises:
            RemoteProtocolError: it holds something of the future; nothing is changed.
        """
        check_not_ahead(int(report.column.max(initial=np.uint64(0))), now.unix_ms)
        retired = self._core.record.retired.get((report.keyspace, report.writer, report.nonce))
        keyspace = self._core.keyspaces.get(report.keyspace)
        if retired is None or keyspace is None or len(report.column) != keyspace.knowledge.shards:
            return
        if report.stage == retired.stage:
            reports = self._reports.setdefault(retired.key, {})
            before = reports.get(link.boot)
            # A repeated report is as old as what it says: what was pulled since is all that it speaks of.
            if before is None or not np.array_equal(before[0], report.column):
                reports[link.boot] = (report.column, now.monotonic_ms)
            self._advance(keyspace, now)

    def _advance(self, keyspace: Keyspace, now: m.Now) -> None:
        """As coordinator: begin the next stage of what everybody is ready for. Writers that were stopped by one fence go
        together: each stage of each of them would have all others begin their pulls anew.
        """
        if self._coordinator(keyspace, now) is not None or not keyspace.synced or self.misses(now):
            return
        number, fenced = keyspace.replica.keyspace, self._core.fenced(keyspace.replica.place.family)
        members = self._core.membership.expected_of(keyspace.replica.place)
        open_ = [one for one in self._core.record.retired.values() if one.keyspace == number and one.stage != DONE]
        begun: list[m.Retired] = []
        for stage in (FROZEN, FLOORED):
            at = [one for one in open_ if one.stage == stage]
            ready = [one for one in at if self._is_ready(keyspace, one, members, now)]
            begun += ready if not fenced or len(ready) == len(at) else []
        if not begun:
            return
        stages: list[m.Retired] = []
        for one in begun:
            if one.stage == FLOORED:
                stages.append(replace(one, stage=DONE))
                continue
            # All that is left of it is here: what we hold is the whole, by decree, since nobody can ever bring more.
            floor = self.held(keyspace, one.writer)
            keyspace.knowledge.settle(one.writer, floor)
            keyspace.strays_possible = True
            stages.append(replace(one, stage=FLOORED, floor=floor))
        self.learn(m.Retirements((), tuple(stages)), None, now)

    def _is_ready(self, keyspace: Keyspace, retired: m.Retired, members: Sequence[m.MemberRecord], now: m.Now) -> bool:
        """Whether the next stage may begin: all have reported, and what they hold is here, or they hold what they should."""
        reports = self._reports.get(retired.key, {})
        if any(record.boot not in reports for record in members):
            return False
        if retired.stage == FLOORED:
            return all(not _above(retired.floor, reports[record.boot][0]) for record in members)
        own = keyspace.knowledge.vector[:, retired.writer]
        for record in members:
            held, heard_ms = reports[record.boot]
            if _above(held, own) and self._pull.asked_ms(record.boot, retired.keyspace) < heard_ms:
                link = self._core.link(record.node)
                if link is not None:
                    self._pull.ask(keyspace, link, now, "what is left of a retired writer")
                return False
        return True

    def misses(self, now: m.Now) -> bool:
        """Whether a member is away of which only our ledger tells, since we have started meanwhile: it may hold more than all
        others. Who left on purpose is not waited for.
        """
        core = self._core
        silent = {node for node, absent in core.record.absent.items() if not absent.left}
        return bool(core.expected(now)) or not silent <= core.membership.members.keys()

    def held(self, keyspace: Keyspace, writer: int) -> U64:
        """uint64[shards]: the newest that we hold of a writer, by the vector or as a row above it."""
        held = keyspace.knowledge.vector[:, writer].copy()
        if not self._has_strays(keyspace):
            return held
        replica = keyspace.replica
        for selection in replica.changed_since(_only(keyspace, writer, held)):
            rows = replica.read(selection.table, selection.slots)
            assert rows.stamps is not None
            np.maximum.at(held, replica.shards_of(rows.keys), rows.stamps)
        return held

    def _has_strays(self, keyspace: Keyspace) -> bool:
        """Whether rows are held above the vector, as of now. Asked first, once for all writers: of a state of a gigabyte a look
        at each of its rows, for each writer and stage, was most of what a fence took.
        """
        if keyspace.strays_possible:
            keyspace.stray_digest, keyspace.stray_digest_ms = keyspace.replica.stray_digest(), self._core.now_ms
            keyspace.strays_possible = keyspace.stray_digest != 0
        return keyspace.stray_digest != 0


def floor_bytes(core: Core) -> int:
    """Bytes of all floors that are kept."""
    return sum(one.floor.nbytes for one in core.record.retired.values())


class _Room:
    """What of one message may still be kept."""

    def __init__(self, core: Core) -> None:
        self._retired = core.record.retired
        self._held = core.keyspaces
        self._sizes = {one.key: one.floor.nbytes for one in self._retired.values()}
        self._bytes = sum(self._sizes.values())
        self._strange_bytes = sum(size for key, size in self._sizes.items() if key[0] not in self._held)

    def admits(self, told: m.Retired) -> bool:
        """Whether there is room for an entry, or for its floor."""
        keyspace = self._held.get(told.keyspace)
        if keyspace is not None and not keyspace.knowledge.has_room_for((told.writer,)):
            return False
        more = self._more(told)
        if more <= 0:
            return True
        strange_bytes = self._strange_bytes + more if keyspace is None else 0
        return self._bytes + more <= FLOOR_BYTES_MAX and strange_bytes <= STRANGE_FLOOR_BYTES_MAX

    def take(self, told: m.Retired) -> None:
        """It was kept."""
        more = self._more(told)
        self._sizes[told.key] = told.floor.nbytes
        self._bytes += more
        self._strange_bytes += more if told.keyspace not in self._held else 0

    def _more(self, told: m.Retired) -> int:
        return told.floor.nbytes - self._sizes.get(told.key, 0)


def _parts(told: m.Retirements) -> Iterator[m.Retirements]:
    """So much cut into messages, expulsions and fences first; at least one.

    All three are cut: a header has room for `HEADER_ITEMS_MAX` items, and whoever sends more is not listened to any more.
    """
    lives, fences, entries = list[m.Expulsion](), list[m.Fence](), list[m.Retired]()
    room, count = TOLD_BYTES_MAX, 0
    for one in chain(told.expulsions, told.fences, told.retired):
        if room <= 0 or count >= TOLD_ENTRIES_MAX:
            yield m.Retirements(tuple(lives), tuple(entries), tuple(fences))
            lives, fences, entries, room, count = [], [], [], TOLD_BYTES_MAX, 0
        count += 1
        room -= 64
        match one:
            case m.Expulsion():
                lives.append(one)
            case m.Fence():
                fences.append(one)
                count += len(one.restorers)
            case m.Retired():
                entries.append(one)
                room -= one.floor.nbytes
    yield m.Retirements(tuple(lives), tuple(entries), tuple(fences))


def _above(one: U64, other: U64) -> bool:
    """Whether any shard of one is above the other's; no floor is below all."""
    if len(one) == 0:
        return False
    return True if len(other) == 0 else bool((one > other).any())


def _only(keyspace: Keyspace, writer: int, column: U64) -> U64:
    """The vector of somebody who has everything but what this writer wrote above `column`."""
    base = np.full((keyspace.knowledge.shards, WRITERS_MAX), np.iinfo(np.uint64).max, np.uint64)
    base[:, writer] = column
    return base
