"""Carries each changed embedding row from training to every serving replica, peer to peer.

`Publisher` is for the engineer who trains, `Reader` for the engineer who serves; `ekko node` runs a node. Names are loaded
when they are first used, so that a reader never loads the network and `import ekko` costs next to nothing.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ekko.errors import ConfigError, EkkoError, ModelError, NodeUnreachable, PublishError, StoreError
from ekko.version import __version__

if TYPE_CHECKING:
    from ekko.serve.reader import Reader
    from ekko.train.publisher import Publisher

__all__ = [
    "ConfigError",
    "EkkoError",
    "ModelError",
    "NodeUnreachable",
    "PublishError",
    "Publisher",
    "Reader",
    "StoreError",
    "__version__",
    "get_include",
]

_LAZY = {"Publisher": "ekko.train.publisher", "Reader": "ekko.serve.reader"}


def get_include() -> str:
    """The folder of `ekko.h`, with which programs in C and C++ read a node's shared memory."""
    return str(Path(__file__).with_name("include"))


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ekko' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
