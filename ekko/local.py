"""The local endpoint: how publishers and tools of one machine talk to their node.

One request, one answer, over a ZeroMQ DEALER (client) and ROUTER (node) on loopback or a Unix socket. A message is a msgpack
header and then raw column frames, which are not copied. This module owns the wire: requests, answers, and how they are encoded.
`ekko.endpoint` is the node's half, `ekko.train.connection` the client's.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from ekko.ceilings import Above, AboveAsk, answer_body, answer_of
from ekko.ceilings import ask_body as above_body
from ekko.errors import EkkoError, ModelError, PublishError
from ekko.health.wire import Report, Reported, decode_report, report_body, report_frames
from ekko.model import CODEC_DEFAULT, CODECS, DENSE_ROWS_MAX, INCARNATION_MAX, TABLES_MAX, TensorSpec, table_id
from ekko.restored import RestoredAsk, RestoredPage, ask_body, ask_of, page_body, page_of
from p2p.messages import Scope
from p2p.messages.fences import EPOCH_BITS
from p2p.replica import RowColumns
from p2p.transport import Buffer
from p2p.values import dataclass

# Version 2: codecs and whom a wait leaves out, as a message's last words, and after them which model of its name is meant.
# Where nothing but float32 is meant, a message is of version 1, word for word: publisher and node may be of neighbouring
# releases, as they are while a cluster is upgraded node by node.
LOCAL_PROTOCOL_VERSION: Final = 2
LOCAL_PROTOCOL_VERSION_MIN: Final = 1
# One step of one publisher. A step of this size is 4 million rows of float32[64]; larger ones are two steps.
LOCAL_MESSAGE_BYTES_MAX: Final = 1 << 30
HEADER_BYTES_MAX: Final = 4 << 20
# Keys, rows and significance of every table, and the header.
LOCAL_FRAMES_MAX: Final = 3 * TABLES_MAX + 1
# The last word of a wait whose client understands who was not waited for, and how a node of version 1 refuses it.
NAMED: Final = "named"
OTHER_RELEASE: Final = "local protocol version"
WAIT_MS_MAX: Final = 24 * 3_600_000


@dataclass(frozen=True, slots=True)
class Held:
    """Which model of its name a publisher has open, and which tables of theirs: what it must be and they must be to go on."""

    incarnation: int = 0
    tables: dict[str, int] = field(default_factory=dict)  # name -> id


@dataclass(frozen=True, slots=True)
class Open:
    """Attach to a model; what is not there yet of it is added. `tables` None: the model must exist. `codec` None: as it is.

    `again`: the client had it open, and wants back what the node lost, not what was dropped.
    """

    model: str
    tables: tuple[tuple[str, int, int | None], ...] | None = None  # name, dim, and seconds until rows expire; None: as it is
    shards: int | None = None
    codec: str | None = None
    again: Held | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PublishStep:
    """One optimiser step. Keys are unique within a table; rows are encoded in `codec`, which must be the model's."""

    model: str
    columns: tuple[RowColumns, ...]
    tensors: tuple[TensorSpec, ...] = ()  # the dense tensors among the rows; new ones are added to the schema
    published_ns: int = 0  # CLOCK_MONOTONIC at the entry of the user's call
    codec: str = CODEC_DEFAULT
    incarnation: int = 0  # of the model that the publisher opened
    # For each of `columns`, float32[n]: how much each row matters; NaN, None, or an empty tuple: the publisher does not say.
    significance: tuple[NDArray[np.float32] | None, ...] = ()
    epoch: int | None = None  # of the last rollback that the publisher knows of (`ekko.restored`); None: it does not say

    def __post_init__(self) -> None:
        if not self.significance:
            object.__setattr__(self, "significance", (None,) * len(self.columns))


@dataclass(frozen=True, slots=True, eq=False)
class PublishPair:
    """A step, and when it is visible everywhere a second one: what a parameter server trains, and what is served of it.

    `same`: for each column of `second`, which column of `first` has the very same keys and rows, so that they travel once;
    None: none has. The second step is not published where the first is not visible everywhere within `timeout_ms`, or a
    holder is silent: the client sees to the rest then.
    """

    first: PublishStep
    second: PublishStep
    same: tuple[int | None, ...]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Answer when `stamp` is visible everywhere in scope, or after `timeout_ms`. `named`: say also who was not waited for."""

    model: str
    stamp: int
    scope: Scope
    timeout_ms: int
    named: bool = False
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class Ping:
    """Who is there?"""


@dataclass(frozen=True, slots=True)
class Opened:
    """The model as this node knows it now."""

    node: str
    region: str
    shards: int
    tables: dict[str, int]  # name -> dim
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    last_stamp: int = 0  # of this node's own steps; 0: none yet
    codec: str = CODEC_DEFAULT  # in which the model's rows are stored
    held: Held = field(default_factory=Held)  # the ids of tables that have another one than their name says

    def table_id(self, table: str) -> int:
        """Of a table, in steps."""
        return self.held.tables.get(table) or table_id(table)


@dataclass(frozen=True, slots=True)
class Stored:
    """The step is in the local node's memory."""

    stamp: int


@dataclass(frozen=True, slots=True)
class PairStored:
    """The first step is in the local node's memory, and maybe `everywhere`. `second`: the other one's stamp; None: it is not
    published.
    """

    stamp: int
    everywhere: bool = False
    second: int | None = None


@dataclass(frozen=True, slots=True)
class Waited:
    """Empty `lagging`: visible everywhere in scope. Else who lags. `silent` were not heard, and not waited for."""

    lagging: tuple[str, ...]
    silent: tuple[str, ...] = ()

    def unnamed(self) -> "Waited":
        """The same for a client of version 1."""
        return Waited((*self.lagging, *(f"{node} (silent)" for node in self.silent)) if self.lagging else ())


@dataclass(frozen=True, slots=True)
class Pong:
    """The node's answer to `Ping`."""

    node: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The request was refused and nothing happened. `kind` is a key of `FAILURES`, or `REOPEN`."""

    kind: str
    reason: str


Request = Open | PublishStep | PublishPair | Wait | Ping | Report | RestoredAsk | AboveAsk
Answer = Opened | Stored | PairStored | Waited | Pong | Failed | Reported | RestoredPage | Above

# The node does not know the model or a table (it lost its memory): the client opens it again and repeats the request.
REOPEN: Final = "reopen"
# The model's writers are stopped for now: nothing was published.
FENCED: Final = "fenced"
# The model was rolled back, and the publisher has not asked yet what was restored: nothing was published.
RESTORED: Final = "restored"
FAILURES: Final[dict[str, type[EkkoError]]] = {
    "model": ModelError,
    "publish": PublishError,
    FENCED: ModelError,
    RESTORED: ModelError,
}


class MalformedError(EkkoError):
    """A message on the local endpoint is not of this protocol. `number`: of the request, where that much was understood."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.number = number


# --- encoding -----------------------------------------------------------------------------------------------------------


def encode_request(number: int, request: Request) -> list[Buffer]:
    """Frames of one request; `number` comes back in its answer."""
    frames: list[Buffer] = []
    version = LOCAL_PROTOCOL_VERSION_MIN
    last: list[object] = []  # words that version 1 does not have
    match request:
        case Open(model, tables, shards, wanted, again):
            told = None if tables is None else [(name, dim, *([] if ttl is None else [ttl])) for name, dim, ttl in tables]
            last = _last_words(wanted, None if again is None else _held_body(again))
            body: list[object] = ["open", model, told, shards, *last]
            if any(ttl is not None for _, _, ttl in tables or ()):
                version = LOCAL_PROTOCOL_VERSION
        case PublishStep():
            body, last = _step_body(request)
            frames += _step_frames(request, (None,) * len(request.columns))
        case PublishPair(first, second, same, timeout_ms):
            version = LOCAL_PROTOCOL_VERSION
            body = ["pair", _step_body(first)[0], _step_body(second)[0], same, timeout_ms]
            frames += [*_step_frames(first, (None,) * len(first.columns)), *_step_frames(second, same)]
        case Wait(model, stamp, scope, timeout_ms, named, incarnation):
            last = _last_words(NAMED if named else None, incarnation or None)
            body = ["wait", model, stamp, int(scope), timeout_ms, *last]
        case Ping():
            body = ["ping"]
        case Report():
            body, version = report_body(request), LOCAL_PROTOCOL_VERSION
            frames += [_bytes_of(column) for column in report_frames(request)]
        case RestoredAsk():
            body, version = ask_body(request), LOCAL_PROTOCOL_VERSION
        case AboveAsk():
            body, version = above_body(request), LOCAL_PROTOCOL_VERSION
    return [_packed(number, body, LOCAL_PROTOCOL_VERSION if last else version), *frames]


def _step_body(step: PublishStep) -> tuple[list[object], list[object]]:
    """What is said of a step, and the words of it that version 1 does not have."""
    headers = [_column_header(*both) for both in zip(step.columns, step.significance, strict=True)]
    codec = None if step.codec == CODEC_DEFAULT else step.codec
    last = _last_words(codec, step.incarnation or None)
    if step.epoch is not None:
        last = [codec, step.incarnation, step.epoch]
    return ["publish", step.model, headers, [_tensor_body(t) for t in step.tensors], step.published_ns, *last], last


def _step_frames(step: PublishStep, same: Sequence[int | None]) -> list[Buffer]:
    """Its columns, but keys and rows of those that are the same as others."""
    frames: list[Buffer] = []
    for column, weights, other in zip(step.columns, step.significance, same, strict=True):
        frames += [_bytes_of(column.keys), _bytes_of(column.rows)] if other is None else []
        frames += [] if weights is None else [_bytes_of(weights)]
    return frames


def encode_answer(number: int, answer: Answer) -> bytes:
    """The one frame of an answer."""
    last: list[object] = []
    match answer:
        case Opened(node, region, shards, tables, tensors, last_stamp, codec, held):
            specs = [_tensor_body(tensor) for tensor in tensors.values()]
            last = _last_words(None if codec == CODEC_DEFAULT else codec, None if held == Held() else _held_body(held))
            body: list[object] = ["opened", node, region, shards, list(tables.items()), specs, last_stamp, *last]
        case Stored(stamp):
            body = ["stored", stamp]
        case PairStored(stamp, everywhere, second):
            body = ["pair", stamp, everywhere, second]
        case Waited(lagging, silent):
            last = [silent] if silent else []
            body = ["waited", lagging, *last]
        case Pong(node):
            body = ["pong", node]
        case Failed(kind, reason):
            body = ["failed", kind, reason]
        case Reported(taken, late, ahead):
            body = ["reported", taken, late, ahead]
        case RestoredPage():
            body = page_body(answer)
        case Above():
            body = answer_body(answer)
    return _packed(number, body, LOCAL_PROTOCOL_VERSION if last else LOCAL_PROTOCOL_VERSION_MIN)


def _last_words(word: str | None, rest: object | None) -> list[object]:
    """What ends a message: a word, and what follows it, as far as there is something to say."""
    return [word, rest] if rest is not None else [] if word is None else [word]


def _held_body(held: Held) -> list[object]:
    return [held.incarnation, list(held.tables.items())]


def _packed(number: int, body: list[object], version: int) -> bytes:
    """A header, in the oldest version that can say it."""
    return bytes(msgpack.packb([version, number, *body]))


def frames_bytes(frames: Sequence[Buffer]) -> int:
    """Payload bytes of a message."""
    return sum(memoryview(frame).nbytes for frame in frames)


def _column_header(column: RowColumns, significance: NDArray[np.float32] | None) -> list[object]:
    live, row_bytes = column.rows.shape
    return [column.table, len(column.keys), live, row_bytes, significance is not None]


def _tensor_body(tensor: TensorSpec) -> list[object]:
    return [tensor.name, list(tensor.shape), tensor.dtype]


def _bytes_of(array: np.ndarray[Any, Any]) -> Buffer:
    """The array's bytes, uncopied. An empty array has no memoryview of one dimension that ZeroMQ would take."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


# --- decoding -----------------------------------------------------------------------------------------------------------


def decode_request(frames: Sequence[Buffer]) -> tuple[int, Request]:
    """One request with its number.

    Raises:
        MalformedError: it is not a request of this protocol and version.
    """
    number, body = _header(frames)
    try:
        return number, _decode_body(body, frames)
    except MalformedError as error:
        error.number = number
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedError(f"malformed request: {error}", number) from error


def _decode_body(body: list[Any], frames: Sequence[Buffer]) -> Request:
    match body:
        case ["open", str(model), tables, shards, *last] if len(frames) == 1:
            pairs = None if tables is None else tuple(_table_of(*table) for table in tables)
            word, again = _rest_of(last)
            codec = None if word is None else _codec_of(word)
            return Open(
                model, pairs, None if shards is None else _whole(shards), codec, None if again is None else _held_of(again)
            )
        case ["publish", str(model), list(headers), list(tensors), int(published_ns), *last]:
            columns, significance = _decode_columns(headers, list(frames[1:]))
            specs = tuple(_tensor_of(tensor) for tensor in tensors)
            word, incarnation = _rest_of(last[:2])
            number, epoch = _incarnation_of(incarnation), _epoch_of(last[2:])
            return PublishStep(model, columns, specs, published_ns, _codec_of(word), number, significance, epoch)
        case ["pair", list(first), list(second), list(same), int(timeout_ms)]:
            return _pair_of(first, second, same, timeout_ms, list(frames[1:]))
        case ["wait", str(model), int(stamp), int(scope), int(timeout_ms), *last] if len(frames) == 1:
            word, incarnation = _rest_of(last)
            if not 0 <= timeout_ms <= WAIT_MS_MAX or not 0 <= stamp < 1 << 64 or word not in (None, NAMED):
                raise MalformedError(f"a wait of {timeout_ms} ms for stamp {stamp} is out of range")
            return Wait(model, stamp, Scope(scope), timeout_ms, word is not None, _incarnation_of(incarnation))
        case ["ping"] if len(frames) == 1:
            return Ping()
        case ["report", str(model), count, segment]:
            return decode_report(model, count, segment, frames[1:])
        case ["restored", str(model), since, None | list() as after, None | [_, bytes()] as rows] if len(frames) == 1:
            return ask_of(model, since, after, rows)
        case ["above", str(model), int(stamp), int(timeout_ms), incarnation] if len(frames) == 1:
            if not 0 <= timeout_ms <= WAIT_MS_MAX or not 0 <= stamp < 1 << 64:
                raise MalformedError(f"a wait of {timeout_ms} ms to publish above stamp {stamp} is out of range")
            return AboveAsk(model, stamp, timeout_ms, _incarnation_of(incarnation or None))
    raise MalformedError("malformed request: not of this protocol")


def _pair_of(first: list[Any], second: list[Any], same: list[Any], timeout_ms: int, frames: list[Buffer]) -> PublishPair:
    steps = all(len(step) > 2 and step[0] == "publish" for step in (first, second))
    if not 0 <= timeout_ms <= WAIT_MS_MAX or not steps:
        raise MalformedError("a pair of what are no steps, or of no time")
    begins, end = [], 0
    for _, _, _, _, said in first[2]:
        begins.append(end)
        end += 3 if said else 2
    own, rest = frames[:end], frames[end:]
    others: list[Buffer] = []
    for (_, _, _, _, said), other in zip(second[2], same, strict=True):
        if other is not None and not 0 <= _whole(other) < len(begins):
            raise MalformedError("a column that is the same as one that is not there")
        others += rest[:2] if other is None else own[begins[other] : begins[other] + 2]
        rest = rest[2:] if other is None else rest
        others += rest[:1] if said else []
        rest = rest[1:] if said else rest
    if rest:
        raise MalformedError("a pair with more frames than its header says")
    one, other_one = _decode_body(first, [b"", *own]), _decode_body(second, [b"", *others])
    assert isinstance(one, PublishStep), "its first word says so"
    assert isinstance(other_one, PublishStep), "its first word says so"
    return PublishPair(one, other_one, tuple(same), timeout_ms)


def _table_of(name: object, dim: object, ttl: object = None) -> tuple[str, int, int | None]:
    return str(name), _whole(dim), None if ttl is None else _whole(ttl)


def decode_answer(frame: Buffer) -> tuple[int, Answer]:
    """One answer with the number of its request.

    Raises:
        MalformedError: it is not an answer of this protocol and version.
    """
    number, body = _header([frame])
    try:
        match body:
            case ["opened", str(node), str(region), int(shards), list(tables), list(tensors), int(last_stamp), *last]:
                specs = {spec.name: spec for spec in map(_tensor_of, tensors)}
                dims = {str(name): _whole(dim) for name, dim in tables}
                codec, held = _rest_of(last)
                own = Held() if held is None else _held_of(held)
                return number, Opened(node, region, shards, dims, specs, last_stamp, _codec_of(codec), own)
            case ["stored", int(stamp)]:
                return number, Stored(stamp)
            case ["pair", int(stamp), bool(everywhere), None | int() as second]:
                return number, PairStored(stamp, everywhere, second)
            case ["waited", list(lagging)]:
                return number, Waited(tuple(str(name) for name in lagging))
            case ["waited", list(lagging), list(silent)]:
                return number, Waited(tuple(str(name) for name in lagging), tuple(str(name) for name in silent))
            case ["pong", str(node)]:
                return number, Pong(node)
            case ["failed", str(kind), str(reason)]:
                return number, Failed(kind, reason)
            case ["reported", int(taken), int(late), int(ahead)]:
                return number, Reported(taken, late, ahead)
            case ["restored", int(epoch), int(fenced), int(table), bytes(keys), list(shape), bytes(rows)]:
                return number, page_of(epoch, fenced, table, keys, shape, rows)
            case ["above", int(stamp), list(heard), list(unheard), list(silent)]:
                return number, answer_of(stamp, heard, unheard, silent)
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedError(f"malformed answer: {error}") from error
    raise MalformedError("malformed answer: not of this protocol")


def _header(frames: Sequence[Buffer]) -> tuple[int, list[Any]]:
    if not 1 <= len(frames) <= LOCAL_FRAMES_MAX:
        raise MalformedError(f"a message of {len(frames)} frames; expected 1 to {LOCAL_FRAMES_MAX}")
    if memoryview(frames[0]).nbytes > HEADER_BYTES_MAX:
        raise MalformedError(f"a header over {HEADER_BYTES_MAX} bytes")
    try:
        header = msgpack.unpackb(frames[0])
    except Exception as error:  # junk can fail in any way
        raise MalformedError("a header that is not msgpack") from error
    match header:
        case [int(version), int(number), *body] if LOCAL_PROTOCOL_VERSION_MIN <= version <= LOCAL_PROTOCOL_VERSION:
            return number, body
        case [int(version), int(number), *_]:
            raise MalformedError(
                f"{OTHER_RELEASE} {version} met version {LOCAL_PROTOCOL_VERSION}: use one release of ekko for both",
                number,
            )
        case _:
            raise MalformedError("a header that is not of this protocol")


def _decode_columns(
    headers: list[Any], frames: list[Buffer]
) -> tuple[tuple[RowColumns, ...], tuple[NDArray[np.float32] | None, ...]]:
    """Rows by table, and how much each of them matters."""
    columns: list[RowColumns] = []
    significance: list[NDArray[np.float32] | None] = []
    position = 0
    for table, count, live, row_bytes, has_significance in headers:
        end = position + (3 if has_significance else 2)
        if end > len(frames):
            raise MalformedError("a step with fewer frames than its header says")
        if not 0 <= _whole(live) <= _whole(count) or not 0 <= _whole(row_bytes) <= LOCAL_MESSAGE_BYTES_MAX:
            raise MalformedError("a step whose header contradicts itself")
        keys = _array(frames[position], np.dtype(np.uint64), count)
        rows = _array(frames[position + 1], np.dtype(np.uint8), live * row_bytes).reshape(live, row_bytes)
        columns.append(RowColumns(_whole(table), keys, rows))
        significance.append(_array(frames[position + 2], np.dtype(np.float32), count) if has_significance else None)
        position = end
    if position != len(frames):
        raise MalformedError("a step with more frames than its header says")
    return tuple(columns), tuple(significance)


def _array(frame: Buffer, dtype: np.dtype[Any], count: int) -> np.ndarray[Any, Any]:
    """`dtype[count]` over a frame's memory; copied only where the frame starts at an odd address."""
    if memoryview(frame).nbytes != count * dtype.itemsize:
        raise MalformedError(f"a frame of {memoryview(frame).nbytes} bytes where {count * dtype.itemsize} were announced")
    array = np.frombuffer(frame, dtype=dtype) if count else np.empty(0, dtype)
    return array if array.flags.aligned else array.copy()


def _tensor_of(body: Any) -> TensorSpec:
    name, shape, dtype = body
    tensor = TensorSpec(str(name), tuple(_whole(n) for n in shape), np.dtype(dtype).name)
    if min(tensor.shape, default=1) < 0 or tensor.rows > DENSE_ROWS_MAX:
        raise MalformedError(f"tensor {name!r} of shape {tensor.shape} is too large")
    return tensor


def _rest_of(last_words: list[Any]) -> tuple[Any, Any]:
    """The word that ends a message, and what follows it; None for what is not said."""
    match last_words:
        case []:
            return None, None
        case [word]:
            return word, None
        case [word, rest]:
            return word, rest
        case _:
            raise MalformedError("a message with more words than this version knows")


def _codec_of(word: object) -> str:
    """The codec that a message names, float32 where it names none."""
    if word is None:
        return CODEC_DEFAULT
    if not isinstance(word, str) or word not in CODECS:
        raise MalformedError(f"codec {word!r}: there are {', '.join(CODECS)}"[:200])
    return word


def _incarnation_of(value: object) -> int:
    number = 0 if value is None else _whole(value)
    if not 0 <= number <= INCARNATION_MAX:
        raise MalformedError(f"incarnation {number}")
    return number


def _epoch_of(last_words: list[Any]) -> int | None:
    match last_words:
        case []:
            return None
        case [int(epoch)] if 0 <= epoch < 1 << EPOCH_BITS:
            return epoch
        case _:
            raise MalformedError("a step with more words than this version knows, or of no epoch")


def _held_of(body: Any) -> Held:
    incarnation, tables = body
    numbers = {str(name): _whole(number) for name, number in tables}
    if any(not 0 <= number < 1 << 32 for number in numbers.values()):
        raise MalformedError("a table id that is none")
    return Held(_incarnation_of(incarnation), numbers)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedError(f"{value!r} where a whole number was expected")
    return value
