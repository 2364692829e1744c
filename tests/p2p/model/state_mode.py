"""Three nodes whose links are in state mode, small enough to walk through millions of ways in which it could go wrong.

What is modelled is what decision 0042 argues with: due rows as pigeonholes by slot, chunks and claims in sessions that lose,
repeat and reorder, questions and vectors outside of them, lives of nodes, slots that live again, rows that are evicted, refused
or collected (all raise the loss floor), writers that retire, views that change, and frontiers over two trees. Batches are rows
that come by themselves (`row`) and pulls happen at once: both claim by other means than state mode.

A node's `high` is what the checker knows and the node does not: the newest version of each row that ever reached this life. A
claim is false where the vector covers an update of which `high` knows nothing as new. `rules` has the parts of the argument;
a model without one of them must find a false claim.

Shard s is all there is in tree s. Stamps are numbers that no two updates share; of two versions the larger wins.
"""

from collections.abc import Callable, Iterator
from typing import Any

from tests.p2p.model.parts import (
    NODES,
    ORIGINS,
    SHARD_OF,
    SHARDS,
    Backlog,
    Cycle,
    FalseClaimError,
    Feed,
    Message,
    Node,
    Pair,
    Row,
    Vector,
)
from tests.p2p.model.rules import RULES

MESSAGES_MAX = 6
LATER_MAX = 4
WRITERS_MAX = 5  # in one walk: a life that lost its memory writes under another id


class Model:
    """All of it. An action returns False where it means nothing; `check` finds false claims.

    Args:
        off: rules that are switched off.
    """

    def __init__(self, off: frozenset[str] = frozenset()) -> None:
        assert off <= RULES.keys()
        self.on = {rule: rule not in off for rule in RULES}
        self.clock = 0
        self.nodes = [Node(node, 1, node) for node in NODES]
        self.origin_of = {node: node for node in ORIGINS}  # by writer
        self.written: dict[Pair, list[tuple[int, int]]] = {}  # (stamp, key)
        self.messages: list[Message] = []
        self.moved: set[int] = set()  # nodes whose knowledge moved since it was checked
        self.claims = 0  # that were taken

    # --- the view: who sends what to whom

    def pairs(self, parent: int, child: int) -> frozenset[Pair]:
        """Of which shards and writers a node is another's parent, by the parent's view."""
        view = self.nodes[parent].view
        return frozenset(
            (tree, writer)
            for writer, origin in self.origin_of.items()
            for tree in SHARDS
            if (parent, child) in _edges(origin, tree ^ view) and writer not in self.nodes[parent].retired
        )

    # --- rows

    def take_row(self, node: Node, key: int, stamp: int, writer: int, *, full: bool, source: int | None, how: str) -> None:
        """A version of a row comes; where it is new, it is due to all but its source."""
        shard, held = SHARD_OF[key], node.rows.get(key)
        if held is None:
            if full or stamp <= node.high.get(key, 0):  # no room; or an older one than was dropped here
                node.high[key] = max(node.high.get(key, 0), stamp)
                self.raise_floor(node, shard, writer, stamp)
                return
            slot = node.free_slot()
            node.rows[key] = Row(stamp, writer, slot, node.epochs[slot])
        elif held.stamp >= stamp:
            node.high[key] = max(node.high.get(key, 0), stamp)
            return
        else:
            held.stamp, held.writer = stamp, writer
        node.high[key] = max(node.high.get(key, 0), stamp)
        for child, backlog in node.backlogs.items():
            if child == source and node.boots[child] == backlog.boot:
                continue
            rule = {"pull": "pulled_rows_are_due", "chunk": "chunk_rows_are_due"}.get(how)
            if rule is not None and not self.on[rule]:
                continue
            if not self.on["rows_of_all_writers_are_due"] and (shard, writer) not in backlog.pairs:
                continue
            self.note(node, backlog, key)

    def note(self, node: Node, backlog: Backlog, key: int) -> None:
        """A row is due. Where its slot's pigeonhole is taken, it stays behind what is in it."""
        if self.on["shards_of_the_pairs_only"] and SHARD_OF[key] not in backlog.shards:
            return
        row = node.rows[key]
        if self.on["rows_are_due_again"] or row.slot not in backlog.left:
            backlog.due.setdefault(row.slot, [row.epoch, False])

    def raise_floor(self, node: Node, shard: int, writer: int, stamp: int) -> None:
        if self.on["what_is_dropped_raises_the_floor"]:
            node.floor[shard, writer] = max(node.floor.get((shard, writer), 0), stamp)

    def changed_since(self, node: Node, base: Vector) -> Iterator[int]:
        for key, row in node.rows.items():
            if row.stamp > base.get((SHARD_OF[key], row.writer), 0):
                yield key

    def below_floor(self, node: Node, known: Vector, told: frozenset[int], shards: frozenset[int]) -> bool:
        """Whether somebody may lack what was dropped here."""
        for pair, stamp in node.floor.items():
            reached = known.get(pair, 0)
            if pair[1] in node.retired and (pair[1] not in told or not self.on["told_is_not_assumed"]):
                reached = max(reached, node.retired[pair[1]].get(pair, 0))
            if pair[0] in shards and stamp > reached:
                return True
        return False

    # --- actions: what happens by itself

    def write(self, node: int, key: int) -> bool:
        """An origin writes a row."""
        one = self.nodes[node]
        if node not in ORIGINS or one.writer in one.retired:
            return False
        self.clock += 1
        pair = SHARD_OF[key], one.writer
        self.written.setdefault(pair, []).append((self.clock, key))
        one.vector[pair] = one.frontier[one.writer] = self.clock
        self.moved.add(node)
        self.take_row(one, key, self.clock, one.writer, full=False, source=None, how="write")
        return True

    def row(self, node: int, to: int, key: int) -> bool:
        """A row goes to another by itself, as of a batch whose claims wait for others."""
        held = self.nodes[node].rows.get(key)
        if node == to or held is None:
            return False
        return self.post("row", node, to, (key, held.stamp, held.writer))

    def pass_on(self, node: int, to: int, via: int, key: int) -> bool:
        """A batch passes through a node that has no room for it: it is sent on before that is known (R17)."""
        held = self.nodes[node].rows.get(key)
        if len({node, to, via}) < 3 or held is None:
            return False
        if held.stamp <= self.nodes[via].high.get(key, 0):
            return False
        if self.on["batches_without_room_spoil"]:
            for feed in self.nodes[via].feeds.values():
                feed.request = 0
        return self.post("row", via, to, (key, held.stamp, held.writer))

    def pull(self, node: int, source: int) -> bool:
        """All that a node lacks, of shards in which it is not below the source's floor."""
        one, other = self.nodes[node], self.nodes[source]
        if node == source or one.retired.keys() != other.retired.keys():
            return False
        base = self.with_settled(other, one.told_vector(), one.named())
        shards = [s for s in SHARDS if not self.below_floor(other, one.told_vector(), one.named(), frozenset({s}))]
        for key in list(self.changed_since(other, base)):
            row = other.rows[key]
            if SHARD_OF[key] in shards:
                self.take_row(one, key, row.stamp, row.writer, full=False, source=source, how="pull")
        for pair, stamp in other.vector.items():
            if pair[0] in shards:
                one.vector[pair] = max(one.vector.get(pair, 0), stamp)
        if len(shards) == len(SHARDS):
            for writer, stamp in other.frontier.items():
                one.frontier[writer] = max(one.frontier.get(writer, 0), stamp)
        self.reach(one)
        self.moved.add(node)
        return True

    def drop(self, node: int, key: int) -> bool:
        """A row is evicted, or collected; not its only copy."""
        one = self.nodes[node]
        row = one.rows.get(key)
        if row is None or row.stamp > one.vector.get((SHARD_OF[key], row.writer), 0):
            return False
        self.raise_floor(one, SHARD_OF[key], row.writer, row.stamp)
        del one.rows[key]
        one.epochs[row.slot] += 1
        return True

    def crash(self, node: int, keep: bool) -> bool:
        """A node's life ends, and the next begins with its memory, or without (and writes under another id, R4)."""
        old = self.nodes[node]
        if keep:
            old.boot += 1
            old.forget_links()
        else:
            writer = old.writer
            if node in ORIGINS:
                writer = max(3, *(w + 1 for w in self.origin_of))
                if len(self.origin_of) >= WRITERS_MAX:
                    return False
                self.origin_of[writer] = node
            self.nodes[node] = Node(node, old.boot + 1, writer)
        return True

    def hear(self, node: int, other: int) -> bool:
        """A node hears in which life another is: what it kept for a former one is gone."""
        one, boot = self.nodes[node], self.nodes[other].boot
        if node == other or one.boots[other] == boot:
            return False
        one.boots[other] = boot
        if self.on["lives_are_told_apart"]:
            one.backlogs.pop(other, None)
            one.feeds.pop(other, None)
            one.sent[other] = [one.sent[other][0] + 1, 0]
            one.came[other] = [0, 0, False]
        return True

    def turn(self, node: int) -> bool:
        """A node's view changes."""
        self.nodes[node].view ^= 1
        return True

    def retire(self, writer: int) -> bool:
        """All have all of a writer, and the next life of its node, if any, writes under another id (R13)."""
        origin = self.origin_of.get(writer)
        if origin is None or self.nodes[origin].writer == writer:
            return False
        ends = {(s, writer): max((t for t, _ in self.written.get((s, writer), ())), default=0) for s in SHARDS}
        if any(node.vector.get(pair, 0) < stamp for node in self.nodes for pair, stamp in ends.items()):
            return False
        for node in NODES:
            self.learn_retired(node, writer, ends)
        return True

    def tell_retired(self, node: int, source: int) -> bool:
        """A newcomer is told who is retired."""
        told = [(w, ends) for w, ends in self.nodes[source].retired.items() if w not in self.nodes[node].retired]
        for writer, ends in told:
            self.learn_retired(node, writer, ends)
        return bool(told)

    def learn_retired(self, node: int, writer: int, ends: Vector) -> None:
        one = self.nodes[node]
        one.retired[writer] = ends
        for feed in one.feeds.values():
            feed.request = 0
        for child in list(one.backlogs):
            self.again(node, child)

    # --- actions: the parent's side

    def congest(self, node: int, child: int) -> bool:
        """A link goes into state mode."""
        one = self.nodes[node]
        if node == child or child in one.backlogs or not self.pairs(node, child):
            return False
        one.backlogs[child] = Backlog(one.boots[child], one.next_number(), self.pairs(node, child))
        return self.notice(node, child)

    def notice(self, node: int, child: int) -> bool:
        """The child is told (again)."""
        backlog = self.nodes[node].backlogs.get(child)
        return backlog is not None and self.post("notice", node, child, (backlog.number,))

    def again(self, node: int, child: int) -> None:
        """Throw it away and ask anew."""
        one = self.nodes[node]
        backlog = one.backlogs[child]
        backlog.reset()
        backlog.number, backlog.pairs = one.next_number(), self.pairs(node, child)
        if not backlog.pairs:
            del one.backlogs[child]

    def stall(self, node: int, child: int) -> bool:
        """A sender ends its session by itself: its transport refused something, or nothing is acknowledged."""
        one = self.nodes[node]
        one.sent[child] = [one.sent[child][0] + 1, 0]
        if child in one.backlogs and self.on["sessions_that_end_select_again"]:
            self.again(node, child)
        return True

    def begin_cycle(self, node: Node, backlog: Backlog) -> None:
        """V and what is due are recorded together."""
        until = {pair: stamp for pair, stamp in node.vector.items() if pair in backlog.pairs}
        if not self.on["shards_of_the_pairs_only"]:
            until = {pair: stamp for pair, stamp in node.vector.items() if pair[1] in {w for _, w in backlog.pairs}}
        rest = {pair: stamp for pair, stamp in node.vector.items() if pair not in backlog.pairs}
        backlog.cycle = Cycle(until, dict(node.frontier), rest)
        for entry in backlog.due.values():
            entry[1] = True

    def send(self, node: int, child: int, slot: int) -> bool:
        """A chunk of one row, or of none; with the claim if all that was recorded has left. Rows may go ahead of the vector."""
        one = self.nodes[node]
        backlog = one.backlogs.get(child)
        if backlog is None or (backlog.due and slot not in backlog.due) or not (backlog.request or backlog.due):
            return False
        if backlog.pairs != self.pairs(node, child):
            if not self.on["other_pairs_select_again"]:
                backlog.pairs, backlog.cycle = self.pairs(node, child), None
                return True
            self.again(node, child)
            return True
        if backlog.cycle is None and backlog.request:
            self.begin_cycle(one, backlog)
        rows: list[tuple[int, int, int]] = []
        if backlog.due:
            epoch, _ = backlog.due.pop(slot)
            backlog.left.add(slot)
            rows = [(k, r.stamp, r.writer) for k, r in one.rows.items() if (r.slot, r.epoch) == (slot, epoch)]
            backlog.torn = backlog.torn or not rows
        if not backlog.request:
            self.post_chunk(node, child, (0, rows, None))
            return True
        done = not self.on["all_recorded_rows_leave_first"] or not any(recorded for _, recorded in backlog.due.values())
        below = self.on["claims_need_the_floor_covered"] and self.below_floor(one, backlog.known, backlog.told, backlog.shards)
        claim = self.claim(one, backlog) if done and not backlog.torn and not below else None
        self.post_chunk(node, child, (backlog.request, rows, claim))
        if done and claim is None:
            self.again(node, child)
        return True

    def claim(self, node: Node, backlog: Backlog) -> tuple[Vector, list[tuple[int, int, Vector]]]:
        """What has become true once all rows before it are applied: the vector; frontiers, once the rest of it is covered."""
        cycle, backlog.cycle = backlog.cycle, None
        backlog.left.clear()
        assert cycle is not None
        until = cycle.until
        if not self.on["vector_is_recorded_with_due"] or not self.on["other_pairs_select_again"]:
            until = {pair: stamp for pair, stamp in node.vector.items() if pair in backlog.pairs}
        for pair, stamp in until.items():
            backlog.known[pair] = max(backlog.known.get(pair, 0), stamp)
        rests = [
            (writer, cycle.frontier.get(writer, 0), {pair: stamp for pair, stamp in cycle.rest.items() if pair[1] == writer})
            for writer in sorted({writer for _, writer in backlog.pairs})
        ]
        return until, rests

    def raise_class(self, node: int, child: int, key: int) -> bool:
        """A row that is due comes to matter more: it gets an entry of its own, and the one before it finds nothing."""
        one = self.nodes[node]
        backlog, row = one.backlogs.get(child), one.rows.get(key)
        if backlog is None or row is None or row.slot not in backlog.due:
            return False
        backlog.due[row.slot][0] = row.epoch
        return True

    def calm(self, node: int, child: int) -> bool:
        """A link with nothing due passes batches again."""
        backlog = self.nodes[node].backlogs.get(child)
        if backlog is None or backlog.due:
            return False
        del self.nodes[node].backlogs[child]
        return True

    # --- the network

    def post(self, kind: str, sender: int, receiver: int, body: tuple[Any, ...], session: int = 0, sequence: int = 0) -> bool:
        if len(self.messages) >= MESSAGES_MAX:
            return False
        one = self.nodes[sender]
        boots = one.boot, one.boots[receiver]
        self.messages.append(Message(kind, sender, receiver, boots, body, session, sequence))
        return True

    def post_chunk(self, sender: int, receiver: int, body: tuple[Any, ...]) -> None:
        place = self.nodes[sender].sent[receiver]
        place[1] += 1
        self.post("chunk", sender, receiver, body, *place)  # where there is no room for it, it is lost

    def lose(self, index: int) -> bool:
        """A message is lost."""
        if index >= len(self.messages):
            return False
        del self.messages[index]
        return True

    def deliver(self, index: int, keep: bool, full: bool) -> bool:
        """A message arrives, in any order, perhaps not for the last time; perhaps there is no room for what it brings."""
        if index >= len(self.messages):
            return False
        message = self.messages[index]
        if not keep:
            del self.messages[index]
        receiver = self.nodes[message.receiver]
        if self.on["lives_are_told_apart"]:
            if message.boots[1] != receiver.boot or message.boots[0] < receiver.boots[message.sender]:
                return True
            if message.boots[0] > receiver.boots[message.sender]:
                self.hear(message.receiver, message.sender)
                if message.boots[0] != receiver.boots[message.sender]:
                    return True
        handler: Callable[[Node, Message, bool], None] = getattr(self, f"on_{message.kind}")
        handler(receiver, message, full)
        return True

    def on_row(self, node: Node, message: Message, full: bool) -> None:
        key, stamp, writer = message.body
        self.take_row(node, key, stamp, writer, full=full, source=message.sender, how="batch")

    def on_notice(self, node: Node, message: Message, full: bool) -> None:
        """The child tells its vector, under the number of its question before where nothing has come of that."""
        (number,) = message.body
        feed = node.feeds.get(message.sender)
        if feed is None or feed.number != number:
            feed = node.feeds[message.sender] = Feed(message.boots[0], number)
        sent_on = any(one.kind == "row" and one.sender == node.node for one in self.messages)
        if not feed.request and sent_on and self.on["who_has_no_room_waits"]:
            return
        feed.request = feed.request or node.next_number()
        body = feed.request, node.told_vector(), node.named(), frozenset(node.retired)
        self.post("vector", node.node, message.sender, body)

    def with_settled(self, node: Node, told: Vector, named: frozenset[int]) -> Vector:
        """A vector with the retired writers that it leaves out."""
        base = dict(told)
        for writer, ends in node.retired.items():
            if writer not in named:
                base |= ends
        return base

    def on_vector(self, node: Node, message: Message, full: bool) -> None:
        request, told, named, retired = message.body
        backlog = node.backlogs.get(message.sender)
        if backlog is None or request <= backlog.request:
            return
        if self.on["both_agree_who_is_retired"] and retired != node.retired.keys():
            return
        if self.on["claims_need_the_floor_covered"] and self.below_floor(node, told, named, backlog.shards):
            del node.backlogs[message.sender]  # it is left to pull
            return
        backlog.reset()
        backlog.request, backlog.known, backlog.told = request, dict(told), named
        if self.on["due_is_what_the_child_lacks"]:
            for key in self.changed_since(node, self.with_settled(node, told, named)):
                self.note(node, backlog, key)
        self.begin_cycle(node, backlog)

    def on_chunk(self, node: Node, message: Message, full: bool) -> None:
        """The next of an unbroken session is taken, if it answers what was asked last."""
        parent, (request, rows, claim) = message.sender, message.body
        feed, came = node.feeds.get(parent), node.came[parent]
        if message.session > came[0]:
            came[:] = [message.session, 0, False]
        if message.session < came[0] or message.sequence <= came[1]:
            return
        if (message.sequence != came[1] + 1 or came[2]) and self.on["claims_stop_at_a_hole"]:
            came[2] = True
            if feed is not None:
                feed.request = 0
            self.post("broken", node.node, parent, (message.session,))
            return
        came[1] = message.sequence
        if feed is None or (request and request != feed.request and self.on["claims_answer_the_last_question"]):
            return
        if full and rows and self.on["refused_chunks_spoil"]:
            feed.request = 0
            return
        for key, stamp, writer in () if full else rows:
            self.take_row(node, key, stamp, writer, full=False, source=parent, how="chunk")
        if claim is not None:
            self.take_claim(node, *claim)

    def take_claim(self, node: Node, until: Vector, frontiers: list[tuple[int, int, Vector]]) -> None:
        """Merge it; frontiers may have to wait for what other parents send."""
        for pair, stamp in until.items():
            node.vector[pair] = max(node.vector.get(pair, 0), stamp)
        node.later += frontiers
        self.reach(node)
        self.moved.add(node.node)
        self.claims += 1

    def reach(self, node: Node) -> None:
        """Frontiers that waited for more of the vector, and wait no more."""
        waiting = []
        for writer, stamp, rest in node.later:
            covered = all(node.vector.get(pair, 0) >= least for pair, least in rest.items())
            if covered or not self.on["a_frontier_waits_for_the_rest"]:
                node.frontier[writer] = max(node.frontier.get(writer, 0), stamp)
            else:
                waiting.append((writer, stamp, rest))
        node.later = waiting[-LATER_MAX:]

    def on_broken(self, node: Node, message: Message, full: bool) -> None:
        if message.body[0] == node.sent[message.sender][0]:
            self.stall(node.node, message.sender)

    # --- what must hold

    def act(self, action: tuple[Any, ...]) -> bool:
        """Whether it meant anything."""
        done: bool = getattr(self, action[0])(*action[1:])
        if self.moved:
            self.check()
        return done

    def check(self) -> None:
        """Invariant 3, and the frontier's promise.

        Raises:
            FalseClaimError: one of them is broken.
        """
        for number in sorted(self.moved):
            node = self.nodes[number]
            for pair, updates in self.written.items():
                held = node.vector.get(pair, 0)
                for stamp, key in updates:
                    if stamp <= held and node.high.get(key, 0) < stamp:
                        raise FalseClaimError(
                            f"node {number} claims writer {pair[1]} of shard {pair[0]} to {held}, lacks key {key} at {stamp}"
                        )
                    if held < stamp <= node.frontier.get(pair[1], 0):
                        raise FalseClaimError(
                            f"node {number} has a frontier of writer {pair[1]} above {stamp}, shard {pair[0]} ends at {held}"
                        )
        self.moved.clear()


def _edges(origin: int, tree: int) -> tuple[tuple[int, int], ...]:
    """A chain from the origin through both others, in one order or the other."""
    first, second = (node for node in NODES if node != origin)
    if origin == 2:
        first, second = second, first  # 0 and 2 send each other through 1, in tree 0
    return ((origin, first), (first, second)) if tree == 0 else ((origin, second), (second, first))
