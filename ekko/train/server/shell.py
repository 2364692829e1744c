"""One model on one server: requests and facts become events of its machine, and what the machine wants is done.

Whatever takes longer than a look-up is a job in a thread, of which the machine has a few under way at most; a job that fails is
repeated until it is done, since the machine counts on it. Pushes stay here, as they came, until the machine lets go of them.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, assert_never

import structlog

from ekko.errors import EkkoError, ModelError, NodeFailed, PublishError
from ekko.local import PairStored
from ekko.train.server import events as e
from ekko.train.server import wire as w
from ekko.train.server.channel import NodeChannel
from ekko.train.server.checks import answer_bytes, refusal_of_hello, refusal_of_pull, refusal_of_push
from ekko.train.server.endpoint import Endpoint
from ekko.train.server.figures import Figures
from ekko.train.server.jobs import AGAIN_S, Jobs
from ekko.train.server.machine import Machine
from ekko.train.server.rows import Changed, Prepared, TrainingRows
from ekko.train.server.schema import TrainedModel, digest_of
from ekko.train.server.serving import ServedRows

WAIT_S: Final = 0.5  # for one answer to whether a step is everywhere: so long may it take to see that somebody left

log = structlog.get_logger(__name__)


class ModelShell:
    """One model's.

    Args:
        model: how it is trained.
        own: our life.
        endpoints: node -> where its server listens, our own included.
        spares: whether a push is acknowledged only when silent holders have it, too.
        run_dir, local: of the node beside.
        endpoint: where answers go.
        channel: to the node.
        fail: called with what ends the process.

    Raises:
        EkkoError: the node is not there, or does not have the model.
    """

    def __init__(
        self,
        model: TrainedModel,
        own: w.ServerLife,
        endpoints: Mapping[str, str],
        *,
        spares: bool,
        run_dir: Path,
        local: str,
        endpoint: Endpoint,
        channel: NodeChannel,
        fail: Callable[[BaseException], None],
    ) -> None:
        self.model = model
        self.rows = TrainingRows(model, run_dir, local)
        self.served = ServedRows(self.rows, run_dir, local)
        self._machine = Machine(own, model.name, model.settings, endpoints, model.worker_timeout_ms)
        self.own = own
        self._endpoints = endpoints
        self._digest = digest_of(model.settings, endpoints)
        self._differed: tuple[str, int] | None = None  # who was refused last, and with what
        self._spares = spares
        self._endpoint = endpoint
        self._channel = channel
        self._fail = fail
        self._pulls: dict[int, w.Pull] = {}
        self._pushes: dict[int, w.Push] = {}
        self._changed: dict[int, dict[str, Changed]] = {}  # by group: what is to be served of it
        self._done: int | None = None  # a group that is durable and served, as the machine is about to hear
        self._done_served = False  # it has asked that this group be served
        self._comparing: frozenset[int] = frozenset()  # partitions that we act for; threads read it
        self._jobs = Jobs(model.name, fail)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms: int | None = None
        self._began = False
        self._lives: tuple[e.NodeLife, ...] = ()
        self.waiting_for: dict[str, tuple[str, ...]] = {}  # what for -> nodes
        self._figures = Figures(model.name)

    # --- what comes

    def on_lives(self, lives: tuple[e.NodeLife, ...]) -> None:
        """What the node knows of the nodes of other servers."""
        self._lives = lives
        if self._began:
            self.handle(e.ViewChanged(lives))

    def on_taken_back(self) -> None:
        """A rollback of the model, served and trained, is over."""
        self._changed = {group: {} for group in self._changed}
        self._jobs.begin(self._serve_again())

    async def begin(self) -> None:
        """Put right what the process before this one may have left half done; from then on the machine has its turn."""
        stamp = await self._jobs.repeated("take_back", self.rows.take_back)
        if stamp is not None:
            log.warning("server_took_back", model=self.model.name, stamp=stamp)
            self.rows.undo.clear()
        self._began = True
        self.handle(e.ViewChanged(self._lives))

    def on_request(self, ask: int, request: w.Request) -> None:
        """See `Endpoint`'s handler; of this model."""
        if not self._began:
            self._endpoint.answer(ask, w.Failed(w.BUSY, "the server is starting: again in a moment"))
            return
        match request:
            case w.WhoServes():
                self._endpoint.answer(ask, self._machine.serving())
            case w.Hello(_, worker, life):
                if (refusal := refusal_of_hello(request, time.time_ns() // 1_000)) is not None:
                    self._refuse(ask, refusal)
                else:
                    self.handle(e.HelloAsked(ask, worker, life))
            case w.Release(_, asker, partitions, digest):
                if digest != self._digest:
                    reason = (
                        f"server {asker.node!r} has other settings of model {self.model.name!r} than {self.own.node!r}: make "
                        f"[server.models.{self.model.name}], the model's shards and the nodes in [server].peers the same on "
                        "both, and restart"
                    )
                    if (asker.node, digest) != self._differed:  # it asks twice a second
                        self._differed = asker.node, digest
                        log.error("server_settings_differ", model=self.model.name, node=asker.node)
                    self._endpoint.answer(ask, w.Failed(w.SETTINGS, reason))
                    return
                self.handle(e.ReleaseAsked(ask, asker, partitions))
            case w.Pull():
                self._on_pull(ask, request)
            case w.Push():
                self._on_push(ask, request)
            case _:
                assert_never(request)

    def on_answer(self, answer: w.Released) -> None:
        """Another server lets go of partitions."""
        if self._began:
            self.handle(e.ReleaseAnswered(answer.by, answer.asker, answer.partitions))

    def _on_pull(self, ask: int, pull: w.Pull) -> None:
        if (refusal := refusal_of_pull(self.model, pull)) is not None:
            self._refuse(ask, refusal)
            return
        self._figures.pulls += 1
        self._pulls[ask] = pull
        size = answer_bytes(self.model, pull) + sum(keys.nbytes for keys in pull.tables.values())
        self.handle(e.PullAsked(ask, pull.worker, pull.life, pull.clock, pull.partitions, size))

    def _on_push(self, ask: int, push: w.Push) -> None:
        if (refusal := refusal_of_push(self.model, push)) is not None:
            self._refuse(ask, refusal)
            return
        self._figures.push_came(ask, push)
        self._pushes[ask] = push
        size = sum(len(keys) * self.model.tables[name].row_bytes for name, (keys, _) in push.tables.items())
        self.handle(e.PushAsked(ask, push.worker, push.life, push.number, push.partitions, size))

    def _refuse(self, ask: int, refusal: w.Failed) -> None:
        self._figures.refused += 1
        self._endpoint.answer(ask, refusal)

    # --- what follows

    def handle(self, event: e.Event) -> None:
        """One event of the machine, and all its effects. On the event loop."""
        try:
            for effect in self._machine.handle(event, now_ms()):
                self._carry_out(effect)
        except Exception as error:  # noqa: BLE001 - a machine that stopped half-way is not asked again
            self._fail(error)
            return
        self._set_timer()

    def _set_timer(self) -> None:
        wanted = self._machine.deadline_ms
        if wanted == self._timer_ms:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_ms = None, wanted
        if wanted is not None:
            delay_s = max(0.0, (wanted - now_ms()) / 1_000)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._timer_ms = None
        self.handle(e.TimerFired())

    def _carry_out(self, effect: e.Effect) -> None:
        match effect:
            case e.Answer(ask, answer):
                self._pulls.pop(ask, None)
                self._figures.answered(ask, answer)
                self._endpoint.answer(ask, answer)
            case e.AnswerPull(ask, clock):
                found = self._pulled(ask, self._pulls.pop(ask), clock)
                self._figures.answered(ask, found)
                self._endpoint.answer(ask, found)
            case e.Discard(ask):
                self._pushes.pop(ask, None)
            case e.Apply():
                self._jobs.begin(self._apply(effect, {ask: self._pushes[ask] for step in effect.steps for ask in step.asks}))
            case e.AwaitDurable(group, stamp):
                if group != self._done:  # else it is so already
                    self._jobs.begin(self._await_durable(group, stamp))
            case e.Serve(group) if group == self._done:
                self._done_served = True
            case e.Serve(group):
                for due in sorted(one for one in self._changed if one <= group):
                    self.served.add(self._changed.pop(due))
                self._jobs.begin(self._serve(group))
            case e.Load(partitions):
                self._jobs.begin(self._load(partitions))
            case e.Reconcile(partitions):
                self._comparing |= frozenset(partitions)
                self._jobs.begin(self._reconcile(frozenset(partitions)))
            case e.Unload(partitions):
                self._comparing -= frozenset(partitions)
            case e.Flush(flush, partitions, node):
                self._jobs.begin(self._flush(flush, partitions, node))
            case e.AskRelease(node, asker, partitions):
                request = w.Release(self.model.name, asker, partitions, self._digest)
                self._endpoint.ask_server(self._endpoints[node], request)
            case e.WorkerDropped(worker, partitions):
                log.warning("worker_dropped", model=self.model.name, worker=worker, partitions=partitions)
            case e.Stop(reason):
                self._fail(NodeFailed(reason))
            case _:
                assert_never(effect)

    def _pulled(self, ask: int, pull: w.Pull, clock: int) -> w.Answer:
        if self._endpoint.is_behind(ask):
            return w.Failed(w.BUSY, "answers to this worker have not left yet: ask again in a moment")
        try:
            return w.Pulled(self.rows.pull(pull.tables), clock)
        except EkkoError as error:  # a table was dropped, or a row never settles
            return w.Failed(w.BUSY, str(error))

    # --- jobs

    async def _apply(self, group: e.Apply, pushes: Mapping[int, w.Push]) -> None:
        prepared: list[Prepared] = []
        alone = not self._changed  # of no group before it something is to be served still

        def work() -> PairStored:
            if not prepared:
                prepared.append(self.rows.prepare(group, pushes))
            if alone and (pair := self.served.publish_pair(prepared[0])) is not None:
                return pair
            try:
                return PairStored(self.rows.publish(prepared[0]))
            except (ModelError, PublishError):
                left = self.rows.left_of(prepared[0], group.marks)
                prepared[:] = [] if left is None else [left]
                raise

        stored = await self._jobs.repeated("apply", work)  # what came to no answer is published again as it is
        if stored.second is not None:
            self._finish(group.group, stored.stamp)
            return
        self._changed[group.group] = prepared[0].changed
        self.handle(e.Applied(group.group, stored.stamp))

    def _finish(self, group: int, stamp: int) -> None:
        """All that is to be done for a group is: the machine is told, one thing after the other."""
        self._done, self._done_served = group, False
        self.handle(e.Applied(group, stamp))
        self.rows.undo.clear()
        self.handle(e.Durable(group))
        if self._done_served:  # a group of hellos is not served; what is behind another one has its turn when that is
            self.handle(e.Served(group))
        self._done = None

    async def _await_durable(self, group: int, stamp: int) -> None:
        while True:
            waited = await self._jobs.repeated("wait", lambda: self.rows.publisher.look(stamp, "all", WAIT_S))
            missing = self._missing(waited.lagging, waited.silent)
            if not missing:
                break
            self.waiting_for["pushes"] = missing
            if not waited.lagging:  # the node answers at once when all who lack it are silent
                await asyncio.sleep(AGAIN_S)
        self.waiting_for.pop("pushes", None)
        self.rows.undo.clear()
        self.handle(e.Durable(group))

    def _missing(self, lagging: tuple[str, ...], silent: tuple[str, ...]) -> tuple[str, ...]:
        """Of these nodes, whom we wait for."""
        spares = [node for node in silent if node in self._endpoints] if self._spares else []
        return tuple(dict.fromkeys((*lagging, *spares)))

    async def _serve(self, group: int) -> None:
        await self._jobs.repeated("serve", self.served.publish)
        if self.served.rolled_back:  # what was left out then is found by comparing
            self.served.rolled_back = False
            self._jobs.begin(self._reconcile(self._comparing))
        self.handle(e.Served(group))

    async def _load(self, partitions: tuple[int, ...]) -> None:
        await self._everywhere("load", self._missing)
        marks = await self._jobs.repeated("marks", lambda: self.rows.marks(partitions))
        self.handle(e.Loaded(partitions, marks))

    async def _flush(self, flush: int, partitions: tuple[int, ...], node: str) -> None:
        def missing(lagging: tuple[str, ...], silent: tuple[str, ...]) -> tuple[str, ...]:
            return (node,) if node in lagging or node in silent else ()

        # A comparison that is at a row of these partitions now would serve it after whoever takes over has.
        await self._jobs.repeated("flush", self.served.settle)
        await self._everywhere(f"flush to {node}", missing)
        self.handle(e.Flushed(flush))

    async def _everywhere(self, what: str, missing_of: Callable[[tuple[str, ...], tuple[str, ...]], tuple[str, ...]]) -> None:
        """Wait until the others have all that our node has of the model."""
        while True:
            told = await self._channel.caught_up(self.model.training)
            if not told.refused and not (missing := missing_of(told.lagging, told.silent)):
                break
            self.waiting_for[what] = (told.refused,) if told.refused else missing
            await asyncio.sleep(AGAIN_S)
        self.waiting_for.pop(what, None)

    async def _serve_again(self) -> None:
        await self._jobs.repeated("taken back", self.served.taken_back)
        await self._reconcile(self._comparing)

    async def _reconcile(self, partitions: frozenset[int]) -> None:
        await self._jobs.repeated("reconcile", lambda: self.served.reconcile(lambda: partitions & self._comparing))

    # --- the end, and what is told

    async def drained(self) -> None:
        """Return when nothing is under way any more."""
        await self._jobs.drained()

    def close(self) -> None:
        """Let go of the node. Jobs under way are given up; what they left half done is put right at the next start."""
        if self._timer is not None:
            self._timer.cancel()
        self._jobs.close()

    def _clocks(self) -> dict[int, int]:
        """The smallest clock of each worker in the partitions that we act for; of pushes that are durable."""
        clocks: dict[int, int] = {}
        for partition in self._machine.core.acting():
            for worker in partition.tracks:
                durable = partition.durable_of(worker)
                clocks[worker] = min(clocks.get(worker, durable), durable)
        return dict(sorted(clocks.items()))

    def picture(self) -> dict[str, Any]:
        """For `ekko status` and metrics: plain values."""
        figures, roles, now_s = self._figures, self._machine.roles, time.monotonic()
        return {
            "mode": self.model.settings.mode,
            "acting": [partition for partition, role in roles.items() if role == "acting"],
            "roles": roles,
            "clocks": self._clocks(),
            "late_s": figures.waits_for(self._machine.late(), now_s),
            "dropped": self._machine.dropped,
            "pushes_waiting": len(self._pushes),
            "pulls_waiting": len(self._pulls),
            "oldest_push_s": figures.oldest_push_s(now_s),
            "ack_ms": figures.ack_ms(),
            "waiting_for": {what: list(nodes) for what, nodes in self.waiting_for.items()},
            "trouble": self._jobs.trouble,
            "counts": {
                **figures.counts(),
                **{f"rows_{name}": count for name, count in asdict(self.rows.counts).items()},
                **{f"rows_{name}": count for name, count in asdict(self.served.counts).items()},
            },
        }


def now_ms() -> int:
    """Of a clock that never goes back."""
    return time.monotonic_ns() // 1_000_000
