"""`membership`: how soon the dead are noticed, whether the living are left in peace, and what that costs.

In virtual time, so a second is a virtual second and bytes are those of the encoded messages (envelope, header and columns; what
TCP adds is not counted). Nodes are spread over six regions, 1 to 5 ms apart inside one and 40 ms more between two. Loss is
that of whole messages, in every direction.
"""

import sys
import time
from collections.abc import Iterator, Sequence

from benchmarks.common import Figure
from p2p.machine import Machine
from sim_cluster.meter import Meter
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

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
SAMPLE_MS = 200
SETTLE_MS = 30_000
DETECT_MS_MAX = 120_000


def run(quick: bool) -> dict[str, Figure]:
    """Measure; 100 nodes for ten virtual minutes, or 12 for ten seconds when quick."""
    nodes = 12 if quick else 100
    settle_ms = 10_000 if quick else SETTLE_MS
    figures: dict[str, Figure] = {}
    calm = _form(nodes, 1)
    meter = calm.meter = Meter()
    _run(calm, settle_ms)
    figures["idle_bytes_per_s"] = meter.bytes_all / nodes / (settle_ms / 1_000)
    figures["links_per_node"] = sum(machine.links_open for machine in _machines(calm)) / nodes
    found = _detect(calm, _victims(nodes, quick))
    figures |= {"detect_s_100": max(found), "detect_first_s_100": min(found)}
    _say(figures)

    half = _form(nodes, 3)
    half.options = NetworkOptions(*DELAYS, loss_probability=0.5)
    figures["silence_max_loss_50pct"] = _run(half, settle_ms)[2]
    figures["detect_s_100_loss_50pct"] = max(_detect(half, _victims(nodes, quick)))
    _say(figures)

    lossy = _form(nodes, 2)
    lossy.options = NetworkOptions(*DELAYS, loss_probability=0.2)
    lasting, momentary, silence = _run(lossy, 10_000 if quick else 600_000)
    figures |= {"false_suspicions": lasting, "false_suspicions_momentary": momentary, "silence_max_loss_20pct": silence}
    _say(figures)
    return figures | {"nodes": nodes}


def _say(figures: dict[str, Figure]) -> None:
    print(f"{time.strftime('%H:%M:%S')} {figures}", file=sys.stderr)


def _form(nodes: int, seed: int) -> VirtualCluster:
    cluster = VirtualCluster(seed, NetworkOptions(*DELAYS))
    for number in range(nodes):
        cluster.add(f"n{number}", f"r{number % REGIONS}", "serve" if number else "train", ["n0"] if number else [])
    formed = cluster.run_until(lambda: all(len(_alive(cluster, machine)) == nodes - 1 for machine in _machines(cluster)))
    assert formed, "the cluster never formed"
    return cluster


def _machines(cluster: VirtualCluster) -> Iterator[Machine]:
    return (node.machine for node in cluster.nodes.values() if node.machine is not None)


def _alive(cluster: VirtualCluster, machine: Machine) -> tuple[str, ...]:
    return machine.peers_alive(cluster.now())


def _victims(nodes: int, quick: bool) -> Sequence[str]:
    return [f"n{number}" for number in ((5,) if quick else (7, nodes // 2, nodes - 1))]


def _run(cluster: VirtualCluster, duration_ms: int) -> tuple[int, int, float]:
    """Let time pass.

    Returns:
        How many suspicions of living nodes lasted from one look to the next, how many were seen once, and the longest
        silence of a living node that another one met with, as a fraction of that at which it would have been suspected.
    """
    before: set[tuple[str, str]] = set()
    lasting: set[tuple[str, str]] = set()
    momentary, silence = 0, 0.0
    names = set(cluster.nodes)
    for look in range(duration_ms // SAMPLE_MS):
        cluster.run(SAMPLE_MS)
        silence = max(silence, *(machine.silence_max(cluster.now()) for machine in _machines(cluster)))
        if (look + 1) * SAMPLE_MS % LOOK_MS:
            continue
        seen = set()
        for node in cluster.nodes.values():
            if node.machine is not None:
                seen |= {(node.name, other) for other in names - {node.name} - set(_alive(cluster, node.machine))}
        momentary += len(seen - before)
        lasting |= seen & before
        before = seen
    return len(lasting), momentary, silence


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
