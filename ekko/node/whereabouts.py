"""Which node, and which region, an address is of: what links are emulated, compressed and secured by."""

from ekko.config import NodeConfig
from p2p.machine import Machine
from p2p.members.membership import MEMBERS_MAX
from p2p.runtime import read_clock

# Asked for at every dial; a whole cluster is dialled at once.
NODES_KNOWN_MS = 200


class Whereabouts:
    """Of the peers of one node, as far as its machine knows them; remembered, since it is asked at each send."""

    def __init__(self, config: NodeConfig, machine: Machine) -> None:
        self._config = config
        self._machine = machine
        self._nodes: dict[str, str] = {}  # address -> node
        self._nodes_until_ms = 0
        self._regions: dict[str, str] = {}  # address -> region

    def node_at(self, address: str) -> str | None:
        """The node that peers dial at `address`, where it is known; at most a little out of date."""
        now = read_clock()
        if now.monotonic_ms >= self._nodes_until_ms:
            peers = self._machine.status(now).peers
            self._nodes = {peer.address: peer.node for peer in peers if peer.address}
            self._nodes_until_ms = now.monotonic_ms + NODES_KNOWN_MS
        return self._nodes.get(address)

    def _region_of(self, address: str) -> str | None:
        """The region of a peer; None until it is known."""
        region = self._regions.get(address)
        if region is None and (region := self._machine.region_of(address)) is not None:
            if len(self._regions) >= MEMBERS_MAX:
                self._regions.clear()
            self._regions[address] = region
        return region

    def delay_s(self, address: str) -> float:
        """Emulated one-way delay towards a peer; none until its region is known."""
        region = self._region_of(address)
        return 0.0 if region is None else self._config.delay_s(self._config.node.region, region)

    def crosses(self, address: str) -> bool:
        """Whether a peer is known to be in another region."""
        return self._region_of(address) not in (None, self._config.node.region)
