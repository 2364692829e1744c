"""What a request must be like before the machine hears of it: known tables, rows that fit, keys of the partitions it names."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from ekko.store.kernels.checks import all_finite
from ekko.train.server import wire as w
from ekko.train.server.schema import TrainedModel

# How far a worker's clock may be ahead of ours. Lives are recorded for good: later ones have to be larger.
LIFE_AHEAD_US_MAX: Final = 24 * 3_600 * 1_000_000


def refusal_of_hello(hello: w.Hello, now_us: int) -> w.Failed | None:
    """Why a life cannot begin; None: it can. `now_us`: Unix microseconds."""
    if hello.life > now_us + LIFE_AHEAD_US_MAX:
        reason = f"the life {hello.life} of worker {hello.worker} is in the future: set the worker's clock, or this machine's"
        return w.Failed(w.REFUSED, reason)
    return None


def refusal_of_pull(model: TrainedModel, pull: w.Pull) -> w.Failed | None:
    """Why a pull can never be answered; None: it can."""
    tables = {name: (keys, None) for name, keys in pull.tables.items()}
    if (refusal := _refusal(model, pull.partitions, tables)) is not None:
        return refusal
    if (size := answer_bytes(model, pull)) > w.MESSAGE_BYTES_MAX - w.HEADER_BYTES_MAX:  # before memory is taken for it
        limit = w.MESSAGE_BYTES_MAX - w.HEADER_BYTES_MAX
        return w.Failed(w.REFUSED, f"a pull of {size} bytes: an answer may have {limit}; ask for fewer rows")
    return None


def answer_bytes(model: TrainedModel, pull: w.Pull) -> int:
    """What the rows of a pull take; its tables are known."""
    return sum(4 * len(keys) * model.tables[name].dim for name, keys in pull.tables.items())


def refusal_of_push(model: TrainedModel, push: w.Push) -> w.Failed | None:
    """Why a push can never be taken; None: it can."""
    return _refusal(model, push.partitions, push.tables)


def _refusal(
    model: TrainedModel, partitions: tuple[int, ...], tables: Mapping[str, tuple[w.U64, w.F32 | None]]
) -> w.Failed | None:
    settings = model.settings
    if partitions[-1] >= settings.partitions:
        has = f"model {model.name!r} has {settings.partitions} partitions"
        return w.Failed(w.SETTINGS, f"{has}, and partition {partitions[-1]} is none of them")
    named = np.zeros(settings.partitions, np.bool_)
    named[list(partitions)] = True
    for name, (keys, values) in tables.items():
        table = model.tables.get(name)
        if table is None:
            known = ", ".join(map(repr, model.tables))
            return w.Failed(w.SETTINGS, f"model {model.name!r} has no table {name!r}: it has {known}")
        if values is not None and values.shape[1] != table.dim:
            return w.Failed(w.SETTINGS, f"gradients of table {name!r} have {values.shape[1]} values: expected {table.dim}")
        if not (all(named) or named[model.partition_of(keys)].all()):
            return w.Failed(w.REFUSED, f"keys of table {name!r} belong to partitions that are not named: {partitions} are")
        if values is not None and not all_finite(values):
            return w.Failed(w.REFUSED, f"gradients of table {name!r} contain NaN or infinity: leave this batch out")
    return None
