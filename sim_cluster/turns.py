"""What work costs, and what comes to a node while it works: with a cost model, a node does one thing after the other."""

from collections.abc import Callable, Sequence
from typing import Protocol

from ekko.store import Store
from p2p import messages as m
from p2p.machine import Machine
from p2p.replica import Host
from sim_cluster.node import VirtualNode
from sim_cluster.timeline import Timeline

# What waits for a busy node, before more is lost as at a socket that nobody reads.
WAITING_MAX = 1 << 16

CarryOut = Callable[[VirtualNode, Machine, m.Event], None]


class CpuModel(Protocol):
    """What work costs. One event is handled at a time, between `begin` and the last effect."""

    def host(self, node: str, store: Store) -> Host:
        """The node's store, as its machine sees it; what is asked of it is charged to the event at hand."""

    def begin(self, node: str, start_ms: float) -> None:
        """A node whose CPU is free begins to work at this moment."""

    def handling(self, event: m.Event) -> None:
        """Charge for an event, besides what it asks of the store."""

    def sending(self, node: str, message: m.Message) -> None:
        """Charge for a message on its way out."""

    @property
    def ends_ms(self) -> float:
        """When the work so far will be done."""

    def bytes_of(self, message: m.Message, frames: Sequence[bytes]) -> float:
        """What a message is to count as on the links."""


class Turns:
    """Lets events wait for their node's CPU.

    Args:
        cpu: what work costs.
        timeline: when it is done.
        carry_out: the work.
    """

    def __init__(self, cpu: CpuModel, timeline: Timeline, carry_out: CarryOut) -> None:
        self._cpu = cpu
        self._timeline = timeline
        self._carry_out = carry_out

    def take(self, node: VirtualNode, machine: Machine, event: m.Event) -> None:
        """An event comes: handled now, or when the CPU is free."""
        local = isinstance(event, m.PublishRequested | m.WaitRequested)
        line = node.waiting_local if local else node.waiting
        if len(line) >= WAITING_MAX:
            return
        idle = not node.waiting and not node.waiting_local
        line.append(event)
        if idle:
            self._work_off(node, machine)

    def _work_off(self, node: VirtualNode, machine: Machine) -> None:
        """Handle what waits, as far as the CPU comes within this millisecond."""
        if node.machine is not machine:
            return
        if node.paused:
            node.held.append(lambda: self._work_off(node, machine))
            return
        now_ms = self._timeline.now_ms
        while (node.waiting or node.waiting_local) and node.busy_until_ms < now_ms + 1:
            self._cpu.begin(node.name, max(float(now_ms), node.busy_until_ms))
            # It leaves the line only when it is done: what it sets off on its own node waits behind it.
            line = node.waiting_local or node.waiting
            self._carry_out(node, machine, line[0])
            node.busy_until_ms = self._cpu.ends_ms
            if line:
                line.popleft()
        if node.waiting or node.waiting_local:
            self._timeline.at(int(node.busy_until_ms), lambda: self._work_off(node, machine))
