"""funcopt: optimizers as pure functions on PyTorch pytrees, and what a loop needs around them."""

import gc
import importlib
from types import ModuleType

# What is imported here is kept, so there is no garbage to look for: one run of Python's collector
# over all that torch has made would take as long as everything below.
_collects = gc.isenabled()
gc.disable()
try:
    from . import extend, members, memory, schedules
    from ._config import show_config
    from ._core.inner import OptimizerLike
    from ._core.types import Number, Optimizer, ParamsT, Schedule, Tree
    from ._pure.optimizer import Pure, PureState, pure
    from ._unroll import unroll
    from .optimizers._muon import MuonState
    from .optimizers.adafactor import Adafactor, AdafactorState
    from .optimizers.adagrad import Adagrad, AdagradState
    from .optimizers.adam import Adam, AdamState
    from .optimizers.adamw import AdamW, AdamWState
    from .optimizers.frozen import Frozen
    from .optimizers.lion import Lion, LionState
    from .optimizers.muon import Muon
    from .optimizers.nadam import NAdam, NAdamState
    from .optimizers.radam import RAdam, RAdamState
    from .optimizers.rmsprop import RMSprop, RMSpropState
    from .optimizers.sgd import SGD, SGDState
    from .wrappers.accumulate import Accumulate, AccumulateState
    from .wrappers.averaged import averaged
    from .wrappers.best import Best, BestState
    from .wrappers.cautious import Cautious, CautiousState
    from .wrappers.clip import Clip, ClipState
    from .wrappers.clip_adaptive import ClipAdaptive, ClipAdaptiveState
    from .wrappers.clip_value import ClipValue, ClipValueState
    from .wrappers.compensated import Compensated, CompensatedState
    from .wrappers.ema import Ema, EmaState
    from .wrappers.find_replace import find, replace
    from .wrappers.labels import decay_label, muon_label
    from .wrappers.lookahead import Lookahead, LookaheadState
    from .wrappers.loss_scale import LossScale, LossScaleState
    from .wrappers.master_weights import MasterWeights, MasterWeightsState
    from .wrappers.members import Members
    from .wrappers.partition import Partition, PartitionState
    from .wrappers.plateau import Plateau, PlateauState
    from .wrappers.schedule_free import ScheduleFree, ScheduleFreeState
    from .wrappers.skip_nonfinite import SkipNonfinite, SkipNonfiniteState
    from .wrappers.transform import Transform, TransformState
finally:
    if _collects:
        gc.enable()

__all__ = [
    "SGD",
    "Accumulate",
    "AccumulateState",
    "Adafactor",
    "AdafactorState",
    "Adagrad",
    "AdagradState",
    "Adam",
    "AdamState",
    "AdamW",
    "AdamWState",
    "Best",
    "BestState",
    "Cautious",
    "CautiousState",
    "Clip",
    "ClipAdaptive",
    "ClipAdaptiveState",
    "ClipState",
    "ClipValue",
    "ClipValueState",
    "Compensated",
    "CompensatedState",
    "Ema",
    "EmaState",
    "Frozen",
    "Lion",
    "LionState",
    "Lookahead",
    "LookaheadState",
    "LossScale",
    "LossScaleState",
    "MasterWeights",
    "MasterWeightsState",
    "Members",
    "Muon",
    "MuonState",
    "NAdam",
    "NAdamState",
    "Number",
    "Optimizer",
    "OptimizerLike",
    "ParamsT",
    "Partition",
    "PartitionState",
    "Plateau",
    "PlateauState",
    "Pure",
    "PureState",
    "RAdam",
    "RAdamState",
    "RMSprop",
    "RMSpropState",
    "SGDState",
    "Schedule",
    "ScheduleFree",
    "ScheduleFreeState",
    "SkipNonfinite",
    "SkipNonfiniteState",
    "Transform",
    "TransformState",
    "Tree",
    "__version__",
    "averaged",
    "decay_label",
    "extend",
    "find",
    "members",
    "memory",
    "muon_label",
    "pure",
    "replace",
    "schedules",
    "show_config",
    "unroll",
]

__version__ = "0.1.0"

_LATER = ("compat", "distributed", "interop", "testing", "torchscript")


def __dir__() -> list[str]:
    """Return the public names, with parts that are not imported yet."""
    return sorted([*__all__, *_LATER])


def __getattr__(name: str) -> ModuleType:
    """Import a part that brings more with it, such as hypothesis, once it is asked for."""
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
