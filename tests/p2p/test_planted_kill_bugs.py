"""Rules about lives, memory and parts, switched off one at a time; the simulator must notice, as in `test_planted_bugs`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ekko.store.kernels import rows
from ekko.store.own_writer import OwnWriter
from ekko.store.recent import RecentRows
from p2p import reach
from p2p.core import Keyspace
from p2p.machine import Machine
from p2p.members.introductions import Introductions
from p2p.messages import PullReply
from p2p.pulling import outbox
from p2p.pulling.pull import Pull
from p2p.pushing import push
from p2p.stamps import WRITERS_MAX, writer_of
from tests.p2p.chaos import chaos, origin_dies_in_mid_push
from tests.p2p.kill_chaos import (
    a_storm_with_short_queues,
    a_wait_for_what_was_not_pushed,
    a_writer_is_killed_in_mid_row,
    a_writer_is_killed_in_mid_step,
    an_answer_comes_to_the_next_life,
    chaos_with_small_caches,
    nothing_goes_wrong_in_many_messages,
)
from tests.p2p.plants import Plant, Scenario, expect_caught

SEEDS = 12


def a_message_to_a_former_life_is_taken(patch: pytest.MonkeyPatch) -> None:
    """R3: the receiver's boot is not looked at."""
    original = Machine._on_message

    def on_message(self: Any, envelope: Any, *rest: Any) -> None:
        original(self, replace(envelope, receiver_boot=self._core.options.boot), *rest)

    patch.setattr(Machine, "_on_message", on_message)


def a_step_that_was_cut_short_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """R4: an attach does not merge the pending entry, and the writer goes on as if there had been no such step."""
    patch.setattr(OwnWriter, "merge_pending", lambda *_: None)


def a_half_written_row_stays(patch: pytest.MonkeyPatch) -> None:
    """R23: the undo record is not replayed when the next process attaches."""
    patch.setattr(rows, "undo", lambda *_args: 0)


def the_cache_bound_is_not_rebuilt(patch: pytest.MonkeyPatch) -> None:
    """R10: after an attach the update cache believes that there is nothing but what it saw."""
    original = rows.survey

    def survey(address: int, stride: int, shards: int, _dvv: int, _writers: int, free: Any) -> int:
        elsewhere = np.zeros(WRITERS_MAX * (shards + 1) + 1, np.uint64)
        return int(
            original(address, stride, shards, elsewhere.ctypes.data, elsewhere[WRITERS_MAX * shards :].ctypes.data, free)
        )

    patch.setattr(rows, "survey", survey)


def the_cache_bound_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """T4: of what is pruned, the youngest entry is not merged into DVV."""
    original = RecentRows.record

    def record(self: Any, *args: Any) -> None:
        dvv, ring, tail = self._dvv.copy(), self._ring.copy(), int(self._state[1])
        original(self, *args)
        gone = ring[np.arange(tail, int(self._state[1])) & len(ring) - 1] if len(ring) == len(self._ring) else ring[:0]
        if len(gone) > 1:
            self._dvv[:] = dvv
            for place, stamp in gone[:-1].tolist():
                writer, shard = writer_of(stamp), place >> 48
                self._dvv[writer, shard] = max(int(self._dvv[writer, shard]), stamp)

    patch.setattr(RecentRows, "record", record)


def parts_are_taken_for_repeats(patch: pytest.MonkeyPatch) -> None:
    """R7: the seen-set is keyed by (writer, stamp, shard), and later parts of a shard are dropped."""
    original = push.Push.receive
    came: set[tuple[int, ...]] = set()

    def receive(self: Any, link: Any, envelope: Any, batch: Any, now: Any) -> Any:
        first = int(batch.claims.shards[0]) if len(batch.claims.shards) else -1
        key = (self._core.options.boot, batch.keyspace, batch.stamp, first)
        if key in came:
            return False
        came.add(key)
        return original(self, link, envelope, batch, now)

    patch.setattr(push.Push, "receive", receive)


def answers_leave_out_strays(patch: pytest.MonkeyPatch) -> None:
    """R8: rows above the answerer's own vector are not sent."""
    original = outbox.next_chunk

    def chunk(stream: Any, keyspace: Keyspace) -> PullReply:
        made = original(stream, keyspace)
        columns = []
        for one in made.columns:
            assert one.stamps is not None
            writers = (one.stamps & np.uint64(4095)).astype(np.int64)
            known = keyspace.replica.vector[keyspace.replica.shards_of(one.keys), writers] >= one.stamps
            live = known[: len(one.rows)]
            columns.append(replace(one, keys=one.keys[known], rows=one.rows[live], stamps=one.stamps[known]))
        return replace(made, columns=tuple(columns))

    patch.setattr(outbox, "next_chunk", chunk)


def rows_advance_the_vector(patch: pytest.MonkeyPatch) -> None:
    """Invariant 4: what comes as a row counts as a claim."""
    original = Pull.on_reply

    def on_reply(self: Any, link: Any, reply: Any, now: Any) -> None:
        original(self, link, reply, now)
        keyspace = self._core.keyspaces[reply.keyspace]
        for one in reply.columns:
            writers = (one.stamps & np.uint64(4095)).astype(np.int64)
            np.maximum.at(keyspace.replica.vector, (keyspace.replica.shards_of(one.keys), writers), one.stamps)

    patch.setattr(Pull, "on_reply", on_reply)


def whoever_is_asked_has_it(patch: pytest.MonkeyPatch) -> None:
    """R21: a peer answers that a step has reached it before it has."""
    patch.setattr(reach, "reached", lambda _keyspace, _stamp: True)


def what_was_seen_is_never_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Invariant 5: the set of batches seen has no bound."""
    patch.setattr(push, "SEEN_MAX", 1 << 40)
    patch.setattr("sim_cluster.bounds.push", SimpleNamespace(SEEN_MAX=32, SHORT_BYTES_MAX=push.SHORT_BYTES_MAX))
    patch.setattr("p2p.status.push", SimpleNamespace(SEEN_MAX=32))


def former_lives_are_kept(patch: pytest.MonkeyPatch) -> None:
    """Invariant 5: what a peer's former life told, and its link, are not dropped."""
    patch.setattr(Introductions, "drop_link", lambda self, link: self._core.links.pop(link.node, None))


@pytest.mark.parametrize(
    "scenario",
    [
        a_storm_with_short_queues,
        a_wait_for_what_was_not_pushed,
        a_writer_is_killed_in_mid_row,
        a_writer_is_killed_in_mid_step,
        an_answer_comes_to_the_next_life,
        chaos_with_small_caches,
        nothing_goes_wrong_in_many_messages,
    ],
    ids=lambda function: function.__name__,
)
def test_the_scenarios_pass_as_they_are(scenario: Scenario) -> None:
    for seed in range(2):
        scenario(seed)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (a_message_to_a_former_life_is_taken, an_answer_comes_to_the_next_life),
        (a_step_that_was_cut_short_is_forgotten, a_writer_is_killed_in_mid_step),
        (a_half_written_row_stays, a_writer_is_killed_in_mid_row),
        (the_cache_bound_is_not_rebuilt, chaos_with_small_caches),
        (the_cache_bound_is_off_by_one, chaos_with_small_caches),
        (parts_are_taken_for_repeats, nothing_goes_wrong_in_many_messages),
        (answers_leave_out_strays, origin_dies_in_mid_push),
        (rows_advance_the_vector, chaos),
        (what_was_seen_is_never_forgotten, a_storm_with_short_queues),
        (former_lives_are_kept, a_storm_with_short_queues),
        (whoever_is_asked_has_it, a_wait_for_what_was_not_pushed),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)
