"""What all nodes know of rollbacks: who takes what back, how far it has come, and what was taken back before.

One fact is one rollback, or one request for one, and has an *epoch*: a number that only ever grows for a model, and that no two
have in common, since its lower half is random. Of a model only the fact of the highest epoch counts. So two witnesses that
decide at the same moment have one winner, the same on all nodes and without a word between them; and whoever takes over from a
witness that died takes a higher epoch, which fences the dead one's writes out, should it come back.

Facts travel as schema entries, as those of `ekko.generations` do, and merging them is a join: of two values of one epoch the
one of the higher version counts. Only the witness that carries a rollback out changes its fact, so versions do not fork; should
they all the same, the bytes decide.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, ClassVar, Final

import msgpack

from ekko.errors import ModelError
from ekko.generations import Generation
from ekko.model import EXTRAS_SINCE, INCARNATION_MAX, check_name, is_training, label_of, model_id, training_name
from ekko.rollback.scope import WHOLE, Scope
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

ROLLBACK: Final = "rollback"
QUESTION: Final = "rollback_question"  # a dry run
# Kept of each model, the newest first, of rollbacks and of questions apart: who asks much must not push out what goes on.
HISTORY_MAX: Final = 8
# Of all models together: about 300 bytes each.
ROLLBACKS_MAX: Final = 256
REASON_BYTES_MAX: Final = 400
NODES_MAX: Final = 64  # named in one fact; of more there is the number
NODE_BYTES_MAX: Final = 256
WRITERS_IN_SCOPE_MAX: Final = 256
_UINT64_MAX: Final = (1 << 64) - 1
_RANDOM_BITS: Final = 32
PER_MILLE: Final = 1_000


class Step(IntEnum):
    """How far a rollback has come."""

    REQUESTED = 0  # by an operator, at any node: the first living witness takes it on
    FENCING = 1  # the model's writers are stopped, and members agree on all that they wrote
    CONVERGING = 2  # the witness gets all of that
    PLANNING = 3  # what differs from the cut is worked out, and made durable
    WRITING = 4  # it is written back
    WAITING = 5  # until every replica has it
    PROBING = 6  # a little traffic, until the verdict is healthy
    LIFTING = 7  # writers go on
    DONE = 8
    FAILED = 9  # nothing is changed, or what was is whole: `reason` says which


Key = tuple[str, int, int, bool]  # a model, its incarnation, an epoch, and whether it is a question
OVER: Final = (Step.DONE, Step.FAILED)


@dataclass(frozen=True, slots=True)
class Rollback:
    """One rollback. Times are Unix milliseconds."""

    model: Generation
    epoch: int
    step: Step
    to_ms: int  # the moment that is wanted; 0: the newest at which the model was healthy
    requested_ms: int
    asked_by: str  # the node at which it was asked for, or whose verdict it was
    automatic: bool = False
    scope: Scope = WHOLE
    dry: bool = False  # only say what would be done
    request: int = 0  # the epoch of the request that this carries out; 0: none
    witness: str = ""  # who carries it out; empty: nobody yet
    version: int = 0
    cut_ms: int = 0  # the moment that was found: the newest valid mark up to `to_ms`
    rows: int = 0  # to be written back, deletions included
    deletions: int = 0
    payload_bytes: int = 0
    estimate_ms: int = 0
    at_risk: int = 0  # good rows that go with the bad ones, or may
    others: int = 0  # of `rows`, as a writer that is not meant left them after the cut
    rows_done: int = 0
    changed_ms: int = 0  # when this step began
    share: int = PER_MILLE  # of the traffic that the live model may answer meanwhile, per mille
    unreachable: tuple[str, ...] = ()  # members that were expelled for it, or are not waited for
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.step in OVER

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """Of two values of one epoch the one with the larger rank counts. What follows the version only makes it total."""
        return self.version, int(self.step), bytes(msgpack.packb(_body(self)))

    @property
    def key(self) -> "Key":
        """There is one such fact for each."""
        return self.model.name, self.model.incarnation, self.epoch, self.dry


@dataclass(frozen=True, slots=True)
class Rollbacks:
    """All such facts of a cluster, as far as a node knows them. Never changed: `merged` makes new ones."""

    known: dict[Key, Rollback] = field(default_factory=dict)  # ascending

    KINDS: ClassVar[tuple[str, ...]] = (ROLLBACK, QUESTION)
    PASSING: ClassVar[bool] = False

    def having(self, *facts: Rollback) -> "Rollbacks":
        """These and those together, as far as they are kept; these themselves when nothing is new."""
        known = dict(self.known)
        for fact in facts:
            before = known.get(fact.key)
            if before is None or fact.rank > before.rank:
                known[fact.key] = fact
        # Everybody keeps the same of the same, in whatever order it came.
        kept = _newest(known.values())
        merged = Rollbacks({fact.key: fact for fact in sorted(kept, key=lambda one: one.key)})
        return self if merged.known == self.known else merged

    def merged(self, other: "Rollbacks") -> "Rollbacks":
        """See `ekko.facts.FactSet`."""
        return self.having(*other.known.values())

    def without(self, over: Callable[[Generation], bool]) -> "Rollbacks":
        """See `ekko.facts.FactSet`."""
        kept = {key: fact for key, fact in self.known.items() if not over(fact.model)}
        return self if len(kept) == len(self.known) else Rollbacks(kept)

    def learned(self, entries: Sequence[SchemaEntry]) -> "Rollbacks":
        """See `ekko.facts.FactSet`."""
        return self.having(*map(_parse, entries))

    def entries(self) -> list[SchemaEntry]:
        """See `ekko.facts.FactSet`."""
        return [entry_of(fact) for fact in self.known.values()]

    def of(self, model: Generation) -> list[Rollback]:
        """All that is known of a model, the newest first."""
        found = [fact for fact in self.known.values() if fact.model == model]
        return sorted(found, key=lambda fact: fact.epoch, reverse=True)

    def current(self, model: Generation) -> Rollback | None:
        """The one that counts: the newest that is more than a question."""
        return next((fact for fact in self.of(model) if not fact.dry), None)

    def running(self, model: Generation) -> Rollback | None:
        """The one that somebody carries out now, or is to."""
        current = self.current(model)
        return None if current is None or current.over else current

    def answering(self, request: int) -> Rollback | None:
        """What became of a request: the newest that carries it out, or it itself."""
        found = [fact for fact in self.known.values() if request in (fact.epoch, fact.request)]
        asked = [fact for fact in found if not is_training(fact.model.name)]  # of a trained model there are two
        return max(asked or found, key=lambda fact: fact.epoch, default=None)

    def beside(self, fact: Rollback) -> Rollback | None:
        """That of the training model which belongs to one of the served model (`ekko.rollback.trained`): the newest."""
        name, request = training_name(fact.model.name), fact.request or fact.epoch
        found = [one for one in self.known.values() if one.model.name == name and one.request == request and not one.dry]
        return max(found, key=lambda one: one.epoch, default=None)

    def shown(self, fact: Rollback) -> Rollback:
        """The same for people: who carried it out may have died before the end of it, when another one took its place."""
        current = None if fact.dry or fact.over else self.current(fact.model)
        if current is None or current.epoch <= fact.epoch:
            return fact
        who = f"witness {current.witness!r}" if current.witness else "an operator"
        reason = f"another rollback of the model has begun in its place (epoch {current.epoch:016x}, {who})"
        return shortened(replace(fact, step=Step.FAILED, share=PER_MILLE, reason=reason))

    def next_epoch(self, model: Generation, random: int, above: int = 0) -> int:
        """A number above this one and all of this model that are known, and like no other; `random`: 32 random bits."""
        newest = max([above, *(fact.epoch for fact in self.of(model))])
        round_ = (newest >> _RANDOM_BITS) + 1
        return round_ << _RANDOM_BITS | random & ((1 << _RANDOM_BITS) - 1)

    def share(self, model: Generation) -> float:
        """Of its traffic a model may answer so much now, 0 to 1; the rest is for another one."""
        running = self.running(model)
        return 1.0 if running is None or running.step is Step.REQUESTED else running.share / PER_MILLE


def _newest(facts: Iterable[Rollback]) -> list[Rollback]:
    alike: dict[tuple[Generation, bool], list[Rollback]] = {}
    for fact in facts:
        alike.setdefault((fact.model, fact.dry), []).append(fact)
    kept: list[Rollback] = []
    for own in alike.values():
        kept += sorted(own, key=lambda one: one.epoch, reverse=True)[:HISTORY_MAX]
    return sorted(kept, key=lambda one: (not one.dry, one.requested_ms, one.key), reverse=True)[:ROLLBACKS_MAX]


def entry_of(fact: Rollback) -> SchemaEntry:
    """A fact as a schema entry: equal facts are equal bytes."""
    family = model_id(label_of(fact.model.name, fact.model.incarnation))
    name = f"{QUESTION if fact.dry else ROLLBACK}:{fact.epoch:016x}"
    return SchemaEntry(family, name, bytes(msgpack.packb(_body(fact))), EXTRAS_SINCE)


def fact_of(model: Generation, epoch: int, body: bytes) -> Rollback:
    """The fact that an entry's body is.

    Raises:
        RemoteProtocolError: it is none.
    """
    family = model_id(label_of(model.name, model.incarnation))
    return _parse(SchemaEntry(family, f"{ROLLBACK}:{epoch:016x}", body, EXTRAS_SINCE))


def _parse(entry: SchemaEntry) -> Rollback:
    """A fact of a peer.

    Raises:
        RemoteProtocolError: it is none that `entry_of` could have made.
    """
    try:
        fact = _of_body(msgpack.unpackb(entry.body))
        same = entry_of(fact)
    except Exception as error:  # junk can fail in any way; all of it is the peer's fault
        raise RemoteProtocolError(f"schema entry {entry.name!r} cannot be understood: {error}") from error
    if same != entry:
        raise RemoteProtocolError(f"schema entry {entry.name!r} is spelled in another way")
    return fact


def shortened(fact: Rollback) -> Rollback:
    """The same within the limits of a fact: a long reason is cut, and of many nodes the last are left out."""
    reason = fact.reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")
    return replace(fact, reason=reason, unreachable=fact.unreachable[:NODES_MAX])


_NUMBERS: Final = (
    "epoch",
    "to_ms",
    "requested_ms",
    "request",
    "version",
    "cut_ms",
    "rows",
    "deletions",
    "payload_bytes",
    "estimate_ms",
    "at_risk",
    "others",
    "rows_done",
    "changed_ms",
    "share",
)


def _body(fact: Rollback) -> list[object]:
    scope = fact.scope
    return [
        [fact.model.name, fact.model.incarnation],
        int(fact.step),
        [fact.automatic, fact.dry],
        [scope.tables, scope.writer, scope.writers, scope.key_first, scope.key_end - 1],  # 2**64 has no place in msgpack
        [fact.asked_by, fact.witness, fact.unreachable, fact.reason],
        [getattr(fact, name) for name in _NUMBERS],
    ]


def _of_body(body: Any) -> Rollback:
    (name, incarnation), step, (automatic, dry), scope, (asked_by, witness, unreachable, reason), numbers = body
    if _uint64(incarnation) > INCARNATION_MAX:
        raise ValueError(f"incarnation {incarnation}")
    if type(automatic) is not bool or type(dry) is not bool:
        raise ValueError("a flag that is none")
    values = {name: _uint64(number) for name, number in zip(_NUMBERS, numbers, strict=True)}
    if values["share"] > PER_MILLE:
        raise ValueError(f"a share of {values['share']} per mille")
    if len(unreachable) > NODES_MAX or len(_text(reason, REASON_BYTES_MAX)) > REASON_BYTES_MAX:
        raise ValueError("too many words")
    return Rollback(
        Generation(check_name("model", name), incarnation),
        step=Step(step),
        scope=_scope_of(scope),
        automatic=automatic,
        dry=dry,
        asked_by=_text(asked_by, NODE_BYTES_MAX),
        witness=_text(witness, NODE_BYTES_MAX),
        unreachable=tuple(_text(node, NODE_BYTES_MAX) for node in unreachable),
        reason=reason,
        **values,
    )


def _scope_of(raw: Any) -> Scope:
    tables, writer, writers, first, last = raw
    if len(writers) > WRITERS_IN_SCOPE_MAX or not all(type(one) is int and 0 <= one < 4_096 for one in writers):
        raise ValueError(f"writers {writers!r}")
    if _uint64(first) > _uint64(last):
        raise ValueError(f"keys {first} to {last}")
    return Scope(
        tuple(check_name("table", table) for table in tables),
        _text(writer, NODE_BYTES_MAX),
        tuple(writers),
        first,
        last + 1,
    )


def _text(value: Any, bytes_max: int) -> str:
    if not isinstance(value, str) or len(value.encode()) > bytes_max:
        raise ValueError(f"{value!r} is no text of at most {bytes_max} bytes")
    return value


def _uint64(number: Any) -> int:
    if type(number) is not int or not 0 <= number <= _UINT64_MAX:
        raise ValueError(f"{number!r} is not a 64-bit number")
    return number


def check_free(rollbacks: Rollbacks, model: Generation) -> None:
    """Refuse another rollback while one runs.

    Raises:
        ModelError: naming it.
    """
    running = rollbacks.running(model)
    if running is not None:
        who = f"by witness {running.witness!r}" if running.witness else "and waits for a witness"
        raise ModelError(
            f"model {model.name!r} is being rolled back already, {who} (step {running.step.name.lower()}): "
            "wait for its end, `ekko rollback` shows it; or use --force to begin another one in its place"
        )
