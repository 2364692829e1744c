"""Children that a busy origin hands over to each other: the trees grow deeper where a card cannot carry every copy.

Intuition. Who reads a letter to ten people one after the other, and cannot keep up, asks the first to pass it on to the second.
All get it, a little later than the first, and the reader has time again.

An origin sends each batch to every region's leader, so its card is the first that is full, while those of all others are
nearly idle. Its links show it: what they were sent is not acknowledged. When that is more than half of a link's credit, or
all children of a tree have more than one credit in flight together, the origin hands the fullest over to the child with
least in flight: from now on that one forwards batches of this origin and tree to it, too (`messages.Adopt`, in order with
the batches). Child goes after child, until what is left fits. After `ADOPTED_MS` each comes back; if the card is still full,
it goes again.

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
from dataclasses import dataclass

from p2p import links, wire
from p2p import messages as m
from p2p.core import Core
from p2p.errors import RemoteProtocolError
from p2p.links import Link
from p2p.trees import TREE_ARITY

# Four more copies are what a node inside a tree sends at most, too.
ADOPTED_MAX = TREE_ARITY
# For so long. Taking a child back costs a moment in which the card may be full again; not to, a hop that nobody needs any more.
ADOPTED_MS = 5_000
# Then one comes back, and the next one after so long, in which a link shows whether the card carries it; none while it is busy.
RETURN_MS = 500
# The adopter keeps them for so long unless it is told again: an origin that died tells nobody.
KEPT_MS = 2 * ADOPTED_MS
# Origins and trees whose children somebody handed over to us.
ENTRIES_MAX = 4_096

Place = tuple[int, m.NodeId, int]  # keyspace, origin, tree


@dataclass(frozen=True, slots=True)
class _Given:
    """A child that was handed over."""

    to: m.NodeId
    until_ms: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """Children that an origin has handed over to us."""

    children: tuple[m.NodeId, ...]
    until_ms: int


class Adoption:
    """Both sides of it.

    Args:
        core: shared state.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._given: dict[tuple[int, int], dict[m.NodeId, _Given]] = {}  # by keyspace and tree, of our own batches
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
        elif self._in_flight(children) + size * len(children) <= links.CREDIT_BYTES_MAX // 2:
            return children  # as a rule; then nobody has too much
        given = self._given.setdefault(place, {})
        for fullest in self._full(given, children, size):
            adopter = self._least_loaded(given, children, fullest)
            if adopter is None or any(one.to == fullest.node for one in given.values()):
                continue
            given[fullest.node] = _Given(adopter.node, now.monotonic_ms + ADOPTED_MS)
            self._core.counters.children_handed_over += 1
            self._tell(place, adopter.node)
            children = [node for node in children if node != fullest.node]
        return children

    def taken(self, keyspace: int, origin: m.NodeId, tree: int, now: m.Now) -> tuple[m.NodeId, ...]:
        """Who gets batches of this origin and tree from us though it is not below us."""
        taken = self._taken.get((keyspace, origin, tree))
        if taken is None:
            return ()
        if now.monotonic_ms >= taken.until_ms:
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
        if not adopt.children or adopt.keyspace not in self._core.keyspaces:
            return
        while len(self._taken) >= ENTRIES_MAX:
            del self._taken[next(iter(self._taken))]
        self._taken[place] = _Taken(adopt.children, now.monotonic_ms + KEPT_MS)

    def _take_back(
        self, place: tuple[int, int], given: dict[m.NodeId, _Given], children: Sequence[m.NodeId], now_ms: int
    ) -> Sequence[m.NodeId]:
        """Whose time is over, or whose adopter is no child of ours any more, is ours again."""
        calm = self._in_flight([node for node in children if node not in given]) <= links.CREDIT_BYTES_MAX // 2
        for node, one in list(given.items()):
            gone = one.to not in children or node not in children
            if gone or (now_ms >= one.until_ms and calm):
                del given[node]
                if one.to in children:
                    self._tell(place, one.to)
                calm = False
                for other, two in given.items():
                    given[other] = _Given(two.to, max(two.until_ms, now_ms + RETURN_MS))
            elif now_ms >= one.until_ms:
                given[node] = _Given(one.to, now_ms + RETURN_MS)
                self._tell(place, one.to)  # it forgets what it is not told again
        return [node for node in children if node not in given]

    def _full(self, given: dict[m.NodeId, _Given], children: Sequence[m.NodeId], size: int) -> list[Link]:
        """Children that are to be handed over now, the fullest first; those that feed others stay ours."""
        adopters = {one.to for one in given.values()}
        candidates = [link for node in children if node not in adopters and (link := self._core.links.get(node)) is not None]
        candidates.sort(key=lambda link: -link.bytes_in_flight)
        full = [link for link in candidates if link.bytes_in_flight > links.CREDIT_BYTES_MAX // 2]
        surplus = 1 - links.CREDIT_BYTES_MAX / max(1, self._in_flight(children) + size * len(children))
        return candidates[: max(len(full), math.ceil(surplus * len(candidates)))]

    def _in_flight(self, children: Sequence[m.NodeId]) -> int:
        """Bytes that these have not acknowledged."""
        open_links = self._core.links
        return sum(open_links[node].bytes_in_flight for node in children if node in open_links)

    def _least_loaded(self, given: dict[m.NodeId, _Given], children: Sequence[m.NodeId], other: Link) -> Link | None:
        """Who can feed one more, and has less in flight."""
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
            and link is not other
            and link.bytes_in_flight <= other.bytes_in_flight
        ]
        return min(fit, key=lambda link: link.bytes_in_flight, default=None)

    def _tell(self, place: tuple[int, int], adopter: m.NodeId) -> None:
        """Whom the adopter has from us by now."""
        link = self._core.link(adopter)
        if link is not None:
            children = tuple(node for node, one in self._given.get(place, {}).items() if one.to == adopter)
            self._core.send(link, m.Adopt(*place, children))
