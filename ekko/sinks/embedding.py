"""A `torch.nn.Embedding` that is kept as the node is: the simplest serving stack there is, and an example of a sink."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ekko.sinks.held import F32, I64, Places
from ekko.sinks.memory import ModuleSink

_NONE: Mapping[str, Any] = MappingProxyType({})


class EmbeddingSink(ModuleSink):
    """Rows go into embeddings of this process, on any device and of any floating dtype; a row that is deleted becomes zeros.

        sink = EmbeddingSink({"item": model.item_embedding}, dense=model)
        with ekko.serve.feed(run_dir, "ctr", sink) as feed:
            feed.flush(60)

    Args:
        modules: table -> `nn.Embedding` or `nn.EmbeddingBag`.
        places: table -> function from uint64[n] keys to int64[n] row numbers, -1 for keys that are to be left out; a key is
            a row number in tables that it does not name.
        dense: parameters by the names of dense tensors, or a module that has them.
        lock: held while rows are written: who infers with it held sees no row half written.

    Raises:
        ModelError: `places` has a table that `modules` does not have.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Embedding | nn.EmbeddingBag],
        *,
        places: Mapping[str, Places] = _NONE,
        dense: Mapping[str, Tensor] | nn.Module = _NONE,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._weights = {table: module.weight for table, module in modules.items()}
        sizes = {table: (module.num_embeddings, module.embedding_dim) for table, module in modules.items()}
        super().__init__(sizes, places, dense, lock)

    def _write(self, table: str, places: I64, rows: F32) -> None:
        weight = self._weights[table]
        values = torch.from_numpy(rows).to(weight.device, weight.dtype)
        weight.index_copy_(0, torch.from_numpy(places).to(weight.device), values)
