"""The training of `server_trainer.py` by torch alone, in one process: its modules, its autograd and its own optimizers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ekko.train.optimizers import initializer_of
from sim_cluster.demo.learning import DIM
from tests.ekko.server_trainer import INITIALIZER, Job, batches, dense_model, dense_optimizer, events

Settings = Mapping[str, Any]


class ExactRoots(TorchDispatchMode):
    """Within it torch's roots are what IEEE 754 wants: those of float64, rounded once to float32.

    torch takes roots of float32 from MKL's vector library, whatever ATEN_CPU_CAPABILITY says. It promises an error below one
    unit of the last place, and not the nearest value: 0.7 % of roots are another one. Everything else is torch's own.
    """

    roots = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sqrt_.default and args[0].dtype == torch.float32:
            type(self).roots += 1
            return args[0].copy_(args[0].double().sqrt())
        return func(*args, **(kwargs or {}))


@dataclass
class Trained:
    """What torch alone comes to."""

    tables: dict[str, np.ndarray]
    dense: dict[str, Tensor]
    losses: list[float]


class Rows:
    """A table of one process, and torch's optimizer of it, which moves the rows that a batch has.

    `SGD` takes a gradient of the whole table; `Adagrad` and `SparseAdam` one of the rows of the batch; for momentum, which
    torch has for whole parameters only, each row is a parameter.
    """

    def __init__(self, name: str, count: int, settings: Settings) -> None:
        first = torch.from_numpy(initializer_of(INITIALIZER).rows(name, np.arange(count, dtype=np.uint64), DIM))
        self.table = nn.Embedding.from_pretrained(first, freeze=False)
        self._kind, rate = settings["name"], settings["lr"]
        self._apart = [nn.Parameter(row) for row in self.table.weight.data] if self._kind == "momentum" else []
        self._optimizer: torch.optim.Optimizer = {
            "sgd": lambda: torch.optim.SGD([self.table.weight], lr=rate),
            "momentum": lambda: torch.optim.SGD(self._apart, lr=rate, momentum=0.9, foreach=False),
            "adagrad": lambda: torch.optim.Adagrad([self.table.weight], lr=rate),
            "adam": lambda: torch.optim.SparseAdam([self.table.weight], lr=rate),
        }[self._kind]()

    def step(self, gradient: Tensor, ids: Tensor) -> None:
        """Move the rows `ids`, by float32[rows, DIM], the sum of all gradients of the batch."""
        weight = self.table.weight
        if self._kind == "sgd":
            weight.grad = gradient
        elif self._kind == "momentum":
            for row in ids.tolist():
                self._apart[row].grad = gradient[row].clone()
        else:
            some = ids[None], gradient[ids]
            weight.grad = torch.sparse_coo_tensor(*some, weight.shape, is_coalesced=True, check_invariants=False)
        self._optimizer.step()
        self._optimizer.zero_grad()


def alone(job: Job, *, by_worker: bool, optimizers: Mapping[str, Settings], exact_roots: bool = True) -> Trained:
    """The same training by torch in one process, on the same batches in the same order.

    Gradients of tables are `nn.Embedding`'s as they come: dense ones, which add up in the order of the batch. (Sparse ones are
    sorted first, and their sums differ in the last bit.)

    Args:
        job: what to train.
        by_worker: gradients of each worker's part of a batch are taken one after the other, and added up; else those of the
            whole batch at once.
        optimizers: of the rows of each table, as servers have them in their settings.
        exact_roots: optimizers of rows take `ExactRoots`. Dense parameters' never do: the workers' do not.
    """
    torch.set_num_threads(1)
    model = dense_model(job)
    tables = {name: Rows(name, count, optimizers[name]) for name, count in events().rows.items()}
    of_dense = dense_optimizer(model)
    losses = []
    for parts in zip(*(batches(job, worker) for worker in range(job.workers)), strict=True):
        of_dense.zero_grad()
        if not by_worker:
            parts = [tuple(_joined(some) for some in zip(*parts, strict=True))]  # type: ignore[assignment]
        sums: dict[str, Tensor] = {}
        for dense, ids, labels in parts:
            rows = torch.stack([tables[name].table(ids[name]) for name in ids], dim=1)
            loss = functional.binary_cross_entropy_with_logits(model(dense, embeddings=rows), labels)
            (loss / len(parts)).backward()
            losses.append(float(loss.detach()))
            for name, own in tables.items():
                gradient, own.table.weight.grad = own.table.weight.grad, None
                assert gradient is not None
                sums[name] = gradient if name not in sums else sums[name] + gradient
        of_dense.step()
        with ExactRoots() if exact_roots else torch.no_grad():
            for name, own in tables.items():
                own.step(sums[name], torch.cat([ids[name] for _, ids, _ in parts]).unique())
    return Trained({name: own.table.weight.detach().numpy() for name, own in tables.items()}, dict(model.state_dict()), losses)


def _joined(some: Iterable[Tensor | dict[str, Tensor]]) -> Tensor | dict[str, Tensor]:
    """The parts of all workers as one batch."""
    parts = list(some)
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # type: ignore[index, misc]
