"""Two steps of one request: the second is published when the first is visible everywhere (`ekko.local.PublishPair`).

What a parameter server does with each group of pushes, in one message instead of three: it would publish, wait, and publish
again, and be woken each time. Where something is not as it should be, the second step is not published, and the server is told
how far it came: it knows what to wait for.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ekko.errors import EkkoError
from ekko.local import Answer, Failed, PairStored, PublishPair, PublishStep
from p2p import messages as m


@dataclass(slots=True)
class _Pair:
    """One that is under way. `stamp`: of its first step; 0: not stored yet. `everywhere`: the second one is under way."""

    request: PublishPair
    stamp: int = 0
    everywhere: bool = False


class Pairs:
    """Those of one node that are under way; at most as many as its local endpoint has requests.

    Args:
        publish: checks a step and hands it to the protocol; returns why it failed, None: the answer comes as an effect.
        wait: the same of a step that was published: model, stamp, milliseconds.
        answer: goes to who asked.
    """

    def __init__(
        self,
        publish: Callable[[int, PublishStep], Failed | None],
        wait: Callable[[int, str, int, int], Failed | None],
        answer: Callable[[int, Answer], None],
    ) -> None:
        self._publish = publish
        self._wait = wait
        self._answer = answer
        self._pairs: dict[int, _Pair] = {}

    def begin(self, number: int, request: PublishPair) -> Failed | None:
        """Publish the first step; returns why it failed.

        Raises:
            EkkoError: the same.
        """
        self._pairs[number] = _Pair(request)
        try:
            failed = self._publish(number, request.first)
        except BaseException:
            del self._pairs[number]
            raise
        if failed is not None:
            self._pairs.pop(number, None)
        return failed

    def on_answer(self, effect: m.Effect) -> bool:
        """Whether this answers one of our requests to the protocol; what follows is done."""
        match effect:
            case m.Published(number, stamp) if (pair := self._pairs.get(number)) is not None:
                if pair.everywhere:
                    self._end(number, stamp)
                    return True
                pair.stamp = stamp
                if self._wait(number, pair.request.first.model, stamp, pair.request.timeout_ms) is not None:
                    self._end(number)
            case m.WaitEnded(number, lagging, silent) if (pair := self._pairs.get(number)) is not None:
                pair.everywhere = not (lagging or silent)
                if not pair.everywhere or not self._published(number, pair.request.second):
                    self._end(number)
            case m.Refused(number) if (pair := self._pairs.get(number)) is not None:
                if not pair.stamp:
                    del self._pairs[number]
                    return False
                self._end(number)
            case _:
                return False
        return True

    def _published(self, number: int, step: PublishStep) -> bool:
        """Whether the second step is on its way."""
        try:
            return self._publish(number, step) is None
        except EkkoError:  # the server publishes it by itself, and is told why not
            return False

    def _end(self, number: int, second: int | None = None) -> None:
        pair = self._pairs.pop(number)
        self._answer(number, PairStored(pair.stamp, pair.everywhere, second))
