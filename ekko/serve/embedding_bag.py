"""`torch.nn.EmbeddingBag` for serving, over rows that a reader pools while it reads them."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from ekko.errors import ModelError

Mode = Literal["sum", "mean", "max"]


class PoolingReader(Protocol):
    """What `EmbeddingBag` asks of a reader; `ekko.Reader` offers it."""

    @property
    def tables(self) -> Mapping[str, int]: ...

    @property
    def device(self) -> Any: ...  # None: rows come to CPU memory; else an `ekko.device.tier.DeviceTier`

    def lookup_pooled(
        self,
        table: str,
        keys: NDArray[np.uint64],
        offsets: NDArray[np.int64] | None = None,
        *,
        mode: Mode = "sum",
        weights: NDArray[np.float32] | None = None,
        include_last_offset: bool = False,
        padding_key: int | None = None,
        consistent: bool = False,
    ) -> NDArray[np.float32]: ...


class EmbeddingBag(nn.Module):
    """`torch.nn.EmbeddingBag` over rows that a reader looks up in its node's shared memory; for inference only.

    Of a reader that has a device, results are there: torch is given the memory that the look-up wrote, by DLPack, and no copy.

    It has no parameters and yields no gradients. A key that the table does not have counts as a row of the reader's default,
    zeros unless it was given another. Under `torch.compile` it is a break in the graph.

    Args:
        reader: an `ekko.Reader` of the model.
        table: the table's name.
        mode: how the rows of a bag become one.
        include_last_offset: as in `torch.nn.EmbeddingBag`: `offsets` ends with the number of indices.
        padding_idx: this index is left out of every bag. Below 0 it counts from `num_embeddings`, which then has to be given.
        num_embeddings: only for that: which keys there are is the table's.
        embedding_dim: checked against the table, if given.
        max_norm: refused: rows are served as they were trained.
        norm_type, scale_grad_by_freq, sparse: accepted, and without effect: they are about `max_norm` and gradients.
        _weight: refused: the rows are in the table.
        device: that of the reader, if given: the CPU's of one without a device and of one on the host twin.
        dtype: `torch.float32` only.
        consistent: see `ekko.Reader`.

    Raises:
        ModelError: an argument that cannot be honoured.
    """

    def __init__(
        self,
        reader: PoolingReader,
        table: str,
        mode: Mode = "mean",
        *,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        num_embeddings: int | None = None,
        embedding_dim: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        consistent: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("sum", "mean", "max"):
            raise ModelError(f"mode is {mode!r}: expected 'sum', 'mean' or 'max'")
        if max_norm is not None:
            raise ModelError(f"max_norm is {max_norm}: rows are served as they were published; limit their norm in training")
        if _weight is not None:
            raise ModelError(f"_weight was given: the rows are those of table {table!r}; publish them (ekko.torch.track)")
        if device is not None and torch.device(device) != (there := _device_of(reader)):
            raise ModelError(
                f"device is {device}: this reader's rows are on {there}; make it with that device, or move the result"
            )
        if dtype not in (None, torch.float32):
            raise ModelError(f"dtype is {dtype}: rows are read as torch.float32; convert the result")
        if embedding_dim is not None and embedding_dim != (dim := reader.tables.get(table, embedding_dim)):
            raise ModelError(f"embedding_dim is {embedding_dim}, and table {table!r} has dim {dim}")
        self.table = table
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding_idx = _padding_key(padding_idx, num_embeddings)
        self.consistent = consistent
        self._reader = reader

    def forward(
        self,
        input: Tensor,  # noqa: A002 - as torch calls it
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Pool the rows of each bag.

        Args:
            input: int64 or int32, [n] with `offsets`, or [bags, length] without; the bits of a key from 2^63 are those of a
                negative number.
            offsets: integers [bags], where each bag begins.
            per_sample_weights: float32 of the shape of `input`; mode "sum" only.

        Returns:
            float32[bags, dim]; an empty bag is zeros.

        Raises:
            ModelError: unknown table, indices that are not whole numbers in CPU memory, or arguments that do not fit.
            StoreError: see `ekko.Reader`.
        """
        pooled: Tensor = _pooled(self._reader, self, input, offsets, per_sample_weights)
        return pooled

    def extra_repr(self) -> str:
        return f"{self.table!r}, mode={self.mode!r}"


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _pooled(
    reader: PoolingReader, bag: EmbeddingBag, indices: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Outside of what is compiled: there is nothing in here that a compiler of tensors could know."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise ModelError(f"indices have dtype {indices.dtype}: expected torch.int64 or torch.int32")
    if indices.device.type != "cpu" and indices.device != (there := _device_of(reader)):
        raise ModelError(f"indices are on device {indices.device}: this reader's rows are on {there}; use .cpu()")
    # The host looks into all keys: which are missed, and whether their rows may be older than what was seen.
    keys = indices.detach().to(torch.int64).contiguous().cpu().numpy().view(np.uint64)
    pooled = reader.lookup_pooled(
        bag.table,
        keys,
        None if offsets is None else offsets.detach().to(torch.int64).cpu().numpy(),
        mode=bag.mode,
        weights=None if weights is None else weights.detach().to(torch.float32).cpu().numpy(),
        include_last_offset=bag.include_last_offset,
        padding_key=bag.padding_idx,
        consistent=bag.consistent,
    )
    tier = reader.device
    # The memory that it is in, whichever device that is of.
    rows: Tensor = from_dlpack(pooled if tier is None else tier.device.to_dlpack(pooled))
    return rows


def _device_of(reader: PoolingReader) -> torch.device:
    """Where torch finds the rows of a reader."""
    tier = reader.device
    return torch.device(tier.device.name if tier is not None and tier.device.name.startswith("cuda") else "cpu")


def _padding_key(padding_idx: int | None, num_embeddings: int | None) -> int | None:
    if padding_idx is None or padding_idx >= 0:
        return padding_idx
    if num_embeddings is None or padding_idx < -num_embeddings:
        raise ModelError(f"padding_idx is {padding_idx}, counted from the end: pass num_embeddings, at least {-padding_idx}")
    return num_embeddings + padding_idx
