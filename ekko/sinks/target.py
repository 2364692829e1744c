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
_ADDRESS: Final = (
    "expected redis://[USER:PASSWORD@]HOST:PORT/DATABASE, where a password has %25 for %, %2F for /, %3F for ?, %23 for #, %40 "
    "for @, %5B for [ and %5D for ]"
)


def is_redis(target: str) -> bool:
    """Whether it is an address, and no function."""
    return target.startswith(tuple(f"{scheme}://" for scheme in _REDIS))


def check_target(target: str) -> None:
    """That it may name a sink.

    Raises:
        ConfigError: it does not; of an address that cannot be taken apart nothing is said, since it may be a password.
    """
    if not is_redis(target):
        if not _FUNCTION.fullmatch(target):
            scheme, address, _ = target.partition("://")
            raise ConfigError(f"{scheme + '://...' if address else target!r} is no sink: {EXPECTED}")
        return
    try:
        parts = urlsplit(target)
        there = parts.path.strip("/") if parts.scheme == "unix" else parts.hostname
        _ = parts.port  # looked at only now
    except ValueError:
        raise ConfigError(f"no address of a redis: {_ADDRESS}") from None
    if "@" in target.partition("://")[2][len(parts.netloc) :]:  # a password with a / in it looks like a host and a database
        raise ConfigError(f"no address of a redis, for there is an @ behind its host: {_ADDRESS}")
    if not there:
        raise ConfigError(f"{shown(target)!r} names no redis: {EXPECTED}")


def check_installed(target: str) -> None:
    """That this Python finds what it needs; loads nothing of it.

    Raises:
        ConfigError: it does not.
    """
    package = "redis" if is_redis(target) else target.partition(":")[0].partition(".")[0]
    if package == "__main__":
        raise ConfigError(f"{target!r} is in no module: a node runs it in a process of its own, so name the file it is in")
    if find_spec(package) is None:
        remedy = "pip install 'ekko-dissemination[redis]'" if is_redis(target) else "install it, or set PYTHONPATH"
        raise ConfigError(f"{shown(target)!r} needs the package {package}, which is not installed: {remedy}")


def shown(target: str) -> str:
    """For whoever looks at the node: without user and password."""
    if not is_redis(target):
        return target
    parts = urlsplit(target)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
