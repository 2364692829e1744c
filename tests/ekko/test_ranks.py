"""Which part a rank publishes, and what it does with a rollback; without other ranks. Real ones: `test_ranks_processes.py`."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ekko.torch
from ekko.errors import ModelError
from ekko.restored import Restored
from ekko.torch.checkpoint import ENTRY, Saved
from ekko.torch.ranks import (
    WHOLE,
    Part,
    PartPublisher,
    broadcast_bytes,
    divided,
    gathered,
    packed,
    part_of,
    reduced_tables,
    unpacked,
)
from tests.ekko.test_torch import TABLES, Recorder, Toy, adagrad, recorder, train
from tests.ekko.test_torch_reload import RolledBack, users


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@given(st.lists(st.integers(0, 2**64 - 1), max_size=200), st.integers(1, 9))
def test_each_key_is_one_ranks(keys: list[int], count: int) -> None:
    columns = np.array(keys, np.uint64)
    mine = [Part(rank, count).mine(columns) for rank in range(count)]
    assert (np.sum(mine, axis=0) == 1).all()


def test_parts_are_about_as_large_as_each_other() -> None:
    keys = np.arange(30_000, dtype=np.uint64)
    sizes = [int(Part(rank, 3).mine(keys).sum()) for rank in range(3)]
    assert min(sizes) > 0.95 * max(sizes)


def test_what_all_ranks_publish_of_a_step_is_what_it_changed_and_dense_parameters_are_rank_0s() -> None:
    publishers = [recorder() for _ in range(3)]
    for rank, publisher in enumerate(publishers):
        torch.manual_seed(0)  # what DDP sees to
        model = Toy()
        divided = PartPublisher(publisher, Part(rank, 3), frozenset(TABLES.values()))
        optimizer = adagrad(model)
        ekko.torch.track(model, optimizer, divided, TABLES, dense_every=1, background=False)
        train(model, optimizer, [1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    rows = [{table: list(step.rows.get(table, {})) for table in TABLES.values()} for [step] in (p.steps for p in publishers)]
    assert sorted(key for one in rows for key in one["users"]) == [1, 2, 3, 4, 5]
    assert sorted(key for one in rows for key in one["items"]) == [6, 7, 8, 9, 10]
    assert [bool(publisher.steps[0].dense) for publisher in publishers] == [True, False, False]


def test_ranks_that_would_number_keys_each_for_itself_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    weights = {"users": model.user.weight}
    assert divided("a publisher", model, weights, mapped=["users"]) == "a publisher"
    monkeypatch.setattr("ekko.torch.ranks.part_of", lambda *_: Part(0, 2))
    with pytest.raises(ModelError, match="table 'users' has a key map, and 2 ranks train it"):
        divided("a publisher", model, weights, mapped=["users"])


@pytest.mark.usefixtures("_one_rank")
def test_who_is_no_member_of_the_group_is_told() -> None:
    other = dist.GroupMember.NON_GROUP_MEMBER  # what `new_group` gives to who is not in it
    model = Toy()
    with pytest.raises(ModelError, match="this process is no member of process_group: pass a group that it belongs to"):
        ekko.torch.track(model, adagrad(model), recorder(), TABLES, process_group=other)


@pytest.mark.usefixtures("_one_rank")
def test_ddp_is_found_and_says_which_weights_are_reduced() -> None:
    model = Toy()
    assert part_of(model) == WHOLE
    assert reduced_tables(model, {"users": model.user.weight}) == {"users"}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["item.weight"])
    parallel = DistributedDataParallel(model)
    outer = nn.Sequential(parallel, nn.Embedding(3, 4))
    assert part_of(outer) == Part(0, 1)
    weights = {"users": model.user.weight, "items": model.item.weight, "others": outer[1].weight}
    assert reduced_tables(outer, weights) == {"users"}
    assert reduced_tables(outer, weights, dist.group.WORLD) == set(weights)
    part = part_of(outer)
    assert broadcast_bytes(part, b"what rank 0 says") == b"what rank 0 says"

    assert gathered(part, [1, 2]).tolist() == [[1, 2]]


def test_what_was_restored_comes_to_other_ranks_as_it_was() -> None:
    one = users()
    restored = (Restored(one.table, one.keys, one.rows, one.deleted, ("top.weight",)),)
    [back] = unpacked(packed(restored))
    assert (back.table, back.tensors) == (one.table, ("top.weight",))
    for name in ("keys", "rows", "deleted"):
        assert np.array_equal(getattr(back, name), getattr(one, name))


def test_one_rank_alone_does_not_load_what_a_rollback_restored() -> None:
    model, publisher = Toy(), RolledBack()
    optimizer = adagrad(model)
    divided = PartPublisher(publisher, Part(0, 2), frozenset(TABLES.values()))
    with_parts = ekko.torch.track(model, optimizer, divided, TABLES, background=False)
    publisher.pending = (users(),)
    before = model.user.weight.detach().clone()
    for _ in range(2):  # it stays so, though the publisher itself would take steps again
        with pytest.raises(ModelError, match="2 ranks train it: let all of them end"):
            train(model, optimizer, [3], [7])
    assert not torch.equal(before, model.user.weight), "it trained"
    assert not publisher.steps
    with_parts.remove()


@pytest.mark.parametrize(
    "state",
    [
        7,
        {"format": 2},
        {"format": 1, "model": "ctr", "stamp": -1, "epoch": 0, "ranks": 1},
        {"format": 1, "model": "ctr", "stamp": "x", "epoch": 0, "ranks": 1},
        {"format": 1, "model": "ctr", "stamp": 1, "epoch": 0, "ranks": 0},
        {"format": 1, "model": "ctr", "stamp": 1},
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(state: object) -> None:
    with pytest.raises(ModelError, match=f"entry '{ENTRY}'"):
        Saved.of_state(state)


def test_what_a_checkpoint_says_comes_back() -> None:
    saved = Saved("ctr", 1 << 60, 3, 2)
    assert Saved.of_state(saved.to_state()) == saved
    assert Saved.of_state(None) == Saved()


def test_a_checkpoint_hook_wants_a_reader() -> None:
    model = Toy()
    optimizer = adagrad(model)
    tracker = ekko.torch.track(model, optimizer, Recorder({"users": 4, "items": 4}), TABLES, background=False)
    with pytest.raises(ModelError, match="no reader"):
        ekko.torch.checkpoint_hook(tracker, optimizer)
    with pytest.raises(ModelError, match="expected 'raise' or 'accept'"):
        ekko.torch.checkpoint_hook(tracker, optimizer, unreachable="ignore")  # type: ignore[arg-type]
