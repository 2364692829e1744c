"""What absent keys are, by table: zeros, the mean row, or a row that the user gave."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError
from ekko.serve.arguments import as_row
from ekko.store.view import ZEROS, TableView

F32 = NDArray[np.float32]

Default = Literal["zeros", "mean"] | ArrayLike

# Slots that a mean row is made of, evenly spread: its error is below a hundredth of what rows differ by, and it costs a look-up
# a millisecond or two.
MEAN_ROWS_MAX: Final = 16_384
# A mean row is made anew by the first look-up after so many seconds, and when the table has become twice as large.
MEAN_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class DefaultRow:
    """A row for absent keys. Whoever uses its address keeps it alive."""

    values: F32 | None
    address: int = field(init=False)

    def __post_init__(self) -> None:
        address = ZEROS if self.values is None else self.values.__array_interface__["data"][0]
        object.__setattr__(self, "address", address)


_ZEROS = DefaultRow(None)


@dataclass(frozen=True, slots=True)
class _Mean:
    view: TableView
    row: DefaultRow
    rows_used: int
    until_s: float


class Defaults:
    """The rules of one reader, by table; a table without one has zeros. Safe in any thread.

    Raises:
        ModelError: a rule is none.
    """

    def __init__(self, rules: Mapping[str, Default]) -> None:
        self._given: dict[str, DefaultRow] = {}
        self._means: dict[str, _Mean | None] = {}
        for table, rule in rules.items():
            if isinstance(rule, str):
                if rule not in ("zeros", "mean"):
                    raise ModelError(f"the default of table {table!r} is {rule!r}: expected 'zeros', 'mean', or a row")
                if rule == "mean":
                    self._means[table] = None
            else:
                self._given[table] = DefaultRow(as_row(table, rule))

    def check(self, view: TableView) -> None:
        """Refuse a given row that is not as wide as its table.

        Raises:
            ModelError: naming both widths.
        """
        given = self._given.get(view.spec.name)
        if given is not None and given.values is not None and given.values.size != view.spec.dim:
            raise ModelError(
                f"the default of table {view.spec.name!r} has {given.values.size} values: expected dim {view.spec.dim}"
            )

    def row(self, view: TableView) -> DefaultRow:
        """What the table's absent keys are now."""
        name = view.spec.name
        if name in self._means:
            return self._mean(name, view)
        return self._given.get(name, _ZEROS)

    def _mean(self, name: str, view: TableView) -> DefaultRow:
        held, now = self._means[name], time.monotonic()
        if held is None or held.view is not view or now > held.until_s or view.rows_used > 2 * held.rows_used:
            used = view.rows_used
            # Two threads may both make one; either is as good.
            held = _Mean(view, DefaultRow(view.mean_row(MEAN_ROWS_MAX)), used, now + MEAN_S_MAX)
            self._means[name] = held
        return held.row
