"""The paper's test-bed (Ekko, OSDI '22, section 6.1), made small: 10 regions of 3 nodes, one of which trains.

There: a model of 113 GB in shards of 0.4 MB, rows of about 160 bytes, 4,800 Mbit/s between two data centres, network cards of
5 Gbit/s. Here a model of 100,000 such rows stands for it, so one row stands for 7,062 rows (`rows_per_row`): links and cards
are slower by that factor, and whatever a CPU does for a row or a shard takes longer by it. Sending the whole model over one
link takes three minutes, there as here. Credit, chunks and queues, which are counted in bytes, shrink along. Time does not.

The paper does not say how far apart its data centres were: here they lie on a line, 10 ms one way from one to the next, the
training one at an end. It does not say how many updates its trace had either, only that every system was bound by the network:
here the updates are as many as would keep the trainer's card busy for 95 % of the time, if it had to send each of them
to every replica. The training node stands for the three servers of the paper that train, on one card.

Work for rows and shards is spread over 24 cores, as many as the paper's servers have. The daemon has one thread so far; a scan
of 700 million rows would keep it busy for eight seconds, and its neighbours would think it dead.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np

from ekko.model import ModelSpec, TableSpec
from ekko.store import Store, recent
from p2p.link import links
from p2p.pulling import outbox
from p2p.replica import RowColumns, WriterIdentity
from sim_cluster import network
from sim_cluster.network import LinkOptions, NetworkOptions, pair_of

MODEL_BYTES = 113e9
ROW_BYTES = 160  # key, stamp, 36 floats
SHARD_BYTES = 0.4e6
PIPE_BYTES_PER_MS = 600e3
CARD_BYTES_PER_MS = 625e3
CORES = 24
REGIONS = 10
NODES_PER_REGION = 3
REPLICAS = REGIONS * NODES_PER_REGION - 1
REGION_DISTANCE_MS = 10
LOCAL_DELAY_MS = 1
# How busy the trainer's card would be, if it sent every update to every replica.
LOAD = 0.95
BATCH_ROW_BYTES = ROW_BYTES - 8  # a batch has one stamp for all rows

TRAINER = "r0n0"
TABLE = TableSpec("rows", 36)
# The first version of every row, as if the trainer had written it long ago.
WRITER = WriterIdentity(1, 0xE880, 1 << 22 | 1)
FILL = 10_000


@dataclass(frozen=True, slots=True)
class Bed:
    """How large the small one is."""

    rows: int

    @property
    def rows_per_row(self) -> float:
        """How many rows of the paper's model one row stands for."""
        return MODEL_BYTES / ROW_BYTES / self.rows

    @property
    def model(self) -> ModelSpec:
        """One table, in shards of as many rows as the paper's."""
        return ModelSpec("ablation", max(4, int(self.rows * ROW_BYTES / SHARD_BYTES)), {TABLE.name: TABLE})

    @property
    def updates_per_s(self) -> float:
        """Of the skewed trace."""
        return LOAD * CARD_BYTES_PER_MS * 1e3 / self.rows_per_row / (REPLICAS * BATCH_ROW_BYTES)

    def wan(self, slow_region: int | None = None) -> NetworkOptions:
        """The network; `slow_region`: to this one, the link from the trainer's region has half the rate."""
        card, pipe = CARD_BYTES_PER_MS / self.rows_per_row, PIPE_BYTES_PER_MS / self.rows_per_row
        pairs = {
            pair_of(f"r{one}", f"r{other}"): LinkOptions(
                delay_ms=REGION_DISTANCE_MS * (other - one),
                shared_bytes_per_ms=pipe / 2 if one == 0 and other == slow_region else pipe,
            )
            for one in range(REGIONS)
            for other in range(one + 1, REGIONS)
        }
        return NetworkOptions(LOCAL_DELAY_MS, LOCAL_DELAY_MS, card_bytes_per_ms=card, links=pairs)

    @contextmanager
    def limits(self) -> Iterator[None]:
        """What the protocol counts in bytes, at the scale of the model."""
        credit = int(links.CREDIT_BYTES_MAX / self.rows_per_row)
        scaled = (
            (links, "CREDIT_BYTES_MAX", credit),
            (links, "ACK_BYTES", credit // 8),
            (outbox, "CHUNK_BYTES_MAX", credit // 4),
            (network, "QUEUE_BYTES_MAX", credit),
            # The update cache begins as large as it gets by itself, 0.15 % of the rows (the paper: 0.13 to 0.2 %). It may
            # grow beyond, since in the paper's own ablation no look-up missed.
            (recent, "WINDOW_MIN", int(recent.WINDOW_MIN / self.rows_per_row) + 1),
            (recent, "WINDOW_START", int(recent.WINDOW_MAX / self.rows_per_row)),
        )
        with ExitStack() as stack:
            for module, name, value in scaled:
                stack.enter_context(mock.patch.object(module, name, value))
            yield


def nodes() -> list[tuple[str, str]]:
    """(name, region) of every node, the trainer first."""
    return [(f"r{region}n{number}", f"r{region}") for region in range(REGIONS) for number in range(NODES_PER_REGION)]


def unloaded_wan() -> NetworkOptions:
    """The same distances, and links that nothing fills."""
    pairs = {
        pair_of(f"r{one}", f"r{other}"): LinkOptions(REGION_DISTANCE_MS * (other - one))
        for one in range(REGIONS)
        for other in range(one + 1, REGIONS)
    }
    return NetworkOptions(LOCAL_DELAY_MS, LOCAL_DELAY_MS, links=pairs)


# The trainer, the leader of the region that is farthest away, a node below it.
SLOWEST_PATH_MS = REGION_DISTANCE_MS * (REGIONS - 1) + 2 * LOCAL_DELAY_MS


def filled_store(bed: Bed, trainer: bool) -> Store:
    """A node's memory: every row, and the knowledge that it is every row."""
    store = Store.anonymous()
    model = store.add_model(bed.model, bed.rows)
    stamp = WRITER.last_stamp
    for begin in range(0, bed.rows, FILL):
        keys = np.arange(begin, min(begin + FILL, bed.rows), dtype=np.uint64)
        model.apply([RowColumns(TABLE.id, keys, np.zeros((len(keys), TABLE.row_bytes), np.uint8))], stamp)
    model.vector[:, WRITER.writer] = stamp
    model.frontier[WRITER.writer] = stamp
    if trainer:
        model.set_writer(WRITER)
    return store
