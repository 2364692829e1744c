"""Does what the machine of a rollback decides, at the witness: asks the protocol, makes the plan, writes it back.

Nothing here waits, and nothing takes long: answers of the protocol come later (`on_reply`), and a plan is made in slices
(`work`). So the daemon's loop and the simulator's virtual time drive the same code.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from ekko.errors import EkkoError, StoreError
from ekko.rollback import machine as r
from ekko.rollback.diff import differences, versions_now
from ekko.rollback.draft import Draft, Known, Pieces
from ekko.rollback.facts import Rollback, Step, entry_of
from ekko.rollback.moments import HEALTHY, show_moment
from ekko.rollback.past import Past
from ekko.rollback.plan import READ_ERRORS, Plan, PlanBatch, Plans, PlanWriter, RowsAtRisk, Summary, read_plan, write_plan
from ekko.rollback.risk import KEPT_MAX, encode_risk
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.classes import TAKEN_BACK
from p2p.messages.fences import CLOSED, LIFTED
from p2p.replica import RowColumns

# What the protocol is asked, and what it answers.
Asked = m.PublishRequested | m.CaughtUpRequested | m.FenceRequested | m.LiftRequested
Reply = m.Published | m.Refused | m.WaitEnded | m.Fenced | m.FenceWaits | m.Lifted
EVERYWHERE_MS = 2_000  # how long one question whether all have it may wait; it is asked again


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a rollback needs of its node.

    Args:
        store: its models.
        past: of these.
        plans: where plans are kept.
        ask: hands the protocol the request that is made of a number; its answer comes to `on_reply` under that number.
        tell: lets all nodes know a fact.
        verdict: of a model "healthy", "uncertain" or "corrupted", by what was said of moments after this one, Unix ms; empty:
            nobody judges the model.
        healthy_until: the newest moment at which a model was healthy, Unix ms; None: never judged.
        fence_of: the last fence of a family, lifted or not.
        caught_up: whether everything of a family is here that others are known to have.
        estimate_ms: how long so many bytes take to all others.
        note: for the log.
        beside: the rollback of what servers train of the same model, which belongs to one; None: there is none.
        small_share: of the traffic, per mille, by which a model is judged before all of it comes back.
    """

    store: Store
    past: Past
    plans: Plans
    ask: Callable[[Callable[[int], Asked]], int]
    tell: Callable[[Rollback], None]
    verdict: Callable[[str, int], str]
    healthy_until: Callable[[str], int | None]
    fence_of: Callable[[int], m.Fence | None]
    caught_up: Callable[[int], bool]
    estimate_ms: Callable[[int], int]
    note: Callable[[str, dict[str, object]], None]
    small_share: int = r.SMALL_SHARE
    beside: Callable[[Rollback], Rollback | None] = lambda _: None


class Performer:
    """Carries one rollback out; use `begin`, then `on_reply`, `on_timer` and `work` until `over`.

    Args:
        fact: what is to be done; this node is its witness.
        node: what is around it.
    """

    def __init__(self, fact: Rollback, node: Surroundings) -> None:
        self._node = node
        self._machine = r.Machine(fact, judged=bool(node.verdict(fact.model.name, 0)), small_share=node.small_share)
        self._asked: dict[int, r.Effect] = {}  # what the protocol has not answered yet, by request
        self._planning: Generator[Summary | None, None, None] | None = None
        self._writing: PlanWriter | None = None  # where that plan goes
        self._draft: Draft | None = None  # of a plan, while the fence closes
        self._plan: Plan | None = None
        self._cut_found_ms = 0  # of the plan or its draft, from the moment on at which it is begun

    @property
    def fact(self) -> Rollback:
        """How far it is."""
        return self._machine.fact

    @property
    def step(self) -> Step:
        """The same, in a word."""
        return self._machine.step

    @property
    def took_ms(self) -> dict[str, int]:
        """See `machine.Machine.took_ms`."""
        return self._machine.took_ms

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._machine.over

    @property
    def waiting(self) -> list[int]:
        """Requests that the protocol has not answered yet."""
        return list(self._asked)

    @property
    def lost(self) -> bool:
        """Whether it has ended and is to be begun again under a higher epoch."""
        return self._machine.lost

    @property
    def deadline_ms(self) -> int | None:
        """Monotonic time at which `on_timer` is wanted."""
        return self._machine.deadline_ms

    @property
    def working(self) -> bool:
        """Whether `work` has anything to do."""
        return self._planning is not None or (self._draft is not None and self._draft.working)

    @property
    def holds_cut_ms(self) -> int | None:
        """The moment beyond which the past must not be flushed while this goes on; None: no such moment is known yet."""
        fact = self.fact
        return None if self.over else (self._cut_found_ms or fact.cut_ms or fact.to_ms or None)

    def begin(self, now: m.Now, why: str = "") -> None:
        """Start, or go on with what a life before left; `why`: why it cannot be, if that is known."""
        fact = self.fact
        plan = None if fact.dry else read_plan(self._node.plans, fact.model)
        if plan is not None and plan.epoch != fact.epoch:
            plan.close()
            plan = None
            self._node.plans.drop(fact.model)
        self._plan = plan
        if plan is None and not fact.dry and fact.step is Step.FENCING and not self._is_fenced():
            why = why or self.hopeless()
            if why:
                self._feed(r.Impossible(why), now)  # before anybody is stopped
                return
        self._feed(r.Begun(None if plan is None else plan.summary), now)
        if fact.dry and why:
            self._feed(r.Impossible(why), now)

    def hopeless(self) -> str:
        """Why there is no moment to go back to here; empty: there is one, as far as is known before the fence."""
        try:
            self._cut_ms(self._wanted_ms())
        except EkkoError as error:
            return str(error)
        return ""

    def _is_fenced(self) -> bool:
        fence = self._node.fence_of(self._family)
        return fence is not None and fence.stage != LIFTED

    def supersede(self, now: m.Now) -> None:
        """A higher epoch is there."""
        self._feed(r.Superseded(), now)

    def finish(self, now: m.Now) -> None:
        """The operator ends the wait for a verdict."""
        self._feed(r.Finish(), now)

    def on_timer(self, now: m.Now) -> None:
        """Time has passed."""
        self._feed(r.TimerFired(), now)

    def on_reply(self, reply: Reply, request: int, now: m.Now) -> bool:
        """Whether an answer of the protocol was for this."""
        effect = self._asked.get(request)
        if effect is None:
            return False
        if not isinstance(reply, m.FenceWaits):
            del self._asked[request]
        self._on_answer(effect, reply, now)
        return True

    def _on_answer(self, effect: r.Effect, reply: Reply, now: m.Now) -> None:
        match effect, reply:
            case r.Fence(), m.Fenced():
                self._feed(r.Fenced(), now)
            case r.Fence(), m.FenceWaits(nodes=nodes):
                self._feed(r.FenceWaits(nodes), now)
            case r.Write(batch), m.Published():
                self._feed(r.Written(batch), now)
            case r.Write(batch), m.Refused(reason=reason):
                self._feed(r.Lost() if self._lost() else r.NotWritten(batch, reason), now)
            case r.AskEverywhere(), m.WaitEnded(lagging=lagging, silent=silent):
                self._feed(r.Everywhere(lagging, silent), now)
            case r.Lift(), m.Lifted():
                self._feed(r.Lifted(), now)
            case r.Lift(), m.Refused():
                self._feed(r.Lifted(), now)  # it does not stand any more
            case r.Fence(), m.Refused(reason=reason) if not self._lost():
                self._feed(r.Impossible(reason), now)
            case r.Fence(), m.Refused():
                self._feed(r.Lost(), now)
            case _, m.Refused(reason=reason):
                # What may be asked again is; the machine's timer sees to it.
                self._node.note("rollback_refused", {"model": self.fact.model.name, "reason": reason})

    def _lost(self) -> bool:
        """Whether somebody has lifted the fence, or put another one in its place."""
        fence, epoch = self._node.fence_of(self._family), self.fact.epoch
        return fence is not None and (fence.epoch > epoch or (fence.epoch == epoch and fence.stage == LIFTED))

    def work(self, now: m.Now) -> None:
        """Go on with the plan, a slice of bounded size."""
        if self._planning is None:
            self._go_on_with_draft()
            return
        try:
            summary = next(self._planning)
        except (EkkoError, OSError) as error:
            self._planning = None
            self._feed(r.Impossible(str(error)), now)
            return
        if summary is None:
            return
        self._planning = None
        if not self.fact.dry:
            self._plan = read_plan(self._node.plans, self.fact.model)
            if self._plan is None:
                self._feed(r.Impossible("the plan that was just written cannot be read: look at the disk of this witness"), now)
                return
        self._feed(r.Planned(summary, self._node.estimate_ms(summary.payload_bytes)), now)

    def _go_on_with_draft(self) -> None:
        if self._draft is not None and self._draft.working:
            try:
                self._draft.work()
            except (EkkoError, OSError):  # if it still is so when the plan is made, that says why
                self._drop_draft()

    def _drop_draft(self) -> None:
        if self._draft is not None:
            self._draft.close()
            self._draft = None

    # --- effects

    def _feed(self, event: r.Event, now: m.Now) -> None:
        pending = [event]
        while pending:
            for effect in self._machine.handle(pending.pop(0), now.monotonic_ms, now.unix_ms):
                following = self._carry_out(effect, now)
                pending += [] if following is None else [following]

    def _carry_out(self, effect: r.Effect, now: m.Now) -> r.Event | None:
        fact, node = self.fact, self._node
        match effect:
            case r.Tell(told):
                node.tell(told)
            case r.Note(name, fields):
                node.note(name, {"model": fact.model.name, "epoch": f"{fact.epoch:016x}", **dict(fields)})
            case r.Fence():
                note = f"it is taken back to {self._wanted()}"
                self._ask(effect, lambda number: m.FenceRequested(number, self._family, fact.epoch, note, r.PATIENCE_MS))
                self._begin_draft(now)
            case r.LookCovered():
                fence = node.fence_of(self._family)
                closed = fence is not None and (fence.epoch, fence.stage) == (fact.epoch, CLOSED)
                return r.Covered(closed and node.caught_up(self._family))
            case r.MakePlan():
                return self._make_plan(now)
            case r.Write(batch):
                return self._write(effect, batch)
            case r.AskEverywhere():
                self._ask(effect, lambda number: m.CaughtUpRequested(number, self._family, EVERYWHERE_MS))
            case r.AskVerdict():
                return r.Judged(node.verdict(fact.model.name, fact.changed_ms))
            case r.Lift():
                beside = node.beside(fact)
                if beside is not None and not beside.over:
                    return None  # the machine's timer comes back to it
                self._ask(effect, lambda number: m.LiftRequested(number, self._family, fact.epoch))
                if beside is not None and beside.step is Step.FAILED:
                    return r.NotTrained(f"its rows are back, but servers serve theirs: {beside.model.name}: {beside.reason}")
            case r.End():
                self._end()
            case _:
                assert_never(effect)
        return None

    def _ask(self, effect: r.Effect, make: Callable[[int], Asked]) -> None:
        """Ask the protocol; what was asked before of the same kind is answered by this one's answer."""
        for number in [number for number, asked in self._asked.items() if asked == effect]:
            del self._asked[number]

        def note(number: int) -> Asked:
            # Before it is asked: the answer may come at once.
            self._asked[number] = effect
            return make(number)

        self._node.ask(note)

    def _end(self) -> None:
        if self._plan is not None:
            if self.fact.step is Step.DONE and self._plan.at_risk:
                self._keep_risk(self._plan.at_risk)
            self._plan.close()
            self._plan = None
        if self._planning is not None:
            self._planning.close()
            self._planning = None
        if self._writing is not None:
            self._writing.close()
            self._writing = None
        self._drop_draft()
        self._asked.clear()
        if not self.fact.dry:
            self._node.plans.drop(self.fact.model)

    def _keep_risk(self, rows: list[RowsAtRisk]) -> None:
        fact = self.fact
        try:
            self._node.plans.keep(fact.model, fact.epoch, encode_risk(rows), KEPT_MAX)
        except OSError as error:
            self._node.note("rows_at_risk_not_kept", {"model": fact.model.name, "reason": error.strerror})

    # --- the plan

    @property
    def _model(self) -> ModelStore:
        model = self._node.store.models.get(self.fact.model.name)
        if model is None or not self._node.store.holds(self.fact.model):
            raise StoreError(f"model {self.fact.model.name!r} was dropped")
        return model

    @property
    def _family(self) -> int:
        return self._model.spec.id

    def _wanted(self) -> str:
        return "its last healthy state" if self.fact.to_ms == HEALTHY else show_moment(self.fact.to_ms)

    def _make_plan(self, now: m.Now) -> r.Event | None:
        if self._planning is not None:
            return None
        fact, draft = self.fact, self._draft
        try:
            wanted_ms = self._wanted_ms()
            cut_ms = self._cut_found_ms = self._cut_ms(wanted_ms)
            if fact.dry:
                self._planning = _counted(cut_ms, self._differences(cut_ms, wanted_ms, now)({}))
            elif draft is not None and draft.of == (cut_ms, wanted_ms):
                self._writing = draft.writer
                self._planning = write_plan(draft.writer, draft.finish())
            else:  # another mark is known by now, or there is no draft
                self._drop_draft()
                self._writing = self._writer(cut_ms)
                self._planning = write_plan(self._writing, self._differences(cut_ms, wanted_ms, now)({}))
        except EkkoError as error:
            return r.Impossible(str(error))
        self._draft = None
        return None

    def _begin_draft(self, now: m.Now) -> None:
        """Work out what differs by now. Not of one writer's rows: who has written a row last may still change."""
        if self._draft is not None or self._plan is not None or self.fact.scope.writer:
            return
        with suppress(EkkoError):  # if it still is so when the plan is made, that says why
            wanted_ms = self._wanted_ms()
            cut_ms = self._cut_found_ms = self._cut_ms(wanted_ms)
            self._draft = Draft(self._writer(cut_ms), cut_ms, wanted_ms, self._differences(cut_ms, wanted_ms, now))

    def _writer(self, cut_ms: int) -> PlanWriter:
        fact = self.fact
        return PlanWriter(self._node.plans, fact.model, fact.epoch, cut_ms, entry_of(fact).body)

    def _differences(self, cut_ms: int, wanted_ms: int, now: m.Now) -> Callable[[Known], Pieces]:
        model, past, scope = self._model, self._node.past, self.fact.scope
        return lambda known: differences(model, past, cut_ms, wanted_ms, scope, now.unix_ms, known)

    def _wanted_ms(self) -> int:
        """The moment to which the model is to go back.

        Raises:
            StoreError: nobody knows one.
        """
        fact = self.fact
        if fact.to_ms != HEALTHY:
            return fact.to_ms
        healthy = self._node.healthy_until(fact.model.name)
        if healthy is None:
            raise StoreError(
                f"model {fact.model.name!r} was never judged healthy: say a time, `ekko rollback {fact.model.name} --to TIME`"
            )
        return healthy

    def _cut_ms(self, wanted_ms: int) -> int:
        """The newest valid mark.

        Raises:
            StoreError: there is none.
        """
        fact, past = self.fact, self._node.past
        model, kept = self._model, past.range(fact.model)
        if not model.holds_all:
            raise StoreError(
                f"witness {fact.witness!r} holds partitions {list(model.hold)} of {model.spec.partitions} of model "
                f"{fact.model.name!r}: have one witness hold all of them"
            )
        if kept is None:
            raise StoreError(
                f"witness {fact.witness!r} keeps nothing of the past of model {fact.model.name!r}: it has only begun"
            )
        if wanted_ms < kept[0]:
            raise StoreError(
                f"{show_moment(wanted_ms)} is before what witness {fact.witness!r} keeps of model {fact.model.name!r}, "
                f"{show_moment(kept[0])} to {show_moment(kept[1])}: choose a later time, or load a snapshot (`ekko load`)"
            )
        mark = past.mark(fact.model, wanted_ms)
        if mark is None:
            raise StoreError(
                f"witness {fact.witness!r} has no valid mark of model {fact.model.name!r} from {show_moment(kept[0])} up to "
                f"{show_moment(wanted_ms)}: it was behind all the while; choose a later time, or load a snapshot (`ekko load`)"
            )
        return mark

    # --- writing back

    def _write(self, effect: r.Write, number: int) -> r.Event | None:
        assert self._plan is not None, "durable before the first write (R15)"
        try:
            batch = self._left(self._plan.batch(number))
        except READ_ERRORS as error:
            return r.NotWritten(number, f"the plan cannot be read any more: {error}: look at the disk of this witness")
        if batch is None:
            return r.Written(number)  # in the life before
        classes = np.full(batch.keys.size, TAKEN_BACK, np.uint8)
        columns = (RowColumns(batch.table, batch.keys, batch.rows, priority=classes),)
        family, epoch = self._family, self.fact.epoch
        self._ask(effect, lambda request: m.PublishRequested(request, family, columns, through_fence=epoch))
        return None

    def _left(self, batch: PlanBatch) -> PlanBatch | None:
        """What of a batch is not as it is to be; None: all is."""
        table = self._model.tables_by_id.get(batch.table)
        if table is None:
            return None  # it was dropped
        now, live = versions_now(table, batch.keys), len(batch.rows)
        wanted = np.arange(batch.keys.size) < live
        same = now.live == wanted
        if live:
            same[:live] &= (now.rows[:live] == batch.rows).all(axis=1)
        if same.all():
            return None
        kept = ~same
        return PlanBatch(batch.table, batch.keys[kept], batch.rows[kept[:live]], batch.expected[kept])


def _counted(cut_ms: int, pieces: Iterator[PlanBatch | RowsAtRisk | None]) -> Generator[Summary | None, None, None]:
    """The figures of a plan that nobody writes."""
    batches = rows = deletions = payload_bytes = at_risk = others = 0
    for piece in pieces:
        match piece:
            case PlanBatch():
                batches, rows = batches + 1, rows + len(piece.keys)
                deletions += len(piece.keys) - len(piece.rows)
                payload_bytes, others = payload_bytes + piece.payload_bytes, others + piece.others
            case RowsAtRisk():
                at_risk += len(piece.keys)
        yield None
    yield Summary(cut_ms, batches, rows, deletions, payload_bytes, at_risk, others)
