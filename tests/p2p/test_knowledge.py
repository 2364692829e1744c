"""Claims merge in any order to what they say, and never to more (theorem T1, R6, R7)."""

import random
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p import knowledge as knowledge_module
from p2p.knowledge import OPEN_STEPS_MAX, Knowledge, merge_claims
from p2p.stamps import WRITERS_MAX

SHARDS = 4


def fresh() -> Knowledge:
    return Knowledge(np.zeros((SHARDS, WRITERS_MAX), np.uint64), np.zeros(WRITERS_MAX, np.uint64))


@dataclass(frozen=True)
class Message:
    """One message of a step: which shards, and which part of each."""

    stamp: int
    writer_prev: int
    touched: int
    shards: tuple[int, ...]
    prev: tuple[int, ...]
    part: int = 0
    parts: int = 1


def learn(knowledge: Knowledge, message: Message) -> bool:
    count = len(message.shards)
    return knowledge.learn_step(
        message.stamp,
        message.writer_prev,
        message.touched,
        np.array(message.shards, np.uint32),
        np.array(message.prev, np.uint64),
        np.full(count, message.part, np.uint16),
        np.full(count, message.parts, np.uint16),
    )


def stream(draw: random.Random, steps: int, writer: int = 3) -> list[Message]:
    """Steps of one writer, some of them cut into several messages and parts."""
    last = [0] * SHARDS
    previous = 0
    messages = []
    for number in range(1, steps + 1):
        stamp = (number << 12) | writer
        shards = tuple(sorted(draw.sample(range(SHARDS), draw.randint(0, SHARDS))))
        prev = tuple(last[shard] for shard in shards)
        if len(shards) > 1 and draw.random() < 0.3:  # the first shard alone, in two parts
            messages += [Message(stamp, previous, len(shards), shards[:1], prev[:1], part, 2) for part in (0, 1)]
            messages.append(Message(stamp, previous, len(shards), shards[1:], prev[1:]))
        else:
            messages.append(Message(stamp, previous, len(shards), shards, prev))
        for shard in shards:
            last[shard] = stamp
        previous = stamp
    return messages


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_any_order_with_repeats_ends_where_order_ends(seed: int, steps: int) -> None:
    draw = random.Random(seed)
    messages = stream(draw, steps)
    in_order, shuffled = fresh(), fresh()
    for message in messages:
        learn(in_order, message)
    mixed = messages + draw.choices(messages, k=len(messages))
    draw.shuffle(mixed)
    for message in mixed:
        learn(shuffled, message)
    assert np.array_equal(in_order.vector, shuffled.vector)
    assert np.array_equal(in_order.frontier, shuffled.frontier)
    assert int(in_order.frontier[3]) == messages[-1].stamp
    assert in_order.open_steps == shuffled.open_steps == 0


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0.0, 1.0))
def test_knowledge_never_says_more_than_what_came(seed: int, steps: int, kept: float) -> None:
    """Invariant 3: with messages missing, a covered (shard, stamp) means that all of the shard's messages came."""
    draw = random.Random(seed)
    messages = stream(draw, steps)
    came = [message for message in messages if draw.random() < kept]
    draw.shuffle(came)
    knowledge = fresh()
    for message in came:
        learn(knowledge, message)
    for shard in range(SHARDS):
        needed = [message for message in messages if shard in message.shards]
        reached = int(knowledge.vector[shard, 3])
        assert all(message in came for message in needed if message.stamp <= reached)
    assert all(message in came for message in messages if message.stamp <= int(knowledge.frontier[3]))


def named_by(knowledge: Knowledge, bytes_max: int = 1 << 20) -> set[tuple[int, int]]:
    """(stamp, shard) of the steps that would be named to who is asked."""
    known = knowledge.known_steps(bytes_max)
    stamps = known.stamps.tolist()
    assert stamps == sorted(set(stamps))
    bits = np.unpackbits(known.shards, axis=1, bitorder="little")
    return {(stamp, int(shard)) for stamp, row in zip(stamps, bits, strict=True) for shard in np.flatnonzero(row)}


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0.0, 1.0))
def test_known_are_just_the_steps_above_the_vector_that_came_whole(seed: int, steps: int, kept: float) -> None:
    """By shard; never one of which a part is missing (R7), and all others, so that nothing is sent twice."""
    draw = random.Random(seed)
    messages = stream(draw, steps)
    came = [message for message in messages if draw.random() < kept]
    draw.shuffle(came)
    knowledge = fresh()
    for message in came:
        learn(knowledge, message)
    expected = set()
    for message in messages:
        for shard in message.shards:
            parts = [one for one in messages if one.stamp == message.stamp and shard in one.shards]
            if message.stamp > int(knowledge.vector[shard, 3]) and all(part in came for part in parts):
                expected.add((message.stamp, shard))
    assert named_by(knowledge) == expected


def test_of_too_many_steps_the_youngest_are_named() -> None:
    knowledge = fresh()
    for number in (4, 2, 3):
        learn(knowledge, Message((number << 12) | 1, ((number - 1) << 12) | 1, 1, (0,), (((number - 1) << 12) | 1,)))
    assert named_by(knowledge, bytes_max=2 * 9) == {((number << 12) | 1, 0) for number in (3, 4)}
    assert named_by(knowledge, bytes_max=8) == set()


def test_a_step_that_is_told_of_twice_is_named_once() -> None:
    """By an origin that lies: alone, and as one of a group. Who names it must not be taken for the liar."""
    knowledge = fresh()
    stamps = np.array([(number << 12) | 1 for number in (3, 4)], np.uint64)
    gap, one = np.array([(2 << 12) | 1], np.uint64), np.ones(1, np.uint16)
    shard = np.zeros(1, np.uint32)
    knowledge.learn_step(int(stamps[1]), int(gap[0]), 1, shard, gap, one - 1, one, stamps[1:], stamps)
    knowledge.learn_step(int(stamps[0]), int(gap[0]), 1, shard, gap, one - 1, one)
    assert named_by(knowledge) == {(int(stamp), 0) for stamp in stamps}


def test_naming_few_steps_does_not_cost_what_all_that_wait_would() -> None:
    """Of 2,048 shards, of which 248 steps are named."""
    shards = np.arange(2_048, dtype=np.uint32)
    knowledge = Knowledge(np.zeros((len(shards), WRITERS_MAX), np.uint64), np.zeros(WRITERS_MAX, np.uint64))
    one = np.ones(len(shards), np.uint16)
    for number in range(2, OPEN_STEPS_MAX):
        gap = np.full(len(shards), (number << 12) | 1, np.uint64)
        knowledge.learn_step(((number << 12) | 1) + 4096, int(gap[0]), len(shards), shards, gap, one - 1, one)
    tracemalloc.start()
    known = knowledge.known_steps(1 << 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(known.stamps) == (1 << 16) // (8 + 256)
    assert known.shards.all()
    assert peak < 2 << 20, "as a bit for each step and shard, and a byte while they are made"


def test_claims_that_wait_do_not_wait_twice() -> None:
    """Whoever repeats a step, as it was or cut otherwise, makes us keep nothing more (invariant 7)."""
    knowledge, gap = fresh(), (1 << 12) | 5
    whole = Message((2 << 12) | 5, gap, 4, (0, 1, 2, 3), (gap,) * 4)
    for _ in range(3):
        for first in range(4):
            learn(knowledge, Message(whole.stamp, gap, 4, whole.shards[first:], whole.prev[first:]))
    (step,) = knowledge._open.values()
    assert sum(len(shards) for shards, *_ in step.waiting) == 4
    assert learn(knowledge, Message(gap, 0, 4, whole.shards, (0,) * 4))
    assert int(knowledge.frontier[5]) == whole.stamp
    assert knowledge.open_steps == 0


def test_parts_that_came_are_bounded_and_forgotten_with_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a peer that sends parts without rows, which cost it a few bytes each (invariant 7)."""
    monkeypatch.setattr(knowledge_module, "OPEN_PARTS_MAX", 20)
    knowledge = fresh()

    def kept() -> int:
        return sum(len(came) for step in knowledge._open.values() for came in step.parts.values())

    for number in (2, 3):
        for part in range(30):
            learn(knowledge, Message((number << 12) | 5, (1 << 12) | 5, 1, (0,), (0,), part, 100))
            learn(knowledge, Message((number << 12) | 5, (1 << 12) | 5, 1, (0,), (0,), part, 100))  # again
            assert kept() == knowledge._parts_kept <= 20
    knowledge.give_up(5)
    assert knowledge._parts_kept == 0
    for part in range(15):
        whole = learn(knowledge, Message((4 << 12) | 5, 0, 1, (0,), (0,), part, 15))
    assert whole
    assert (knowledge._parts_kept, knowledge.open_steps) == (0, 0)


def test_claim_waits_for_its_gap_and_is_absorbed_when_it_fills() -> None:
    knowledge = fresh()
    first, second = (1 << 12) | 5, (2 << 12) | 5
    assert not learn(knowledge, Message(second, first, 1, (2,), (first,)))
    assert int(knowledge.vector[2, 5]) == 0
    assert knowledge.oldest_open == second
    assert learn(knowledge, Message(first, 0, 1, (2,), (0,)))
    assert int(knowledge.vector[2, 5]) == second == int(knowledge.frontier[5])


def test_reply_merges_only_from_the_base_it_was_asked_with() -> None:
    knowledge = fresh()
    stamp = (9 << 12) | 1
    base = np.array([[(4 << 12) | 1], [0], [0], [0]], np.uint64)  # claims more in shard 0 than this node has
    until = np.full((SHARDS, 1), stamp, np.uint64)
    knowledge.learn_reply(np.array([1], np.uint16), base, until, np.array([stamp], np.uint64))
    assert knowledge.vector[:, 1].tolist() == [0, stamp, stamp, stamp]
    assert int(knowledge.frontier[1]) == 0


@given(st.lists(st.integers(0, 9), min_size=SHARDS, max_size=SHARDS), st.integers(0, 9), st.integers(0, 9))
def test_merge_is_monotone_and_idempotent(held: list[int], base: int, until: int) -> None:
    vector = np.zeros((SHARDS, WRITERS_MAX), np.uint64)
    vector[:, 1] = held
    shards = np.arange(SHARDS, dtype=np.uint32)
    bases = np.full(SHARDS, base, np.uint64)
    fits = merge_claims(vector, shards, 1, bases, np.uint64(until))
    assert vector[:, 1].tolist() == [max(h, until) if h >= base else h for h in held]
    assert fits.tolist() == [h >= base for h in held]
    once = vector.copy()
    merge_claims(vector, shards, 1, bases, np.uint64(until))
    # A second merge can only find claims that the first one enabled.
    assert (vector >= once).all()


def test_digest_tells_vectors_apart_and_ignores_writers_that_only_were_named() -> None:
    one, other = fresh(), fresh()
    stamp = (7 << 12) | 2
    for knowledge in (one, other):
        learn(knowledge, Message(stamp, 0, 1, (1,), (0,)))
    assert one.digest() == other.digest()
    learn(other, Message((8 << 12) | 9, (7 << 12) | 9, 1, (1,), ((7 << 12) | 9,)))  # waits: nothing is known of writer 9
    assert one.digest() == other.digest()
    learn(other, Message((9 << 12) | 2, stamp, 1, (1,), (stamp,)))
    assert one.digest() != other.digest()


def test_waiting_steps_are_bounded_and_what_is_dropped_is_counted() -> None:
    knowledge = fresh()
    for number in range(2, OPEN_STEPS_MAX + 4):
        learn(knowledge, Message((number << 12) | 1, ((number - 1) << 12) | 1, 1, (0,), (((number - 1) << 12) | 1,)))
    assert knowledge.open_steps == OPEN_STEPS_MAX
    assert knowledge.dropped == 2


@pytest.mark.parametrize("missing", [0, 1])
def test_a_shard_in_parts_is_claimed_only_when_all_parts_came(missing: int) -> None:
    knowledge = fresh()
    stamp = (1 << 12) | 4
    for part in (0, 0, 1, 1):
        if part != missing:
            learn(knowledge, Message(stamp, 0, 1, (3,), (0,), part, 2))
    assert int(knowledge.vector[3, 4]) == 0
    learn(knowledge, Message(stamp, 0, 1, (3,), (0,), missing, 2))
    assert int(knowledge.vector[3, 4]) == stamp


def test_who_has_nothing_of_a_retired_writer_differs_from_who_has_all() -> None:
    """Else neither has its entry in the digest: one since it is settled, the other since it is empty."""
    floor = np.array([(7 << 12) + 5] * 2, np.uint64)
    has_all, has_nothing = (Knowledge(np.zeros((2, WRITERS_MAX), np.uint64), np.zeros(WRITERS_MAX, np.uint64)) for _ in "ab")
    has_all.vector[:, 5] = floor
    for one in (has_all, has_nothing):
        one.retire(5, floor)
    assert has_all.digest() != has_nothing.digest()
    has_nothing.vector[:, 5] = floor
    assert has_all.digest() == has_nothing.digest()


def test_a_frontier_that_waits_keeps_no_message_alive() -> None:
    knowledge, message = fresh(), np.full(1 << 20, np.iinfo(np.uint64).max, np.uint64)
    shards = np.arange(SHARDS, dtype=np.uint32)
    for stamp in (4_097, 8_193, 12_289):
        knowledge.learn_frontier_later(1, stamp, shards, message[:SHARDS])
    kept = knowledge._later[1]
    assert [stamp for stamp, *_ in kept] == [4_097, 12_289], "the oldest and the newest"
    assert not any(np.shares_memory(least, message) or np.shares_memory(own, shards) for _, own, least in kept)
