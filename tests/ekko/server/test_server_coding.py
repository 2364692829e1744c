"""Messages between workers and servers: what is encoded comes back, and bytes that are none raise one type of error."""

import contextlib
import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.train.server import wire as w
from ekko.train.server.coding import decode_answer, decode_request, encode_answer, encode_request

names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=20)
numbers = st.integers(0, w.NUMBER_MAX)
words = st.integers(0, (1 << 64) - 1)
workers = st.integers(0, w.WORKERS_MAX - 1)
partition_sets = st.sets(st.integers(0, w.PARTITIONS_MAX - 1), max_size=8).map(lambda some: tuple(sorted(some)))
lives = st.builds(w.ServerLife, names, numbers, words, words)


@st.composite
def keys(draw: st.DrawFn) -> w.U64:
    return np.array(draw(st.lists(words, max_size=5)), np.uint64)


@st.composite
def columns(draw: st.DrawFn) -> tuple[w.U64, w.F32]:
    chosen, dim = draw(keys()), draw(st.integers(1, 4))
    values = draw(st.lists(st.floats(width=32), min_size=len(chosen) * dim, max_size=len(chosen) * dim))
    return chosen, np.array(values, np.float32).reshape(len(chosen), dim)


@st.composite
def settings(draw: st.DrawFn) -> w.ModelSettings:
    partitions = draw(st.integers(1, 8))
    tables = draw(st.dictionaries(names, st.integers(1, w.DIM_MAX), max_size=3))
    mode, digest = draw(st.sampled_from(w.MODES)), draw(words)
    return w.ModelSettings(partitions, 64, mode, draw(st.integers(0, w.WORKERS_MAX)), draw(st.integers(0, 9)), tables, digest)


@st.composite
def servings(draw: st.DrawFn, partitions: int = 4) -> w.Serving:
    servers = tuple(draw(st.dictionaries(names, names, min_size=1, max_size=4)).items())
    most = len(servers) - 1
    return w.Serving(servers, tuple(draw(st.lists(st.integers(0, most), min_size=partitions, max_size=partitions))))


@st.composite
def welcomes(draw: st.DrawFn) -> w.Welcome:
    told = draw(settings())
    last = draw(st.lists(st.integers(-1, w.NUMBER_MAX), min_size=told.partitions, max_size=told.partitions))
    return w.Welcome(told, draw(servings(told.partitions)), tuple(last))


some = partition_sets.filter(bool)
rates = st.one_of(st.just(math.nan), st.floats(0, 1e9))
requests = st.one_of(
    st.builds(w.WhoServes, names),
    st.builds(w.Hello, names, workers, numbers),
    st.builds(w.Pull, names, st.one_of(workers, st.just(w.OBSERVER)), numbers, numbers, some, st.dictionaries(names, keys())),
    st.builds(w.Push, names, workers, numbers, st.integers(1, w.NUMBER_MAX), some, st.dictionaries(names, columns()), rates),
    st.builds(w.Release, names, lives, partition_sets, words),
)
answers = st.one_of(
    servings(),
    welcomes(),
    st.builds(w.Pulled, st.dictionaries(names, columns().map(lambda both: both[1])), numbers),
    st.builds(w.Pushed, st.integers(1, w.NUMBER_MAX), words),
    st.builds(w.Released, names, lives, partition_sets),
    st.builds(w.NotPrimary, servings()),
    st.builds(w.Failed, st.sampled_from(w.KINDS), st.text(max_size=50)),
)


def plain(value: Any) -> Any:
    """A message as something that can be compared: bit for bit, NaN included."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(key, plain(one)) for key, one in value.items()]
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if hasattr(value, "__dataclass_fields__"):
        return type(value).__name__, [plain(getattr(value, name)) for name in value.__dataclass_fields__]
    return repr(value)


@given(st.integers(0, w.NUMBER_MAX), requests)
def test_a_request_comes_back(number: int, request: w.Request) -> None:
    frames = [bytes(frame) for frame in encode_request(number, request)]
    assert plain(decode_request(frames)) == plain((number, request))


@given(st.integers(0, w.NUMBER_MAX), answers)
def test_an_answer_comes_back(number: int, answer: w.Answer) -> None:
    frames = [bytes(frame) for frame in encode_answer(number, answer)]
    assert plain(decode_answer(frames)) == plain((number, answer))


def decode_both(frames: list[bytes]) -> None:
    """Nothing but the one type of error may come out."""
    for decode in (decode_request, decode_answer):
        with contextlib.suppress(w.ServerWireError):
            decode(frames)


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_junk_raises_one_type_of_error(frames: list[bytes]) -> None:
    decode_both(frames)


integers = st.integers(-(1 << 63), (1 << 64) - 1)
msgpacks = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, st.floats(), st.text(max_size=8), st.binary(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=8), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=12,
)
REQUESTS = ("who", "hello", "pull", "push", "release")
ANSWERS = ("serving", "welcome", "pulled", "pushed", "released", "not primary", "failed")
kinds = st.sampled_from(REQUESTS + ANSWERS)


@given(kinds, st.lists(msgpacks, max_size=8), st.lists(st.binary(max_size=32), max_size=4))
def test_headers_that_say_anything_raise_one_type_of_error(kind: str, rest: list[Any], frames: list[bytes]) -> None:
    decode_both([bytes(msgpack.packb([w.SERVER_PROTOCOL_VERSION, 1, kind, *rest])), *frames])


@given(st.data())
def test_messages_with_a_byte_changed_or_cut_raise_one_type_of_error(data: st.DataObject) -> None:
    encoded = encode_request(1, data.draw(requests)) if data.draw(st.booleans()) else encode_answer(1, data.draw(answers))
    frames = [bytearray(frame) for frame in encoded]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = frames[data.draw(st.integers(0, len(frames) - 1))]
        if data.draw(st.booleans()) and frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
        else:
            del frame[data.draw(st.integers(0, len(frame))) :]
    decode_both([bytes(frame) for frame in frames])


def header(*body: object, version: object = w.SERVER_PROTOCOL_VERSION) -> bytes:
    return bytes(msgpack.packb([version, 7, *body]))


KEY = np.zeros(1, np.uint64).tobytes()


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        pytest.param([], "0 frames", id="nothing"),
        pytest.param([header("who", "ctr", version=2)], "version 2 met version 1", id="a-later-version"),
        pytest.param([header("who", "ctr"), b""], "not a request", id="a-frame-too-many"),
        pytest.param([b"\x00" * (w.HEADER_BYTES_MAX + 1)], "a header over", id="a-large-header"),
        pytest.param([header("pull", "ctr", 0, 1, 0, [0], [["item", 1]])], "0 columns for 1 tables", id="a-column-short"),
        pytest.param([header("pull", "ctr", 0, 1, 0, [0], [["item", 2]]), KEY], "of 8 bytes where 16", id="a-key-short"),
        pytest.param([header("pull", "ctr", 0, 1, 0, [], [["item", 1]]), KEY], "partitions that are none", id="nowhere"),
        pytest.param([header("pull", "ctr", 0, 1, 0, [1, 1], [["item", 1]]), KEY], "do not ascend", id="a-partition-twice"),
        pytest.param([header("pull", "ctr", 0, 1, 0, [0], [["i", 0], ["i", 0]]), b"", b""], "comes twice", id="a-table-twice"),
        pytest.param([header("pull", "ctr", 0, 1, 0, [0], [["i", 1 << 21]]), KEY], "from 0 to 1048576", id="too-many-keys"),
        pytest.param([header("push", "ctr", -1, 1, 1, [0], None, [])], "from 0 to 1023", id="an-observers-push"),
        pytest.param([header("push", "ctr", 0, 1, 0, [0], None, [])], "from 1 to", id="push-0"),
        pytest.param([header("push", "ctr", 0, 1, 1, [0], math.inf, [])], "a rate of inf", id="no-rate"),
        pytest.param([header("push", "ctr", 0, 1, 1, [0], -1.0, [])], "a rate of -1.0", id="a-rate-below-0"),
        pytest.param([header("hello", "ctr", True, 1)], "a whole number", id="true-is-no-number"),
        pytest.param([header("hello", "", 0, 1)], "an empty name", id="no-name"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(frames: list[bytes], complaint: str) -> None:
    with pytest.raises(w.ServerWireError, match=complaint):
        decode_request(frames)


def test_an_error_tells_whose_message_it_was() -> None:
    with pytest.raises(w.ServerWireError) as caught:
        decode_request([header("hello", "ctr", 0, -1)])
    assert caught.value.number == 7


def test_what_is_too_large_is_refused_before_it_is_sent() -> None:
    many = np.zeros(w.KEYS_MAX + 1, np.uint64)
    with pytest.raises(w.ServerWireError, match="divide it"):
        encode_request(1, w.Pull("ctr", 0, 1, 0, (0,), {"item": many}))
    with pytest.raises(w.ServerWireError, match="the limit is 67108864"):
        encode_answer(1, w.Pulled({"item": np.zeros((17_000, 1_024), np.float32)}))


def test_columns_are_not_copied() -> None:
    gradients = np.ones((1_000, 8), np.float32)
    request = w.Push("ctr", 0, 1, 1, (0,), {"item": (np.arange(1_000, dtype=np.uint64), gradients)})
    _, frame_keys, frame_values = encode_request(1, request)
    assert np.shares_memory(np.frombuffer(frame_values, np.float32), gradients)
    _, back = decode_request(encode_request(1, request))
    assert isinstance(back, w.Push)
    assert np.shares_memory(back.tables["item"][0], np.frombuffer(frame_keys, np.uint64))
