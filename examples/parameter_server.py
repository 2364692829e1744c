"""The same with parameter servers: rows and what the optimizer remembers of them live there, the trainer has neither.

    ekko node --config examples/server.toml
    python examples/parameter_server.py tcp://127.0.0.1:7700 tcp://127.0.0.1:7750

Forward pulls the rows of a batch, backward leaves their gradients, and after `optimizer.step()` they are pushed: the servers'
optimizer changes the rows, and the servers publish them. The dense parameters are the trainer's, which publishes them itself.
"""

import torch
from stream import DENSE_RATE, Stream, arguments
from torch.nn import functional

import ekko.torch
from ekko.train import Client
from ekko.zoo import DLRM


def main() -> None:
    """Learn the stream once."""
    options = arguments(__doc__)
    stream = Stream(options.events)
    torch.manual_seed(options.seed)
    client = Client(options.servers, options.model)
    bags = {name: ekko.torch.PSEmbeddingBag(client, name, mode=None) for name in stream.tables}  # as nn.Embedding
    model = DLRM(stream.shape, with_tables=False)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=DENSE_RATE)
    ekko.torch.push_after(optimizer, client)

    with (
        ekko.Publisher(options.node, options.model, stream.tables) as publisher,
        ekko.torch.track(model, optimizer, publisher, tables={}, dense_every="250ms") as tracker,
    ):
        tracker.publish_all()

        batches = ekko.torch.prefetched(stream.batches(), lambda batch: {bags[name]: ids for name, ids in batch.ids.items()})
        for batch in batches:  # while the rows of the next one are on their way
            optimizer.zero_grad()
            rows = torch.stack([bags[name](ids) for name, ids in batch.ids.items()], dim=1)
            logits = model(batch.dense, embeddings=rows)
            functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
            optimizer.step()

        client.flush()
        publisher.wait(tracker.flush(), scope="all", timeout=60)
    client.close()


if __name__ == "__main__":
    main()
