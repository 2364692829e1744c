"""Writer ids: who may write under which 12-bit id, and the cluster they belong to (R12).

Think of a mint that hands out rolls of numbered tickets. The node that founds a cluster holds all 4,096 ids, in blocks of
`BLOCK_IDS`. It gives blocks to nodes that ask (`p2p.identity.allotment`), and these may pass some of theirs on; whoever gives
writes down that a block is gone *before* it says so, and whoever uses an id writes down that it is used before it writes a row.
So no id is ever in two hands, whatever crashes in between, and nobody has to be asked when a writer loses its memory and needs
a fresh one.

An id is bound to a 64-bit nonce that every batch carries: a second nonce under one id is a duplicated machine or a lost record,
and is refused, never merged. The cluster nonce, minted by the founder, keeps two clusters from merging.

Clusters of protocol version 1 have no blocks: there the only training node grants itself the id above all that it knows of.
Such a cluster is founded anew when all of its nodes have been upgraded; its nonce is odd for ever, that of others even.
"""

import random
from collections.abc import Collection, Iterable
from typing import Final

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.identity.ledger import NodeRecord
from p2p.messages import DONE
from p2p.stamps import WRITERS_MAX

# A training node uses up an id a model with each loss of its memory, and a block with each loss of its disk: three of them that
# have none may be deployed anew 300 times.
BLOCK_IDS: Final = 4
BLOCKS: Final = WRITERS_MAX // BLOCK_IDS


class WriterConflictError(RemoteProtocolError):
    """Two nonces under one writer id."""


class WriterBook:
    """Ids that this node may use or give away, and bindings that it has heard of.

    Args:
        record: where grants are recorded.
        rng: for nonces.
    """

    def __init__(self, record: NodeRecord, rng: random.Random) -> None:
        self._record = record
        self._rng = rng
        record.split_blocks(BLOCK_IDS)
        self._retired: dict[tuple[int, int, int], None] = {}
        self.remember_retired()
        for one in record.retired.values():
            if one.stage == DONE and one.keyspace == one.family:
                self.release(one.family, one.writer, one.nonce)

    # --- the cluster

    @property
    def cluster(self) -> int:
        """The cluster nonce; 0: none yet."""
        return self._record.cluster

    @property
    def founded(self) -> bool:
        """Whether the ids of this cluster are in blocks."""
        return self._record.founded or (self.cluster != 0 and self.cluster % 2 == 0)

    def found(self) -> None:
        """Take all ids, durably; only where nobody else can do so."""
        if not self.cluster:
            self._record.cluster = (self._rng.getrandbits(63) | 1) << 1
        self._record.founded = True
        self._record.blocks = dict.fromkeys(range(BLOCKS))
        self._record.save()

    def note_founded(self) -> None:
        """Somebody has founded our cluster, which is one of version 1."""
        if not self.founded:
            self._record.founded = True
            self._record.save()

    def check_cluster(self, cluster: int) -> None:
        """Refuse a peer of another cluster; changes nothing.

        Raises:
            RemoteProtocolError: it belongs to another cluster.
        """
        if cluster and self.cluster and cluster != self.cluster:
            raise RemoteProtocolError(
                f"peer belongs to cluster {cluster:016x}, this node to {self.cluster:016x}: "
                "remove the node's run_dir to move it to another cluster"
            )

    def adopt_cluster(self, cluster: int) -> None:
        """Take the cluster nonce of a peer, when we have none. Raises as `check_cluster`."""
        self.check_cluster(cluster)
        if cluster and not self.cluster:
            self._record.cluster = cluster
            self._record.save()

    # --- bindings

    def learn(self, keyspace: int, bindings: Iterable[tuple[int, int]]) -> None:
        """Learn (writer, nonce) pairs that were checked; durable on return, with one write for all."""
        bound = self._record.bindings
        new = {
            (keyspace, writer): nonce
            for writer, nonce in bindings
            if (keyspace, writer) not in bound and not self.is_retired(keyspace, writer, nonce)
        }
        if new:
            bound.update(new)
            self._record.save()  # or a second one could take its place while we are down

    def check(self, keyspace: int, writer: int, nonce: int) -> None:
        """Refuse a second nonce under a bound id; changes nothing.

        Raises:
            WriterConflictError: the id is bound to another nonce.
        """
        known = self._record.bindings.get((keyspace, writer), nonce)
        if known != nonce:
            raise WriterConflictError(
                f"writer {writer} of keyspace {keyspace} is bound to nonce {known:016x}, refused {nonce:016x}: "
                "two nodes write under one id, or a founder lost its record"
            )

    def release(self, keyspace: int, writer: int, nonce: int) -> None:
        """A retired writer's id may be bound to another nonce; durable with the next save."""
        if self.nonce_of(keyspace, writer) == nonce:
            del self._record.bindings[keyspace, writer]

    def forget_family(self, family: int) -> None:
        """A family of keyspaces was dropped; durable with the next save, and harmless before: its number is not used again."""
        for key in [key for key in self._record.bindings if key[0] == family]:
            del self._record.bindings[key]
        self._record.note_change()

    def is_retired(self, keyspace: int, writer: int, nonce: int) -> bool:
        """Whether the writer with this nonce writes no more, in a family of keyspaces."""
        return (keyspace, writer, nonce) in self._retired

    def note_retired(self, keyspace: int, writer: int, nonce: int) -> None:
        """This writer writes no more."""
        self._retired[keyspace, writer, nonce] = None

    def remember_retired(self) -> None:
        """Begin anew with the writers that the record says write no more."""
        self._retired = dict.fromkeys((one.family, one.writer, one.nonce) for one in self._record.retired.values())

    def nonce_of(self, keyspace: int, writer: int) -> int:
        """The nonce that an id is bound to; 0: unknown."""
        return self._record.bindings.get((keyspace, writer), 0)

    # --- ids

    @property
    def holder(self) -> int:
        """Under this nonce others give us blocks; a new one after each gift of ours.

        So an answer under it was given after all that we gave away, and may bring that back; one that is repeated later, when
        we have passed on what it brought, is under an earlier nonce.
        """
        if not self._record.holder:
            self._record.holder = self._rng.getrandbits(64) | 1
            self._record.save()
        return self._record.holder

    @property
    def blocks(self) -> Collection[int]:
        """Blocks that are ours."""
        return self._record.blocks.keys()

    def free_id(self, keyspaces: Collection[int], seen: Iterable[int] = ()) -> int | None:
        """The first id of our blocks that nobody uses in any of these families; None when there is none."""
        used = {*seen, *(writer for keyspace, writer in self._record.bindings if keyspace in keyspaces)}
        ids = (id_ for block in sorted(self.blocks) for id_ in range(block * BLOCK_IDS, (block + 1) * BLOCK_IDS))
        return next((id_ for id_ in ids if id_ not in used), None)

    def grant(self, keyspace: int, seen: Iterable[int]) -> tuple[int, int]:
        """A fresh (writer, nonce) for ourselves, recorded before it is returned.

        Args:
            keyspace: the family where it is to write.
            seen: writers that rows and vectors speak of; a founder that lost its record knows of them by these alone.

        Raises:
            LocalProtocolError: there is no free id.
        """
        writer = self._next_id(keyspace, list(seen))
        nonce = self._rng.getrandbits(64) | 1
        self._record.bindings[keyspace, writer] = self._record.own[keyspace, writer] = nonce
        if not self.cluster:
            assert not self.founded, "somebody founded a cluster without a nonce"
            self._record.cluster = self._rng.getrandbits(64) | 1  # one of version 1
        self._record.save()
        return writer, nonce

    def _next_id(self, keyspace: int, seen: list[int]) -> int:
        if self.founded:
            free = self.free_id([keyspace], seen)
            if free is None:
                raise LocalProtocolError("this node has no writer id left: it asks others for a block of them")
            return free
        used = [*seen, *(writer for bound, writer in self._record.bindings if bound == keyspace)]
        writer = max(used, default=-1) + 1
        if writer >= WRITERS_MAX:
            raise LocalProtocolError(f"all {WRITERS_MAX} writer ids of this model were granted; load it as a new model")
        return writer

    # --- blocks

    def give(self, asker: int, held: Collection[int], steward: bool = False) -> tuple[int, ...]:
        """Blocks for another node, recorded as gone before they are returned; none when we have none to spare.

        Args:
            asker: the other's holder nonce. What was given to it before and has not reached it is given again.
            held: the blocks that it has.
            steward: it is to give them on, so it gets half of ours; a writer uses up one with its disk.
        """
        again = tuple(block for block, who in self._record.given.items() if who == asker and block not in held)
        if again:
            return again
        touched = {writer // BLOCK_IDS for _, writer in self._record.bindings}
        spare = [block for block in sorted(self.blocks) if block not in touched]
        blocks = tuple(spare[len(spare) - (len(spare) // 2 if steward else 1) :]) if len(spare) > 1 else ()
        for block in blocks:
            del self._record.blocks[block]
            self._record.given[block] = asker
        if blocks:
            if self._record.holder:  # else nobody has given us anything yet
                self._record.holder = (self._record.holder + 2) % (1 << 64)
            self._record.save()
        return blocks

    def take(self, blocks: Iterable[int], clock_floor: int) -> None:
        """Blocks were given to us as we are (`holder`); no stamp that we mint may be below `clock_floor`. Durable on return."""
        for block in blocks:
            self._record.given.pop(block, None)  # it has come back
            self._record.blocks[block] = None
        self._record.clock_floor = max(self._record.clock_floor, clock_floor)
        self._record.save()
