"""Batches and adoption on the wire (`p2p.pushing`)."""

from typing import Final

import numpy as np

from p2p import loops
from p2p import messages as m
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.members.trees import TREE_ARITY, TREES_MAX
from p2p.stamps import WRITERS_MAX, writer_of
from p2p.wire.columns import UINT16, UINT32, UINT64, Columns
from p2p.wire.frames import PACKED_SINCE
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.limits import GROUP_STEPS_MAX, SHARDS_MAX
from p2p.wire.rows import pack_sections, unpack_sections
from p2p.wire.values import items, text, uint

GROUPS_SINCE: Final = 2


def _pack_batch(batch: m.Batch, version: int) -> Packed:
    steps, claims = batch.steps, batch.claims
    if steps is not None and version < GROUPS_SINCE:
        raise LocalProtocolError(f"a group of steps exists since protocol version {GROUPS_SINCE}, the link speaks {version}")
    sections, arrays = pack_sections(batch.columns, version, steps)
    header: Header = [
        batch.keyspace,
        batch.origin,
        batch.origin_region,
        batch.writer,
        batch.nonce,
        batch.stamp,
        batch.writer_prev,
        batch.shards_touched,
        len(claims.shards),
        batch.published_ns,
        batch.machine,
        batch.priority_class,
        batch.trees,
        sections,
        0 if steps is None else len(steps.stamps),
    ]
    if steps is not None:
        assert claims.until is not None, "a group's claims reach as far as its steps"
        ends = np.searchsorted(steps.stamps, claims.until).astype(np.uint16)
        arrays = [steps.stamps, steps.published_ns, ends, *arrays]
    return header, [claims.shards, claims.prev, claims.part, claims.parts, *arrays]


def _unpack_batch(header: Header, columns: Columns) -> m.Batch:
    (
        keyspace,
        origin,
        region,
        writer,
        nonce,
        stamp,
        prev,
        touched,
        claimed,
        published_ns,
        machine,
        priority,
        trees,
        sections,
    ) = header[:-1]
    if uint(claimed, 32) > SHARDS_MAX or uint(touched, 32) > SHARDS_MAX or claimed > touched:
        raise RemoteProtocolError(f"batch touches {touched} shards, limit {SHARDS_MAX}")
    claims = m.ShardClaims(
        columns.take(UINT32, claimed),
        columns.take(UINT64, claimed),
        columns.take(UINT16, claimed),
        columns.take(UINT16, claimed),
    )
    steps = None
    if uint(header[-1], 16):
        steps, claims = _take_group(columns, header[-1], claims)
    batch = m.Batch(
        uint(keyspace, 32),
        text(origin),
        text(region),
        uint(writer, 12),
        uint(nonce),
        uint(stamp),
        uint(prev),
        touched,
        claims,
        unpack_sections(sections, columns, False, steps),
        uint(published_ns),
        uint(machine),
        uint(priority, 8),
        uint(trees, 8),
        steps,
    )
    _check_claims(batch)
    if steps is not None:
        _check_group(batch, steps)
    return batch


BATCH: Final = Kind(m.Batch, _pack_batch, _unpack_batch, added=((GROUPS_SINCE, 0),), changed=(PACKED_SINCE,))


def _take_group(columns: Columns, count: int, claims: m.ShardClaims) -> tuple[m.Steps, m.ShardClaims]:
    """The steps of a group, whose rows are not counted yet, and how far its claims reach."""
    if not 2 <= count <= GROUP_STEPS_MAX:
        raise RemoteProtocolError(f"a group of {count} steps, expected 2 to {GROUP_STEPS_MAX}")
    stamps, published_ns = columns.take(UINT64, count), columns.take(UINT64, count)
    ends = columns.take(UINT16, len(claims.shards))
    if (ends >= count).any():
        raise RemoteProtocolError(f"a claim up to step {int(ends.max())} of {count}")
    reaching = m.ShardClaims(claims.shards, claims.prev, claims.part, claims.parts, stamps[ends])
    return m.Steps(stamps, published_ns, np.zeros(count, np.int64)), reaching


def _check_group(batch: m.Batch, steps: m.Steps) -> None:
    stamps, claims = steps.stamps, batch.claims
    assert claims.until is not None
    if ((stamps & np.uint64(WRITERS_MAX - 1)) != batch.writer).any() or (stamps[1:] <= stamps[:-1]).any():
        raise RemoteProtocolError(f"steps of a group do not follow each other, or are not of writer {batch.writer}")
    if stamps[-1] != batch.stamp or stamps[0] <= batch.writer_prev or len(claims.shards) == 0:
        raise RemoteProtocolError("a group contradicts its steps")
    if (claims.prev >= claims.until).any() or (claims.parts != 1).any():
        raise RemoteProtocolError(_FAULTS[loops.CONTRADICTION])


def _check_claims(batch: m.Batch) -> None:
    claims, shards = batch.claims, batch.claims.shards
    if not 1 <= batch.trees <= TREES_MAX:
        raise RemoteProtocolError(_FAULTS[loops.SEVERAL_TREES].format(trees=batch.trees))
    if writer_of(batch.stamp) != batch.writer or batch.writer_prev >= batch.stamp:
        raise RemoteProtocolError(f"stamp {batch.stamp} does not follow {batch.writer_prev} of writer {batch.writer}")
    if len(shards) == 0:
        if any(len(section.keys) for section in batch.columns):
            raise RemoteProtocolError("rows without a claimed shard")
        return
    fault = loops.used.claims_fault(shards, claims.prev, claims.part, claims.parts, batch.stamp, batch.trees, SHARDS_MAX)
    if fault != loops.SOUND:
        raise RemoteProtocolError(_FAULTS[fault].format(trees=batch.trees))


_FAULTS: Final = {
    loops.SEVERAL_TREES: "one message for several of {trees} trees",
    loops.NOT_ASCENDING: "shards are not ascending",
    loops.CONTRADICTION: "a claim contradicts itself",
}


def _pack_adopt(adopt: m.Adopt, _version: int) -> Packed:
    return [adopt.keyspace, adopt.tree, list(adopt.children)], []


def _unpack_adopt(header: Header, _columns: Columns) -> m.Adopt:
    keyspace, tree, children = header
    if uint(tree, 8) >= TREES_MAX:
        raise RemoteProtocolError(f"tree {tree}, there are {TREES_MAX}")
    return m.Adopt(uint(keyspace, 32), tree, items(children, TREE_ARITY, text))


ADOPT: Final = Kind(m.Adopt, _pack_adopt, _unpack_adopt, since=2)
