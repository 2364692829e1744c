"""Recommender models for the demo and the tests: small, plain PyTorch, and trained with sparse gradients."""

from ekko.zoo.dlrm import DLRM, DLRMOptions
from ekko.zoo.ftrl import FTRL

__all__ = ["DLRM", "FTRL", "DLRMOptions"]
