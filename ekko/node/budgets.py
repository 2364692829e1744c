"""Rates of links between regions on a running node: what counts now is told to the protocol, and operators may change it."""

import asyncio
import secrets
from collections.abc import Callable

import structlog

from ekko.errors import ModelError
from ekko.model import EXTRAS_SINCE
from ekko.rates import BYTES_PER_S_OF_MBPS, Rates, Word
from ekko.store import Store
from p2p import messages as m
from p2p.status import BudgetStatus

log = structlog.get_logger(__name__)


class NodeRates:
    """Of one node's life.

    Args:
        region: its own.
        configured: Mbit/s by pair of regions, as its file says.
        store: which has the facts.
        submit: hands an event to the protocol; raises `EkkoError` when it is refused.
        protocol_min: the oldest protocol version that a member speaks, the silent ones included.
    """

    def __init__(
        self,
        region: str,
        configured: dict[str, float],
        store: Store,
        submit: Callable[[m.RateChanged | m.SchemaChanged], None],
        protocol_min: Callable[[], int],
    ) -> None:
        self._region = region
        self._configured = configured
        self._store = store
        self._submit = submit
        self._protocol_min = protocol_min
        self.in_use = self._wanted()  # other region -> bytes a second; as the protocol has been told
        store.facts.listeners.append(self._on_facts)

    def close(self) -> None:
        """Nothing is told any more."""
        self._store.facts.listeners.remove(self._on_facts)

    def say(self, pair: str, word: Word) -> dict[str, object]:
        """Have another rate on all nodes from now on.

        Raises:
            ModelError: some node is too old to understand it.
        """
        oldest = self._protocol_min()
        if oldest < EXTRAS_SINCE:
            raise ModelError(
                f"some node, silent ones included, has protocol version {oldest}, which knows no rates: upgrade all nodes "
                "first (`ekko status` shows who), and expel those that are gone for good"
            )
        entries = self._store.facts.note(self._facts.said(pair, word, secrets.randbits(64)))
        self._settle()
        self._submit(m.SchemaChanged(entries))
        return {"pair": pair, "said": word, "rate_mbps": self._facts.rate_of(pair, self._configured)}

    def pictures(self, budgets: tuple[BudgetStatus, ...]) -> dict[str, dict[str, object]]:
        """For people and tools: by pair, what counts, who says so, and how it is used where it is a pair of our region."""
        pictures: dict[str, dict[str, object]] = {}
        used = {budget.region: budget for budget in budgets}
        for pair in sorted({*self._facts.by_pair, *self._configured}):
            rate = self._facts.rate_of(pair, self._configured)
            said = self._facts.is_said(pair)
            if rate is None and not said:
                continue
            regions = pair.split("/")
            own = used.get(regions[regions[0] == self._region]) if self._region in regions else None
            pictures[pair] = {
                "rate_mbps": rate,
                "configured_mbps": self._configured.get(pair),
                "said": said,
                "share_mbps": None if own is None else own.share_bytes_per_s / BYTES_PER_S_OF_MBPS,
                "bytes_charged": None if own is None else own.bytes_charged,
                "waits": None if own is None else own.waits,
            }
        return pictures

    @property
    def _facts(self) -> Rates:
        return self._store.facts.of(Rates)

    def _wanted(self) -> dict[str, float]:
        return self._facts.of_region(self._region, self._configured)

    def _on_facts(self) -> None:
        """A peer has told something; the protocol is in the middle of hearing it, so it is told what follows in a moment."""
        if self._wanted() != self.in_use:
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        wanted, before = self._wanted(), self.in_use
        self.in_use = wanted
        for region in sorted({*wanted, *before}):
            rate = wanted.get(region)
            if rate != before.get(region):
                log.info("rate_changed", region=region, mbps=None if rate is None else rate / BYTES_PER_S_OF_MBPS)
                self._submit(m.RateChanged(region, rate))
