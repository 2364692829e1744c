"""What is to be said of a node's companions: what the node knows, and what they said last."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ProcessPicture:
    """What is to be said of any of them."""

    running: bool = False
    starts: int = 0  # in this life of the node
    failures: int = 0  # of these, how many ended by themselves
    error: str = ""  # why the last one did
    state: Mapping[str, Any] = field(default_factory=dict)  # what it said last


@dataclass(frozen=True, slots=True)
class ServerPicture:
    """What is to be said of a node's parameter server; its state is what `ekko.train.server.process` says."""

    endpoint: str
    process: ProcessPicture = ProcessPicture()

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """By model."""
        models: Mapping[str, Mapping[str, Any]] = self.process.state.get("models", {})
        return models

    def to_json(self) -> dict[str, object]:
        """What `/status` answers."""
        process = self.process
        return {
            "endpoint": self.endpoint,
            "running": process.running,
            "starts": process.starts,
            "failures": process.failures,
            "error": process.error,
            "models": {},
            **process.state,
        }
