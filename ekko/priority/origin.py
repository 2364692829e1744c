"""The classes of what is published at this node, once and for all: those who forward a row carry its class unchanged.

    p = (p_g + p_u) * p_m        class = 128 + 8 log2(p / p_k)

p_g, significance: what the publisher says of a row (the L1 norm of its gradient), or else how far the row moves, relative to
the model's recent mean of the same. p_u, freshness: most as a key is created, and half as much a half-life later. p_m, the
model's share of what readers ask for. p_k: the k-th percentile of the model's own p_g + p_u, times the share of a model that is
asked for as often as the average. So of such a model 1 - k of the rows are significant, and of one that is asked for twice as
often those that would be at half the threshold. An origin does not see what others write, so no percentile over all models is
to be had anywhere: this one means the same at every origin.

Dense tensors are not weighed row by row: a tensor of which some rows are sent first, since they moved farther, is nothing that
was ever learnt. All their rows are the foremost of the ordinary ones (decision 0044). So are those of models that parameter
servers train.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import PublishError
from ekko.model import DENSE_SPEC, is_training
from ekko.priority.functions import formula_of
from ekko.priority.guard import Guarded
from ekko.priority.mean import RecentMean
from ekko.priority.memory import KeyMemory
from ekko.priority.picture import PriorityPicture
from ekko.priority.settings import DEFAULTS, PrioritySettings
from ekko.priority.threshold import I64, LARGEST, SMALLEST, Percentile, log2_of
from ekko.priority.updates import F32, U64, Updates
from ekko.store.kernels import weighing
from ekko.store.model_store import ModelStore
from p2p import classes
from p2p.messages import Now
from p2p.replica import RowColumns

# A model that nobody asks for, as far as readers count, is weighed as if it had this part of the average: its new rows are to
# be there when somebody does, and readers that may not count (other users) are not seen.
SHARE_MIN: Final = 1 / 64

_LARGEST: Final = np.float32(3e38)
_DENSE: Final = DENSE_SPEC.id
# Of rows at which nobody looked: there is a version, whichever.
_SOME_VERSION: Final = np.uint64(1)


class Priorities:
    """Of all models that are published here.

    Args:
        models: live, those there are.
        settings: of models by name; the others have the defaults.
        share_of: of a model's name, its share of readers' requests relative to the average; 1: nobody knows better.
    """

    def __init__(
        self,
        models: Mapping[str, ModelStore],
        settings: Mapping[str, PrioritySettings] | None = None,
        share_of: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        self._models = models
        self._settings = dict(settings or {})
        self._share_of = share_of
        self._of: dict[int, ModelPriority] = {}

    def classify(
        self, model: ModelStore, columns: Sequence[RowColumns], significance: Sequence[F32 | None], now: Now
    ) -> tuple[RowColumns, ...]:
        """As `ModelPriority.classify`, of a step of this model.

        What a parameter server trains is not weighed: all of a step has to be with its holders before the push is answered, so
        that no row of it is more urgent than another.
        """
        if is_training(model.spec.name):
            return tuple(map(_together, columns))
        priority = self._of.get(model.keyspace)
        if priority is None:
            there = {other.keyspace for other in self._models.values()}
            self._of = {number: one for number, one in self._of.items() if number in there}
            settings = self._settings.get(model.spec.name, DEFAULTS)
            priority = self._of[model.keyspace] = ModelPriority(model, settings)
        return priority.classify(columns, significance, now, self._share_of(model.spec.name))

    def picture(self, model: ModelStore) -> PriorityPicture | None:
        """Of one model; None: nothing of it was published here in this life of the node."""
        priority = self._of.get(model.keyspace)
        return None if priority is None else priority.picture(self._share_of(model.spec.name))


class ModelPriority:
    """Of one model at its origin.

    Raises:
        ConfigError: there is no such formula; the configuration says so before a node starts.
    """

    def __init__(self, model: ModelStore, settings: PrioritySettings) -> None:
        self._model = model
        self._settings = settings
        self._formula = formula_of(settings.formula)
        self._percentile = Percentile(settings.k, settings.window_s)
        self._means: dict[str, RecentMean] = {}
        self._created = KeyMemory()  # seconds of the clock below
        self._drifted = KeyMemory()  # since a row was last significant; only for formulas that are told
        # The built-in formula asks how far a row moves only where nobody says how much that matters.
        self._looks = settings.formula != "significance"
        self._begun_ms = 0
        self._rows = 0
        self._significant = 0

    def classify(
        self, columns: Sequence[RowColumns], significance: Sequence[F32 | None], now: Now, share: float
    ) -> tuple[RowColumns, ...]:
        """The same rows with their classes. Call it before they are stored: what they replace is looked at.

        Args:
            columns: a step, checked against the schema.
            significance: float32[n] for each of them; NaN or None: not said, what the row's movement says counts.
            now: of this machine.
            share: of the model among what readers ask for, relative to the average.

        Raises:
            PublishError: a significance is negative or infinite.
        """
        return tuple(
            self._classified(section, said, now, share) if len(section.keys) else section
            for section, said in zip(columns, significance, strict=True)
        )

    def _classified(self, section: RowColumns, said: F32 | None, now: Now, share: float) -> RowColumns:
        if section.table == _DENSE:
            return _together(section)
        drift: F32 | None = None
        if self._looks or (said is not None and np.isnan(said).any()):
            updates = self._updates(section, said, now)
            logarithms, drift = log2_of(self._formula(updates)), updates.drift if self._looks else None
        else:
            logarithms = self._logarithms(section, said, now)
        self._percentile.add(logarithms, now.monotonic_ms)
        threshold = self._percentile.threshold
        weighed, significant = class_of(logarithms, None if threshold is None else threshold - log2(max(share, SHARE_MIN)))
        self._rows += weighed.size
        self._significant += significant
        if drift is not None:
            self._drifted.note(section.table, section.keys, np.where(weighed >= classes.SIGNIFICANT, np.float32(0), drift))
        return RowColumns(section.table, section.keys, section.rows, section.stamps, weighed)

    def _logarithms(self, section: RowColumns, said: F32 | None, now: Now) -> F32:
        """`log2_of` of what the built-in formula makes of `_updates`, to the bit, where it need not be told all of it.

        `said`: of all rows, or of none.
        """
        table, keys, live = self._model.tables_by_id[section.table], section.keys, len(section.rows)
        if said is None:
            values, before = table.movement(keys, section.rows)
            np.fmin(values, _LARGEST, out=values)
        else:
            values, before = np.require(said, np.float32, ["C", "A"]), table.present(keys) * _SOME_VERSION
        mean = self._mean("moved" if said is None else "said")
        mean.add(values, now.monotonic_ms)
        settings, now_s = self._settings, self._now_s(now.monotonic_ms)
        weights, (new, fresh) = np.empty(keys.size, np.float32), np.empty((2, keys.size), np.int64)
        power = self._created.recall(section.table, keys, -np.inf)
        half_life_s = settings.fresh_half_life_s
        new_rows, many = weighing.weigh(values, mean.value, before, live, now_s, half_life_s, weights, power, new, fresh)
        self._note_created(section, new[:new_rows], now_s)
        freshness = np.exp2(power[:many])  # of the others it is 0, and the power of infinities is slow
        weighing.add_up(freshness, fresh[:many], settings.fresh_weight, SMALLEST, LARGEST, weights)
        logarithms: F32 = np.log2(weights, out=weights)
        return logarithms

    def _updates(self, section: RowColumns, said: F32 | None, now: Now) -> Updates:
        """What the formula is told."""
        table, keys = self._model.tables_by_id[section.table], section.keys
        moved, before = table.movement(keys, section.rows)
        moved = np.fmin(moved, _LARGEST)  # another client may have sent rows with NaN or infinity
        relative = self._relative("moved", moved, now.monotonic_ms)
        significance = relative if said is None else self._significance(said, relative, now.monotonic_ms)
        age_s = self._age_s(section, before, now.monotonic_ms)
        settings = self._settings
        freshness = np.float32(settings.fresh_weight) * np.exp2(-age_s / np.float32(settings.fresh_half_life_s))
        drift = relative
        if self._looks:
            drift = relative + self._drifted.recall(section.table, keys, 0.0)
        name = self._model.spec.name
        given = (significance, freshness, age_s, relative, drift, before)
        return Updates(name, table.spec.name, keys, *given, now.unix_ms)

    def _mean(self, kind: str) -> RecentMean:
        mean = self._means.get(kind)
        if mean is None:
            mean = self._means[kind] = RecentMean(self._settings.window_s)
        return mean

    def _relative(self, kind: str, values: F32, now_ms: int) -> F32:
        mean = self._mean(kind)
        mean.add(values, now_ms)
        return mean.relative(values)

    def _significance(self, said: F32, moved: F32, now_ms: int) -> F32:
        """What the publisher says, relative to what it usually says; of rows of which it says nothing, how far they move."""
        known = ~np.isnan(said)
        if known.all():
            return self._relative("said", said, now_ms)
        out = moved.copy()
        out[known] = self._relative("said", said[known], now_ms)
        return out

    def _age_s(self, section: RowColumns, before: U64, now_ms: int) -> F32:
        """Seconds since each key was created here; infinite where that is not remembered, or it is deleted."""
        now_s, live = self._now_s(now_ms), len(section.rows)
        age_s = np.float32(now_s) - self._created.recall(section.table, section.keys, -np.inf)
        new = np.flatnonzero((before[:live] == 0) | np.isnan(age_s[:live]))
        self._note_created(section, new, now_s)
        age_s[new], age_s[live:] = 0, np.inf
        return age_s

    def _now_s(self, now_ms: int) -> float:
        """Of the clock of `_created`."""
        self._begun_ms = self._begun_ms or now_ms
        return (now_ms - self._begun_ms) / 1000

    def _note_created(self, section: RowColumns, new: I64, now_s: float) -> None:
        """The rows at `new` are created; those that are deleted are not fresh, and when they come back, are created anew."""
        keys, live = section.keys, len(section.rows)
        if new.size:
            self._created.note(section.table, keys[new], np.full(new.size, now_s, np.float32))
        if live < keys.size:
            self._created.note(section.table, keys[live:], np.full(keys.size - live, np.nan, np.float32))

    def picture(self, share: float) -> PriorityPicture:
        """See `PriorityPicture`."""
        settings, formula = self._settings, self._formula
        threshold = self._percentile.threshold
        value = None if threshold is None else 2.0**threshold
        known = (settings.formula, settings.k, value, self._rows, self._significant, share)
        if not isinstance(formula, Guarded):
            return PriorityPicture(*known)
        return PriorityPicture(*known, formula.failures, formula.steps_without, formula.last_failure)


def _together(section: RowColumns) -> RowColumns:
    """All of its rows in one class."""
    together = np.full(len(section.keys), classes.FOREMOST_ORDINARY, np.uint8)
    return RowColumns(section.table, section.keys, section.rows, section.stamps, together)


def check_significance(table: str, significance: F32) -> None:
    """Refuse what is no weight; NaN says that the publisher does not say.

    Raises:
        PublishError: naming the table.
    """
    if not ((significance >= 0) & (significance < np.inf) | np.isnan(significance)).all():
        raise PublishError(
            f"significance of table {table!r} contains negative numbers or infinity: expected finite weights from 0"
        )


def class_of(logarithms: F32, threshold: float | None) -> tuple[NDArray[np.uint8], int]:
    """uint8[n]: how far above the threshold, a logarithm as they are; where there is none yet, not known. And how many rows are
    significant.
    """
    if threshold is None:
        return np.full(logarithms.size, classes.NOT_KNOWN, np.uint8), 0
    out = np.empty(logarithms.size, np.uint8)
    bounds = classes.SIGNIFICANT, classes.LEAST, classes.MOST
    return out, int(weighing.classes_of(logarithms, threshold, classes.PER_DOUBLING, *bounds, out))
