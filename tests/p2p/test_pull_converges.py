"""Theorem T7, on real stores without a network: equal vectors and equal strays imply equal rows, and pulls alone get there.

Rows are delivered at random and claim nothing, messages of steps claim as R6 and R7 say, pulls of everything or of some shards
merge claims, lives end meanwhile. Who pulls everything names the steps that it has above its vector; they are not sent again.
Whenever two replicas have the same digest of vector and strays, they must hold the same; in the end all do.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store
from p2p.knowledge import Knowledge
from p2p.replica import KnownSteps, RowColumns, Selection
from p2p.stamps import WRITERS_MAX
from sim_cluster.checkers import contents

SHARDS = 3
REPLICAS = 3
SPEC = ModelSpec("ctr", SHARDS, {"item": TableSpec("item", 1)})
ITEM = table_id("item")


@dataclass(frozen=True)
class Message:
    """One shard of a step, or one of two parts of it."""

    stamp: int
    writer_prev: int
    touched: int  # shards, by the whole step
    shard: int
    prev: int
    part: int
    parts: int
    columns: RowColumns


class Replica:
    """A node's rows and knowledge of one model; it writes under the id of its number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.store = Store.anonymous()
        self.model = self.store.add_model(SPEC)
        self.knowledge = Knowledge(self.model.vector, self.model.frontier)

    def restart(self) -> None:
        self.knowledge = Knowledge(self.model.vector, self.model.frontier)

    def write(self, stamp: int, keys: list[int], delete: bool) -> list[Message]:
        columns = rows_of(stamp, keys, delete)
        touched = np.unique(self.model.shards_of(columns.keys))
        prev = self.model.vector[touched, self.number].copy()
        frontier = int(self.model.frontier[self.number])
        self.model.apply([columns], stamp)
        one = np.ones(len(touched), np.uint16)
        self.knowledge.learn_step(stamp, frontier, len(touched), touched.astype(np.uint32), prev, one - 1, one)
        messages = []
        for shard, before in zip(touched.tolist(), prev.tolist(), strict=True):
            own = [key for key in keys if self.model.shards_of(np.array([key], np.uint64))[0] == shard]
            halves = [own[::2], own[1::2]] if len(own) > 1 else [own]
            for part, half in enumerate(halves):
                rows = rows_of(stamp, half, delete)
                messages.append(Message(stamp, frontier, len(touched), shard, before, part, len(halves), rows))
        return messages

    def receive(self, message: Message) -> None:
        """Rows, then the claim."""
        self.model.apply([message.columns], 0)
        self.knowledge.learn_step(
            message.stamp,
            message.writer_prev,
            message.touched,
            np.array([message.shard], np.uint32),
            np.array([message.prev], np.uint64),
            np.array([message.part], np.uint16),
            np.array([message.parts], np.uint16),
        )

    def pull(self, other: "Replica", shards: list[int] | None, breaks_off: bool) -> None:
        """Everything, or some shards; half of the rows and no claims when it breaks off."""
        chosen = np.arange(SHARDS) if shards is None else np.array(shards)
        base = np.full((SHARDS, WRITERS_MAX), np.iinfo(np.uint64).max)
        base[chosen] = self.model.vector[chosen]
        writers = other.knowledge.writers
        until = np.ascontiguousarray(other.model.vector[np.ix_(chosen, writers)])
        selections = other.model.changed_since(base)
        if shards is None:
            selections = WITHOUT(other, selections, NAMED(self))
        for selection in selections:
            slots = selection.slots[::2] if breaks_off else selection.slots
            if len(slots):
                self.model.apply([other.model.read(selection.table, slots)], 0)
        if breaks_off:
            return
        asked = np.ascontiguousarray(base[np.ix_(chosen, writers)])
        if shards is None:
            self.knowledge.learn_reply(writers, asked, until, other.model.frontier[writers])
        else:
            nothing = np.zeros(len(writers), np.uint64)
            self.knowledge.learn_reply(writers, asked, until, nothing, chosen.astype(np.uint32))

    @property
    def digest(self) -> tuple[int, int]:
        return self.knowledge.digest(), self.model.stray_digest()


Named = Callable[[Replica], KnownSteps]
Without = Callable[[Replica, Sequence[Selection], KnownSteps], Sequence[Selection]]


def named_as_it_is(asker: Replica) -> KnownSteps:
    return asker.knowledge.known_steps(1 << 16)


def without_as_it_is(other: Replica, selections: Sequence[Selection], known: KnownSteps) -> Sequence[Selection]:
    return other.model.without(selections, known) if len(known.stamps) else selections


# How steps are named and left out; bugs are planted here.
NAMED: Named = named_as_it_is
WITHOUT: Without = without_as_it_is


def rows_of(stamp: int, keys: list[int], delete: bool) -> RowColumns:
    live = 0 if delete else len(keys)
    values = np.full((live, 1), stamp % 1_000_003, np.float32).view(np.uint8)
    return RowColumns(ITEM, np.array(keys, np.uint64), values, np.full(len(keys), stamp, np.uint64))


def check_claims(replica: Replica, history: list[tuple[int, int, int]]) -> None:
    """Invariant 3: (shard, key, stamp) of all that was written; what the vector covers is held, or a newer version."""
    held = {key: stamp for (_, key), (stamp, _) in contents(replica.store, "ctr").items()}
    for shard, key, stamp in history:
        if int(replica.model.vector[shard, stamp & 4095]) >= stamp:
            assert held.get(key, 0) >= stamp, "claimed and not held"


def walk(seed: int, steps: int) -> None:
    """One history; raises AssertionError where it ends in something untrue."""
    draw = random.Random(seed)
    replicas = [Replica(number) for number in range(REPLICAS)]
    sent: list[Message] = []
    history: list[tuple[int, int, int]] = []
    for tick in range(1, steps + 1):
        replica, other = draw.sample(replicas, 2)
        match draw.randrange(9):
            case 0 | 1:
                keys = sorted(draw.sample(range(8), draw.randint(1, 4)))
                stamp = tick << 12 | replica.number
                sent += replica.write(stamp, keys, draw.random() < 0.2)
                shards = replica.model.shards_of(np.array(keys, np.uint64)).tolist()
                history += [(shard, key, stamp) for shard, key in zip(shards, keys, strict=True)]
            case 2 if sent:
                replica.model.apply([draw.choice(sent).columns], 0)  # late, early or again: it claims nothing
            case 3:
                replica.restart()
            case 4 | 5 | 6:
                for message in draw.sample(sent[-8:], min(len(sent), 3)):
                    replica.receive(message)
            case _:
                some = sorted(draw.sample(range(SHARDS), draw.randint(1, SHARDS))) if draw.random() < 0.5 else None
                replica.pull(other, some, breaks_off=draw.random() < 0.3)
        check_claims(replica, history)
        for one in replicas:
            if one is not replica and one.digest == replica.digest:
                assert contents(one.store, "ctr") == contents(replica.store, "ctr")
    for _ in range(REPLICAS):
        for replica in replicas:
            for other in replicas:
                if other is not replica:
                    replica.pull(other, None, breaks_off=False)
    assert len({replica.digest for replica in replicas}) == 1
    for replica in replicas:
        assert contents(replica.store, "ctr") == contents(replicas[0].store, "ctr")
        check_claims(replica, history)


def walks(seeds: int) -> None:
    for seed in range(seeds):
        walk(seed, 60)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_equal_digests_mean_equal_rows_and_pulls_alone_get_there(seed: int, steps: int) -> None:
    walk(seed, steps)


def parts_count_as_whole(asker: Replica) -> KnownSteps:
    """R7: a step is named in a shard of which only some parts came."""
    steps = sorted(asker.knowledge._open.values(), key=lambda step: step.stamp)
    named = np.zeros((len(steps), 8), np.bool_)
    for row, step in zip(named, steps, strict=True):
        row[: len(step.here)] = step.here
        row[list(step.parts)] = True
    return KnownSteps(np.array([step.stamp for step in steps], np.uint64), np.packbits(named, axis=1, bitorder="little"))


def any_shard_counts_for_all(asker: Replica) -> KnownSteps:
    """A step is named in all shards when one of them came."""
    known = named_as_it_is(asker)
    return replace(known, shards=np.full_like(known.shards, 255))


def younger_than_the_gap_is_left_out(other: Replica, selections: Sequence[Selection], known: KnownSteps) -> list[Selection]:
    """What is above the oldest known step is left out, as if the asker had all of that writer's since."""
    left = []
    for one in selections:
        columns = [other.model.read(one.table, one.slots[i : i + 1]) for i in range(len(one.slots))]
        stamps = [int(column.stamps[0]) for column in columns if column.stamps is not None]
        oldest = {int(stamp) & 4095: int(stamp) for stamp in known.stamps[::-1].tolist()}
        kept = [i for i, stamp in enumerate(stamps) if stamp < oldest.get(stamp & 4095, stamp + 1)]
        left.append(replace(one, slots=one.slots[kept]))
    return left


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("NAMED", parts_count_as_whole),
        ("NAMED", any_shard_counts_for_all),
        ("WITHOUT", younger_than_the_gap_is_left_out),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_naming_too_much_is_found(name: str, planted: Named | Without, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), name, planted)
    with pytest.raises(AssertionError):
        walks(500)


@given(st.integers(0, 2**32))
def test_a_reply_of_some_shards_claims_nothing_of_the_others(seed: int) -> None:
    """T1: nor does it move the frontier, which is about all of them."""
    draw = random.Random(seed)
    knowledge = Knowledge(np.zeros((SHARDS, WRITERS_MAX), np.uint64), np.zeros(WRITERS_MAX, np.uint64))
    shards = np.array(sorted(draw.sample(range(SHARDS), draw.randint(1, SHARDS - 1))), np.uint32)
    until = np.array([[draw.randint(1, 9) << 12 | 5] for _ in shards], np.uint64)
    knowledge.learn_reply(np.array([5], np.uint16), np.zeros_like(until), until, np.zeros(1, np.uint64), shards)
    expected = np.zeros(SHARDS, np.uint64)
    expected[shards] = until[:, 0]
    assert knowledge.vector[:, 5].tolist() == expected.tolist()
    assert not knowledge.frontier.any()
