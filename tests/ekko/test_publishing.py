"""Publishers and the models that they opened: what was dropped since is never written to, whatever has its name by then."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ekko
from ekko.errors import ModelError
from ekko.generations import Alias, Generation
from ekko.loading import LoadRequest
from ekko.local import (
    Failed,
    Held,
    Open,
    Opened,
    PublishStep,
    Stored,
    Wait,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from ekko.node.publishing import Publishing
from ekko.node.restored import RestoredRows
from ekko.store import Store
from p2p import messages as m
from p2p.messages import Scope
from tests.ekko.test_publisher import address_of, serving

NODE: Any = SimpleNamespace(id="n1", region="eu", role="train")
DIMS = {"item": 2, "user": 3}


class Node:
    """The publishers' side of a node, over a store in memory; steps are applied, and nobody else hears of them."""

    def __init__(self) -> None:
        self.store = Store.anonymous()
        self.stamp = 1 << 30
        self.fences: list[m.Fence] = []
        restored = RestoredRows(lambda _: self.fences, lambda *_: [])
        self.publishing = Publishing(NODE, self.store, self.submit, lambda: 2, restored)
        self.answer: Any = None

    def submit(self, event: m.PublishRequested | m.WaitRequested | m.AboveRequested | m.SchemaChanged) -> Failed | None:
        if isinstance(event, m.PublishRequested):
            self.stamp += 1 << 12
            model = next(model for model in self.store.models.values() if model.keyspace == event.keyspace)
            model.apply(event.columns, self.stamp)
            self.answer(event.request, Stored(self.stamp))
        return None

    def rows(self, table: str, *keys: int) -> list[list[float]]:
        return self.store.models["ctr"].lookup(table, np.array(keys, np.uint64))[0].tolist()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node()
    with serving(node.publishing, tmp_path) as endpoint:
        node.answer = endpoint.answer
        yield node


def ones(table: str, value: float = 1.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full((1, DIMS[table]), value, np.float32)


def opened(folder: Path) -> ekko.Publisher:
    return ekko.Publisher(address_of(folder), "ctr", tables=DIMS)


def test_a_publisher_of_a_dropped_model_does_not_write_into_the_next_one_of_its_name(node: Node, tmp_path: Path) -> None:
    with opened(tmp_path) as old:
        stamp = old.publish("item", [1], ones("item"))
        node.store.drop_model("ctr", 5)
        with pytest.raises(ModelError, match=r"was dropped.*make a new Publisher to begin one of this name anew"):
            old.publish("item", [1], ones("item"))
        with opened(tmp_path) as new:  # by somebody else, with the same tables
            new.publish("item", [2], ones("item", 2.0))
            for call in (
                lambda: old.publish("item", [3], ones("item")),
                lambda: old.delete("item", [2]),
                lambda: old.wait(stamp, "all"),
            ):
                with pytest.raises(ModelError, match="'ctr' was dropped, and another one has its name at node 'n1'"):
                    call()
            new.publish("user", [2], ones("user"))
    assert node.rows("item", 1, 2, 3) == [[0.0] * 2, [2.0] * 2, [0.0] * 2]


def test_what_is_opened_again_is_what_was_open(node: Node, tmp_path: Path) -> None:
    """The node has lost its memory, and with it the model; another publisher has begun the next one meanwhile."""
    with opened(tmp_path) as old:
        assert old._opened(replace(old._open, again=old._held)).held == Held()
        node.store.drop_model("ctr", 5)
        with opened(tmp_path) as new:
            assert new._held.incarnation == 1
            with pytest.raises(ModelError, match="another one has its name"):
                old._reopen()
            new._reopen()


def test_a_table_that_was_dropped_is_not_written_to_whatever_has_its_name(node: Node, tmp_path: Path) -> None:
    with opened(tmp_path) as old:
        old.publish("user", [1], ones("user"))
        node.store.drop_table("ctr", "user", 5)
        old.publish("item", [1], ones("item"))  # goes on
        old._reopen()  # as after its node lost its memory: that is no wish for what was dropped
        assert list(node.store.models["ctr"].spec.tables) == ["item"]
        for begun in (False, True):
            if begun:
                with opened(tmp_path) as new:
                    assert new.tables == DIMS
                    new.publish("user", [2], ones("user", 2.0))
            with pytest.raises(ModelError, match="table 'user' of model 'ctr' was dropped at node 'n1': publish without it"):
                old.publish("user", [3], ones("user"))
            step = old.step()
            step.publish("item", [4], ones("item"))
            step.publish("user", [4], ones("user"))
            with pytest.raises(ModelError, match="nothing was published"):
                step.__exit__(None, None, None)
        assert node.rows("user", 1, 2, 3) == [[0.0] * 3, [2.0] * 3, [0.0] * 3]
        assert node.rows("item", 1, 4) == [[1.0] * 2, [0.0] * 2]


def test_a_file_is_not_loaded_into_what_was_dropped_or_under_an_alias(node: Node) -> None:
    node.publishing.handle_request(1, Open("ctr", (("item", 2, None),)))
    node.store.drop_model("ctr", 5)
    request = LoadRequest("ctr", Path("x.npy"), {}, "float32")
    assert node.publishing.open_to_load(request, None).tables == {}
    plan: Any = SimpleNamespace(table_specs=lambda codec: {"item": ekko.model.TableSpec("item", 2, codec)})
    loaded = node.publishing.open_to_load(request, plan)
    assert loaded.held.incarnation == node.store.models["ctr"].spec.incarnation == 1
    node.store.set_alias(Alias("best", Generation("ctr", 1), None, 0, 1, 1))
    with pytest.raises(ModelError, match="'best' is an alias, now of model 'ctr'"):
        node.publishing.open_to_load(replace(request, model="best"), None)


@pytest.mark.parametrize(
    "request_",
    [
        Open("ctr", None, None, None, Held(3, {"item": 7})),
        Open("ctr", (("item", 2, None),), 8, "int8", Held()),
        PublishStep("ctr", (), (), 5, "float32", 3),
        PublishStep("ctr", (), (), 5, "int8", 3),
        Wait("ctr", 5, Scope.ALL, 10, True, 3),
        Wait("ctr", 5, Scope.ALL, 10, False, 3),
    ],
)
def test_which_model_is_meant_travels(request_: Open | PublishStep | Wait) -> None:
    assert decode_request(encode_request(5, request_)) == (5, request_) or isinstance(request_, PublishStep)
    again = decode_request(encode_request(5, request_))[1]
    assert encode_request(5, again) == encode_request(5, request_)
    answer = Opened("n1", "eu", 64, {"item": 4}, {}, 7, "float32", Held(2, {"item": 9}))
    assert decode_answer(encode_answer(5, answer)) == (5, answer)
    assert (answer.table_id("item"), answer.table_id("user")) == (9, Opened("", "", 1, {}).table_id("user"))
