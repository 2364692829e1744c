"""A witness in a cluster with every fault, beside an oracle that knows every version that was ever written.

What the older state and the log say of any moment that is said to be known exactly must be what the oracle says of it.
"""

import random
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np

from ekko.delayed.history import cut_of
from ekko.delayed.store import DelayedStore
from ekko.model import TableSpec
from ekko.store import Store
from p2p import wire
from p2p.pulling import outbox
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import little_credit

CALM = NetworkOptions()
FAULTS = NetworkOptions(1, 30, 40, loss_probability=0.08, repeat_probability=0.1, reorder_probability=0.2)
# So narrow that it takes less than is written.
NARROW = replace(FAULTS, links={"eu/home": LinkOptions(rate_bytes_per_ms=4.0)})
MODEL = "ctr"
LOG_BYTES = 1 << 20
Rows = dict[int, float]  # key -> value, of what is there


@dataclass(slots=True)
class Witnessed:
    """A node whose store has an older one beside it; `open` anew after each restart of the node."""

    cluster: VirtualCluster
    folder: Path
    name: str = "w1"
    older: Store = field(default_factory=Store.anonymous)
    delayed: DelayedStore | None = None
    checked: int = 0  # cuts that were compared with the oracle
    refused: int = 0  # that cannot be told exactly

    def open(self) -> DelayedStore:
        """As a process that starts."""
        if self.delayed is not None:
            self.delayed.log.close()
            self.older = self.older.reopened()
        self.delayed = DelayedStore.open(self.cluster.nodes[self.name].store, self.older, self.folder, LOG_BYTES)
        return self.delayed

    @property
    def store(self) -> DelayedStore:
        assert self.delayed is not None
        return self.delayed

    @property
    def tables(self) -> dict[str, TableSpec]:
        return self.cluster.model.tables

    def oracle(self, table: str, cut_ms: int) -> Rows:
        """What there was, of all that was ever written."""
        newest: dict[int, tuple[int, float | None]] = {}
        for write in self.cluster.history:
            if write.table == table and write.stamp <= cut_of(cut_ms):
                newest[write.key] = max(newest.get(write.key, (0, None)), (write.stamp, None if write.deleted else write.value))
        return {key: value for key, (_, value) in newest.items() if value is not None}

    def keys(self, table: str) -> np.ndarray:
        """All that were ever written."""
        return np.array(sorted({write.key for write in self.cluster.history if write.table == table}), np.uint64)

    def told(self, table: str, cut_ms: int, keys: np.ndarray) -> Rows:
        """What the older state and the log say of these keys."""
        versions = self.store.at(MODEL, cut_ms, self.tables[table].id, keys)
        values = versions.rows.view(np.float32)
        return {int(key): float(row[0]) for key, row, live in zip(keys, values, versions.live, strict=True) if live}

    def check(self, wanted_ms: int) -> None:
        """At the newest moment up to this one that is known, if there is any."""
        cut_ms = self.store.valid_cut(MODEL, wanted_ms)
        self.refused += cut_ms != wanted_ms
        if cut_ms is None:
            return
        self.checked += 1
        changed = {one.table: one for one in self.store.changed_since(MODEL, cut_ms)}
        for table, spec in self.tables.items():
            keys = self.keys(table)
            expected = self.oracle(table, cut_ms)
            place = f"seed {self.cluster.seed}, {self.cluster.now_ms} ms, cut {cut_ms}, table {table}"
            assert self.told(table, cut_ms, keys) == expected, place
            # What is now, with the keys that changed since put back, is what was then.
            now = contents(self.cluster.nodes[self.name].store, table, keys)
            if spec.id in changed:
                back = changed[spec.id].keys
                assert len(np.unique(back)) == len(back), f"{place}: a key is named twice"
                now = {key: value for key, value in now.items() if key not in set(back.tolist())}
                now |= self.told(table, cut_ms, back)
            assert now == expected, f"{place}: changed_since"

    def check_older(self) -> None:
        """The older store itself, as its readers see it, where it says that it has everything."""
        history = self.store._model(MODEL).history
        if history.until and history.exact_until() >= history.until:
            until_ms = self.store.oldest_cut(MODEL)
            for table in self.tables:
                keys = self.keys(table)
                assert contents(self.store.older, table, keys) == self.oracle(table, until_ms), f"seed {self.cluster.seed}"


def contents(store: Store, table: str, keys: np.ndarray) -> Rows:
    """What a reader finds."""
    rows, stamps = store.models[MODEL].lookup(table, keys)
    return {int(key): float(row[0]) for key, row, stamp in zip(keys, rows, stamps, strict=True) if stamp}


def form(seed: int, folder: Path) -> Witnessed:
    """Two who write, one that serves, and the witness."""
    cluster = VirtualCluster(seed, CALM)
    cluster.collect_ms = 1_000
    cluster.add("t1", "home", "train")
    cluster.add("t2", "home", "train", ["t1"])
    cluster.add("s1", "eu", "serve", ["t1"])
    cluster.add("w1", "eu", "witness", ["t1"])
    witnessed = Witnessed(cluster, folder)
    witnessed.open()
    return witnessed


def disturb(witnessed: Witnessed, step: int, rng: random.Random, *, lossy: bool) -> None:
    """Crashes, links that are cut, and a log that is lost."""
    cluster = witnessed.cluster
    match step:
        case 12:
            cluster.cut = {("t1", "w1"), ("t1", "s1"), ("w1", "t1")}
        case 18:
            cluster.cut = set()
        case 22:
            cluster.kill_within("w1", rng.randrange(1, 40))
        case 27:
            cluster.crash("w1")
            cluster.restart("w1")
            witnessed.open()
        case 34:
            cluster.crash("t2")
        case 38:
            cluster.restart("t2")
        case 44 if lossy:
            cluster.crash("w1")
            for path in sorted(witnessed.folder.iterdir())[-1:]:
                path.unlink()
            cluster.restart("w1")
            witnessed.open()


def moments_are_told_exactly(seed: int, folder: Path, *, lossy: bool = False, busy: bool = False) -> Witnessed:
    """One run; raises AssertionError where what is told is not what was. `busy`: links are full, and coalesce."""
    rng = random.Random(seed)
    with (
        little_credit(600) if busy else nullcontext(),
        mock.patch.object(wire, "BATCH_BYTES_MAX", 150),
        mock.patch.object(outbox, "CHUNK_BYTES_MAX", 300),
    ):
        witnessed = form(seed, folder)
        cluster = witnessed.cluster
        cluster.run(4_000)
        for trainer in ("t1", "t2"):
            assert cluster.run_until(lambda name=trainer: cluster.publish(name, "item", [1], 1.0) != 0), "nobody can write"
        cluster.options = NARROW if busy else FAULTS
        for step in range(70):
            for trainer in ("t1", "t2"):
                if cluster.nodes[trainer].machine is not None:
                    keys = [rng.randrange(30) for _ in range(1 + step % 7)]
                    cluster.publish(trainer, "item" if step % 3 else "user", keys, float(step), delete=rng.random() < 0.2)
            disturb(witnessed, step, rng, lossy=lossy)
            cluster.run(rng.randrange(20, 120))
            if cluster.nodes["w1"].machine is None:
                continue
            now_ms = cluster.now().unix_ms
            if step % 4 == 0:
                witnessed.store.advance(MODEL, now_ms - rng.randrange(300, 1_500), rng.choice([None, 1, 5]))
                witnessed.store.collect(MODEL, now_ms)
                witnessed.check_older()
            witnessed.check(now_ms - rng.randrange(0, 1_500))
        cluster.options = CALM
        cluster.run(8_000)
        cluster.publish("t1", "item", [2], 99.0)
        cluster.run(2_000)
        end_ms = cluster.now().unix_ms
        witnessed.check(end_ms)
        assert witnessed.store.advance(MODEL, end_ms - 500)
        witnessed.check_older()
        witnessed.check(end_ms)
        assert witnessed.checked > 1, "there was nearly nothing to check"
        claims = sum(node.machine.counters.backlog_claims for node in cluster.nodes.values() if node.machine is not None)
        assert claims or not busy, "no link was so full that it coalesced"
    return witnessed
