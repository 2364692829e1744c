"""Recommender models for the demo and the tests: small, plain PyTorch, and trained with sparse gradients."""

from ekko.zoo.dlrm import DLRM, DLRMOptions
from ekko.zoo.ftrl import FTRL
from ekko.zoo.warm_start import warm_start
from ekko.zoo.wide_deep import WideDeep, WideDeepOptions

__all__ = ["DLRM", "FTRL", "DLRMOptions", "WideDeep", "WideDeepOptions", "warm_start"]
