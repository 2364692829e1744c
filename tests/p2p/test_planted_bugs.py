"""Each rule is switched off on purpose; the simulator must notice. A check that cannot fail is no check."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ekko.codec import decode, encode, rounded
from ekko.store.model_store import ModelStore
from p2p import knowledge, wire
from p2p.arrivals import Arrivals
from p2p.core import Keyspace
from p2p.identity.writers import WriterBook
from p2p.link.links import Arrival
from p2p.members import trees
from p2p.messages import PullReply
from p2p.pulling import outbox, pull
from p2p.pushing import push
from p2p.replica import KnownSteps, Selection
from p2p.stamps import StampClock
from tests.p2p.chaos import (
    a_clock_goes_back,
    a_clock_runs_ahead,
    a_writer_returns_without_its_memory,
    chaos,
    nothing_goes_wrong,
    origin_dies_between_two_messages,
    origin_dies_in_mid_push,
    rows_are_rounded_once,
    writing_goes_on_while_a_node_joins,
)
from tests.p2p.plants import Plant, Scenario, expect_caught

SEEDS = 30


def claims_ignore_their_base(patch: pytest.MonkeyPatch) -> None:
    """R6: a batch advances the vector although the one before it never came."""

    def merge(vector: Any, shards: Any, writer: int, base: Any, until: Any) -> Any:
        vector[shards, writer] = np.maximum(vector[shards, writer], until)
        return np.ones(len(shards), np.bool_)

    patch.setattr(knowledge, "merge_claims", merge)


def first_part_claims_the_shard(patch: pytest.MonkeyPatch) -> None:
    """R7: a shard's claim holds with its first part."""
    original = knowledge.Knowledge.learn_step

    def learn(
        self: Any, stamp: int, prev_step: int, touched: int, shards: Any, prev: Any, part: Any, parts: Any, *group: Any
    ) -> Any:
        return original(self, stamp, prev_step, touched, shards, prev, part * 0, parts * 0 + 1, *group)

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
    patch.setattr(Arrivals, "take", lambda *_args: Arrival.NEXT)


def lost_memory_keeps_its_writer_id(patch: pytest.MonkeyPatch) -> None:
    """R4: a writer that lost its memory goes on under its old id, as if it still held what it wrote."""

    def grant(self: Any, keyspace: int, _seen: Any) -> tuple[int, int]:
        nonce = self._record.bindings.setdefault((keyspace, 0), 77)
        self._record.save()
        return 0, nonce

    patch.setattr(WriterBook, "grant", grant)


def vectors_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    """R9: digests leave out the vector."""
    patch.setattr(knowledge.Knowledge, "digest", lambda _self: 0)


def a_future_stamp_moves_the_clock(patch: pytest.MonkeyPatch) -> None:
    """R14: a batch's stamp is observed before it is looked at."""
    original = push.Push.receive

    def receive(self: Any, link: Any, envelope: Any, batch: Any, now: Any) -> bool:
        self._core.clock.observe(batch.stamp)
        return original(self, link, envelope, batch, now)

    patch.setattr(push.Push, "receive", receive)


def rows_are_applied_before_they_are_checked(patch: pytest.MonkeyPatch) -> None:
    """R17: a batch's rows are written, then the batch is refused."""
    original = push.Push.receive

    def receive(self: Any, link: Any, envelope: Any, batch: Any, now: Any) -> bool:
        self._core.keyspaces[batch.keyspace].replica.apply(batch.columns, batch.stamp)
        return original(self, link, envelope, batch, now)

    patch.setattr(push.Push, "receive", receive)


def a_node_has_two_parents(patch: pytest.MonkeyPatch) -> None:
    """A node takes on a child of the next one."""
    original = trees.Trees._find_children

    def find(self: trees.Trees, origin: str, tree: int) -> tuple[str, ...]:
        own = original(self, origin, tree)
        line = self.line(self._me.region, origin, tree)
        return own + line[line.index(own[-1]) + 1 :][:1] if own and self._me.node != origin else own

    patch.setattr(trees.Trees, "_find_children", find)


def a_region_has_two_leaders(patch: pytest.MonkeyPatch) -> None:
    """The origin sends to the first two of every region."""
    original = trees.Trees._find_children

    def find(self: trees.Trees, origin: str, tree: int) -> tuple[str, ...]:
        if self._me.node != origin:
            return original(self, origin, tree)
        return tuple(node for region in self._regions for node in self.line(region, origin, tree)[:2])

    patch.setattr(trees.Trees, "_find_children", find)


def a_shard_has_two_trees(patch: pytest.MonkeyPatch) -> None:
    """R1: which leader a message goes to depends on when it is sent."""
    original, calls = trees.Trees.children, itertools.count()

    def children(self: trees.Trees, origin: str, tree: int) -> tuple[str, ...]:
        return original(self, origin, next(calls) // 7 % trees.TREES_MAX if self._me.node == origin else tree)

    patch.setattr(trees.Trees, "children", children)


def the_last_chunk_claims_without_its_rows(patch: pytest.MonkeyPatch) -> None:
    """T1: the vector of an answer is merged before its last rows are applied, and a kill comes between."""
    original = pull.Pull.on_reply

    def on_reply(self: Any, link: Any, reply: Any, now: Any) -> None:
        original(self, link, replace(reply, columns=()) if reply.last else reply, now)

    patch.setattr(pull.Pull, "on_reply", on_reply)


def answers_leave_out_deletes(patch: pytest.MonkeyPatch) -> None:
    """Tombstones are not sent in answers to pulls."""
    original = outbox.next_chunk

    def chunk(stream: Any, keyspace: Keyspace) -> PullReply:
        made = original(stream, keyspace)
        alive = [(one, len(one.rows)) for one in made.columns]
        columns = [replace(one, keys=one.keys[:n], stamps=one.stamps[:n]) for one, n in alive if one.stamps is not None]
        return replace(made, columns=tuple(columns))

    patch.setattr(outbox, "next_chunk", chunk)


def rounded_anew(columns: Any) -> tuple[Any, ...]:
    """Rows in float16, as somebody has them who decoded and encoded them in a coarser codec on the way."""

    def one(section: Any) -> Any:
        values = decode("float16", section.rows, section.rows.shape[1] // 2)
        return replace(section, rows=encode("float16", rounded("bfloat16", values)))

    return tuple(one(section) for section in columns)


def the_origin_rounds_behind_its_own_rows(patch: pytest.MonkeyPatch) -> None:
    """R20: the codec is applied after the local apply, so that the origin holds other bits than it sends."""
    original = push.Push._forward

    def forward(self: Any, keyspace: Any, batch: Any, hops: int, trees: Any, now: Any) -> None:
        sent = batch if hops else wire.seal(replace(batch, columns=rounded_anew(batch.columns), body=()))
        original(self, keyspace, sent, hops, trees, now)

    patch.setattr(push.Push, "_forward", forward)


def answers_are_rounded_again(patch: pytest.MonkeyPatch) -> None:
    """R20: what is pulled was rounded once more than what was pushed."""
    original = outbox.next_chunk

    def chunk(stream: Any, keyspace: Keyspace) -> PullReply:
        made = original(stream, keyspace)
        return replace(made, columns=rounded_anew(made.columns))

    patch.setattr(outbox, "next_chunk", chunk)


def steps_are_named_that_came_in_part(patch: pytest.MonkeyPatch) -> None:
    """R7: an asker names a step in a shard of which some part is still missing."""

    def known_steps(self: knowledge.Knowledge, _bytes_max: int) -> KnownSteps:
        shards = {stamp: [*np.flatnonzero(step.here).tolist(), *step.parts] for stamp, step in self._open.items()}
        return named(self.shards, shards)

    patch.setattr(knowledge.Knowledge, "known_steps", known_steps)


def steps_are_named_in_shards_that_did_not_come(patch: pytest.MonkeyPatch) -> None:
    """An asker names a step as a whole as soon as a message of it came."""

    def known_steps(self: knowledge.Knowledge, _bytes_max: int) -> KnownSteps:
        return named(self.shards, {stamp: list(range(self.shards)) for stamp in self._open})

    patch.setattr(knowledge.Knowledge, "known_steps", known_steps)


def steps_are_named_whose_rows_were_refused(patch: pytest.MonkeyPatch) -> None:
    """An asker names steps that it has seen and not applied: here every third message is dropped on the way to the store."""
    original, refused = push.Push.receive, {}
    calls = itertools.count()

    def receive(self: Any, link: Any, envelope: Any, batch: Any, now: Any) -> bool:
        pending = original(self, link, envelope, batch, now)
        if pending and next(calls) % 3 == 0:
            self._core.effects.pop()  # its apply
            known = refused.setdefault(id(self._core.keyspaces[batch.keyspace].knowledge), {})
            known.setdefault(batch.stamp, []).extend(batch.claims.shards.tolist())
            return False
        return pending

    def known_steps(self: knowledge.Knowledge, _bytes_max: int) -> KnownSteps:
        return named(self.shards, refused.get(id(self), {}))

    patch.setattr(push.Push, "receive", receive)
    patch.setattr(knowledge.Knowledge, "known_steps", known_steps)


def answers_leave_out_what_is_younger_than_a_known_step(patch: pytest.MonkeyPatch) -> None:
    """T1: a range of stamps is left out, not exactly the steps that were named. The newest version of a row that the asker
    lacks may be in it.
    """

    def without(self: ModelStore, selections: Any, known: KnownSteps, *, partitions: int = 1) -> list[Selection]:
        left = []
        for one in selections:
            stamps = np.concatenate([self.read(one.table, one.slots[i : i + 1]).stamps for i in range(len(one.slots))])
            kept = one.slots[(stamps < known.stamps[0]) | (stamps > known.stamps[-1])]
            if len(kept):
                left.append(replace(one, slots=kept))
        return left

    patch.setattr(ModelStore, "without", without)


def named(shards: int, steps: dict[int, list[int]]) -> KnownSteps:
    """Steps by stamp, each in these shards."""
    bits = np.zeros((len(steps), shards + -shards % 8), np.bool_)
    for row, stamp in zip(bits, sorted(steps), strict=True):
        row[steps[stamp]] = True
    return KnownSteps(np.array(sorted(steps), np.uint64), np.packbits(bits, axis=1, bitorder="little"))


def the_clock_forgets_what_it_saw(patch: pytest.MonkeyPatch) -> None:
    """R14: stamps are minted from the wall clock alone."""
    patch.setattr(StampClock, "observe", lambda _self, _stamp: None)


@pytest.mark.parametrize(
    "scenario",
    [
        a_clock_goes_back,
        a_clock_runs_ahead,
        a_writer_returns_without_its_memory,
        nothing_goes_wrong,
        origin_dies_between_two_messages,
        rows_are_rounded_once,
    ],
    ids=lambda function: function.__name__,
)
def test_the_scenarios_pass_as_they_are(scenario: Scenario) -> None:
    for seed in range(2):
        scenario(seed)


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
        (vectors_are_not_compared, origin_dies_between_two_messages),
        (a_future_stamp_moves_the_clock, a_clock_runs_ahead),
        (rows_are_applied_before_they_are_checked, a_clock_runs_ahead),
        (a_node_has_two_parents, nothing_goes_wrong),
        (a_region_has_two_leaders, nothing_goes_wrong),
        (a_shard_has_two_trees, nothing_goes_wrong),
        (the_last_chunk_claims_without_its_rows, chaos),
        (answers_leave_out_deletes, chaos),
        (steps_are_named_that_came_in_part, chaos),
        (steps_are_named_in_shards_that_did_not_come, chaos),
        (steps_are_named_whose_rows_were_refused, chaos),
        (answers_leave_out_what_is_younger_than_a_known_step, chaos),
        (the_clock_forgets_what_it_saw, a_clock_goes_back),
        (the_origin_rounds_behind_its_own_rows, rows_are_rounded_once),
        (answers_are_rounded_again, rows_are_rounded_once),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scenarios pass as they are: `test_machine` runs them."""
    expect_caught(plant, scenario, monkeypatch, SEEDS)


def test_a_plant_that_nobody_notices_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the checks, here and in the other modules with planted bugs."""
    with pytest.raises(pytest.fail.Exception, match="Nobody noticed in 3 runs"):
        expect_caught(lambda _patch: None, nothing_goes_wrong, monkeypatch, 3)
