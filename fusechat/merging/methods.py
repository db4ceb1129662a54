"""All merge methods by name: importing this module registers them. A user's own joins by ``imports=[my_module]``."""

from __future__ import annotations

from fusechat.merging import delta, dense, sparse, varm, widen
from fusechat.merging.family import METHODS, NEEDS, Parts, Weights

__all__ = ["METHODS", "NEEDS", "Parts", "Weights", "delta", "dense", "sparse", "varm", "widen"]
