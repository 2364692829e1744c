"""Rollbacks of one node's life: what `ekko.rollback` needs of the node, and the task that drives it.

Every node has one, since requests may be made anywhere and all follow the facts: readers are told what share of the requests is
the live model's. Only a witness carries rollbacks out.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace

import structlog

from ekko.config import NodeConfig
from ekko.config.sections import HealthSection
from ekko.errors import EkkoError
from ekko.generations import Generation
from ekko.health.verdicts import Verdicts
from ekko.model import DENSE_TABLE, served_name
from ekko.rates import Rates
from ekko.rollback.coordinator import Coordinator, CoordinatorOptions, witnesses_among
from ekko.rollback.facts import PER_MILLE, Rollback, Rollbacks, Step
from ekko.rollback.past import Past
from ekko.rollback.performer import Asked, Reply, Surroundings
from ekko.rollback.plan import FilePlans
from ekko.rollback.request import RollbackRequest
from ekko.rollback.risk import KEPT_MAX, decode_risk, risk_picture
from ekko.rollback.scope import KEY_END
from ekko.store import Store
from p2p import messages as m
from p2p.machine import Machine
from p2p.runtime import read_clock

FOLDER = "rollback"
# Requests of other tools are above; those of publishers count up from 0.
REQUEST_FIRST = -1_000_000
# Verdicts that are older say that nobody judges the model any more.
JUDGED_LATELY_MS = 600_000
# What an estimate takes a link for whose rate nobody has set, and what stopping and agreeing take.
RATE_GUESS_BYTES_PER_MS = 50_000
AGREEING_MS = 500

log = structlog.get_logger(__name__)


class NodeRollbacks:
    """The rollbacks of one life.

    Args:
        config: of the node.
        store: its models.
        machine: its protocol.
        submit: hands an event to the protocol; answers come to `on_reply`.
        past: of its models, at a witness; None elsewhere.
    """

    def __init__(
        self,
        config: NodeConfig,
        store: Store,
        machine: Machine,
        submit: Callable[[m.SchemaChanged | Asked], object],
        past: Past | None,
    ) -> None:
        self._config = config
        self._store = store
        self._machine = machine
        self._submit = submit
        self._requests = REQUEST_FIRST
        self._wake = asyncio.Event()
        self._replies: deque[Reply] = deque()  # at most one for each request that waits
        health = config.health or HealthSection()
        self._plans = FilePlans(config.node.run_dir / FOLDER)
        around = None
        if past is not None:
            around = Surroundings(
                store,
                past,
                self._plans,
                self._ask,
                self._tell,
                self._verdict,
                # What servers train is as healthy as what is served of it.
                lambda model: store.facts.of(Verdicts).healthy_until(served_name(model), read_clock().unix_ms),
                machine.fence_of,
                self._caught_up,
                self._estimate_ms,
                lambda name, fields: log.warning(name, **fields),
                round(health.probe_share * PER_MILLE),
                lambda fact: store.facts.of(Rollbacks).beside(fact),
            )
        self.coordinator = Coordinator(
            CoordinatorOptions(config.node.id, past is not None, health.auto_rollback, health.auto_rollback_every_ms),
            store,
            lambda: store.facts.of(Rollbacks),
            self._tell,
            self._witnesses,
            lambda: machine.status(read_clock()).synced,
            lambda: secrets.randbits(32),
            around,
        )
        self._before = store.facts.on_change
        store.facts.on_change = self._on_facts
        self._divide_traffic()

    async def run(self) -> None:
        """Drive it until cancelled."""
        try:
            while True:
                self._wake.clear()
                while self._replies:
                    reply = self._replies.popleft()
                    self.coordinator.on_reply(reply, reply.request, read_clock())
                self.coordinator.on_timer(read_clock())
                await self._work()
                wait_ms = self.coordinator.deadline_ms - read_clock().monotonic_ms
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), max(0.001, wait_ms / 1_000))
        finally:
            self._store.facts.on_change = self._before

    async def _work(self) -> None:
        """What takes long, with a turn for everybody else after each slice."""
        more = True
        while more:
            more = self.coordinator.work(read_clock())
            await asyncio.sleep(0)

    def on_reply(self, reply: Reply) -> bool:
        """Whether an answer of the protocol was for a rollback here."""
        request = reply.request
        if request >= REQUEST_FIRST:
            return False
        # Not now: what follows from it must not be sent before the rest of what the protocol has just decided.
        self._replies.append(reply)
        self._wake.set()
        return True

    # --- what an operator asks

    def request(self, asked: RollbackRequest) -> dict[str, object]:
        """Ask for a rollback.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """
        scope, held = asked.scope, self._store.models.get(asked.model)
        if scope.writer and held is not None:
            scope = replace(scope, writers=self._machine.writers_of(scope.writer, held.spec.id))
        fact = self.coordinator.request(asked.model, asked.to_ms, scope, read_clock(), dry=asked.dry, force=asked.force)
        self._wake.set()
        return picture_of(fact)

    def finish(self, model: str) -> dict[str, object]:
        """End the wait for a healthy verdict.

        Raises:
            EkkoError: nothing waits for one here.
        """
        return picture_of(self.coordinator.finish(model, read_clock()))

    def history(self, model: str | None, epoch: int | None) -> dict[str, object]:
        """What is known of a model, or of all, the newest first; or what became of one request."""
        known = self._store.facts.of(Rollbacks)
        if epoch is not None:
            fact = known.answering(epoch)
            return {"rollbacks": [] if fact is None else [self._picture(fact)]}
        names = {fact.model for fact in known.known.values()} | {self._store.generation(name) for name in self._store.models}
        chosen = sorted(one for one in names if one is not None and model in (None, one.name))
        return {"rollbacks": [self._picture(fact) for one in chosen for fact in known.of(one)]}

    def _picture(self, fact: Rollback) -> dict[str, object]:
        """At the witness that carried it out, with how long that took."""
        took_ms = self.coordinator.took_ms(fact.epoch)
        return picture_of(self._store.facts.of(Rollbacks).shown(fact)) | ({"took_ms": took_ms} if took_ms else {})

    def rows_at_risk(self, epoch: int) -> dict[str, object]:
        """The good rows that went with the bad ones, by the epoch of a rollback or of the request for it.

        Raises:
            EkkoError: another node has them, or nobody any more.
        """
        fact = self._store.facts.of(Rollbacks).answering(epoch)
        if fact is None or fact.step is not Step.DONE or fact.dry:
            raise EkkoError(f"no rollback {epoch:016x} that is done is known here: `ekko rollback` shows those that are")
        kept = self._plans.kept(fact.model, fact.epoch) if fact.at_risk else b"\x90"
        if kept is None:
            where = f"ask at witness {fact.witness!r}, which carried it out"
            if fact.witness == self._config.node.id:
                where = f"the records of the last {KEPT_MAX} rollbacks of a model are kept"
            raise EkkoError(f"the {fact.at_risk:,} rows at risk of rollback {epoch:016x} are not named here: {where}")
        model = self._store.models.get(fact.model.name)
        names = {} if model is None else {table.spec.id: table.spec.name for table in model.tables}
        rows = risk_picture(decode_risk(kept), names)
        return {"model": fact.model.name, "epoch": f"{fact.epoch:016x}", "at_risk": fact.at_risk, "rows": rows}

    def pictures(self) -> dict[str, dict[str, object]]:
        """Of each model the rollback that counts, over or not; models that were never taken back have none."""
        known = self._store.facts.of(Rollbacks)
        current = [known.current(Generation.of(model.spec)) for model in self._store.models.values()]
        return {fact.model.name: picture_of(fact) for fact in current if fact is not None}

    # --- what the rollbacks ask

    def _ask(self, make: Callable[[int], Asked]) -> int:
        self._requests -= 1
        number = self._requests
        self._submit(make(number))
        return number

    def _tell(self, fact: Rollback) -> None:
        known = self._store.facts.of(Rollbacks)
        before = known.known.get(fact.key)
        entries = self._store.facts.note(known.having(fact))
        if entries:
            self._submit(m.SchemaChanged(entries))
        if before is None or before.step != fact.step:
            fields = {"model": fact.model.name, "epoch": f"{fact.epoch:016x}", "witness": fact.witness, "reason": fact.reason}
            log.warning("rollback", step=fact.step.name.lower(), **{key: value for key, value in fields.items() if value})

    def _verdict(self, model: str, since_ms: int) -> str:
        verdicts, now_ms = self._store.facts.of(Verdicts), read_clock().unix_ms
        judged_ms = verdicts.judged_until(model, now_ms)
        if judged_ms is None or judged_ms < now_ms - JUDGED_LATELY_MS:
            return ""
        return verdicts.state(model, now_ms) if judged_ms > since_ms else "uncertain"

    def _caught_up(self, family: int) -> bool:
        numbers = next((model.spec.keyspaces for model in self._store.models.values() if model.spec.id == family), ())
        status = self._machine.status(read_clock())
        return all(one.synced for one in status.keyspaces if one.keyspace in (family, *numbers))

    def _witnesses(self, model: Generation) -> tuple[str, ...]:
        held = self._store.models[model.name]
        own = self._config.node.id if self.coordinator.options.witness and held.holds_all else ""
        return witnesses_among(self._machine.status(read_clock()).peers, held.spec, own)

    def _estimate_ms(self, payload_bytes: int) -> int:
        rates = self._store.facts.of(Rates).of_region(self._config.node.region, self._config.rates())
        bytes_per_ms = min(rates.values()) / 1_000 if rates else RATE_GUESS_BYTES_PER_MS
        return AGREEING_MS + round(payload_bytes / bytes_per_ms)

    # --- facts

    def _on_facts(self) -> None:
        self._before()
        self._divide_traffic()
        self._wake.set()
        self.coordinator.look_soon()

    def _divide_traffic(self) -> None:
        """Have readers ask the live model for its share."""
        known = self._store.facts.of(Rollbacks)
        for name, model in self._store.models.items():
            generation = self._store.generation(name)
            share = 1.0 if generation is None else known.share(generation)
            if model.traffic.serving != share:
                model.set_traffic(replace(model.traffic, serving=share))


def picture_of(fact: Rollback) -> dict[str, object]:
    """A fact as JSON; epochs are hexadecimal text, since JSON readers round large numbers."""
    scope = fact.scope
    shown = asdict(fact) | {
        "model": fact.model.name,
        "epoch": f"{fact.epoch:016x}",
        "request": f"{fact.request:016x}" if fact.request else None,
        "step": Step(fact.step).name.lower(),
        "over": fact.over,
        "unreachable": list(fact.unreachable),
        "scope": {
            "tables": list(scope.tables),
            "writer": scope.writer or None,
            "keys": None if (scope.key_first, scope.key_end) == (0, KEY_END) else [str(scope.key_first), str(scope.key_end)],
        },
        "share": fact.share / 1_000,
        "dense": scope.has_table(DENSE_TABLE),
    }
    return {key: value for key, value in shown.items() if key != "version"}
