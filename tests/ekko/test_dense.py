"""Dense parameters on their way: when a version is due, and that what is sent of it makes every replica's what they are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ekko.torch.outbox
from ekko.errors import ModelError, PublishError
from ekko.model import DENSE_DIM, TensorSpec
from ekko.torch.capture import TrackedTable
from ekko.torch.dense import WHOLE_EVERY, Cadence, DenseParameters
from ekko.torch.noting import Capture
from ekko.torch.outbox import Outbox
from ekko.train.step import Step


class Node:
    """A publisher whose steps are real ones, and whose node is a dict of rows."""

    def __init__(self) -> None:
        self.tables: dict[str, int] = {}
        self.codec = "float32"
        self.openings = 1
        self.rows: dict[int, np.ndarray] = {}
        self.sent: list[int] = []  # rows of each step
        self.refuses = False

    def step(self) -> Step:
        return Step(self, copy=True)  # type: ignore[arg-type] - all that a step asks of a publisher

    def tensor_spec(self, name: str, array: np.ndarray) -> TensorSpec:
        return TensorSpec(name, array.shape, array.dtype.name)

    def table_number(self, table: str) -> int:
        assert table == "_dense"
        return 0

    def _commit(self, step: Step, _: int) -> int:
        if self.refuses:
            raise PublishError("refused")
        [(column, _)] = step.columns()
        self.rows |= dict(zip(column.keys.tolist(), column.rows.copy().view(np.float32), strict=True))
        self.sent.append(len(column.keys))
        return len(self.sent)

    def dense(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        spec = TensorSpec(name, shape, "float32")
        rows = np.array([self.rows[key] for key in spec.keys.tolist()])
        return rows.reshape(-1)[: int(np.prod(shape))].reshape(shape)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(40, 64)
        self.free = nn.Linear(40, 64)
        self.norm = nn.BatchNorm1d(64)
        self.scratch = nn.Parameter(torch.zeros(3))
        self.register_buffer("derived", torch.ones(2), persistent=False)


def assert_same(node: Node, model: nn.Module, names: tuple[str, ...]) -> None:
    state = model.state_dict()
    for name in names:
        assert np.array_equal(node.dense(name, tuple(state[name].shape)), state[name].numpy()), name


def of(model: nn.Module, every: int | str | None = None) -> DenseParameters:
    return DenseParameters(model, [], every, now_s=0.0)


@pytest.mark.parametrize(
    ("every", "times", "due"),
    [
        (3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [False, False, True, False, False, True]),
        ("1s", [0.4, 0.9, 1.0, 1.9, 2.1, 9.0, 9.5], [False, False, True, False, True, True, False]),
        ("250ms", [0.1, 0.26, 0.3], [False, True, False]),
    ],
)
def test_a_version_is_due_every_so_many_steps_or_so_often(every: int | str, times: list[float], due: list[bool]) -> None:
    cadence = Cadence(every, 0.0)
    assert [cadence.is_due(steps, now) for steps, now in enumerate(times, start=1)] == due


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "", "s", "2", "0s", "2 s", "-1s", "1e3s", "25h", "1d"])
def test_what_is_no_cadence_is_refused(every: object) -> None:
    with pytest.raises(ModelError, match=r"dense_every is .*: expected a number of steps from 1, a time such as"):
        Cadence(every, 0.0)  # type: ignore[arg-type]


def test_parameters_and_buffers_of_the_state_dict_are_published_and_others_are_not() -> None:
    table = nn.Embedding(3, 2)
    model = nn.ModuleDict({"layers": Layers(), "table": table})
    names = DenseParameters(model, [table.weight], None, 0.0).names
    state = {name for name in model.state_dict() if name not in ("table.weight", "layers.norm.num_batches_tracked")}
    assert set(names) == state
    assert {"layers.norm.running_mean", "layers.norm.running_var"} <= state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_exactly(dtype: torch.dtype) -> None:
    model = nn.Linear(300, 3).to(dtype)
    dense, node = of(model), Node()
    with node.step() as step:
        dense.add_to(step, dense.take())
    assert torch.equal(torch.from_numpy(node.dense("weight", (3, 300))).to(dtype), model.weight)


def test_what_float32_does_not_hold_is_refused() -> None:
    for model in (
        nn.Linear(2, 2, dtype=torch.float64),
        nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.int64), False)]),
    ):
        with pytest.raises(ModelError, match=r"has dtype torch\.(float64|int64): only torch.float32"):
            of(model, "2s")
        with pytest.raises(ModelError, match=r"has dtype"):
            of(model).demand()


@given(st.data())
def test_differences_make_of_a_replica_what_the_trainer_has(data: st.DataObject) -> None:
    """Whatever changes, and whichever versions are refused."""
    shapes = {"matrix": (9, 100), "bias": (7,), "scalar": (), "none": (0, 4), "even": (2, DENSE_DIM)}
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
    dense, node = of(model), Node()
    for _ in range(data.draw(st.integers(1, 12))):
        name = data.draw(st.sampled_from(sorted(shapes)))
        flat = model[name].data.view(-1)
        for place in data.draw(st.lists(st.integers(0, max(0, len(flat) - 1)), max_size=3)):
            flat[place : place + 1] = data.draw(st.sampled_from([0.0, -0.0, 1.0, 2.0]))
        node.refuses = data.draw(st.booleans())
        version = dense.take()
        try:
            with node.step() as step:
                dense.add_to(step, version)
            dense.published(version, node.openings)
        except PublishError:
            dense.failed()
            assert dense.due
            continue
        for name, shape in shapes.items():
            if 0 not in shape:
                assert node.dense(name, shape).tobytes() == model[name].detach().numpy().tobytes(), name


def test_of_what_did_not_change_only_the_first_rows_go() -> None:
    model, node = Layers(), Node()
    dense = of(model, 1)
    whole = sum(TensorSpec(name, tuple(model.state_dict()[name].shape), "float32").rows for name in dense.names)
    for _ in range(WHOLE_EVERY + 1):
        for value in (*model.free.parameters(), *model.norm.parameters(), model.norm.running_mean, model.norm.running_var):
            value.data += 1
        dense.steps += 1
        assert dense.due
        assert dense.unsent
        version = dense.take()
        with node.step() as step:
            dense.add_to(step, version)
        dense.published(version, node.openings)
        assert not dense.due
        assert not dense.unsent
        assert_same(node, model, dense.names)
    assert node.sent[0] == node.sent[WHOLE_EVERY] == whole  # again, lest a node that lost some goes without
    assert set(node.sent[1:WHOLE_EVERY]) == {whole - (10 - 1)}  # frozen.weight has 40 * 64 values: ten rows


def test_planted_bug_a_version_that_failed_counts_as_what_the_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule: after a call that failed nobody knows what the node has, so that the next version is whole."""

    def replica_is_right() -> bool:
        model, node = nn.Linear(600, 1), Node()
        dense = of(model)
        for value in (0.0, 1.0, 0.0):  # the second is stored, though its call fails
            model.weight.data.fill_(value)
            version = dense.take()
            with node.step() as step:
                dense.add_to(step, version)
            dense.failed() if value else dense.published(version)
        return bool((node.dense("weight", (1, 600)) == 0.0).all())

    assert replica_is_right()
    monkeypatch.setattr(DenseParameters, "failed", lambda self: None)
    assert not replica_is_right()


def test_a_node_that_lost_its_memory_gets_all_with_the_next_step() -> None:
    model, node = nn.Linear(900, 1), Node()
    dense = of(model)
    for opening in (1, 1, 2, 2):
        node.openings = opening
        version = dense.take()
        with node.step() as step:
            dense.add_to(step, version)
        dense.published(version, opening)
        assert dense.due == (opening == 2 and len(node.sent) == 3)
    assert node.sent == [5, 2, 2, 5]


def test_a_publisher_that_knows_no_differences_gets_tensors_whole() -> None:
    class Plain:
        def __init__(self) -> None:
            self.names: list[str] = []

        def publish_dense(self, name: str, array: np.ndarray) -> None:
            self.names.append(name)

    dense = of(nn.Linear(2, 2))
    for _ in range(3):
        step, version = Plain(), dense.take()
        dense.add_to(step, version)
        dense.published(version)
        assert step.names == ["weight", "bias"]


def test_before_has_to_have_the_tensors_shape() -> None:
    with (
        pytest.raises(ModelError, match=r"tensor 'w' has shape \(4,\), and before that \(5,\): publish it whole"),
        Node().step() as step,
    ):
        step.publish_dense_changes("w", np.zeros(4, np.float32), np.zeros(5, np.float32))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_dense_parameters_go_with_all_rows_that_are_due(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows are compared, and go in several batches: beside older rows they would be newer than those."""
    model = nn.ModuleDict({"item": nn.Embedding(100, 4, sparse=momentum == 0), "top": nn.Linear(4, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    table = TrackedTable("item", model["item"], [optimizer])
    dense = DenseParameters(model, [model["item"].weight], 1, 0.0)
    outbox = Outbox([table], dense, Node(), says_significance=True)
    monkeypatch.setattr(ekko.torch.outbox, "PUT_OFF_MAX", 3)

    def step() -> None:
        optimizer.zero_grad()
        model["top"](model["item"](torch.arange(100))).sum().backward()
        optimizer.step()
        Capture(optimizer, [table]).stepped()
        dense.steps += 1

    def batches(count: int, bytes_max: int) -> list[tuple[int, bool]]:
        """Rows of each, and whether dense parameters are with them."""
        taken = [outbox.take(bytes_max) for _ in range(count)]
        return [(sum(len(part.ids) for part in batch.parts), batch.version is not None) for batch in taken if batch is not None]

    step()
    assert batches(3, 16 * 40) == [(40, False), (40, False), (20, True)]  # a row has 16 bytes
    step()
    assert batches(1, 16 * 100) == [(100, True)]
    for _ in range(3):  # they are never reached
        step()
        assert batches(1, 16 * 10) == [(10, False)]
    step()
    assert batches(1, 16 * 10) == [(100, True)]
