"""A Wide & Deep model that has grown goes on from the old one.

Tables get rows for new ids, the wide table gets more room, new features and crosses are looked at. Trained from nothing, the
larger model would be worse than the old one for long; so it begins as the old one, as in the paper (Cheng et al., 2016):
every old weight has its place in the new model, and what is new begins without a say, so that the first logits are the old
model's. With the optimisers' memory, which is taken along, so are the first steps: an Adagrad that begins anew moves every row
that it meets by a whole learning rate.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ekko.zoo.wide_deep import WideDeep, WideDeepOptions

# Copies all of a tensor of the old model to its places in a tensor of the new one.
Placing: TypeAlias = Callable[[Tensor, Tensor], None]

_FIRST_LAYER = "deep.0.weight"


@torch.no_grad()
def warm_start(model: WideDeep, old: WideDeep, optimizers: Iterable[tuple[Optimizer, Optimizer]] = ()) -> None:
    """Put the weights of `old` into `model`, in place.

    Rows that `old` does not have stay as they are; of features that it does not have, the MLP makes nothing yet.

    Args:
        model: of the same `dense`, `dim` and `hidden`; with all features and crosses of `old`, as many rows of each table or
            more, and `cross_rows` times a whole number.
        old: is not changed.
        optimizers: of some or all parameters: the one that will train them in `model`, and the one, of the same kind, that has
            trained them in `old`.

    Raises:
        ValueError: where something of `old` has no place in `model`; nothing is changed.
    """
    pairs = tuple(optimizers)
    _check(model.options, old.options)
    for one, other in pairs:
        if type(one) is not type(other):
            raise ValueError(f"optimizers are a {type(one).__name__} and a {type(other).__name__}: expected two of a kind")
    new_weights = dict(model.named_parameters())
    for name, source in old.named_parameters():
        target, place = new_weights[name], _placing(name, model.options, old.options)
        if name == _FIRST_LAYER:
            target.zero_()
        place(target, source)
        for one, other in pairs:
            if _trains(one, target) and _trains(other, source):
                _grow_state(one, target, other, source, place)


def _check(new: WideDeepOptions, old: WideDeepOptions) -> None:
    for what in ("dense", "dim"):
        if getattr(new, what) != getattr(old, what):
            raise ValueError(f"{what} is {getattr(new, what)}, and was {getattr(old, what)}: expected the same")
    if tuple(new.hidden) != tuple(old.hidden):
        raise ValueError(f"hidden is {tuple(new.hidden)}, and was {tuple(old.hidden)}: expected the same")
    for name, rows in old.rows.items():
        if new.rows.get(name, 0) < rows:
            raise ValueError(f"table {name!r} has {new.rows.get(name, 0)} rows, and had {rows}: expected as many or more")
    missing = [cross for cross in old.crosses if cross not in new.crosses]
    if missing:
        raise ValueError(f"crosses has no {missing[0]} any more: expected all that the old model has")
    if new.cross_rows % old.cross_rows:
        raise ValueError(f"cross_rows is {new.cross_rows}, and was {old.cross_rows}: expected a whole number of times as many")


def _placing(name: str, new: WideDeepOptions, old: WideDeepOptions) -> Placing:
    if name == "wide.weight":
        return partial(_place_crosses, new, old)
    if name == _FIRST_LAYER:
        return partial(_place_inputs, new, old)
    return _place_rows  # of tables; other layers are as large as they were


def _place_rows(target: Tensor, source: Tensor) -> None:
    target[: len(source)] = source


def _place_crosses(new: WideDeepOptions, old: WideDeepOptions, target: Tensor, source: Tensor) -> None:
    """A hash that now falls on one of several rows fell on the same one before: each of them gets what it had."""
    parts = target.view(len(new.crosses), -1, old.cross_rows, source.shape[1])
    for place, cross in enumerate(old.crosses):
        parts[new.crosses.index(cross)] = source.view(len(old.crosses), old.cross_rows, source.shape[1])[place]


def _place_inputs(new: WideDeepOptions, old: WideDeepOptions, target: Tensor, source: Tensor) -> None:
    """Columns of the first layer: dense features, then a block for each embedding."""
    dense, dim = new.dense, new.dim
    target[:, :dense] = source[:, :dense]
    names = list(new.rows)
    for place, name in enumerate(old.rows):
        begin = dense + names.index(name) * dim
        target[:, begin : begin + dim] = source[:, dense + place * dim : dense + (place + 1) * dim]


def _trains(optimizer: Optimizer, weight: Tensor) -> bool:
    return any(value is weight for group in optimizer.param_groups for value in group["params"])


def _grow_state(one: Optimizer, target: Tensor, other: Optimizer, source: Tensor, place: Placing) -> None:
    """What an optimizer keeps with each weight goes where the weight goes; the rest (numbers of steps) is copied."""
    state = one.state[target]
    for key, kept in other.state[source].items():
        if isinstance(kept, Tensor) and kept.shape == source.shape:
            place(state.setdefault(key, torch.zeros_like(target)), kept)
        else:
            state[key] = kept.clone() if isinstance(kept, Tensor) else kept
