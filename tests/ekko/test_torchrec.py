"""TorchRec's own tracker and fused optimizers, on a CPU: what is published is what training changed."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ekko.torch.torchrec as adapter
from ekko.errors import ConfigError, ModelError, PublishError
from ekko.torch.dense import DenseParameters
from tests.ekko.test_torch import Recorder

ROWS = {"t_item": 50, "t_user": 30}
TABLES = {"t_item": "item", "t_user": "user"}
DIM = 8

# FBGEMM's own deprecations; what torch's planner says of machines is for those that have devices.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    pytest.importorskip("torchrec")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    logging.disable(logging.NOTSET)


def made(sharding: str = "table_wise", optimizer: Any = torch.optim.Adagrad) -> Any:
    """A model whose tables are trained inside the backward pass."""
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            configs = [
                EmbeddingBagConfig(name=name, embedding_dim=DIM, num_embeddings=rows, feature_names=[name[2:]])
                for name, rows in ROWS.items()
            ]
            self.bags = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
            self.top = nn.Linear(2 * DIM, 1)

        def forward(self, batch: Any) -> torch.Tensor:
            loss: torch.Tensor = (self.top(self.bags(batch).values()) - 1).square().mean()
            return loss

    torch.manual_seed(0)
    model = Model()
    apply_optimizer_in_backward(optimizer, model.bags.parameters(), {"lr": 0.1})
    sharder = EmbeddingBagCollectionSharder()
    constraints = {name: ParameterConstraints(sharding_types=[sharding], min_partition=4) for name in ROWS}
    topology = Topology(world_size=1, compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(model, [sharder])
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])


def weights(model: Any) -> dict[str, np.ndarray]:
    """Copies of the tables, by the names that they are published under."""
    state = model.state_dict()
    return {
        table: state[f"bags.embedding_bags.{name}.weight"].local_shards()[0].tensor.detach().numpy().copy()
        for name, table in TABLES.items()
    }


def train(model: Any, items: list[int], users: list[int]) -> None:
    """A step, of bags of two items and one user."""
    from torchrec import KeyedJaggedTensor

    lengths = torch.tensor([2] * (len(items) // 2) + [1] * len(users))
    batch = KeyedJaggedTensor(keys=["item", "user"], values=torch.tensor([*items, *users]), lengths=lengths)
    model(batch).backward()


def recorder() -> Recorder:
    return Recorder({"item": DIM, "user": DIM})


def differing(one: np.ndarray, other: np.ndarray) -> set[int]:
    return set(np.flatnonzero((one != other).any(axis=1)).tolist())


@pytest.mark.parametrize("optimizer", ["Adagrad", "SGD", "RowWiseAdagrad"])  # all that FBGEMM has on a CPU
def test_what_is_published_is_what_the_backward_pass_changed(optimizer: str) -> None:
    import torchrec.optim

    kind = getattr(torch.optim, optimizer, None) or getattr(torchrec.optim, optimizer)
    model, publisher = made(optimizer=kind), recorder()
    deltas = adapter.track(model, publisher, TABLES)
    deltas.publish_all()
    rng = np.random.default_rng(1)
    for number in range(12):
        before, steps = weights(model), len(publisher.steps)
        for _ in range(1 + number % 3):  # several steps may go as one
            train(model, rng.integers(0, ROWS["t_item"], 8).tolist(), rng.integers(0, ROWS["t_user"], 4).tolist())
        stamp = deltas.publish()
        after = weights(model)
        assert len(publisher.steps) == steps + 1 == stamp
        for table in TABLES.values():
            assert set(publisher.steps[-1].rows[table]) == differing(before[table], after[table])
            assert np.array_equal(publisher.state(table, after[table].shape), after[table])
    assert deltas.publish() == deltas.stamp == len(publisher.steps), "nothing was looked up since"


def test_what_was_refused_goes_with_the_next() -> None:
    model, publisher = made(), recorder()
    deltas = adapter.track(model, publisher, TABLES)
    publisher.refuses = True
    train(model, [1, 2], [7])
    with pytest.raises(PublishError):
        deltas.publish()
    assert deltas.rows_due == 3
    publisher.refuses = False
    train(model, [2, 4], [7])
    deltas.publish()
    [step] = publisher.steps
    assert {table: set(rows) for table, rows in step.rows.items()} == {"item": {1, 2, 4}, "user": {7}}
    assert deltas.rows_due == 0


def test_large_deltas_go_as_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "STEP_BYTES_MAX", 20 * 4 * DIM)
    model, publisher = made(), recorder()
    deltas = adapter.track(model, publisher, TABLES)
    deltas.publish_all()
    assert [sum(map(len, step.rows.values())) for step in publisher.steps] == [20, 20, 20, 20]
    for table, rows in weights(model).items():
        assert np.array_equal(publisher.state(table, rows.shape), rows)


def test_another_consumer_has_its_own_cursor() -> None:
    from torchrec.distributed.model_tracker.types import DeltaTrackerConfig

    model, publisher = made(), recorder()
    tracker = model.init_torchrec_delta_tracker(DeltaTrackerConfig(consumers=["theirs", "ekko"]))
    deltas = adapter.track(model, publisher, TABLES)
    train(model, [1, 2], [7])
    deltas.publish()
    train(model, [3, 4], [8])
    deltas.publish()
    assert set(publisher.steps[-1].rows["item"]) == {3, 4}
    assert tracker.get_unique("theirs")["bags.embedding_bags.t_item"].ids.tolist() == [1, 2, 3, 4]
    with pytest.raises(ModelError, match="no consumer 'other'"):
        adapter.track(model, publisher, TABLES, consumer="other")


def test_what_cannot_be_tracked_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, publisher = made(), recorder()
    for tables, reason in (
        ({}, "tables is empty"),
        ({"t_other": "item"}, "no table 't_other': it has"),
        ({"t_item": "other"}, "unknown table 'other': the publisher has"),
        ({"t_item": "item", "t_user": "item"}, "two tables are published to one"),
    ):
        with pytest.raises(ModelError, match=reason):
            adapter.track(model, publisher, tables)
    with pytest.raises(ModelError, match="rows of 8 and table 'item' has dim 4"):
        adapter.track(model, Recorder({"item": 4, "user": 8}), TABLES)
    with pytest.raises(ModelError, match="expected a torchrec DistributedModelParallel"):
        adapter.track(nn.Linear(1, 1), publisher, TABLES)
    with pytest.raises(ModelError, match="sharded by columns"):
        adapter.track(made("column_wise"), publisher, TABLES)
    data_parallel = made("data_parallel")
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with pytest.raises(ModelError, match="is data-parallel"):
        adapter.track(data_parallel, publisher, TABLES)


def test_a_missing_torchrec_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchrec.distributed.model_tracker.types", None)
    with pytest.raises(ConfigError, match=r"pip install 'ekko-dissemination\[torchrec\]'"):
        adapter.track(nn.Linear(1, 1), recorder(), TABLES)


def test_sharded_tables_are_no_dense_parameters() -> None:
    dense = DenseParameters(made(), [], 1, now_s=0.0)
    assert set(dense.names) == {"top.weight", "top.bias"}
