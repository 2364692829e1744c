"""What servers keep of a model, and what workers must know of it: from `[server.models.NAME]` to tables and settings.

Beside the served model NAME there is NAME.training, divided into partitions, which only servers' nodes hold:

    TABLE          float32[dim]: the weights, exactly; the served model has them in its codec
    TABLE.state    float32[state_dim]: what the optimiser keeps of each row; not there where it keeps nothing
    TABLE.steps    how many steps the table had in each partition, where the optimiser asks for that
    _marks         the last push of each worker that counts, in each partition

Marks and steps are rows of the partition that they speak of, and written in the same step as what they count: both are there
or neither. A row holds finite float32 only, so a number of 64 bits is four values of 16 bits each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from ekko.config.sections import ServerModelSection, ServerTableSection
from ekko.model import MARKS_TABLE, STATE_SUFFIX, STEPS_SUFFIX, ModelSpec, TableSpec, training_name, ttl_seconds
from ekko.store.kernels.index import shards_of
from ekko.train.optimizers import Initializer, Optimizer, initializer_of, optimizer_of
from ekko.train.server.wire import WORKERS_MAX, ModelSettings

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

WORDS: Final = 4  # float32 that hold a number of 64 bits
MARK_DIM: Final = 2 * WORDS  # life, number
# Changes when servers of different releases may not act for one model together.
FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class TrainedTable:
    """One table, and how it is trained. `admission`: from which push of a key its row is kept."""

    name: str
    dim: int
    optimizer: Optimizer
    initializer: Initializer
    admission: int
    ttl_s: int

    @property
    def state_dim(self) -> int:
        return self.optimizer.state_dim(self.dim)

    @property
    def rate(self) -> float:
        """The learning rate of its settings."""
        return float(self.optimizer.settings["lr"])

    @property
    def row_bytes(self) -> int:
        """What a row takes in a step, key, stamp and state included, at most."""
        return 4 * (self.dim + self.state_dim) + 2 * 24


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """One model, as all its servers have it configured."""

    name: str
    settings: ModelSettings
    tables: Mapping[str, TrainedTable]
    worker_timeout_ms: int

    @property
    def training(self) -> str:
        """The model in which servers keep it."""
        return training_name(self.name)

    def partition_of(self, keys: U64) -> I64:
        """int64[n]: the partition of each key."""
        return partitions_of(keys, self.settings.shards, self.settings.partitions)


def partitions_of(keys: U64, shards: int, partitions: int) -> I64:
    """int64[n]: the partition of each key of uint64[n]."""
    out = np.empty(len(keys), np.int64)
    shards_of(keys, shards, out)
    out %= partitions
    return out


def trained_model(name: str, section: ServerModelSection, shards: int) -> TrainedModel:
    """What `[server.models.NAME]` says, once it is checked; `shards` of the served model."""
    tables = {table: _trained_table(table, one) for table, one in section.tables.items()}
    said = [
        FORMAT,
        name,
        section.partitions,
        shards,
        section.mode,
        section.workers,
        section.staleness,
        section.worker_timeout,
        [
            (
                one.name,
                one.dim,
                sorted(one.optimizer.settings.items()),
                sorted(one.initializer.settings.items()),
                one.admission,
                one.ttl_s,
            )
            for _, one in sorted(tables.items())
        ],
    ]
    settings = ModelSettings(
        section.partitions,
        shards,
        section.mode,
        section.workers,
        section.staleness,
        {one.name: one.dim for one in tables.values()},
        int(xxhash.xxh3_64_intdigest(msgpack.packb(said))),
    )
    return TrainedModel(name, settings, tables, round(1_000 * section.worker_timeout))


def digest_of(settings: ModelSettings, servers: Iterable[str]) -> int:
    """What servers compare before one gives partitions to another: settings, and which servers there are.

    Two that know of other servers have other lines (`primaries.line_of`), and might both be the first in theirs.
    """
    return int(xxhash.xxh3_64_intdigest(msgpack.packb([settings.digest, sorted(servers)])))


def _trained_table(name: str, section: ServerTableSection) -> TrainedTable:
    optimizer, initializer = optimizer_of(section.optimizer), initializer_of(section.initializer)
    return TrainedTable(name, section.dim, optimizer, initializer, section.admission, ttl_seconds(name, section.ttl))


def training_spec(name: str, section: ServerModelSection, shards: int) -> ModelSpec:
    """The model in which servers keep what they train of model `name`."""
    tables = [TableSpec(MARKS_TABLE, MARK_DIM)]
    for table in trained_model(name, section, shards).tables.values():
        tables.append(TableSpec(table.name, table.dim, ttl_s=table.ttl_s))
        if table.state_dim:
            tables.append(TableSpec(table.name + STATE_SUFFIX, table.state_dim, ttl_s=table.ttl_s))
        if table.optimizer.needs_step:
            tables.append(TableSpec(table.name + STEPS_SUFFIX, WORDS))
    return ModelSpec(training_name(name), shards, {table.name: table for table in tables}, partitions=section.partitions)


# --- rows that are numbers ------------------------------------------------------------------------------------------------


def words_of(numbers: U64) -> F32:
    """float32[*shape, 4] of uint64[*shape]."""
    return np.ascontiguousarray(numbers, np.dtype("<u8")).view("<u2").reshape(*numbers.shape, WORDS).astype(np.float32)


def numbers_of(words: F32) -> U64:
    """uint64[*shape] of float32[*shape, 4]."""
    numbers: U64 = np.ascontiguousarray(words.astype("<u2")).view("<u8").reshape(words.shape[:-1])
    return numbers


def own_keys(shards: int, partitions: int) -> U64:
    """uint64[partitions, WORKERS_MAX]: of each partition the smallest keys that belong to it; the n-th is of worker n."""
    found = np.empty((partitions, WORKERS_MAX), np.uint64)
    count = 2 * WORKERS_MAX * partitions
    while True:
        keys = np.arange(count, dtype=np.uint64)
        belongs = partitions_of(keys, shards, partitions)
        of_each = [keys[belongs == partition][:WORKERS_MAX] for partition in range(partitions)]
        if all(len(own) == WORKERS_MAX for own in of_each):
            found[...] = of_each
            return found
        count *= 2
