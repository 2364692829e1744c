"""What an address may look like: `tcp://HOST:PORT`, `ipc://PATH`, `HOST:PORT`; loopback only until links are encrypted."""

import re
from ipaddress import ip_address

PORT_MAX = 65_535


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


def check_endpoint(address: str, *, ipc: bool) -> None:
    """Refuse an address that is not `tcp://HOST:PORT` on loopback (or `ipc://PATH` where `ipc` allows it).

    Raises:
        ValueError: in one line, with what was expected.
    """
    scheme, separator, rest = address.partition("://")
    expected = "tcp://HOST:PORT or ipc://PATH" if ipc else "tcp://HOST:PORT"
    if separator and scheme == "ipc" and ipc:
        if not rest.startswith("/"):
            raise ValueError(f"expected ipc:// and an absolute path, got {address!r}")
        return
    if not separator or scheme != "tcp":
        raise ValueError(f"expected {expected}, got {address!r}")
    try:
        host, _ = split_host_port(rest)
    except ValueError:
        raise ValueError(f"expected {expected} with a port from 1 to {PORT_MAX}, got {address!r}") from None
    check_loopback(host)


def check_loopback(host: str) -> None:
    """Refuse a host that others than this machine can reach: the traffic is not yet encrypted.

    Raises:
        ValueError: in one line, with the remedy.
    """
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(f"host {host!r} is not loopback, and encryption is not available in this version: use 127.0.0.1")
