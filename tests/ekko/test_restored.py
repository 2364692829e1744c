"""What publishers hear of a rollback: refused or paused, what was taken back, and that a step of before does not undo it."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from ekko.codec import encode
from ekko.errors import ModelError
from ekko.local import (
    FENCED,
    RESTORED,
    Answer,
    Failed,
    MalformedError,
    PublishStep,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from ekko.model import DENSE_DIM, DENSE_TABLE, TensorSpec, table_id
from ekko.node import restored as node_restored
from ekko.node.restored import RestoredRows
from ekko.restored import KEYS_MAX, RestoredAsk, RestoredPage
from ekko.train.pause import Pause
from p2p import messages as m
from p2p.replica import RowColumns
from sim_cluster.virtual import VirtualCluster
from tests.p2p.fence_chaos import fence, lift, restores
from tests.p2p.retirement_chaos import two_trainers

ITEM = table_id("item")
NAMES = {ITEM: ("item", 4), table_id("user"): ("user", 2), table_id(DENSE_TABLE): (DENSE_TABLE, DENSE_DIM)}


def over_the_wire(answer: Answer) -> Answer:
    return decode_answer(encode_answer(1, answer))[1]


def asking(cluster: VirtualCluster, name: str) -> Mapping[str, object]:
    """A node's half, behind the encoding of the local wire."""
    node = cluster.nodes[name]
    assert node.machine is not None
    rows, model = RestoredRows(node.machine.fences_of, node.machine.restored_spans), node.store.models["ctr"]

    def ask(request: RestoredAsk) -> Answer:
        _, decoded = decode_request([bytes(part) for part in encode_request(1, request)])
        assert decoded == request
        return over_the_wire(rows.page(model, request))

    return {"model": "ctr", "ask": ask}


def rolled_back() -> tuple[VirtualCluster, Pause, Pause]:
    """A cluster of which keys 0..49 were restored, keys 50..59 deleted; one publisher that waits and one that does not."""
    cluster = two_trainers(3)
    cluster.publish("t1", "item", range(100), 5.0)
    first = fence(cluster, "us1")
    lift(cluster, "us1", first.epoch)  # one after which nothing was restored
    waits, refused = Pause(**asking(cluster, "t1"), wait_s=60.0), Pause(**asking(cluster, "t1"), wait_s=None)  # type: ignore[arg-type]
    assert waits.epoch == 0
    cluster.publish("t1", "item", range(100), 6.0)
    done = fence(cluster, "us1")
    restores(cluster, "t1", range(50), -1.0, done.epoch)
    gone = RowColumns(ITEM, np.arange(50, 60, dtype=np.uint64), np.empty((0, 16), np.uint8))
    cluster.request("t1", lambda number: m.PublishRequested(number, cluster.model.id, (gone,), through_fence=done.epoch))
    lift(cluster, "us1", done.epoch)
    return cluster, waits, refused


def step(keys: range) -> PublishStep:
    rows = encode("float32", np.full((len(keys), 4), 9.0, np.float32))
    weights = np.arange(len(keys), dtype=np.float32)
    return PublishStep("ctr", (RowColumns(ITEM, np.array(keys, np.uint64), rows),), significance=(weights,))


def test_a_step_that_waited_is_dropped_and_named_with_what_was_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_restored, "PAGE_BYTES_MAX", 200)  # of many pages
    cluster, waits, refused = rolled_back()
    stale = replace(step(range(40, 120)), epoch=0)
    assert waits.retry(stale, Failed(RESTORED, "it was rolled back"), NAMES, "float32") is None
    assert waits.rows_left_out == 80
    assert waits.has_kept
    assert waits.epoch == 2
    # One that was made since then knows of it; another thread's of before does not.
    fresh = replace(step(range(5)), epoch=2)
    assert waits.retry(fresh, Failed(RESTORED, "it was rolled back"), NAMES, "float32") is fresh
    assert waits.retry(stale, Failed(RESTORED, "it was rolled back"), NAMES, "float32") is None

    taken, served = waits.restored(NAMES, "float32", {})
    order = np.argsort(taken.keys)
    assert taken.table == served.table == "item"
    assert taken.keys[order].tolist() == list(range(60))
    assert taken.deleted[order].tolist() == [False] * 50 + [True] * 10
    assert (taken.rows[order][:50] == -1.0).all()
    assert not taken.rows[order][50:].any()
    # The rows of the step that were not restored, as they are served: 100 and above never were.
    order = np.argsort(served.keys)
    assert served.keys[order].tolist() == list(range(60, 120))
    assert served.deleted[order].tolist() == [False] * 40 + [True] * 20
    assert (served.rows[order][:40] == 6.0).all()
    assert waits.restored(NAMES, "float32", {}) == ()
    assert not waits.has_kept
    with pytest.raises(ModelError, match="model 'ctr': it was rolled back"):
        refused.retry(step(range(5)), Failed(RESTORED, "it was rolled back"), NAMES, "float32")
    assert [len(one.keys) for one in refused.restored(NAMES, "float32", {})] == [60]
    assert refused.epoch == 2
    assert Pause(**asking(cluster, "t2"), wait_s=None).restored(NAMES, "float32", {}) == ()  # type: ignore[arg-type]


def test_what_was_written_since_is_not_restored() -> None:
    cluster, waits, _ = rolled_back()
    cluster.run(1_000)
    cluster.publish("t1", "item", range(30), 7.0)
    (one,) = waits.restored(NAMES, "float32", {})
    assert sorted(one.keys.tolist()) == list(range(30, 60))


def test_a_pause_ends_with_the_fence_or_its_time() -> None:
    pages = [RestoredPage(0, 3), RestoredPage(0, 3), RestoredPage(0, 0), RestoredPage(0, 0)]
    pause = Pause("ctr", lambda _: pages.pop(0), 60.0)
    again = pause.retry(replace(step(range(5)), epoch=0), Failed(FENCED, "it is being rolled back"), NAMES, "float32")
    assert again is not None, "nothing was restored"
    assert again.columns[0].keys.tolist() == list(range(5))
    assert not pages
    pause = Pause("ctr", lambda _: RestoredPage(0, 3), 0.05)
    with pytest.raises(ModelError, match=r"model 'ctr': after 0.05 s it is being rolled back"):
        pause.retry(step(range(5)), Failed(FENCED, "it is being rolled back"), NAMES, "float32")


def test_dropped_tensors_are_named() -> None:
    top, other = TensorSpec("top", (600,), "float32"), TensorSpec("other", (600,), "float32")
    dense = table_id(DENSE_TABLE)
    keys = np.sort(np.concatenate([top.keys, other.keys]))
    left = keys[keys != top.keys[0]]
    none = np.zeros((1, DENSE_DIM * 4), np.uint8)
    answers = [
        RestoredPage(0, 0),
        RestoredPage(1, 0, dense, top.keys[:1], none),
        RestoredPage(1, 0),
        RestoredPage(1, 0),
        RestoredPage(1, 0, dense, left, np.repeat(none, len(left), axis=0)),
    ]
    pause = Pause("ctr", lambda _: answers.pop(0), 60.0)
    rows = np.zeros((len(keys), DENSE_DIM * 4), np.uint8)
    both = PublishStep("ctr", (RowColumns(dense, keys, rows),), (top, other), epoch=0)
    assert pause.retry(both, Failed(RESTORED, "it was"), NAMES, "float32") is None
    named = pause.restored(NAMES, "float32", {"top": top, "other": other})
    assert {name for one in named for name in one.tensors} == {"top", "other"}


def test_a_step_says_which_rollback_it_knows_of() -> None:
    frames = encode_request(7, PublishStep("ctr", step(range(3)).columns, epoch=5))
    decoded = decode_request([bytes(part) for part in frames])[1]
    assert isinstance(decoded, PublishStep)
    assert decoded.epoch == 5
    for junk in (-1, "5", 1 << 63):
        with pytest.raises(MalformedError):
            decode_request([bytes(part) for part in encode_request(7, PublishStep("ctr", (), epoch=junk))])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rows", [(1 << 32, bytes(8)), (-1, bytes(8)), (1, b""), (1, bytes(7)), (1, bytes(8 * KEYS_MAX + 8)), (1, "x")]
)
def test_a_question_for_rows_is_checked(rows: tuple[int, bytes]) -> None:
    with pytest.raises(MalformedError):
        decode_request([bytes(part) for part in encode_request(7, RestoredAsk("ctr", rows=rows))])
