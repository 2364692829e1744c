"""Stopping all writers of a family at once, while their nodes live: a fence, behind which a model is restored (R13, R15).

Think of a newspaper that finds out that this morning's numbers are wrong. It stops the presses everywhere; waits until every
branch has sent in what was printed, and all have the same pile; only then it begins to correct, and nobody but the corrector
may print meanwhile. Afterwards the presses start again, under a new edition number.

A fence is a fact about a family, with an *epoch*; of several the largest counts, so two that fence at once agree without
asking each other. It is told like expulsions and retirements, in the same messages, is in every ledger before anything follows
from it, and goes through stages:

    CLOSING  who hears of it stops its own writer in that moment (also steps that wait to be sent with others, or for an id),
             takes no batch of the family any more, and has all writers that it knows of retired (`p2p.identity.retirement`)
    CLOSED   one coordinator, the first living holder by name, has a report of every member that knows all that it knows itself,
             and holds F of each of these writers, which is all that any member held, and nothing above; that their entries
             leave the vectors (`DONE`) need not be waited for. Only those who restore the family write, each under a fresh id
             that the fence names
    LIFTED   who restored is retired like the others were; publishers go on, under fresh ids

Nothing that a publisher was told to be stored is lost by that while its node lives and is a member: its node reports it, so F
covers it. A member that is silent is waited for, and named, or expelled if the request says so; then it starts over when it is
back, as after every expulsion.

*Whoever dies*: facts are in ledgers and reports are repeated to whoever coordinates by then. A node that starts again gives up
the id that it finds in its memory when its ledger knows of a fence. Who wanted the fence may ask again, at any node, for the
same epoch (it is the same fence) or a larger one (which stops also who restored under the former), or have it lifted.

*Who was away for the whole of a fence*, since it had said goodbye, and comes back with steps that nobody else ever saw, holds
more than was left of their writers, which is nothing: it starts over (`_check_old`). Its stamps tell: everything newer is above
the fence's `stamp`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import FencedError, LocalProtocolError
from p2p.identity.allotment import Allotment
from p2p.identity.retirement import News, Retirement
from p2p.link.links import Link
from p2p.messages.fences import CLOSED, CLOSING, EPOCH_BITS, LIFTED, NOTE_CHARS_MAX, RESTORERS_MAX, Restorer
from p2p.stamps import WRITER_MASK

STAMP_MAX = (1 << 64) - 1
# Requests of local processes that wait for their fence.
REQUESTS_MAX = 64
# Whom a closing fence waits for is told when it has waited for so long: as a rule it is closed by then.
NAMED_AFTER_MS = 2_000


@dataclass(slots=True, eq=False)
class _Request:
    """Somebody here waits for a fence."""

    asked: m.FenceRequested
    epoch: int
    since_ms: int
    waits_for: tuple[str, ...] = ()  # as it was told last
    silent_ms: dict[str, int] = field(default_factory=dict)  # since when it has not been heard


class Fencing:
    """The part of the machine that stops the writers of a family, and lets them go on.

    Args:
        core: shared state.
        allotment: gives ids to those who restore.
        retirement: of writers; tells and learns facts for both.
    """

    def __init__(self, core: Core, allotment: Allotment, retirement: Retirement) -> None:
        self._core = core
        self._allotment = allotment
        self._retirement = retirement
        self._requests: list[_Request] = []
        self._reports: dict[tuple[int, int], dict[int, m.FenceReport]] = {}  # by fence, then by life: its last one
        self._told: dict[tuple[int, int], tuple[object, ...]] = {}  # what we reported last
        families = {family for family, _ in core.record.fences}
        core.fences = {family: fence for family in families if (fence := core.record.fence(family)) is not None}
        # Fences that were closed without us as far as we know, and the writer that we had then; checked when we know all that
        # somebody else knows.
        self._unchecked: dict[tuple[int, int], tuple[int, int] | None] = {
            fence.key: None for fence in core.fences.values() if fence.stage != CLOSING
        }
        retirement.stopped_by, retirement.follow_fences = self._stopped_by, self._follow
        retirement.on_agreed = self._check_old

    # --- what is asked here

    def request(self, asked: m.FenceRequested, now: m.Now) -> None:
        """Stop the writers of a family.

        Raises:
            LocalProtocolError: the family is unknown, the epoch is over, nodes of version 1 would not understand, or there is
                no room to remember it.
        """
        core, family = self._core, asked.family
        if family not in core.families:
            raise LocalProtocolError(f"keyspace {family} does not exist on this node")
        if core.membership.protocol_min_known() < 2:
            raise LocalProtocolError(
                "some node, silent ones included, has protocol version 1, which knows no fence: upgrade it first"
            )
        if len(self._requests) >= REQUESTS_MAX:
            raise LocalProtocolError(f"{REQUESTS_MAX} requests wait for fences on this node already: lift some first")
        known = core.fences.get(family)
        epoch = asked.epoch or (1 if known is None else known.epoch + 1)
        if known is not None and (epoch < known.epoch or (epoch == known.epoch and known.stage == LIFTED)):
            state = "was lifted" if known.stage == LIFTED else "stands"
            raise LocalProtocolError(
                f"epoch {epoch} is over: the fence of epoch {known.epoch} {state}; use a larger one, or 0 for the next"
            )
        if epoch >> EPOCH_BITS:
            raise LocalProtocolError(
                f"no fence of keyspace {family} can be told after epoch {epoch - 1}: load the model as a new generation"
            )
        if known is None or epoch > known.epoch:
            self._retirement.check_room(family, len(self._writers_of(family)))
        self._requests.append(_Request(asked, epoch, now.monotonic_ms))
        # What cannot be written down (half of a pair, as JSON may have it) would be found out when it is.
        note = asked.note[:NOTE_CHARS_MAX].encode("utf-8", "replace").decode()
        fence = m.Fence(family, epoch, note=note)
        core.note("fence_requested", alarm=True, keyspace=family, epoch=epoch, reason=fence.note)
        self._retirement.learn(m.Retirements((), (), (fence,)), None, now)
        self._answer(now)  # it may be closed already

    def lift(self, asked: m.LiftRequested, now: m.Now) -> None:
        """Let the writers of a family go on.

        Raises:
            LocalProtocolError: there is no such fence here, or one of a larger epoch.
        """
        core, family = self._core, asked.family
        known = core.fences.get(family)
        if known is None or known.epoch != asked.epoch:
            which = "no fence" if known is None else f"the fence of epoch {known.epoch}, not of epoch {asked.epoch},"
            raise LocalProtocolError(f"{which} is known here of keyspace {family}: lift the one that stands (`ekko status`)")
        if known.stage != LIFTED:
            lifted = replace(known, stage=LIFTED, until=core.clock.last | WRITER_MASK)
            self._retirement.learn(m.Retirements((), (), (lifted,)), None, now)
        core.emit(m.Lifted(asked.request, family, asked.epoch))

    def check_step(self, step: m.PublishRequested, now: m.Now) -> None:
        """Refuse a step that may not be written now; have an id for who restores.

        Raises:
            FencedError: its family is fenced.
            LocalProtocolError: it was to go through another fence than stands, or through one that is not closed yet.
            NotYetError: there is no id for it yet.
        """
        core, family = self._core, step.keyspace
        fence, epoch = core.fence(family), step.through_fence
        if not epoch:
            if fence is not None:
                core.counters.steps_refused_fenced += 1
                why = f": {fence.note}" if fence.note else ""
                raise FencedError(
                    f"it is fenced, and its writers are stopped (epoch {fence.epoch}{why}): publish again when that is over "
                    "(`ekko status` shows it), and read what was restored first; nothing was published",
                    fence.epoch,
                )
            return
        if fence is None or fence.epoch != epoch:
            stands = "none stands" if fence is None else f"that of epoch {fence.epoch} does"
            raise LocalProtocolError(f"no fence of epoch {epoch} stands before keyspace {family}, {stands}: fence it again")
        if fence.stage != CLOSED:
            raise LocalProtocolError(f"the fence of epoch {epoch} is not closed yet: write when it was answered")
        keyspaces = core.families.get(family)
        if keyspaces and keyspaces[0].replica.writer is None:
            self._become_restorer(fence, keyspaces, now)

    def _become_restorer(self, fence: m.Fence, keyspaces: Sequence[Keyspace], now: m.Now) -> None:
        if len(fence.restorers) >= RESTORERS_MAX:
            raise LocalProtocolError(f"{RESTORERS_MAX} nodes have written behind this fence already: fence the model again")
        self._allotment.become_writer(keyspaces, now)
        identity = keyspaces[0].replica.writer
        assert identity is not None
        who = Restorer(identity.writer, identity.nonce, self._core.clock.last | WRITER_MASK)
        self._retirement.learn(m.Retirements((), (), (replace(fence, restorers=(*fence.restorers, who)),)), None, now)

    def restored_spans(self, family: int, since: int) -> list[tuple[int, int, int]]:
        """(id, low, high) of everybody who restored a family behind fences of larger epochs than `since` that are lifted: what
        they wrote has stamps above low, up to high. An id may be another's before and after.
        """
        record, spans = self._core.record, []
        for fence in record.fences.values():
            for one in fence.restorers if fence.family == family and fence.epoch > since and fence.stage == LIFTED else ():
                left = [
                    int(retired.floor.max())
                    for retired in record.retired.values()
                    if (retired.family, retired.writer, retired.nonce) == (family, one.writer, one.nonce) and len(retired.floor)
                ]
                # Until it is known what is left of it, the id is nobody else's.
                spans.append((one.writer, one.since, max(left, default=STAMP_MAX)))
        return spans

    # --- what follows from what was learned

    def _stopped_by(self, news: Sequence[News]) -> Sequence[m.Retired]:
        """Writers whose retirement begins with what was just learned."""
        stopped: list[tuple[int, int, int]] = []
        for before, fence in news:
            if self._core.fences.get(fence.family) is not fence:
                continue  # one of a larger epoch counts
            if before is None and fence.stage == CLOSING:
                stopped += [(fence.family, *writer) for writer in self._writers_of(fence.family)]
            if fence.stage == LIFTED:
                stopped += [(fence.family, one.writer, one.nonce) for one in fence.restorers]
        known = self._core.writers
        return [
            m.Retired(f, f, writer, nonce, m.FROZEN) for f, writer, nonce in stopped if not known.is_retired(f, writer, nonce)
        ]

    def _writers_of(self, family: int) -> list[tuple[int, int]]:
        """(id, nonce) of everybody who may have written to a family, as far as we have heard."""
        core = self._core
        found = {writer: nonce for (bound, writer), nonce in core.record.bindings.items() if bound == family}
        pairs = dict.fromkeys(found.items())
        for member in core.membership.members.values():
            pairs |= dict.fromkeys((one.writer, one.nonce) for one in member.record.writers if one.keyspace == family)
        for fence in core.record.fences.values():
            pairs |= dict.fromkeys((one.writer, one.nonce) for one in fence.restorers if fence.family == family)
        if (identity := self._own_writer(family)) is not None:
            pairs[identity] = None
        return [pair for pair in pairs if not core.writers.is_retired(family, *pair)]

    def _own_writer(self, family: int) -> tuple[int, int] | None:
        keyspaces = self._core.families.get(family)
        identity = keyspaces[0].replica.writer if keyspaces else None
        return None if identity is None else (identity.writer, identity.nonce)

    def _follow(self, news: Sequence[News], now: m.Now) -> None:
        """Facts were learned, which are durable by now; or only who is retired."""
        core = self._core
        closing = {fence.key for fence in core.fences.values() if fence.stage == CLOSING}
        self._reports = {key: reports for key, reports in self._reports.items() if key in closing}
        for before, fence in news:
            if core.fences.get(fence.family) is not fence:
                continue
            core.clock.observe(max(fence.stamp, fence.until))
            if before is None or before.stage != fence.stage:
                teller = core.by_boot.get(core.source)  # whom an operator asks who fences what nobody here wanted fenced
                told_by = "" if teller is None else teller.node
                core.note(
                    "fence",
                    keyspace=fence.family,
                    epoch=fence.epoch,
                    stage=fence.stage,
                    reason=fence.note,
                    told_by=told_by,
                )
            own = self._own_writer(fence.family)
            if before is None and fence.stage != CLOSING:
                self._unchecked[fence.key] = own
            began = before is None or (fence.stage == LIFTED and before.stage != LIFTED)
            if began and own is not None and not (fence.stage == CLOSED and fence.lets_pass(*own)):
                core.stop_writing(fence.family)
            if fence.stage != LIFTED:
                self._drop_queued(fence)
        self._progress(now)
        self._answer(now)

    def _drop_queued(self, fence: m.Fence) -> None:
        """Batches that wait for credit would be refused by everybody who knows what we know."""
        for keyspace in self._core.families.get(fence.family, ()):
            for link in self._core.links.values():
                link.waiting.drop(keyspace.replica.keyspace)

    def _check_old(self, now: m.Now) -> bool:
        """We know all that somebody else knows: what we hold of writers that nobody else had heard of when a fence was closed
        without us is more than was left of them. False: so it is, and we start over.
        """
        for key in list(self._unchecked):
            own, fence = self._unchecked.pop(key), self._core.record.fences.get(key)
            for keyspace in self._core.families.get(key[0], ()):
                if fence is not None and self._holds_old(keyspace, fence, own):
                    self._retirement.start_over(now, f"this node was away while its writers were stopped (epoch {fence.epoch})")
                    return False
        return True

    def _holds_old(self, keyspace: Keyspace, fence: m.Fence, own: tuple[int, int] | None) -> bool:
        core, family = self._core, fence.family
        for writer in keyspace.knowledge.writers.tolist():
            nonce = core.writers.nonce_of(family, writer)
            passed = any((one.writer, one.nonce) == (writer, nonce) for one in fence.restorers)
            if not nonce or passed or core.writers.is_retired(family, writer, nonce):
                continue
            held = self._retirement.held(keyspace, writer)
            for one in core.record.retired.values():  # the id had other owners before
                if (one.keyspace, one.writer) == (keyspace.replica.keyspace, writer) and len(one.floor):
                    held = np.where(held > one.floor, held, np.uint64(0))
            written = held[held > 0]
            if len(written) and ((writer, nonce) == own or int(written.min()) <= fence.stamp):
                return True
        return False

    # --- closing

    def on_timer(self, now: m.Now) -> None:
        """Called at every heartbeat."""
        self._told.clear()
        self._progress(now)
        self._answer(now)
        for request in self._requests:
            self._name_missing(request, now)

    def _progress(self, now: m.Now) -> None:
        """Report to who coordinates; or close what can be closed, when that is us."""
        core = self._core
        closing = [fence for fence in core.fences.values() if fence.stage == CLOSING]
        if not closing:
            return
        coordinator = self._coordinator(now)
        if coordinator is None:
            self._close(closing, now)
            return
        link = core.link(coordinator)
        for fence in closing if link is not None else ():
            report = self._own_report(fence)
            said = (coordinator, report.retired_digest, report.reached, report.boots)
            if link is not None and self._told.get(fence.key) != said:
                self._told[fence.key] = said
                core.send(link, report)

    def _coordinator(self, now: m.Now) -> m.NodeId | None:
        """The first living holder by name; None when it is us."""
        core = self._core
        first = min((holder.node for holder in core.membership.holders(now.monotonic_ms)), default=core.options.node)
        return None if first == core.options.node else first

    def _own_report(self, fence: m.Fence) -> m.FenceReport:
        core = self._core
        return m.FenceReport(fence.family, fence.epoch, core.retired_digest, self._reached(fence), tuple(sorted(self._lives())))

    def _reached(self, fence: m.Fence) -> bool:
        """Whether we hold all that is left of each of the writers of a family, in all of it that is here. Nothing is above:
        who holds more than a floor starts over when it hears of it.
        """
        core, family = self._core, fence.family
        keyspaces = core.families.get(family)
        if keyspaces is None:
            return True
        return all(keyspace.synced for keyspace in keyspaces) and all(
            self._holds(core.keyspaces[one.keyspace], one)
            for one in core.record.retired.values()
            if one.family == family and one.stage != m.DONE and one.keyspace in core.keyspaces
        )

    @staticmethod
    def _holds(keyspace: Keyspace, retired: m.Retired) -> bool:
        if retired.stage != m.FLOORED:
            return False
        held = keyspace.knowledge.vector[:, retired.writer]
        return len(retired.floor) == 0 or bool((held >= retired.floor).all())

    def _lives(self) -> dict[int, m.NodeId]:
        """Lives of the other members, also of those that are away for however long; not of those that left or were expelled."""
        core, gone = self._core, self._core.membership.suspicion.gone
        members = core.membership.members
        lives = {one.record.boot: node for node, one in members.items() if not gone[one.slot]}
        lives |= {one.boot: node for node, one in core.record.absent.items() if node not in members and not one.left}
        return {boot: node for boot, node in lives.items() if boot not in core.record.expelled}

    def on_report(self, link: Link, report: m.FenceReport, now: m.Now) -> None:
        """A member says how far it is."""
        fence = self._core.fences.get(report.family)
        if fence is None or fence.epoch != report.epoch or fence.stage != CLOSING:
            return  # the digests will tell one of us
        self._reports.setdefault(fence.key, {})[link.boot] = report
        self._close((fence,), now)

    def _close(self, fences: Sequence[m.Fence], now: m.Now) -> None:
        """As coordinator: everybody knows what we know, and is done with all writers. Those that are ready go together: what is
        told of one is written down, and changes what the reports on the others have to agree with.
        """
        core = self._core
        if self._coordinator(now) is not None or self._retirement.misses(now):
            return
        ready = [fence for fence in fences if self._reached(fence) and not self._missing(fence)]
        if ready:
            stamp = core.clock.last | WRITER_MASK
            closed = tuple(replace(fence, stage=CLOSED, stamp=stamp) for fence in ready)
            self._retirement.learn(m.Retirements((), (), closed), None, now)

    def _missing(self, fence: m.Fence) -> tuple[str, ...]:
        """As coordinator: whose report we wait for."""
        core, reports, lives = self._core, self._reports.get(fence.key, {}), self._lives()
        good = {
            boot for boot, one in reports.items() if one.reached and one.retired_digest == core.retired_digest and boot in lives
        }
        missing = [node for boot, node in lives.items() if boot not in good]
        # Newcomers that only others have met; of lives that ended their nodes' next ones have told, or will.
        told = {boot for boot in good for boot in reports[boot].boots}
        register = {member.record.boot for member in core.membership.members.values()}
        strangers = told - lives.keys() - register - core.record.expelled.keys() - {core.options.boot}
        return tuple(sorted({*missing, *(f"life {boot:016x}" for boot in strangers)}))

    # --- answers

    def _answer(self, now: m.Now) -> None:
        """Tell those who wait what has become of their fence."""
        for request in list(self._requests):
            number, family, epoch = request.asked.request, request.asked.family, request.epoch
            fence = self._core.fences.get(family)
            if family not in self._core.families:
                self._core.emit(m.Refused(number, "the model was dropped while this waited for it to be fenced"))
            elif fence is None or fence.epoch != epoch:
                why = "this node started over" if fence is None else f"a fence of epoch {fence.epoch} has taken its place"
                self._core.emit(m.Refused(number, f"the fence of epoch {epoch} does not count any more: {why}"))
            elif fence.stage == LIFTED:
                self._core.emit(m.Refused(number, f"the fence of epoch {epoch} was lifted before it was closed"))
            elif fence.stage == CLOSED:
                self._core.emit(m.Fenced(number, family, epoch, fence.stamp))
            else:
                continue
            self._requests.remove(request)

    def _name_missing(self, request: _Request, now: m.Now) -> None:
        """Name whom a request waits for, and let go of whom it does not wait for any longer."""
        if now.monotonic_ms - request.since_ms < NAMED_AFTER_MS:
            return
        core, family = self._core, request.asked.family
        silent = self._silent(now)
        request.silent_ms = {node: request.silent_ms.get(node, now.monotonic_ms) for node in silent}
        nodes = set(silent)
        fence = core.fences[family]
        if self._coordinator(now) is None:
            nodes |= set(self._missing(fence))
        waits_for = tuple(sorted(nodes))
        if waits_for != request.waits_for:
            request.waits_for = waits_for
            core.emit(m.FenceWaits(request.asked.request, family, request.epoch, waits_for))
        after_ms = request.asked.expel_after_ms
        for node, since_ms in request.silent_ms.items():
            if after_ms is None or now.monotonic_ms - since_ms < after_ms:
                continue
            try:
                self._retirement.let_go(node, now, f"silent while keyspace {family} was fenced")
            except LocalProtocolError as error:
                core.note("not_expelled", node=node, reason=str(error))

    def _silent(self, now: m.Now) -> list[m.NodeId]:
        """Members that are not heard and did not say goodbye, as far as we know."""
        core, members = self._core, self._core.membership.members
        away = [node for node, one in core.record.absent.items() if not one.left and node not in members]
        silent = [*core.membership.suspects(), *away, *(peer.node for peer in core.expected(now))]
        return sorted({node for node in silent if not core.membership.alive(node, now.monotonic_ms)})
