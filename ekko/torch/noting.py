"""What each step of an optimizer has to note, so that it is known later which rows it changed."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from ekko.torch.capture import TrackedTable


class Capture:
    """Notes what each step of one optimizer changed. This is done for each step, and Python's time is the trainer's: it is one
    function, with what it needs at hand.

    Args:
        optimizer: that steps.
        tables: that it trains.
    """

    def __init__(self, optimizer: Optimizer, tables: Sequence[TrackedTable]) -> None:
        self._optimizer = optimizer
        self._tables = tables
        # Attributes of modules are slow; and a table that grows gets another weight.
        self._slots: list[tuple[Any, TrackedTable]] = [(table.slots, table) for table in tables]
        self._bind()

    def stepped(self) -> None:
        """A step has ended."""
        if self._optimizer.param_groups is not self._bound:  # a state dict was loaded
            self._bind()
        for group in self._groups:  # the settings as they are now
            if group.get("momentum") or group.get("weight_decay"):
                self._moved(group)
        for slots, table in self._slots:
            gradient = slots["weight"].grad
            if table.compared:
                table.touch()
            elif gradient is None:
                continue
            elif gradient.is_sparse:
                table.set_sparse(gradient)
            else:
                table.set_dense(gradient)

    def _bind(self) -> None:
        self._bound = self._optimizer.param_groups
        by_gradient = [table for table in self._tables if not table.compared]
        found = {id(group): group for table in by_gradient for group in table.groups_of(self._optimizer)}
        self._groups = list(found.values())

    def _moved(self, group: dict[str, Any]) -> None:
        for table in self._tables:
            if not table.compared and any(one is group for one in table.groups_of(self._optimizer)):
                table.move()
        self._bind()
