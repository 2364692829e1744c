"""The same on several ranks: `DistributedDataParallel` divides each batch, and each rank publishes a part of the rows.

    torchrun --nproc-per-node 2 examples/ddp_hooks.py tcp://127.0.0.1:7700

DDP gives all ranks the same gradients, so each knows all rows that a step changed. A key says which rank publishes its row,
and rank 0 publishes the dense parameters: nothing goes twice, and nobody has to ask.
"""

import torch
import torch.distributed as dist
from stream import DENSE_RATE, ROW_RATE, Stream, arguments
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ekko.torch
from ekko.zoo import DLRM


def main() -> None:
    """Learn the stream once, this rank's part of each batch."""
    options = arguments(__doc__)
    stream = Stream(options.events)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(options.seed)
    model = DLRM(stream.shape)
    dense = [*model.bottom.parameters(), *model.top.parameters()]
    groups = [{"params": model.tables.parameters(), "lr": ROW_RATE}, {"params": dense, "lr": DENSE_RATE}]
    optimizer = torch.optim.Adagrad(groups)
    divided = DistributedDataParallel(model)

    with (
        ekko.Publisher(options.node, options.model, stream.tables) as publisher,
        ekko.torch.track(divided, optimizer, publisher, tables=model.tracked, dense_every="250ms") as tracker,
    ):
        tracker.publish_all()

        for batch in stream.batches(rank, ranks):
            optimizer.zero_grad()
            logits = divided(batch.dense, batch.ids)
            functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
            optimizer.step()

        publisher.wait(tracker.flush(), scope="all", timeout=60)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
