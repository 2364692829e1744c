"""Each rule is switched off on purpose; the simulator must notice. A check that cannot fail is no check."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from p2p import knowledge, outbox, pull
from p2p.core import Keyspace
from p2p.links import Arrival
from p2p.machine import Machine
from p2p.messages import PullReply
from p2p.writers import WriterBook
from tests.p2p.chaos import (
    a_writer_returns_without_its_memory,
    chaos,
    origin_dies_in_mid_push,
    writing_goes_on_while_a_node_joins,
)

SEEDS = 12

Plant = Callable[[pytest.MonkeyPatch], None]


def claims_ignore_their_base(patch: pytest.MonkeyPatch) -> None:
    """R6: a batch advances the vector although the one before it never came."""

    def merge(vector: Any, shards: Any, writer: int, base: Any, until: Any) -> Any:
        vector[shards, writer] = np.maximum(vector[shards, writer], until)
        return np.ones(len(shards), np.bool_)

    patch.setattr(knowledge, "merge_claims", merge)


def first_part_claims_the_shard(patch: pytest.MonkeyPatch) -> None:
    """R7: a shard's claim holds with its first part."""
    original = knowledge.Knowledge.learn_step

    def learn(self: Any, stamp: int, prev_step: int, touched: int, shards: Any, prev: Any, part: Any, parts: Any) -> bool:
        return original(self, stamp, prev_step, touched, shards, prev, part * 0, parts * 0 + 1)

    patch.setattr(knowledge.Knowledge, "learn_step", learn)


def frontier_jumps_over_gaps(patch: pytest.MonkeyPatch) -> None:
    """The frontier moves with every step that is whole, whatever is missing before it."""

    def advance(self: Any, writer: int, _prev: int, stamp: int) -> bool:
        moved = int(self.frontier[writer]) < stamp
        self.frontier[writer] = max(int(self.frontier[writer]), stamp)
        return moved

    patch.setattr(knowledge.Knowledge, "_advance_frontier", advance)


def strays_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    """R8: digests leave out the rows held above the vector."""
    original = pull.Pull.digests
    patch.setattr(pull.Pull, "digests", lambda self, keyspace, now: (original(self, keyspace, now)[0], 0))


def reply_claims_with_its_first_chunk(patch: pytest.MonkeyPatch) -> None:
    """T1: the answerer's vector is merged before all of its rows are here."""
    original = outbox.next_chunk

    def chunk(stream: Any, keyspace: Keyspace) -> PullReply:
        made = original(stream, keyspace)
        return PullReply(
            made.keyspace, made.request, made.chunk, True, made.columns, stream.writers, stream.vector, stream.frontier
        )

    patch.setattr(outbox, "next_chunk", chunk)


def vector_is_read_after_the_rows(patch: pytest.MonkeyPatch) -> None:
    """The answer claims the vector of the moment its last chunk leaves, not the one its rows were selected under."""
    original = outbox.next_chunk

    def chunk(stream: Any, keyspace: Keyspace) -> PullReply:
        stream.writers = keyspace.knowledge.writers
        stream.vector = np.ascontiguousarray(keyspace.knowledge.vector[:, stream.writers])
        stream.frontier = keyspace.knowledge.frontier[stream.writers]
        return original(stream, keyspace)

    patch.setattr(outbox, "next_chunk", chunk)


def chunks_may_be_missing(patch: pytest.MonkeyPatch) -> None:
    """R3: a hole in the answer is not noticed."""
    original = pull.Pull.on_reply

    def on_reply(self: Any, link: Any, reply: Any, now: Any) -> None:
        asked = self._asked.get(reply.keyspace)
        if asked is not None and asked.request == reply.request:
            asked.next_chunk = reply.chunk
        original(self, link, reply, now)

    patch.setattr(pull.Pull, "on_reply", on_reply)
    patch.setattr(pull.Pull, "abandon_from", lambda *_args: None)
    patch.setattr(Machine, "_arrive", lambda *_args: Arrival.NEXT)


def lost_memory_keeps_its_writer_id(patch: pytest.MonkeyPatch) -> None:
    """R4: a writer that lost its memory goes on under its old id, as if it still held what it wrote."""

    def grant(self: Any, keyspace: int, _seen: Any) -> tuple[int, int]:
        nonce = self._record.bindings.setdefault((keyspace, 0), 77)
        self._record.save()
        return 0, nonce

    patch.setattr(WriterBook, "grant", grant)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (claims_ignore_their_base, chaos),
        (first_part_claims_the_shard, chaos),
        (frontier_jumps_over_gaps, chaos),
        (strays_are_not_compared, origin_dies_in_mid_push),
        (reply_claims_with_its_first_chunk, chaos),
        (vector_is_read_after_the_rows, writing_goes_on_while_a_node_joins),
        (chunks_may_be_missing, chaos),
        (lost_memory_keeps_its_writer_id, a_writer_returns_without_its_memory),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scenarios pass as they are: `test_machine` runs them."""
    plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            scenario(seed)
        except AssertionError:
            return
    pytest.fail(f"{plant.__doc__} Nobody noticed in {SEEDS} runs.")
