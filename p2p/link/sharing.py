"""Nodes of a region that send to another one tell each other how much they want of the pair's rate (`p2p.link.budget`).

Who used some of it lately says so every `TELL_MS` to the other live nodes of its region, and all work out the same fair shares
from what they were told. What somebody said counts for `KEPT_MS`; who is not heard of any more leaves its share to the others.
Who begins to send hears of those who do already, so it starts with an equal share; they hear of it within `TELL_MS`. Where a
region is split, each side uses the whole rate.
"""

from p2p import messages as m
from p2p.core import Core
from p2p.link.budget import demand, fair_share
from p2p.link.links import Link

TELL_MS = 500
KEPT_MS = 3 * TELL_MS


class Sharing:
    """What others of our region want, and our share.

    Args:
        core: shared state.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._told: dict[str, dict[m.NodeId, tuple[int, int]]] = {}  # by region: bytes a second, and until when that counts
        self._last_ms = 0  # when the shares were worked out last

    def next_ms(self) -> int | None:
        """When the timer is wanted: while there is a rate at all."""
        return self._last_ms + TELL_MS if self._core.budgets.buckets else None

    def on_timer(self, now: m.Now) -> None:
        """Say what we want, and work out what is ours."""
        core, passed_ms = self._core, now.monotonic_ms - self._last_ms
        if not core.budgets.buckets or passed_ms < TELL_MS:
            return
        self._last_ms = now.monotonic_ms
        wants = tuple((region, demand(bucket, passed_ms)) for region, bucket in core.budgets.buckets.items())
        wants = tuple((region, wanted) for region, wanted in wants if wanted)
        if wants:
            own, members = core.options, core.membership.members
            for node in core.membership.live_nodes(now.monotonic_ms):
                if members[node].record.region == own.region and (link := core.link(node)) is not None:
                    core.send(link, m.Wants(wants))
        for region in list(self._told):
            self._divide(region, now.monotonic_ms)

    def on_wants(self, link: Link, wants: m.Wants, now: m.Now) -> None:
        """Somebody of our region wants to send, too. What others say, and of pairs without a rate, means nothing."""
        if link.region != self._core.options.region:
            return
        for region, bytes_per_s in wants.regions:
            if region in self._core.budgets.buckets:
                self._told.setdefault(region, {})[link.node] = bytes_per_s, now.monotonic_ms + KEPT_MS
                self._divide(region, now.monotonic_ms)

    def _divide(self, region: str, now_ms: int) -> None:
        """Work out our share anew from what was told and still counts."""
        told, members = self._told[region], self._core.membership.members
        for node in [node for node, (_, until_ms) in told.items() if now_ms >= until_ms or node not in members]:
            del told[node]
        bucket = self._core.budgets.buckets.get(region)
        if bucket is not None:
            others = [bytes_per_s for bytes_per_s, _ in told.values()]
            bucket.share(fair_share(bucket.pair_rate * 1_000, others) / 1_000)
        if not told or bucket is None:
            del self._told[region]
