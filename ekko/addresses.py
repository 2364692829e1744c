"""What an address may look like: `tcp://HOST:PORT`, `ipc://PATH`, `HOST:PORT`; and which of them stay on this machine."""

import re
from ipaddress import ip_address

PORT_MAX = 65_535
_HOST = re.compile(r"\*|[A-Za-z0-9_.\-]+|[0-9a-fA-F:.]+(%[A-Za-z0-9_.\-]+)?")


def split_host_port(address: str) -> tuple[str, int]:
    """`host:port` -> its parts; brackets around an IPv6 host are taken off.

    Raises:
        ValueError: in one line, with what was expected.
    """
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not re.fullmatch(r"\d{1,5}", port) or not 1 <= int(port) <= PORT_MAX:
        raise ValueError(f"expected HOST:PORT with a port from 1 to {PORT_MAX}, got {address!r}")
    return host, int(port)


def check_endpoint(address: str, *, ipc: bool) -> str | None:
    """The host of `tcp://HOST:PORT`; None for `ipc://PATH`, where `ipc` allows that.

    Raises:
        ValueError: in one line, with what was expected.
    """
    scheme, separator, rest = address.partition("://")
    expected = "tcp://HOST:PORT or ipc://PATH" if ipc else "tcp://HOST:PORT"
    if separator and scheme == "ipc" and ipc:
        if not rest.startswith("/"):
            raise ValueError(f"expected ipc:// and an absolute path, got {address!r}")
        return None
    if not separator or scheme != "tcp":
        raise ValueError(f"expected {expected}, got {address!r}")
    try:
        host, _ = split_host_port(rest)
    except ValueError:
        raise ValueError(f"expected {expected} with a port from 1 to {PORT_MAX}, got {address!r}") from None
    if (":" in host) != rest.startswith("["):
        raise ValueError(f"expected {expected} with an IPv6 address in brackets, got {address!r}")
    if not _HOST.fullmatch(host):
        raise ValueError(f"expected {expected}, got {address!r}")
    return host


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can mean this machine by `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether `host` stands for every interface, which can be listened on but not dialled."""
    try:
        return host == "*" or ip_address(host).is_unspecified
    except ValueError:
        return False
