"""funcopt: AdamW as a pure function on PyTorch pytrees."""

from ._adamw import AdamW, AdamWState
from ._types import Optimizer

__all__ = ["AdamW", "AdamWState", "Optimizer", "__version__"]

__version__ = "0.1.0"
