"""The invariants of the protocol, checked on whole clusters; each returns the first violation in words, or an empty string.

Numbers are those of docs/ARCHITECTURE.md. A `Watch` follows one cluster and checks it again and again while it runs: it reads a
node's rows only when something was written there since, and compares arrays, so that looking often costs little.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ekko.codec import decode, rounded
from ekko.model import DENSE_SPEC, ModelSpec, TableSpec
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p import wire
from p2p.stamps import WRITER_MASK, WRITERS_MAX
from sim_cluster.history import Write
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

T = TypeVar("T")
Row = tuple[int, bytes]  # stamp, value; a tombstone has no value
Contents = dict[tuple[int, int], Row]  # (table, key) -> row


def contents(store: Store, model: str) -> Contents:
    """Every row version a store holds of a model."""
    replica = store.models[model]
    found: Contents = {}
    for selection in replica.scan_since(_nothing(replica.shards)):
        columns = replica.read(selection.table, selection.slots)
        assert columns.stamps is not None
        for index, (key, stamp) in enumerate(zip(columns.keys.tolist(), columns.stamps.tolist(), strict=True)):
            value = columns.rows[index].tobytes() if index < len(columns.rows) else b""
            found[columns.table, key] = (stamp, value)
    return found


@dataclass(slots=True)
class _Held:
    """What one node held of one table when it was last read, by the table's key numbers (0: the row is absent)."""

    stamps: U64  # [keys]
    live: NDArray[np.bool_]  # [keys]
    values: NDArray[np.float32]  # [keys], the row's first number
    unknown: I64  # [partitions]: live rows that nobody acknowledged: a step whose publisher died may leave some
    dropped: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))  # [keys]: absent; expired, or no room
    gone: U64 = field(default_factory=lambda: np.empty(0, np.uint64))  # [keys]: a tombstone up to here may have been collected
    high: U64 = field(default_factory=lambda: np.empty(0, np.uint64))  # [keys]: the newest version ever held
    even: bool = True  # every row is one number, repeated, as publishers of the simulator write them
    misplaced: int = 0  # rows of partitions that the node does not hold


@dataclass(slots=True)
class _Table:
    """The acknowledged history of one table, as columns."""

    model: str
    spec: TableSpec
    numbers: dict[int, int] = field(default_factory=dict)  # key -> its number, in order of appearance
    keys: list[int] = field(default_factory=list)
    which: list[int] = field(default_factory=list)  # a write's key number
    stamps: list[int] = field(default_factory=list)
    deleted: list[bool] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    tombstones: dict[tuple[int, int], None] = field(default_factory=dict)  # (key number, stamp): seen, acknowledged or not

    def add(self, write: Write) -> None:
        """One more acknowledged write."""
        number = self.numbers.setdefault(write.key, len(self.numbers))
        if number == len(self.keys):
            self.keys.append(write.key)
        self.which.append(number)
        self.stamps.append(write.stamp)
        self.deleted.append(write.deleted)
        self.values.append(write.value)

    def forget_writes(self) -> None:
        """The history is read anew; keys keep their numbers."""
        for column in (self.which, self.stamps, self.deleted, self.values):
            column.clear()


@dataclass(slots=True, eq=False)
class _Columns:
    """The same, as arrays, with what follows from them."""

    which: I64
    stamps: U64
    shards: I64  # of each write
    partitions: I64  # [keys]
    newest: I64  # [keys]: the write with the largest stamp, or -1
    deleted: NDArray[np.bool_]
    values: NDArray[np.float32]
    sorted_keys: U64
    sorted_numbers: I64


class Watch:
    """Follows a cluster; `check` compares it with its history, and with what it was before.

    Args:
        cluster: to be watched, from its beginning.
    """

    def __init__(self, cluster: VirtualCluster) -> None:
        self._cluster = cluster
        self._tables: dict[tuple[str, str], _Table] = {}
        self._columns: dict[tuple[str, str], _Columns] = {}
        self._history: list[Write] = []
        self._read = 0  # writes of the history that were taken up
        self._held: dict[tuple[str, str, str], tuple[int, _Held]] = {}  # (node, model, table) -> (its beginnings, rows)
        self._marks: dict[str, tuple[int, ...]] = {}  # what a node had done when it was last read
        self._asker = 0  # whose vector the next look at an update cache asks with

    def check(self) -> str:
        """Invariants 1, 3, 6 and 11 on every node that changed, and what the cluster found by itself (8)."""
        if self._cluster.violations:
            return self._cluster.violations[0]
        self._take_up_history()
        for node in self._cluster.nodes.values():
            if node.fatal:
                return f"{node.name} gave up: {node.fatal}"
            mark = self._mark(node)
            if self._marks.get(node.name) != mark:
                if problem := self._check_node(node):
                    return problem
                self._marks[node.name] = mark
        return ""

    def check_queues(self) -> str:
        """Invariant 5: every queue is within its bound."""
        for node in self._cluster.nodes.values():
            if node.machine is None:
                continue
            status = node.machine.status(self._cluster.now_of(node))
            # Far below their bounds, these would hide a leak: of former lives nothing may be kept.
            known = len(self._cluster.nodes) - 1
            tighter = {"links": known, "members": known, "summaries": known * len(status.keyspaces)}
            for queue in status.queues:
                # The last message of a link may overshoot its credit, and of a line its room: messages are bounded.
                overshoots = queue.name in ("link_bytes_in_flight", "link_bytes_waiting")
                over = wire.BATCH_BYTES_MAX + wire.PACK_BYTES_MAX if overshoots else 0
                bound = min(queue.bound + over, tighter.get(queue.name, queue.bound + over))
                if queue.fill > bound:
                    return f"{node.name}: queue {queue.name} holds {queue.fill}, bound {bound}"
        return ""

    def check_converged(self) -> str:
        """Invariants 2 and 6, at rest: all live nodes hold the same, and of every row the newest acknowledged version."""
        problem = self.check()
        live = [node for node in self._cluster.nodes.values() if node.machine is not None]
        # Those that hold all are compared with each other, and the others with one of them.
        live.sort(key=lambda node: any(model.incomplete.any() for model in node.store.models.values()))
        for model, name in self._tables if not problem else ():
            first: dict[int, tuple[str, _Held]] = {}  # who was looked at first, by partition
            partitions = self._columns_of((model, name)).partitions
            for node in live:
                held = self._held_of(node, model, name)
                if problem := self._behind(node, (model, name), held):
                    return f"{problem} (model {model!r}, table {name!r})"
                for partition in node.store.models[model].hold:
                    other = first.setdefault(partition, (node.name, held))
                    if problem := _different(node.name, *other, held, partitions == partition, partition):
                        return f"{problem} (model {model!r}, table {name!r})"
        return problem

    # --- history

    def _take_up_history(self) -> None:
        history = self._cluster.history
        if history is not self._history:  # some of it was lost with the only memory that held it
            for table in self._tables.values():
                table.forget_writes()
            self._history, self._read = history, 0
            self._columns.clear()
            self._marks.clear()
        for write in history[self._read :]:
            model = write.model or self._cluster.model.name
            place = (model, write.table)
            if place not in self._tables:
                self._tables[place] = _Table(model, self._cluster.models[model].tables[write.table])
            self._tables[place].add(write)
            self._columns.pop(place, None)
        self._read = len(history)

    def _columns_of(self, place: tuple[str, str]) -> _Columns:
        columns = self._columns.get(place)
        if columns is None:
            table = self._tables[place]
            keys, which = np.array(table.keys, np.uint64), np.array(table.which, np.int64)
            stamps = np.array(table.stamps, np.uint64)
            order = np.argsort(stamps, kind="stable")
            newest = np.full(len(keys), -1, np.int64)
            newest[which[order]] = order  # of repeated places the last counts
            by_key = np.argsort(keys)
            replica = self._a_replica(table.model)
            shards = replica.shards_of(keys)[which]
            columns = self._columns[place] = _Columns(
                which,
                stamps,
                shards,
                replica.partition_of(keys),
                newest,
                np.array(table.deleted, np.bool_),
                rounded(table.spec.codec, np.array(table.values, np.float32)[:, None])[:, 0],
                keys[by_key],
                by_key,
            )
        return columns

    def _a_replica(self, model: str) -> ModelStore:
        return next(iter(self._cluster.nodes.values())).store.models[model]

    # --- one node

    @staticmethod
    def _mark(node: VirtualNode) -> tuple[int, ...]:
        if node.machine is None:
            return (node.losses, 0)
        counters = node.machine.counters
        return (
            node.losses,
            node.lives,
            counters.rows_written,
            counters.batches_received,
            counters.batches_published,
            counters.pulls_completed,
        )

    def _check_node(self, node: VirtualNode) -> str:
        for model, name in self._tables:
            before = self._held.get((node.name, model, name))
            held = self._read_node(node, model, name)
            self._held[node.name, model, name] = (node.beginnings, held)
            if before is not None and before[0] == node.beginnings:
                old = before[1].high
                held.high[: len(old)] = np.maximum(held.high[: len(old)], old)
                now = held.stamps[: len(old)]
                # A tombstone may be collected (R5); nothing older may be there afterwards (invariant 8).
                sunk = np.flatnonzero((now < old) & ~((now == 0) & (held.gone[: len(old)] >= old)))
                if len(sunk):
                    key = self._tables[model, name].keys[sunk[0]]
                    return f"{node.name}: {name} {key} went from stamp {old[sunk[0]]} to {held.stamps[sunk[0]]}"
            if problem := self._unheld_claim(node, (model, name), held) or self._wrong_row(node, (model, name), held):
                return problem
            if held.misplaced:
                return f"{node.name} has {held.misplaced} rows of {name} in partitions that it does not hold"
        return self._wrong_selection(node)

    def _wrong_selection(self, node: VirtualNode) -> str:
        """Invariant 11: what a peer would be sent, asking with the vector that it has, is what a scan finds."""
        askers = list(self._cluster.nodes.values())
        self._asker = (self._asker + 1) % len(askers)
        for name, replica in node.store.models.items():
            asker = askers[self._asker].store.models.get(name, replica)
            if asker.vector.shape != replica.vector.shape:
                continue
            chosen, scanned = replica.changed_since(asker.vector, measured=False), replica.scan_since(asker.vector)
            sent = {selection.table: np.sort(selection.slots) for selection in chosen}
            due = {selection.table: np.sort(selection.slots) for selection in scanned}
            if sent.keys() != due.keys() or not all(np.array_equal(sent[table], due[table]) for table in due):
                counts = {table: (len(sent.get(table, ())), len(slots)) for table, slots in due.items()}
                return f"{node.name}: the update cache of {name} chose other rows than a scan, (chosen, due) by table: {counts}"
        return ""

    def _unheld_claim(self, node: VirtualNode, place: tuple[str, str], held: _Held) -> str:
        """Invariant 3: what vector or frontier claim is held, in that version or a newer one."""
        columns, replica = self._columns_of(place), node.store.models[place[0]]
        writers = (columns.stamps & np.uint64(WRITER_MASK)).astype(np.int64)
        frontiers = replica.frontiers[columns.shards % replica.spec.partitions, writers]
        known = np.maximum(replica.vector[columns.shards, writers], frontiers)
        here = held.stamps[columns.which]
        lacking = (known >= columns.stamps) & (here < columns.stamps)
        wrong = np.flatnonzero(lacking & ~((here == 0) & (held.gone[columns.which] >= columns.stamps)))
        if not len(wrong):
            return ""
        number = int(columns.which[wrong[0]])
        return (
            f"{node.name} claims stamp {columns.stamps[wrong[0]]} of {place[1]} {self._tables[place].keys[number]} "
            f"but holds stamp {held.stamps[number]}"
        )

    def _wrong_row(self, node: VirtualNode, place: tuple[str, str], held: _Held) -> str:
        """Invariant 6, and values: who holds the newest version holds what was written, a tombstone if it was a delete."""
        columns = self._columns_of(place)
        numbers = np.flatnonzero(columns.newest >= 0)
        newest = columns.newest[numbers]
        same = held.stamps[numbers] == columns.stamps[newest]
        deleted = columns.deleted[newest]
        wrong = same & ((held.live[numbers] == deleted) | (~deleted & (held.values[numbers] != columns.values[newest])))
        if wrong.any():
            return f"{node.name}: {place[1]} {self._tables[place].keys[numbers[np.argmax(wrong)]]} is not what was written"
        return "" if held.even else f"{node.name}: a row of {place[1]} is torn"

    def _held_of(self, node: VirtualNode, model: str, name: str) -> _Held:
        """What a node holds; read anew when the history has named more keys since."""
        place = (node.name, model, name)
        if place not in self._held or len(self._held[place][1].stamps) != len(self._tables[model, name].keys):
            self._held[place] = (node.beginnings, self._read_node(node, model, name))
        return self._held[place][1]

    def _read_node(self, node: VirtualNode, model: str, name: str) -> _Held:
        columns, table, replica = self._columns_of((model, name)), self._tables[model, name], node.store.models[model]
        count = len(table.keys)
        unknown = np.zeros(replica.spec.partitions, np.int64)
        held = _Held(np.zeros(count, np.uint64), np.zeros(count, np.bool_), np.zeros(count, np.float32), unknown)
        for selection in replica.scan_since(_nothing(replica.shards)):
            if selection.table != table.spec.id or not count:
                continue
            rows = replica.read(selection.table, selection.slots)
            assert rows.stamps is not None
            at = np.minimum(np.searchsorted(columns.sorted_keys, rows.keys), count - 1)
            known = columns.sorted_keys[at] == rows.keys
            numbers = columns.sorted_numbers[at]
            values = decode(table.spec.codec, rows.rows, table.spec.dim)
            held.stamps[numbers[known]] = rows.stamps[known]
            alive = known[: len(values)]
            held.live[numbers[: len(values)][alive]] = True
            held.values[numbers[: len(values)][alive]] = values[alive, 0]
            held.even = bool((values == values[:, :1]).all())
            belongs = replica.partition_of(rows.keys)
            live = len(values)
            if not table.spec.ttl_s:  # else some of them may have expired
                unknown += np.bincount(belongs[:live][~known[:live]], minlength=len(unknown))
            held.misplaced += int((~np.isin(belongs, replica.hold)).sum())
            dead = numbers[len(values) :][known[len(values) :]]
            for number, stamp in zip(dead.tolist(), held.stamps[dead].tolist(), strict=True):
                table.tombstones[number, stamp] = None
        held.gone, held.high = self._gone(node, (model, name)), held.stamps.copy()
        held.dropped = (held.stamps == 0) & (self._dropped(node, (model, name)) > 0)
        return held

    def _gone(self, node: VirtualNode, place: tuple[str, str]) -> U64:
        """uint64[keys]: the newest tombstone of each key that the node's vector or frontier covers, so that it may be gone."""
        columns, table, replica = self._columns_of(place), self._tables[place], node.store.models[place[0]]
        seen = np.array(list(table.tombstones), np.uint64).reshape(-1, 2)
        numbers = np.concatenate([columns.which[columns.deleted], seen[:, 0].astype(np.int64)])
        stamps = np.concatenate([columns.stamps[columns.deleted], seen[:, 1]])
        shards = replica.shards_of(np.array(table.keys, np.uint64)[numbers])
        writers = (stamps & np.uint64(WRITER_MASK)).astype(np.int64)
        frontiers = replica.frontiers[shards % replica.spec.partitions, writers]
        covered = np.maximum(replica.vector[shards, writers], frontiers) >= stamps
        gone = np.zeros(len(table.keys), np.uint64)
        np.maximum.at(gone, numbers[covered], stamps[covered])
        # Of the versions that expired some were never acknowledged.
        expired_below = _expired_below(self._cluster, table.spec)
        return np.maximum(np.maximum(gone, self._dropped(node, place)), np.uint64(max(0, expired_below - 1)))

    def _dropped(self, node: VirtualNode, place: tuple[str, str]) -> U64:
        """uint64[keys]: the newest version of each key that expired, or may have been dropped for want of room (R11)."""
        columns, replica = self._columns_of(place), node.store.models[place[0]]
        dropped = np.zeros(len(self._tables[place].keys), np.uint64)
        if replica.incomplete.any():
            writers = (columns.stamps & np.uint64(WRITER_MASK)).astype(np.int64)
            below = replica.incomplete[columns.shards] & (replica.loss_floor[columns.shards, writers] >= columns.stamps)
            np.maximum.at(dropped, columns.which[below], columns.stamps[below])
            # It may have had a version whose publisher died before anybody was told of it.
            before = self._held.get((node.name, *place))
            if before is not None:
                high = before[1].high
                shards = replica.shards_of(np.array(self._tables[place].keys[: len(high)], np.uint64))
                floor = replica.loss_floor[shards, (high & np.uint64(WRITER_MASK)).astype(np.int64)]
                gone = replica.incomplete[shards] & (floor >= high)
                dropped[: len(high)][gone] = np.maximum(dropped[: len(high)][gone], high[gone])
        expired = columns.stamps < np.uint64(_expired_below(self._cluster, self._tables[place].spec))
        np.maximum.at(dropped, columns.which[expired], columns.stamps[expired])
        return dropped

    def missed(self) -> int:
        """Rows that live nodes lack in their newest acknowledged version, over all nodes."""
        self._take_up_history()
        live = [node for node in self._cluster.nodes.values() if node.machine is not None]
        return sum(
            len(self._rows_behind(node, place, self._read_node(node, *place))) for place in self._tables for node in live
        )

    def _rows_behind(self, node: VirtualNode, place: tuple[str, str], held: _Held) -> I64:
        columns = self._columns_of(place)
        here = np.isin(columns.partitions, node.store.models[place[0]].hold)
        numbers = np.flatnonzero((columns.newest >= 0) & here)
        newest = columns.stamps[columns.newest[numbers]]
        here_ = held.stamps[numbers]
        behind: I64 = numbers[(here_ < newest) & ~((here_ == 0) & (held.gone[numbers] >= newest))]
        return behind

    def _behind(self, node: VirtualNode, place: tuple[str, str], held: _Held) -> str:
        behind, columns = self._rows_behind(node, place, held), self._columns_of(place)
        if not len(behind):
            return ""
        key, newest = self._tables[place].keys[behind[0]], columns.stamps[columns.newest[behind[0]]]
        return f"{node.name} holds stamp {held.stamps[behind[0]]} of {key}, newest is {newest}; {len(behind)} rows are behind"


_NOTHING: dict[int, U64] = {}


def _nothing(shards: int) -> U64:
    """The vector of who knows nothing; megabytes for many shards, so it is made once."""
    return _NOTHING.setdefault(shards, np.zeros((shards, WRITERS_MAX), np.uint64))


def _different(node: str, first: str, other: _Held, held: _Held, keys: NDArray[np.bool_], partition: int) -> str:
    """What two nodes hold of one partition; `keys` says which ones are of it."""
    keys = keys & ~held.dropped & ~other.dropped
    if not np.array_equal(held.live[keys], other.live[keys]):
        return f"{node} and {first} differ in life of a row"
    # A tombstone may have been collected by one of them.
    both = keys & (held.stamps != 0) & (other.stamps != 0)
    if not np.array_equal(held.stamps[both], other.stamps[both]):
        return f"{node} and {first} differ in stamp of a row"
    if not np.array_equal(held.values[keys], other.values[keys]) or (
        held.unknown[partition] != other.unknown[partition] and not held.dropped.any() and not other.dropped.any()
    ):
        return f"{node} and {first} hold different rows"
    return ""


def check_knowledge(cluster: VirtualCluster, node: VirtualNode) -> str:
    """Invariant 3 on one node: what a vector claims is held, in that version or a newer one."""
    for model in cluster.models:
        replica, held = node.store.models[model], contents(node.store, model)
        writes = [write for write in cluster.history if (write.model or cluster.model.name) == model]
        for write in itertools.compress(writes, _known(replica, writes)):
            key = (cluster.models[model].tables[write.table].id, write.key)
            stamp = held.get(key, (0, b""))[0]
            if write.stamp > stamp and not (stamp == 0 and _is_gone(cluster, replica, key, write.stamp, model)):
                return f"{node.name} claims {write} but holds stamp {stamp}"
    return ""


def _known(replica: ModelStore, writes: Sequence[Write]) -> list[bool]:
    """Which of these the vector, or a frontier, claims; all at once, since this is asked in each second of virtual time."""
    stamps = np.array([write.stamp for write in writes], np.uint64)
    writers = (stamps & np.uint64(WRITER_MASK)).astype(np.int64)
    shards = replica.shards_of(np.array([write.key for write in writes], np.uint64))
    frontiers = replica.frontiers[shards % replica.spec.partitions, writers]
    known: list[bool] = (np.maximum(replica.vector[shards, writers], frontiers) >= stamps).tolist()
    return known


def _is_gone(cluster: VirtualCluster, replica: ModelStore, key: tuple[int, int], stamp: int, model: str) -> bool:
    """Whether this version expired, or a tombstone at or above it is covered, so that it may have been collected (R5)."""
    table = next(name for name, spec in cluster.models[model].tables.items() if spec.id == key[0])
    if stamp < _expired_below(cluster, cluster.models[model].tables[table]):
        return True
    shard = int(replica.shards_of(np.array([key[1]], np.uint64))[0])
    for write in cluster.history:
        if (write.table, write.key, write.deleted) == (table, key[1], True) and write.stamp >= stamp:
            writer = write.stamp & WRITER_MASK
            frontier = replica.frontiers[shard % replica.spec.partitions, writer]
            if (write.model or cluster.model.name) == model and max(replica.vector[shard, writer], frontier) >= write.stamp:
                return True
    return False


def _expired_below(cluster: VirtualCluster, table: TableSpec) -> int:
    """Versions with smaller stamps may have expired by some clock of the cluster; 0: none ever does."""
    return table.stamp_min(cluster.now().unix_ms + cluster.ahead_ms)


def check_converged(cluster: VirtualCluster) -> str:
    """Invariant 2: at rest, all live holders of a row have its newest acknowledged version, and nobody else has the row."""
    for model in cluster.models.values():
        if problem := _check_converged(cluster, model):
            return problem
    return ""


def _check_converged(cluster: VirtualCluster, model: ModelSpec) -> str:
    newest: dict[tuple[int, int], int] = {}
    for write in cluster.history:
        if (write.model or cluster.model.name) == model.name:
            key = (model.tables[write.table].id, write.key)
            newest[key] = max(newest.get(key, 0), write.stamp)
    references: dict[int, tuple[str, Contents]] = {}  # by partition
    expired_below = {spec.id: _expired_below(cluster, spec) for spec in model.tables.values()} | {DENSE_SPEC.id: 0}
    for node in cluster.nodes.values():
        if node.machine is None:
            continue
        replica = node.store.models[model.name]
        by_partition = _by_partition(replica, contents(node.store, model.name))
        due = _by_partition(replica, newest)
        if misplaced := sorted(by_partition.keys() - set(replica.hold)):
            return f"{node.name} has rows of partitions {misplaced}, which it does not hold"
        for partition in replica.hold:
            held = by_partition.get(partition, {})
            for key, stamp in due.get(partition, {}).items():
                here = held.get(key, (0, b""))[0]
                if here < stamp and not (here == 0 and _is_gone(cluster, replica, key, stamp, model.name)):
                    return f"{node.name} holds {held.get(key)} of {key}, newest is {stamp}"
            # A tombstone, or a row that expired, may have been collected by one of them.
            held = {key: row for key, row in held.items() if row[1] and row[0] >= expired_below[key[0]]}
            name, reference = references.setdefault(partition, (node.name, held))
            if held != reference:
                different = sorted(set(held.items()) ^ set(reference.items()))[:2]
                return f"{node.name} and {name} differ: {different}"
    return ""


def _by_partition(replica: ModelStore, rows: Mapping[tuple[int, int], T]) -> dict[int, dict[tuple[int, int], T]]:
    """What there is of (table, key), by the partition of the key."""
    belongs = replica.partition_of(np.array([key for _, key in rows], np.uint64)).tolist()
    found: dict[int, dict[tuple[int, int], T]] = {}
    for partition, (place, row) in zip(belongs, rows.items(), strict=True):
        found.setdefault(partition, {})[place] = row
    return found
