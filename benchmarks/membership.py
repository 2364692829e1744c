"""`membership`: how soon the dead are noticed, whether the living are left in peace, and what that costs.

In virtual time, so a second is a virtual second and bytes are those of the encoded messages (envelope, header and columns; what
TCP adds is not counted). Nodes are spread over six regions, 1 to 5 ms apart inside one and 40 ms more between two. Loss is
that of whole messages, in every direction.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from benchmarks.common import Figure
from p2p import messages as m
from p2p import wire
from p2p.machine import Machine
from p2p.transport import Buffer
from sim_cluster.virtual import NetworkOptions, VirtualCluster

TARGETS = {
    "detect_s_100": "<= 10",
    "detect_s_100_loss_50pct": "<= 15",
    "false_suspicions": "<= 0",
    "idle_bytes_per_s": "<= 20000",
}
REGIONS = 6
DELAYS = (1, 5, 40)
# A suspicion of a living node that is seen twice, this far apart, has lasted.
LOOK_MS = 2_000
SETTLE_MS = 30_000
DETECT_MS_MAX = 120_000


def run(quick: bool) -> dict[str, Figure]:
    """Measure; 100 nodes for ten virtual minutes, or 12 for ten seconds when quick."""
    nodes = 12 if quick else 100
    calm = _form(nodes, 1)
    with _counted_bytes() as sent:
        _run(calm, 10_000 if quick else SETTLE_MS)
        idle = sum(sent) / nodes / ((10_000 if quick else SETTLE_MS) / 1_000)
    links = sum(sum(peer.linked for peer in machine.status(calm.now()).peers) for machine in _machines(calm)) / nodes
    calm_s = _detect(calm, _victims(nodes, quick))

    lossy = _form(nodes, 2)
    lossy.options = NetworkOptions(*DELAYS, loss_probability=0.2)
    lasting, momentary = _run(lossy, 10_000 if quick else 600_000)

    half = _form(nodes, 3)
    half.options = NetworkOptions(*DELAYS, loss_probability=0.5)
    _run(half, 10_000 if quick else SETTLE_MS)
    half_s = _detect(half, _victims(nodes, quick))
    return {
        "detect_s_100": max(calm_s),
        "detect_s_100_loss_50pct": max(half_s),
        "false_suspicions": lasting,
        "idle_bytes_per_s": idle,
        "false_suspicions_momentary": momentary,
        "detect_first_s_100": min(calm_s),
        "links_per_node": links,
        "nodes": nodes,
    }


def _form(nodes: int, seed: int) -> VirtualCluster:
    cluster = VirtualCluster(seed, NetworkOptions(*DELAYS))
    for number in range(nodes):
        cluster.add(f"n{number}", f"r{number % REGIONS}", "serve" if number else "train", ["n0"] if number else [])
    formed = cluster.run_until(lambda: all(len(_alive(cluster, machine)) == nodes - 1 for machine in _machines(cluster)))
    assert formed, "the cluster never formed"
    return cluster


def _machines(cluster: VirtualCluster) -> Iterator[Machine]:
    return (node.machine for node in cluster.nodes.values() if node.machine is not None)


def _alive(cluster: VirtualCluster, machine: Machine) -> set[str]:
    return {peer.node for peer in machine.status(cluster.now()).peers if peer.alive}


def _victims(nodes: int, quick: bool) -> Sequence[str]:
    return [f"n{number}" for number in ((5,) if quick else (7, nodes // 2, nodes - 1))]


def _run(cluster: VirtualCluster, duration_ms: int) -> tuple[int, int]:
    """Let time pass; how many suspicions of living nodes lasted from one look to the next, and how many were seen once."""
    before: set[tuple[str, str]] = set()
    lasting: set[tuple[str, str]] = set()
    momentary = 0
    names = set(cluster.nodes)
    for _ in range(duration_ms // LOOK_MS):
        cluster.run(LOOK_MS)
        seen = set()
        for node in cluster.nodes.values():
            if node.machine is not None:
                seen |= {(node.name, other) for other in names - {node.name} - _alive(cluster, node.machine)}
        momentary += len(seen - before)
        lasting |= seen & before
        before = seen
    return len(lasting), momentary


def _detect(cluster: VirtualCluster, victims: Sequence[str]) -> list[float]:
    """Seconds from a crash until the last of the others notices; one crash after the other."""
    found = []
    for victim in victims:
        cluster.crash(victim)
        begin_ms = cluster.now_ms
        noticed = cluster.run_until(
            lambda victim=victim: not any(victim in _alive(cluster, machine) for machine in _machines(cluster)),  # type: ignore[misc]
            DETECT_MS_MAX,
            100,
        )
        assert noticed, f"{victim} was never missed"
        found.append((cluster.now_ms - begin_ms) / 1_000)
    return found


def _size(frames: Sequence[Buffer]) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)


@contextmanager
def _counted_bytes() -> Iterator[list[int]]:
    """Sizes of all messages that machines send."""
    sent: list[int] = []
    handle = Machine.handle

    def counting(self: Machine, event: m.Event, now: m.Now) -> list[m.Effect]:
        effects = handle(self, event, now)
        sends = [effect for effect in effects if isinstance(effect, m.Send)]
        sent.extend(_size(wire.encode(send.envelope, send.message)) for send in sends)
        return effects

    with mock.patch.object(Machine, "handle", counting):
        yield sent
