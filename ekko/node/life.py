"""One life of a node: how far its start has come, and its parts once there are some.

A node has more than one where it is expelled, drops its rows, and starts over: nothing in here outlives that.
"""

import secrets
import time
from dataclasses import dataclass, field

from ekko.node.devices import Devices
from ekko.node.parts import Parts
from ekko.node.server import TrainingServer
from ekko.node.sinks import NodeSinks


@dataclass(slots=True)
class Life:
    """What is new in each life."""

    boot: int = field(default_factory=lambda: secrets.randbits(64) | 1)
    boot_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    preparing: list[str] = field(default_factory=lambda: ["kernels", "store", "sockets"])
    loading: str = ""  # how far a snapshot is loaded
    caught_up: bool = False
    parts: Parts | None = None
    devices: Devices | None = None
    server: TrainingServer | None = None
    sinks: NodeSinks | None = None
