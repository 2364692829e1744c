"""Moments as an operator says them: "healthy", "5m ago", or a date and time."""

import re
from datetime import UTC, datetime
from typing import Final

from ekko.errors import ConfigError

HEALTHY: Final = 0
_UNITS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_EXPECTED: Final = '"healthy", a time ago such as "5m ago" or "90s ago", or a date and time such as 2026-11-23T10:15:00Z'


def parse_moment(text: str, now_ms: int) -> int:
    """Unix milliseconds; `HEALTHY`: the newest moment at which the model was healthy.

    Args:
        text: what the operator wrote; a date without a zone is UTC.
        now_ms: Unix milliseconds.

    Raises:
        ConfigError: it is none, or lies ahead.
    """
    if text == "healthy":
        return HEALTHY
    ago = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*(ms|s|m|h|d)(?:\s+ago)?", text)
    if ago:
        moment_ms = now_ms - round(float(ago[1]) * _UNITS[ago[2]])
    else:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(f"--to {text}: expected {_EXPECTED}") from None
        moment_ms = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000)
    if not 0 < moment_ms <= now_ms:
        raise ConfigError(f"--to {text}: {show_moment(moment_ms)} lies ahead of now, or before all time: expected {_EXPECTED}")
    return moment_ms


def show_moment(unix_ms: int) -> str:
    """For people and for `parse_moment`, to the millisecond."""
    try:
        return datetime.fromtimestamp(unix_ms / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{unix_ms} ms"
