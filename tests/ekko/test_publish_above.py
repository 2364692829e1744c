"""`Publisher.publish_above` on the wire between publisher and node."""

import msgpack
import pytest

from ekko.ceilings import Above, AboveAsk
from ekko.local import WAIT_MS_MAX, MalformedError, decode_answer, decode_request, encode_answer, encode_request


def test_question_and_answer_come_back_as_they_went() -> None:
    ask = AboveAsk("ctr", (1 << 64) - 1, 5_000, 3)
    assert decode_request(encode_request(7, ask)) == (7, ask)
    answer = Above(9, ("eu", "us"), ("ap",), ("ap-1", "us-2"))
    assert decode_answer(encode_answer(7, answer)) == (7, answer)


@pytest.mark.parametrize(
    "body",
    [
        ["above", "ctr", 1 << 63, WAIT_MS_MAX + 1, 0],
        ["above", "ctr", -1, 5, 0],
        ["above", "ctr", 1, -5, 0],
        ["above", "ctr", 1, 5, -1],
        ["above", "ctr", 1, 5],
        ["above", 4, 1, 5, 0],
        ["above", "ctr", 1, 5, "x"],
    ],
)
def test_junk_is_refused(body: list[object]) -> None:
    with pytest.raises(MalformedError):
        decode_request([msgpack.packb([2, 7, *body])])


def test_junk_answers_are_refused() -> None:
    for body in (["above", 9, 4, [], []], ["above", "x", [], [], []], ["above", 9, []]):
        with pytest.raises(MalformedError):
            decode_answer(msgpack.packb([2, 7, *body]))
