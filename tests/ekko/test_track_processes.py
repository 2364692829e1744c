"""A trainer beside a real node that is stopped, killed and started again, and has all rows in the end, to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ekko
import ekko.torch
from ekko.errors import NodeUnreachable
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, wait_until

ROWS, DIM = 500, 4
TABLES = {"item": DIM, "user": DIM}
WAIT_S = 60.0


class Model(nn.Module):
    """A table whose rows move only with a gradient, and one whose rows move by momentum, too."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ROWS, DIM, sparse=True)
        self.user = nn.EmbeddingBag(ROWS, DIM)
        self.top = nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.item(ids) + self.user(ids.reshape(-1, 1))).square().mean()


@pytest.mark.processes
def test_a_node_that_is_stopped_and_one_that_is_killed_have_all_rows_in_the_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()
    model = Model()
    optimizers = [
        torch.optim.SparseAdam([model.item.weight]),
        torch.optim.AdamW([*model.user.parameters(), *model.top.parameters()]),
    ]

    def train(steps: int) -> None:
        for _ in range(steps):
            model(torch.randint(ROWS, (8,))).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    with LocalCluster(tmp_path, [NodeSpec("train", "eu", "train")], models={"ctr": ModelTables(TABLES)}) as cluster:
        cluster.start()
        node = cluster["train"]
        with ekko.Publisher(node.local, "ctr", timeout=WAIT_S) as publisher:
            tables = {"item": "item", "user": "user"}
            tracker = ekko.torch.track(model, optimizers, publisher, tables, dense_every="1ms")
            tracker.publish_all()
            train(50)
            publisher._timeout = 1.0  # only where it is to pass
            node.pause()
            train(50)
            wait_until(lambda: tracker.counts.failures, "a call that failed", WAIT_S)
            batches = tracker.counts.batches
            node.resume()
            wait_until(lambda: tracker.counts.batches > batches, "a batch after it", WAIT_S)
            train(20)
            node.kill()
            train(20)
            with pytest.raises((TimeoutError, NodeUnreachable)):
                tracker.flush(timeout=0.2)
            node.start()
            node.wait_ready()
            publisher._timeout = WAIT_S
            train(20)
            # Nothing is flushed here: closing the publisher publishes what is due.
        with ekko.Reader("ctr", run_dir=node.run_dir) as reader:
            for name, module in (("item", model.item), ("user", model.user)):
                rows = reader.lookup(name, np.arange(ROWS, dtype=np.uint64))
                np.testing.assert_array_equal(rows.view(np.uint32), module.weight.detach().numpy().view(np.uint32))
            np.testing.assert_array_equal(reader.dense("top.weight"), model.top.weight.detach().numpy())
    assert tracker.counts.rows_due == 0
