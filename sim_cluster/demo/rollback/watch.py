"""What the manager does, as the witness tells it: when the model's state changed, and how far each rollback came.

Times are seconds from the first event of the stream. Facts of a rollback carry the moment at which a step began, so they are
exact however seldom one looks; states of the model are as exact as one looks often.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Final

from ekko.asking import ask_node
from ekko.errors import EkkoError
from sim_cluster.demo.rollback.cluster import MODEL
from sim_cluster.processes import NodeProcess, NodeProcessError

RESTORED_BY: Final = ("probing", "lifting", "done")  # steps by which every replica has its rows back


@dataclass(slots=True)
class Course:
    """One rollback."""

    epoch: str
    decided_s: float
    steps: dict[str, float] = field(default_factory=dict)  # step -> when it began
    rows: int = 0
    cut_s: float | None = None  # the moment that it went back to
    reason: str = ""

    @property
    def restored_s(self) -> float | None:
        """When every replica had its rows back."""
        return min((at for step, at in self.steps.items() if step in RESTORED_BY), default=None) if not self.failed else None

    @property
    def over_s(self) -> float | None:
        """When it was over."""
        return self.steps.get("done", self.steps.get("failed"))

    @property
    def failed(self) -> bool:
        """Whether nothing came of it."""
        return "failed" in self.steps


@dataclass(slots=True)
class Watch:
    """Looks at one node.

    Args:
        node: any that knows; the witness does.
        start_ns: CLOCK_MONOTONIC of the first event.
    """

    node: NodeProcess
    start_ns: int
    states: list[tuple[float, str]] = field(default_factory=list)  # since when, which
    courses: dict[str, Course] = field(default_factory=dict)
    _unix_offset_s: float = field(default_factory=lambda: time.time() - time.monotonic())

    def look(self) -> None:
        """Take what is new; a node that does not answer is asked again next time."""
        try:
            known = self.node.status()["health"].get(MODEL)
            rollbacks = ask_node(self.node.http, f"/rollback?model={MODEL}")["rollbacks"]
        except (EkkoError, NodeProcessError):
            return
        if known is not None:
            self.note_state(known["state"], self.now_s)
        for told in rollbacks:
            self.note_rollback(told)

    def note_state(self, state: str, at_s: float) -> None:
        """The model is in this state."""
        if not self.states or self.states[-1][1] != state:
            self.states.append((at_s, state))

    def note_rollback(self, told: dict[str, Any]) -> None:
        """What the node tells of one rollback."""
        if told["dry"]:
            return
        course = self.courses.setdefault(told["epoch"], Course(told["epoch"], self._second(told["requested_ms"])))
        course.steps.setdefault(told["step"], self._second(told["changed_ms"]))
        course.rows, course.reason = told["rows"], told["reason"]
        if told["cut_ms"]:
            course.cut_s = self._second(told["cut_ms"])

    @property
    def now_s(self) -> float:
        """Seconds since the first event."""
        return time.monotonic() - self.start_ns / 1e9

    @property
    def judged(self) -> str:
        """The model's last state that was seen; empty: none yet."""
        return self.states[-1][1] if self.states else ""

    @property
    def state(self) -> str:
        """The last one that was seen, and what a rollback does, for people."""
        last = list(self.courses.values())[-1:]
        going = [f"rollback: {list(course.steps)[-1]}" for course in last if course.over_s is None]
        return ", ".join([f"model {self.states[-1][1]}" if self.states else "model not judged yet", *going])

    def _second(self, unix_ms: int) -> float:
        return unix_ms / 1000 - self._unix_offset_s - self.start_ns / 1e9
