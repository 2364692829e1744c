"""Which server is asked for which keys: a worker's picture of who serves what, and how keys and gradients are divided by it.

A key belongs to partition `mix64(key) mod shards mod partitions`, and a partition to one server, its primary. What a server
says of primaries may be out of date; who is asked and is not the primary says so, and nothing has happened then.
"""

from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.distinct import grouped
from ekko.train.server.wire import F32, U64, Serving

I64 = NDArray[np.int64]
# Of one table: which of its keys; None: all of them.
Places = I64 | None


def by_partition(keys: U64, shards: int, partitions: int) -> I64:
    """int64[n]: the positions of the first partition's keys, then of the second's, each in their order."""
    return grouped(keys, shards, np.arange(partitions), partitions)[0]


class Routing:
    """Partition -> endpoint of its primary, as servers said last.

    Args:
        serving: what a server said.
        shards: of the model; 1 while it is not known yet, and then no keys may be divided.
    """

    def __init__(self, serving: Serving, shards: int = 1) -> None:
        self.endpoints: Final = tuple(endpoint for _, endpoint in serving.servers)
        self.primaries: Final = serving.primaries
        self._nodes = {endpoint: node for node, endpoint in serving.servers}
        self.partitions: Final = len(serving.primaries)
        self._shards = shards
        self._owners = np.array(serving.primaries, np.int64)

    def node_at(self, endpoint: str) -> str | None:
        return self._nodes.get(endpoint)

    def endpoint_of(self, partition: int) -> str:
        return self.endpoints[self.primaries[partition]]

    @property
    def acting(self) -> tuple[str, ...]:
        """Endpoints of those that are primary of something, each once."""
        return tuple(dict.fromkeys(map(self.endpoint_of, range(self.partitions))))

    def partitions_of(self, keys: U64) -> tuple[int, ...]:
        """Those that any of the keys belongs to, ascending."""
        return self._divided(keys, np.zeros(self.partitions, np.int64), 1)[2]

    def by_endpoint(self, keys: U64) -> tuple[dict[str, Places], tuple[int, ...]]:
        """Where each server's keys are among uint64[n], servers without keys left out; and the partitions touched."""
        order, ends, touched = self._divided(keys, self._owners, len(self.endpoints))
        parts: dict[str, Places] = {}
        for owner, endpoint in enumerate(self.endpoints):
            begin, end = ends[owner], ends[owner + 1]
            if end - begin == len(keys) > 0:
                return {endpoint: None}, touched
            if end > begin:
                parts[endpoint] = order[begin:end]
        return parts, touched

    def of_partitions(self, columns: Mapping[str, tuple[U64, F32]], wanted: Collection[int]) -> dict[str, tuple[U64, F32]]:
        """The rows of a step whose keys belong to some partitions, in their order; tables without any are left out."""
        if len(wanted) == self.partitions:
            return {table: column for table, column in columns.items() if len(column[0])}
        owners = np.ones(self.partitions, np.int64)
        owners[list(wanted)] = 0
        taken: dict[str, tuple[U64, F32]] = {}
        for table, (keys, values) in columns.items():
            order, ends, _ = self._divided(keys, owners, 2)
            places = order[: ends[1]]
            if len(places) == len(keys) > 0:
                taken[table] = keys, values
            elif len(places):
                taken[table] = keys[places], values[places]
        return taken

    def _divided(self, keys: U64, owners: I64, count: int) -> tuple[I64, I64, tuple[int, ...]]:
        order, ends, touched = grouped(keys, self._shards, owners, count)
        return order, ends, tuple(np.flatnonzero(touched).tolist())
