"""Tables of a model: found under the names that users know, and checked.

Wrappers put prefixes in front of names: `torch.compile` and `DistributedDataParallel`. A module is found under the name that it
has without them, and under the one with them, too.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ekko.errors import ModelError

Table = nn.Embedding | nn.EmbeddingBag
_COMPILED: Final = "_orig_mod"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without `torch.compile` and without wrappers for several devices or processes."""
    while True:
        inner = getattr(model, _COMPILED, None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def found_tables(model: nn.Module, tables: Mapping[str, str], known: Mapping[str, int]) -> dict[str, Table]:
    """Table -> the module that holds it.

    Args:
        model: the model.
        tables: module name -> table. Several modules may share one weight and one table.
        known: tables of the publisher, with their dims.

    Raises:
        ModelError: no such module or table, not a table, another width, or two weights for one table or the other way round.
    """
    inner = unwrapped(model)
    modules = {name: unwrapped(module) for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in list(modules.items()) + list(inner.named_modules(remove_duplicate=False)):
        modules.setdefault(".".join(part for part in name.split(".") if part != _COMPILED), unwrapped(module))
    found: dict[str, Table] = {}
    names: dict[str, str] = {}
    for name, table in tables.items():
        module = _table_module(name, modules)
        if table not in known:
            raise ModelError(f"unknown table {table!r}: the publisher has {_listed(known)}; add it with Publisher(tables=...)")
        if module.weight.shape[1] != known[table]:
            raise ModelError(f"module {name!r} has rows of {module.weight.shape[1]} and table {table!r} has dim {known[table]}")
        if table in found and found[table].weight is not module.weight:
            raise ModelError(f"table {table!r} is named twice: give each module a table of its own")
        other = next((of for of, one in found.items() if one.weight is module.weight and of != table), None)
        if other is not None:
            raise ModelError(
                f"modules {names[other]!r} and {name!r} share one weight, and are named with tables {other!r} and {table!r}: "
                "name one table for both"
            )
        found.setdefault(table, module)
        names.setdefault(table, name)
    return found


def renormalising(model: nn.Module, weight: Tensor) -> list[Table]:
    """Modules whose forward passes change a weight: those that have it and `max_norm`, whatever their names."""
    tables = (module for module in model.modules() if isinstance(module, Table))
    return [module for module in tables if module.max_norm is not None and module.weight is weight]


def optimizers_of(weight: nn.Parameter, optimizers: Iterable[Optimizer], table: str) -> list[Optimizer]:
    """Those that train a weight.

    Raises:
        ModelError: none does.
    """
    found = [one for one in optimizers if any(value is weight for group in one.param_groups for value in group["params"])]
    if not found:
        raise ModelError(
            f"the optimizer does not have the weight of table {table!r}: pass it model.parameters(), or give `track` a list of "
            "all optimizers"
        )
    return found


def _table_module(name: str, modules: Mapping[str, nn.Module]) -> Table:
    if name not in modules:
        embeddings = [
            found for found, module in modules.items() if isinstance(module, Table) and _COMPILED not in found.split(".")
        ]
        raise ModelError(f"the model has no module {name!r}: its nn.Embedding modules are {_listed(embeddings)}")
    module = modules[name]
    if not isinstance(module, Table):
        raise ModelError(f"module {name!r} is a {type(module).__name__}: only nn.Embedding and nn.EmbeddingBag can be tracked")
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise ModelError(f"the weight of module {name!r} is computed from other parameters: remove the parametrization")
    if weight.dtype != torch.float32:
        raise ModelError(f"module {name!r} has dtype {weight.dtype}: tables hold torch.float32; for speed use torch.autocast")
    return module


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
