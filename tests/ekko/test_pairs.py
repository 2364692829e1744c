"""Two steps of one request: which of them are published, and what is answered; and how they travel."""

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.errors import ModelError
from ekko.local import (
    Answer,
    Failed,
    MalformedError,
    PairStored,
    PublishPair,
    PublishStep,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    frames_bytes,
)
from ekko.node.pairs import Pairs
from p2p import messages as m
from p2p.replica import RowColumns

TRAINED, SERVED = "ctr.training", "ctr"


def column(table: int, first_key: int, count: int = 3) -> RowColumns:
    keys = np.arange(first_key, first_key + count, dtype=np.uint64)
    return RowColumns(table, keys, np.arange(8 * count, dtype=np.uint8).reshape(count, 8))


def pair(same: tuple[int | None, ...] = (0,), codec: str = "float32") -> PublishPair:
    columns = column(1, 5), column(2, 70, 1)
    others = tuple(
        column(9, 40) if index is None else RowColumns(8, columns[index].keys, columns[index].rows) for index in same
    )
    significance = tuple(np.ones(len(other.keys), np.float32) for other in others)
    second = PublishStep(SERVED, others, codec=codec, significance=significance, epoch=4)
    return PublishPair(PublishStep(TRAINED, columns, published_ns=7, epoch=0), second, same, 500)


class Asked:
    """Whoever publishes, waits and is answered."""

    def __init__(self) -> None:
        self.pairs = Pairs(self.publish, self.wait, lambda number, answer: self.answers.append((number, answer)))
        self.asked: list[str] = []
        self.answers: list[tuple[int, Answer]] = []
        self.refuses: dict[str, Failed | ModelError] = {}

    def publish(self, _: int, step: PublishStep) -> Failed | None:
        return self.ask(step.model)

    def wait(self, _: int, model: str, stamp: int, timeout_ms: int) -> Failed | None:
        assert (model, stamp, timeout_ms) == (TRAINED, 11, 500)
        return self.ask("wait")

    def ask(self, what: str) -> Failed | None:
        self.asked.append(what)
        if isinstance(refusal := self.refuses.get(what), ModelError):
            raise refusal
        return refusal


def test_the_second_step_follows_when_the_first_is_everywhere() -> None:
    asked = Asked()
    assert asked.pairs.begin(3, pair()) is None
    assert asked.asked == [TRAINED]
    assert not asked.pairs.on_answer(m.Published(4, 11))  # somebody else's
    assert asked.pairs.on_answer(m.Published(3, 11))
    assert asked.asked == [TRAINED, "wait"]
    assert asked.pairs.on_answer(m.WaitEnded(3, (), ()))
    assert asked.asked == [TRAINED, "wait", SERVED]
    assert asked.answers == []
    assert asked.pairs.on_answer(m.Published(3, 12))
    assert asked.answers == [(3, PairStored(11, True, 12))]
    assert not asked.pairs.on_answer(m.Published(3, 13))


@pytest.mark.parametrize("end", [m.WaitEnded(3, ("n2",), ()), m.WaitEnded(3, (), ("n2",)), m.Refused(3, "too many waits")])
def test_what_is_not_everywhere_is_not_served(end: m.Effect) -> None:
    asked = Asked()
    asked.pairs.begin(3, pair())
    asked.pairs.on_answer(m.Published(3, 11))
    assert asked.pairs.on_answer(end)
    assert asked.answers == [(3, PairStored(11))]
    assert SERVED not in asked.asked


@pytest.mark.parametrize("refusal", [Failed("fenced", "it is rolled back"), ModelError("it was dropped")])
def test_a_second_step_that_is_refused_leaves_the_first(refusal: Failed | ModelError) -> None:
    asked = Asked()
    asked.refuses[SERVED] = refusal
    asked.pairs.begin(3, pair())
    asked.pairs.on_answer(m.Published(3, 11))
    asked.pairs.on_answer(m.WaitEnded(3, (), ()))
    assert asked.answers == [(3, PairStored(11, True))]


def test_a_first_step_that_is_refused_is_nothing() -> None:
    asked = Asked()
    asked.refuses[TRAINED] = Failed("model", "unknown")
    assert asked.pairs.begin(3, pair()) == asked.refuses[TRAINED]
    asked.refuses[TRAINED] = ModelError("gone")
    with pytest.raises(ModelError):
        asked.pairs.begin(4, pair())
    del asked.refuses[TRAINED]
    assert asked.pairs.begin(5, pair()) is None
    assert not asked.pairs.on_answer(m.Refused(5, "no room"))  # answered like any step's
    assert [asked.pairs.on_answer(m.Published(number, 11)) for number in (3, 4, 5)] == [False] * 3
    assert asked.answers == []


@pytest.mark.parametrize("same", [(0,), (1, 0), (None,), (None, 0, 1), ()])
@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_a_pair_comes_back_and_what_is_the_same_travels_once(same: tuple[int | None, ...], codec: str) -> None:
    wanted = pair(same, codec)
    frames = [bytes(frame) for frame in encode_request(5, wanted)]
    number, back = decode_request(frames)
    assert number == 5
    assert isinstance(back, PublishPair)
    assert (back.same, back.timeout_ms) == (same, 500)
    for there, here in ((wanted.first, back.first), (wanted.second, back.second)):
        fields = "model", "tensors", "published_ns", "codec", "incarnation", "epoch"
        assert [getattr(there, name) for name in fields] == [getattr(here, name) for name in fields]
        assert [bytes(c.keys) + bytes(c.rows) for c in there.columns] == [bytes(c.keys) + bytes(c.rows) for c in here.columns]
        assert [c.table for c in there.columns] == [c.table for c in here.columns]
        assert all(a is b if a is None else (a == b).all() for a, b in zip(there.significance, here.significance, strict=True))
    rows = sum(c.rows.nbytes for c in wanted.first.columns) + 24 * same.count(None)
    keys = 8 * (4 + 3 * same.count(None)) + 4 * sum(len(c.keys) for c in wanted.second.columns)
    assert frames_bytes(frames[1:]) == rows + keys
    for answer in (PairStored(11), PairStored(11, True), PairStored(11, True, 12)):
        assert decode_answer(encode_answer(5, answer)) == (5, answer)


@given(st.data())
def test_a_pair_that_contradicts_itself_is_malformed(data: st.DataObject) -> None:
    frames = [bytes(frame) for frame in encode_request(5, pair(data.draw(st.sampled_from([(0,), (1, None)]))))]
    place = data.draw(st.integers(0, len(frames) - 1))
    change = data.draw(st.sampled_from(["cut", "gone", "twice", "same"]))
    if change == "same":
        header = msgpack.unpackb(frames[0])
        header[-2] = data.draw(st.sampled_from([[7, None], [-1], [0, 0, 0], ["x"], [[]], [True], 5, None]))
        frames[0] = msgpack.packb(header)
    elif change == "cut":
        frames[place] = frames[place][:-1]
    elif change == "gone":
        del frames[place]
    else:
        frames.insert(place, frames[place])
    with pytest.raises(MalformedError):
        decode_request(frames)


@pytest.mark.parametrize("step", [[], ["publish"], ["publish", "ctr"], ["pair", "ctr", []]])
def test_a_pair_of_less_than_steps_is_malformed(step: list[object]) -> None:
    version, number, word, _, second, *_ = msgpack.unpackb(encode_request(1, pair())[0])
    with pytest.raises(MalformedError, match="no steps"):
        decode_request([msgpack.packb([version, number, word, step, second, [], 500])])
