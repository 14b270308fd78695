"""funcopt: AdamW as a pure function on PyTorch pytrees."""

from . import schedules
from ._adamw import AdamW, AdamWState
from ._frozen import Frozen
from ._labels import decay_label
from ._partition import Partition, PartitionState
from ._types import Optimizer

__all__ = [
    "AdamW",
    "AdamWState",
    "Frozen",
    "Optimizer",
    "Partition",
    "PartitionState",
    "__version__",
    "decay_label",
    "schedules",
]

__version__ = "0.1.0"
