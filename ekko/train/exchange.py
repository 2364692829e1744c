"""A worker's requests on their way to servers, and their answers: what `outstanding` decides, carried over `sockets`.

There is no thread: messages are carried while somebody waits (`until`), and in passing by calls that need no answer (`hear`).
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from ekko.errors import ConfigError, EkkoError, ModelError, NodeUnreachable, PublishError
from ekko.train.outstanding import Outstanding
from ekko.train.server import wire as w
from ekko.train.server.coding import decode_answer, encode_request
from ekko.train.sockets import Sockets

# Calls that need no answer look for those of pushes no more often than so.
HEAR_S: Final = 0.01
# A poll ends at the latest then, so that Ctrl-C is heard, and that another thread closes this.
POLL_S_MAX: Final = 1.0


class Exchange:
    """Between one worker and the servers of one model. Used by one thread at a time.

    Args:
        model: the model's name.
        asked: what is asked of whom.
        sockets: to them.
    """

    def __init__(self, model: str, asked: Outstanding, sockets: Sockets) -> None:
        self._model = model
        self._asked = asked
        self._sockets = sockets
        self._heard_s = 0.0
        self._closing = False

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Carry messages until something holds.

        Args:
            condition: what is to hold.
            what: what the servers do then, for the error.
            timeout_s: how long to wait for it.

        Raises:
            NodeUnreachable: it did not come to hold.
            PublishError: another thread closed this meanwhile.
            ConfigError: no server lets this worker in.
            EkkoError: it never will.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.transmit()
            if condition():
                return
            if self._asked.failure is not None:
                raise self._asked.failure
            if self._closing:
                raise PublishError("this client was closed while it waited")
            self._check_let_in()
            now = time.monotonic()
            if now >= deadline:
                raise NodeUnreachable(self._silence(what, timeout_s))
            until = min(deadline, self._asked.deadline_s(now), now + POLL_S_MAX)
            self._receive(max(0, math.ceil((until - now) * 1000)))
            if time.monotonic() >= until:
                self._asked.tick(time.monotonic())

    def _check_let_in(self) -> None:
        """Who is let in nowhere need not wait for it. Who was let in before waits: keys may be on their way."""
        if not self._asked.joined:
            refusals = self._sockets.refusals
            if refusals and all(end in refusals and refusals[end].final for end in self._sockets.endpoints):
                raise ConfigError(f"model {self._model!r}: {_together({end: one.reason for end, one in refusals.items()})}")

    def transmit(self) -> None:
        """Send what is due."""
        for send in self._asked.drain():
            try:
                sent = self._sockets.send(send.endpoint, encode_request(send.number, send.request))
            except w.ServerWireError as error:
                raise ModelError(f"model {self._model!r}: {error}") from None
            if not sent:
                self._asked.unsent(send.number, time.monotonic())

    def hear(self) -> None:
        """Take what has come, and send what is due again, without waiting."""
        if self._asked.pushes and time.monotonic() >= self._heard_s + HEAR_S:
            self._receive(0)
            self._heard_s = time.monotonic()
            self._asked.tick(self._heard_s)
            self.transmit()

    def closing(self) -> None:
        """From any thread: who waits ends."""
        self._closing = True

    def close(self) -> None:
        """Drop all connections and whatever is under way on them."""
        self._sockets.close()

    def _receive(self, timeout_ms: int) -> None:
        """Take what has come; wait for the first of it."""
        for endpoint, frames in self._sockets.receive(timeout_ms):
            try:
                number, answer = decode_answer(frames)
            except w.ServerWireError as error:
                if error.number is not None:
                    raise EkkoError(f"{endpoint} answered what cannot be understood: {error}") from None
                continue  # junk; what was asked is asked again
            self._asked.answered(endpoint, number, answer, time.monotonic())

    def _silence(self, what: str, timeout_s: float) -> str:
        who = ", ".join(self._sockets.endpoints) or "none"
        others = "" if self._asked.settings is None or self._asked.settings.mode == w.ASYNC else ", or wait for another worker"
        reasons = self._asked.standing.reasons | {end: one.reason for end, one in self._sockets.refusals.items()}
        said = f"{_together(reasons)}. " if reasons else ""
        return (
            f"the servers of model {self._model!r} did not {what} within {timeout_s:g} s: they are away{others}. Asked: {who}. "
            f"{said}Look at `ekko status` there; a node that is gone for good has to be expelled (ekko expel)"
        )


def _together(reasons: Mapping[str, str]) -> str:
    """What is said of each endpoint."""
    return "; ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items())
