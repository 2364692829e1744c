"""Real nodes: Wide & Deep, trained by two optimizers and served from another node's shared memory with the same logits."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import ekko
import ekko.torch
from ekko.serve.together import State
from ekko.zoo import FTRL, WideDeep, WideDeepOptions, warm_start
from sim_cluster.processes import LocalCluster, NodeSpec

pytestmark = pytest.mark.processes

OPTIONS = WideDeepOptions(
    rows={"user": 40, "item": 60}, crosses=(("user", "item"), ("item",)), cross_rows=1 << 10, dense=2, dim=8, hidden=(16,)
)
GROWN = WideDeepOptions(
    rows={"user": 50, "item": 60, "hour": 24},
    crosses=(("user", "item"), ("item",), ("hour", "item")),
    cross_rows=1 << 11,
    dense=2,
    dim=8,
    hidden=(16,),
)
Optimizers = list[torch.optim.Optimizer]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path_factory.mktemp("wide_deep"), nodes) as cluster:
        cluster.start()
        yield cluster


def events(options: WideDeepOptions, size: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    ids = {name: torch.randint(rows, (size,), generator=random) for name, rows in options.rows.items()}
    return torch.randn(size, options.dense, generator=random), ids


def optimizers_of(model: WideDeep) -> Optimizers:
    return [FTRL(model.wide_parameters, lr=0.3, l1=0.3), torch.optim.Adagrad(model.deep_parameters, lr=0.05)]


def train(model: WideDeep, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        dense, ids = events(model.options, 64, step)
        labels = ((ids["user"] * 7 + ids["item"]) % 3 == 0).float()
        for optimizer in optimizers:
            optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(dense, ids), labels, reduction="sum").backward()
        for optimizer in optimizers:
            optimizer.step()


class Scorer:
    """The serving half: the model without tables, on the rows and tensors of one moment of a node."""

    def __init__(self, options: WideDeepOptions, reader: ekko.Reader) -> None:
        self._reader = reader
        self._model = WideDeep(options, with_tables=False).eval()

    @torch.no_grad()
    def logits(self, dense: Tensor, ids: dict[str, Tensor]) -> Tensor:
        wide_keys = _keys(self._model.wide_ids(ids).reshape(-1))

        def inputs(state: State) -> tuple[Tensor, list[Tensor], dict[str, NDArray[np.float32]]]:
            rows = [torch.from_numpy(state.lookup(name, _keys(own))) for name, own in ids.items()]
            weights = torch.from_numpy(state.lookup("wide", wide_keys))
            return weights.view(len(dense), -1), rows, {name: state.dense(name) for name, _ in self._model.named_parameters()}

        weights, rows, tensors = self._reader.together(inputs, newer_ms=0, timeout=60.0)
        self._model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
        logits: Tensor = self._model(dense, embeddings=torch.stack(rows, dim=1), weights=weights)
        return logits


def _keys(ids: Tensor) -> NDArray[np.uint64]:
    return ids.numpy().astype(np.uint64)


def assert_served(cluster: LocalCluster, name: str, model: WideDeep) -> None:
    """By a node that only serves: the trainer's logits, to the bit."""
    dense, ids = events(model.options, 200, 10_000)
    with ekko.Reader(name, run_dir=cluster["serve-1"].run_dir, wait=60.0) as reader, torch.no_grad():
        assert torch.equal(Scorer(model.options, reader).logits(dense, ids), model(dense, ids))


def test_a_scorer_at_another_node_has_the_trainers_logits_also_when_the_model_grows(cluster: LocalCluster) -> None:
    torch.manual_seed(3)
    model = WideDeep(OPTIONS)
    optimizers = optimizers_of(model)
    with (
        ekko.Publisher(cluster["train-1"].local, "ctr", model.table_dims) as publisher,
        ekko.torch.track(model, optimizers, publisher, model.tracked, dense_every=1) as tracker,
    ):
        tracker.publish_all()
        for steps in (range(20), range(20, 60)):
            train(model, optimizers, steps)
            publisher.wait(tracker.flush(), "all", 60.0)
            assert_served(cluster, "ctr", model)
    assert model.wide is not None
    zeros = (model.wide.weight == 0).double().mean().item()
    assert 0.1 < zeros < 0.95, "both kinds of wide rows were served"

    grown = WideDeep(GROWN)
    grown_optimizers = optimizers_of(grown)
    warm_start(grown, model, zip(grown_optimizers, optimizers, strict=True))
    with (
        ekko.Publisher(cluster["train-1"].local, "ctr_2", grown.table_dims) as publisher,
        ekko.torch.track(grown, grown_optimizers, publisher, grown.tracked, dense_every=1) as tracker,
    ):
        publisher.wait(tracker.publish_all(), "all", 60.0)
        assert_served(cluster, "ctr_2", grown)
        train(grown, grown_optimizers, range(60, 80))
        publisher.wait(tracker.flush(), "all", 60.0)
        assert_served(cluster, "ctr_2", grown)


def test_only_what_a_step_changed_goes_out(cluster: LocalCluster) -> None:
    """The gradient says which rows those are: a wide table is large, and is not to be compared with a copy."""
    torch.manual_seed(4)
    model = WideDeep(OPTIONS)
    optimizers = optimizers_of(model)
    with (
        ekko.Publisher(cluster["train-1"].local, "ctr_3", model.table_dims) as publisher,
        ekko.torch.track(model, optimizers, publisher, model.tracked, background=False) as tracker,
    ):
        assert not any(table.compared for table in tracker._tables.values())
        first = tracker.publish_all()
        train(model, optimizers, range(1))
        publisher.wait(tracker.flush(), "all", 60.0)
        keys = np.arange(2 * OPTIONS.cross_rows, dtype=np.uint64)
        with ekko.Reader("ctr_3", run_dir=cluster["serve-1"].run_dir, wait=60.0) as reader:
            rows, stamps = reader.lookup("wide", keys, stamps=True)
        _, ids = events(OPTIONS, 64, 0)
        touched = np.unique(model.wide_ids(ids).numpy())
        np.testing.assert_array_equal(np.flatnonzero(stamps > np.uint64(first)), touched)
        assert model.wide is not None
        np.testing.assert_array_equal(rows, model.wide.weight.detach().numpy())
