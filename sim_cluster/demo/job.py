"""What a worker process is told when it starts: a small JSON file in the demo's scratch folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

JOB_NAME: Final = "job.json"


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the demo, as its workers see it.

    Args:
        model: name of the published model.
        local: the training node's local endpoint.
        run_dirs: serving region -> `run_dir` of the node that the region's scorer reads from.
        start: index of the stream's first event; all before it are learnt offline.
        rate: events per second of the stream.
        seed: of the model.
        codec: of the published model's tables.
        parent: process id of the demo; a worker ends when it is gone.
        device: on which the scorers look rows up; empty: in shared memory.
    """

    model: str
    local: str
    run_dirs: dict[str, str]
    start: int
    rate: float
    seed: int
    codec: str
    parent: int
    device: str

    @property
    def regions(self) -> list[str]:
        """The serving regions, in the board's order."""
        return list(self.run_dirs)

    def due_ns(self, event: int) -> int:
        """When an event's time comes, counted from the start of the stream; `event` counts from there too."""
        return int(event / self.rate * 1e9)

    def due_count(self, elapsed_ns: int) -> int:
        """How many events' times have come."""
        return 0 if elapsed_ns < 0 else int(elapsed_ns * self.rate / 1e9) + 1

    def save(self, folder: Path) -> None:
        """Write it where the workers look."""
        (folder / JOB_NAME).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**json.loads((folder / JOB_NAME).read_text()))


def events_path(folder: Path) -> Path:
    """The events, written by the demo."""
    return folder / "events.npz"


def history_path(folder: Path) -> Path:
    """What was published during the stream, written by the trainer."""
    return folder / "history.npz"


def parameters_path(folder: Path) -> Path:
    """The trained model at the end, written by the trainer."""
    return folder / "parameters.npz"
