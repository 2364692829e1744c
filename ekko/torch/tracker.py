"""`track`: publish the rows that a training step changed, and load what a rollback took back."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Final, Literal, Protocol, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ekko.errors import ModelError
from ekko.restored import Restored
from ekko.torch.dense import DenseParameters
from ekko.torch.reloading import Reloaded, Rows, StateReader, load_dense, load_rows

# `publish_all` cuts a table into steps of about this size: large enough that the cost of a step does not count, small enough
# that the node stays responsive to other publishers meanwhile.
PUBLISH_ALL_BYTES_MAX: Final = 4 << 20
# Where a row's gradient is zero these leave the row as it is; Adam and its relatives move it by what they remember of it.
LEAVES_ZERO_GRADIENTS: Final = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop)
Significance = Literal["gradient", "change"]


class PublishStep(Protocol):
    """What `track` asks of a step; `ekko.train.publisher.Step` offers it."""

    @property
    def stamp(self) -> int: ...

    def publish(
        self, table: str, keys: NDArray[np.uint64], rows: NDArray[np.float32], significance: NDArray[np.float32] | None = None
    ) -> None: ...

    def publish_dense(self, name: str, array: NDArray[np.float32]) -> None: ...


class StepPublisher(Protocol):
    """What `track` asks of a publisher; `ekko.Publisher` offers it."""

    @property
    def tables(self) -> Mapping[str, int]: ...

    def step(self) -> AbstractContextManager[PublishStep]: ...


def track(
    model: nn.Module,
    optimizer: Optimizer,
    publisher: StepPublisher,
    tables: Mapping[str, str],
    dense_every: int | str | None = None,
    significance: Significance = "gradient",
    reader: StateReader | None = None,
) -> "Tracker":
    """Publish, after each `optimizer.step()`, the embedding rows that it changed.

    A row's significance is the L1 norm of its gradient, or what the node sees of it. All tables go in one batch under one
    stamp. A step that could not be published raises out of `optimizer.step()`, after the parameters have changed; its rows go
    with the next one that can. Not so once the model was rolled back: then the next step loads what was restored into the
    tables, and is dropped with all that is not published yet (`Tracker.reload`). With `Publisher(admission=...)`, rows go out
    from the step on that touches their key for the n-th time.

    Args:
        model: holds the tables; is trained by `optimizer`.
        optimizer: changes only rows with a gradient: no weight decay and no momentum on the tables (SparseAdam, Adagrad,
            RMSprop and plain SGD are fine; of dense gradients the last three).
        publisher: an `ekko.Publisher` of a model that has the tables.
        tables: module name (as in `model.named_modules()`) of an `nn.Embedding` -> table it is published to; the row index is
            the key. With `sparse=False` the rows of a step are those whose gradient is not zero.
        dense_every: publish all other parameters too, under their parameter names, and floating-point buffers that a state dict
            has, with every this many steps (8), or with a step at most so often ("2s"); None: never. They go in one batch with
            the rows of their step, and of each what changed since they went last.
        significance: "gradient", or "change": how far a row moves is what counts, as the node sees it.
        reader: of the same model on this machine, to read dense parameters after a rollback, and rows that steps changed
            which it had refused; None: these stay as they are.

    Returns:
        The handle; `remove()` it, or use it in a `with` block, to stop.

    Raises:
        ModelError: no such module or table, not an `nn.Embedding`, another width, or an optimizer that changes rows without a
            gradient. Nothing is tracked.
    """
    return Tracker(model, optimizer, publisher, tables, dense_every, significance, reader)


class Tracker:
    """Publishes a model's changes; made by `track`. Used by the thread that trains."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        publisher: StepPublisher,
        tables: Mapping[str, str],
        dense_every: int | str | None = None,
        significance: Significance = "gradient",
        reader: StateReader | None = None,
    ) -> None:
        if significance not in get_args(Significance):
            raise ModelError(f"significance is {significance!r}: expected 'gradient' or 'change'")
        self._publisher = publisher
        self._optimizer = optimizer
        self._says_significance = significance == "gradient"
        self._reader = reader
        self._weights = _tracked_weights(model, optimizer, publisher, tables)
        self._dense = DenseParameters(model, self._weights.values(), dense_every, time.monotonic())
        self._touched: dict[str, _Touched] = {}
        self._stamp = 0
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def stamp(self) -> int:
        """The stamp of the last step published; 0: none yet."""
        return self._stamp

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names under which the dense parameters are published."""
        return self._dense.names

    def publish_all(self) -> int:
        """Publish every row of every table and all dense parameters, as a first state or after loading a checkpoint.

        Returns:
            The last stamp: once it is visible somewhere, so is the rest.
        """
        for table, weight in self._weights.items():
            chunk = max(1, PUBLISH_ALL_BYTES_MAX // (weight.shape[1] * weight.element_size()))
            for start in range(0, weight.shape[0], chunk):
                keys = np.arange(start, min(start + chunk, weight.shape[0]), dtype=np.uint64)
                with self._publisher.step() as step:
                    step.publish(table, keys, weight.detach()[start : start + chunk].cpu().numpy())
                self._stamp = step.stamp
            self._touched.pop(table, None)
        return self.publish_dense()

    def publish_dense(self) -> int:
        """Publish all dense parameters now; returns the stamp."""
        self._dense.demand()
        return self._publish()

    def reload(self) -> Reloaded:
        """Load what rollbacks restored since this was last called, and forget what the optimizer remembers of it.

        What is not published yet is dropped, of rows that were not restored, too: it was worked out from a model that is not
        there any more. Where there is a reader, such rows and all dense parameters become what the node has. Called by itself
        where a step is refused since the model was rolled back, or had to wait for that; call it to go on from the restored
        rows before the next step.
        """
        restored: tuple[Restored, ...] = getattr(
            self._publisher, "restored", tuple
        )()  # a publisher of yours may know no rollbacks
        if not restored:
            return Reloaded({})
        due, self._touched = self._touched, {}
        self._dense.drop()
        tensors = dict.fromkeys(name for one in restored for name in one.tensors if name in self._dense.names)
        loaded: dict[str, int] = {}
        for one in restored:
            if one.table in self._weights:
                ids = load_rows(self._optimizer, self._weights[one.table], one)
                loaded[one.table] = loaded.get(one.table, 0) + len(ids)
                if (held := due.get(one.table)) is not None:
                    due[one.table] = held.without(ids)
        read = tuple(name for name in tensors if self._reload_dense(name))
        if self._dense.periodic:
            with suppress(ModelError):  # none was published yet
                read += tuple(name for name in self._dense.names if name not in tensors and self._reload_dense(name))
        dropped = {table: len(held.ids) for table, held in due.items() if len(held.ids)}
        for table in dropped:
            self._reload_rows(table, due[table].ids)
        return Reloaded(loaded, read, tuple(name for name in tensors if name not in read), dropped)

    def _reload_rows(self, table: str, ids: Tensor) -> None:
        """Put what the node has in place of rows that no rollback wrote; those that it does not have stay as they are."""
        if self._reader is None:
            return
        keys = _keys(ids)
        rows, stamps = self._reader.lookup(table, keys, stamps=True)
        load_rows(self._optimizer, self._weights[table], Rows(keys[stamps > 0], rows[stamps > 0]))

    def _reload_dense(self, name: str) -> bool:
        if self._reader is None:
            return False
        load_dense(self._optimizer, self._dense.tensor(name), self._reader.dense(name))
        return True

    def remove(self) -> None:
        """Stop tracking. What was published stays published."""
        self._hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _after_step(self, *_: object) -> None:
        for table, weight in self._weights.items():
            touched = _touched_rows(table, weight, self._optimizer)
            if touched is not None:
                held = self._touched.get(table)
                self._touched[table] = touched if held is None else held.merged(touched)
        self._dense.stepped(time.monotonic())
        self._publish()

    def _publish(self) -> int:
        """Publish what is due, after what was restored is loaded."""
        try:
            stamp = self._publish_due()
        except ModelError:
            if self.reload() == Reloaded({}):
                raise  # it is refused for another reason, or the rollback is not over
            stamp = self._publish_due()
        if getattr(self._publisher, "has_restored", False):  # it waited for the end of one
            self.reload()
        return stamp

    def _publish_due(self) -> int:
        """Nothing is forgotten before the node has stored it."""
        if not self._touched and not self._dense.due:
            return self._stamp
        version = self._dense.take() if self._dense.due else None
        try:
            with self._publisher.step() as step:
                for table, touched in self._touched.items():
                    rows = _rows(self._weights[table], touched.ids)
                    weights = touched.significance.cpu().numpy() if self._says_significance else None
                    step.publish(table, _keys(touched.ids), rows, weights)
                if version is not None:
                    self._dense.add_to(step, version)
        except BaseException:
            if version is not None:
                self._dense.failed()
            raise
        if version is not None:
            self._dense.published(version, getattr(self._publisher, "openings", 0))  # one of yours may not count them
        self._stamp = step.stamp
        self._touched = {}
        return self._stamp


class _Touched:
    """Rows of one table that changed and are not published yet."""

    __slots__ = ("ids", "significance")

    def __init__(self, ids: Tensor, significance: Tensor) -> None:
        self.ids = ids  # int64[n], unique
        self.significance = significance  # float32[n]

    def without(self, ids: Tensor) -> "_Touched":
        """Those of other rows."""
        left = ~torch.isin(self.ids, ids)
        return _Touched(self.ids[left], self.significance[left])

    def merged(self, newer: "_Touched") -> "_Touched":
        """Both, each row once; what a row moved by adds up."""
        ids, place = torch.unique(torch.cat([self.ids, newer.ids]), return_inverse=True)
        total = torch.zeros(len(ids), device=ids.device)
        return _Touched(ids, total.index_add_(0, place, torch.cat([self.significance, newer.significance])))


def _touched_rows(table: str, weight: nn.Parameter, optimizer: Optimizer) -> _Touched | None:
    """The rows that this step's gradient touches.

    Raises:
        ModelError: the gradient is dense after all, and the optimizer then changes rows without one, too.
    """
    gradient = weight.grad
    if gradient is None:
        return None
    if not gradient.is_sparse:
        if not isinstance(optimizer, LEAVES_ZERO_GRADIENTS):
            raise ModelError(
                f"the gradient of table {table!r} is dense: its weight is also used outside of nn.Embedding(sparse=True), and "
                f"{type(optimizer).__name__} changes rows that have no gradient: use Adagrad, RMSprop or SGD on it"
            )
        norms = gradient.detach().abs().sum(dim=1)
        ids = norms.nonzero().reshape(-1)
        return _Touched(ids, norms[ids]) if len(ids) else None
    gradient = gradient.detach().coalesce()
    ids, values = gradient.indices()[0], gradient.values()
    return _Touched(ids, values.abs().sum(dim=1)) if len(ids) else None


def _keys(ids: Tensor) -> NDArray[np.uint64]:
    """uint64[n]: row indices are keys."""
    return ids.cpu().numpy().view(np.uint64)


def _rows(weight: nn.Parameter, ids: Tensor) -> NDArray[np.float32]:
    """float32[n, dim] copies of the rows `ids`, in CPU memory."""
    return np.asarray(weight.detach().index_select(0, ids).cpu().numpy())


def _tracked_weights(
    model: nn.Module, optimizer: Optimizer, publisher: StepPublisher, tables: Mapping[str, str]
) -> dict[str, nn.Parameter]:
    """Table -> its weight, checked."""
    if not tables:
        raise ModelError("tables is empty: name at least one nn.Embedding and the table it is published to")
    modules = dict(model.named_modules())
    known = publisher.tables
    weights: dict[str, nn.Parameter] = {}
    for name, table in tables.items():
        weight = _table_weight(name, modules)
        if table not in known:
            raise ModelError(f"unknown table {table!r}: the publisher has {_listed(known)}; add it with Publisher(tables=...)")
        if weight.shape[1] != known[table]:
            raise ModelError(f"module {name!r} has rows of {weight.shape[1]} and table {table!r} has dim {known[table]}")
        if table in weights:
            raise ModelError(f"table {table!r} is named twice: give each module a table of its own")
        _check_optimizer(name, weight, optimizer, sparse=getattr(modules[name], "sparse", False))
        weights[table] = weight
    return weights


def _table_weight(name: str, modules: Mapping[str, nn.Module]) -> nn.Parameter:
    if name not in modules:
        embeddings = [found for found, module in modules.items() if isinstance(module, nn.Embedding)]
        raise ModelError(f"the model has no module {name!r}: its nn.Embedding modules are {_listed(embeddings)}")
    module = modules[name]
    if not isinstance(module, nn.Embedding):
        raise ModelError(f"module {name!r} is a {type(module).__name__}: only nn.Embedding can be tracked in this version")
    if module.max_norm is not None:
        raise ModelError(f"module {name!r} has max_norm, which changes rows outside of optimizer.step(): track it without")
    if module.weight.dtype != torch.float32:
        raise ModelError(f"module {name!r} has dtype {module.weight.dtype}: tables hold torch.float32")
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise ModelError(f"the weight of module {name!r} is computed from other parameters: remove the parametrization")
    return weight


def _check_optimizer(name: str, weight: nn.Parameter, optimizer: Optimizer, *, sparse: bool) -> None:
    """Refuse an optimizer that does not train the table, or that changes rows without a gradient."""
    if not sparse and not isinstance(optimizer, LEAVES_ZERO_GRADIENTS):
        raise ModelError(
            f"module {name!r} has dense gradients, with which {type(optimizer).__name__} also changes rows that have none: "
            "make it nn.Embedding(..., sparse=True), or use Adagrad, RMSprop or SGD on it"
        )
    group = next((group for group in optimizer.param_groups if any(value is weight for value in group["params"])), None)
    if group is None:
        raise ModelError(f"the optimizer does not have the weight of module {name!r}: pass it model.parameters()")
    for setting in ("weight_decay", "momentum"):
        if group.get(setting, 0) != 0:
            raise ModelError(
                f"the optimizer has {setting} = {group[setting]} on module {name!r}, which changes rows that have no gradient: "
                f"put its weight into a parameter group with {setting} = 0"
            )


def _listed(names: Iterator[str] | Mapping[str, object] | list[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
