"""Messages of `wire` as frames: a msgpack header `[version, number, kind, ...]`, then a frame for each column.

Columns are little-endian and in the order of the header's tables: keys uint64[n], then, where there are values,
float32[n, dim]. They are not copied: what was decoded points into the frames.

Whatever bytes come, decoding raises `ServerWireError` and nothing else, and takes memory in proportion to what came: lengths
are compared with the frames before anything is made of them, and a header has no maps and a bounded size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar, assert_never

import msgpack
import numpy as np

from ekko.train.server import wire as w
from p2p.transport import Buffer

T = TypeVar("T")


def frames_bytes(frames: Sequence[Buffer]) -> int:
    """Bytes of a message."""
    return sum(memoryview(frame).nbytes for frame in frames)


# --- encoding -----------------------------------------------------------------------------------------------------------


def encode_request(number: int, request: w.Request) -> list[Buffer]:
    """Frames of one request; `number`, uint63, comes back in its answer. Columns are not copied.

    Raises:
        ServerWireError: it is larger than `MESSAGE_BYTES_MAX`, or has more keys or tables than a message may.
    """
    frames: list[Buffer] = []
    match request:
        case w.WhoServes(model):
            body: list[object] = ["who", model]
        case w.Hello(model, worker, life):
            body = ["hello", model, worker, life]
        case w.Pull(model, worker, life, clock, partitions, asked):
            body = ["pull", model, worker, life, clock, partitions, [(name, len(keys)) for name, keys in asked.items()]]
            frames += [_bytes_of(keys, np.uint64) for keys in asked.values()]
            _check_size(asked)
        case w.Push(model, worker, life, push, partitions, pushed, rate):
            heads = [(name, len(keys), values.shape[1]) for name, (keys, values) in pushed.items()]
            body = ["push", model, worker, life, push, partitions, None if math.isnan(rate) else rate, heads]
            for keys, values in pushed.values():
                assert values.shape[0] == len(keys), (values.shape, len(keys))
                frames += [_bytes_of(keys, np.uint64), _bytes_of(values, np.float32)]
            _check_size({name: keys for name, (keys, _) in pushed.items()})
        case w.Release(model, asker, partitions, digest):
            body = ["release", model, _life_body(asker), partitions, digest]
        case _:
            assert_never(request)
    return _message(number, body, frames)


def encode_answer(number: int, answer: w.Answer) -> list[Buffer]:
    """Frames of the answer to request `number`. Columns are not copied.

    Raises:
        ServerWireError: as in `encode_request`.
    """
    frames: list[Buffer] = []
    match answer:
        case w.Serving():
            body: list[object] = ["serving", _serving_body(answer)]
        case w.Welcome(settings, serving, last):
            body = ["welcome", _settings_body(settings), _serving_body(serving), last]
        case w.Pulled(tables, clock):
            body = ["pulled", clock, [(name, *values.shape) for name, values in tables.items()]]
            frames += [_bytes_of(values, np.float32) for values in tables.values()]
        case w.Pushed(push, stamp):
            body = ["pushed", push, stamp]
        case w.Released(by, asker, partitions):
            body = ["released", by, _life_body(asker), partitions]
        case w.NotPrimary(serving):
            body = ["not primary", _serving_body(serving)]
        case w.Failed(kind, reason):
            body = ["failed", kind, reason.encode()[: w.REASON_BYTES_MAX].decode(errors="ignore")]
        case _:
            assert_never(answer)
    return _message(number, body, frames)


def _message(number: int, body: list[object], frames: list[Buffer]) -> list[Buffer]:
    message: list[Buffer] = [bytes(msgpack.packb([w.SERVER_PROTOCOL_VERSION, number, *body])), *frames]
    size = frames_bytes(message)
    if size > w.MESSAGE_BYTES_MAX:
        raise w.ServerWireError(f"a message of {size} bytes: the limit is {w.MESSAGE_BYTES_MAX}; ask for fewer rows at a time")
    return message


def _check_size(tables: Mapping[str, w.U64]) -> None:
    keys = sum(map(len, tables.values()))
    if len(tables) > w.TABLES_MAX or keys > w.KEYS_MAX:
        limits = f"the limits are {w.TABLES_MAX} and {w.KEYS_MAX}"
        raise w.ServerWireError(f"a message of {len(tables)} tables and {keys} keys: {limits}; divide it")


def _life_body(life: w.ServerLife) -> list[object]:
    return [life.node, life.boot_ms, life.boot, life.server]


def _serving_body(serving: w.Serving) -> list[object]:
    return [list(serving.servers), serving.primaries]


def _settings_body(settings: w.ModelSettings) -> list[object]:
    s = settings
    return [s.partitions, s.shards, s.mode, s.workers, s.staleness, list(s.tables.items()), s.digest]


def _bytes_of(array: np.ndarray[Any, Any], dtype: type[np.generic]) -> Buffer:
    """The array's bytes, uncopied. An empty array has no memoryview of one dimension that ZeroMQ would take."""
    assert array.dtype == dtype, f"{array.dtype} where {dtype} travels"
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


# --- decoding -----------------------------------------------------------------------------------------------------------


def decode_request(frames: Sequence[Buffer]) -> tuple[int, w.Request]:
    """One request with its number.

    Raises:
        ServerWireError: it is none of this protocol and version, or over a limit.
    """
    return _decoded(frames, _request_of)


def decode_answer(frames: Sequence[Buffer]) -> tuple[int, w.Answer]:
    """One answer with the number of its request.

    Raises:
        ServerWireError: as in `decode_request`.
    """
    return _decoded(frames, _answer_of)


def _decoded(frames: Sequence[Buffer], decode: Callable[[list[Any], Sequence[Buffer]], T]) -> tuple[int, T]:
    number, body = _header(frames)
    try:
        return number, decode(body, frames[1:])
    except w.ServerWireError as error:
        error.number = number
        raise
    except (TypeError, ValueError, OverflowError) as error:  # of unpacking what has another shape
        raise w.ServerWireError(f"malformed message: {error}", number) from None


def _header(frames: Sequence[Buffer]) -> tuple[int, list[Any]]:
    if not 1 <= len(frames) <= w.FRAMES_MAX:
        raise w.ServerWireError(f"a message of {len(frames)} frames; expected 1 to {w.FRAMES_MAX}")
    if memoryview(frames[0]).nbytes > w.HEADER_BYTES_MAX or frames_bytes(frames) > w.MESSAGE_BYTES_MAX:
        raise w.ServerWireError(f"a header over {w.HEADER_BYTES_MAX} bytes, or a message over {w.MESSAGE_BYTES_MAX}")
    try:
        header = msgpack.unpackb(frames[0], max_map_len=0, max_ext_len=0)
    except Exception as error:  # junk can fail in any way
        raise w.ServerWireError("a header that is not msgpack") from error
    match header:
        case [int(version), int(number), *body] if _is_whole(number, 0, w.NUMBER_MAX):
            if version == w.SERVER_PROTOCOL_VERSION and not isinstance(version, bool):
                return number, body
            raise w.ServerWireError(
                f"server protocol version {version} met version {w.SERVER_PROTOCOL_VERSION}: "
                "use one release of ekko for servers and workers",
                number,
            )
    raise w.ServerWireError("a header that is not of this protocol")


def _request_of(body: list[Any], frames: Sequence[Buffer]) -> w.Request:
    match body:
        case ["who", model] if not frames:
            return w.WhoServes(_name(model))
        case ["hello", model, worker, life] if not frames:
            return w.Hello(_name(model), _whole(worker, 0, w.WORKERS_MAX - 1), _whole(life, 0, w.NUMBER_MAX))
        case ["pull", model, worker, life, clock, partitions, list(heads)]:
            worker, life = _whole(worker, w.OBSERVER, w.WORKERS_MAX - 1), _whole(life, 0, w.NUMBER_MAX)
            clock, places = _whole(clock, 0, w.NUMBER_MAX), _partitions(partitions, least=1)
            return w.Pull(_name(model), worker, life, clock, places, _keys_of(heads, frames))
        case ["push", model, worker, life, push, partitions, rate, list(heads)]:
            worker, life = _whole(worker, 0, w.WORKERS_MAX - 1), _whole(life, 0, w.NUMBER_MAX)
            push, places = _whole(push, 1, w.NUMBER_MAX), _partitions(partitions, least=1)
            return w.Push(_name(model), worker, life, push, places, _columns_of(heads, frames), _rate(rate))
        case ["release", model, asker, partitions, digest] if not frames:
            return w.Release(_name(model), _life(asker), _partitions(partitions), _whole(digest, 0, (1 << 64) - 1))
    raise w.ServerWireError("not a request of this protocol")


def _answer_of(body: list[Any], frames: Sequence[Buffer]) -> w.Answer:
    match body:
        case ["serving", serving] if not frames:
            return _serving(serving)
        case ["welcome", settings, serving, list(last)] if not frames:
            told, who = _settings(settings), _serving(serving)
            if not len(last) == told.partitions == len(who.primaries):
                raise w.ServerWireError(f"a welcome that tells of {len(last)} of {told.partitions} partitions")
            return w.Welcome(told, who, tuple(_whole(number, -1, w.NUMBER_MAX) for number in last))
        case ["pulled", clock, list(heads)]:
            return w.Pulled(_values_of(heads, frames), _whole(clock, 0, w.NUMBER_MAX))
        case ["pushed", push, stamp] if not frames:
            return w.Pushed(_whole(push, 1, w.NUMBER_MAX), _whole(stamp, 0, (1 << 64) - 1))
        case ["released", by, asker, partitions] if not frames:
            return w.Released(_name(by), _life(asker), _partitions(partitions))
        case ["not primary", serving] if not frames:
            return w.NotPrimary(_serving(serving))
        case ["failed", kind, reason] if not frames:
            return w.Failed(_text(kind, w.NAME_BYTES_MAX), _text(reason, w.REASON_BYTES_MAX))
    raise w.ServerWireError("not an answer of this protocol")


# --- parts of a header ----------------------------------------------------------------------------------------------------


def _settings(body: Any) -> w.ModelSettings:
    partitions, shards, mode, workers, staleness, tables, digest = body
    if mode not in w.MODES or not isinstance(tables, list) or len(tables) > w.TABLES_MAX:
        raise w.ServerWireError("settings of no mode, or of no tables")
    shards = _whole(shards, 1, w.SHARDS_MAX)
    return w.ModelSettings(
        _whole(partitions, 1, min(shards, w.PARTITIONS_MAX)),
        shards,
        mode,
        _whole(workers, 0, w.WORKERS_MAX),
        _whole(staleness, 0, w.STALENESS_MAX),
        _once([(_name(name), _whole(dim, 1, w.DIM_MAX)) for name, dim in tables]),
        _whole(digest, 0, (1 << 64) - 1),
    )


def _serving(body: Any) -> w.Serving:
    servers, primaries = body
    if not isinstance(servers, list) or not isinstance(primaries, list) or not 1 <= len(servers) <= w.SERVERS_MAX:
        raise w.ServerWireError("a list of servers that is none")
    if not 1 <= len(primaries) <= w.PARTITIONS_MAX:
        raise w.ServerWireError(f"primaries of {len(primaries)} partitions")
    named = _once([(_name(node), _text(endpoint, w.ADDRESS_BYTES_MAX)) for node, endpoint in servers])
    return w.Serving(tuple(named.items()), tuple(_whole(index, 0, len(named) - 1) for index in primaries))


def _life(body: Any) -> w.ServerLife:
    node, boot_ms, boot, server = body
    most = (1 << 64) - 1
    return w.ServerLife(_name(node), _whole(boot_ms, 0, w.NUMBER_MAX), _whole(boot, 0, most), _whole(server, 0, most))


def _partitions(body: Any, least: int = 0) -> tuple[int, ...]:
    if not isinstance(body, list) or not least <= len(body) <= w.PARTITIONS_MAX:
        raise w.ServerWireError("partitions that are none")
    numbers = tuple(_whole(partition, 0, w.PARTITIONS_MAX - 1) for partition in body)
    if any(first >= second for first, second in pairwise(numbers)):
        raise w.ServerWireError("partitions that do not ascend")
    return numbers


def _rate(body: Any) -> float:
    if body is None:
        return math.nan
    if not isinstance(body, float) or not 0.0 <= body < math.inf:
        raise w.ServerWireError(f"a rate of {body!r}"[:100])
    return body


def _name(body: Any) -> str:
    text = _text(body, w.NAME_BYTES_MAX)
    if not text:
        raise w.ServerWireError("an empty name")
    return text


def _text(body: Any, most: int) -> str:
    if not isinstance(body, str) or len(body.encode()) > most:
        raise w.ServerWireError(f"{type(body).__name__} where text of up to {most} bytes was expected")
    return body


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _whole(value: Any, least: int, most: int) -> int:
    if not _is_whole(value, least, most):
        raise w.ServerWireError(f"{value!r} where a whole number from {least} to {most} was expected"[:200])
    return int(value)


def _once(pairs: list[tuple[str, T]]) -> dict[str, T]:
    named = dict(pairs)
    if len(named) != len(pairs):
        raise w.ServerWireError("a name comes twice")
    return named


# --- columns --------------------------------------------------------------------------------------------------------------


def _keys_of(heads: list[Any], frames: Sequence[Buffer]) -> dict[str, w.U64]:
    sizes = _once([(_name(name), _whole(count, 0, w.KEYS_MAX)) for name, count in heads])
    _check_heads(sizes, len(frames), 1)
    return {
        name: _column(frame, np.dtype("<u8"), count)
        for (name, count), frame in zip(sizes.items(), frames, strict=True)
    }  # fmt: skip


def _columns_of(heads: list[Any], frames: Sequence[Buffer]) -> dict[str, tuple[w.U64, w.F32]]:
    sizes = _sizes_of(heads)
    _check_heads({name: count for name, (count, _) in sizes.items()}, len(frames), 2)
    columns: dict[str, tuple[w.U64, w.F32]] = {}
    for place, (name, (count, dim)) in enumerate(sizes.items()):
        keys = _column(frames[2 * place], np.dtype("<u8"), count)
        columns[name] = keys, _column(frames[2 * place + 1], np.dtype("<f4"), count * dim).reshape(count, dim)
    return columns


def _values_of(heads: list[Any], frames: Sequence[Buffer]) -> dict[str, w.F32]:
    sizes = _sizes_of(heads)
    _check_heads({name: count for name, (count, _) in sizes.items()}, len(frames), 1)
    return {
        name: _column(frame, np.dtype("<f4"), count * dim).reshape(count, dim)
        for (name, (count, dim)), frame in zip(sizes.items(), frames, strict=True)
    }


def _sizes_of(heads: list[Any]) -> dict[str, tuple[int, int]]:
    return _once([(_name(name), (_whole(count, 0, w.KEYS_MAX), _whole(dim, 1, w.DIM_MAX))) for name, count, dim in heads])


def _check_heads(counts: Mapping[str, int], frames: int, frames_each: int) -> None:
    if len(counts) > w.TABLES_MAX or sum(counts.values()) > w.KEYS_MAX:
        raise w.ServerWireError(f"{len(counts)} tables and {sum(counts.values())} keys are over the limits of a message")
    if frames != frames_each * len(counts):
        raise w.ServerWireError(f"{frames} columns for {len(counts)} tables")


def _column(frame: Buffer, dtype: np.dtype[Any], count: int) -> np.ndarray[Any, Any]:
    """`dtype[count]` over a frame's memory; copied only where the frame starts at an odd address."""
    if memoryview(frame).nbytes != count * dtype.itemsize:
        raise w.ServerWireError(f"a column of {memoryview(frame).nbytes} bytes where {count * dtype.itemsize} were announced")
    array = np.frombuffer(frame, dtype=dtype) if count else np.empty(0, dtype)
    return array if array.flags.aligned else array.copy()
