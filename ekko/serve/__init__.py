"""The serving side: look-ups from shared memory, and feeds of foreign stores, without a network.

Names are loaded when they are first used, as those of `ekko`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ekko.serve.feeding import Feed, feed
    from ekko.serve.session import FeedCounts
    from ekko.serve.sink import Batch, Removed, Sink

__all__ = ["Batch", "Feed", "FeedCounts", "Removed", "Sink", "feed"]

_LAZY = {
    "Batch": "ekko.serve.sink",
    "Feed": "ekko.serve.feeding",
    "FeedCounts": "ekko.serve.session",
    "Removed": "ekko.serve.sink",
    "Sink": "ekko.serve.sink",
    "feed": "ekko.serve.feeding",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ekko.serve' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
