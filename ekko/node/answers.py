"""What a node answers over HTTP (`ekko.http.Source`): is it ready, its picture, and what an operator asks of it."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from ekko.config import NodeConfig
from ekko.errors import EkkoError
from ekko.health.verdicts import State
from ekko.health.wire import Report, Reported
from ekko.hot_report import hot_report
from ekko.loading import Loading, LoadRequest
from ekko.metrics import Metrics
from ekko.node.effects import TOOL_REQUEST
from ekko.node.life import Life
from ekko.node.parts import Parts, Submit, machine_hash
from ekko.node.picture import counters, model_pictures, queues
from ekko.rates import Word
from ekko.rollback.request import RollbackRequest
from ekko.snapshots.service import SnapshotService
from ekko.status import NodePicture
from ekko.store.leftovers import LeftoversWatch
from ekko.version import __version__
from p2p import messages as m
from p2p.runtime import read_clock


class Answers:
    """Of one node, over all its lives.

    Args:
        config: of the node.
        memory_dir: a tmpfs.
        life: the one that it is in.
        snapshots: takes them; None: the configuration has none.
        loads: of files.
        submit: hands an event to the protocol; returns why it failed.
    """

    def __init__(
        self,
        config: NodeConfig,
        memory_dir: Path,
        life: Callable[[], Life],
        snapshots: SnapshotService | None,
        loads: Loading,
        submit: Submit,
    ) -> None:
        self.metrics = Metrics(self.picture, machine_hash())
        self._config = config
        self._life = life
        self._snapshots = snapshots
        self._loads = loads
        self._submit = submit
        self._leftovers = LeftoversWatch(memory_dir)
        self._started_s = time.monotonic()

    # --- what it is asked

    def waiting_for(self) -> list[str]:
        """See `ekko.http.Source`."""
        life = self._life()
        waiting = [life.loading if part == "store" and life.loading else part for part in life.preparing]
        if not life.caught_up and life.parts is not None:
            # Once in a life: a model that comes later must not take a node that serves others out of service.
            life.caught_up = life.parts.machine.status(read_clock()).synced
            if not life.caught_up:
                waiting.append("the cluster: this node has not caught up with it yet")
        if life.parts is not None and (reason := life.parts.machine.ids_wanted):
            waiting.append(f"a writer id: {reason}")
        if life.parts is not None and life.parts.delaying is not None and life.caught_up:
            waiting += life.parts.delaying.waiting_for()
        return waiting

    def status(self) -> dict[str, object]:
        """See `ekko.http.Source`."""
        picture = self.picture()
        return {"ready": False, "waiting_for": self.waiting_for()} if picture is None else picture.to_json()

    def metrics_text(self) -> bytes:
        """See `ekko.http.Source`."""
        return self.metrics.text()

    def delays(self, since: int) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return {"boot": f"{self._life().boot:016x}", **self.metrics.delays.since(since)}

    def hot(self, model: str, table: str | None, count: int) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return hot_report(self._parts().served, model, table, count)

    def picture(self) -> NodePicture | None:
        """The node now; None before there is a store."""
        parts = self._life().parts
        if parts is None:
            return None
        now = read_clock()
        protocol = parts.machine.status(now)
        return NodePicture(
            __version__,
            parts.transport.address,
            str(self._config.node.run_dir),
            time.monotonic() - self._started_s,
            parts.store.resumed,
            tuple(self.waiting_for()),
            protocol,
            model_pictures(parts, protocol, now, self.metrics.row_delays),
            queues(parts, protocol),
            counters(parts),
            dict(parts.runtime.rejected),
            self._leftovers.bytes(time.monotonic()),
            None if self._snapshots is None else self._snapshots.picture,
            self._loads.picture,
            parts.operations.aliases(),
            parts.rates.pictures(protocol.budgets),
            health=parts.health.pictures(),
            rollbacks=parts.rollbacks.pictures(),
            delayed=None if parts.delaying is None else parts.delaying.to_json(),
            device=None if (devices := self._life().devices) is None else devices.picture(),
            server=None if (server := self._life().server) is None else server.picture,
            sinks=() if (sinks := self._life().sinks) is None else sinks.pictures(),
        )

    # --- what it is told to do

    def expel(self, node: str) -> dict[str, object]:
        """See `ekko.http.Source`."""
        parts = self._parts()
        failed = self._submit(m.ExpelRequested(TOOL_REQUEST, node))
        answer = parts.effects.take_tool_answer()
        if isinstance(answer, m.Expelled):
            return {"node": answer.node, "writers": answer.writers}
        raise EkkoError(answer.reason if answer is not None else failed.reason if failed is not None else "no answer")

    def snapshot(self, kind: Literal["auto", "full"]) -> dict[str, object]:
        """See `ekko.http.Source`."""
        if self._snapshots is None:
            raise EkkoError(f"node {self._config.node.id!r} has no [snapshots] in its configuration: add url = ... there")
        self._parts()
        before = asdict(self._snapshots.picture)
        self._snapshots.ask(kind)
        return before

    def load(self, request: LoadRequest) -> dict[str, object]:
        """See `ekko.http.Source`."""
        self._parts().publishing.check_may_publish()
        before = asdict(self._loads.picture)
        self._loads.begin(request)
        return before

    async def alias(self, name: str, model: str | None, *, back: bool, remove: bool, force: bool) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return await self._parts().operations.alias(name, model, back=back, remove=remove, force=force)

    def rate(self, pair: str, word: Word) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._parts().rates.say(pair, word)

    async def fence(self, model: str, epoch: int, note: str, expel_after_ms: int | None) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return await self._parts().fences.fence(model, epoch, note, expel_after_ms)

    async def lift(self, model: str, epoch: int) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return await self._parts().fences.lift(model, epoch)

    def drop(self, what: str, *, force: bool) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._parts().operations.drop(what, force=force)

    def overrule(self, model: str, state: State, from_ms: int | None, text: str) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._parts().health.overrule(model, state, from_ms, text)

    def report(self, report: Report) -> Reported:
        """See `ekko.http.Source`."""
        return self._parts().health.report(report)

    def rollback(self, request: RollbackRequest) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._parts().rollbacks.request(request)

    def finish_rollback(self, model: str) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._parts().rollbacks.finish(model)

    def rollbacks(self, model: str | None, epoch: int | None) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._parts().rollbacks.history(model, epoch)

    def rows_at_risk(self, epoch: int) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._parts().rollbacks.rows_at_risk(epoch)

    def _parts(self) -> Parts:
        parts = self._life().parts
        if parts is None:
            raise EkkoError(f"node {self._config.node.id!r} is starting: ask again when it is ready")
        return parts
