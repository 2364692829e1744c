"""What the protocol wants done: answers to whoever asked, times for the metrics, notes for the log."""

import time
from collections.abc import Callable
from typing import assert_never

import structlog

from ekko.ceilings import Above
from ekko.endpoint import LocalEndpoint
from ekko.errors import PublishError
from ekko.local import FENCED, Failed, Stored, Waited
from ekko.metrics import Metrics
from ekko.node.fences import Fences
from ekko.node.pairs import Pairs
from ekko.node.publishing import LOAD_REQUEST, Publishing
from ekko.operations import Operations
from ekko.rollback.performer import Reply
from ekko.store import Store
from p2p import messages as m

# Requests of tools are answered at once, so that one number is enough; those of the local endpoint count from 0.
TOOL_REQUEST = -1

log = structlog.get_logger(__name__)


class Effects:
    """Carries out the machine's effects, but those of the runtime itself."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        endpoint: LocalEndpoint,
        publishing: Publishing,
        operations: Operations,
        on_rollback: Callable[[Reply], bool],
        fences: Fences,
        pairs: Pairs,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._endpoint = endpoint
        self._publishing = publishing
        self._operations = operations
        self._on_rollback = on_rollback
        self._fences = fences
        self._pairs = pairs
        self._tool_answer: m.Expelled | m.Refused | None = None

    def carry_out(self, effect: m.Effect) -> None:
        """One effect, now."""
        match effect:
            case m.Published() | m.Refused() | m.WaitEnded() | m.Fenced() | m.FenceWaits() | m.Lifted() if self._on_rollback(
                effect
            ):
                pass
            case m.Published() | m.Refused() | m.WaitEnded() if self._pairs.on_answer(effect):
                pass
            case m.RowsApplied():
                self._metrics.on_rows(effect, time.monotonic_ns(), time.time_ns() // 1_000_000)
            case m.BatchApplied():
                self._metrics.on_applied(effect, time.monotonic_ns(), time.time_ns() // 1_000_000)
            case m.Published(request, stamp) if request == LOAD_REQUEST:
                self._publishing.on_loaded(stamp)
            case m.Published(request, stamp):
                self._endpoint.answer(request, Stored(stamp))
            case m.Refused() | m.WaitEnded() if self._operations.on_answer(effect):
                pass
            case m.Refused() | m.Fenced() | m.FenceWaits() | m.Lifted() if self._fences.on_answer(effect):
                pass
            case m.Fenced() | m.FenceWaits() | m.Lifted():
                pass  # whoever asked is gone
            case m.Refused(request) if request == TOOL_REQUEST:
                self._tool_answer = effect
            case m.Refused(request, reason) if request == LOAD_REQUEST:
                self._publishing.on_loaded(PublishError(reason))
            case m.Refused(request, reason, fenced):
                self._endpoint.answer(request, Failed(FENCED if fenced else "publish", reason))
            case m.WaitEnded(request, lagging, silent):
                self._endpoint.answer(request, Waited(lagging, silent))
            case m.AboveTold(request, stamp, heard, unheard, silent):
                self._endpoint.answer(request, Above(stamp, heard, unheard, silent))
            case m.Note(name, fields, alarm):
                (log.warning if alarm else log.info)(name, **self._readable(fields))
            case m.Expelled():
                self._tool_answer = effect
            case m.Fatal(reason):
                log.error("node_fatal", reason=reason)
            case m.StartOver(reason, rows_lost):
                log.error("node_starts_over", reason=reason, rows_lost=rows_lost)
            case m.Send() | m.Dial() | m.Forget() | m.Continue() | m.Unwanted():
                raise AssertionError(f"the runtime carries out {effect}")
            case _:
                assert_never(effect)

    def take_tool_answer(self) -> m.Expelled | m.Refused | None:
        """The answer to the tool's request that was submitted last, once."""
        answer, self._tool_answer = self._tool_answer, None
        return answer

    def _readable(self, fields: tuple[tuple[str, object], ...]) -> dict[str, object]:
        """A note's fields with model names for keyspace numbers."""
        readable = dict(fields)
        if "keyspace" in readable:
            number = readable.pop("keyspace")
            models = self._store.models.items()
            names = (name for name, model in models if number in (model.spec.id, *model.spec.keyspaces))
            readable["model"] = next(names, number)
        return readable
