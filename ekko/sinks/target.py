"""What a sink is named by, on a command line and in a node's configuration. Pure, and needs nothing of what it names."""

import re
from importlib.util import find_spec
from typing import Final
from urllib.parse import urlsplit

from ekko.errors import ConfigError

PREFIX_DEFAULT: Final = "ekko"  # of all names in redis
_REDIS: Final = ("redis", "rediss", "unix")
_FUNCTION: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
EXPECTED: Final = "expected redis://HOST:PORT/DATABASE, or MODULE:FUNCTION"


def is_redis(target: str) -> bool:
    """Whether it is an address, and no function."""
    return target.startswith(tuple(f"{scheme}://" for scheme in _REDIS))


def check_target(target: str) -> None:
    """That it may name a sink.

    Raises:
        ConfigError: it does not.
    """
    if not is_redis(target):
        if not _FUNCTION.fullmatch(target):
            raise ConfigError(f"{target!r} is no sink: {EXPECTED}")
        return
    try:
        parts = urlsplit(target)
        there = parts.path.strip("/") if parts.scheme == "unix" else parts.hostname
        _ = parts.port  # looked at only now
    except ValueError as error:
        raise ConfigError(f"no address of a redis ({error}): expected redis://[USER:PASSWORD@]HOST:PORT/DATABASE") from None
    if not there:
        raise ConfigError(f"{shown(target)!r} names no redis: {EXPECTED}")


def check_installed(target: str) -> None:
    """That this Python finds what it needs; loads nothing of it.

    Raises:
        ConfigError: it does not.
    """
    package = "redis" if is_redis(target) else target.partition(":")[0].partition(".")[0]
    if find_spec(package) is None:
        remedy = "pip install 'ekko-dissemination[redis]'" if is_redis(target) else "install it, or set PYTHONPATH"
        raise ConfigError(f"{shown(target)!r} needs the package {package}, which is not installed: {remedy}")


def shown(target: str) -> str:
    """For whoever looks at the node: without user and password."""
    if not is_redis(target):
        return target
    parts = urlsplit(target)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
