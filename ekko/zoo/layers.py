"""Layers that models of the zoo have in common."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], *, last_relu: bool) -> nn.Sequential:
    """Linear layers between `widths` with ReLU between them, and after the last one where asked."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def check_widths(widths: dict[str, int]) -> None:
    """Name -> number, each at least 1, else a ValueError that names it."""
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"{name} is {width}: expected at least 1")
