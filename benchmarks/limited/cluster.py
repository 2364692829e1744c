"""A `LocalCluster` whose nodes are in the namespaces of their regions."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.limited.regions import Regions
from ekko.security import generate
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec


class RegionNode(NodeProcess):
    """A node in its region's namespace: reached by nodes at the region's address, by publishers over a Unix socket."""

    def __init__(self, spec: NodeSpec, folder: Path, ports: Sequence[int], regions: Regions | None = None) -> None:
        super().__init__(spec, folder, ports)
        assert regions is not None
        self._regions = regions
        self.launcher = regions.launcher(spec.region)
        self.peers = f"tcp://{regions.address(spec.region)}:{ports[0]}"
        self.local = f"ipc://{folder}/local"

    def write_config(self, seeds: Iterable[str], models: Mapping[str, ModelTables], delays_ms: Mapping[str, float]) -> None:
        """See `NodeProcess`; with keys, which links beyond loopback need."""
        super().write_config(seeds, models, delays_ms)
        allow, own = self.folder.parent / "allow", self.folder / f"{self.id}.key"
        allow.mkdir(exist_ok=True)
        if not own.exists():
            generate(own).rename(allow / f"{self.id}.pub")
        with self.config_path.open("a") as file:
            file.write(f"[security]\nkey_file = {json.dumps(str(own))}\nallow = {json.dumps(str(allow))}\n")

    def _get(self, path: str) -> tuple[int, bytes]:
        get = super()._get
        return self._regions.do_inside(self.spec.region, lambda: get(path))

    def post(self, path: str, body: Mapping[str, object]) -> tuple[int, bytes]:
        """See `NodeProcess`."""
        post = super().post
        return self._regions.do_inside(self.spec.region, lambda: post(path, body))


def cluster_in(regions: Regions, folder: Path, nodes: Sequence[NodeSpec], models: Mapping[str, ModelTables]) -> LocalCluster:
    """A cluster whose nodes are in these regions; use it as a context manager."""
    return LocalCluster(folder, nodes, models=models, make_node=lambda *made: RegionNode(*made, regions))
