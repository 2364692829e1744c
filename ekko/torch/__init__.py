"""The public torch face: publish what a training step changed, and pool embeddings that a reader looks up.

Training side: three lines, of which the last is

    tracker = ekko.torch.track(model, optimizer, publisher, tables={"item_embedding": "item"})

From then on every `optimizer.step()` publishes the rows it changed as one batch under one stamp. With sparse gradients the
gradient itself says which rows those are, so nothing is compared or copied that did not change.

Serving side: `EmbeddingBag(reader, "item")` stands where `torch.nn.EmbeddingBag` stood in training.
"""

from ekko.serve.embedding_bag import EmbeddingBag
from ekko.torch.reloading import Reloaded
from ekko.torch.server_bag import PSEmbeddingBag, prefetched, push_after
from ekko.torch.tracker import PublishStep, StepPublisher, Tracker, track

__all__ = [
    "EmbeddingBag",
    "PSEmbeddingBag",
    "PublishStep",
    "Reloaded",
    "StepPublisher",
    "Tracker",
    "prefetched",
    "push_after",
    "track",
]
