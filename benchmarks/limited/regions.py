"""One network namespace for each region, joined by a bridge; what passes into and out of a region takes tokens from a bucket.

Nodes of one region talk over its loopback interface, at full speed. Needs to be root, and `ip` and `tc`.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

NAMES = "ekko-bench"
_CLONE_NEWNET = 0x4000_0000
# What the bucket lets pass at once, and how long a packet may queue: enough for full rate at this kernel's timer, and less than
# a connection would put up with.
BURST_BYTES = 64 << 10
QUEUE_MS = 25


def missing() -> str:
    """Why there can be no such links here; empty: there can."""
    if os.geteuid() != 0:
        return "not root"
    if absent := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"there is no {absent[0]!r}"
    probe = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "network namespaces are not allowed"


class Regions:
    """Namespaces of some regions, for as long as its `with` block lasts."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._hub = f"{NAMES}-{os.getpid()}-hub"

    def namespace(self, region: str) -> str:
        """The name of a region's namespace."""
        return f"{NAMES}-{os.getpid()}-{self._names.index(region)}"

    def address(self, region: str) -> str:
        """At which the other regions reach it."""
        return f"10.213.0.{self._names.index(region) + 1}"

    def __enter__(self) -> Self:
        _remove_old()
        try:
            _ip("netns", "add", self._hub)
            _ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._hub, "link", "set", "bridge", "up")
            for number, region in enumerate(self._names):
                inner = self.namespace(region)
                _ip("netns", "add", inner)
                port = f"port{number}"
                _ip("-n", inner, "link", "add", "wan", "type", "veth", "peer", "name", port, "netns", self._hub)
                _ip("-n", inner, "addr", "add", f"{self.address(region)}/24", "dev", "wan")
                for device in ("lo", "wan"):
                    _ip("-n", inner, "link", "set", device, "up")
                _ip("-n", self._hub, "link", "set", port, "master", "bridge")
                _ip("-n", self._hub, "link", "set", port, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def limit(self, mbps: float | None) -> None:
        """Let so much pass, into each region and out of it; None: all."""
        for number, region in enumerate(self._names):
            for namespace, device in ((self.namespace(region), "wan"), (self._hub, f"port{number}")):
                if mbps is None:
                    _tc("-n", namespace, "qdisc", "del", "dev", device, "root", check=False)
                else:
                    bucket = ["rate", f"{mbps:g}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms"]
                    _tc("-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *bucket)

    def launcher(self, region: str) -> list[str]:
        """What a command begins with that is to run in a region."""
        ip = shutil.which("ip")
        assert ip is not None
        return [ip, "netns", "exec", self.namespace(region)]

    def do_inside(self, region: str, work: Callable[[], T]) -> T:
        """Do something in a region; sockets that it makes stay there."""
        with _inside(self.namespace(region)):
            return work()

    def _remove(self) -> None:
        for name in [self._hub, *(self.namespace(region) for region in self._names)]:
            _ip("netns", "del", name, check=False)


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """This thread is in another namespace meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open() as home, Path(f"/run/netns/{namespace}").open() as other:
        if libc.setns(other.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {namespace}")
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), _CLONE_NEWNET) == 0


def _remove_old() -> None:
    """Those of processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name, pid in re.findall(rf"({NAMES}-(\d+)-\w+)", listed):
        if not Path(f"/proc/{pid}").exists():
            _ip("netns", "del", name, check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    _run("ip", *arguments, check=check)


def _tc(*arguments: str, check: bool = True) -> None:
    _run("tc", *arguments, check=check)


def _run(*command: str, check: bool) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
