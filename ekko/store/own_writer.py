"""This node's writer of one model, and the step that it is storing: what a restarted daemon must know, in the order of R4.

In the model's header file (`ekko.store.layout.MODEL`): a local step's stamp and shards first, then (by others) its rows, then
the vector. A kill at any place between leaves a step that an attach can finish.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels import claims
from ekko.store.kernels.atomics import publish_word
from ekko.store.memory import Mapping
from p2p.replica import U64, WriterIdentity
from p2p.stamps import writer_of


class OwnWriter:
    """Of one model. One thread writes, and nobody else writes these words."""

    def __init__(self, header: Mapping, shards: int) -> None:
        def word(name: str) -> U64:
            return header.words(layout.MODEL.offset(name))

        self._shards = shards
        self._bound, self._bound_address = word("writer_bound"), header.address + layout.MODEL.offset("writer_bound")
        self._id, self._nonce, self._last_stamp = word("writer_id"), word("writer_nonce"), word("writer_last_stamp")
        self._pending, self._pending_address = word("pending_stamp"), header.address + layout.MODEL.offset("pending_stamp")
        self._pending_shards = header.words(layout.MODEL.offset("pending_shards"), (shards + 63) // 64)
        self.identity = self._read()

    def _read(self) -> WriterIdentity | None:
        """What the header says."""
        if not int(self._bound):
            return None
        writer, last, pending = int(self._id), int(self._last_stamp), self.pending
        if pending and writer_of(pending) == writer:
            last = max(last, pending)
        return WriterIdentity(writer, int(self._nonce), last)

    @property
    def pending(self) -> int:
        """The stamp of the step that is being stored, or was last; 0: none yet."""
        return int(self._pending)

    def set(self, identity: WriterIdentity | None) -> None:
        """Write under this identity from now on; None: under none, until there is a fresh one."""
        # Unbound while the words change: a kill in between costs the identity, and a fresh id is taken. Never a wrong one.
        publish_word(self._bound_address, 0)
        if identity is None:
            self.identity = None
            return
        self._id[...] = identity.writer
        self._nonce[...] = identity.nonce
        self._last_stamp[...] = identity.last_stamp
        publish_word(self._bound_address, 1)
        self.identity = self._read()

    def begin(self, stamp: int, shards: NDArray[np.int64]) -> None:
        """A step begins that touches these shards."""
        last = self.identity
        if last is not None:
            self._last_stamp[...] = last.last_stamp  # survives the pending entry it may have come from
        publish_word(self._pending_address, 0)
        claims.set_bits(self._pending_shards, shards)
        publish_word(self._pending_address, stamp)
        if last is not None and writer_of(stamp) == last.writer:
            self.identity = WriterIdentity(last.writer, last.nonce, stamp)

    def merge_pending(self, vector: U64, frontiers: U64) -> None:
        """Attach (R4): what the last local step wrote before the kill is all that anybody will ever see of it.

        Args:
            vector: live [shards, WRITERS_MAX].
            frontiers: live [partitions, WRITERS_MAX].
        """
        stamp = self.pending
        if not stamp:
            return
        touched = np.flatnonzero(np.unpackbits(self._pending_shards.view(np.uint8), bitorder="little", count=self._shards))
        writer = writer_of(stamp)
        vector[touched, writer] = np.maximum(vector[touched, writer], np.uint64(stamp))
        partitions = np.unique(touched % len(frontiers))
        frontiers[partitions, writer] = np.maximum(frontiers[partitions, writer], np.uint64(stamp))
