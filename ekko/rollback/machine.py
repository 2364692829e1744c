r"""One rollback of one model, as a state machine: events in, effects out; no I/O, no clock (paper, section 5.3.2; R13, R15).

Think of a printer who recalls a misprinted page. First the presses that print it are stopped (fence), then all copies that are
on the road are waited for (converge); only then does he compare with the proof, since what was still on the road would come
after his comparison and stay. What is to be changed is written down before the first slip is sent out (plan), so that whoever
goes on in his place sends out the same; and the presses start again when every reader has the slip, not before (lift).

    FENCING -> CONVERGING -> PLANNING -> WRITING -> WAITING -> PROBING -> LIFTING -> DONE
        \___________\___________\__________ LIFTING -> FAILED: nothing could be, and nothing was written

Every question is asked again until it is answered, since its answer may be lost with whoever owed it; so every effect must be
harmless when it comes twice. A witness that starts again asks for the fence first, whatever it did before: a fence of the same
epoch is answered at once. Then it goes on with the plan that it finds, or makes one: if it died before the plan was durable,
there is none, and nothing was written. Should a higher epoch appear, somebody else has taken over, and this one ends without
another word (`Superseded`): the fence of the higher epoch keeps its writes out.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, assert_never

from ekko.rollback.facts import PER_MILLE, Rollback, Step, shortened
from ekko.rollback.plan import Summary

# A question without an answer is asked again after so long; the fence tells by itself whom it waits for.
ASK_AGAIN_MS: Final = 2_000
LOOK_AGAIN_MS: Final = 20  # whether all of what was fenced has come; local, and cheap
# Members that do not answer a fence are expelled after so long (R15).
PATIENCE_MS: Final = 10_000
# Batches written and not answered yet: the node's own queue is bounded by it.
WINDOW: Final = 8
WRITE_AGAIN_MS: Final = 200
# A little traffic, per mille, until the verdict is healthy; and for how long a verdict that is not corrupted is waited for.
SMALL_SHARE: Final = 10
PROBE_MS_MAX: Final = 120_000
TELL_EVERY_MS: Final = 1_000
# What a rollback takes is told by phase: each lasts until a step of the next one begins.
PHASES: Final = (
    ("fence", (Step.FENCING, Step.CONVERGING)),
    ("compare", (Step.PLANNING,)),
    ("write", (Step.WRITING,)),
    ("visible", (Step.WAITING,)),
    ("", (Step.PROBING, Step.LIFTING)),
)


# --- events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begun:
    """Carry this out. `plan`: one of this epoch that was found, from the life before."""

    plan: Summary | None = None


@dataclass(frozen=True, slots=True)
class Fenced:
    """Every reachable member stopped to listen to the model's writers, and has all of what they wrote."""


@dataclass(frozen=True, slots=True)
class FenceWaits:
    """For these members."""

    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Covered:
    """Whether everything that the fence left is here (R15: before the witness compares)."""

    covered: bool


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan is durable; or, of a dry run, what it would be."""

    summary: Summary
    estimate_ms: int


@dataclass(frozen=True, slots=True)
class Written:
    """A batch of the plan is stored here, and on its way."""

    batch: int


@dataclass(frozen=True, slots=True)
class NotWritten:
    """A batch could not be stored now."""

    batch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Everywhere:
    """Who lags behind all that was written back, and who is silent and not waited for; nobody lags: all have it."""

    lagging: tuple[str, ...]
    silent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on the model since its rows are back: "healthy", "uncertain", "corrupted"; empty: nobody judges it."""

    state: str


@dataclass(frozen=True, slots=True)
class NotTrained:
    """All is restored, but what servers train of it could not be: they will serve theirs again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Lifted:
    """Writers may go on."""


@dataclass(frozen=True, slots=True)
class Impossible:
    """It cannot be done, and the reason says why and what to do. Nothing was written."""

    reason: str


@dataclass(frozen=True, slots=True)
class Superseded:
    """A rollback of a higher epoch has begun."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The fence of this epoch does not stand any more, though nobody has begun a rollback after this one."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The operator ends the wait for a verdict."""


@dataclass(frozen=True, slots=True)
class TimerFired:
    """`Machine.deadline_ms` has come."""


Event = (
    Begun
    | Fenced
    | FenceWaits
    | Covered
    | Planned
    | Written
    | NotWritten
    | Everywhere
    | Judged
    | NotTrained
    | Lifted
    | Impossible
    | Superseded
    | Lost
    | Finish
    | TimerFired
)


# --- effects --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """Let everybody know this of the rollback."""

    fact: Rollback


@dataclass(frozen=True, slots=True)
class Fence:
    """Stop the model's writers; members that do not answer for `PATIENCE_MS` are no members any more (R15)."""


@dataclass(frozen=True, slots=True)
class LookCovered:
    """Is everything here that the fence left? Answered with `Covered`."""


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Work out what differs from the cut, and make it durable. Answered with `Planned` or `Impossible`."""


@dataclass(frozen=True, slots=True)
class Write:
    """Write a batch of the plan back. Answered with `Written` or `NotWritten`."""

    batch: int


@dataclass(frozen=True, slots=True)
class AskEverywhere:
    """Has every replica what was written back? Answered with `Everywhere`."""


@dataclass(frozen=True, slots=True)
class AskVerdict:
    """How is the model judged? Answered with `Judged`."""


@dataclass(frozen=True, slots=True)
class Lift:
    """Let writers go on. Answered with `Lifted`."""


@dataclass(frozen=True, slots=True)
class End:
    """It is over here: forget the plan."""


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    name: str
    fields: tuple[tuple[str, object], ...] = ()


Effect = Tell | Fence | LookCovered | MakePlan | Write | AskEverywhere | AskVerdict | Lift | End | Note


class Machine:
    """Carries one rollback out.

    Args:
        fact: what is to be done, with this witness's name, as all are told of it. It may have been begun in a life before.
        judged: whether anybody judges the model; else its traffic comes back as soon as its rows are.
        small_share: the little traffic, per mille, by which it is judged before all of it comes back.
    """

    def __init__(self, fact: Rollback, *, judged: bool, small_share: int = SMALL_SHARE) -> None:
        assert fact.witness, "somebody carries it out"
        self.fact = fact
        self.over = False
        self.lost = False  # over, and to be begun again under a higher epoch
        self._judged = judged
        self._small_share = small_share
        self._effects: list[Effect] = []
        self._covered = False  # everything that the fence left has been here, in this life
        self._plan: Summary | None = None
        self._next = 0  # the batch to be written next
        self._open: dict[int, None] = {}  # batches that are not answered yet
        self._failed: dict[int, None] = {}  # those that have to be written again
        self.begun_ms: dict[Step, int] = {}  # monotonic, when each step began in this life
        self._step_ms = 0  # the same, of the step at hand
        self._told_ms = 0
        self._failing = ""  # why, while what was fenced is being lifted again
        self._deadline_ms = 0

    @property
    def deadline_ms(self) -> int | None:
        """Monotonic time at which `TimerFired` is due; None: it is over."""
        return None if self.over else self._deadline_ms

    @property
    def step(self) -> Step:
        """How far it is."""
        return self.fact.step

    @property
    def took_ms(self) -> dict[str, int]:
        """How long each phase took that is over, by the witness's clock: "fence", until all that it left is here; "compare",
        until the plan is durable; "write", until all of it is stored here and sent; "visible", until every replica has it.
        """
        begun = self.begun_ms
        since = [(name, min((begun[step] for step in steps if step in begun), default=None)) for name, steps in PHASES]
        return {
            name: end_ms - begin_ms
            for (name, begin_ms), (_, end_ms) in pairwise(since)
            if begin_ms is not None and end_ms is not None
        }

    def handle(self, event: Event, now_ms: int, unix_ms: int) -> list[Effect]:
        """Advance by one event.

        Args:
            event: what happened.
            now_ms: monotonic.
            unix_ms: the wall clock, for what others are told.

        Returns:
            Effects to carry out, in order.
        """
        self._effects = []
        if not self.over:
            self._dispatch(event, now_ms, unix_ms)
        return self._effects

    def _dispatch(self, event: Event, now_ms: int, unix_ms: int) -> None:
        match event:
            case Begun(plan):
                self._on_begun(plan, now_ms, unix_ms)
            case Fenced():
                if self.step is Step.FENCING:
                    self._enter(Step.CONVERGING, now_ms, unix_ms)
                    self._look_covered(now_ms)
            case FenceWaits(nodes):
                self._on_fence_waits(nodes, now_ms, unix_ms)
            case Covered(covered):
                if self.step is Step.CONVERGING and covered:
                    self._covered = True
                    self._on_covered(now_ms, unix_ms)
            case Planned(summary, estimate_ms):
                if self.step is Step.PLANNING:
                    self._on_planned(summary, estimate_ms, now_ms, unix_ms)
            case Written(batch):
                self._on_written(batch, now_ms, unix_ms)
            case NotWritten(batch, reason):
                self._on_not_written(batch, reason, now_ms)
            case Everywhere(lagging, silent):
                self._on_everywhere(lagging, silent, now_ms, unix_ms)
            case Judged(state):
                self._on_judged(state, now_ms, unix_ms)
            case NotTrained(reason):
                if self.step is Step.LIFTING and not self._failing:
                    self._failing = reason
                    self._tell(unix_ms, now_ms, reason=reason)
            case Lifted():
                self._on_lifted(now_ms, unix_ms)
            case Impossible(reason):
                self._on_impossible(reason, now_ms, unix_ms)
            case Superseded():
                self.over = True
                self._effects.append(End())
            case Lost():
                if Step.FENCING <= self.step <= Step.PROBING:
                    self.over = self.lost = True
                    self._effects += [Note("rollback_lost_its_fence"), End()]
            case Finish():
                if self.step is Step.PROBING:
                    self._enter(Step.LIFTING, now_ms, unix_ms)
                    self._lift(now_ms)
            case TimerFired():
                if now_ms >= self._deadline_ms:
                    self._on_timer(now_ms, unix_ms)
            case _:
                assert_never(event)

    # --- the way there

    def _on_begun(self, plan: Summary | None, now_ms: int, unix_ms: int) -> None:
        self._plan = plan
        if self.fact.dry:
            self._enter(Step.PLANNING, now_ms, unix_ms)
            self._make_plan(now_ms)
            return
        if self.step is Step.LIFTING:  # all was restored in the life before
            self._failing = self.fact.reason
            self._lift(now_ms)
            return
        self._enter(Step.FENCING, now_ms, unix_ms, share=0)
        self._fence(now_ms)

    def _fence(self, now_ms: int) -> None:
        self._ask(now_ms, ASK_AGAIN_MS)
        self._effects.append(Fence())

    def _on_fence_waits(self, nodes: tuple[str, ...], now_ms: int, unix_ms: int) -> None:
        if self.step is not Step.FENCING or nodes == self.fact.unreachable:
            return
        self._tell(unix_ms, now_ms, unreachable=nodes)
        self._effects.append(Note("rollback_waits", (("nodes", nodes),)))

    def _look_covered(self, now_ms: int) -> None:
        self._ask(now_ms, LOOK_AGAIN_MS)
        self._effects.append(LookCovered())

    def _on_covered(self, now_ms: int, unix_ms: int) -> None:
        if self._plan is not None:  # of the life before; what it says is as true as it was, since nobody wrote meanwhile
            self._begin_writing(now_ms, unix_ms)
            return
        self._enter(Step.PLANNING, now_ms, unix_ms)
        self._make_plan(now_ms)

    def _make_plan(self, now_ms: int) -> None:
        assert self._covered or self.fact.dry, "the witness covers F before it compares (R15)"
        self._deadline_ms = now_ms + PATIENCE_MS  # local: it is answered, and nothing is asked again
        self._effects.append(MakePlan())

    def _on_planned(self, summary: Summary, estimate_ms: int, now_ms: int, unix_ms: int) -> None:
        self._plan = summary
        figures = replace(
            self.fact,
            cut_ms=summary.cut_ms,
            rows=summary.rows,
            deletions=summary.deletions,
            payload_bytes=summary.payload_bytes,
            at_risk=max(summary.at_risk, self.fact.at_risk),  # of who died over it, where it looked for the same moment
            others=summary.others,
            estimate_ms=estimate_ms,
        )
        self.fact = figures
        if self.fact.dry:
            self._end(Step.DONE, now_ms, unix_ms)
            return
        self._begin_writing(now_ms, unix_ms)

    # --- writing back

    def _begin_writing(self, now_ms: int, unix_ms: int) -> None:
        assert self._plan is not None, "durable before the first write"
        self._enter(Step.WRITING, now_ms, unix_ms, rows_done=0)
        self._write_on(now_ms, unix_ms)

    def _write_on(self, now_ms: int, unix_ms: int) -> None:
        assert self._plan is not None
        while self._next < self._plan.batches and len(self._open) < WINDOW and not self._failed:
            self._open[self._next] = None
            self._effects.append(Write(self._next))
            self._next += 1
        if not self._open and not self._failed:
            self._enter(Step.WAITING, now_ms, unix_ms, rows_done=self._plan.rows)
            self._ask_everywhere(now_ms)
        elif not self._failed:
            self._deadline_ms = now_ms + PATIENCE_MS

    def _on_written(self, batch: int, now_ms: int, unix_ms: int) -> None:
        if self.step is not Step.WRITING or batch not in self._open:
            return
        del self._open[batch]
        assert self._plan is not None
        done = self._plan.rows * (self._next - len(self._open)) // max(1, self._plan.batches)
        if now_ms - self._told_ms >= TELL_EVERY_MS:
            self._tell(unix_ms, now_ms, rows_done=done)
        self._write_on(now_ms, unix_ms)

    def _on_not_written(self, batch: int, reason: str, now_ms: int) -> None:
        if self.step is not Step.WRITING or batch not in self._open:
            return
        del self._open[batch]
        self._failed[batch] = None
        self._deadline_ms = now_ms + WRITE_AGAIN_MS
        self._effects.append(Note("rollback_write_refused", (("reason", reason),)))

    # --- until all have it

    def _ask_everywhere(self, now_ms: int) -> None:
        self._ask(now_ms, 2 * ASK_AGAIN_MS)
        self._effects.append(AskEverywhere())

    def _on_everywhere(self, lagging: tuple[str, ...], silent: tuple[str, ...], now_ms: int, unix_ms: int) -> None:
        if self.step is not Step.WAITING:
            return
        if lagging:
            self._effects.append(Note("rollback_lags", (("nodes", lagging),)))
            self._ask_everywhere(now_ms)
            return
        unreachable = tuple(sorted({*self.fact.unreachable, *silent}))
        if not self._judged:
            self._enter(Step.LIFTING, now_ms, unix_ms, unreachable=unreachable, share=PER_MILLE)
            self._lift(now_ms)
            return
        self._enter(Step.PROBING, now_ms, unix_ms, unreachable=unreachable, share=self._small_share)
        self._ask_verdict(now_ms)

    def _ask_verdict(self, now_ms: int) -> None:
        self._ask(now_ms, TELL_EVERY_MS)
        self._effects.append(AskVerdict())

    def _on_judged(self, state: str, now_ms: int, unix_ms: int) -> None:
        if self.step is not Step.PROBING:
            return
        waited = now_ms - self._step_ms >= PROBE_MS_MAX
        if state in ("healthy", "") or (waited and state == "uncertain"):
            self._enter(Step.LIFTING, now_ms, unix_ms, share=PER_MILLE)
            self._lift(now_ms)
        elif waited:
            # It was not the rows, or the cut was too late: a person has to look. Writers stay out meanwhile.
            self._step_ms = now_ms
            self._effects.append(Note("rollback_did_not_help", (("model", self.fact.model.name), ("verdict", state))))

    # --- the end

    def _lift(self, now_ms: int) -> None:
        self._ask(now_ms, ASK_AGAIN_MS)
        self._effects.append(Lift())

    def _on_lifted(self, now_ms: int, unix_ms: int) -> None:
        if self.step is not Step.LIFTING:
            return
        self._end(Step.FAILED if self._failing else Step.DONE, now_ms, unix_ms)

    def _on_impossible(self, reason: str, now_ms: int, unix_ms: int) -> None:
        if self.step not in (Step.FENCING, Step.CONVERGING, Step.PLANNING):
            return
        self.fact = replace(self.fact, reason=reason)
        if self.fact.dry:
            self._end(Step.FAILED, now_ms, unix_ms)
            return
        self._failing = reason
        self._enter(Step.LIFTING, now_ms, unix_ms, share=PER_MILLE)
        self._lift(now_ms)

    def _end(self, step: Step, now_ms: int, unix_ms: int) -> None:
        self._enter(step, now_ms, unix_ms, share=PER_MILLE)
        self.over = True
        if took_ms := self.took_ms:
            self._effects.append(Note("rollback_took", tuple((f"{name}_ms", ms) for name, ms in took_ms.items())))
        self._effects.append(End())

    # --- time

    def _on_timer(self, now_ms: int, unix_ms: int) -> None:
        match self.step:
            case Step.FENCING:
                self._fence(now_ms)
            case Step.CONVERGING:
                self._look_covered(now_ms)
            case Step.WRITING:
                if self._failed:
                    for batch in self._failed:
                        self._open[batch] = None
                        self._effects.append(Write(batch))
                    self._failed.clear()
                self._write_on(now_ms, unix_ms)
            case Step.WAITING:
                self._ask_everywhere(now_ms)
            case Step.PROBING:
                self._ask_verdict(now_ms)
            case Step.LIFTING:
                self._lift(now_ms)
            case _:
                self._deadline_ms = now_ms + PATIENCE_MS

    def _ask(self, now_ms: int, again_ms: int) -> None:
        self._deadline_ms = now_ms + again_ms

    def _enter(self, step: Step, now_ms: int, unix_ms: int, **changes: object) -> None:
        self._step_ms = now_ms
        self.begun_ms[step] = now_ms
        self._tell(unix_ms, now_ms, step=step, changed_ms=unix_ms, **changes)

    def _tell(self, unix_ms: int, now_ms: int, **changes: object) -> None:
        self._told_ms = now_ms
        fact = replace(self.fact, **changes)  # type: ignore[arg-type]
        self.fact = shortened(replace(fact, version=fact.version + 1))  # else nobody would take it for a fact
        self._effects.append(Tell(self.fact))
