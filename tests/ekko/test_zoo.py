"""DLRM: what it computes, that its gradients are right and sparse, and that it learns."""

import pytest
import torch

from ekko.zoo import DLRM, DLRMOptions

OPTIONS = DLRMOptions(rows={"user": 7, "item": 11}, dense=3, dim=4, bottom=(5,), top=(6,))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows


def batch(size: int, options: DLRMOptions = OPTIONS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.randn(size, options.dense), {name: torch.randint(rows, (size,)) for name, rows in options.rows.items()}


def test_forward_is_the_papers_formula() -> None:
    model = DLRM(OPTIONS)
    dense, ids = batch(9)
    expected = []
    for row in range(9):
        bottom = model.bottom(dense[row])
        user, item = (model.tables[name].weight[ids[name][row]] for name in ("user", "item"))
        dots = torch.stack([user @ bottom, item @ bottom, item @ user])
        expected.append(model.top(torch.cat([bottom, dots])))
    torch.testing.assert_close(model(dense, ids), torch.cat(expected))


def test_rows_from_outside_give_the_same_logits_without_tables() -> None:
    model, server = DLRM(OPTIONS), DLRM(OPTIONS, with_tables=False)
    assert server.load_state_dict(model.state_dict(), strict=False).unexpected_keys == [
        "tables.user.weight",
        "tables.item.weight",
    ]
    dense, ids = batch(9)
    assert torch.equal(server(dense, embeddings=model.embed(ids)), model(dense, ids))


def test_gradients_agree_with_finite_differences() -> None:
    model = DLRM(OPTIONS).double()
    dense, ids = batch(4)
    dense = dense.double().requires_grad_()
    rows = model.embed(ids).detach().requires_grad_()
    weights = [weight.detach().clone().requires_grad_() for weight in (model.bottom[0].weight, model.top[0].weight)]

    def logits(dense: torch.Tensor, rows: torch.Tensor, bottom: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        changed = {"bottom.0.weight": bottom, "top.0.weight": top}
        return torch.func.functional_call(model, changed, (dense,), {"embeddings": rows})

    assert torch.autograd.gradcheck(logits, (dense, rows, *weights))


def test_table_gradients_are_sparse_and_touch_only_looked_up_rows() -> None:
    model = DLRM(OPTIONS)
    dense, ids = batch(5)
    model(dense, ids).sum().backward()
    for name, table in model.tables.items():
        gradient = table.weight.grad
        assert gradient.is_sparse
        assert set(gradient.coalesce().indices()[0].tolist()) == set(ids[name].tolist())


def test_it_learns_an_interaction() -> None:
    model = DLRM(DLRMOptions(rows={"user": 8, "item": 8}, dense=1, dim=8, bottom=(8,), top=(16,)))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ids = {"user": torch.arange(64) // 8, "item": torch.arange(64) % 8}
    dense, labels = torch.ones(64, 1), ((ids["user"] + ids["item"]) % 2).float()
    for _ in range(200):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, ids), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_tracked_names_the_tables() -> None:
    model = DLRM(OPTIONS)
    assert model.tracked == {"tables.user": "user", "tables.item": "item"}
    assert all(isinstance(model.get_submodule(name), torch.nn.Embedding) for name in model.tracked)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param({"rows": {}}, "at least one embedding table", id="no-table"),
        pytest.param({"rows": {"user": 0}}, "rows\\['user'\\] is 0", id="empty-table"),
        pytest.param({"dense": 0}, "dense is 0", id="no-dense"),
        pytest.param({"top": (8, 0)}, "top\\[1\\] is 0", id="empty-layer"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DLRMOptions(**{"rows": {"user": 3}, "dense": 2, **change})


def test_ids_or_embeddings_but_not_both() -> None:
    model = DLRM(OPTIONS)
    dense, ids = batch(2)
    with pytest.raises(ValueError, match="either ids or embeddings"):
        model(dense)
    with pytest.raises(ValueError, match="either ids or embeddings"):
        model(dense, ids, embeddings=model.embed(ids))
