"""`track`: what users call; it checks what they pass, and puts the parts of a tracker together."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ekko.errors import ModelError
from ekko.torch.capture import TrackedTable
from ekko.torch.dense import DenseParameters
from ekko.torch.key_map import KeyMap, key_maps
from ekko.torch.modules import found_tables, renormalising, unwrapped
from ekko.torch.outbox import Outbox, StepPublisher
from ekko.torch.ranks import divided
from ekko.torch.reloading import Reloader, StateReader
from ekko.torch.sending import SHARE
from ekko.torch.tracker import Tracker

Significance = Literal["gradient", "change"]


def track(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    publisher: StepPublisher,
    tables: Mapping[str, str],
    dense_every: int | str | None = None,
    significance: Significance = "gradient",
    reader: StateReader | None = None,
    *,
    background: bool = True,
    process_group: ProcessGroup | None = None,
    share: float = SHARE,
    keys: Mapping[str, KeyMap] | None = None,
) -> Tracker:
    """Publish the embedding rows that training changes, whatever the optimizer: those that changed, exactly, and no others.

    In the background: a step notes what it changed, and a thread takes all that is due between two steps, so that a batch is
    the model as it was at one moment, and publishes it while training goes on. Batches come as fast as steps where steps are
    slow; else one has several steps, and a row that they changed several times is sent once, as it is then. A node that does
    not answer is tried again, while rows add up (`Tracker.counts`). What else fails raises out of the next step.

    Not in the background, each `optimizer.step()` publishes one batch. A step that could not be published raises out of
    `optimizer.step()`, after the parameters have changed; its rows go with the next one that can.

    Once the model was rolled back, a step loads what was restored into the tables, and is dropped with all that is not
    published yet (`Tracker.reload`). With `Publisher(admission=...)`, rows go out from the batch on that touches their key for
    the n-th time.

    Whoever calls `backward(gradient)` on the output of an `nn.Embedding` itself, with memory that is used again, passes a copy:
    the embedding's gradient is a view of it, which is looked at in the background.

    Args:
        model: holds the tables; may be wrapped by `torch.compile` or `DistributedDataParallel`: names are those without it.
        optimizer: any; or several, in the order in which they step: their steps are one, which ends with the last one's. Name
            all: what one that is not named changes is not seen, and while it steps dense parameters may be copied. Where
            they move rows that have no gradient (momentum, weight decay, Adam with dense gradients, ...) changed rows are found
            by comparing the table with a copy of what was published last: it takes as much memory again.
        publisher: an `ekko.Publisher` of a model that has the tables.
        tables: module name (as in `model.named_modules()`) of an `nn.Embedding` or `nn.EmbeddingBag` -> table it is published
            to; the row index is the key. Modules that share one weight share one table.
        dense_every: publish all other parameters too, under their parameter names, and floating-point buffers that a state dict
            has, with every this many steps (8), or with a step at most so often ("2s"); None: never. They go in one batch with
            the rows of their step, and of each what changed since they went last.
        significance: "gradient": a row's is the L1 norm of its gradient, or their sum; "change": how far a row moves is what
            counts, as the node sees it, and as it always does for tables that are compared.
        reader: of the same model on this machine, to read dense parameters after a rollback, and rows that steps changed
            which it had refused; None: these stay as they are.
        background: see above.
        process_group: ranks that have the same weights after each step, of which each publishes a part (`ekko.torch.ranks`);
            None: those of a `DistributedDataParallel` model, else all is published here.
        share: of one core's time, that batches in the background may take: more share, more and smaller batches. They come four
            times a second at least.
        keys: module name -> its `ekko.torch.KeyMap`, where rows are numbered as keys come: what is published has these keys.

    Returns:
        The handle; `remove()` it, or use it in a `with` block, to publish what is still due and stop.

    Raises:
        ModelError: no such module or table, not an embedding, another width, or no optimizer trains it. Nothing is tracked.
    """
    if significance not in get_args(Significance):
        raise ModelError(f"significance is {significance!r}: expected 'gradient' or 'change'")
    if not 0 < share <= 1:
        raise ModelError(f"share is {share!r}: expected a part of one core's time, above 0 and at most 1")
    if not tables and dense_every is None:
        raise ModelError("tables is empty: name an nn.Embedding and the table it is published to, or set dense_every")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    if not optimizers:
        raise ModelError("optimizer is an empty list: expected those that train the model, in the order in which they step")
    found = found_tables(model, tables, publisher.tables)
    maps = key_maps(keys or {}, tables, found)
    renormalised = {name: renormalising(model, module.weight) for name, module in found.items()}
    tracked = {
        name: TrackedTable(name, module, optimizers, maps.get(name), renormalised=bool(renormalised[name]))
        for name, module in found.items()
    }
    weights = {name: table.weight for name, table in tracked.items()}
    own: StepPublisher = divided(publisher, model, weights, process_group, maps)
    dense = DenseParameters(unwrapped(model), weights.values(), dense_every, time.monotonic())
    outbox = Outbox(list(tracked.values()), dense, own, says_significance=significance == "gradient")
    reloader = Reloader(own, reader, optimizers, tracked, dense, outbox)
    tracker = Tracker(own, optimizers, tracked, renormalised, dense, outbox, reloader, share if background else None)
    tracker.begin(getattr(publisher, "before_close", None))  # a publisher of yours need not know that
    return tracker
