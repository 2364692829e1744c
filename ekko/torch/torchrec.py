"""TorchRec: publish the rows that its `ModelDeltaTracker` says were trained.

    deltas = ekko.torch.torchrec.track(model, publisher, tables={"t_item": "item"})   # a DistributedModelParallel
    loss = model(batch).sum(); loss.backward(); optimizer.step()
    deltas.publish()

Optimizers of TorchRec's sharded tables are fused into the backward pass: their `step()` only sets the learning rate, so that
hooks at a step, as `ekko.torch.track` has them, see neither gradients nor rows. TorchRec's own tracker notes the ids of each
look-up instead, and a fused optimizer changes no other rows. So `publish` belongs after the backward pass: ids of a look-up
whose backward is still to come would go with their rows of before.

Each rank publishes the rows that it holds, at a node of its own or at one for all: shards are disjoint. Tables are sharded by
table or by rows. Sharded by columns a rank has no whole rows; of data-parallel tables a rank's tracker sees its own samples'
ids only: both are refused.

NumPy, or whatever else holds rows in arrays, needs no adapter: `Publisher.publish(table, keys, rows)` takes them as they are.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ekko.errors import ConfigError, ModelError
from ekko.torch.outbox import StepPublisher

I64 = NDArray[np.int64]

CONSUMER: Final = "ekko"
# One step of a publisher has this many bytes of rows at most: more, as after a node was away for long, goes as several.
STEP_BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The rows of one table that this rank holds."""

    table: str  # it is published to
    rows: Tensor  # [n, dim]: the memory that training changes
    first: int  # the key of row 0


def track(
    model: Any, publisher: StepPublisher, tables: Mapping[str, str], consumer: str = CONSUMER, delta_tracker: Any = None
) -> "Deltas":
    """Publish what training changes of sharded tables, whenever `Deltas.publish` is called.

    Args:
        model: a `torchrec.distributed.DistributedModelParallel`.
        publisher: an `ekko.Publisher` of a model that has the tables.
        tables: name of a table in its `EmbeddingBagConfig` or `EmbeddingConfig` -> table it is published to; the row index in
            the whole table is the key.
        consumer: of the delta tracker, for this alone.
        delta_tracker: one that is there, and has that consumer; None: the model's own, which is made if there is none.

    Raises:
        ConfigError: TorchRec is not installed.
        ModelError: no such table, another width, or one that is sharded by columns or data-parallel; the model's delta tracker
            has no such consumer.
    """
    return Deltas(model, publisher, tables, consumer, delta_tracker)


class Deltas:
    """Made by `track`; used by the thread that trains."""

    def __init__(
        self, model: Any, publisher: StepPublisher, tables: Mapping[str, str], consumer: str, delta_tracker: Any
    ) -> None:
        types = _torchrec("torchrec.distributed.model_tracker.types")
        if not hasattr(model, "init_torchrec_delta_tracker"):
            raise ModelError(f"the model is a {type(model).__name__}: expected a torchrec DistributedModelParallel")
        tracker = delta_tracker or model.get_delta_tracker()
        if tracker is None:
            # With compaction ids that nobody has asked for yet take up memory once each, not once for each batch.
            tracker = model.init_torchrec_delta_tracker(types.DeltaTrackerConfig(consumers=[consumer], auto_compact=True))
        if consumer not in tracker.per_consumer_batch_idx:
            raise ModelError(
                f"the model's delta tracker has no consumer {consumer!r}: it has {sorted(tracker.per_consumer_batch_idx)}; add "
                "it to DeltaTrackerConfig(consumers=[...])"
            )
        self._tracker = tracker
        self._consumer = consumer
        self._publisher = publisher
        self._shards = _shards_of(model, tracker, publisher, tables)
        self._due: dict[str, I64] = {}  # by name in TorchRec: rows of the shard, unique
        self._stamp = 0

    @property
    def stamp(self) -> int:
        """The stamp of the last step published; 0: none yet."""
        return self._stamp

    @property
    def rows_due(self) -> int:
        """Rows that were changed, and that no `publish` has brought to the node yet."""
        self._collect()
        return sum(len(ids) for ids in self._due.values())

    def publish(self) -> int:
        """Publish all rows that were looked up since, as they are now; call it after the backward pass.

        Returns:
            The stamp of the last step. What could not be published (this raises as `Publisher.publish` does) goes next time.
        """
        self._collect()
        return self._publish()

    def publish_all(self) -> int:
        """Publish every row that this rank holds, as a first state or after loading a checkpoint; returns the last stamp."""
        self._collect()
        self._due = {fqn: np.arange(len(shard.rows), dtype=np.int64) for fqn, shard in self._shards.items()}
        return self._publish()

    def _collect(self) -> None:
        """Take what the tracker has noted.

        What its `get_unique` does, which raises where some table was not looked up since it was last asked.
        """
        tracker = self._tracker
        begin, end = tracker.per_consumer_batch_idx[self._consumer], tracker.curr_batch_idx + 1
        for fqn, lookups in tracker.store.get_indexed_lookups(begin, end).items():
            if lookups and fqn in self._shards:
                seen = torch.unique(torch.cat([lookup.ids for lookup in lookups])).to("cpu", torch.int64).numpy()
                held = self._due.get(fqn)
                self._due[fqn] = seen if held is None else np.union1d(held, seen)
        tracker.per_consumer_batch_idx[self._consumer] = end
        if tracker._delete_on_read:  # noqa: SLF001 - as `get_unique` goes on
            tracker.store.delete(up_to_idx=min(tracker.per_consumer_batch_idx.values()))

    def _publish(self) -> int:
        for module in self._tracker.get_tracked_modules().values():
            for lookup in module._lookups:  # noqa: SLF001 - no other way to have rows that are in a device's cache written back
                if hasattr(lookup, "flush"):
                    lookup.flush()
        while any(len(ids) for ids in self._due.values()):
            left = dict(self._due)
            room = STEP_BYTES_MAX
            with self._publisher.step() as step:
                for fqn, ids in self._due.items():
                    shard = self._shards[fqn]
                    count = min(len(ids), room // (4 * shard.rows.shape[1]))
                    chosen = torch.from_numpy(ids[:count]).to(shard.rows.device)
                    rows = shard.rows.index_select(0, chosen).float().cpu().numpy()
                    step.publish(shard.table, (ids[:count] + shard.first).view(np.uint64), rows)
                    left[fqn] = ids[count:]
                    room -= rows.nbytes
            self._due, self._stamp = left, step.stamp
        return self._stamp


def _torchrec(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"TorchRec cannot be imported ({error}): pip install 'ekko-dissemination[torchrec]', with FBGEMM's CUDA build; "
            "on a machine without a device: pip install fbgemm-gpu-cpu, then torchrec with --no-deps"
        ) from None


def _shards_of(model: Any, tracker: Any, publisher: StepPublisher, tables: Mapping[str, str]) -> dict[str, Shard]:
    """Name in TorchRec -> what this rank holds of the table; of those that it holds nothing of, nothing."""
    if not tables:
        raise ModelError("tables is empty: name at least one table of the model and the table it is published to")
    if len(set(tables.values())) < len(tables):
        raise ModelError("two tables are published to one: give each a table of its own")
    state = model.state_dict()
    shards: dict[str, Shard] = {}
    for name, table in tables.items():
        fqn = tracker.table_to_fqn.get(name)
        if fqn is None:
            raise ModelError(f"the delta tracker has no table {name!r}: it has {sorted(tracker.table_to_fqn)}")
        if table not in publisher.tables:
            raise ModelError(f"unknown table {table!r}: the publisher has {sorted(publisher.tables)}; add it to its tables")
        shard = _local_shard(name, table, state[f"{fqn}.weight"])
        if shard is None:
            continue
        if shard.rows.shape[1] != publisher.tables[table]:
            dims = shard.rows.shape[1], publisher.tables[table]
            raise ModelError(f"table {name!r} has rows of {dims[0]} and table {table!r} has dim {dims[1]}")
        shards[fqn] = shard
    return shards


def _local_shard(name: str, table: str, weight: Any) -> Shard | None:
    if not hasattr(weight, "local_shards"):
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ModelError(
                f"table {name!r} is data-parallel: the other ranks' samples change it, too, and the delta tracker does not see "
                "them; shard it by table or by rows"
            )
        return Shard(table, weight.detach(), 0)
    local = weight.local_shards()
    if not local:
        return None
    (begin, column), (_, width) = local[0].metadata.shard_offsets, local[0].metadata.shard_sizes
    if len(local) > 1 or column or width != weight.size(1):
        raise ModelError(f"table {name!r} is sharded by columns, so that no rank has whole rows: shard it by table or by rows")
    return Shard(table, local[0].tensor.detach(), int(begin))
