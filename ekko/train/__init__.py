"""The training side: what hands changed rows to the local node, the parameter servers, and the workers that use them.

`Client` is a worker's side of the parameter servers. It is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ekko.train.client import Client, Pull, WorkerDropped

__all__ = ["Client", "Pull", "WorkerDropped"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'ekko.train' has no attribute {name!r}")
    value = getattr(import_module("ekko.train.client"), name)
    globals()[name] = value
    return value
