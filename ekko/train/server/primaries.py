"""Who acts for which partition of a model: one server at a time, and nobody takes over on a suspicion.

Think of a night porter who hands the keys to the next one. Whoever comes may ask for them; whoever has them finishes what he is
at, says what happened, and hands them over. If he does not answer, nobody breaks the door open: he may be asleep, and would
wake up. Only when the house has struck him off, so that his signature is worth nothing any more, does the next in line go in.

The line is fixed: the servers that hold the partition, in *rendezvous* order (xxh64 of model, partition and node), which
divides partitions evenly and moves few of them when a server comes or goes. A server may act for a partition when

- it holds it, and every server before it in line that may hold it is *gone*: its latest life was expelled, and everything that
  life left is here (`NodeLife.gone`);
- every other server that may hold it, and is not gone, has *released* it to this very life. A server of which nothing was ever
  heard may hold everything, so at the very first start all of them have to come up.

A server releases a partition to a life that comes before it in line, is the latest that its own node knows of that server, and
is not expelled; after it has drained what it had in flight, and after the asker's node has all rows of it. So a release needs
no memory: it says "you are before me, and I do not act while you are not expelled", which stays true over restarts, since a
node that joined knows of every life that was there before.

Why there are never two whose lives are not expelled: let X and Y both act, X the first of the two in line. Y began when its
node took X for gone, so that it knew of an earlier life of X only, and this one came later. Whoever joins later knows of who
is there; so X knew of Y, and Y had to release to it: it had stopped.

Somebody expelled may still believe that he acts. Nothing that he does counts: no holder takes his writes any more, so none of
them becomes durable, and no push is acknowledged.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import xxhash

from ekko.train.server import events as e
from ekko.train.server.wire import Released, ServerLife
from p2p import values

# A release that was asked for and is not there yet is asked for again: the question or its answer may be lost.
ASK_AGAIN_MS: Final = 500


@values.dataclass(frozen=True, slots=True)
class Begin:
    """We act for these partitions from now on."""

    partitions: tuple[int, ...]


@values.dataclass(frozen=True, slots=True)
class End:
    """Take nothing new for these partitions, finish what is in flight, then call `drained`."""

    partitions: tuple[int, ...]


Effect = Begin | End | e.AskRelease | e.Flush | e.Answer | e.Stop


@dataclass(slots=True)
class _Turn:
    """Our part in one partition."""

    stage: str = "idle"  # "asking", "acting", "draining"
    released: set[str] = field(default_factory=set)  # nodes whose servers released it to us


@dataclass(slots=True)
class _Asker:
    """A server that asked us to release partitions."""

    life: ServerLife
    ask: int | None = None  # open
    wanted: frozenset[int] = frozenset()
    flushing: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by number of the flush
    clean: set[int] = field(default_factory=set)  # of which its node has everything that ours has


def line_of(model: str, partition: int, servers: Iterable[str]) -> tuple[str, ...]:
    """All servers in rendezvous order of a partition."""
    return tuple(sorted(servers, key=lambda node: (xxhash.xxh64_intdigest(f"{model}/{partition}/{node}".encode()), node)))


class Primaries:
    """Which partitions of a model one server acts for. No I/O, no clock.

    Args:
        own: our life; its node is one of `servers`.
        model: its name.
        partitions: how many it has.
        servers: nodes of all servers of the model, as all servers are configured.
    """

    def __init__(self, own: ServerLife, model: str, partitions: int, servers: Sequence[str]) -> None:
        assert own.node in servers, f"{own.node} is not among the servers {servers}"
        self.own = own
        self._servers = tuple(sorted(set(servers)))
        self._lines = [line_of(model, partition, self._servers) for partition in range(partitions)]
        self._turns = [_Turn() for _ in range(partitions)]
        self._lives: dict[str, e.NodeLife] = {}
        self._askers: dict[str, _Asker] = {}
        self._flushes = 0
        self._ask_again_ms: int | None = None
        self._stopped = False

    @property
    def deadline_ms(self) -> int | None:
        """When `on_timer` is wanted next."""
        return None if self._stopped else self._ask_again_ms

    @property
    def acting(self) -> tuple[int, ...]:
        """Partitions for which we act, those that are being drained included."""
        return tuple(number for number, turn in enumerate(self._turns) if turn.stage in ("acting", "draining"))

    def believed(self) -> tuple[str, ...]:
        """For each partition who should act for it, as far as we know: the first in line that is not gone."""
        return tuple(next(self._standing(partition), line[0]) for partition, line in enumerate(self._lines))

    # --- what happens -------------------------------------------------------------------------------------------------------

    def on_view(self, view: e.ViewChanged, now_ms: int) -> list[Effect]:
        """Our node knows more of the others, or of itself."""
        for life in view.lives:
            known = self._lives.get(life.node)
            if known is None or _age(life) > _age(known):
                self._lives[life.node] = life
            elif _age(life) == _age(known):  # nothing of this is ever taken back
                expelled, gone = known.expelled or life.expelled, known.gone or life.gone
                self._lives[life.node] = replace(life, expelled=expelled, gone=gone)
        own = self._lives.get(self.own.node)
        if self._stopped:
            return []
        if own is not None and (own.expelled or _age(own) > _age(self.own)):
            self._stopped = True
            why = "was expelled" if own.expelled else "has begun another life"
            return [e.Stop(f"node {self.own.node!r} {why}: its server starts anew with it")]
        return self._review(now_ms)

    def on_release_answered(self, answer: e.ReleaseAnswered, now_ms: int) -> list[Effect]:
        """Somebody let go of partitions."""
        if self._stopped or not self._is_to_us(answer):
            return []
        for partition in answer.partitions:
            if partition < len(self._turns) and self._turns[partition].stage == "asking":
                self._turns[partition].released.add(answer.by)
        return self._review(now_ms)

    def on_release_asked(self, asked: e.ReleaseAsked, now_ms: int) -> list[Effect]:
        """Somebody wants to act for partitions. Answered at once, or when what can be released is drained and flushed."""
        if self._stopped or asked.asker.node not in self._servers or asked.asker.node == self.own.node:
            return [e.Answer(asked.ask, Released(self.own.node, asked.asker, ()))]
        asker = self._askers.get(asked.asker.node)
        effects: list[Effect] = []
        if asker is not None and asker.ask is not None:  # one open question a server: it asks again and again
            effects.append(self._answer(asker))
        if asker is None or asker.life != asked.asker:
            asker = self._askers[asked.asker.node] = _Asker(asked.asker)
        asker.ask, asker.wanted = asked.ask, frozenset(p for p in asked.partitions if p < len(self._turns))
        return [*effects, *self._review(now_ms)]

    def on_flushed(self, flushed: e.Flushed, now_ms: int) -> list[Effect]:
        """A node has what we had of some partitions."""
        for asker in self._askers.values():
            if flushed.flush in asker.flushing:
                asker.clean |= {p for p in asker.flushing.pop(flushed.flush) if self._turns[p].stage == "idle"}
        return [] if self._stopped else self._review(now_ms)

    def drained(self, partitions: Iterable[int], now_ms: int) -> list[Effect]:
        """Nothing of these partitions is in flight any more, after `End`."""
        for partition in partitions:
            assert self._turns[partition].stage == "draining", (partition, self._turns[partition].stage)
            self._turns[partition] = _Turn()
        return [] if self._stopped else self._review(now_ms)

    def on_timer(self, now_ms: int) -> list[Effect]:
        """Ask again for what was not released yet."""
        if self._stopped or self._ask_again_ms is None or now_ms < self._ask_again_ms:
            return []
        return self._ask(now_ms)

    # --- rules --------------------------------------------------------------------------------------------------------------

    def _may_hold(self, node: str, partition: int) -> bool:
        """Whether a server's latest life holds a partition; one that was never heard of may."""
        life = self._lives.get(node)
        return life is None or partition in life.holds

    def _is_gone(self, node: str) -> bool:
        life = self._lives.get(node)
        return life is not None and life.gone

    def _standing(self, partition: int) -> Iterator[str]:
        """Who may act for a partition, in line."""
        return (node for node in self._lines[partition] if self._may_hold(node, partition) and not self._is_gone(node))

    def _is_first(self, partition: int) -> bool:
        """Whether it is our turn: we hold it, and everybody before us is gone."""
        return self.own.node in self._lives and next(self._standing(partition), None) == self.own.node

    def _owed(self, partition: int) -> list[str]:
        """Who has not released a partition to us yet, and has to."""
        released = self._turns[partition].released
        return [node for node in self._standing(partition) if node != self.own.node and node not in released]

    def _is_to_us(self, answer: e.ReleaseAnswered) -> bool:
        """Whether a release was given to this very life: one to a former life may be from before it was expelled."""
        return answer.asker == self.own and answer.by in self._servers

    def _may_release(self, asker: ServerLife, partition: int) -> bool:
        """Whether we could let this life act for a partition, once we do not."""
        life = self._lives.get(asker.node)
        if life is None or (life.boot_ms, life.boot) != (asker.boot_ms, asker.boot) or life.expelled:
            return False  # our node does not know it yet, or knows a later one
        line = self._lines[partition]
        return not self._may_hold(self.own.node, partition) or line.index(asker.node) < line.index(self.own.node)

    # --- acting -------------------------------------------------------------------------------------------------------------

    def _review(self, now_ms: int) -> list[Effect]:
        """Do what follows from what we know."""
        begun, ended, asking = list[int](), list[int](), False
        for partition, turn in enumerate(self._turns):
            first = self._is_first(partition)
            if turn.stage == "acting" and not first:
                turn.stage = "draining"
                ended.append(partition)
            elif turn.stage == "asking" and not first:
                self._turns[partition] = _Turn()
            elif turn.stage == "idle" and first:
                self._turns[partition] = turn = _Turn("asking")
                asking = True
                for asker in self._askers.values():
                    asker.clean.discard(partition)
            if turn.stage == "asking" and not self._owed(partition):
                turn.stage = "acting"
                begun.append(partition)
        effects: list[Effect] = [End(tuple(ended))] if ended else []
        effects += [Begin(tuple(begun))] if begun else []
        effects += self._ask(now_ms) if asking else []
        if not any(turn.stage == "asking" for turn in self._turns):
            self._ask_again_ms = None
        for asker in self._askers.values():
            effects += self._serve_asker(asker)
        return effects

    def _ask(self, now_ms: int) -> list[Effect]:
        """Ask for all that we need, and again after a while."""
        owed: dict[str, list[int]] = {}
        for partition, turn in enumerate(self._turns):
            if turn.stage == "asking":
                for node in self._owed(partition):
                    owed.setdefault(node, []).append(partition)
        self._ask_again_ms = now_ms + ASK_AGAIN_MS if owed else None
        return [e.AskRelease(node, self.own, tuple(owed[node])) for node in sorted(owed)]

    def _serve_asker(self, asker: _Asker) -> list[Effect]:
        """Answer an open question, or do what has to be done before."""
        if asker.ask is None:
            return []
        under_way = {p for partitions in asker.flushing.values() for p in partitions}
        later, flush = False, list[int]()
        for partition in sorted(asker.wanted):
            if not self._may_release(asker.life, partition) or partition in asker.clean:
                continue
            stage = self._turns[partition].stage
            later |= partition in under_way or stage == "draining"
            if stage == "idle" and partition not in under_way:
                flush.append(partition)
        effects: list[Effect] = []
        if flush:
            self._flushes += 1
            asker.flushing[self._flushes] = tuple(flush)
            effects.append(e.Flush(self._flushes, tuple(flush), asker.life.node))
        return effects if later or flush else [self._answer(asker)]

    def _answer(self, asker: _Asker) -> e.Answer:
        """What is released by now."""
        free = {p for p in asker.clean if self._turns[p].stage == "idle" and self._may_release(asker.life, p)}
        assert asker.ask is not None
        ask, asker.ask = asker.ask, None
        return e.Answer(ask, Released(self.own.node, asker.life, tuple(sorted(free & asker.wanted))))


def _age(life: e.NodeLife | ServerLife) -> tuple[int, int]:
    """Orders the lives of one node."""
    return life.boot_ms, life.boot
