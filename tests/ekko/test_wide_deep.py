"""Wide & Deep: what it computes, that its gradients are right and sparse, what each side learns, and how it grows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ekko.zoo import FTRL, WideDeep, WideDeepOptions, warm_start

OPTIONS = WideDeepOptions(
    rows={"user": 7, "item": 11}, crosses=(("user",), ("user", "item")), cross_rows=64, dense=3, dim=4, hidden=(16, 8)
)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(size: int, options: WideDeepOptions = OPTIONS) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(size, options.dense), {name: torch.randint(rows, (size,)) for name, rows in options.rows.items()}


def optimizers_of(model: WideDeep, l1: float = 0.1) -> tuple[FTRL, torch.optim.Adagrad]:
    return FTRL(model.wide_parameters, lr=0.5, l1=l1), torch.optim.Adagrad(model.deep_parameters, lr=0.02)


def train(model: WideDeep, optimizers: tuple[torch.optim.Optimizer, ...], events: Any, labels: Tensor) -> float:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = binary_cross_entropy_with_logits(model(*events), labels, reduction="sum")
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item() / len(labels)


def random_wide(model: WideDeep) -> WideDeep:
    """The wide side begins with zeros, which show nothing."""
    assert model.wide is not None
    torch.nn.init.normal_(model.wide.weight)
    return model


def test_forward_is_the_papers_formula() -> None:
    model = random_wide(WideDeep(OPTIONS))
    assert model.wide is not None
    dense, ids = batch(9)
    wide_ids = model.wide_ids(ids)
    expected = []
    for row in range(9):
        user, item = (model.tables[name].weight[ids[name][row]] for name in ("user", "item"))
        wide = sum(model.wide.weight[number, 0] for number in wide_ids[row])
        expected.append(model.deep(torch.cat([dense[row], user, item])) + wide)
    torch.testing.assert_close(model(dense, ids), torch.cat(expected))


def test_a_cross_has_a_part_of_the_table_and_spreads_over_it() -> None:
    options = replace(OPTIONS, rows={"user": 50, "item": 40}, crosses=(("user", "item"), ("item", "user"), ("item",)))
    users, items = torch.arange(2000) // 40, torch.arange(2000) % 40
    ids = WideDeep(options).wide_ids({"user": users, "item": items})
    for place in range(3):
        assert (ids[:, place] // options.cross_rows == place).all()
    counts = torch.bincount(ids[:, 0], minlength=64).double()
    assert ((counts - 2000 / 64) ** 2 / (2000 / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)
    assert (ids[:, 0] != ids[:, 1] - 64).double().mean() > 0.9, "the order of features is part of the cross"
    assert len(ids[:, 2].unique()) > 25  # of 40 ids in 64 rows
    torch.testing.assert_close(ids, WideDeep(options, with_tables=False).wide_ids({"user": users, "item": items}))


def test_rows_of_the_wide_table_are_these_for_ever() -> None:
    """They are keys of published rows: another hash would have old weights answer for other pairs."""
    ids = {"user": torch.tensor([0, 1, 6, 1 << 40]), "item": torch.tensor([0, 10, 3, 5])}
    assert WideDeep(OPTIONS, with_tables=False).wide_ids(ids).tolist() == WIDE_IDS


WIDE_IDS = [[42, 111], [21, 105], [34, 120], [31, 100]]


def test_rows_from_outside_give_the_same_logits_without_tables() -> None:
    model, server = random_wide(WideDeep(OPTIONS)), WideDeep(OPTIONS, with_tables=False)
    assert model.wide is not None
    assert set(server.load_state_dict(model.state_dict(), strict=False).unexpected_keys) == {
        "tables.user.weight",
        "tables.item.weight",
        "wide.weight",
    }
    dense, ids = batch(9)
    weights = model.wide(server.wide_ids(ids)).squeeze(2)
    assert torch.equal(server(dense, embeddings=model.embed(ids), weights=weights), model(dense, ids))


def test_gradients_agree_with_finite_differences() -> None:
    model = random_wide(WideDeep(OPTIONS)).double()
    assert model.wide is not None
    dense, ids = batch(4)
    dense = dense.double().requires_grad_()
    rows = model.embed(ids).detach().requires_grad_()
    weights = model.wide(model.wide_ids(ids)).squeeze(2).detach().requires_grad_()
    layers = {name: value.detach().clone().requires_grad_() for name, value in model.deep.named_parameters(prefix="deep")}

    def logits(dense: Tensor, rows: Tensor, weights: Tensor, *values: Tensor) -> Any:
        changed = dict(zip(layers, values, strict=True))
        return torch.func.functional_call(model, changed, (dense,), {"embeddings": rows, "weights": weights})

    assert torch.autograd.gradcheck(logits, (dense, rows, weights, *layers.values()))


def test_sparse_gradients_of_tables_agree_with_finite_differences() -> None:
    """Through the hash and the look-ups, where several events share a row."""
    model = random_wide(WideDeep(replace(OPTIONS, cross_rows=4))).double()
    dense, ids = batch(12)
    labels = torch.randint(2, (12,)).double()

    def loss() -> Tensor:
        return binary_cross_entropy_with_logits(model(dense.double(), ids), labels)

    loss().backward()
    for name in model.tracked:
        weight = model.get_submodule(name).get_parameter("weight")
        assert weight.grad is not None
        assert weight.grad.is_sparse
        gradient, step = weight.grad.to_dense(), 1e-6
        with torch.no_grad():
            for place in range(weight.numel()):
                flat = weight.view(-1)
                flat[place] += step
                above = loss()
                flat[place] -= 2 * step
                below = loss()
                flat[place] += step
                assert abs((above - below) / (2 * step) - gradient.view(-1)[place]) < 1e-8


def test_the_wide_side_learns_what_no_embedding_this_small_can() -> None:
    """A random label for each pair of 24 x 24 ids, and one that follows from the user's group: facts, and a rule."""
    options = WideDeepOptions(
        rows={"user": 24, "item": 24}, crosses=(("user", "item"),), cross_rows=1 << 14, dense=1, dim=2, hidden=(4,)
    )
    ids = {"user": torch.arange(576) // 24, "item": torch.arange(576) % 24}
    dense, labels = torch.ones(576, 1), torch.randint(2, (576,), generator=torch.Generator().manual_seed(5)).float()
    model = WideDeep(options)
    optimizers = optimizers_of(model)
    together = [train(model, optimizers, (dense, ids), labels) for _ in range(150)][-1]
    alone = WideDeep(options)
    deep = torch.optim.Adagrad(alone.deep_parameters, lr=0.05)
    deep_only = [train(alone, (deep,), (dense, ids), labels) for _ in range(150)][-1]
    assert together < 0.1
    assert deep_only > 0.4


def test_l1_leaves_most_of_the_wide_side_at_zero() -> None:
    options = replace(OPTIONS, rows={"user": 20, "item": 20}, crosses=(("user", "item"),), cross_rows=1 << 12)
    generator = torch.Generator().manual_seed(1)

    def events() -> tuple[tuple[Tensor, dict[str, Tensor]], Tensor]:
        ids = {name: torch.randint(20, (256,), generator=generator) for name in options.rows}
        liked = (ids["user"] < 3) & (ids["item"] < 3)  # these pairs matter, and all others are noise
        noise = torch.rand(256, generator=generator) < 0.5
        return (torch.zeros(256, 3), ids), torch.where(liked, 1.0, noise.float())

    zeros = {}
    for l1 in (0.0, 8.0):
        model = WideDeep(options)
        optimizers = optimizers_of(model, l1)
        for _ in range(60):
            train(model, optimizers, *events())
        pairs = {"user": torch.arange(400) // 20, "item": torch.arange(400) % 20}
        assert model.wide is not None
        weights = model.wide(model.wide_ids(pairs)).view(20, 20).detach()
        zeros[l1] = (weights == 0).double().mean().item()
    assert zeros[0.0] < 0.2
    assert zeros[8.0] > 0.8
    assert (weights[:3, :3] > 0).sum() > 6


def trained(options: WideDeepOptions = OPTIONS) -> tuple[WideDeep, tuple[FTRL, torch.optim.Adagrad]]:
    model = WideDeep(options)
    optimizers = optimizers_of(model)
    for _ in range(20):
        train(model, optimizers, batch(32, options), torch.randint(2, (32,)).float())
    return model, optimizers


GROWN = replace(
    OPTIONS,
    rows={"genre": 5, "user": 20, "item": 11},
    crosses=(("user", "genre"), ("user", "item"), ("user",)),
    cross_rows=192,
)


def test_a_model_that_grows_begins_with_the_old_ones_logits() -> None:
    old, _ = trained()
    new = WideDeep(GROWN)
    warm_start(new, old)
    dense, ids = batch(50)
    more = ids | {"genre": torch.randint(5, (50,))}
    torch.testing.assert_close(new(dense, more), old(dense, ids))


def test_and_takes_the_old_ones_steps() -> None:
    roomy = replace(OPTIONS, cross_rows=1 << 16)  # no two pairs share a row, which they would no longer do in the larger table
    old, old_optimizers = trained(roomy)
    options = replace(roomy, rows={"item": 12, "user": 20}, cross_rows=1 << 17)
    new, cold = WideDeep(options), WideDeep(options)
    optimizers = optimizers_of(new)
    warm_start(new, old, zip(optimizers, old_optimizers, strict=True))
    warm_start(cold, old)
    for step in range(3):
        events, labels = batch(32), torch.randint(2, (32,)).float()
        train(old, old_optimizers, events, labels)
        train(new, optimizers, events, labels)
        torch.testing.assert_close(new(*events), old(*events))
        if step == 0:
            train(cold, optimizers_of(cold), events, labels)
            moved = (cold(*events) - old(*events)).abs().mean().item()
    assert moved > 0.05, "without the memory the first step goes further"


def test_what_is_new_learns() -> None:
    old, _ = trained()
    new = WideDeep(GROWN)
    warm_start(new, old)
    optimizers = optimizers_of(new)
    genre = new.tables["genre"].weight.detach().clone()
    for _ in range(5):
        train(new, optimizers, batch(32, GROWN), torch.randint(2, (32,)).float())
    assert (new.tables["genre"].weight != genre).any(dim=1).sum() == 5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dim": 8}, "dim is 8, and was 4: expected the same"),
        ({"hidden": (6,)}, "hidden is .6,., and was .16, 8.: expected the same"),
        ({"rows": {"user": 6, "item": 11}}, "table 'user' has 6 rows, and had 7"),
        ({"rows": {"user": 7, "shop": 11}, "crosses": (("user",),)}, "table 'item' has 0 rows, and had 11"),
        ({"crosses": (("user",),)}, "crosses has no .'user', 'item'. any more"),
        ({"cross_rows": 96}, "cross_rows is 96, and was 64: expected a whole number of times"),
    ],
)
def test_what_has_no_place_in_the_new_model_is_refused(change: dict[str, Any], complaint: str) -> None:
    new = WideDeep(replace(OPTIONS, **change))
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(ValueError, match=complaint):
        warm_start(new, WideDeep(OPTIONS))
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def test_optimizers_of_two_kinds_do_not_take_over_from_each_other() -> None:
    new, old = WideDeep(OPTIONS), WideDeep(OPTIONS)
    ftrl, adagrad = optimizers_of(new)
    with pytest.raises(ValueError, match="are a FTRL and a Adagrad"):
        warm_start(new, old, [(ftrl, adagrad)])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": {}}, "at least one feature"),
        ({"crosses": ()}, "one cross"),
        ({"crosses": ("user",)}, "crosses has 'user': expected a tuple"),
        ({"crosses": (("user", "shop"),)}, "of which there are .'user', 'item'."),
        ({"crosses": (("user",), ("user",))}, "one twice"),
        ({"cross_rows": 0}, "cross_rows is 0"),
        ({"hidden": (3, 0)}, "hidden.1. is 0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(OPTIONS, **change)


def test_ids_or_rows_but_not_both() -> None:
    model = WideDeep(OPTIONS)
    dense, ids = batch(2)
    rows = model.embed(ids)
    for arguments in ({}, {"embeddings": rows}, {"ids": ids, "embeddings": rows, "weights": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="either ids"):
            model(dense, **arguments)
    with pytest.raises(ValueError, match="without tables"):
        WideDeep(OPTIONS, with_tables=False)(dense, ids)


def test_tracked_names_the_tables() -> None:
    model = WideDeep(OPTIONS)
    assert model.tracked == {"wide": "wide", "tables.user": "user", "tables.item": "item"}
    for name, table in model.tracked.items():
        assert model.get_submodule(name).embedding_dim == model.table_dims[table]  # type: ignore[comparison-overlap]
    parameters = [*model.wide_parameters, *model.deep_parameters]
    assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))
