"""The network of the virtual cluster: every fault of a message in one options struct, and what it costs a message to pass.

A link between two nodes has a queue: a message leaves when those before it have left, at the link's rate, and a queue that is
full refuses it, as a socket at its high-water mark does. Nodes may also share what is narrow: the network card of the sender,
and the pipe between two regions. Those queues refuse nothing, unless the pipe has a bounded buffer; what waits in them is
bounded by the senders' credit. Then come loss, repetition, delay and reordering.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

# What a sender's socket takes before it refuses (ZeroMQ counts messages; with a rate it is bytes that matter).
QUEUE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Between two regions, both ways; on top of what holds for all links."""

    delay_ms: int = 0
    rate_bytes_per_ms: float = 0.0  # of each pair of nodes, each way; 0: no limit
    loss_probability: float = 0.0
    shared_bytes_per_ms: float = 0.0  # of all nodes of the two regions together, each way; 0: no limit
    buffer_bytes: float = math.inf  # that may wait for it, before it refuses more


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Faults to inject; probabilities are per message."""

    delay_ms_min: int = 1
    delay_ms_max: int = 5
    region_delay_ms: int = 0  # on top, between regions
    loss_probability: float = 0.0
    repeat_probability: float = 0.0
    reorder_probability: float = 0.0  # the message may overtake, or be overtaken by, others of its link
    tail_probability: float = 0.0  # of a delay from an exponential distribution on top
    tail_ms: float = 0.0  # its mean
    corrupt_probability: float = 0.0  # of one flipped bit below the envelope
    rate_bytes_per_ms: float = 0.0  # of each link between two nodes, each way; 0: no limit
    card_bytes_per_ms: float = 0.0  # of a node's network card, what it sends; 0: no limit
    afterlife_probability: float = 0.0  # of reaching the next process of a node whose process ended before it came
    links: Mapping[str, LinkOptions] = field(default_factory=dict)  # by `pair_of(region, region)`


def pair_of(one: str, other: str) -> str:
    """The name of a pair of regions: "eu/us"."""
    return "/".join(sorted((one, other)))


def rates_of(rates: Mapping[str, float], region: str) -> tuple[tuple[str, float], ...]:
    """Of rates by pair, those of a region: (other region, rate)."""
    pairs = ((pair.split("/"), rate) for pair, rate in sorted(rates.items()))
    return tuple((names[names[0] == region], rate) for names, rate in pairs if region in names)


_PLAIN = LinkOptions()


class Network:
    """State of all links.

    Args:
        rng: the only source of randomness.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.latest_ms = 0  # when the last of all messages on their way will have come
        self._last_arrival: dict[tuple[str, str], int] = {}
        self._free_ms: dict[tuple[str, str], float] = {}  # when what is queued on a link will have left

    def arrivals(
        self, options: NetworkOptions, link: tuple[str, str], regions: tuple[str, str], size: float, now_ms: float
    ) -> list[int] | None:
        """When copies of a message arrive; none when it is lost, None when the link's queue refuses it.

        Args:
            options: the faults of now.
            link: names of sender and receiver.
            regions: theirs.
            size: bytes of the message.
            now_ms: virtual time at which it is sent.
        """
        rng = self._rng
        pair = options.links.get(pair_of(*regions), _PLAIN) if options.links else _PLAIN
        leaves_ms = float(now_ms)
        if pair.shared_bytes_per_ms and self._waiting(regions, pair.shared_bytes_per_ms, now_ms) > pair.buffer_bytes:
            return None
        rate = pair.rate_bytes_per_ms or options.rate_bytes_per_ms
        if rate:
            begin = max(leaves_ms, self._free_ms.get(link, 0.0))
            if (begin - now_ms) * rate > QUEUE_BYTES_MAX:
                return None
            leaves_ms = self._free_ms[link] = begin + size / rate
        if options.card_bytes_per_ms or pair.shared_bytes_per_ms:
            leaves_ms = self._pass_shared(options.card_bytes_per_ms, pair.shared_bytes_per_ms, link, regions, size, leaves_ms)
        loss = max(options.loss_probability, pair.loss_probability)
        if loss and rng.random() < loss:
            return []
        copies = 1 + (options.repeat_probability > 0 and rng.random() < options.repeat_probability)
        fixed_ms = pair.delay_ms + (options.region_delay_ms if regions[0] != regions[1] else 0)
        return [self._arrival(options, link, math.ceil(leaves_ms) + fixed_ms) for _ in range(copies)]

    def _waiting(self, regions: tuple[str, str], rate: float, now_ms: float) -> float:
        """Bytes that wait for the pipe between two regions."""
        return rate * max(0.0, self._free_ms.get(("pipe " + regions[0], regions[1]), 0.0) - now_ms)

    def _pass_shared(
        self, card: float, pipe: float, link: tuple[str, str], regions: tuple[str, str], size: float, now_ms: float
    ) -> float:
        """When the last byte has passed the sender's card and the pipe between the regions, which begins when the card does."""
        begin_ms = end_ms = now_ms
        for rate, place in ((card, (link[0], "")), (pipe, ("pipe " + regions[0], regions[1]))):
            if rate:
                begin_ms = max(begin_ms, self._free_ms.get(place, 0.0))
                self._free_ms[place] = begin_ms + size / rate
                end_ms = max(end_ms, begin_ms + size / rate)
        return end_ms

    def _arrival(self, options: NetworkOptions, link: tuple[str, str], from_ms: int) -> int:
        rng = self._rng
        # Not `randint`, which costs three times as much; its small bias towards some delays is no matter here.
        arrival_ms = from_ms + options.delay_ms_min + int(rng.random() * (options.delay_ms_max + 1 - options.delay_ms_min))
        if options.tail_probability and rng.random() < options.tail_probability:
            arrival_ms += int(rng.expovariate(1.0 / max(options.tail_ms, 1e-9)))
        if not options.reorder_probability or rng.random() >= options.reorder_probability:
            arrival_ms = self._last_arrival[link] = max(arrival_ms, self._last_arrival.get(link, 0))
        self.latest_ms = max(self.latest_ms, arrival_ms)
        return arrival_ms
