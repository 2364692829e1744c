"""Tables that grow: any keys, numbered as rows of an `nn.Embedding` or `nn.EmbeddingBag` as they come.

    keys = ekko.torch.KeyMap(model.item_embedding, optimizer)
    tracker = ekko.torch.track(model, optimizer, publisher, tables={"item_embedding": "item"}, keys={"item_embedding": keys})
    rows = keys.rows(batch["item"])        # int64 tensor of any keys -> rows of the module, for its forward pass
    keys.free(gone)                        # these are deleted everywhere with the next batch, and their rows may be used again

What is published has the keys, not the rows. When rows run out the module gets a larger weight, another `nn.Parameter`, which
takes the place of the old one in the optimizers, with what they remember of it. Nobody else may hold the weight: a table that
shares its weight with another module cannot grow, nor can one of a `DistributedDataParallel` model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ekko.errors import ModelError
from ekko.store.kernels import numbering
from ekko.torch.modules import Table
from ekko.torch.remembered import forget_rows, padded, replace_weight
from ekko.torch.sending import Gate

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

GROWTH: Final = 2  # times as many rows, so that growing takes a constant part of each new key's time


class KeyMap:
    """Which row of a module each key has. Used by the thread that trains.

    Args:
        module: its weight is replaced as it grows; it has no padding row and no `max_norm`.
        optimizer: that trains it, or all that do.
        initialise: writes what new rows begin with into float32[n, dim]; None: as `nn.Embedding` does, normal with variance 1.
        rows_max: the table grows no further.

    Raises:
        ModelError: the module cannot grow.
    """

    def __init__(
        self,
        module: Table,
        optimizer: Optimizer | Sequence[Optimizer],
        initialise: Callable[[Tensor], object] | None = None,
        rows_max: int = 1 << 31,
    ) -> None:
        if not isinstance(module, Table):
            raise ModelError(f"a KeyMap is of an nn.Embedding or nn.EmbeddingBag, not of a {type(module).__name__}")
        if module.padding_idx is not None or module.max_norm is not None:
            raise ModelError("a module whose rows are numbered by a KeyMap has no padding_idx and no max_norm: make it without")
        self.module = module
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._initialise = initialise or nn.init.normal_
        self._rows_max = rows_max
        self._gate: Gate | None = None
        self._forget: Callable[[I64], object] = len  # told rows that have no key any more
        self._freed: dict[int, None] = {}  # keys to be deleted
        self._begin(np.empty(0, np.uint64))

    def __len__(self) -> int:
        """How many keys there are."""
        return int(self._counts[1] - self._counts[0])

    @property
    def keys(self) -> U64:
        """uint64[n]: all of them, in no order."""
        return self._keys[self._used()]

    def rows(self, keys: Tensor) -> Tensor:
        """The rows of keys; those that are new get one each, and the table grows if need be.

        Args:
            keys: whole numbers of any shape; the bits of a negative one are a key from 2^63 on.

        Returns:
            int64, of the same shape and on the same device.

        Raises:
            ModelError: there would be more than `rows_max`.
        """
        wanted = _bits(keys)
        numbers, added = np.empty(len(wanted), np.int64), np.empty(len(wanted), np.int64)
        with self._apart():
            self._counts[2] = done = 0
            while True:
                rest = added[int(self._counts[2]) :]
                before, self._counts[2] = int(self._counts[2]), 0
                done += numbering.find_or_add(
                    wanted[done:], self._slots, self._keys, self._free, self._counts, numbers[done:], rest
                )
                self._counts[2] += before
                if done == len(wanted):
                    break
                self._grow(len(self._keys) + len(wanted) - done)
            fresh = added[: int(self._counts[2])]
            if len(fresh):
                self._fresh(fresh)
        return torch.from_numpy(numbers).reshape(keys.shape).to(keys.device)

    def find(self, keys: U64) -> I64:
        """int64[n]: the rows of keys of uint64[n]; -1 where a key has none."""
        numbers = np.empty(len(keys), np.int64)
        numbering.find(np.ascontiguousarray(keys), self._slots, self._keys, numbers)
        return numbers

    def free(self, keys: Tensor) -> int:
        """Forget keys: they are deleted everywhere with the next batch. Returns how many there were."""
        wanted = _bits(keys)
        removed = np.empty(len(wanted), np.int64)
        with self._apart():
            count = numbering.remove(wanted, self._slots, self._keys, self._free, self._counts, removed)
            rows = removed[:count]
            self._freed |= dict.fromkeys(self._keys[rows].tolist())
            self._forget(rows)
        return int(count)

    def keys_of(self, rows: I64) -> U64:
        """uint64[n]: the keys of rows that have one."""
        return self._keys[rows]

    def in_use(self, rows: I64) -> NDArray[np.bool_]:
        """bool[n]: whether rows have a key."""
        found: NDArray[np.bool_] = self.find(self._keys[rows]) == rows
        return found

    @property
    def has_freed(self) -> bool:
        """Whether keys are to be deleted."""
        return bool(self._freed)

    def take_freed(self) -> U64:
        """uint64[n]: keys to be deleted, those that are here again, too: they begin anew. Called between two steps."""
        freed, self._freed = np.fromiter(self._freed, np.uint64, len(self._freed)), {}
        return freed

    def give_back(self, keys: U64) -> None:
        """Keys that were to be deleted were not."""
        self._freed |= dict.fromkeys(keys.tolist())

    def attach(self, gate: Gate, forget: Callable[[I64], object]) -> None:
        """From now on changes are kept apart from copies, and `forget` is told rows that have no key any more."""
        self._gate, self._forget = gate, forget

    def state_dict(self) -> dict[str, Any]:
        """Rows and keys, for a checkpoint: beside the model's and the optimizers'."""
        used = self._used()
        return {"rows": torch.from_numpy(used), "keys": torch.from_numpy(self._keys[used].view(np.int64))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; the module has its weight of then already."""
        rows, keys = state["rows"].numpy(), state["keys"].numpy().view(np.uint64)
        if len(rows) and int(rows.max()) >= len(self._weight):
            raise ModelError(
                f"the key map has row {int(rows.max())}, and the table {len(self._weight)} rows: load the model's state first, "
                "into a module of as many rows"
            )
        with self._apart():
            self._begin(keys, rows)

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _used(self) -> I64:
        """Rows that have a key, ascending."""
        free = np.zeros(len(self._keys), np.bool_)
        free[self._free[: int(self._counts[0])]] = True
        return np.flatnonzero(~free[: int(self._counts[1])])

    def _begin(self, keys: U64, rows: I64 | None = None) -> None:
        capacity = len(self._weight)
        used = np.arange(len(keys), dtype=np.int64) if rows is None else rows
        next_row = int(used.max()) + 1 if len(used) else 0
        self._keys = np.zeros(capacity, np.uint64)
        self._keys[used] = keys
        self._free = np.empty(capacity, np.int64)
        unused = np.setdiff1d(np.arange(next_row, dtype=np.int64), used)
        self._free[: len(unused)] = unused
        self._counts = np.array([len(unused), next_row, 0], np.int64)
        self._index(used)

    def _index(self, used: I64) -> None:
        self._slots = np.full(1 << max(3, 2 * len(self._keys) - 1).bit_length(), numbering.EMPTY, np.int64)
        numbering.fill(used, self._slots, self._keys)

    def _fresh(self, rows: I64) -> None:
        """Begin new rows, which may have had another key."""
        weight = self._weight
        ids = torch.from_numpy(rows).to(weight.device)
        with torch.no_grad():
            begins = torch.empty(len(rows), weight.shape[1], device=weight.device, dtype=weight.dtype)
            self._initialise(begins)
            weight.index_copy_(0, ids, begins)
            for optimizer in self._optimizers:
                forget_rows(optimizer, weight, ids)

    def _grow(self, needed: int) -> None:
        """Have room for so many rows at least."""
        before = len(self._keys)
        rows = min(max(needed, GROWTH * before), self._rows_max)
        if rows < needed and rows == before:
            raise ModelError(f"a table of {before} rows is full: free keys, or raise rows_max, which is {self._rows_max}")
        used = self._used()
        grown = nn.Parameter(padded(self._weight.detach(), rows, 0.0), self._weight.requires_grad)
        grown.grad = None if self._weight.grad is None else padded(self._weight.grad, rows, 0.0)
        for optimizer in self._optimizers:
            replace_weight(optimizer, self._weight, grown)
        self.module.weight = grown
        self.module.num_embeddings = rows
        self._keys = np.concatenate([self._keys, np.zeros(rows - before, np.uint64)])
        self._free = np.concatenate([self._free, np.empty(rows - before, np.int64)])
        self._index(used)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        entered = self._gate is not None and self._gate.enter()
        try:
            yield
        finally:
            if entered and self._gate is not None:
                self._gate.leave()


def key_maps(keys: Mapping[str, KeyMap], tables: Mapping[str, str], found: Mapping[str, Table]) -> dict[str, KeyMap]:
    """Table -> its key map, checked.

    Args:
        keys: module name -> key map.
        tables: module name -> table.
        found: table -> module.

    Raises:
        ModelError: a module that is not tracked, or not the one of its key map.
    """
    for name, one in keys.items():
        if name not in tables:
            raise ModelError(f"keys names module {name!r}, which tables does not: tables names {', '.join(map(repr, tables))}")
        if one.module is not found[tables[name]]:
            raise ModelError(f"the KeyMap of module {name!r} is of another module: make it of this one")
    return {tables[name]: one for name, one in keys.items()}


def _bits(keys: Tensor) -> U64:
    """uint64[n]."""
    if keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool:
        raise ModelError(f"keys have dtype {keys.dtype}: expected whole numbers; use .long()")
    return keys.detach().reshape(-1).to("cpu", torch.int64).contiguous().numpy().view(np.uint64)
