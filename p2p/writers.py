"""Writer ids: who may write under which 12-bit id, and the cluster they belong to.

An id is bound for ever to a 64-bit nonce that every batch carries: a second nonce under one id is a duplicated machine or a
lost record, and is refused, never merged (R12). Ids are granted by one founder, here the training node itself, which records
a grant durably before it uses it. The cluster nonce, minted with the first grant, keeps two clusters from merging.
"""

import random
from collections.abc import Iterable
from typing import Any, Protocol

import msgpack

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.stamps import WRITERS_MAX


class Ledger(Protocol):
    """A small durable record; `save` returns once it would survive a crash of the machine."""

    def load(self) -> bytes | None:
        """What was saved last, or None."""

    def save(self, record: bytes) -> None:
        """Replace the record, atomically."""


class WriterBook:
    """Bindings of writer ids that this node has heard of or granted.

    Args:
        ledger: where grants are recorded.
        rng: for nonces.
    """

    def __init__(self, ledger: Ledger, rng: random.Random) -> None:
        self._ledger = ledger
        self._rng = rng
        self._bindings: dict[tuple[int, int], int] = {}  # (keyspace, writer) -> nonce
        self.cluster = 0
        self.last_boot_ms = 0
        self._restore(ledger.load())

    def _restore(self, record: bytes | None) -> None:
        if record is None:
            return
        try:
            state: dict[str, Any] = msgpack.unpackb(record)
            self.cluster, self.last_boot_ms = int(state["cluster"]), int(state["boot_ms"])
            self._bindings = {(int(k), int(w)): int(nonce) for k, w, nonce in state["granted"]}
        except Exception as error:
            raise LocalProtocolError(
                f"the record of granted writer ids is damaged ({error!r}): restore the file, or remove it to join as a new node"
            ) from error

    def begin_life(self, boot_ms: int) -> int:
        """Record a new life; returns its `boot_ms`, larger than that of every life before, whatever the clock says."""
        self.last_boot_ms = max(boot_ms, self.last_boot_ms + 1)
        self._save()
        return self.last_boot_ms

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
            self.cluster = cluster
            self._save()

    def learn(self, keyspace: int, writer: int, nonce: int) -> None:
        """Learn a binding. Raises as `check`."""
        self.check(keyspace, writer, nonce)
        self._bindings[keyspace, writer] = nonce

    def check(self, keyspace: int, writer: int, nonce: int) -> None:
        """Refuse a second nonce under a bound id; changes nothing.

        Raises:
            RemoteProtocolError: the id is bound to another nonce.
        """
        known = self._bindings.get((keyspace, writer), nonce)
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
        used = [*seen, *(writer for bound, writer in self._bindings if bound == keyspace)]
        writer = max(used, default=-1) + 1
        if writer >= WRITERS_MAX:
            raise LocalProtocolError(f"all {WRITERS_MAX} writer ids of this model were granted; load it as a new model")
        nonce = self._rng.getrandbits(64) | 1
        self._bindings[keyspace, writer] = nonce
        if not self.cluster:
            self.cluster = self._rng.getrandbits(64) | 1
        self._save()
        return writer, nonce

    def _save(self) -> None:
        granted = [[keyspace, writer, nonce] for (keyspace, writer), nonce in self._bindings.items()]
        self._ledger.save(msgpack.packb({"cluster": self.cluster, "boot_ms": self.last_boot_ms, "granted": granted}))
