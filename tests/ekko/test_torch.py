"""`track` publishes exactly what a step changed; `EmbeddingBag` gives the numbers of torch's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ekko.torch
from ekko import Reader
from ekko.codec import encode, rounded
from ekko.errors import ModelError, PublishError
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store
from p2p.replica import RowColumns


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows


class RecordedStep:
    """One batch as it was handed over."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, np.ndarray]] = {}
        self.significance: dict[str, dict[int, float]] = {}
        self.dense: dict[str, np.ndarray] = {}
        self.stamp = 0

    def publish(self, table: str, keys: np.ndarray, rows: np.ndarray, significance: np.ndarray | None = None) -> None:
        assert keys.dtype == np.uint64
        assert rows.dtype == np.float32
        assert len(set(keys.tolist())) == len(keys) == len(rows)
        self.rows[table] = {int(key): row.copy() for key, row in zip(keys, rows, strict=True)}
        if significance is not None:
            self.significance[table] = dict(zip(keys.tolist(), significance.tolist(), strict=True))

    def publish_dense(self, name: str, array: np.ndarray) -> None:
        self.dense[name] = array.copy()


class Recorder:
    """A publisher that keeps its batches; refuses them while `refuses` is set."""

    def __init__(self, tables: Mapping[str, int]) -> None:
        self.tables = tables
        self.steps: list[RecordedStep] = []
        self.refuses = False

    @contextmanager
    def step(self) -> Iterator[RecordedStep]:
        step = RecordedStep()
        yield step
        if self.refuses:
            raise PublishError("refused")
        self.steps.append(step)
        step.stamp = len(self.steps)

    def state(self, table: str, shape: tuple[int, int]) -> np.ndarray:
        """The table as a replica that applied every batch holds it."""
        rows = np.full(shape, np.nan, np.float32)
        for step in self.steps:
            for key, row in step.rows.get(table, {}).items():
                rows[key] = row
        return rows


class Toy(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.user = nn.Embedding(9, 4, sparse=True)
        self.item = nn.Embedding(12, 4, **{"sparse": True, **options})
        self.top = nn.Linear(4, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.top(self.user(user) * self.item(item)).sum()


TABLES = {"user": "users", "item": "items"}


def recorder() -> Recorder:
    return Recorder({"users": 4, "items": 4})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, user: list[int], item: list[int]) -> None:
    optimizer.zero_grad()
    model(torch.tensor(user), torch.tensor(item)).backward()
    optimizer.step()


def adagrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.1)


def test_one_step_is_one_batch_of_the_touched_rows_after_the_step() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    train(model, optimizer, [3, 3, 5], [7, 7, 1])
    [step] = publisher.steps
    assert tracker.stamp == step.stamp == 1
    assert {table: set(rows) for table, rows in step.rows.items()} == {"users": {3, 5}, "items": {7, 1}}
    np.testing.assert_array_equal(step.rows["users"][3], model.user.weight[3].detach().numpy())
    assert step.dense == {}


def test_a_step_publishes_nothing_of_the_steps_before_it() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    train(model, optimizer, [3], [7])
    train(model, optimizer, [4], [8])
    assert [set(step.rows["users"]) for step in publisher.steps] == [{3}, {4}]
    assert [set(step.rows["items"]) for step in publisher.steps] == [{7}, {8}]


def test_significance_is_the_l1_norm_of_the_rows_gradient() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    train(model, optimizer, [3, 3, 5], [7, 2, 1])
    gradient = model.user.weight.grad.to_dense()
    for key in (3, 5):
        assert publisher.steps[0].significance["users"][key] == pytest.approx(gradient[key].abs().sum().item())


@given(st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 11)), min_size=1, max_size=5), max_size=8), st.data())
def test_batches_reproduce_the_tables_whatever_the_optimizer_does(
    steps: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    model, publisher = Toy(), recorder()
    kind = data.draw(st.sampled_from(["sgd", "adagrad", "adam"]))
    sparse = [model.user.weight, model.item.weight]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "adagrad": lambda: adagrad(model),
        "adam": lambda: torch.optim.SparseAdam(sparse, lr=0.1),
    }[kind]()
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    tracker.publish_all()
    for pairs in steps:
        publisher.refuses = data.draw(st.booleans())
        try:
            train(model, optimizer, [user for user, _ in pairs], [item for _, item in pairs])
        except PublishError:
            assert publisher.refuses
    publisher.refuses = False
    train(model, optimizer, [0], [0])
    np.testing.assert_array_equal(publisher.state("users", (9, 4)), model.user.weight.detach().numpy())
    np.testing.assert_array_equal(publisher.state("items", (12, 4)), model.item.weight.detach().numpy())


def test_rows_of_a_refused_step_go_with_the_next_and_their_significance_adds_up() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    publisher.refuses = True
    with pytest.raises(PublishError):
        train(model, optimizer, [3], [7])
    first = model.user.weight.grad.to_dense()[3].abs().sum().item()
    assert tracker.stamp == 0
    publisher.refuses = False
    train(model, optimizer, [3, 4], [1, 1])
    second = model.user.weight.grad.to_dense()[3].abs().sum().item()
    [step] = publisher.steps
    assert set(step.rows["items"]) == {7, 1}
    assert step.significance["users"][3] == pytest.approx(first + second)


def test_dense_parameters_go_with_every_nth_step() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES, dense_every=2, background=False)
    for _ in range(5):
        train(model, optimizer, [1], [1])
    assert [set(step.dense) for step in publisher.steps] == [set(), {"top.weight", "top.bias"}] * 2 + [set()]
    assert tracker.dense_names == ("top.weight", "top.bias")
    tracker.publish_dense()
    np.testing.assert_array_equal(publisher.steps[-1].dense["top.weight"], model.top.weight.detach().numpy())


def test_publish_all_covers_every_row_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ekko.torch.tracker, "PUBLISH_ALL_BYTES_MAX", 5 * 4 * 4)  # five rows of four float32
    model, publisher = Toy(), recorder()
    tracker = ekko.torch.track(model, adagrad(model), publisher, TABLES, background=False)
    assert tracker.publish_all() == len(publisher.steps) == 2 + 3 + 1
    np.testing.assert_array_equal(publisher.state("users", (9, 4)), model.user.weight.detach().numpy())
    np.testing.assert_array_equal(publisher.state("items", (12, 4)), model.item.weight.detach().numpy())
    assert set(publisher.steps[-1].dense) == {"top.weight", "top.bias"}


def test_nothing_is_published_after_remove_or_the_with_block() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES, background=False) as tracker:
        train(model, optimizer, [1], [1])
    train(model, optimizer, [1], [1])
    tracker.remove()
    assert len(publisher.steps) == tracker.stamp == 1


def test_a_step_without_gradients_of_tables_publishes_nothing() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    model.top(torch.ones(4)).sum().backward()
    optimizer.step()
    assert publisher.steps == []


def test_a_gradient_that_turns_dense_has_every_row_published_once() -> None:
    """Nobody has a copy of what was published before it."""
    model, publisher = Toy(), recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    train(model, optimizer, [3], [7])
    for group in optimizer.param_groups:
        group["momentum"] = 0.5
    train(model, optimizer, [3], [7])
    train(model, optimizer, [4], [7])
    assert [len(step.rows["users"]) for step in publisher.steps] == [1, 9, 2], "row 3 moves on by its momentum"
    assert set(publisher.steps[2].rows["users"]) == {3, 4}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("sparse", [False, True])
def test_dense_gradients_say_which_rows_they_touch(kind: Any, sparse: bool) -> None:
    if sparse and kind is torch.optim.RMSprop:
        pytest.skip("takes dense gradients only")
    model, publisher = Toy(sparse=sparse), recorder()
    model.user.sparse = sparse
    optimizer = kind(model.parameters(), lr=0.1)
    ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    before = model.item.weight.detach().clone()
    train(model, optimizer, [3, 3, 5], [7, 7, 1])
    gradient = model.item.weight.grad.to_dense()
    [step] = publisher.steps
    assert {table: set(rows) for table, rows in step.rows.items()} == {"users": {3, 5}, "items": {7, 1}}
    assert step.significance["items"] == pytest.approx({key: gradient[key].abs().sum().item() for key in (1, 7)})
    changed = (model.item.weight != before).any(dim=1).nonzero().reshape(-1)
    assert changed.tolist() == [1, 7]
    train(model, optimizer, [2], [4])
    assert set(publisher.steps[1].rows["items"]) == {4}


def test_significance_may_be_left_to_the_node() -> None:
    model, publisher = Toy(), recorder()
    optimizer = adagrad(model)
    ekko.torch.track(model, optimizer, publisher, TABLES, significance="change", background=False)
    train(model, optimizer, [3], [7])
    assert set(publisher.steps[0].rows["users"]) == {3}
    assert publisher.steps[0].significance == {}
    with pytest.raises(ModelError, match="significance is 'loss': expected 'gradient' or 'change'"):
        ekko.torch.track(model, optimizer, publisher, TABLES, significance="loss", background=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "tables", "complaint"),
    [
        pytest.param({}, {"itme": "items"}, "no module 'itme': its nn.Embedding modules are 'user', 'item'", id="no-module"),
        pytest.param({}, {"top": "items"}, "'top' is a Linear", id="not-an-embedding"),
        pytest.param({}, {"item": "item"}, "unknown table 'item': the publisher has 'users', 'items'", id="no-table"),
        pytest.param({}, {"item": "items", "user": "items"}, "'items' is named twice", id="one-table-twice"),
        pytest.param({}, {}, "tables is empty", id="empty"),
        pytest.param({"dtype": torch.float64}, TABLES, "'item' has dtype torch.float64", id="dtype"),
    ],
)
def test_what_cannot_be_tracked_is_refused_by_name(options: dict[str, object], tables: dict[str, str], complaint: str) -> None:
    model, publisher = Toy(**options), recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=complaint):
        ekko.torch.track(model, optimizer, publisher, tables, background=False)
    assert not optimizer._optimizer_step_post_hooks


def test_another_width_is_refused() -> None:
    model = Toy()
    with pytest.raises(ModelError, match="'user' has rows of 4 and table 'users' has dim 8"):
        ekko.torch.track(model, adagrad(model), Recorder({"users": 8, "items": 4}), TABLES, background=False)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = Toy()
    with pytest.raises(ModelError, match="does not have the weight of table 'users'"):
        ekko.torch.track(model, adagrad(Toy()), recorder(), TABLES)


@pytest.mark.parametrize("dense_every", [0, -1, 2.5])
def test_dense_every_must_be_a_number_of_steps(dense_every: object) -> None:
    model = Toy()
    with pytest.raises(ModelError, match="dense_every is"):
        ekko.torch.track(model, adagrad(model), recorder(), TABLES, dense_every=dense_every, background=False)


def test_dense_parameters_must_be_float32() -> None:
    model = Toy()
    model.top.double()
    with pytest.raises(ModelError, match=r"'top.weight' has dtype torch.float64"):
        ekko.torch.track(model, adagrad(model), recorder(), TABLES, dense_every=1, background=False)


# --- EmbeddingBag, over a store in shared memory

ROWS, DIM = 30, 8


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def reader(weight: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Of a store with keys 0 to 28, and key 2^64 - 1, which holds row 29."""
    run_dir: Path = tmp_path_factory.mktemp("node")
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", tables={"item": TableSpec("item", DIM)}))
    keys = np.append(np.arange(ROWS - 1, dtype=np.uint64), np.uint64(2**64 - 1))
    model.apply([RowColumns(table_id("item"), keys, weight.view(np.uint8))], stamp=1 << 22)
    with Reader("ctr", run_dir) as reader:
        yield reader
    store.destroy()


def twins(reader: Reader, weight: np.ndarray, mode: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs = nn.EmbeddingBag.from_pretrained(torch.from_numpy(weight.copy()), mode=mode, **options)
    return ekko.torch.EmbeddingBag(reader, "item", mode=mode, **options), theirs


BAGS = st.lists(st.lists(st.integers(0, ROWS - 2), max_size=6), min_size=1, max_size=8)


@given(
    bags=BAGS,
    mode=st.sampled_from(["sum", "mean", "max"]),
    last=st.booleans(),
    padding=st.none() | st.integers(0, ROWS - 2),
    kind=st.sampled_from([torch.int64, torch.int32]),
    weighted=st.booleans(),
)
def test_bag_with_offsets_gives_torchs_numbers(
    reader: Reader,
    weight: np.ndarray,
    bags: list[list[int]],
    mode: str,
    last: bool,
    padding: int | None,
    kind: torch.dtype,
    weighted: bool,
) -> None:
    ours, theirs = twins(reader, weight, mode, include_last_offset=last, padding_idx=padding)
    indices = torch.tensor([index for bag in bags for index in bag], dtype=kind)
    ends = np.cumsum([0] + [len(bag) for bag in bags])
    offsets = torch.from_numpy(ends if last else ends[:-1]).to(kind)
    weights = torch.linspace(-1, 2, len(indices)) if weighted and mode == "sum" else None
    torch.testing.assert_close(ours(indices, offsets, weights), theirs(indices, offsets, weights))


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    mode=st.sampled_from(["sum", "mean", "max"]),
    padding=st.none() | st.integers(0, ROWS - 2),
    seed=st.integers(0, 99),
)
def test_bag_without_offsets_gives_torchs_numbers(
    reader: Reader, weight: np.ndarray, shape: tuple[int, int], mode: str, padding: int | None, seed: int
) -> None:
    ours, theirs = twins(reader, weight, mode, padding_idx=padding)
    indices = torch.randint(ROWS - 1, shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ours(indices), theirs(indices))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bag_of_rows_of_indices_gives_torchs_numbers(reader: Reader, weight: np.ndarray, mode: str) -> None:
    ours, theirs = twins(reader, weight, mode)
    indices = torch.randint(ROWS - 1, (5, 7))
    torch.testing.assert_close(ours(indices), theirs(indices))
    torch.testing.assert_close(ours(indices.t()), theirs(indices.t()))  # not contiguous
    torch.testing.assert_close(ours(indices.int()), theirs(indices))


def test_bag_with_per_sample_weights_gives_torchs_numbers(reader: Reader, weight: np.ndarray) -> None:
    ours, theirs = twins(reader, weight, "sum")
    indices, weights = torch.randint(ROWS - 1, (5, 7)), torch.randn(5, 7)
    torch.testing.assert_close(ours(indices, per_sample_weights=weights), theirs(indices, per_sample_weights=weights))
    flat, offsets = indices.reshape(-1), torch.tensor([0, 3, 3, 30])
    torch.testing.assert_close(ours(flat, offsets, weights.reshape(-1)), theirs(flat, offsets, weights.reshape(-1)))


def test_bag_counts_absent_keys_as_zeros_and_reads_hashed_keys(reader: Reader, weight: np.ndarray) -> None:
    bag = ekko.torch.EmbeddingBag(reader, "item", mode="sum")
    indices = torch.tensor([[3, 999_999], [-1, 4]])  # the bits of -1 are the key 2^64 - 1
    expected = torch.from_numpy(np.stack([weight[3], weight[ROWS - 1] + weight[4]]))
    torch.testing.assert_close(bag(indices), expected)


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8"])
def test_bag_reads_rows_of_every_codec(weight: np.ndarray, tmp_path: Path, codec: str) -> None:
    store = Store.open(tmp_path)
    model = store.add_model(ModelSpec("ctr", tables={"item": TableSpec("item", DIM, codec)}, codec=codec))
    model.apply([RowColumns(table_id("item"), np.arange(ROWS, dtype=np.uint64), encode(codec, weight))], stamp=1 << 22)
    with Reader("ctr", tmp_path) as reader:
        ours, theirs = twins(reader, rounded(codec, weight), "sum")
        indices = torch.randint(ROWS, (5, 7))
        torch.testing.assert_close(ours(indices), theirs(indices))
    store.destroy()


def test_bag_is_for_inference_and_holds_nothing(reader: Reader) -> None:
    bag = ekko.torch.EmbeddingBag(reader, "item", mode="sum")
    weights = torch.ones(1, 2, requires_grad=True)
    assert not bag(torch.tensor([[1, 2]]), per_sample_weights=weights).requires_grad
    assert list(bag.parameters()) == []
    assert bag.state_dict() == {}
    assert repr(bag) == "EmbeddingBag('item', mode='sum')"


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [
        pytest.param(torch.ones(1, 2), "indices have dtype torch.float32", id="dtype"),
        pytest.param(torch.ones(1, 2, dtype=torch.int64, device="meta"), "indices are on device meta", id="device"),
    ],
)
def test_bag_refuses_indices_it_cannot_look_up(reader: Reader, indices: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        ekko.torch.EmbeddingBag(reader, "item")(indices)


def test_bag_refuses_unknown_tables_and_modes(reader: Reader) -> None:
    with pytest.raises(ModelError, match="no table 'itme'"):
        ekko.torch.EmbeddingBag(reader, "itme")(torch.tensor([[1]]))
    with pytest.raises(ModelError, match="mode is 'avg'"):
        ekko.torch.EmbeddingBag(reader, "item", mode="avg")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_norm": 1.0}, "max_norm is 1.0: rows are served as they were published"),
        ({"_weight": torch.zeros(1, DIM)}, "_weight was given"),
        ({"device": "meta"}, "device is meta"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"embedding_dim": DIM + 1}, f"embedding_dim is {DIM + 1}, and table 'item' has dim {DIM}"),
        ({"padding_idx": -1}, "padding_idx is -1, counted from the end"),
        ({"padding_idx": -9, "num_embeddings": 8}, "at least 9"),
    ],
)
def test_bag_refuses_arguments_that_make_no_sense_for_serving(reader: Reader, options: Any, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        ekko.torch.EmbeddingBag(reader, "item", **options)


def test_bag_accepts_the_other_arguments_of_torchs(reader: Reader, weight: np.ndarray) -> None:
    options = {"num_embeddings": ROWS, "embedding_dim": DIM, "norm_type": 1.0, "scale_grad_by_freq": False, "sparse": True}
    bag = ekko.torch.EmbeddingBag(reader, "item", padding_idx=-2, device="cpu", dtype=torch.float32, **options)
    theirs = nn.EmbeddingBag.from_pretrained(torch.from_numpy(weight.copy()), mode="mean", padding_idx=ROWS - 2)
    indices = torch.tensor([[1, ROWS - 2, 3]])
    torch.testing.assert_close(bag(indices), theirs(indices))
    torch.testing.assert_close(bag(input=indices, offsets=None, per_sample_weights=None), theirs(indices))
    with pytest.raises(ModelError, match="only 'sum' has weights"):
        bag(indices, per_sample_weights=torch.ones(1, 3))


class Scorer(nn.Module):
    def __init__(self, bag: nn.Module) -> None:
        super().__init__()
        self.bag = bag
        self.top = nn.Linear(DIM, 1)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.top(self.bag(indices + 0)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_bag_in_inference_mode_and_compiled(reader: Reader, weight: np.ndarray, backend: str) -> None:
    ours, theirs = twins(reader, weight, "sum")
    model = Scorer(ours)
    expected = Scorer(theirs)
    expected.top = model.top
    compiled = torch.compile(model, backend=backend)
    for shape in ((5, 7), (3, 7)):  # another shape: compiled anew
        indices = torch.randint(ROWS - 1, shape)
        with torch.inference_mode():
            torch.testing.assert_close(model(indices), expected(indices))
            torch.testing.assert_close(compiled(indices), expected(indices))
        torch.testing.assert_close(compiled(indices), expected(indices))


class Pooled(torch.utils.data.Dataset):
    def __init__(self, bag: nn.Module) -> None:
        self.bag = bag

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.bag(torch.tensor([[index, index + 1]]))[0]


@pytest.mark.processes
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*:UserWarning")
def test_bag_in_the_workers_of_a_data_loader(reader: Reader, weight: np.ndarray, method: str) -> None:
    ours, theirs = twins(reader, weight, "sum")
    workers = 1 if method == "spawn" else 2  # each begins with importing torch
    loader = torch.utils.data.DataLoader(Pooled(ours), batch_size=4, num_workers=workers, multiprocessing_context=method)
    rows = torch.cat(list(loader))
    torch.testing.assert_close(rows, theirs(torch.tensor([[index, index + 1] for index in range(8)])))
