"""Verdicts on models, healthy, uncertain or corrupted at which time, as facts that all nodes come to agree on (section 5.3.1).

The time line of a model is cut into cells of one second. A verdict paints the cells that it speaks of, and what a cell is, is
the worst that anybody said of it: corrupted beats uncertain beats healthy. A maximum needs no coordinator: two detectors that
disagree on the same moment, on two nodes, end in the same state everywhere, in whatever order their words arrive. The safe
side is the worse one, so a healthy verdict paints only cells that it covers whole, and others every cell that they touch.

A maximum alone would never forgive. Time does: later cells are painted anew, and once they are healthy the model is. Of a false
alarm, an operator says so (`overrule`): that paints in the next *revision*, which beats the one before, whatever it said.

Bounds: a model keeps its newest `BLOCKS_MAX` blocks of cells (4.5 hours in which anything was said) and its newest rulings, the
log for people. "Newest of the union" is a join too, so forgetting commutes with hearing: what is beyond the bound is no news.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, TypeVar, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.generations import Generation
from ekko.model import EXTRAS_SINCE, INCARNATION_MAX, check_name, label_of, model_id
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

State = Literal["healthy", "uncertain", "corrupted"]

# A cell. Windows of quality are longer; and a rollback to the second is finer than any detector knows when it began.
CELL_MS: Final = 1_000
# Cells of a block, which is one schema entry: at worst 512 bytes, of a model that stays healthy a dozen.
BLOCK_CELLS: Final = 256
BLOCK_MS: Final = CELL_MS * BLOCK_CELLS
# Of one model: 4.5 hours in which anything was said. Quiet hours take none.
BLOCKS_MAX: Final = 64
# Of all models.
BLOCKS_TOTAL_MAX: Final = 4_096
# The log for people, of one model, and of all.
RULINGS_MAX: Final = 16
RULINGS_TOTAL_MAX: Final = 4_096
TEXT_BYTES_MAX: Final = 200
# In the two low bits of a cell; above them is the revision. 0: nobody said anything.
SEVERITY: Final[dict[State, int]] = {"healthy": 1, "uncertain": 2, "corrupted": 3}
STATES: Final[dict[int, State]] = {number: state for state, number in SEVERITY.items()}
REVISION_MAX: Final = 63
OPERATOR: Final = "operator"  # who overrules, in the log

_TIME_MAX: Final = 1 << 47  # milliseconds; 4,000 years, and block numbers that stay far inside 64 bits
_VERDICT: Final = "verdict"
_RULING: Final = "verdict-ruling"

Cells = NDArray[np.uint8]
RulingKey = tuple[Generation, State, str, int]  # model, state, detector, from when on
K = TypeVar("K")
G = TypeVar("G")


@dataclass(frozen=True, slots=True)
class Ruling:
    """A change of state that somebody was confident of, for the log that all nodes have."""

    model: Generation
    stamp_ms: int  # Unix milliseconds of the decision; later than that of any ruling on this model that its author knew
    state: State
    from_ms: int
    until_ms: int
    node: str
    detector: str
    text: str  # why, for people

    @property
    def rank(self) -> tuple[object, ...]:
        """Newer ones are kept; what follows the stamp only makes the order total."""
        return self.stamp_ms, self.node, self.detector, self.state, self.from_ms, self.until_ms, self.text, self.model

    @property
    def key(self) -> "RulingKey":
        """Of two under one key the higher rank is kept: nodes that find the same fill one line of the log, not all of it."""
        return self.model, self.state, self.detector, self.from_ms


@dataclass(frozen=True, slots=True)
class Interval:
    """Neighbouring cells of one state; `until_ms` is exclusive."""

    state: State
    from_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class Verdicts:
    """All verdicts of a cluster, as far as a node knows them. Never changed: `note` and `merged` make new ones."""

    blocks: dict[tuple[Generation, int], bytes] = field(default_factory=dict)  # model and block -> uint8[BLOCK_CELLS]
    rulings: dict[RulingKey, Ruling] = field(default_factory=dict)

    KINDS: ClassVar[tuple[str, ...]] = (_VERDICT, _RULING)
    PASSING: ClassVar[bool] = False

    # --- what they say

    def state(self, model: str | Generation, at_ms: int) -> State:
        """What a model was at a moment: the last that was said of a moment not later; uncertain where nothing was.

        Args:
            model: a name stands for the newest incarnation of which anything was said.
            at_ms: Unix milliseconds.
        """
        last = self._last(model, at_ms + 1, lambda severity: severity > 0)
        return "uncertain" if last is None else last[1]

    def healthy_until(self, model: str | Generation, now_ms: int = _TIME_MAX - 1) -> int | None:
        """Unix ms: the largest time not later than the last healthy verdict that is in no corrupted interval.

        None: it was never judged healthy, or not in the time that is kept: then there is nothing to rely on. What a node
        whose clock is ahead said of moments after `now_ms` does not count: a witness would take all that comes until then.
        """
        last = self._last(model, now_ms + 1, lambda severity: severity == SEVERITY["healthy"])
        return None if last is None else last[0]

    def judged_until(self, model: str | Generation, now_ms: int = _TIME_MAX - 1) -> int | None:
        """Unix ms up to which anything was said, of moments up to now; None: never."""
        last = self._last(model, now_ms + 1, lambda severity: severity > 0)
        return None if last is None else last[0]

    def intervals(self, model: str | Generation) -> list[Interval]:
        """What was said of a model, in order of time; moments of which nothing was said are in none."""
        generation = self._generation(model)
        intervals: list[Interval] = []
        for (one, block), packed in self.blocks.items():
            if one != generation:
                continue
            severities = _severities(packed)
            for first, stop in _runs(severities):
                if not severities[first]:
                    continue
                start_ms = block * BLOCK_MS + first * CELL_MS
                new = Interval(STATES[int(severities[first])], start_ms, start_ms + (stop - first) * CELL_MS)
                if intervals and intervals[-1].until_ms == new.from_ms and intervals[-1].state == new.state:
                    new = Interval(new.state, intervals.pop().from_ms, new.until_ms)
                intervals.append(new)
        return intervals

    def log(self, model: str | Generation) -> list[Ruling]:
        """Why, oldest first."""
        generation = self._generation(model)
        return sorted((one for one in self.rulings.values() if one.model == generation), key=lambda one: one.rank)

    def models(self) -> list[Generation]:
        """Of which anything was said."""
        return sorted({generation for generation, _ in self.blocks} | {one.model for one in self.rulings.values()})

    def _generation(self, model: str | Generation) -> Generation:
        if isinstance(model, Generation):
            return model
        return max((one for one in self.models() if one.name == model), default=Generation(model))

    def _last(self, model: str | Generation, before_ms: int, counts: Callable[[Cells], Any]) -> tuple[int, State] | None:
        """Where the last cell ends that begins before a moment and counts, and what it is."""
        generation = self._generation(model)
        for (one, block), packed in reversed(self.blocks.items()):
            if one != generation or block * BLOCK_MS >= before_ms:
                continue
            severities = _severities(packed)
            cells = -(-(before_ms - block * BLOCK_MS) // CELL_MS)
            places = np.flatnonzero(counts(severities[:cells]))
            if places.size:
                cell = int(places[-1])
                return block * BLOCK_MS + (cell + 1) * CELL_MS, STATES[int(severities[cell])]
        return None

    # --- what is said

    def note(
        self,
        model: str | Generation,
        state: State,
        from_ms: int,
        until_ms: int,
        *,
        now_ms: int = 0,
        node: str = "",
        detector: str = "",
        text: str = "",
    ) -> "Verdicts":
        """These, and that a model was in this state from one moment up to another.

        Args:
            model: a name stands for the newest incarnation of which anything was said, or for the first.
            state: "healthy", "uncertain" or "corrupted".
            from_ms: Unix milliseconds; of a stretch longer than what is kept, the last part counts.
            until_ms: exclusive.
            now_ms: of the decision, Unix milliseconds; with a `detector` it goes into the log of rulings.
            node: who decided.
            detector: what did; empty: no entry in the log.
            text: why, for people.

        Raises:
            ModelError: the state is none of these, or the times make no sense.
        """
        generation = self._generation(model)
        blocks = _painted(generation, state, from_ms, until_ms)
        rulings = [self._ruling(generation, state, from_ms, until_ms, now_ms, node, detector, text)] if detector else []
        return self._with(blocks.items(), rulings)

    def overrule(
        self, model: str | Generation, state: State, from_ms: int, until_ms: int, *, now_ms: int, node: str, text: str
    ) -> "Verdicts":
        """These, and that whatever was said of this stretch was wrong: an operator's word, which later ones may overrule again.

        Raises:
            ModelError: as `note`, or one stretch was overruled more often than is counted.
        """
        generation = self._generation(model)
        blocks: dict[tuple[Generation, int], bytes] = {}
        for key, painted in _painted(generation, state, from_ms, until_ms).items():
            cells = np.frombuffer(painted, np.uint8)
            revision = np.frombuffer(self.blocks.get(key, bytes(BLOCK_CELLS)), np.uint8) >> 2
            if int(revision[cells > 0].max(initial=0)) >= REVISION_MAX:
                raise ModelError(
                    f"verdicts on model {generation.name!r} were overruled {REVISION_MAX} times here: wait for new ones"
                )
            blocks[key] = np.where(cells > 0, cells + ((revision + 1) << 2), 0).astype(np.uint8).tobytes()
        return self._with(blocks.items(), [self._ruling(generation, state, from_ms, until_ms, now_ms, node, OPERATOR, text)])

    def _ruling(
        self, model: Generation, state: State, from_ms: int, until_ms: int, now_ms: int, node: str, detector: str, text: str
    ) -> Ruling:
        # Stamps of one model only grow, also where a clock is set back.
        stamp_ms = min(_TIME_MAX - 1, max([now_ms, *(one.stamp_ms + 1 for one in self.log(model))]))
        clean = text.encode()[:TEXT_BYTES_MAX].decode(errors="ignore")
        return Ruling(model, stamp_ms, state, max(0, from_ms), until_ms, node, detector, clean)

    # --- a join (`ekko.facts.FactSet`)

    def merged(self, other: "Verdicts") -> "Verdicts":
        """See `ekko.facts.FactSet`."""
        return self._with(other.blocks.items(), other.rulings.values())

    def _with(self, blocks: Iterable[tuple[tuple[Generation, int], bytes]], rulings: Iterable[Ruling]) -> "Verdicts":
        painted: dict[tuple[Generation, int], bytes] = {}  # what is worse than before
        for key, cells in blocks:
            before = painted.get(key, self.blocks.get(key))
            if (worse := _worse(before, cells)) != before:
                painted[key] = worse
        kept: dict[RulingKey, Ruling] = {}  # what is newer
        for ruling in rulings:
            known = kept.get(ruling.key, self.rulings.get(ruling.key))
            if known is None or ruling.rank > known.rank:
                kept[ruling.key] = ruling
        if not painted and not kept:
            return self
        merged = Verdicts(_bounded_blocks(self.blocks, painted), _bounded_rulings(self.rulings, kept))
        return self if merged == self else merged

    def beyond(self, before: "Verdicts") -> list[SchemaEntry]:
        """See `ekko.facts.Differing`."""
        blocks = [(key, cells) for key, cells in self.blocks.items() if before.blocks.get(key) != cells]
        rulings = [ruling for key, ruling in self.rulings.items() if before.rulings.get(key) != ruling]
        return [_block_entry(*one) for one in blocks] + [_ruling_entry(ruling) for ruling in rulings]

    def without(self, over: Callable[[Generation], bool]) -> "Verdicts":
        """These, but those on models that are over."""
        gone = [model for model in self.models() if over(model)]
        if not gone:
            return self
        return Verdicts(
            {key: cells for key, cells in self.blocks.items() if key[0] not in gone},
            {key: ruling for key, ruling in self.rulings.items() if key[0] not in gone},
        )

    def learned(self, entries: Sequence[SchemaEntry]) -> "Verdicts":
        """See `ekko.facts.FactSet`."""
        blocks: dict[tuple[Generation, int], bytes] = {}
        rulings: list[Ruling] = []
        for entry in entries:
            parsed = _parse(entry)
            if isinstance(parsed, Ruling):
                rulings.append(parsed)
            else:
                blocks[parsed[0]] = _worse(blocks.get(parsed[0]), parsed[1])
        return self._with(blocks.items(), rulings)

    def entries(self) -> list[SchemaEntry]:
        """See `ekko.facts.FactSet`."""
        entries = [_block_entry(key, cells) for key, cells in self.blocks.items()]
        return entries + [_ruling_entry(ruling) for ruling in self.rulings.values()]


def _painted(model: Generation, state: State, from_ms: int, until_ms: int) -> dict[tuple[Generation, int], bytes]:
    """The blocks that a verdict of revision 0 paints; a healthy one that covers no cell whole paints none.

    Raises:
        ModelError: the state is none, or the times make no sense.
    """
    if state not in SEVERITY:
        raise ModelError(f"state {state!r}: expected one of {', '.join(get_args(State))}")
    if not 0 <= until_ms < _TIME_MAX or not from_ms <= until_ms:
        raise ModelError(f"a verdict from {from_ms} to {until_ms}: expected Unix milliseconds, the first not after the second")
    if state == "healthy":
        first, stop = math.ceil(from_ms / CELL_MS), until_ms // CELL_MS
    else:
        first = from_ms // CELL_MS
        stop = max(first + 1, -(-until_ms // CELL_MS))
    first = max(0, first, (stop - 1) // BLOCK_CELLS * BLOCK_CELLS - (BLOCKS_MAX - 1) * BLOCK_CELLS)
    blocks = {}
    for block in range(first // BLOCK_CELLS, -(-stop // BLOCK_CELLS) if stop > first else 0):
        cells = np.zeros(BLOCK_CELLS, np.uint8)
        cells[max(0, first - block * BLOCK_CELLS) : stop - block * BLOCK_CELLS] = SEVERITY[state]
        blocks[model, block] = cells.tobytes()
    return blocks


def _worse(one: bytes | None, other: bytes) -> bytes:
    """Cell by cell, the later revision's, and within it the worse."""
    if one is None or one == other:
        return other
    return np.maximum(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)).tobytes()


def _bounded_blocks(
    blocks: dict[tuple[Generation, int], bytes], changed: dict[tuple[Generation, int], bytes]
) -> dict[tuple[Generation, int], bytes]:
    """All of them, in order, as many as are kept: everybody keeps the same of the same, in whatever order it came."""
    painted = {**blocks, **changed}
    if len(painted) == len(blocks):
        return painted  # a model that is judged paints the same block for minutes
    newest = _newest(painted, lambda key: key[0], lambda key: (key[1], key[0]), BLOCKS_MAX, BLOCKS_TOTAL_MAX)
    return {key: painted[key] for key in sorted(newest)}


def _bounded_rulings(rulings: dict["RulingKey", Ruling], changed: dict["RulingKey", Ruling]) -> dict["RulingKey", Ruling]:
    """The same of rulings, of which a newer one under a key has another rank."""
    if not changed:
        return rulings
    kept = {**rulings, **changed}
    newest = _newest(kept, lambda key: key[0], lambda key: kept[key].rank, RULINGS_MAX, RULINGS_TOTAL_MAX)
    return {key: kept[key] for key in sorted(newest)}


def _newest(keys: Iterable[K], group: Callable[[K], G], rank: Callable[[K], Any], each_max: int, total_max: int) -> list[K]:
    """The keys of highest rank, so many of each group and so many in all."""
    left: dict[G, int] = {}
    kept: list[K] = []
    for key in sorted(keys, key=rank, reverse=True):
        taken = left.get(group(key), 0)
        if taken < each_max and len(kept) < total_max:
            left[group(key)] = taken + 1
            kept.append(key)
    return kept


# --- schema entries -------------------------------------------------------------------------------------------------------


def _block_entry(key: tuple[Generation, int], cells: bytes) -> SchemaEntry:
    model, block = key
    body = bytes(msgpack.packb([model.name, model.incarnation, block, _packed(cells)]))
    return SchemaEntry(model_id(label_of(model.name, model.incarnation)), f"{_VERDICT}:{block}", body, EXTRAS_SINCE)


def _ruling_entry(ruling: Ruling) -> SchemaEntry:
    model = ruling.model
    times = [ruling.from_ms, ruling.until_ms]
    words = [ruling.state, *times, ruling.detector, ruling.text]
    body = bytes(msgpack.packb([model.name, model.incarnation, ruling.stamp_ms, ruling.node, *words]))
    name = f"{_RULING}:{ruling.state}:{ruling.from_ms}:{ruling.detector}"
    return SchemaEntry(model_id(label_of(model.name, model.incarnation)), name, body, EXTRAS_SINCE)


def _parse(entry: SchemaEntry) -> Ruling | tuple[tuple[Generation, int], bytes]:
    """A fact of a peer.

    Raises:
        RemoteProtocolError: it is none that one of the two functions above could have made.
    """
    try:
        body = msgpack.unpackb(entry.body)
        parsed: Ruling | tuple[tuple[Generation, int], bytes]
        if entry.name.startswith(f"{_RULING}:"):
            parsed = _ruling_of(body)
            same = _ruling_entry(parsed)
        else:
            parsed = _block_of(body)
            same = _block_entry(*parsed)
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    if same != entry:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return parsed


def _block_of(body: Any) -> tuple[tuple[Generation, int], bytes]:
    name, incarnation, block, packed = body
    if _whole(block) * BLOCK_MS >= _TIME_MAX:
        raise ValueError(f"block {block}")
    cells = _unpacked(packed)
    severities = np.frombuffer(cells, np.uint8)
    if not severities.any() or bool(((severities > 0) & (severities & 3 == 0)).any()):
        raise ValueError("cells that say nothing")
    return (_generation_of(name, incarnation), block), cells


def _ruling_of(body: Any) -> Ruling:
    name, incarnation, stamp_ms, node, state, from_ms, until_ms, detector, text = body
    for time_ms in (stamp_ms, from_ms, until_ms):
        if _whole(time_ms) >= _TIME_MAX:
            raise ValueError(f"time {time_ms}")
    if state not in SEVERITY or from_ms > until_ms:
        raise ValueError(f"state {state!r} from {from_ms} to {until_ms}")
    for word in (node, detector, text):
        if not isinstance(word, str) or len(word.encode()) > TEXT_BYTES_MAX:
            raise ValueError("a word that is none, or too long")
    return Ruling(_generation_of(name, incarnation), stamp_ms, state, from_ms, until_ms, node, detector, text)


def _generation_of(name: Any, incarnation: Any) -> Generation:
    if _whole(incarnation) > INCARNATION_MAX:
        raise ValueError(f"incarnation {incarnation}")
    return Generation(check_name("model", name), incarnation)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a whole number")
    return number


def _severities(cells: bytes) -> Cells:
    """uint8[BLOCK_CELLS]: what each cell is, whichever revision says so."""
    return np.bitwise_and(np.frombuffer(cells, np.uint8), 3, dtype=np.uint8)


def _runs(cells: Cells) -> list[tuple[int, int]]:
    """Where each run of equal cells begins and stops."""
    edges = [0, *(np.flatnonzero(np.diff(cells)) + 1).tolist(), len(cells)]
    return list(itertools.pairwise(edges))


def _packed(cells: bytes) -> bytes:
    """Run by run: its length less one, and what it is."""
    array = np.frombuffer(cells, np.uint8)
    return bytes(number for first, stop in _runs(array) for number in (stop - first - 1, array[first]))


def _unpacked(packed: Any) -> bytes:
    if type(packed) is not bytes or len(packed) > 2 * BLOCK_CELLS:
        raise ValueError("cells that are no bytes, or too many")
    pairs = np.frombuffer(packed, np.uint8).reshape(-1, 2)
    if int(pairs[:, 0].sum(dtype=np.int64)) + len(pairs) != BLOCK_CELLS:
        raise ValueError(f"a block that is not of {BLOCK_CELLS} cells")
    return np.repeat(pairs[:, 1], pairs[:, 0].astype(np.int64) + 1).tobytes()
