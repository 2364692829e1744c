"""The arithmetic of a group in one table: the optimiser goes over the rows, step by step, in place.

Rows of all keys of a group are gathered once; each unit of it says where its own are among them. So a group of many pushes
costs one look-up, one record of what was before, and one published step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.checks import all_finite
from ekko.train.routing import by_partition
from ekko.train.server import kernels
from ekko.train.server.schema import TrainedModel, TrainedTable

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

WEIGHT_MAX: Final = np.float32(1e38)  # the norm of finite gradients may be infinite, which is no significance


@dataclass(slots=True, eq=False)
class Unit:
    """Gradients that the optimiser takes at once: no key twice. `rate`: the learning rate; NaN: that of the settings."""

    keys: U64
    gradients: F32
    rate: float
    partitions: tuple[int, ...]
    places: I64 | None = None  # of the keys among all keys of the group; None: they are all of them, in their order


@dataclass(slots=True, eq=False)
class TableWork:
    """What a group does to one table.

    Args:
        table: how it is trained.
        units: in the order in which they count; each knows its places.
        keys: uint64[n] of all of them, none twice.
        rows: float32[n, dim] as they are stored; changed by `compute`.
        there: bool[n], which of them are stored.
        state: float32[n, state_dim], and `state_there`, bool[n]; None where the optimiser keeps nothing.
        step_of: partition -> steps that it has had, where the optimiser counts them; else empty. Changed by `compute`.
    """

    table: TrainedTable
    units: Sequence[Unit]
    keys: U64
    rows: F32
    there: Mask
    state: F32 | None
    state_there: Mask | None
    step_of: dict[int, int]

    def compute(self, partition_of: Callable[[U64], I64]) -> tuple[U64, F32, F32, F32]:
        """Keys, rows, state and significance (float32[n], the L1 norms of gradients) after the group.

        Rows that it would make infinite or no number are left out: they stay as they are.
        """
        state = self._fill()
        significance = np.zeros(len(self.keys), np.float32)
        for unit in self.units:
            self._update(unit, state, significance, partition_of)
        np.minimum(significance, WEIGHT_MAX, out=significance)
        if all_finite(self.rows) and all_finite(state):
            return self.keys, self.rows, state, significance
        good = np.isfinite(self.rows).all(axis=1) & np.isfinite(state).all(axis=1)
        return self.keys[good], self.rows[good], state[good], significance[good]

    def _fill(self) -> F32:
        """Give rows and state that are not stored what they begin with; returns the state."""
        table, absent = self.table, np.flatnonzero(~self.there)
        if len(absent):
            begun = table.initializer.rows(table.name, np.ascontiguousarray(self.keys[absent]), table.dim)
            kernels.put_rows(self.rows, begun, absent)
        if self.state is None or self.state_there is None:
            return np.empty((len(self.keys), 0), np.float32)
        if len(absent := np.flatnonzero(~self.state_there)):
            kernels.put_rows(self.state, table.optimizer.initial_state(self.rows[absent]), absent)
        return self.state

    def _update(self, unit: Unit, state: F32, significance: F32, partition_of: Callable[[U64], I64]) -> None:
        """Let the optimiser take one step over the rows of a unit."""
        table, step_of = self.table, self.step_of
        rate = 1.0 if np.isnan(unit.rate) else unit.rate / table.rate
        if step_of:
            for partition in unit.partitions:
                step_of[partition] += 1
        steps = {step_of.get(partition, 1) for partition in unit.partitions}
        places = unit.places
        if len(steps) == 1 and places is None:
            table.optimizer.apply(self.rows, state, unit.gradients, step=steps.pop(), rate=rate)
            kernels.weights_of(unit.gradients, significance)
            return
        if places is None:
            places = np.arange(len(self.keys))
        kernels.add_weights(unit.gradients, places, significance)
        if len(steps) == 1:
            self._apply(state, places, unit.gradients, steps.pop(), rate)
            return
        belongs = partition_of(unit.keys)
        for number in sorted(steps):  # partitions of a push that was divided have had different numbers of steps
            mine = [partition for partition in unit.partitions if step_of[partition] == number]
            chosen = np.flatnonzero(np.isin(belongs, mine))
            some = np.ascontiguousarray(unit.gradients[chosen])
            self._apply(state, np.ascontiguousarray(places[chosen]), some, number, rate)

    def _apply(self, state: F32, places: I64, gradients: F32, step: int, rate: float) -> None:
        """One step of the optimiser over the rows at `places`."""
        moved = np.empty((len(places), self.rows.shape[1]), np.float32)
        kept = np.empty((len(places), state.shape[1]), np.float32)
        kernels.take_rows(self.rows, places, moved)
        kernels.take_rows(state, places, kept)
        self.table.optimizer.apply(moved, kept, gradients, step=step, rate=rate)
        kernels.put_rows(self.rows, moved, places)
        kernels.put_rows(state, kept, places)


def place(units: Sequence[Unit], model: TrainedModel) -> U64:
    """uint64[n]: the keys of all units, none twice; each unit is told where its own are among them.

    Those of several units lie by partition, so that the node divides the step without copies; those of one as the worker has
    them, and clients send them so.
    """
    if len(units) == 1:
        units[0].places = None
        return units[0].keys
    keys, places = kernels.find_places(np.concatenate([unit.keys for unit in units]))
    order, moved = by_partition(keys, model.settings.shards, model.settings.partitions), np.empty(len(keys), np.int64)
    moved[order] = np.arange(len(keys))
    keys, places = keys[order], moved[places]
    end = 0
    for unit in units:
        begin, end = end, end + len(unit.keys)
        unit.places = places[begin:end]
    return keys
