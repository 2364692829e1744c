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
    error_ms: int = 0  # and when, Unix milliseconds
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


@dataclass(frozen=True, slots=True)
class SinkPicture:
    """What is to be said of a sink; its state is what `ekko.sinks.process` says."""

    name: str
    model: str
    target: str  # without a password
    process: ProcessPicture = ProcessPicture()
    behind_rows: int | None = None  # changes that are not in it yet; None: it is not known which
    behind_ms: int | None = None  # since it had all that the node has; None: it has not had in this life of the node
    last_error: str = ""
    last_error_ms: int = 0  # when it was there last, Unix milliseconds

    @property
    def working(self) -> bool:
        """Whether its process runs and what it did last succeeded."""
        return self.process.running and bool(self.process.state) and not self.process.state["error"]

    def to_json(self) -> dict[str, object]:
        """What `/status` answers."""
        process = self.process
        return {
            "model": self.model,
            "target": self.target,
            "running": process.running,
            "working": self.working,
            "starts": process.starts,
            "failures": process.failures,
            "behind_rows": self.behind_rows,
            "behind_ms": self.behind_ms,
            "last_error": self.last_error,
            "last_error_ms": self.last_error_ms,
            "counts": {key: value for key, value in process.state.items() if key not in ("place", "late_ms", "behind")},
        }
