"""What each step of an optimizer has to note, so that it is known later which rows it changed."""

from collections.abc import Sequence
from typing import Any, Final

from torch.optim import Optimizer

from ekko.torch.capture import PENDING_MAX, PENDING_VALUES_MAX, TrackedTable

# Settings of an optimizer under which rows move that have no gradient.
MOVES_ALL: Final = ("momentum", "weight_decay")


class Capture:
    """Notes what each step of one optimizer changed. This is done for each step, and Python's time is the trainer's: it is one
    function, with what it needs at hand.

    Args:
        optimizer: that steps.
        tables: that it trains.
    """

    def __init__(self, optimizer: Optimizer, tables: Sequence[TrackedTable]) -> None:
        self._optimizer = optimizer
        # Attributes of modules are slow; and a table that grows gets another weight.
        self._slots: list[tuple[Any, TrackedTable]] = [(table.slots, table) for table in tables]
        self._values_max = PENDING_VALUES_MAX * len(tables)
        self._steps = self._values = 0  # that were set aside, as far as one knows who is not told of what is added up
        self._bind()

    def stepped(self) -> None:
        """A step has ended. Its sparse gradients are set aside: what becomes of one (`zero_grad`, another backward pass) gets
        other memory, so that its values stay what they are, but where they are written to in place, which tables look at. Its
        indices are copied: torch makes them a view of the ids that a user passed, where the next batch may be by then.
        """
        if self._optimizer.param_groups is not self._bound:  # a state dict was loaded
            self._bind()
        for group, name in self._settings:  # as they are now
            if group[name]:
                self._moved(group)
        total = self._values
        for slots, table in self._slots:
            gradient = slots["weight"].grad
            if table.compared:
                table.touch()
            elif gradient is None:
                continue
            elif gradient.is_sparse:
                values = gradient._values()  # noqa: SLF001 - `values()` wants a sum of equal rows first, which takes long
                count = values.numel()
                indices = gradient._indices().clone()  # noqa: SLF001
                table.pending.append((indices, values, count, gradient, gradient._version))  # noqa: SLF001
                total += count
            else:
                table.set_dense(gradient)
        self._values = total
        self._steps += 1
        if total > self._values_max or self._steps >= PENDING_MAX:
            self._bound_pending()

    def _bound_pending(self) -> None:
        """As many steps as may be set aside may have been: add up what was, unless somebody else has."""
        tables = [table for _, table in self._slots]
        self._steps = max((len(table.pending) for table in tables), default=0)
        self._values = sum(entry[2] for table in tables for entry in table.pending)
        if (self._values > self._values_max and self._steps > 1) or self._steps >= PENDING_MAX:
            self._steps = self._values = 0
            for table in tables:
                table.settle()

    def _bind(self) -> None:
        self._bound = self._optimizer.param_groups
        by_gradient = [table for _, table in self._slots if not table.compared]
        found = {id(group): group for table in by_gradient for group in table.groups_of(self._optimizer)}
        self._settings = [(group, name) for group in found.values() for name in MOVES_ALL if name in group]

    def _moved(self, group: dict[str, Any]) -> None:
        for _, table in self._slots:
            if not table.compared and any(one is group for one in table.groups_of(self._optimizer)):
                table.move()
        self._bind()
