"""Online training with hooks: a PyTorch loop like any other, and three lines of ekko.

    python examples/hooks.py tcp://127.0.0.1:7700

Each `optimizer.step()` has the rows that it changed published, and four times a second the dense parameters go along with the
rows of the same moment. Every serving node has them some milliseconds later: see docs/tutorial.md.
"""

import torch
from stream import DENSE_RATE, ROW_RATE, Stream, arguments
from torch.nn import functional

import ekko.torch
from ekko.zoo import DLRM


def main() -> None:
    """Learn the stream once."""
    options = arguments(__doc__)
    stream = Stream(options.events)
    torch.manual_seed(options.seed)
    model = DLRM(stream.shape)
    dense = [*model.bottom.parameters(), *model.top.parameters()]
    groups = [{"params": model.tables.parameters(), "lr": ROW_RATE}, {"params": dense, "lr": DENSE_RATE}]
    optimizer = torch.optim.Adagrad(groups)

    with (
        ekko.Publisher(options.node, options.model, stream.tables) as publisher,
        ekko.torch.track(model, optimizer, publisher, tables=model.tracked, dense_every="250ms") as tracker,
    ):
        tracker.publish_all()  # what it begins with: rows that no event has touched are served, too

        for batch in stream.batches():
            optimizer.zero_grad()
            logits = model(batch.dense, batch.ids)
            functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
            optimizer.step()

        publisher.wait(tracker.flush(), scope="all", timeout=60)  # every live node has all of it


if __name__ == "__main__":
    main()
