"""Recorded traces of what a trainer updates: which rows, in which step, drawn once from a seed and then the same for everybody.

The model of it: a *working set* of rows gets all updates, by Zipf's law over ranks, and it drifts: now and then the row at some
rank is swapped for another one of the table. Two numbers that were published fix the rest. Ekko (OSDI '22, figure 9) saw 4.3 %
of a model's rows change within 10 minutes and about 10 % within an hour: far less than six times as much, so the set is small
and drifts slowly. QuickUpdate (NSDI '24) saw 58 % within 10 minutes: every row may change.

How many distinct rows change within T follows from rates alone. The row at a rank is updated at rate a and swapped at rate d;
u(t), the chance that the row now there was not updated yet, obeys u' = -a u + d (1 - u) from u(0) = 1, and the distinct rows
are the integral of a u. `skewed` and `hostile` solve that for the parameters they are free to choose.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Shares of rows that change, and within how long.
SKEWED_SHARES = ((600.0, 0.043), (3_600.0, 0.10))
HOSTILE_SHARES = ((600.0, 0.58),)
# Zipf's exponents. The skew inside the working set is a guess near what click logs show; in the hostile trace every row has to
# be updated now and then, so it is flatter.
SKEWED_EXPONENT = 0.8
HOSTILE_EXPONENT = 0.5
# How much the rate of updates varies: the standard deviation of its logarithm, and for how long it remembers. Guesses.
BURSTS = 0.3
BURST_S = 10.0
_HALVINGS = 32


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What a trace is drawn from."""

    rows: int  # of the table
    seed: int
    updates_per_s: float  # rows updated; those that come twice in one step count once
    working_set: int  # rows that get updates at any moment
    exponent: float  # of Zipf's law over their ranks
    swaps_per_s: float  # chance a second that the row at a rank is swapped for another
    duration_s: float = 3_600.0
    step_ms: int = 200


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Steps at regular times; step i is at `i * step_ms` and updates `keys[starts[i] : starts[i + 1]]`, each once."""

    options: TraceOptions
    starts: I64  # [steps + 1]
    keys: NDArray[np.uint32]  # row numbers, ascending within a step

    @property
    def steps(self) -> int:
        return len(self.starts) - 1

    def window(self, begin_s: float, end_s: float) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """(milliseconds since `begin_s`, row numbers) of each step of a part of the trace that updates anything."""
        first, last = (min(self.steps, int(at_s * 1_000) // self.options.step_ms) for at_s in (begin_s, end_s))
        for step in range(first, last):
            keys = self.keys[self.starts[step] : self.starts[step + 1]]
            if len(keys):
                yield (step - first) * self.options.step_ms, keys.astype(np.uint64)

    def typical_s(self, duration_s: float, after_s: float = 0.0) -> float:
        """The first second of the part of this length whose rate of updates is nearest that of the whole trace."""
        per_second = np.diff(self.starts[:: 1_000 // self.options.step_ms])
        length, first = int(duration_s), int(after_s)
        updates = np.convolve(per_second[first:], np.ones(length), "valid")
        return float(first + np.abs(updates / length - per_second.mean()).argmin())

    def share_changed(self, begin_s: float, end_s: float) -> float:
        """Which part of the table's rows changes in a part of the trace."""
        first, last = (min(self.steps, int(at_s * 1_000) // self.options.step_ms) for at_s in (begin_s, end_s))
        return len(np.unique(self.keys[self.starts[first] : self.starts[last]])) / self.options.rows

    def save(self, path: Path) -> None:
        """Write it as a NumPy archive."""
        with path.open("wb") as file:
            columns: dict[str, Any] = {name: np.array(value) for name, value in asdict(self.options).items()}
            np.savez_compressed(file, starts=self.starts, keys=self.keys, **columns)

    @staticmethod
    def load(path: Path) -> "Trace":
        """Read one that `save` wrote.

        Raises:
            OSError, ValueError, KeyError: it is not there, or not one.
        """
        with np.load(path, allow_pickle=False) as file:
            options = {name: file[name].item() for name in TraceOptions.__dataclass_fields__}
            return Trace(TraceOptions(**options), file["starts"], file["keys"])


def skewed(rows: int, updates_per_s: float, seed: int = 1, duration_s: float = 3_600.0) -> Trace:
    """4.3 % of the rows within 10 minutes and 10 % within an hour, for any rate of updates that suffices for it.

    Raises:
        ValueError: so few updates cannot change so many rows.
    """
    (short_s, short), (long_s, long) = SKEWED_SHARES

    def options(working_set: float, swaps_per_s: float) -> TraceOptions:
        return TraceOptions(rows, seed, updates_per_s, round(working_set), SKEWED_EXPONENT, swaps_per_s, duration_s)

    def swaps_for(working_set: float) -> float:
        return _solve(lambda swaps: expected_share(options(working_set, swaps), long_s) - long, 0.0, 0.1)

    # A larger set changes more rows soon; the drift that the hour needs is then smaller.
    working_set = _solve(lambda size: expected_share(options(size, swaps_for(size)), short_s) - short, 2.0, rows)
    return record(_checked(options(working_set, swaps_for(working_set)), SKEWED_SHARES))


def hostile(rows: int, seed: int = 2, duration_s: float = 3_600.0) -> Trace:
    """58 % of the rows within 10 minutes: every row may change, at the rate of updates that this takes."""
    ((within_s, share),) = HOSTILE_SHARES

    def options(updates_per_s: float) -> TraceOptions:
        return TraceOptions(rows, seed, updates_per_s, rows, HOSTILE_EXPONENT, 0.0, duration_s)

    return record(options(_solve(lambda rate: expected_share(options(rate), within_s) - share, 0.0, float(rows))))


def expected_share(options: TraceOptions, within_s: float) -> float:
    """Which part of the table's rows changes within so many seconds, on average."""
    update = options.updates_per_s * _weights(options)
    either = update + options.swaps_per_s
    ever = 1.0 - np.exp(-either * within_s)
    distinct = update * (options.swaps_per_s * within_s / either + update / either**2 * ever)
    return float(distinct.sum()) / options.rows


def record(options: TraceOptions) -> Trace:
    """Draw a trace; the same options give the same one."""
    rng = np.random.default_rng(options.seed)
    place = rng.permutation(options.rows).astype(np.uint32)  # row at each rank; those beyond the working set get no updates
    cumulated = np.cumsum(_weights(options))
    per_second = 1_000 // options.step_ms
    steps: list[NDArray[np.uint32]] = []
    level = rng.normal(0.0, BURSTS)  # logarithm of the rate, an autoregressive process
    kept = math.exp(-1.0 / BURST_S)
    for _ in range(int(options.duration_s)):
        swapped = np.flatnonzero(rng.random(options.working_set) < options.swaps_per_s)
        for rank, other in zip(swapped.tolist(), rng.integers(0, options.rows, len(swapped)).tolist(), strict=True):
            place[rank], place[other] = place[other], place[rank]
        level = kept * level + rng.normal(0.0, BURSTS * math.sqrt(1.0 - kept**2))
        rate = options.updates_per_s * math.exp(level - BURSTS**2 / 2)
        for count in rng.poisson(rate / per_second, per_second).tolist():
            ranks = np.searchsorted(cumulated, rng.random(count) * cumulated[-1])
            steps.append(np.unique(place[ranks]))
    starts = np.concatenate([[0], np.cumsum([len(keys) for keys in steps])]).astype(np.int64)
    return Trace(options, starts, np.concatenate(steps))


def _weights(options: TraceOptions) -> F64:
    """Which part of the updates goes to each rank of the working set."""
    weights: F64 = np.arange(1, options.working_set + 1, dtype=np.float64) ** -options.exponent
    weights /= weights.sum()
    return weights


def _solve(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is zero, by halving; an end of the interval when it is zero nowhere in it."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if excess(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _checked(options: TraceOptions, shares: tuple[tuple[float, float], ...]) -> TraceOptions:
    for within_s, share in shares:
        if abs(expected_share(options, within_s) - share) > 0.02 * share:
            raise ValueError(
                f"{options.updates_per_s:g} updates a second cannot change {share:.1%} of {options.rows} rows within "
                f"{within_s:g} s: ask for more updates"
            )
    return options
