"""Structured logs on stderr: JSON lines for machines, aligned text on a terminal."""

import logging
import sys
import time
from typing import TextIO, cast

import structlog

# Records of one name within one second; what exceeds it is counted and told with the next one. A peer that sends junk as fast
# as it can must not fill the disk.
RECORDS_PER_SECOND_MAX = 20
NAMES_MAX = 1_024


class RateLimit:
    """Drops the records of a name beyond `RECORDS_PER_SECOND_MAX` a second. A structlog processor."""

    def __init__(self) -> None:
        self._windows: dict[str, list[int]] = {}  # name -> [second, records in it, dropped since the last record]

    def __call__(self, logger: object, method: str, record: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Pass the record on, or raise `DropEvent`."""
        second = int(time.monotonic())
        name = str(record.get("event"))
        if name not in self._windows and len(self._windows) >= NAMES_MAX:
            self._windows.clear()
        window = self._windows.setdefault(name, [second, 0, 0])
        if window[0] != second:
            window[:2] = [second, 0]
        window[1] += 1
        if window[1] > RECORDS_PER_SECOND_MAX:
            window[2] += 1
            raise structlog.DropEvent
        if window[2]:
            record["dropped_before"] = window[2]
            window[2] = 0
        return record


class CurrentStderr:
    """What is `sys.stderr` when it is written to: loggers are kept, and who runs a command within a program may exchange it."""

    def write(self, text: str) -> int:
        """Write to it."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Have it written."""
        sys.stderr.flush()


_stderr = cast("TextIO", CurrentStderr())


def configure_logs(**context: object) -> None:
    """Log to stderr from now on; `context` goes into every record."""
    terminal = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            RateLimit(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(_stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**context)
