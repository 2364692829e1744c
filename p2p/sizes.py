"""How much a message that tells of many members or keyspaces says at once; the rest is said with the next one.

Receivers refuse headers of too many items (`p2p.wire`), and what is said of one member grows with the models that it writes and
the partitions that it holds. Items are counted as they are there: every list, and every item of it.
"""

from collections.abc import Sequence
from typing import Final

from p2p.messages import KeyspaceSummary, MemberRecord

# Of all records, and of all summaries in one message. Beside them, a hello has the sender's own record and the schema.
RECORD_ITEMS_MAX: Final = 1 << 17
SUMMARY_ITEMS_MAX: Final = 1 << 16
_RECORD_ITEMS: Final = 16
_SUMMARY_ITEMS: Final = 8


def fitting(records: Sequence[MemberRecord]) -> int:
    """How many of them, from the first on, one message carries; one of them always fits."""
    left = RECORD_ITEMS_MAX
    for count, record in enumerate(records):
        left -= _RECORD_ITEMS + 6 * len(record.writers) + sum(6 + len(holding.held) for holding in record.holds)
        if left < 0:
            return max(1, count)
    return len(records)


def items_of(summary: KeyspaceSummary) -> int:
    """Items of one summary."""
    return _SUMMARY_ITEMS + 4 * len(summary.frontier)
