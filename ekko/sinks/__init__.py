"""Sinks for stores that many have: `torch.nn.Embedding`, FBGEMM's inference tables, Redis.

Each is loaded when it is first used, and says what to install where something is missing. How to write another one is in
docs/reference/sinks.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ekko.errors import ConfigError

if TYPE_CHECKING:
    from ekko.sinks.embedding import EmbeddingSink
    from ekko.sinks.fbgemm import FbgemmSink
    from ekko.sinks.redis import RedisRows, RedisSink

__all__ = ["EmbeddingSink", "FbgemmSink", "RedisRows", "RedisSink"]

# Name -> module, what it needs, and what brings that.
_LAZY = {
    "EmbeddingSink": ("ekko.sinks.embedding", "torch", "pip install 'ekko-dissemination[torch]'"),
    "FbgemmSink": (
        "ekko.sinks.fbgemm",
        "fbgemm_gpu",
        "pip install 'ekko-dissemination[fbgemm]', or fbgemm-gpu-cpu on a machine without a device",
    ),
    "RedisRows": ("ekko.sinks.redis", "redis", "pip install 'ekko-dissemination[redis]'"),
    "RedisSink": ("ekko.sinks.redis", "redis", "pip install 'ekko-dissemination[redis]'"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ekko.sinks' has no attribute {name!r}")
    module, needed, remedy = _LAZY[name]
    try:
        value = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in (needed, "torch"):
            raise ConfigError(f"{name} needs the package {error.name}, which is not installed: {remedy}") from None
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
