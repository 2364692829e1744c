"""Wide & Deep whose rows live on a parameter server, FTRL's state with them: what is served is what torch learns alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import ekko
import ekko.torch
from ekko.train import Client
from ekko.train.optimizers import initializer_of
from ekko.zoo import FTRL, WideDeep, WideDeepOptions
from sim_cluster.processes import NodeSpec
from tests.ekko.training_processes import TrainingCluster, table_settings

pytestmark = [pytest.mark.processes, pytest.mark.long]

OPTIONS = WideDeepOptions(
    rows={"user": 40, "item": 60}, crosses=(("user", "item"), ("item",)), cross_rows=1 << 10, dense=2, dim=8, hidden=(16,)
)
NORMAL = {"name": "normal", "std": 0.1, "seed": 4}
RATE, STEPS = 0.02, 40
SERVED = {
    "wide": table_settings(1, {"name": "ftrl", "lr": 0.3, "l1": 0.3}, {"name": "zeros"}),
    **{name: table_settings(OPTIONS.dim, {"name": "sgd", "lr": RATE}, NORMAL) for name in OPTIONS.rows},
}
# Where a key comes more than twice in a batch, torch adds its gradients in another order.
ROUNDING_TOLERANCE = 1e-5


def batch(step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    random = torch.Generator().manual_seed(step)
    ids = {name: torch.randint(rows, (64,), generator=random) for name, rows in OPTIONS.rows.items()}
    return torch.randn(64, 2, generator=random), ids, ((ids["user"] * 7 + ids["item"]) % 3 == 0).float()


def alone() -> WideDeep:
    """By torch, from the same first rows."""
    torch.manual_seed(6)
    model = WideDeep(OPTIONS)
    with torch.no_grad():
        for name, table in model.tables.items():
            keys = np.arange(OPTIONS.rows[name], dtype=np.uint64)
            table.weight.copy_(torch.tensor(initializer_of(NORMAL).rows(name, keys, OPTIONS.dim)))
    optimizers = [FTRL(model.wide_parameters, lr=0.3, l1=0.3), torch.optim.SGD(model.deep_parameters, lr=RATE)]
    for step in range(STEPS):
        dense, ids, labels = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(dense, ids), labels, reduction="sum").backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def test_what_is_served_is_what_torch_learns_alone(tmp_path: Path) -> None:
    torch.sparse.check_sparse_tensor_invariants.disable()
    reference = alone()
    torch.manual_seed(6)
    model = WideDeep(OPTIONS, with_tables=False)
    nodes = [NodeSpec("home-1", "home", "train")]
    with TrainingCluster(tmp_path, nodes, {"mode": "sync", "workers": 1, "partitions": 2, "tables": SERVED}) as cluster:
        cluster.start()
        client = Client(list(cluster.endpoints.values()), "ctr", worker=0)
        bags = {name: ekko.torch.PSEmbeddingBag(client, name, mode=None) for name in SERVED}
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        ekko.torch.push_after(optimizer, client)
        for step in range(STEPS):
            dense, ids, labels = batch(step)
            optimizer.zero_grad()
            rows = torch.stack([bags[name](own) for name, own in ids.items()], dim=1)
            weights = bags["wide"](model.wide_ids(ids)).squeeze(2)
            logits = model(dense, embeddings=rows, weights=weights)
            binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
            optimizer.step()
        client.flush()
        client.close()
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, reference.get_parameter(name), rtol=0, atol=ROUNDING_TOLERANCE, msg=name)
        with ekko.Reader("ctr", run_dir=cluster["home-1"].run_dir, wait=60.0) as reader:
            for name, table in reference.tracked.items():
                expected = reference.get_submodule(name).get_parameter("weight").detach().numpy()
                rows_served, stamps = reader.lookup(table, np.arange(len(expected), dtype=np.uint64), stamps=True)
                there = stamps > 0
                assert there.sum() > 30
                np.testing.assert_allclose(rows_served[there], expected[there], rtol=0, atol=ROUNDING_TOLERANCE)
                if table == "wide":
                    assert (expected[~there] == 0).all()
                    assert 0 < (rows_served[there] == 0).sum() < there.sum()
