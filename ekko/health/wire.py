"""Quality events on the local endpoint: columns of a report, as `ekko.local` carries them, and what users may pass."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError
from ekko.health.samples import WEIGHT_MAX, WEIGHT_MIN
from ekko.health.traffic import ARMS
from ekko.health.windows import OTHER, SEGMENTS_MAX, Events
from p2p.values import dataclass

if TYPE_CHECKING:
    from p2p.transport import Buffer  # which brings the network along, and scorers look up without

# Events of one report; more are several.
REPORT_EVENTS_MAX: Final = 65_536
SEGMENT_BYTES_MAX: Final = 100
_DTYPES: Final[tuple[np.dtype[Any], ...]] = (
    np.dtype(np.int64),
    np.dtype(np.float32),
    np.dtype(np.float32),
    np.dtype(np.float32),
    np.dtype(np.uint8),
)

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Answers of a model with their labels, of one segment."""

    model: str  # or an alias
    events: Events


@dataclass(frozen=True, slots=True)
class Reported:
    """What became of a report: events taken, of closed windows, and of the future."""

    taken: int
    late: int
    ahead: int


def report_body(report: Report) -> list[object]:
    """What the header says of a report."""
    return ["report", report.model, len(report.events), report.events.segment]


def report_frames(report: Report) -> list[NDArray[Any]]:
    """Its columns, in the order of `Events`."""
    events = report.events
    return [events.at_ms, events.prediction, events.label, events.weight, events.arm]


def decode_report(model: str, count: object, segment: object, frames: "Sequence[Buffer]") -> Report:
    """A report out of a header and frames.

    Raises:
        ValueError: they are none.
    """
    if type(count) is not int or not 0 < count <= REPORT_EVENTS_MAX or len(frames) != len(_DTYPES):
        raise ValueError(f"a report of {count!r} events in {len(frames)} frames")
    if not isinstance(segment, str) or len(segment.encode()) > SEGMENT_BYTES_MAX:
        raise ValueError("a segment that is none")
    columns: list[Any] = []
    for frame, dtype in zip(frames, _DTYPES, strict=True):
        if memoryview(frame).nbytes != count * dtype.itemsize:
            raise ValueError(f"a column of {memoryview(frame).nbytes} bytes where {count} values were announced")
        columns.append(np.frombuffer(bytes(frame), dtype))
    at_ms, prediction, label, weight, arm = columns
    events = Events(at_ms, prediction, label, weight, arm, segment)
    _check(events)
    return Report(model, events)


def events_of(
    prediction: ArrayLike,
    label: ArrayLike,
    weight: ArrayLike | None,
    segment: str | Sequence[str] | None,
    arm: ArrayLike,
    at_ms: ArrayLike,
) -> Iterator[Events]:
    """What a user passes, checked, in parts of one segment and a bounded size each.

    Raises:
        ModelError: naming what does not fit; nothing is yielded before all is checked.
    """
    try:
        predictions = np.asarray(prediction, np.float32).reshape(-1)
    except (TypeError, ValueError):
        raise ModelError("predictions are no numbers: expected probabilities, one for each event") from None
    count = len(predictions)
    whole = Events(
        _column("at", at_ms, np.int64, count),
        predictions,
        _column("label", label, np.float32, count),
        _column("weight", 1.0 if weight is None else weight, np.float32, count),
        _column("arm", arm, np.uint8, count),
    )
    try:
        _check(whole)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if segment is None or isinstance(segment, str):
        return _parts(whole, {_name(segment or ""): np.arange(count)})
    names = np.asarray(segment, np.str_).reshape(-1)
    if len(names) != count:
        raise ModelError(f"segment does not fit {count} predictions: expected one name, or one for each")
    return _parts(whole, _places(names))


def _places(names: "NDArray[np.str_]") -> dict[str, NDArray[np.int64]]:
    """Where the events of each segment are; of more than a node keeps, the most frequent ones and all others as one."""
    unique, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
    if len(unique) > SEGMENTS_MAX:
        kept = np.sort(np.argsort(-counts, kind="stable")[:SEGMENTS_MAX])
        numbers = np.full(len(unique), SEGMENTS_MAX)
        numbers[kept] = np.arange(SEGMENTS_MAX)
        unique, inverse = np.append(unique[kept], OTHER), numbers[inverse]
    order = np.argsort(inverse, kind="stable")
    ends = np.searchsorted(inverse[order], np.arange(1, len(unique)))
    places: dict[str, NDArray[np.int64]] = {}
    for name, which in zip(unique.tolist(), np.split(order, ends), strict=True):
        short = _name(name)
        places[short] = np.concatenate([places[short], which]) if short in places else which
    return places


def _name(segment: str) -> str:
    """As many bytes of it as travel."""
    return segment.encode(errors="replace")[:SEGMENT_BYTES_MAX].decode(errors="ignore")


def _parts(whole: Events, segments: Mapping[str, NDArray[np.int64]]) -> Iterator[Events]:
    for name, which in segments.items():
        for first in range(0, len(which), REPORT_EVENTS_MAX):
            part = which[first : first + REPORT_EVENTS_MAX]
            values = whole.at_ms[part], whole.prediction[part], whole.label[part], whole.weight[part], whole.arm[part]
            yield Events(*values, name)


def _column(name: str, values: ArrayLike, dtype: type, count: int) -> NDArray[Any]:
    try:
        given = np.asarray(values).reshape(-1)
        with np.errstate(invalid="ignore"):  # what is no number becomes one that `_check` refuses
            column: NDArray[Any] = given.astype(dtype)
        if dtype is np.uint8 and not bool((column == given).all()):  # 256 would be taken for 0
            raise ModelError("arms are other than 0 (online) and 1 (baseline): see Reader.arm")
        return np.ascontiguousarray(np.broadcast_to(column, (count,)))
    except (ValueError, TypeError, OverflowError):
        raise ModelError(f"{name} does not fit {count} predictions: expected one value, or one for each") from None


def _check(events: Events) -> None:
    for name, column in (("predictions", events.prediction), ("labels", events.label)):
        if not bool(((column >= 0) & (column <= 1)).all()):  # NaN is neither
            raise ValueError(f"{name} are outside 0 to 1: report probabilities, and labels of 0 or 1")
    if not bool(((events.weight >= WEIGHT_MIN) & (events.weight <= WEIGHT_MAX)).all()):
        raise ValueError(f"weights are outside {WEIGHT_MIN:g} to {WEIGHT_MAX:g}: expected importance weights, 1 as a rule")
    if bool((events.arm >= len(ARMS)).any()):
        raise ValueError("arms are other than 0 (online) and 1 (baseline): see Reader.arm")
    if bool((events.at_ms < 0).any()):
        raise ValueError("times are negative: expected Unix milliseconds")
