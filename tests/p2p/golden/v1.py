"""One message of every kind that protocol version 1 has, as they were when `v1.json` was recorded from that version's code.

Neither file changes any more: what a released version says is understood for ever.
"""

import numpy as np

from p2p import messages as m
from p2p.replica import RowColumns, SchemaEntry
from p2p.stamps import make_stamp

ENVELOPE = m.Envelope(11, 22, 3, 4, 1)
STAMP = make_stamp(1_700_000_000_000, 5, 9)
WRITERS = np.array([2, 9], np.uint16)
WRITING = m.MemberRecord(
    "eu-1", 77, 1_700_000_000_000, "eu", "serve", "tcp://127.0.0.1:1", 12, False, (m.WriterRecord(5, 9, 3, STAMP),), 2, False
)
GONE = m.MemberRecord("us-1", 78, 1_700_000_000_001, "us", "train", "tcp://127.0.0.1:2", 13, True, (), 3, True)
ENTRY = SchemaEntry(5, "model", b"\x01")
BOOTS = np.array([1, 2**64 - 1], np.uint64)
NO_CLAIMS = m.ShardClaims(np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint16))


def _vector(shards: int = 3) -> np.ndarray:
    return np.array([[make_stamp(1_700_000_000_000, row, writer) for writer in (2, 9)] for row in range(shards)], np.uint64)


def _sections(stamps: bool) -> tuple[RowColumns, ...]:
    keys = np.arange(5, dtype=np.uint64)
    rows = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8)
    one = RowColumns(1, keys, rows, np.full(5, STAMP, np.uint64) if stamps else None)
    two = RowColumns(2, keys[:1], rows[:0], np.full(1, STAMP, np.uint64) if stamps else None, np.full(1, 128, np.uint8))
    return one, two


def _claims() -> m.ShardClaims:
    shards = np.arange(2, dtype=np.uint32)
    return m.ShardClaims(shards, np.zeros(2, np.uint64), np.zeros(2, np.uint16), np.ones(2, np.uint16))


_SUMMARY = m.KeyspaceSummary(5, 1 << 127, 3, ((9, STAMP),))

MESSAGES: dict[str, m.Message] = {
    "Hello": m.Hello(1, 99, (4, 4, 8), WRITING, (WRITING, GONE), (ENTRY,), True),
    "Refusal": m.Refusal("no"),
    "Heartbeat": m.Heartbeat(WRITING, (GONE,), 7, 1_700_000_000_000, (_SUMMARY,), 5, BOOTS, BOOTS & np.uint64(3)),
    "SchemaUpdate": m.SchemaUpdate((ENTRY,)),
    "Leave": m.Leave("eu-1"),
    "Batch": m.Batch(5, "t-1", "train", 9, 3, STAMP, STAMP - 4096, 2, _claims(), _sections(False), 123, 456, 7),
    "Batch without rows": m.Batch(5, "t-1", "train", 9, 3, STAMP, STAMP - 4096, 0, NO_CLAIMS, ()),
    "PullRequest": m.PullRequest(5, 1, WRITERS, _vector(), _vector()[0], 3),
    "PullReply": m.PullReply(5, 1, 0, False, _sections(True), WRITERS[:0], _vector()[:, :0], _vector()[0, :0]),
    "PullReply, the last": m.PullReply(5, 1, 1, True, _sections(True), WRITERS, _vector(), _vector()[0]),
    "Ack": m.Ack(3, 17),
    "SessionBroken": m.SessionBroken(3),
    "ReachQuery": m.ReachQuery(5, 8, STAMP),
    "Reached": m.Reached(8),
    "RegisterIndex": m.RegisterIndex(BOOTS, BOOTS & np.uint64(0xFFFF), True),
    "MemberNews": m.MemberNews((WRITING, GONE)),
}
