"""DLRM: dense features through an MLP, ids through embeddings, pairwise dot products of both, and an MLP on top.

The intuition: an embedding row says what one user, item or genre is like, the bottom MLP turns the dense features of an
event into a vector of the same width, and what matters for the prediction is how alike each pair of these vectors is.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems" (2019). One id per
feature, so that a table is an `nn.Embedding` and not a bag. The tables are sparse: a step yields gradients of the touched
rows only, which is what `ekko.torch.track` publishes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ekko.zoo.layers import check_widths, mlp


@dataclass(frozen=True, slots=True)
class DLRMOptions:
    """The shape of a `DLRM`.

    Args:
        rows: rows of each feature's embedding table; its order is the order of features in `embeddings`.
        dense: how many dense features an event has.
        dim: width of an embedding row, and of the bottom MLP's output.
        bottom: widths of the bottom MLP's hidden layers.
        top: widths of the top MLP's hidden layers.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    dense: int = 1
    dim: int = 16
    bottom: Sequence[int] = (32,)
    top: Sequence[int] = (64, 32)

    def __post_init__(self) -> None:
        widths = {"dense": self.dense, "dim": self.dim, **{f"rows[{name!r}]": count for name, count in self.rows.items()}}
        widths |= {f"bottom[{layer}]": width for layer, width in enumerate(self.bottom)}
        widths |= {f"top[{layer}]": width for layer, width in enumerate(self.top)}
        check_widths(widths)
        if not self.rows:
            raise ValueError("rows names no feature: DLRM needs at least one embedding table")


class DLRM(nn.Module):
    """A click model: `forward` returns logits, whose sigmoid is the probability of a positive label.

    Args:
        options: the shape.
        with_tables: False builds the model without its embedding tables, for a server that looks rows up elsewhere.
    """

    _left: Tensor  # int64[pairs]: with _right, every pair of vectors once
    _right: Tensor

    def __init__(self, options: DLRMOptions, *, with_tables: bool = True) -> None:
        super().__init__()
        self.options = options
        vectors = len(options.rows) + 1
        self.bottom = mlp([options.dense, *options.bottom, options.dim], last_relu=True)
        self.top = mlp([options.dim + vectors * (vectors - 1) // 2, *options.top, 1], last_relu=False)
        self.tables = nn.ModuleDict()
        if with_tables:
            for name, rows in options.rows.items():
                table = nn.Embedding(rows, options.dim, sparse=True)
                # Rows start small, so that an id that was never seen pulls a prediction nowhere.
                nn.init.normal_(table.weight, std=options.dim**-0.5 / 4)
                self.tables[name] = table
        pairs = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("_left", pairs[0], persistent=False)
        self.register_buffer("_right", pairs[1], persistent=False)

    @property
    def tracked(self) -> dict[str, str]:
        """Module name -> table name of every embedding: the `tables` argument of `ekko.torch.track`."""
        return {f"tables.{name}": name for name in self.options.rows}

    def embed(self, ids: Mapping[str, Tensor]) -> Tensor:
        """float32[batch, features, dim]: the rows of `ids`, int64[batch] each, in the order of `options.rows`."""
        return torch.stack([self.tables[name](ids[name]) for name in self.options.rows], dim=1)

    def forward(self, dense: Tensor, ids: Mapping[str, Tensor] | None = None, *, embeddings: Tensor | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            dense: float32[batch, options.dense].
            ids: int64[batch] per feature; looked up in the model's own tables.
            embeddings: float32[batch, features, dim] looked up elsewhere; exactly one of `ids` and `embeddings` is given.

        Returns:
            float32[batch].
        """
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings")
        if embeddings is None:
            assert ids is not None
            embeddings = self.embed(ids)
        bottom = self.bottom(dense)
        vectors = torch.cat([bottom.unsqueeze(1), embeddings], dim=1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, self._left, self._right]
        logits: Tensor = self.top(torch.cat([bottom, dots], dim=1)).squeeze(1)
        return logits
