"""One model on one server, as a state machine: `events` in, effects out; no I/O, no clock, no threads."""

from collections.abc import Mapping

from ekko.train.server.events import Effect, Event
from ekko.train.server.wire import ModelSettings, ServerLife


class Machine:
    """Decides for one model on one server.

    Args:
        own: our life: the node beside us, and this process.
        settings: of the model.
        endpoints: node id -> endpoint of every server of the model, our own included, as all of them are configured.
        worker_timeout_ms: in modes "bounded" and "sync": who is silent for so long is not waited for; 0: for ever.
    """

    def __init__(
        self, own: ServerLife, settings: ModelSettings, endpoints: Mapping[str, str], worker_timeout_ms: int = 0
    ) -> None:
        self.deadline_ms: int | None = None  # when `TimerFired` is wanted next; None: not at all
        raise NotImplementedError

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        """Advance by one event.

        Args:
            event: what happened.
            now_ms: of a clock that never goes back, milliseconds.

        Returns:
            Effects to carry out, in order.
        """
        raise NotImplementedError
