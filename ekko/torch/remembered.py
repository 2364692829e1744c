"""What an optimizer remembers of a table's rows: moments, sums, momentum, averages; forgotten, or taken to a larger table."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def forget_rows(optimizer: Optimizer, weight: nn.Parameter, ids: Tensor) -> None:
    """Have the optimizer's memory of some rows as it was before their first step; that of all others stays.

    Whatever it keeps with an entry for each row: the moments of Adam and SparseAdam, the sums of Adagrad, momentum, averages.
    """
    group = next((group for group in optimizer.param_groups if any(value is weight for value in group["params"])), None)
    if group is None:
        return
    for name, kept in optimizer.state.get(weight, {}).items():
        if not isinstance(kept, Tensor) or not kept.ndim or kept.shape[0] != weight.shape[0]:
            continue  # how many steps there were, as a rule
        if kept.is_sparse:  # the momentum of SGD
            optimizer.state[weight][name] = _without(kept, ids)
        else:
            kept.index_fill_(0, ids, begins_with(group, name))


def begins_with(group: Mapping[str, Any], name: str) -> float:
    """What an optimizer has in a row's entry of its memory `name` before the row's first step."""
    return float(group.get("initial_accumulator_value", 0)) if name == "sum" else 0.0


def _without(sparse: Tensor, ids: Tensor) -> Tensor:
    sparse = sparse.coalesce()
    kept = ~torch.isin(sparse.indices()[0], ids)
    return torch.sparse_coo_tensor(sparse.indices()[:, kept], sparse.values()[kept], sparse.shape, check_invariants=False)


def padded(value: Tensor, rows: int, fill: float) -> Tensor:
    """The same with more rows."""
    shape = (rows, *value.shape[1:])
    if value.is_sparse:
        parts = value.coalesce()
        return torch.sparse_coo_tensor(parts.indices(), parts.values(), shape, check_invariants=False, is_coalesced=True)
    return torch.cat([value, value.new_full((rows - len(value), *shape[1:]), fill)])


def replace_weight(optimizer: Optimizer, weight: nn.Parameter, grown: nn.Parameter) -> None:
    """Have an optimizer train a larger weight in place of one, and remember of its rows what it did."""
    for group in optimizer.param_groups:
        for place, value in enumerate(group["params"]):
            if value is weight:
                group["params"][place] = grown
                state = optimizer.state.pop(weight, None)
                if state is not None:
                    optimizer.state[grown] = {
                        name: padded(kept, len(grown), begins_with(group, name)) if _by_row(kept, weight) else kept
                        for name, kept in state.items()
                    }


def _by_row(kept: object, weight: Tensor) -> bool:
    return isinstance(kept, Tensor) and kept.ndim > 0 and kept.shape[0] == weight.shape[0]
