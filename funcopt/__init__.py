"""funcopt: AdamW as a pure function on PyTorch pytrees, and what a loop needs around it."""

import importlib
from types import ModuleType

from . import schedules
from ._accumulate import Accumulate, AccumulateState
from ._adamw import AdamW, AdamWState
from ._clip import Clip, ClipState
from ._clip_adaptive import ClipAdaptive, ClipAdaptiveState
from ._clip_value import ClipValue, ClipValueState
from ._ema import Ema, EmaState
from ._find import find, replace
from ._frozen import Frozen
from ._labels import decay_label
from ._lookahead import Lookahead, LookaheadState
from ._loss_scale import LossScale, LossScaleState
from ._partition import Partition, PartitionState
from ._read_average import averaged
from ._skip_nonfinite import SkipNonfinite, SkipNonfiniteState
from ._types import Optimizer

__all__ = [
    "Accumulate",
    "AccumulateState",
    "AdamW",
    "AdamWState",
    "Clip",
    "ClipAdaptive",
    "ClipAdaptiveState",
    "ClipState",
    "ClipValue",
    "ClipValueState",
    "Ema",
    "EmaState",
    "Frozen",
    "Lookahead",
    "LookaheadState",
    "LossScale",
    "LossScaleState",
    "Optimizer",
    "Partition",
    "PartitionState",
    "SkipNonfinite",
    "SkipNonfiniteState",
    "__version__",
    "averaged",
    "decay_label",
    "find",
    "replace",
    "schedules",
]

__version__ = "0.1.0"

_LATER = ("distributed", "interop", "testing", "torchscript")


def __getattr__(name: str) -> ModuleType:
    """Import a part that brings more with it, such as hypothesis, once it is asked for."""
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
