"""Several ranks train one model: which part of what changed each of them publishes.

With `DistributedDataParallel` all ranks have the same gradients once a backward pass is over, and the same weights after each
step. So each of them knows all that changed, and may publish any part of it: a row is published by the rank that its key says,
`mix64(key) mod ranks`, and dense parameters by rank 0. The parts are disjoint and together whole whatever the ranks do, without
a word between them; each may publish at a node of its own. A model with as many partitions as there are ranks has one rank's
rows in each (`partition = shard mod partitions`, and `shard = mix64(key) mod shards`).

Weights whose gradients are not reduced (tables that are not of the wrapped module, or that it is told to ignore) are each
rank's own, and published whole by whoever has them.

A rank that ends takes the others along: `torchrun` starts all of them again, and they go on from a checkpoint
(`ekko.torch.checkpoint`), as many as there are then. When the model is rolled back they have to do the same: each would load
what was restored when it hears of it, at a step of its own, and their weights would differ for good.

Not for `Join`: who has no samples left makes no steps, and would publish nothing of what the others' steps change.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ekko.errors import ModelError
from ekko.restored import Restored
from ekko.store.kernels.index import shards_of

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]


class InnerStep(Protocol):
    """What is asked of a step; `ekko.train.step.Step` offers it."""

    @property
    def stamp(self) -> int: ...

    def publish(self, table: str, keys: U64, rows: F32, significance: F32 | None = None) -> None: ...

    def publish_dense(self, name: str, array: F32) -> None: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of the keys."""

    rank: int
    ranks: int
    group: dist.ProcessGroup | None = field(default=None, compare=False)  # of these ranks; None: there is one

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.ranks, (self.rank, self.ranks)

    def mine(self, keys: U64) -> NDArray[np.bool_]:
        """bool[n]: which of these keys' rows this rank publishes; of uint64[n]."""
        if self.ranks == 1:
            return np.ones(len(keys), np.bool_)
        owners = np.empty(len(keys), np.int64)
        shards_of(np.ascontiguousarray(keys), np.int64(self.ranks), owners)
        mine: NDArray[np.bool_] = owners == self.rank
        return mine


WHOLE = Part(0, 1)


def part_of(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> Part:
    """The part of the process that runs this.

    Args:
        model: a `DistributedDataParallel` module, or one that contains one, as `torch.compile` makes it; of any other module
            everything is published here.
        process_group: ranks that have the same weights after each step, where something else than DDP sees to that.

    Raises:
        ModelError: this process is not one of the ranks.
    """
    if process_group is None:
        wrapped = _wrapped(model)
        if wrapped is None:
            return WHOLE
        process_group = wrapped.process_group
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ModelError(
            "this process is no member of process_group: pass a group that it belongs to (torch.distributed.new_group), and "
            "call track only on the ranks of that group"
        )
    return Part(rank, dist.get_world_size(process_group), process_group)


def reduced_tables(
    model: nn.Module, weights: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None
) -> frozenset[str]:
    """Tables whose weights are the same on all ranks.

    Args:
        model: as in `part_of`.
        weights: table -> its weight.
        process_group: as in `part_of`; then all are.
    """
    wrapped = _wrapped(model)
    if process_group is not None or wrapped is None:
        return frozenset(weights)
    ignored = set(getattr(wrapped, "parameters_to_ignore", ()))
    reduced = {id(value) for name, value in wrapped.module.named_parameters() if name not in ignored}
    return frozenset(table for table, weight in weights.items() if id(weight) in reduced)


def _wrapped(model: nn.Module) -> DistributedDataParallel | None:
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


class PartPublisher:
    """A publisher that publishes one rank's part of what it is given; whatever else is asked of it, the publisher answers.

    Args:
        publisher: an `ekko.Publisher`.
        part: the rank's.
        divided: tables of which the other ranks publish their parts.
    """

    def __init__(self, publisher: Any, part: Part, divided: frozenset[str]) -> None:
        self._publisher = publisher
        self.part = part
        self._divided = divided
        self._shared: tuple[Restored, ...] = ()
        self._apart = False  # something was restored that the other ranks may not have heard of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)

    @property
    def tables(self) -> Mapping[str, int]:
        tables: Mapping[str, int] = self._publisher.tables
        return tables

    @contextmanager
    def step(self) -> Iterator["PartStep"]:
        """A step of which only this rank's part is published; of nothing it is none.

        Raises:
            ModelError: as `restored`.
        """
        self._check_together()
        with self._publisher.step() as step:
            yield PartStep(step, self.part, self._divided)

    def restored(self) -> tuple[Restored, ...]:
        """What `share_restored` gave to all ranks, once.

        Raises:
            ModelError: the model was rolled back since. Weights of one rank alone must not become what was restored.
        """
        shared, self._shared = self._shared, ()
        if not shared:
            self._apart = self._apart or bool(_restored_of(self._publisher))
            self._check_together()
        return shared

    def share_restored(self) -> tuple[Restored, ...]:
        """What rollbacks restored, as rank 0 hears of it, for `restored` on all ranks. All of them call this at one place."""
        own = _restored_of(self._publisher)
        self._shared = unpacked(broadcast_bytes(self.part, packed(own)))
        return self._shared

    def _check_together(self) -> None:
        if self._apart:
            raise ModelError(
                f"the model was rolled back, and {self.part.ranks} ranks train it: let all of them end and start again from a "
                "checkpoint (torchrun --max-restarts), with ekko.torch.checkpoint_hook, which loads what was restored"
            )


class PartStep:
    """A step of a `PartPublisher`."""

    def __init__(self, step: InnerStep, part: Part, divided: frozenset[str]) -> None:
        self._step = step
        self._part = part
        self._divided = divided

    @property
    def stamp(self) -> int:
        return self._step.stamp

    def publish(self, table: str, keys: U64, rows: F32, significance: F32 | None = None) -> None:
        """Add this rank's part of the rows."""
        if table in self._divided:
            mine = self._part.mine(keys)
            keys, rows = keys[mine], rows[mine]
            significance = None if significance is None else significance[mine]
        if len(keys):
            self._step.publish(table, keys, rows, significance)

    def publish_dense(self, name: str, array: F32) -> None:
        """Add a dense tensor, if this is rank 0."""
        if self._part.rank == 0:
            self._step.publish_dense(name, array)

    def publish_dense_changes(self, name: str, array: F32, before: F32) -> int:
        """Add what changed of a dense tensor, if this is rank 0; how many of its rows that are."""
        changes = getattr(self._step, "publish_dense_changes", None)
        if self._part.rank or changes is None:
            self.publish_dense(name, array)
            return 0
        sent: int = changes(name, array, before)
        return sent


def divided(
    publisher: Any,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    process_group: dist.ProcessGroup | None = None,
    mapped: Collection[str] = (),
) -> Any:
    """The publisher for this rank's part; as it is where there is one rank. Arguments as above.

    Raises:
        ModelError: there are several ranks, and tables in `mapped`, which have a key map: each rank would number keys in the
            order in which it meets them.
    """
    part = part_of(model, process_group)
    if part.ranks > 1 and mapped:
        raise ModelError(
            f"table {min(mapped)!r} has a key map, and {part.ranks} ranks train it: each would give another row to a key; use "
            "keys that are row numbers, or parameter servers (ekko.torch.PSEmbeddingBag)"
        )
    return publisher if part.ranks == 1 else PartPublisher(publisher, part, reduced_tables(model, weights, process_group))


def _restored_of(publisher: Any) -> tuple[Restored, ...]:
    restored: tuple[Restored, ...] = getattr(publisher, "restored", tuple)()  # a publisher of yours may know no rollbacks
    return restored


def packed(restored: tuple[Restored, ...]) -> bytes:
    """What was restored, for other ranks."""
    told = [
        (one.table, one.keys.tobytes(), one.rows.shape, one.rows.tobytes(), one.deleted.tobytes(), one.tensors)
        for one in restored
    ]
    return bytes(msgpack.packb(told))


def unpacked(told: bytes) -> tuple[Restored, ...]:
    """The inverse of `packed`."""
    return tuple(
        Restored(
            table,
            np.frombuffer(keys, np.uint64),
            np.frombuffer(rows, np.float32).reshape(shape),
            np.frombuffer(deleted, np.bool_),
            tuple(tensors),
        )
        for table, keys, shape, rows, deleted, tensors in msgpack.unpackb(told)
    )


def broadcast_bytes(part: Part, own: bytes) -> bytes:
    """Rank 0's bytes, on all ranks; all of them call this at one place."""
    size = torch.tensor([len(own)], device=_device(part))
    broadcast(part, size)
    told = torch.zeros(int(size), dtype=torch.uint8, device=size.device)
    if part.rank == 0:
        told.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    broadcast(part, told)
    return told.cpu().numpy().tobytes()


def broadcast(part: Part, value: Tensor) -> None:
    """Make a tensor on all ranks what it is on rank 0; all of them call this at one place."""
    if part.group is not None:
        dist.broadcast(value, dist.get_global_rank(part.group, 0), part.group)


def gathered(part: Part, own: list[int]) -> NDArray[np.int64]:
    """int64[ranks, n]: each rank's numbers; all of them call this at one place."""
    mine = torch.tensor(own, dtype=torch.int64, device=_device(part))
    if part.group is None:
        return mine.cpu().numpy()[None]
    all_of = [torch.zeros_like(mine) for _ in range(part.ranks)]
    dist.all_gather(all_of, mine, part.group)
    return torch.stack(all_of).cpu().numpy()


def _device(part: Part) -> torch.device:
    """Where tensors have to be for the ranks to send them to each other."""
    on_device = part.group is not None and dist.get_backend(part.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")
