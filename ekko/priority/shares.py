"""The share of each model among what readers ask for: told to others, and added up of what they tell (`demand`)."""

from collections.abc import Callable
from contextlib import suppress

from ekko.errors import EkkoError
from ekko.generations import Generation
from ekko.priority.demand import REQUESTS_MAX, TELL_MS, Demand
from ekko.store import Store
from p2p.messages import Now
from p2p.replica import SchemaEntry


class Shares:
    """What one node tells of its readers, and what it makes of what all nodes tell.

    Args:
        node: its id.
        store: with its readers' counts.
        submit: hands entries to peers.
    """

    def __init__(self, node: str, store: Store, submit: Callable[[tuple[SchemaEntry, ...]], None]) -> None:
        self._node = node
        self._store = store
        self._submit = submit
        self._told_ms: int | None = None
        self._shares: dict[str, float] = {}

    def share_of(self, model: str) -> float:
        """What is asked of a model, relative to the average of all models here; 1 where nobody counts anything."""
        return self._shares.get(model, 1.0)

    def look(self, now: Now) -> None:
        """Tell and add up, where it is time; call it every few seconds."""
        if self._told_ms is None or now.monotonic_ms - self._told_ms >= TELL_MS:
            self._told_ms = now.monotonic_ms
            own = {
                (Generation.of(model.spec), self._node): (now.unix_ms, min(round(model.requests), REQUESTS_MAX))
                for model in self._store.models.values()
                if model.requests >= 1
            }
            if own and (told := self._store.facts.note(Demand(own))):
                with suppress(EkkoError):  # the protocol is stopping; the next word says the same
                    self._submit(told)
        requests = self._store.facts.of(Demand).requests(now.unix_ms)
        total = sum(requests.values())
        models = {name: requests.get(Generation.of(model.spec), 0) for name, model in self._store.models.items()}
        self._shares = {name: count * len(models) / total for name, count in models.items()} if total else {}
