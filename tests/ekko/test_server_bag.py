"""`PSEmbeddingBag` against torch's own modules: outputs, gradients, and what reaches a client's step."""

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ekko.torch
from ekko.errors import ModelError
from ekko.torch.server_bag import AHEAD_MAX, GRADIENTS_MAX, Gradients
from ekko.train import Client
from ekko.train.client import GradientSource

ROWS, DIM = 40, 6


class Pulled:
    """Rows that have come."""

    failed = False

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self._rows = rows

    def result(self) -> dict[str, np.ndarray]:
        return {table: rows.copy() for table, rows in self._rows.items()}


class Tables:
    """The rows of a torch module as a client has them: pulled by key, and plain SGD on what is pushed."""

    def __init__(self, rate: float = 0.5) -> None:
        self.weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
        self.rate = rate
        self.sources: list[Gradients] = []
        self.pulls: list[tuple[str, list[int], int]] = []
        self.clock, self.mode = 0, "async"

    @property
    def tables(self) -> Mapping[str, int]:
        return {"item": DIM, "user": DIM}

    def pull_async(self, keys: Mapping[str, np.ndarray], *, ahead: int = 0) -> Pulled:
        self.pulls += [(table, wanted.tolist(), ahead) for table, wanted in keys.items()]
        return Pulled({table: self.weight[torch.from_numpy(wanted.view(np.int64))].numpy() for table, wanted in keys.items()})

    def attach(self, source: Gradients) -> None:
        self.sources.append(source)

    def taken(self) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
        return [part for source in self.sources for part in source.take()]

    def finite(self, scale: float = 1.0) -> bool:
        return all(source.finite(scale) for source in self.sources)

    def discard(self) -> None:
        self.taken()

    def step(self, *, scale: float = 1.0) -> int:
        for _, keys, gradients in self.taken():
            assert gradients.dtype == np.float32
            gradients = gradients * np.float32(scale)
            self.weight.index_add_(0, torch.from_numpy(keys.view(np.int64)), torch.from_numpy(gradients), alpha=-self.rate)
        self.clock += 1
        return self.clock


def of_torch(tables: Tables, mode: str | None, **options: object) -> nn.EmbeddingBag | nn.Embedding:
    weight = tables.weight.clone()
    if options.get("padding_idx") is not None and mode is None:
        weight[options["padding_idx"]] = 0  # as nn.Embedding begins
    if mode is None:
        return nn.Embedding.from_pretrained(weight, freeze=False, **options)  # type: ignore[arg-type]
    return nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode=mode, **options)  # type: ignore[arg-type]


IDS = torch.tensor([3, 3, 0, 7, 7, 7, 12, 39, 0])
OFFSETS = torch.tensor([0, 2, 2, 6])
WEIGHTS = torch.linspace(-1, 1, len(IDS))


@pytest.mark.parametrize(
    ("mode", "arguments", "options"),
    [
        pytest.param(None, (IDS,), {}, id="embedding"),
        pytest.param(None, (IDS.reshape(3, 3).int(),), {"padding_idx": 7}, id="embedding-padded"),
        pytest.param("sum", (IDS, OFFSETS), {}, id="sum"),
        pytest.param("mean", (IDS.reshape(3, 3),), {}, id="mean-2d"),
        pytest.param("mean", (IDS, OFFSETS), {"padding_idx": 3}, id="mean-padded"),
        pytest.param("max", (IDS, OFFSETS), {}, id="max"),
        pytest.param("sum", (IDS, OFFSETS, WEIGHTS), {}, id="weighted"),
        pytest.param("sum", (IDS, torch.tensor([0, 4, 9])), {"include_last_offset": True}, id="last-offset"),
        pytest.param("sum", (IDS[:0], torch.tensor([0, 0])), {}, id="empty"),
    ],
)
def test_outputs_and_steps_are_those_of_torch(mode: str | None, arguments: tuple[Tensor, ...], options: dict[str, int]) -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode, embedding_dim=DIM, **options)  # type: ignore[arg-type]
    reference = of_torch(tables, mode, **options)
    optimizer = torch.optim.SGD(reference.parameters(), lr=tables.rate)
    for step in range(3):
        if mode is None and options:
            tables.weight[options["padding_idx"]] = 0
        factors = torch.arange(1.0, DIM + 1) + step
        ours, theirs = bag(*arguments), reference(*arguments)
        assert torch.equal(ours, theirs)
        (ours * factors).sum().backward()
        optimizer.zero_grad()
        (theirs * factors).sum().backward()
        optimizer.step()
        tables.step()
        assert torch.equal(tables.weight, reference.weight.detach())
    if "padding_idx" in options:
        assert all(options["padding_idx"] not in keys for _, keys, _ in tables.pulls)


def test_each_key_is_pulled_and_pushed_once() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode=None)
    bag(IDS).sum().backward()
    assert tables.pulls == [("item", [3, 0, 7, 12, 39], 0)]
    ((table, keys, gradients),) = tables.taken()
    assert (table, keys.tolist()) == ("item", [3, 0, 7, 12, 39])
    assert np.array_equal(gradients[:, 0], [2, 2, 3, 1, 1])
    assert not tables.taken()  # once


def test_gradients_add_up_until_the_step_in_the_order_in_which_they_came() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    reference = of_torch(tables, "sum")
    passes = 2 * GRADIENTS_MAX + 3
    for number in range(passes):
        ids = torch.tensor([[number % ROWS, 5], [5, 6]])
        for module in (bag, reference):
            (module(ids) * (0.1 + number)).sum().backward()
    total = torch.zeros(ROWS, DIM)
    parts = list(tables.taken())
    assert len(parts) <= GRADIENTS_MAX + 1
    for _, keys, gradients in parts:
        total.index_add_(0, torch.from_numpy(keys.view(np.int64)), torch.from_numpy(gradients))
    torch.testing.assert_close(total, reference.weight.grad, rtol=1e-6, atol=0)


def test_nothing_is_pushed_of_what_was_only_looked_at() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    with torch.no_grad():
        assert not bag(IDS, OFFSETS).requires_grad
    bag(IDS, OFFSETS)  # its loss is never computed
    assert not tables.taken()


def test_the_next_batch_is_asked_for_early_and_used_once() -> None:
    tables = Tables()
    items, users = (ekko.torch.PSEmbeddingBag(tables, table, mode="sum") for table in ("item", "user"))
    batches = [torch.randint(0, ROWS, (4, 3), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    seen = []
    for batch in ekko.torch.prefetched(batches, lambda batch: {items: batch, users: batch}):
        for bag in (items, users):
            assert torch.equal(bag(batch), nn.functional.embedding_bag(batch, tables.weight, mode="sum"))
        seen.append(batch)
    assert [batch.tolist() for batch in seen] == [batch.tolist() for batch in batches]
    assert [ahead for _, _, ahead in tables.pulls] == [0] * 2 + [1] * 6  # nothing was pulled again
    items(batches[0])
    assert tables.pulls[-1][2] == 0


def test_what_was_asked_for_and_never_used_is_forgotten() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    for number in range(3 * AHEAD_MAX):
        bag.prefetch(torch.tensor([[number]]))
    assert len(bag._ahead) == AHEAD_MAX
    bag(torch.tensor([[0]]))
    assert tables.pulls[-1] == ("item", [0], 0)


def test_rows_as_of_a_push_that_was_not_made_are_not_waited_for() -> None:
    """In step with others the servers answer them after it, and it comes after the batch that wants them."""
    tables = Tables()
    tables.mode = "sync"
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    batch = torch.tensor([[1, 2]])
    bag.prefetch(batch)  # for after the next push; gradients are accumulated, or it is discarded
    bag(batch)
    assert [ahead for _, _, ahead in tables.pulls] == [1, 0]
    tables.step()
    bag(batch)
    assert [ahead for _, _, ahead in tables.pulls] == [1, 0], "what was asked for is as of this push"


@pytest.mark.parametrize(("mode", "steps"), [("sync", 2), ("async", AHEAD_MAX + 2)])
def test_rows_of_a_loop_that_was_left_are_not_used_later(mode: str, steps: int) -> None:
    tables = Tables()
    tables.mode = mode
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    batch = torch.tensor([[1, 2]])
    bag.prefetch(batch)
    for _ in range(steps):
        tables.weight += 1
        tables.step()
    assert torch.equal(bag(batch), nn.functional.embedding_bag(batch, tables.weight, mode="sum"))


def test_ids_that_are_written_over_after_they_were_asked_for_are_others() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    ids = torch.tensor([[1, 2]])
    bag.prefetch(ids)
    ids.copy_(torch.tensor([[3, 4]]))  # as loaders do that have one buffer for all batches
    assert torch.equal(bag(ids), nn.functional.embedding_bag(ids, tables.weight, mode="sum"))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_have_a_graph_themselves_are_pushed() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    (bag(IDS, OFFSETS) ** 2).sum().backward(create_graph=True)
    assert len(list(tables.taken())) == 1


def test_a_step_of_the_optimizer_pushes() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    head = nn.Linear(DIM, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    ekko.torch.push_after(optimizer, tables)
    before = tables.weight.clone()
    head(bag(IDS, OFFSETS)).sum().backward()
    optimizer.step()
    touched = (before != tables.weight).any(dim=1).nonzero().reshape(-1).tolist()
    assert touched == [0, 3, 7, 12, 39]
    assert not list(bag.parameters())
    assert not bag.state_dict()


class Scaled:
    """A loop with `GradScaler`, autocast and two batches a step; beside it the same by torch alone."""

    def __init__(self) -> None:
        self.tables = Tables()
        self.bag = ekko.torch.PSEmbeddingBag(self.tables, "item", mode="sum")
        self.theirs = of_torch(self.tables, "sum")
        self.head, self.their_head = (nn.Linear(DIM, 1) for _ in range(2))
        self.their_head.load_state_dict(self.head.state_dict())
        self.scaler, self.their_scaler = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
        self.optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1)
        groups = [{"params": self.their_head.parameters(), "lr": 0.1}, {"params": self.theirs.parameters(), "lr": 0.5}]
        self.their_optimizer = torch.optim.SGD(groups)

    def step(self, factor: float = 1.0, clip: float | None = None) -> bool:
        """`factor`: of the loss' gradients by rows, so that they may overflow alone."""
        self.optimizer.zero_grad()
        self.their_optimizer.zero_grad()
        for ids in (IDS, IDS.flip(0)):
            for bag, head, scaler in ((self.bag, self.head, self.scaler), (self.theirs, self.their_head, self.their_scaler)):
                rows = bag(ids, OFFSETS)
                rows.register_hook(lambda gradient: gradient * factor)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = head(rows).float().square().mean()
                scaler.scale(loss).backward()
        if clip is not None:
            for optimizer, head, scaler in self._both():
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(head.parameters(), clip)
        made = ekko.torch.scaled_step(self.scaler, self.optimizer, self.tables)
        self.their_scaler.step(self.their_optimizer)
        self.scaler.update()
        self.their_scaler.update()
        return made

    def _both(self) -> list[tuple[torch.optim.Optimizer, nn.Linear, torch.amp.GradScaler]]:
        return [(self.optimizer, self.head, self.scaler), (self.their_optimizer, self.their_head, self.their_scaler)]

    def assert_same(self) -> None:
        torch.testing.assert_close(self.tables.weight, self.theirs.weight.detach())
        torch.testing.assert_close(self.head.weight, self.their_head.weight)
        assert self.scaler.get_scale() == self.their_scaler.get_scale()


def test_scaled_steps_are_those_of_torch_also_where_gradients_of_rows_overflow() -> None:
    both = Scaled()
    for factor, made in ((1.0, True), (1e38, False), (1.0, True)):
        assert both.step(factor) == made
        both.assert_same()
    assert both.scaler.get_scale() == 512.0
    assert both.tables.clock == 3, "a step that is skipped is a push of nothing: others may wait for its number"
    assert both.step(clip=0.01)
    both.assert_same()


def test_a_scaler_that_has_looked_before_is_not_shown_an_overflow_of_rows_as_a_gradient() -> None:
    both = Scaled()
    rows, weight = both.tables.weight.clone(), both.head.weight.detach().clone()
    assert both.step(1e38, clip=0.01)
    assert torch.equal(both.tables.weight, rows)
    assert 0 < (both.head.weight - weight).abs().max() < 0.01


def test_a_scaler_that_is_not_enabled_leaves_steps_as_they_are() -> None:
    both = Scaled()
    both.scaler, both.their_scaler = (torch.amp.GradScaler("cpu", enabled=False) for _ in range(2))
    assert both.step()
    both.assert_same()


def test_a_fused_optimizer_that_skips_a_step_by_itself_has_no_rows_pushed() -> None:
    both = Scaled()
    both.optimizer = torch.optim.SGD(both.head.parameters(), lr=0.1, fused=True)
    rows, weight = both.tables.weight.clone(), both.head.weight.detach().clone()
    both.scaler.scale(both.head(both.bag(IDS, OFFSETS)).sum()).backward()
    assert both.head.bias.grad is not None
    both.head.bias.grad.fill_(torch.inf)
    assert not ekko.torch.scaled_step(both.scaler, both.optimizer, both.tables)
    assert torch.equal(both.head.weight, weight)
    assert torch.equal(both.tables.weight, rows)


def test_a_scaled_step_is_not_pushed_as_it_is() -> None:
    both = Scaled()
    ekko.torch.push_after(both.optimizer, both.tables)
    before = both.tables.weight.clone()
    both.scaler.scale(both.head(both.bag(IDS, OFFSETS)).sum()).backward()
    with pytest.raises(ModelError, match=r"comes from a GradScaler.*call ekko.torch.scaled_step\(scaler, optimizer, client\)"):
        both.scaler.step(both.optimizer)
    assert torch.equal(both.tables.weight, before)
    assert not list(both.tables.taken())


def test_compiled_models_pull_and_push() -> None:
    tables = Tables()
    bag = ekko.torch.PSEmbeddingBag(tables, "item", mode="sum")
    compiled = torch.compile(nn.Sequential(bag, nn.ReLU()), backend="eager")
    ids = IDS.reshape(3, 3)
    assert torch.equal(compiled(ids), nn.functional.embedding_bag(ids, tables.weight, mode="sum").relu())
    compiled(ids).sum().backward()
    assert len(list(tables.taken())) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"table": "films"}, "unknown table 'films': the servers have 'item', 'user'"),
        ({"mode": "median"}, "mode is 'median'"),
        ({"embedding_dim": 5}, "embedding_dim is 5, and table 'item' has dim 6"),
        ({"padding_idx": -1}, "padding_idx is -1"),
        ({"mode": None, "include_last_offset": True}, "include_last_offset is about bags"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_said(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        ekko.torch.PSEmbeddingBag(Tables(), **{"table": "item", **options})  # type: ignore[arg-type]


def test_ids_that_are_none_are_said() -> None:
    bag = ekko.torch.PSEmbeddingBag(Tables(), "item", mode=None)
    with pytest.raises(ModelError, match=r"ids have dtype torch.float32: expected torch.int64 or torch.int32"):
        bag(torch.tensor([1.5]))
    with pytest.raises(ModelError, match="offsets and per_sample_weights are about bags"):
        bag(IDS, OFFSETS)


def test_the_client_is_what_a_bag_asks_for() -> None:
    assert {"tables", "mode", "clock", "pull_async", "attach", "step", "finite", "discard"} <= set(dir(Client))
    assert hasattr(GradientSource, "take")
