"""Which rows of a table a step changed, exactly, whatever the optimizer.

There are two ways. Where an optimizer leaves rows without a gradient alone, the gradient says which changed, and nothing is
compared: after a step its arrays are set aside, and looked at when a batch is made. Where rows move without a gradient
(momentum, weight decay, Adam with dense gradients, LBFGS, ...) or outside of a step (`max_norm`), the table is compared, to the
bit, with a copy of what was published last. That takes as much memory again as the table has.
"""

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ekko.store.kernels.due import copy_rows
from ekko.torch.due import DueRows
from ekko.torch.key_map import KeyMap
from ekko.torch.modules import Table, optimizers_of

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

# Where a row's gradient is zero these leave it as it is, but for momentum and weight decay. Subclasses may do otherwise. An
# optimizer of other origin says that it does, too, by `leaves_zero_gradients = True` in its class (`ekko.zoo.FTRL`).
LEAVES_ZERO_GRADIENTS: Final = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop)
# Steps whose gradients are set aside; then the step adds all up. The thread that sends does so long before, as a rule.
PENDING_MAX: Final = 512
PENDING_VALUES_MAX: Final = 8 << 20  # float32 values of all of them, but for the newest step's, for each table of an optimizer
# Of a table that is compared so many bytes are looked at at a time, while no step may begin.
COMPARE_BYTES_MAX: Final = 16 << 20


# A sparse gradient that is set aside: a copy of its indices, its values and how many these are, itself, and the version that it
# had.
Entry = tuple[Tensor, Tensor, int, Tensor, int]


class TrackedTable:
    """One table in training: what of it is due.

    `pending` gets more, and `set_dense` and `touch` are called, in the thread that trains when a step has ended
    (`ekko.torch.noting`); the rest is for whoever sends, while no step is under way; `settle` for either.

    Args:
        name: of the table.
        module: holds its weight.
        optimizers: all that are tracked.
        keys: which key each row has; None: its number.
        renormalised: whether forward passes of some module change the weight (`max_norm`).

    Raises:
        ModelError: no optimizer trains the weight.
    """

    def __init__(
        self,
        name: str,
        module: Table,
        optimizers: Sequence[Optimizer],
        keys: KeyMap | None = None,
        *,
        renormalised: bool = False,
    ) -> None:
        self.name = name
        self.key_map = keys
        self._module = module
        self.slots = module._parameters  # noqa: SLF001 - where its weight is
        self.due = DueRows(len(self.weight))
        self.trainers = optimizers_of(self.weight, optimizers, name)
        self.pending: list[Entry] = []  # of each step, until it is added up
        self._norms: Tensor | None = None
        self.compared = False  # whether rows are compared with a copy,
        self._known: Tensor | None = None  # of what was published last
        self._unseen = 0  # rows that are to be compared since a step may have changed them
        self._place = 0  # which is the next one
        self._lock = threading.Lock()  # of `due`
        self.says_significance = True
        self._moves_zeros = any(type(one) is torch.optim.SparseAdam for one in self.trainers)
        self._takes_dense = all(_leaves_zero_gradients(type(one)) for one in self.trainers)
        groups = ((one, group) for one in self.trainers for group in self.groups_of(one))
        if renormalised or not all(_is_local(one, group, module.sparse) for one, group in groups):
            self.compare()

    @property
    def weight(self) -> nn.Parameter:
        """float32[rows, dim]; another one after the table grew."""
        weight = self.slots["weight"]
        assert weight is not None
        return weight

    def groups_of(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """An optimizer's groups that have the weight."""
        return [group for group in optimizer.param_groups if any(value is self.weight for value in group["params"])]

    @property
    def is_due(self) -> bool:
        """Whether there may be anything to send."""
        freed = self.key_map is not None and self.key_map.has_freed
        return bool(self.due.count or self.pending or self._norms is not None or self._unseen or freed)

    @property
    def bytes_due(self) -> int:
        """Of rows that are due, once they are added up, and of those that are to be compared."""
        return (self.due.count + self._unseen) * self.weight.shape[1] * 4

    def set_dense(self, gradient: Tensor) -> None:
        """Note a dense gradient: it may be overwritten in place, and is as large as the table; its norms are not."""
        if not self._takes_dense:
            self.move()
            return
        norms = torch.linalg.vector_norm(gradient.detach(), ord=1, dim=1)
        self._norms = norms if self._norms is None else self._norms.add_(norms)

    def move(self) -> None:
        """Rows without a gradient have moved, too, which they did not when tracking began."""
        self.compare()
        self.mark_all()

    def settle(self) -> None:
        """Add up what was set aside."""
        self.add_up(*self.set_aside())

    def set_aside(self) -> tuple[list[Entry], Tensor | None]:
        """Gradients that were set aside, for `add_up`: called between two steps."""
        pending, self.pending = self.pending, []
        norms, self._norms = self._norms, None
        return pending, norms

    def add_up(self, pending: list[Entry], norms: Tensor | None) -> None:
        """Have the rows that gradients touch due; may be called while a step is under way."""
        if not pending and norms is None:
            return
        with self._lock:
            self._fit()
            if pending:
                self._add_sparse(pending, zeros=self._moves_zeros)
            if norms is not None:
                self.due.add_norms(norms)

    def _add_sparse(self, pending: list[Entry], *, zeros: bool) -> None:
        self._add_entries(pending, zeros=zeros)
        # Looked at afterwards, since they may be written to meanwhile. What they were nobody knows then: all their rows count.
        if not zeros and (written := [entry for entry in pending if _is_overwritten(entry)]):
            self._add_entries(written, zeros=True)

    def _add_entries(self, entries: list[Entry], *, zeros: bool) -> None:
        indices, values, counts, _, _ = zip(*entries, strict=True)
        self.due.add_gradients(indices, values, np.array(counts) // self.weight.shape[1], zeros=zeros)

    def compare(self) -> None:
        """From now on rows are compared with a copy as they are now."""
        self.compared = True
        self._known = self.weight.detach().clone(memory_format=torch.contiguous_format)
        self.says_significance = False  # of rows that move without a gradient there is nothing to say: the node looks
        self._unseen = 0

    def mark(self, ids: I64) -> None:
        """Rows were changed by somebody else than the optimizers: int64[n]."""
        self.says_significance = False
        with self._lock:
            self._fit()
            self.due.add(ids, np.zeros(len(ids), np.float32))

    def mark_all(self) -> None:
        """All rows are due."""
        self.mark(np.arange(len(self.weight), dtype=np.int64))

    def touch(self) -> None:
        """Rows of a table that is compared may have changed."""
        self._unseen = len(self.weight)

    def take(self, limit: int | None = None) -> tuple[I64, F32]:
        """Take due rows, at most `limit`: their numbers and what they weigh; `give_back` or `sent` is called next."""
        self.settle()
        with self._lock:
            self._fit()
            self._compare_some(limit is None)
            ids, weights = self.due.take(limit)
        if self.key_map is None:
            return ids, weights
        chosen = self.key_map.in_use(ids)
        return ids[chosen], weights[chosen]

    def live(self, ids: I64) -> I64:
        """Rows that have a key."""
        return ids if self.key_map is None else ids[self.key_map.in_use(ids)]

    def give_back_freed(self, keys: U64) -> None:
        """Keys that were to be deleted were not."""
        if self.key_map is not None:
            self.key_map.give_back(keys)

    def take_freed(self) -> U64:
        """uint64[n]: keys that are to be deleted."""
        return np.empty(0, np.uint64) if self.key_map is None else self.key_map.take_freed()

    def keys_of(self, ids: I64) -> U64:
        """uint64[n]: keys of rows."""
        return ids.view(np.uint64) if self.key_map is None else self.key_map.keys_of(ids)

    def rows_of(self, keys: U64) -> I64:
        """int64[n]: rows of keys, or numbers that are none."""
        return keys.view(np.int64) if self.key_map is None else self.key_map.find(keys)

    def give_back(self, ids: I64, weights: F32) -> None:
        """Rows that were taken were not sent."""
        with self._lock:
            self.due.add(ids, weights)

    def sent(self, ids: I64, rows: F32) -> None:
        """Rows that were taken are with the node: float32[n, dim]."""
        if self._known is not None:
            self._known.index_copy_(0, self._on_device(ids), torch.from_numpy(rows).to(self._known.device))

    def accept(self, ids: I64) -> None:
        """Rows as they are now count as published."""
        with self._lock:
            self.due.drop(ids)
        if self._known is not None:
            chosen = self._on_device(ids)
            self._known.index_copy_(0, chosen, self.weight.detach().index_select(0, chosen))

    def drop(self, ids: I64) -> None:
        """Nothing is due of rows any more."""
        self.settle()
        with self._lock:
            self.due.drop(ids)

    def forget(self) -> I64:
        """Nothing is due any more: int64[n], the rows of which something was."""
        ids, _ = self.take()
        return ids

    def rows(self, ids: I64) -> F32:
        """float32[n, dim]: copies of the rows as they are now."""
        weight = self.weight.detach()
        if not _is_plain(weight):
            chosen: F32 = weight.index_select(0, self._on_device(ids)).cpu().numpy()
            return chosen
        out = np.empty((len(ids), weight.shape[1]), np.float32)
        copy_rows(weight.numpy(), ids, out)
        return out

    def _compare_some(self, everything: bool) -> None:
        """Look for rows that changed; of a large table at a part."""
        if self._known is None or not self._unseen:
            return
        weight = self.weight.detach()
        rows = len(weight)
        chunk = rows if everything else max(1, COMPARE_BYTES_MAX // (weight.shape[1] * weight.element_size()))
        count = min(self._unseen, chunk)
        while count:
            begin = self._place % rows
            end = min(rows, begin + count)
            if _is_plain(weight):
                self.due.add_changed(weight.numpy(), self._known.numpy(), begin, end)
            else:
                bits = (weight[begin:end].view(torch.int32), self._known[begin:end].view(torch.int32))
                changed = (bits[0] != bits[1]).any(dim=1).nonzero().reshape(-1).cpu().numpy() + begin
                self.due.add(changed, np.zeros(len(changed), np.float32))
            self._place = end
            self._unseen -= end - begin
            count -= end - begin

    def _fit(self) -> None:
        """Have an entry for each row of a table that grew."""
        weight = self.weight
        if (rows := len(weight)) == self.due.rows:
            return
        self.due.grow(rows)
        if self._known is not None:  # no row is equal to what is no number
            new = self._known.new_full((rows - len(self._known), weight.shape[1]), float("nan"))
            self._known = torch.cat([self._known, new])

    def _on_device(self, ids: I64) -> Tensor:
        return torch.from_numpy(ids).to(self.weight.device)


def _is_local(optimizer: Optimizer, group: dict[str, Any], sparse: bool) -> bool:
    """Whether a step leaves rows alone that have no gradient."""
    kind = type(optimizer)
    if kind is torch.optim.SparseAdam:
        return sparse
    return _leaves_zero_gradients(kind) and not group.get("momentum") and not group.get("weight_decay")


def _leaves_zero_gradients(kind: type[Optimizer]) -> bool:
    return kind in LEAVES_ZERO_GRADIENTS or vars(kind).get("leaves_zero_gradients") is True


def _is_plain(weight: Tensor) -> bool:
    """Whether kernels can read it where it is."""
    return weight.device.type == "cpu" and weight.is_contiguous()


def _is_overwritten(entry: Entry) -> bool:
    """Whether the values may have been written to since they were set aside: in place, and not to make room for others."""
    _, values, _, gradient, version = entry
    return gradient._version != version and gradient._values().data_ptr() == values.data_ptr()  # noqa: SLF001
