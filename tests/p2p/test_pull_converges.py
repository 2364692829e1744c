"""Theorem T7, on real stores without a network: equal vectors and equal strays imply equal rows, and pulls alone get there.

Rows are delivered at random and claim nothing, pulls of everything or of some shards merge claims, lives end meanwhile.
Whenever two replicas have the same digest of vector and strays, they must hold the same; in the end all do.
"""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store
from p2p.knowledge import Knowledge
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX
from sim_cluster.checkers import contents

SHARDS = 3
REPLICAS = 3
SPEC = ModelSpec("ctr", SHARDS, {"item": TableSpec("item", 1)})
ITEM = table_id("item")


class Replica:
    """A node's rows and knowledge of one model; it writes under the id of its number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.store = Store.anonymous()
        self.model = self.store.add_model(SPEC)
        self.knowledge = Knowledge(self.model.vector, self.model.frontier)

    def restart(self) -> None:
        self.knowledge = Knowledge(self.model.vector, self.model.frontier)

    def write(self, stamp: int, keys: list[int], delete: bool) -> RowColumns:
        columns = rows_of(stamp, keys, delete)
        touched = np.unique(self.model.shards_of(columns.keys))
        prev = self.model.vector[touched, self.number].copy()
        frontier = int(self.model.frontier[self.number])
        self.model.apply([columns], stamp)
        one = np.ones(len(touched), np.uint16)
        self.knowledge.learn_step(stamp, frontier, len(touched), touched.astype(np.uint32), prev, one - 1, one)
        return columns

    def pull(self, other: "Replica", shards: list[int] | None, breaks_off: bool) -> None:
        """Everything, or some shards; half of the rows and no claims when it breaks off."""
        chosen = np.arange(SHARDS) if shards is None else np.array(shards)
        base = np.full((SHARDS, WRITERS_MAX), np.iinfo(np.uint64).max)
        base[chosen] = self.model.vector[chosen]
        writers = other.knowledge.writers
        until = np.ascontiguousarray(other.model.vector[np.ix_(chosen, writers)])
        for selection in other.model.changed_since(base):
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


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_equal_digests_mean_equal_rows_and_pulls_alone_get_there(seed: int, steps: int) -> None:
    draw = random.Random(seed)
    replicas = [Replica(number) for number in range(REPLICAS)]
    sent: list[RowColumns] = []
    history: list[tuple[int, int, int]] = []
    for tick in range(1, steps + 1):
        replica, other = draw.sample(replicas, 2)
        match draw.randrange(6):
            case 0 | 1:
                keys = sorted(draw.sample(range(8), draw.randint(1, 4)))
                stamp = tick << 12 | replica.number
                sent.append(replica.write(stamp, keys, draw.random() < 0.2))
                shards = replica.model.shards_of(np.array(keys, np.uint64)).tolist()
                history += [(shard, key, stamp) for shard, key in zip(shards, keys, strict=True)]
            case 2 if sent:
                replica.model.apply([draw.choice(sent)], 0)  # late, early or again: it claims nothing
            case 3:
                replica.restart()
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
