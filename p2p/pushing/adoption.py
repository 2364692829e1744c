"""Children that a busy origin hands over to each other: the trees grow deeper where a card cannot carry every copy.

Intuition. Who reads a letter to ten people one after the other, and cannot keep up, asks the first to pass it on to the second.
All get it, a little later than the first, and the reader has time again.

An origin sends each batch to every region's leader, so its card is the first that is full, while those of all others are
nearly idle. Its links show it: what they were sent is not acknowledged. When that is more than half of a link's credit, or
all children of a tree have more than one credit in flight together, the origin hands the fullest over to the child with
least in flight: from now on that one forwards batches of this origin and tree to it, too (`messages.Adopt`). Child goes after
child, until what is left fits. After `ADOPTED_MS` each comes back, one by one; while the card is still full it stays, for
`SAME_MS` at most with the same adopter: whether those two can reach each other the origin does not see.

An adopter is told again every `TELL_MS`, at the next batch: what it was told may be lost, and after a pause it has forgotten.
A new life of it, and it of a new life of the origin, begin without any of this.

A batch carries the base of its claims, so they hold whoever sent it (R6), and a batch that comes twice or not at all while a
child changes hands is what the seen-set and gaps are for, as when views differ. Only the origin hands over, and who was handed
over adopts nobody: a path is one hop longer, which the hop limit has room for (R17).

Rejected. A log for each child, as log shipping keeps: it grows without end, and all of it passes the same card. To skip what
does not fit, and let children pull it: the origin sends as much, in answers, and much of it twice. To send askers on to whom
the origin is answering already: rows wait at each hop for the whole answer, which took longer than a log
(docs/decisions/0022).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2p import messages as m
from p2p import wire
from p2p.core import Core
from p2p.errors import RemoteProtocolError
from p2p.link import links
from p2p.link.links import Link
from p2p.members.membership import HOLDER_ROLES
from p2p.members.trees import TREE_ARITY

# Four more copies are what a node inside a tree sends at most, too.
ADOPTED_MAX = TREE_ARITY
# For so long. Taking a child back costs a moment in which the card may be full again; not to, a hop that nobody needs any more.
ADOPTED_MS = 5_000
# Then one comes back, and the next one after so long, in which a link shows whether the card carries it; none while it is busy.
RETURN_MS = 500
# With one adopter, while the card is busy; then with another one. A change of hands may cost the child a pull.
SAME_MS = 30_000
# The adopter is told again after so long.
TELL_MS = 1_000
# And keeps them for so long unless it is told: an origin that died tells nobody.
KEPT_MS = 2 * ADOPTED_MS
# Origins and trees whose children somebody handed over to us.
ENTRIES_MAX = 4_096

Place = tuple[int, m.NodeId, int]  # keyspace, origin, tree


@dataclass(frozen=True, slots=True)
class _Given:
    """A child that was handed over."""

    to: m.NodeId
    boot: int  # the adopter's life
    since_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """Children that an origin has handed over to us."""

    children: tuple[m.NodeId, ...]
    boot: int  # the origin's life
    until_ms: int


class Adoption:
    """Both sides of it.

    Args:
        core: shared state.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._given: dict[tuple[int, int], dict[m.NodeId, _Given]] = {}  # by keyspace and tree, of our own batches
        self._told_ms: dict[tuple[int, int, m.NodeId], int] = {}  # when an adopter of such a tree was told last
        self._taken: dict[Place, _Taken] = {}

    @property
    def entries(self) -> int:
        """Origins and trees whose children were handed over to us."""
        return len(self._taken)

    def fed_by_us(self, batch: m.Batch, children: Sequence[m.NodeId], now: m.Now) -> Sequence[m.NodeId]:
        """To whom of our children a batch of ours is sent; the others get it from them."""
        place = batch.keyspace, batch.tree
        size = batch.payload_bytes
        given = self._given.get(place)
        if given:
            children = self._take_back(place, given, children, now.monotonic_ms)
        elif self._in_flight(children) + size * len(children) <= self._card_bytes(children) // 2:
            return children  # as a rule; then nobody has too much
        given = self._given.setdefault(place, {})
        for fullest in self._full(given, children, size):
            adopter = self._least_loaded(given, children, fullest)
            if adopter is None or any(one.to == fullest.node for one in given.values()):
                continue
            self._give(place, fullest.node, adopter, now.monotonic_ms)
            children = [node for node in children if node != fullest.node]
        return children

    def kept(self, keyspace: int, tree: int, children: Sequence[m.NodeId]) -> Sequence[m.NodeId]:
        """Of our children for our own batches, those that nobody else feeds for us."""
        given = self._given.get((keyspace, tree))
        return [node for node in children if node not in given] if given else children

    def taken(self, keyspace: int, origin: m.NodeId, tree: int, now_ms: int) -> tuple[m.NodeId, ...]:
        """Who gets batches of this origin and tree from us though it is not below us."""
        taken = self._taken.get((keyspace, origin, tree))
        if taken is None:
            return ()
        link = self._core.links.get(origin)
        if now_ms >= taken.until_ms or link is None or link.boot != taken.boot:
            del self._taken[keyspace, origin, tree]
            return ()
        return taken.children

    def on_adopt(self, link: Link, adopt: m.Adopt, now: m.Now) -> None:
        """An origin hands its children over to us, or takes them back.

        Raises:
            RemoteProtocolError: more of them than anybody may adopt.
        """
        if len(adopt.children) > ADOPTED_MAX:
            raise RemoteProtocolError(f"{len(adopt.children)} children to adopt, limit {ADOPTED_MAX}")
        place = adopt.keyspace, link.node, adopt.tree
        self._taken.pop(place, None)
        options = self._core.options
        children = tuple(node for node in dict.fromkeys(adopt.children) if node not in (options.node, link.node))
        # Leaves forward nothing (R22).
        if not children or adopt.keyspace not in self._core.keyspaces or options.role not in HOLDER_ROLES:
            return
        while len(self._taken) >= ENTRIES_MAX:
            del self._taken[next(iter(self._taken))]
        self._taken[place] = _Taken(children, link.boot, now.monotonic_ms + KEPT_MS)

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._given = {place: given for place, given in self._given.items() if place[0] != keyspace}
        self._told_ms = {place: told_ms for place, told_ms in self._told_ms.items() if place[0] != keyspace}
        self._taken = {place: taken for place, taken in self._taken.items() if place[0] != keyspace}

    def _take_back(
        self, place: tuple[int, int], given: dict[m.NodeId, _Given], children: Sequence[m.NodeId], now_ms: int
    ) -> Sequence[m.NodeId]:
        """Whose time is over, or whose adopter is no child of ours any more, is ours again."""
        calm = self._is_calm([node for node in children if node not in given])
        for node, one in list(given.items()):
            gone = node not in children or one.to not in children or self._boot_of(one.to) != one.boot
            if gone or (now_ms >= one.until_ms and calm):
                del given[node]
                self._tell(place, one.to, now_ms)
                calm = False
                for other, two in given.items():
                    given[other] = replace(two, until_ms=max(two.until_ms, now_ms + RETURN_MS))
            elif now_ms >= one.until_ms:
                self._keep(place, given, children, node, now_ms)
        for adopter in dict.fromkeys(one.to for one in given.values()):
            if now_ms - self._told_ms[(*place, adopter)] >= TELL_MS:
                self._tell(place, adopter, now_ms)
        return [node for node in children if node not in given]

    def _keep(
        self, place: tuple[int, int], given: dict[m.NodeId, _Given], children: Sequence[m.NodeId], node: m.NodeId, now_ms: int
    ) -> None:
        """The card is busy: it stays handed over, but not for ever with the same one, nor with who has no credit itself."""
        one = given[node]
        adopter, child = self._core.links.get(one.to), self._core.links.get(node)
        another = None
        if child is not None and (adopter is None or not adopter.has_credit() or now_ms - one.since_ms >= SAME_MS):
            others = [other for other in children if other != one.to]
            another = self._least_loaded(given, others, None)
        given[node] = replace(one, until_ms=now_ms + RETURN_MS)
        if another is not None and not any(two.to == node for two in given.values()):
            self._give(place, node, another, now_ms)
            self._tell(place, one.to, now_ms)

    def _give(self, place: tuple[int, int], node: m.NodeId, adopter: Link, now_ms: int) -> None:
        self._given[place][node] = _Given(adopter.node, adopter.boot, now_ms, now_ms + ADOPTED_MS)
        self._core.counters.children_handed_over += 1
        self._tell(place, adopter.node, now_ms)

    def _is_calm(self, children: Sequence[m.NodeId]) -> bool:
        """Whether one more copy fits; not while anything waits, which would be overtaken by the news that a child came back."""
        open_links = self._core.links
        waits = any(open_links[node].is_busy for node in children if node in open_links)
        return not waits and self._in_flight(children) <= self._card_bytes(children) // 2

    def _boot_of(self, node: m.NodeId) -> int | None:
        link = self._core.links.get(node)
        return None if link is None else link.boot

    def _full(self, given: dict[m.NodeId, _Given], children: Sequence[m.NodeId], size: int) -> list[Link]:
        """Children that are to be handed over now, the fullest first; those that feed others stay ours."""
        adopters = {one.to for one in given.values()}
        candidates = [link for node in children if node not in adopters and (link := self._core.links.get(node)) is not None]
        candidates.sort(key=lambda link: -link.bytes_in_flight)
        card_bytes = self._card_bytes(children)
        full = [link for link in candidates if link.bytes_in_flight > card_bytes // 2]
        surplus = 1 - card_bytes / max(1, self._in_flight(children) + size * len(children))
        return candidates[: max(len(full), math.ceil(surplus * len(candidates)))]

    def _card_bytes(self, children: Sequence[m.NodeId]) -> int:
        """What these may have in flight together: one link's credit. Where all are narrow it is our card that is, or may be."""
        open_links = self._core.links
        return max((open_links[node].full_bytes for node in children if node in open_links), default=links.CREDIT_BYTES_MAX)

    def _in_flight(self, children: Sequence[m.NodeId]) -> int:
        """Bytes that these have not acknowledged."""
        open_links = self._core.links
        return sum(open_links[node].bytes_in_flight for node in children if node in open_links)

    def _least_loaded(self, given: dict[m.NodeId, _Given], children: Sequence[m.NodeId], other: Link | None) -> Link | None:
        """Who can feed one more, and has less in flight."""
        members = self._core.membership.members
        counts: dict[m.NodeId, int] = {}
        for one in given.values():
            counts[one.to] = counts.get(one.to, 0) + 1
        fit = [
            link
            for node in children
            if node not in given
            and counts.get(node, 0) < ADOPTED_MAX
            and (link := self._core.links.get(node)) is not None
            and link.version >= wire.since(m.Adopt)
            and (other is None or (link is not other and link.bytes_in_flight <= other.bytes_in_flight))
            and node in members
            and members[node].record.role in HOLDER_ROLES
        ]
        return min(fit, key=lambda link: link.bytes_in_flight, default=None)

    def _tell(self, place: tuple[int, int], adopter: m.NodeId, now_ms: int) -> None:
        """Whom the adopter has from us by now."""
        children = tuple(node for node, one in self._given.get(place, {}).items() if one.to == adopter)
        if children:
            self._told_ms[(*place, adopter)] = now_ms
        else:
            self._told_ms.pop((*place, adopter), None)
        link = self._core.links.get(adopter)
        if link is not None:
            self._core.send(link, m.Adopt(*place, children))
