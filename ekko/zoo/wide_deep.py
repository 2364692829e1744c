"""Wide & Deep: a linear model of crossed features that remembers, and an MLP over embeddings that generalises, with one logit.

The intuition: "who has installed this app likes that one" is a fact about one pair of ids. A linear weight for the pair learns
it from few examples and says nothing else, where an MLP over embeddings would give similar pairs the same; the MLP in turn has
an opinion of pairs that nobody has seen. Both are trained together: the loss is of the sum of their logits, so that the wide
side only learns what the deep side gets wrong.

Source: Cheng et al., "Wide & Deep Learning for Recommender Systems" (2016). As there, the wide side is for FTRL with L1, so
that most pairs weigh exactly nothing, and the deep side for Adagrad:

    wide, deep = FTRL(model.wide_parameters, lr=0.1, l1=1.0), torch.optim.Adagrad(model.deep_parameters, lr=0.05)

Pairs are too many for a row each: a cross is hashed to one of `cross_rows` rows of its own part of the wide table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from ekko.zoo.layers import check_widths, mlp

# The Murmur3 finaliser, in the int64 that torch has: its products wrap, and its shifts to the right keep the sign.
_MULTIPLIERS: Final = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64))
_SHIFT, _SHIFTED_BITS = 33, (1 << 31) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15 - (1 << 64)


@dataclass(frozen=True, slots=True)
class WideDeepOptions:
    """The shape of a `WideDeep`.

    Args:
        rows: rows of each feature's embedding table; its order is the order of features in `embeddings`.
        crosses: which features the wide side looks at together; one alone is a feature's own weight.
        cross_rows: rows of the wide table for each of the crosses.
        dense: how many dense features an event has.
        dim: width of an embedding row.
        hidden: widths of the MLP's hidden layers.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    crosses: Sequence[tuple[str, ...]] = ()
    cross_rows: int = 1 << 16
    dense: int = 1
    dim: int = 16
    hidden: Sequence[int] = (64, 32)

    def __post_init__(self) -> None:
        widths = {"dense": self.dense, "dim": self.dim, "cross_rows": self.cross_rows}
        widths |= {f"rows[{name!r}]": count for name, count in self.rows.items()}
        check_widths(widths | {f"hidden[{layer}]": width for layer, width in enumerate(self.hidden)})
        if not self.rows or not self.crosses:
            raise ValueError("rows and crosses: Wide & Deep needs at least one feature, and one cross of features")
        for cross in self.crosses:
            if not isinstance(cross, tuple) or not cross or any(name not in self.rows for name in cross):
                raise ValueError(f"crosses has {cross!r}: expected a tuple of features, of which there are {list(self.rows)}")
        if len(set(self.crosses)) != len(self.crosses):
            raise ValueError(f"crosses has one twice: {list(self.crosses)}")


class WideDeep(nn.Module):
    """A click model: `forward` returns logits, whose sigmoid is the probability of a positive label.

    Args:
        options: the shape.
        with_tables: False builds the model without its tables, for a server that looks rows up elsewhere.
    """

    def __init__(self, options: WideDeepOptions, *, with_tables: bool = True) -> None:
        super().__init__()
        self.options = options
        self.deep = mlp([options.dense + len(options.rows) * options.dim, *options.hidden, 1], last_relu=False)
        self.tables = nn.ModuleDict()
        self.wide: nn.Embedding | None = None
        if with_tables:
            for name, rows in options.rows.items():
                table = nn.Embedding(rows, options.dim, sparse=True)
                nn.init.normal_(table.weight, std=options.dim**-0.5 / 4)
                self.tables[name] = table
            self.wide = nn.Embedding(len(options.crosses) * options.cross_rows, 1, sparse=True)
            nn.init.zeros_(self.wide.weight)  # what FTRL with L1 leaves at zero is to be zero from the start

    @property
    def tracked(self) -> dict[str, str]:
        """Module name -> table name of every embedding: the `tables` argument of `ekko.torch.track`."""
        return {"wide": "wide"} | {f"tables.{name}": name for name in self.options.rows}

    @property
    def table_dims(self) -> dict[str, int]:
        """Table name -> dim: the `tables` argument of `ekko.Publisher`."""
        return {"wide": 1} | dict.fromkeys(self.options.rows, self.options.dim)

    @property
    def wide_parameters(self) -> list[nn.Parameter]:
        """What the paper trains with FTRL."""
        return [] if self.wide is None else list(self.wide.parameters())

    @property
    def deep_parameters(self) -> list[nn.Parameter]:
        """What the paper trains with Adagrad: embeddings and the MLP."""
        return [*self.tables.parameters(), *self.deep.parameters()]

    def wide_ids(self, ids: Mapping[str, Tensor]) -> Tensor:
        """int64[batch, crosses]: the rows of the wide table, of `ids`, int64[batch] each."""
        rows = self.options.cross_rows
        columns = [
            torch.remainder(_hash_of([ids[name] for name in cross]), rows) + place * rows
            for place, cross in enumerate(self.options.crosses)
        ]
        return torch.stack(columns, dim=1)

    def embed(self, ids: Mapping[str, Tensor]) -> Tensor:
        """float32[batch, features, dim]: the rows of `ids`, int64[batch] each, in the order of `options.rows`."""
        return torch.stack([self.tables[name](ids[name]) for name in self.options.rows], dim=1)

    def forward(
        self,
        dense: Tensor,
        ids: Mapping[str, Tensor] | None = None,
        *,
        embeddings: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Logits of a batch.

        Args:
            dense: float32[batch, options.dense].
            ids: int64[batch] per feature; looked up in the model's own tables. Or both of
            embeddings: float32[batch, features, dim], as of `embed`, looked up elsewhere.
            weights: float32[batch, crosses], rows of the wide table for `wide_ids`, looked up elsewhere.

        Returns:
            float32[batch].
        """
        if (ids is None) != (embeddings is not None and weights is not None) or (embeddings is None) != (weights is None):
            raise ValueError("give either ids, or embeddings and weights")
        if embeddings is None or weights is None:
            assert ids is not None
            if self.wide is None:
                raise ValueError("this model was built without tables: give embeddings and weights")
            embeddings, weights = self.embed(ids), self.wide(self.wide_ids(ids)).squeeze(2)
        logits: Tensor = self.deep(torch.cat([dense, embeddings.flatten(1)], dim=1)).squeeze(1)
        return logits + weights.sum(dim=1)


def _hash_of(ids: Sequence[Tensor]) -> Tensor:
    """int64[batch]: a hash of some ids in this order."""
    hashed = torch.zeros_like(ids[0], dtype=torch.int64)
    for one in ids:
        hashed = hashed + one + _GOLDEN
        for multiplier in _MULTIPLIERS:
            hashed = (hashed ^ ((hashed >> _SHIFT) & _SHIFTED_BITS)) * multiplier
        hashed = hashed ^ ((hashed >> _SHIFT) & _SHIFTED_BITS)
    return hashed
