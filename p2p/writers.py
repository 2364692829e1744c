"""Writer ids: who may write under which 12-bit id, and the cluster they belong to.

An id is bound for ever to a 64-bit nonce that every batch carries: a second nonce under one id is a duplicated machine or a
lost record, and is refused, never merged (R12). Ids are granted by one founder, here the training node itself, which records
a grant durably before it uses it. The cluster nonce, minted with the first grant, keeps two clusters from merging.
"""

import random
from collections.abc import Iterable

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.ledger import NodeRecord
from p2p.stamps import WRITERS_MAX


class WriterBook:
    """Bindings of writer ids that this node has heard of or granted.

    Args:
        record: where grants are recorded.
        rng: for nonces.
    """

    def __init__(self, record: NodeRecord, rng: random.Random) -> None:
        self._record = record
        self._rng = rng

    @property
    def cluster(self) -> int:
        """The cluster nonce; 0: none yet."""
        return self._record.cluster

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

    def learn(self, keyspace: int, writer: int, nonce: int) -> None:
        """Learn a binding. Raises as `check`."""
        self.check(keyspace, writer, nonce)
        self._record.bindings[keyspace, writer] = nonce

    def check(self, keyspace: int, writer: int, nonce: int) -> None:
        """Refuse a second nonce under a bound id; changes nothing.

        Raises:
            RemoteProtocolError: the id is bound to another nonce.
        """
        known = self._record.bindings.get((keyspace, writer), nonce)
        if known != nonce:
            raise RemoteProtocolError(
                f"writer {writer} of keyspace {keyspace} is bound to nonce {known:016x}, refused {nonce:016x}: "
                "two nodes write under one id, or a founder lost its record"
            )

    def grant(self, keyspace: int, seen: Iterable[int]) -> tuple[int, int]:
        """A fresh (writer, nonce), recorded before it is returned.

        Args:
            keyspace: where it is to write.
            seen: writers that rows and vectors speak of; a founder that lost its record knows of them by these alone.

        Raises:
            LocalProtocolError: all 4,096 ids of this keyspace were granted.
        """
        used = [*seen, *(writer for bound, writer in self._record.bindings if bound == keyspace)]
        writer = max(used, default=-1) + 1
        if writer >= WRITERS_MAX:
            raise LocalProtocolError(f"all {WRITERS_MAX} writer ids of this model were granted; load it as a new model")
        nonce = self._rng.getrandbits(64) | 1
        self._record.bindings[keyspace, writer] = nonce
        if not self.cluster:
            self._record.cluster = self._rng.getrandbits(64) | 1
        self._record.save()
        return writer, nonce
