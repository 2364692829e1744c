"""FBGEMM's inference tables, kept as the node is: float32, float16, or quantised to 8, 4 or 2 bits."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import fbgemm_gpu  # noqa: F401 - registers the operators
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from ekko.errors import ModelError
from ekko.sinks.held import F32, I64, Places
from ekko.sinks.memory import ModuleSink

_NONE: Mapping[str, Any] = MappingProxyType({})
_TYPES = (SparseType.FP32, SparseType.FP16, SparseType.INT8, SparseType.INT4, SparseType.INT2)


class FbgemmSink(ModuleSink):
    """Rows go into an `IntNBitTableBatchedEmbeddingBagsCodegen`, in the type that each of its tables has.

    Args:
        bags: the operator, its weights initialised; not pruned, and not behind FBGEMM's own cache.
        tables: table -> its number among the operator's tables.
        places, dense, lock: as `ekko.sinks.EmbeddingSink`.

    Raises:
        ModelError: the operator has no such table, or keeps it in a way that cannot be written here.
    """

    def __init__(
        self,
        bags: IntNBitTableBatchedEmbeddingBagsCodegen,
        tables: Mapping[str, int],
        *,
        places: Mapping[str, Places] = _NONE,
        dense: Mapping[str, Tensor] | nn.Module = _NONE,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        specs = {table: _spec(bags, table, number) for table, number in tables.items()}
        self._types = {table: kind for table, (_, _, kind) in specs.items()}
        weights = bags.split_embedding_weights()
        # Views of the operator's own memory: values, and scale and bias where they are quantised.
        self._weights: dict[str, tuple[Tensor, Tensor | None]] = {table: weights[number] for table, number in tables.items()}
        super().__init__({table: (rows, dim) for table, (rows, dim, _) in specs.items()}, places, dense, lock)
        for table in tables:  # rows that never come are zeros, as deleted ones are
            self._weights[table][0].zero_()
            if (scale := self._weights[table][1]) is not None:
                scale.zero_()

    def _write(self, table: str, places: I64, rows: F32) -> None:
        values, scale = self._weights[table]
        where = torch.from_numpy(places).to(values.device)
        encoded, encoded_scale = _encode(torch.from_numpy(rows).to(values.device), self._types[table])
        values.index_copy_(0, where, encoded[:, : values.shape[1]])
        if scale is not None:
            scale.index_copy_(0, where, encoded_scale)


def _encode(rows: Tensor, kind: SparseType) -> tuple[Tensor, Tensor]:
    """float32[n, dim] as the operator keeps them: uint8[n, bytes] values, padded, and uint8[n, 4] scales and biases.

    As FBGEMM's own `quantize_embs`, which warns each time.
    """
    nothing = rows.new_empty((len(rows), 0), dtype=torch.uint8)
    if kind == SparseType.FP32:
        return rows.view(torch.uint8), nothing
    if kind == SparseType.FP16:
        return rows.half().view(torch.uint8), nothing
    if kind == SparseType.INT8:
        fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows)  # two float32 at the end, where the operator has halves
        return fused[:, :-8], fused[:, -8:].contiguous().view(torch.float32).half().view(torch.uint8)
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, bit_rate=kind.bit_rate())
    return fused[:, :-4], fused[:, -4:]


def _spec(bags: IntNBitTableBatchedEmbeddingBagsCodegen, table: str, number: int) -> tuple[int, int, SparseType]:
    """Rows, width and type of a table.

    Raises:
        ModelError: it cannot be written here.
    """
    if not 0 <= number < len(bags.embedding_specs):
        raise ModelError(f"table {table!r} is said to be number {number} of {len(bags.embedding_specs)} of the operator")
    if not bags.weight_initialized:
        raise ModelError("the operator has no weights yet: call its initialize_weights()")
    _, rows, dim, kind, location = bags.embedding_specs[number]
    if location == EmbeddingLocation.MANAGED_CACHING:
        raise ModelError(f"table {table!r} is behind FBGEMM's cache, which would keep old rows: place it on DEVICE or HOST")
    if bags.index_remappings_array.numel() or bags.index_remapping_hash_table.numel():
        raise ModelError(f"table {table!r} is of an operator that was pruned: a row would have no place")
    if kind not in _TYPES:
        raise ModelError(f"table {table!r} is {kind.value}: a sink writes {', '.join(one.value for one in _TYPES)}")
    return int(rows), int(dim), kind
