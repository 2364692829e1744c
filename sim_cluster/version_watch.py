"""Invariant 12, on whole clusters and over their whole lives: a shard version covers another only if its vector dominates.

Every (version, vector) that any node ever had is remembered, also of nodes that died: the versions of one id must name vectors
that grow with the count, and one version one vector. So what is checked holds for any two nodes at any two moments, which is
what a node relies on when it compares its version with one that it was told a while ago.
"""

from bisect import bisect_left

from p2p.paper.shard_versions import split_version
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster

Vector = dict[int, int]  # writer -> stamp, zeros left out


class VersionWatch:
    """Follows a cluster; to be asked often, since a version that came and went between two questions was not seen.

    Args:
        cluster: to be watched.
    """

    def __init__(self, cluster: VirtualCluster) -> None:
        self._cluster = cluster
        # (keyspace, shard, id) -> versions, ascending, and the vectors they stand for.
        self._named: dict[tuple[int, int, int], tuple[list[int], list[Vector]]] = {}

    @property
    def versions(self) -> int:
        """How many were seen."""
        return sum(len(versions) for versions, _ in self._named.values())

    def check(self) -> str:
        """The first violation in words, or an empty string."""
        for node in self._cluster.nodes.values():
            if problem := self._check_node(node):
                return problem
        return ""

    def _check_node(self, node: VirtualNode) -> str:
        for keyspace, versions in node.machine.shard_versions.items() if node.machine is not None else ():
            numbers, writers, vectors = versions.given
            for shard, number in enumerate(numbers.tolist()):
                stamps = zip(writers.tolist(), vectors[shard].tolist(), strict=True)
                vector = {writer: stamp for writer, stamp in stamps if stamp}
                if number and (problem := self._enter((keyspace, shard), number, vector)):
                    return f"{node.name}: shard {shard}: {problem}"
        return ""

    def _enter(self, place: tuple[int, int], version: int, vector: Vector) -> str:
        count, minter = split_version(version)
        versions, vectors = self._named.setdefault((*place, minter), ([], []))
        at = bisect_left(versions, version)
        if at < len(versions) and versions[at] == version:
            return "" if vectors[at] == vector else f"version {count} of {minter:x} names {vector} and {vectors[at]}"
        if at > 0 and not _dominates(vector, vectors[at - 1]):
            return f"version {count} of {minter:x} covers an earlier one, {vector} does not dominate {vectors[at - 1]}"
        if at < len(versions) and not _dominates(vectors[at], vector):
            return f"version {count} of {minter:x} is covered by a later one, {vectors[at]} does not dominate {vector}"
        versions.insert(at, version)
        vectors.insert(at, vector)
        return ""


def _dominates(one: Vector, other: Vector) -> bool:
    return all(one.get(writer, 0) >= stamp for writer, stamp in other.items())
