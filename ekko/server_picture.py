"""What is to be said of the parameter server beside a node: what the node knows, and what the process said last."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ServerPicture:
    """What is to be said of a node's server."""

    endpoint: str
    running: bool = False
    starts: int = 0  # in this life of the node
    failures: int = 0  # of these, how many ended by themselves
    error: str = ""  # why the last one did
    state: Mapping[str, Any] = field(default_factory=dict)  # what it said last (`ekko.train.server.shell`)

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """By model."""
        models: Mapping[str, Mapping[str, Any]] = self.state.get("models", {})
        return models

    def to_json(self) -> dict[str, object]:
        """What `/status` answers."""
        return {
            "endpoint": self.endpoint,
            "running": self.running,
            "starts": self.starts,
            "failures": self.failures,
            "error": self.error,
            "models": {},
            **self.state,
        }
