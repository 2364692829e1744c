"""The public torch face: publish what a training step changed, and pool embeddings that a reader looks up.

Training side: three lines, of which the last is

    tracker = ekko.torch.track(model, optimizer, publisher, tables={"item_embedding": "item"})

From then on the rows that training changes are published beside it, each batch under one stamp and as of one moment. With
sparse gradients the gradient itself says which rows those are, so nothing is compared or copied that did not change.

Serving side: `EmbeddingBag(reader, "item")` stands where `torch.nn.EmbeddingBag` stood in training.
"""

from ekko.serve.embedding_bag import EmbeddingBag
from ekko.torch.checkpoint import Checkpoint, Resumed, checkpoint_hook
from ekko.torch.key_map import KeyMap
from ekko.torch.outbox import Counts, PublishStep, StepPublisher
from ekko.torch.reloading import Reloaded
from ekko.torch.server_bag import PSEmbeddingBag, prefetched, push_after, scaled_step
from ekko.torch.tracker import Tracker
from ekko.torch.tracking import track

__all__ = [
    "Checkpoint",
    "Counts",
    "EmbeddingBag",
    "KeyMap",
    "PSEmbeddingBag",
    "PublishStep",
    "Reloaded",
    "Resumed",
    "StepPublisher",
    "Tracker",
    "checkpoint_hook",
    "prefetched",
    "push_after",
    "scaled_step",
    "track",
]
