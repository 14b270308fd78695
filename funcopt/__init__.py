"""funcopt: AdamW as a pure function on PyTorch pytrees."""

from ._accumulate import Accumulate, AccumulateState
from ._adamw import AdamW, AdamWState
from ._clip import Clip, ClipState
from ._clip_value import ClipValue, ClipValueState
from ._types import Optimizer

__all__ = [
    "Accumulate",
    "AccumulateState",
    "AdamW",
    "AdamWState",
    "Clip",
    "ClipState",
    "ClipValue",
    "ClipValueState",
    "Optimizer",
    "__version__",
]

__version__ = "0.1.0"
