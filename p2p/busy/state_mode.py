"""Which links are in state mode, and what they are sent: the sender's side of `p2p.busy.backlog`, for all links of a node."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.busy.backlog import (
    CALM_MS,
    CALM_SHARE,
    CHUNK_BYTES_MAX,
    CHUNKS_PER_EVENT,
    CLAIM_MS,
    LOOK_MS,
    REFUSED_MS,
    ROWS_MAX,
    STATE_SINCE,
    TELL_MS,
    TOLD_MS_MAX,
    WAVES_MS,
    Backlog,
    Cycle,
    Known,
)
from p2p.busy.due import Taken
from p2p.busy.pairs import Pairs, pairs_of
from p2p.core import STATE, Core, Keyspace
from p2p.knowledge import VECTOR_BYTES_MAX
from p2p.link.links import Link
from p2p.pulling.intake import bindings_of
from p2p.pulling.pull_answers import PullAnswers
from p2p.replica import U64, RowColumns

# To whom a batch of an origin goes from us, in a tree: `Push` knows.
Receivers = Callable[[Keyspace, m.NodeId, int], Sequence[m.NodeId]]


class StateMode:
    """All backlogs of a node.

    Args:
        core: shared state.
        answers: selects what a child lacks.
        receivers: whom we send batches of an origin in a tree.
    """

    def __init__(self, core: Core, answers: PullAnswers, receivers: Receivers) -> None:
        self._core = core
        self._answers = answers
        self._receivers = receivers
        self._of: dict[int, dict[int, Backlog]] = {}  # by boot of the child, and keyspace
        self._refused: dict[tuple[int, int], int] = {}  # (boot, keyspace): children that were left to pull, and until when
        self._left: dict[tuple[int, int], int] = {}  # (boot, keyspace): when batches began to pass again
        self._numbers = 0
        self._turns = 0

    @property
    def active(self) -> bool:
        """Whether any link is in state mode."""
        return bool(self._of)

    def of_link(self, link: Link) -> dict[int, Backlog]:
        """Its backlogs, by keyspace; none as a rule."""
        return self._of.get(link.boot, {})

    def rows_max(self) -> int:
        """Rows due in the longest of them."""
        return max((one.due.rows for backlogs in self._of.values() for one in backlogs.values()), default=0)

    # --- entering

    def takes(self, link: Link, keyspace: Keyspace) -> bool:
        """Whether a batch need not be sent, since its rows will be due; where a link is in state mode, for all keyspaces."""
        if link.boot in keyspace.backlogs:
            return True
        return link.boot in self._of and self.enter(link, keyspace, "the link is in state mode for another keyspace")

    def enter(self, link: Link, keyspace: Keyspace, why: str) -> bool:
        """Go into state mode, unless the child cannot or we may not; what waited for credit is due then, too."""
        core, number = self._core, keyspace.replica.keyspace
        if core.options.outbox != STATE or link.version < STATE_SINCE or link.boot in keyspace.backlogs:
            return link.boot in keyspace.backlogs
        if core.now_ms < self._refused.get((link.boot, number), 0) or not core.membership.alive(link.node, core.now_ms):
            return False
        pairs = self._pairs(keyspace, link.node)
        if not pairs.served:
            return False
        self._refused.pop((link.boot, number), None)
        self._numbers += 1
        backlog = Backlog(keyspace, link, pairs, self._numbers, core.now_ms)
        backlog.asked_ms = core.now_ms
        left_ms = self._left.pop((link.boot, number), core.now_ms - WAVES_MS)
        # Without a rate it was not the load, as a rule: the other end stood still, or something was lost.
        backlog.waves = link.bucket is not None and core.now_ms - left_ms < WAVES_MS
        self._of.setdefault(link.boot, {})[number] = backlog
        keyspace.backlogs[link.boot] = backlog
        link.in_state_mode = True
        core.counters.backlogs_begun += 1
        core.note("state_mode_begun", peer=link.node, keyspace=number, why=why)
        self._tell(backlog)
        while link.waiting:  # these would be sent after rows that are newer
            waiting = link.waiting.take().batch
            other = core.keyspaces.get(waiting.keyspace)
            if other is not None and self.enter(link, other, "the link is in state mode for another keyspace"):
                self.note(link, other, waiting)
        return True

    def note(self, link: Link, keyspace: Keyspace, batch: m.Batch) -> None:
        """Rows of a batch are due, which is stored here and was not sent: what selects them later knows no classes."""
        for section in batch.columns:
            if len(section.keys):
                places = keyspace.replica.places_of(section.table, section.keys)
                keyspace.backlogs[link.boot].note(section, places, self._core.now_ms)

    def pass_on(self, keyspace: Keyspace, pairs: Pairs) -> None:
        """We get these by priority and not as batches: so do our children, who would get none."""
        nodes: dict[m.NodeId, None] = {}
        for origin, writer in self._origins(keyspace):
            bits = dict(pairs.served).get(writer, 0)
            for tree in range(self._trees(keyspace)):
                if bits >> tree & 1 or pairs.trees != self._trees(keyspace):
                    nodes.update(dict.fromkeys(self._receivers(keyspace, origin, tree)))
        for node in nodes:
            link = self._core.link(node)
            if link is not None and link.boot not in keyspace.backlogs:
                self.enter(link, keyspace, "it is fed in state mode itself")

    def _origins(self, keyspace: Keyspace) -> Iterator[tuple[m.NodeId, int]]:
        core, family = self._core, keyspace.replica.place.family
        identity = keyspace.replica.writer
        if identity is not None:
            yield core.options.node, identity.writer
        for node in core.membership.writing(family):
            for record in core.membership.members[node].record.writers:
                if record.keyspace == family:
                    yield node, record.writer

    def _trees(self, keyspace: Keyspace) -> int:
        return self._core.membership.trees(self._core.now_ms, keyspace.replica.place).count

    def _pairs(self, keyspace: Keyspace, node: m.NodeId) -> Pairs:
        """Those for which we are the parent of a node, by the view of now (R1)."""
        trees = self._trees(keyspace)
        served = [
            (writer, sum(1 << tree for tree in range(trees) if node in self._receivers(keyspace, origin, tree)))
            for origin, writer in self._origins(keyspace)
        ]
        return pairs_of(trees, served)

    def _is_parent(self, backlog: Backlog) -> bool:
        """Whether the view still gives us exactly these pairs (R1); looked at anew when it changed, and now and then."""
        core, place = self._core, backlog.keyspace.replica.place
        trees = core.membership.trees(core.now_ms, place)
        if backlog.view is not trees or core.now_ms - backlog.looked_ms >= LOOK_MS:
            if self._pairs(backlog.keyspace, backlog.link.node) != backlog.pairs:
                return False
            backlog.view, backlog.looked_ms = trees, core.now_ms
        return True

    # --- what the child is told, and tells

    def _tell(self, backlog: Backlog, on: bool = True) -> None:
        pairs = backlog.pairs
        backlog.told_ms = self._core.now_ms
        number = backlog.keyspace.replica.keyspace
        digest = self._core.retired_digest
        self._core.send(backlog.link, m.Backlogged(number, backlog.number, on, pairs.trees, pairs.writers, pairs.bits, digest))

    def on_vector(self, link: Link, request: m.PullRequest) -> None:
        """The child told its vector: what changed since then is due.

        Raises:
            RemoteProtocolError: the vector is not one of this keyspace.
        """
        backlog = self.of_link(link).get(request.keyspace)
        if backlog is None or request.request <= backlog.request:
            return  # it is over, or asked again
        keyspace = backlog.keyspace
        lacking = self._answers.lacking(link, keyspace, request, backlog.shards)
        if lacking is None:
            return
        below, selections = lacking
        if below.any():
            self._give_up(backlog, "it lacks what was dropped here for good")
            return
        backlog.reset()
        backlog.request, backlog.known = request.request, Known(request.writers, request.vector)
        backlog.select(selections, self._core.now_ms)
        backlog.begin_cycle()
        backlog.stirred = True
        self._pump(link)

    # --- sending

    def pump(self, link: Link) -> None:
        """Send what is due, while there is credit."""
        if link.boot in self._of:
            self._pump(link)

    def pump_all(self) -> None:
        """The same on all links."""
        for boot in list(self._of):
            link = self._core.by_boot.get(boot)
            if link is not None:
                self._pump(link)

    def _pump(self, link: Link) -> None:
        backlogs = self._of.get(link.boot, {})
        for _ in range(CHUNKS_PER_EVENT):
            ready = [one for one in backlogs.values() if self._is_ready(one)]
            if not ready or not link.has_credit():
                break
            chosen = max(ready, key=lambda one: (one.due.urgency, -one.served))
            self._turns += 1
            chosen.served = self._turns
            self._send(chosen)
        for backlog in [one for one in backlogs.values() if one.due.rows > ROWS_MAX]:
            self._give_up(backlog, f"more than {ROWS_MAX} rows are due")
        # All together: a keyspace for which it were left alone would be back with its next batch.
        over = [self._look_after(backlog) for backlog in backlogs.values()]
        for backlog in list(backlogs.values()) if all(over) else ():
            self._end(backlog)

    def _is_ready(self, backlog: Backlog) -> bool:
        if not backlog.request:  # it is asked for its vector: what matters goes ahead, and claims nothing
            return backlog.due.urgency > 0
        if backlog.due.rows:
            return True
        if not backlog.stirred or self._core.now_ms - backlog.claimed_ms < CLAIM_MS:
            return False
        backlog.stirred = backlog.has_moved(self._core.now_ms)
        return backlog.stirred

    def _send(self, backlog: Backlog) -> None:
        """One chunk, with the claim if it is the last of what was recorded."""
        if not self._is_parent(backlog):
            self._again(backlog, "the view gives a pair another parent")
            return
        room = backlog.link.piece_bytes(CHUNK_BYTES_MAX)
        if not backlog.request:
            if columns := self._read(backlog, backlog.due.take_significant(room)):
                self._emit(backlog, columns, claims=False, ends=False)
            return
        if backlog.cycle is None:
            backlog.begin_cycle()
        columns = self._read(backlog, backlog.due.take(room) if backlog.due.rows else [])
        whole = not backlog.due.recorded and not backlog.torn and not backlog.is_below_floor()
        if columns or whole:
            self._emit(backlog, columns, claims=whole, ends=False)
        if not backlog.due.recorded and not whole:
            self._again(backlog, "a row that was due is gone")

    def _read(self, backlog: Backlog, taken: Sequence[Taken]) -> tuple[RowColumns, ...]:
        """The newest versions of rows, with their classes."""
        replica, columns = backlog.keyspace.replica, []
        for one in taken:
            rows = replica.read(one.table, one.places)
            if len(rows.keys) != len(one.places):
                backlog.torn = True
            if len(rows.keys):
                at = np.searchsorted(one.places, replica.places_of(one.table, rows.keys))  # places ascend
                columns.append(RowColumns(rows.table, rows.keys, rows.rows, rows.stamps, one.classes[at]))
        return tuple(columns)

    def _emit(self, backlog: Backlog, columns: tuple[RowColumns, ...], *, claims: bool, ends: bool) -> None:
        core, link, keyspace = self._core, backlog.link, backlog.keyspace
        none = np.empty(0, np.uint16), np.empty(0, np.uint64)
        bound, nonces = bindings_of(core, keyspace) if not backlog.chunks else none
        shards, writers = np.empty(0, np.uint32), np.empty(0, np.uint16)
        until, frontier = np.empty((0, 0), np.uint64), np.empty(0, np.uint64)
        rest_shards, rest = shards, until
        if claims:
            cycle, known = backlog.cycle, backlog.known
            assert cycle is not None
            assert known is not None
            claimed = cycle.until
            moved = np.flatnonzero((claimed > known.of(cycle.writers)).any(axis=1))
            shards, writers = moved.astype(np.uint32), cycle.writers
            until = np.ascontiguousarray(claimed[moved])
            known.raise_to(cycle.writers, claimed)
            frontier, rest_shards, rest = self._frontier(backlog, cycle, until.nbytes, ends)
            backlog.frontier = frontier if len(backlog.frontier) != len(frontier) else np.maximum(backlog.frontier, frontier)
            backlog.cycle, backlog.claimed_ms, backlog.stirred = None, core.now_ms, False
            core.counters.backlog_claims += 1
        claim = shards, writers, until, frontier, rest_shards, rest
        chunk = m.StateChunk(keyspace.replica.keyspace, backlog.request, ends, columns, *claim, bound, nonces)
        claim_bytes = until.nbytes + rest.nbytes
        backlog.sent_bytes += chunk.payload_bytes + claim_bytes
        core.emit(m.Send(link.address, link.next_envelope(chunk.payload_bytes, claim_bytes=claim_bytes), chunk))
        backlog.chunks += 1
        link.traffic.rows_out += chunk.row_count
        link.traffic.bytes_out += chunk.payload_bytes
        core.counters.backlog_rows_sent += chunk.row_count

    def _frontier(self, backlog: Backlog, cycle: Cycle, claim_bytes: int, ends: bool) -> tuple[U64, NDArray[np.uint32], U64]:
        """The frontiers that go with a claim, and the rest of the vector that they take: of all trees, or of those we send."""
        now_ms, whole = self._core.now_ms, backlog.whole
        if not whole.all() and (ends or backlog.tells_rest(now_ms)):
            shards, rest = cycle.rest()
            if claim_bytes + rest.nbytes <= VECTOR_BYTES_MAX:
                backlog.rest_ms, backlog.rest_bytes, backlog.sent_bytes = now_ms, rest.nbytes, 0
                return cycle.frontier, shards, rest
        none = np.empty(0, np.uint32), np.empty((0, len(whole)), np.uint64)
        return np.where(whole, cycle.frontier, np.uint64(0)), *none

    # --- leaving

    def _look_after(self, backlog: Backlog) -> bool:
        """Whether batches may pass through again: nothing has been due for a while, all before is acknowledged (R16)."""
        now_ms, link = self._core.now_ms, backlog.link
        if not backlog.request or backlog.due.rows:
            backlog.calm_ms = None
            return False
        if backlog.calm_ms is not None and now_ms - backlog.calm_ms >= _calm_ms(backlog) and self._is_nearly_full(backlog):
            backlog.calm_ms = None
        if backlog.calm_ms is None:
            backlog.calm_ms, backlog.calm_sequence = now_ms, link.sequence_out
            backlog.calm_bytes = self._wanted_bytes(link)
        if now_ms - backlog.calm_ms < _calm_ms(backlog):
            return False
        if link.sequence_acknowledged < backlog.calm_sequence or not link.has_credit():
            return False
        feeds = backlog.keyspace.feeds.values()  # while there are some, no batches come that we could send on
        return not any(feed.until_ms > now_ms and feed.pairs.overlap(backlog.pairs) for feed in feeds)

    def _end(self, backlog: Backlog) -> None:
        """Batches pass through again, behind a last claim."""
        if not self._is_parent(backlog):
            self._again(backlog, "the view gives a pair another parent")
            return
        if backlog.is_below_floor():
            self._again(backlog, "it may lack what was dropped here for good")
            return
        if backlog.cycle is None:
            backlog.begin_cycle()
        self._emit(backlog, (), claims=True, ends=True)
        self._forget(backlog)
        self._left[backlog.link.boot, backlog.keyspace.replica.keyspace] = self._core.now_ms
        self._core.counters.backlogs_ended += 1
        self._core.note("state_mode_ended", peer=backlog.link.node, keyspace=backlog.keyspace.replica.keyspace)

    def _is_nearly_full(self, backlog: Backlog) -> bool:
        """Whether batches would have used up the rate since the backlog was empty: rows that were not sent as often count."""
        rate, calm_ms = backlog.link.rate, backlog.calm_ms
        if rate is None or calm_ms is None:
            return False
        passed_ms = self._core.now_ms - calm_ms
        return self._wanted_bytes(backlog.link) - backlog.calm_bytes > CALM_SHARE * rate * passed_ms

    def _wanted_bytes(self, link: Link) -> int:
        """What was charged to the link's budget so far, or was sent where it has none, and what coalescing spared it."""
        saved = sum(one.bytes_saved for one in self.of_link(link).values())
        used = link.traffic.bytes_out if link.bucket is None else link.bucket.used
        return used + saved + link.traffic.bytes_saved

    def _again(self, backlog: Backlog, why: str) -> None:
        """Throw it away, and select it again."""
        core = self._core
        core.counters.backlogs_again += 1
        core.note("backlog_again", peer=backlog.link.node, keyspace=backlog.keyspace.replica.keyspace, why=why)
        pairs = self._pairs(backlog.keyspace, backlog.link.node)
        if not pairs.served:
            self._tell(backlog, on=False)
            self._forget(backlog)
            return
        self._numbers += 1
        backlog.number = self._numbers
        if backlog.request:  # else it has been asked all the while: who never answers is left to pull, whatever else happens
            backlog.asked_ms = core.now_ms
        backlog.reset()
        backlog.take_pairs(pairs)
        self._tell(backlog)

    def _give_up(self, backlog: Backlog, why: str) -> None:
        """The child is to pull."""
        core, number = self._core, backlog.keyspace.replica.keyspace
        core.counters.backlogs_refused += 1
        core.note("state_mode_refused", peer=backlog.link.node, keyspace=number, why=why)
        self._refused[backlog.link.boot, number] = core.now_ms + REFUSED_MS
        self._tell(backlog, on=False)
        self._forget(backlog)

    def _forget(self, backlog: Backlog) -> None:
        boot, number = backlog.link.boot, backlog.keyspace.replica.keyspace
        self._core.counters.backlog_bytes_saved += backlog.bytes_saved
        backlog.link.traffic.bytes_saved += backlog.bytes_saved
        backlog.keyspace.backlogs.pop(boot, None)
        self._of[boot].pop(number, None)
        if not self._of[boot]:
            del self._of[boot]
            backlog.link.in_state_mode = False

    # --- what ends it from outside

    def on_session_ended(self, link: Link) -> None:
        """What was sent may be lost: it is selected again (R3)."""
        for backlog in list(self.of_link(link).values()):
            self._again(backlog, "the session ended")

    def select_again(self, why: str) -> None:
        """What is retired has changed (R13): everybody is asked anew."""
        for backlogs in list(self._of.values()):
            for backlog in list(backlogs.values()):
                self._again(backlog, why)

    def drop(self, boot: int) -> None:
        """A life of a peer ended, or is silent: nothing is kept for it."""
        for backlog in list(self._of.get(boot, {}).values()):
            self._forget(backlog)
        self._refused = {place: until for place, until in self._refused.items() if place[0] != boot}
        self._left = {place: moment for place, moment in self._left.items() if place[0] != boot}

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        for backlogs in list(self._of.values()):
            if keyspace in backlogs:
                self._forget(backlogs[keyspace])
        self._refused = {place: until for place, until in self._refused.items() if place[1] != keyspace}
        self._left = {place: moment for place, moment in self._left.items() if place[1] != keyspace}

    def on_progress(self, keyspace: Keyspace) -> None:
        """Our knowledge may have moved: there may be something to claim."""
        for backlog in keyspace.backlogs.values():
            assert isinstance(backlog, Backlog)
            backlog.stirred = True

    # --- time

    def on_timer(self) -> None:
        """Tell again, give up who does not answer, and send what time alone lets go."""
        core = self._core
        for boot in list(self._of):
            link = core.by_boot.get(boot)
            if link is None or not core.membership.alive(link.node, core.now_ms):
                self.drop(boot)
                continue
            for backlog in list(self._of[boot].values()):
                if not backlog.request and core.now_ms - backlog.asked_ms >= TOLD_MS_MAX:
                    self._give_up(backlog, "it does not tell its vector")
                elif core.now_ms - backlog.told_ms >= TELL_MS:
                    self._tell(backlog)
            self._pump(link)

    def next_ms(self) -> int | None:
        """When there is something to do."""
        if not self._of:  # as a rule; asked after every event
            return None
        wanted: list[int] = []
        for boot, backlogs in self._of.items():
            link = self._core.by_boot.get(boot)
            if link is None:
                continue
            credit = link.has_credit()
            for backlog in backlogs.values():
                wanted.append(backlog.told_ms + TELL_MS)
                if credit and (backlog.due.rows if backlog.request else backlog.due.urgency > 0):
                    wanted.append(self._core.now_ms)
                elif credit and backlog.request and backlog.stirred:
                    wanted.append(backlog.claimed_ms + CLAIM_MS)
                if backlog.calm_ms is not None and self._core.now_ms < backlog.calm_ms + _calm_ms(backlog):
                    wanted.append(backlog.calm_ms + _calm_ms(backlog))
        return min(wanted, default=None)


def _calm_ms(backlog: Backlog) -> int:
    """For how long nothing must have been due."""
    return WAVES_MS if backlog.waves else CALM_MS
