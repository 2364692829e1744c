"""How peers behave: who sends junk or floods is not listened to for a while.

Per source (a proven node, or one connection of an unencrypted transport) two counts run over a short window: messages that were
refused, and calls, which are all messages that no credit bounds. Beyond their limits the source is shut out: what it sends is
dropped unread, so to us it has fallen silent and the membership treats it so. Each repeat doubles the time.
"""

from dataclasses import dataclass
from typing import Final

WINDOW_MS: Final = 10_000
# A correct peer has none. A few come from races that are nobody's fault (an upgrade, a schema that two sides change at once).
REJECTED_MAX: Final = 64
# Heartbeats, introductions and pulls of a correct peer are some tens a second; waits of a busy publisher some hundreds.
CALLS_MAX: Final = 20_000
SHUT_OUT_MS: Final = 30_000
SHUT_OUT_MS_MAX: Final = 15 * 60_000
# Who has behaved this long since the last time begins again at SHUT_OUT_MS.
FORGIVEN_MS: Final = 60 * 60_000
# Sources remembered; beyond it the one that came first is forgotten.
SOURCES_MAX: Final = 8_192


@dataclass(slots=True)
class _Record:
    window_ms: int  # when the window began
    rejected: int = 0
    calls: int = 0
    until_ms: int = 0  # shut out until then
    length_ms: int = 0  # of the last time


class Conduct:
    """The record of every source that has a name. All times are monotonic milliseconds."""

    def __init__(self) -> None:
        self.dropped = 0  # messages of sources that were shut out
        self.shut_outs = 0
        self._records: dict[str, _Record] = {}

    def admits(self, source: str, now_ms: int) -> bool:
        """Whether to listen to `source` now; a message that is not listened to is counted."""
        record = self._records.get(source)
        if record is None or now_ms >= record.until_ms:
            return True
        self.dropped += 1
        return False

    def note_rejected(self, source: str, now_ms: int) -> int:
        """A message was refused; returns for how many milliseconds the source is shut out now, mostly 0."""
        record = self._record(source, now_ms)
        record.rejected += 1
        return self._shut_out(record, now_ms) if record.rejected > REJECTED_MAX else 0

    def note_call(self, source: str, now_ms: int) -> int:
        """A message came that no credit bounds; returns as above."""
        record = self._record(source, now_ms)
        record.calls += 1
        return self._shut_out(record, now_ms) if record.calls > CALLS_MAX else 0

    def _record(self, source: str, now_ms: int) -> _Record:
        record = self._records.get(source)
        if record is None:
            if len(self._records) >= SOURCES_MAX:
                del self._records[next(iter(self._records))]
            record = self._records[source] = _Record(now_ms)
        elif now_ms - record.window_ms >= WINDOW_MS:
            record.window_ms, record.rejected, record.calls = now_ms, 0, 0
        return record

    def _shut_out(self, record: _Record, now_ms: int) -> int:
        if now_ms - record.until_ms > FORGIVEN_MS:
            record.length_ms = 0
        record.length_ms = min(max(SHUT_OUT_MS, 2 * record.length_ms), SHUT_OUT_MS_MAX)
        record.until_ms = now_ms + record.length_ms
        record.rejected = record.calls = 0
        self.shut_outs += 1
        return record.length_ms
