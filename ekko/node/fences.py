"""Fencing a model, and lifting the fence, as tools over HTTP and a rollback in the daemon ask for it (`p2p.identity.fence`)."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from ekko.errors import EkkoError, ModelError
from ekko.model import check_name
from ekko.store import Store
from p2p import messages as m
from p2p.messages.fences import LIFTED

# Below the time-out of a command. A fence that is not closed by then closes later; whoever asks again hears of it.
ANSWER_S = 4.0
# Requests of operators that wait at once.
REQUESTS_MAX = 16
# Requests of publishers count up from 0, those of `ekko.operations` down from -1,000, those of rollbacks from -1,000,000.
FIRST_REQUEST, LAST_REQUEST = -500_000, -999_999

Answered = m.Fenced | m.FenceWaits | m.Lifted | m.Refused

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting:
    """Somebody asked for a fence."""

    done: asyncio.Future[m.Fenced | m.Lifted | m.Refused]
    waits_for: tuple[str, ...] = ()


class Fences:
    """Of one node's life.

    Args:
        store: its models.
        last: the last fence of a family.
        submit: hands an event to the protocol; raises `EkkoError` when it is refused.
    """

    def __init__(
        self,
        store: Store,
        last: Callable[[int], m.Fence | None],
        submit: Callable[[m.FenceRequested | m.LiftRequested], None],
    ) -> None:
        self._store = store
        self._last = last
        self._submit = submit
        self._waiting: dict[int, _Waiting] = {}
        self._requests = FIRST_REQUEST

    async def fence(self, model: str, epoch: int = 0, note: str = "", expel_after_ms: int | None = None) -> dict[str, object]:
        """Stop the writers of a model; answers when that is done, or after a few seconds how far it is.

        Args:
            model: its name.
            epoch: of the fence; 0: the next. Asked again for the same epoch, it is the same fence.
            note: for people, and for publishers that are refused.
            expel_after_ms: let go of members that are not heard for so long meanwhile; None: wait for them.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """
        family = self._family(model)
        number, waiting = self._begin()
        try:
            self._submit(m.FenceRequested(number, family, epoch, note, expel_after_ms))
            try:
                answer = await asyncio.wait_for(asyncio.shield(waiting.done), ANSWER_S)
            except TimeoutError:
                answer = None
        finally:
            del self._waiting[number]
        if isinstance(answer, m.Refused):
            raise ModelError(f"model {model!r} is not fenced: {answer.reason}")
        last = self._last(family)
        epoch = answer.epoch if isinstance(answer, m.Fenced) else 0 if last is None else last.epoch
        return {"model": model, "epoch": epoch, "closed": answer is not None, "waits_for": list(waiting.waits_for)}

    async def lift(self, model: str, epoch: int = 0) -> dict[str, object]:
        """Let the writers of a model go on. Epoch 0: whichever fence stands.

        Raises:
            EkkoError: there is none, or another one.
        """
        family = self._family(model)
        last = self._last(family)
        if not epoch and (last is None or last.stage == LIFTED):
            raise ModelError(f"model {model!r} is not fenced: its writers may write")
        number, waiting = self._begin()
        try:
            self._submit(m.LiftRequested(number, family, epoch or (0 if last is None else last.epoch)))
            answer = await asyncio.wait_for(asyncio.shield(waiting.done), ANSWER_S)
        finally:
            del self._waiting[number]
        if isinstance(answer, m.Refused):
            raise ModelError(f"model {model!r}: {answer.reason}")
        log.warning("fence_lifted", model=model, epoch=answer.epoch)
        return {"model": model, "epoch": answer.epoch}

    def on_answer(self, answer: Answered) -> bool:
        """Whether an answer of the protocol was for somebody here."""
        waiting = self._waiting.get(answer.request)
        if waiting is None:
            return LAST_REQUEST <= answer.request <= FIRST_REQUEST  # somebody who has gone
        if isinstance(answer, m.FenceWaits):
            waiting.waits_for = answer.nodes
        elif not waiting.done.done():
            waiting.done.set_result(answer)
        return True

    def _begin(self) -> tuple[int, _Waiting]:
        if len(self._waiting) >= REQUESTS_MAX:
            raise EkkoError(f"{REQUESTS_MAX} requests wait on this node already: ask again in a moment")
        self._requests = FIRST_REQUEST if self._requests <= LAST_REQUEST else self._requests - 1
        waiting = self._waiting[self._requests] = _Waiting(asyncio.get_running_loop().create_future())
        return self._requests, waiting

    def _family(self, model: str) -> int:
        held = self._store.models.get(check_name("model", model))
        if held is None:
            raise ModelError(f"no model {model!r} is on this node: it has {', '.join(map(repr, self._store.models)) or 'none'}")
        return held.spec.id
