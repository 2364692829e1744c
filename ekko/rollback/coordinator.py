"""Which rollbacks there are to be, and who carries them out: requests of operators, verdicts, witnesses that died.

Every node has one of these. Of nodes that are no witness it only writes requests down, for all to see. A witness takes one on,
or begins a rollback by itself when the model is judged corrupted; where there are several, they take turns by name, and
should two do it at once, the higher epoch counts. What a witness does not finish another one takes over.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ekko.errors import EkkoError, ModelError
from ekko.generations import Generation
from ekko.model import ModelSpec, served_name, training_name
from ekko.rollback.facts import PER_MILLE, ROLLBACKS_MAX, Key, Rollback, Rollbacks, Step, check_free, fact_of, shortened
from ekko.rollback.moments import HEALTHY, show_moment
from ekko.rollback.performer import Performer, Reply, Surroundings
from ekko.rollback.plan import read_plan
from ekko.rollback.scope import WHOLE, Scope
from ekko.rollback.trained import check_request, nobody_holds, scope_of
from ekko.store import Store
from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.messages.fences import LIFTED
from p2p.stamps import AHEAD_MS_MAX
from p2p.status import PeerStatus

# What the first witness by name does not take on within so long, the second does, and so on.
TURN_MS = 2_000
# A witness that is silent for so long is taken over from; longer than a restart of its process takes.
TAKEOVER_MS = 10_000
# A request that no witness has taken on is given up by who made it, and not taken on later. Clocks of nodes differ, so each
# counts from when it heard of it; what is so old that no clock explains it is not taken on, whenever it is heard of.
REQUEST_MS_MAX = 20_000
REQUEST_AGE_MS_MAX = REQUEST_MS_MAX + AHEAD_MS_MAX
LOOK_MS = 500
# Who waits for a request, in `_seen_ms`: the node that made it.
ASKED = "asked"
LEFT = "left"  # and that one is left to the witness that died over it
# After a rollback by verdict, the next one of the model has to wait: quality is measured over windows.
AUTOMATIC_EVERY_MS = 60_000


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """Of one node.

    Args:
        node: its id.
        witness: whether it is one.
        automatic: whether a verdict begins a rollback.
        automatic_every_ms: how long after a rollback of a model the next one by verdict has to wait.
    """

    node: str
    witness: bool
    automatic: bool = False
    automatic_every_ms: int = AUTOMATIC_EVERY_MS


@dataclass(slots=True)
class Coordinator:
    """The rollbacks of one node's life.

    Args:
        options: who it is.
        store: the models.
        facts: what is known of rollbacks.
        tell: lets all nodes know a fact.
        witnesses: the living witnesses that hold all of a model, this node among them if it is one, sorted.
        ready: whether the node has caught up with the cluster, so that it knows what the others know.
        random: 32 random bits.
        around: what a rollback needs; asked for at witnesses only.
    """

    options: CoordinatorOptions
    store: Store
    facts: Callable[[], Rollbacks]
    tell: Callable[[Rollback], None]
    witnesses: Callable[[Generation], tuple[str, ...]]
    ready: Callable[[], bool]
    random: Callable[[], int]
    around: Surroundings | None = None
    make_performer: type[Performer] = Performer
    performers: dict[tuple[Generation, bool], Performer] = field(default_factory=dict)  # by model, and whether it is dry
    _seen_ms: dict[tuple[Key, str], int] = field(default_factory=dict)  # since when it waits to be taken on, and from whom
    _corrupted_ms: dict[Generation, int] = field(default_factory=dict)  # since when a model is known to be
    _took_ms: dict[int, dict[str, int]] = field(default_factory=dict)  # by epoch, of those that ended here
    _look_ms: int = 0
    _remembered: dict[Generation, None] = field(default_factory=dict)  # models whose plan was looked for

    # --- operators

    def request(self, model: str, to_ms: int, scope: Scope, now: m.Now, *, dry: bool = False, force: bool = False) -> Rollback:
        """Ask for a rollback; some witness takes it on.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """
        generation = self._generation(model)
        held, training = self.store.models[model].spec, self._training_of(generation)
        served = served_name(model)
        check_request(model, served if served in self.store.models else model, scope, trained=training is not None)
        if unknown := [table for table in scope.tables if table not in held.tables and table != "_dense"]:
            known = ", ".join(map(repr, held.tables)) or "none"
            raise ModelError(f"model {model!r} has no table {unknown[0]!r}: it has {known}")
        if scope.writer and not scope.writers:
            raise ModelError(f"node {scope.writer!r} has not written model {model!r}, as far as is known here")
        if to_ms > now.unix_ms + AHEAD_MS_MAX:
            raise ModelError(
                f"{show_moment(to_ms)} lies ahead of now: give a moment in Unix milliseconds, or 0 for the last healthy one"
            )
        if not self.witnesses(generation):
            raise EkkoError(
                f"no witness is alive in this cluster that holds all of model {model!r}, so nobody knows how it was: run a "
                f'node with role = "witness"{_holding_all(held)}; to go back now, load a snapshot (`ekko load`)'
            )
        if training is not None and not self._able(generation):
            raise nobody_holds(model, self.store.models[training.name].spec)
        if not dry and not force:
            check_free(self.facts(), generation)
        fact = self._fact(generation, to_ms, scope, now, dry=dry)
        self.tell(fact)
        self.look(now)
        return fact

    def finish(self, model: str, now: m.Now) -> Rollback:
        """End the wait for a healthy verdict, and let writers go on.

        Raises:
            EkkoError: nothing of the kind goes on at this node.
        """
        generation = self._generation(model)
        performer = self.performers.get((generation, False))
        if performer is None or performer.fact.step is not Step.PROBING:
            running = self.facts().running(generation)
            if running is not None and running.step is Step.PROBING:
                raise EkkoError(f"witness {running.witness!r} waits for the verdict: ask there")
            raise ModelError(f"no rollback of model {model!r} waits for a verdict")
        performer.finish(now)
        return performer.fact

    def _generation(self, model: str) -> Generation:
        generation = self.store.generation(model)
        if generation is None:
            known = ", ".join(map(repr, self.store.models)) or "none"
            raise ModelError(f"unknown model {model!r} at node {self.options.node!r}: known: {known}")
        return generation

    def _training_of(self, model: Generation) -> Generation | None:
        """What servers keep of a model; None: none train it."""
        return self.store.generation(training_name(model.name))

    def _able(self, model: Generation) -> tuple[str, ...]:
        """The witnesses that could take a model back, with what servers keep of it."""
        found, training = self.witnesses(model), self._training_of(model)
        return found if training is None else tuple(sorted({*found} & {*self.witnesses(training)}))

    def _fact(
        self, model: Generation, to_ms: int, scope: Scope, now: m.Now, *, dry: bool = False, automatic: bool = False
    ) -> Rollback:
        epoch = self._next_epoch(model)
        return Rollback(
            model, epoch, Step.REQUESTED, to_ms, now.unix_ms, self.options.node, automatic, scope, dry, changed_ms=now.unix_ms
        )

    def _next_epoch(self, model: Generation) -> int:
        """Above all rollbacks and fences of a model that are known here: who fences below the last fence is refused."""
        fence = None if self.around is None else self.around.fence_of(self.store.models[model.name].spec.id)
        return self.facts().next_epoch(model, self.random(), 0 if fence is None else fence.epoch)

    def took_ms(self, epoch: int) -> dict[str, int]:
        """How long the phases of a rollback took that was carried out here, in this life, by name (`machine.PHASES`)."""
        running = {one.fact.epoch: one.took_ms for one in self.performers.values()}
        return running.get(epoch) or self._took_ms.get(epoch, {})

    # --- at every look

    def look(self, now: m.Now) -> None:
        """See what there is to be begun, taken over, or let go of. Called when facts change, and in between."""
        self._look_ms = now.monotonic_ms + LOOK_MS
        self._let_go(now)
        self._give_up(now)
        if not self.options.witness or self.around is None:
            return
        if not self.ready():
            return
        for key in [key for key, performer in self.performers.items() if performer.over]:
            gone = self.performers.pop(key)
            self._took_ms[gone.fact.epoch] = gone.took_ms
            while len(self._took_ms) > ROLLBACKS_MAX:
                del self._took_ms[next(iter(self._took_ms))]
            if gone.lost and self.facts().running(gone.fact.model) == gone.fact:
                self._perform(self._taken(gone.fact, now), now)
        known = self.facts().known
        self._seen_ms = {key: since_ms for key, since_ms in self._seen_ms.items() if key[0] in known}
        for name in list(self.store.models):
            generation = self._generation(name)
            self._look_at(generation, now)
            self._look_at_questions(generation, now)

    def _let_go(self, now: m.Now) -> None:
        """Of rollbacks of models that were dropped: there is nothing left to be taken back."""
        for key in [key for key in self.performers if not self.store.holds(key[0])]:
            self.performers.pop(key).supersede(now)

    def _give_up(self, now: m.Now) -> None:
        """What was asked for here and nobody takes on is over."""
        for fact in self.facts().known.values():
            mine = fact.asked_by == self.options.node and fact.step is Step.REQUESTED
            if not mine or self.facts().answering(fact.epoch) != fact:
                continue
            if now.monotonic_ms - self._seen_ms.setdefault((fact.key, ASKED), now.monotonic_ms) > REQUEST_MS_MAX:
                reason = "no witness has taken it on: look at `ekko status` of the witnesses"
                self.tell(replace(fact, step=Step.FAILED, version=fact.version + 1, reason=reason, changed_ms=now.unix_ms))

    def _remember(self, model: Generation) -> None:
        """What only a plan tells of, since whoever knew of it has lost its memory."""
        assert self.around is not None
        plan = read_plan(self.around.plans, model)
        if plan is None:
            return
        plan.close()
        current = self.facts().current(model)
        if current is None or current.epoch < plan.epoch:
            with suppress(RemoteProtocolError):
                self.tell(fact_of(model, plan.epoch, plan.fact))
        elif current.over or current.epoch > plan.epoch:
            self.around.plans.drop(model)  # of one that others have brought to its end

    def _look_at(self, model: Generation, now: m.Now) -> None:
        if model not in self._remembered:
            self._remembered[model] = None
            self._remember(model)
        current, own = self.facts().current(model), self.performers.get((model, False))
        if own is not None and (current is None or current.epoch > own.fact.epoch):
            own.supersede(now)
            del self.performers[model, False]
            own = None
        if own is not None:
            return
        if current is None or current.over:
            self._look_at_verdict(model, current, now)
        elif current.witness == self.options.node or self._is_turn(current, now):
            self._go_on(current, now)

    def _go_on(self, fact: Rollback, now: m.Now) -> None:
        """With what this witness began in the life before, or another one did not bring to its end.

        Once writers go on there is nothing to be written back any more: they have what was restored, and what they write now is
        good. Whoever died may have lifted the fence before anybody heard of that; the fence itself tells.
        """
        assert self.around is not None
        mine = fact.witness == self.options.node
        fence = self.around.fence_of(self.store.models[fact.model.name].spec.id)
        lifted = fence is not None and (fence.epoch, fence.stage) == (fact.epoch, LIFTED)
        if fact.witness and (lifted or fact.step is Step.LIFTING):
            reason = fact.reason
            if fact.step < Step.WAITING:
                reason = (
                    f"its fence was lifted, by hand or by witness {fact.witness!r} at the end; as far as is known here "
                    f"it was {fact.step.name.lower()}: see with --dry-run whether something is left, and take it back again"
                )
            self._seen_ms.pop((fact.key, fact.witness), None)
            self._perform(replace(fact, witness=self.options.node, step=Step.LIFTING, reason=reason), now)
        elif mine:
            self._perform(fact, now)
        else:
            taken = self._taken(fact, now)
            if not self._is_left(fact, taken, now):
                self._perform(taken, now)

    def _is_left(self, fact: Rollback, taken: Rollback, now: m.Now) -> bool:
        """Whether a rollback is left to the witness that died: it may have written half of it, and this one cannot go on.

        The fence stands until that one is back with its plan, or an operator decides: never half done (R15).
        """
        assert self.around is not None
        if not fact.witness or fact.step < Step.WRITING or not (why := Performer(taken, self.around).hopeless()):
            return False
        if (fact.key, LEFT) not in self._seen_ms:
            self._seen_ms[fact.key, LEFT] = now.monotonic_ms
            fields: dict[str, object] = {
                "model": fact.model.name,
                "epoch": f"{fact.epoch:016x}",
                "witness": fact.witness,
                "reason": why,
            }
            self.around.note("rollback_left_to_its_witness", fields)
        return True

    def _look_at_questions(self, model: Generation, now: m.Now) -> None:
        """Dry runs: the newest that nobody answered, or whose witness died over it."""
        for fact in self.facts().of(model):
            if not fact.dry or fact.over or self.facts().answering(fact.request or fact.epoch) != fact:
                continue
            mine = fact.witness == self.options.node  # in the life before
            if (model, True) not in self.performers and (mine or self._is_turn(fact, now)):
                self._perform(self._taken(fact, now), now)
            return

    def _is_turn(self, fact: Rollback, now: m.Now) -> bool:
        """Whether this witness is to take it on now: nobody has it, or who has it is gone; and those before us did not."""
        witnesses, key = self._able(fact.model), (fact.key, fact.witness)
        if fact.witness in witnesses or self.options.node not in witnesses:
            self._seen_ms.pop(key, None)
            return False
        if fact.step is Step.REQUESTED and now.unix_ms - fact.requested_ms > REQUEST_AGE_MS_MAX:
            return False
        waited_ms = now.monotonic_ms - self._seen_ms.setdefault(key, now.monotonic_ms)
        if fact.step is Step.REQUESTED and not fact.witness and waited_ms > REQUEST_MS_MAX:
            return False
        return waited_ms >= self._turn_ms(fact, witnesses) + (TAKEOVER_MS if fact.witness else 0)

    def _turn_ms(self, fact: Rollback, witnesses: Sequence[str]) -> int:
        """How long this witness leaves it to those before it by name; who knows of no moment to go back to comes last."""
        assert self.around is not None
        place = witnesses.index(self.options.node)
        if len(witnesses) > 1 and Performer(replace(fact, witness=self.options.node), self.around).hopeless():
            place += len(witnesses)
        return TURN_MS * place

    def _taken(self, fact: Rollback, now: m.Now) -> Rollback:
        """The same under a new epoch, of this witness."""
        self._seen_ms.pop((fact.key, fact.witness), None)
        epoch = self._next_epoch(fact.model)
        # Of "healthy" what it was found to be, once rows may have been written back: what was judged since was judged of these.
        to_ms = fact.to_ms or (fact.cut_ms if fact.step >= Step.WRITING else HEALTHY)
        step = Step.REQUESTED if fact.dry else Step.FENCING
        return Rollback(
            fact.model,
            epoch,
            step,
            to_ms,
            fact.requested_ms,
            fact.asked_by,
            fact.automatic,
            fact.scope,
            fact.dry,
            request=fact.request or fact.epoch,
            witness=self.options.node,
            at_risk=fact.at_risk,
            changed_ms=now.unix_ms,
            share=PER_MILLE if fact.dry else 0,
        )

    def _look_at_verdict(self, model: Generation, last: Rollback | None, now: m.Now) -> None:
        """A model that is judged corrupted is taken back, if that is wanted."""
        assert self.around is not None
        if not self.options.automatic:
            return
        if last is not None and now.unix_ms - last.changed_ms < self.options.automatic_every_ms:
            return
        if self.around.verdict(model.name, 0 if last is None else last.changed_ms) != "corrupted":
            self._corrupted_ms.pop(model, None)
            return
        witnesses = self._able(model)
        if self.options.node not in witnesses:
            return
        fact = self._fact(model, HEALTHY, WHOLE, now, automatic=True)
        since_ms = self._corrupted_ms.setdefault(model, now.monotonic_ms)
        if now.monotonic_ms - since_ms >= self._turn_ms(fact, witnesses):
            self._perform(replace(fact, witness=self.options.node, step=Step.FENCING, share=0), now)

    def _perform(self, fact: Rollback, now: m.Now) -> None:
        assert self.around is not None
        beside = self._beside(fact, now)
        why = "" if beside is None else Performer(beside, self.around).hopeless()
        last = self.performers.pop((fact.model, fact.dry), None)
        if last is not None:  # of what servers train: nobody has looked at it since
            last.supersede(now)
        performer = self.make_performer(shortened(fact), self.around)
        self.performers[fact.model, fact.dry] = performer
        self.around.note("rollback_begins", {"model": fact.model.name, "epoch": f"{fact.epoch:016x}", "to_ms": fact.to_ms})
        performer.begin(now, why and f"what servers train of it cannot be taken back: {why}")
        if beside is not None and not fact.dry and not performer.over and performer.step is not Step.LIFTING:
            self._perform(beside, now)

    def _beside(self, fact: Rollback, now: m.Now) -> Rollback | None:
        """What is to be begun beside it, of what servers train; None: nothing, or it was begun before."""
        training = self._training_of(fact.model)
        if training is None or fact.step not in (Step.REQUESTED, Step.FENCING) or self.facts().beside(fact) is not None:
            return None
        scope = scope_of(fact.scope, self.store.models[training.name].spec)
        if scope is None:
            return None
        return replace(
            fact,
            model=training,
            epoch=self._next_epoch(training),
            step=Step.FENCING,
            scope=scope,
            dry=False,
            request=fact.request or fact.epoch,
            at_risk=0,
            changed_ms=now.unix_ms,
            share=0,
        )

    # --- what happens

    def on_reply(self, reply: Reply, request: int, now: m.Now) -> bool:
        """Whether an answer of the protocol was for a rollback here."""
        self._let_go(now)
        return any(performer.on_reply(reply, request, now) for performer in list(self.performers.values()))

    def on_timer(self, now: m.Now) -> None:
        """Time has passed, `deadline_ms` perhaps."""
        self._let_go(now)
        for performer in list(self.performers.values()):
            due_ms = performer.deadline_ms
            if due_ms is not None and due_ms <= now.monotonic_ms:
                performer.on_timer(now)
        if now.monotonic_ms >= self._look_ms:
            self.look(now)

    def work(self, now: m.Now) -> bool:
        """A slice of what takes long; whether there is more of it."""
        self._let_go(now)
        for performer in list(self.performers.values()):
            performer.work(now)
        return any(performer.working for performer in self.performers.values())

    def look_soon(self) -> None:
        """Facts have changed."""
        self._look_ms = 0

    @property
    def deadline_ms(self) -> int:
        """Monotonic time at which `on_timer` is wanted."""
        due = [performer.deadline_ms for performer in self.performers.values() if performer.deadline_ms is not None]
        return min([self._look_ms, *due])

    def cut_held(self, model: Generation) -> int | None:
        """The moment beyond which this witness must not flush the past of a model while it is rolled back; None: any."""
        held = [one.holds_cut_ms for key, one in self.performers.items() if key[0] == model]
        return min((cut_ms for cut_ms in held if cut_ms is not None), default=None)


def _holding_all(model: ModelSpec) -> str:
    return f" that holds all {model.partitions} partitions of it" if model.partitions > 1 else ""


def witnesses_among(peers: Iterable[PeerStatus], model: ModelSpec, own: str) -> tuple[str, ...]:
    """The living witnesses that hold all of a model, sorted; `own`: this node, if it is one of them, else empty.

    One that holds some partitions only cannot take a model back: the rows of a step over several of them would not fit together
    (decision 0048).
    """
    found = {own} if own else set[str]()
    for peer in peers:
        whole = model.partitions == 1 or any(len(one.held) == model.partitions for one in peer.holds if one.family == model.id)
        if peer.role == "witness" and peer.alive and whole:
            found.add(peer.node)
    return tuple(sorted(found))
