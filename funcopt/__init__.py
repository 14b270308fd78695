"""funcopt: AdamW as a pure function on PyTorch pytrees."""

from . import schedules
from ._adamw import AdamW, AdamWState
from ._types import Optimizer

__all__ = ["AdamW", "AdamWState", "Optimizer", "__version__", "schedules"]

__version__ = "0.1.0"
