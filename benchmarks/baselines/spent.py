"""Processor time of a round: whose, how much a batch, and which process or the machine it is that limits the rate.

A clock of the system counts what a process spent, user and system, all its threads, also those that have ended. It is read
when the first batch is sent and when the last one is applied everywhere.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

# Machine and process are never quite busy: whoever is about to work is woken first.
BUSY = 0.9


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one side."""

    rows_per_s: float
    batches: int = 0
    seconds: float = 0.0
    spent_s: dict[str, list[float]] = field(default_factory=dict)  # role -> processor seconds of each process that has it


def spent_ns(pid: int) -> int:
    """Nanoseconds of processor time that a process, which may be another one's, has spent so far.

    Raises:
        OSError: there is no such process.
    """
    # The kernel's number for that clock, which clock_getcpuclockid(3) hands out and Python does not.
    return time.clock_gettime_ns((~pid << 3) | 2)


def stopwatch(pids: dict[str, Sequence[int]]) -> Callable[[], dict[str, list[float]]]:
    """Begin to count; what it returns says the seconds spent since by each process of each role."""
    begin = {pid: spent_ns(pid) for own in pids.values() for pid in own}
    return lambda: {role: [(spent_ns(pid) - begin[pid]) / 1e9 for pid in own] for role, own in pids.items()}


def figures_of(side: str, rounds: Sequence[Round]) -> list[dict[str, float | int | str]]:
    """Of a side's rounds, medians: CPU milliseconds a batch, and shares of a core, of all processes together and by role."""
    limit = limit_of(rounds)
    cells = [_cell(side, "all", rounds, None)]
    cells += [_cell(side, role, rounds, role) for role in rounds[0].spent_s]
    for cell in cells:
        cell["limits"] = "<-" if cell["role"] == limit else ""
    return cells


def limit_of(rounds: Sequence[Round]) -> str:
    """The role that limits: "all" where the machine has no core left, else whose process is busiest."""
    cores = len(os.sched_getaffinity(0))
    if statistics.median(sum(map(sum, one.spent_s.values())) / one.seconds for one in rounds) >= BUSY * cores:
        return "all"
    return max(rounds[0].spent_s, key=lambda role: _busiest(rounds, role))


def _busiest(rounds: Sequence[Round], role: str) -> float:
    return statistics.median(max(one.spent_s[role]) / one.seconds for one in rounds)


def _cell(side: str, name: str, rounds: Sequence[Round], role: str | None) -> dict[str, float | int | str]:
    """One line of the table; a role that several processes have is said for one of them, on average."""
    spent = [list(chain(*one.spent_s.values())) if role is None else one.spent_s[role] for one in rounds]
    share = 1 if role is None else len(spent[0])
    return {
        "side": side,
        "role": name,
        "processes": len(spent[0]),
        "cpu_ms_per_batch": statistics.median(
            1000 * sum(own) / share / one.batches for own, one in zip(spent, rounds, strict=True)
        ),
        "cores_busy": statistics.median(sum(own) / share / one.seconds for own, one in zip(spent, rounds, strict=True)),
    }
