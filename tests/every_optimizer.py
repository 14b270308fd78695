"""The table of every optimizer there is, for tests of what must be true of each."""

import dataclasses
import math

import torch

import funcopt
from funcopt import (
    SGD,
    Accumulate,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    Best,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Compensated,
    Ema,
    Frozen,
    Lion,
    Lookahead,
    LossScale,
    MasterWeights,
    Muon,
    NAdam,
    Partition,
    Plateau,
    RAdam,
    RMSprop,
    ScheduleFree,
    SkipNonfinite,
    distributed,
)
from funcopt.distributed import LocalUpdates, Zero1

from .cases import faded


def adamw(**options):
    return AdamW(**{"lr": 0.1, "weight_decay": 0.1} | options)


def label(name, leaf):
    return "first" if name.startswith("w") else "second"


# Each moves a tree with leaves whose names begin with a w, and others.
OPTIMIZERS = {
    "AdamW": adamw(),
    "AdamW, amsgrad": adamw(amsgrad=True, maximize=True),
    "AdamW, a count of each leaf": adamw(step_per_leaf=True),
    "AdamW, foreach": adamw(kernel="foreach"),
    "AdamW, plain": adamw(kernel="plain"),
    "AdamW, a schedule": adamw(lr=funcopt.schedules.Cosine(0.1, 10, warmup_steps=2)),
    "Adam": Adam(lr=0.1, weight_decay=0.1),
    "Adam, nesterov": Adam(lr=0.1, weight_decay=0.1, nesterov=True),
    "SGD": SGD(lr=0.1),
    "SGD, momentum": SGD(lr=0.1, momentum=0.9, dampening=0.25, weight_decay=0.1),
    "SGD, nesterov": SGD(lr=0.1, momentum=0.9, nesterov=True, step_per_leaf=True),
    "Lion": Lion(lr=0.1),
    "RMSprop": RMSprop(lr=0.1),
    "RMSprop, centered": RMSprop(lr=0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "Adagrad": Adagrad(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    "NAdam": NAdam(lr=0.1, weight_decay=0.1),
    "RAdam": RAdam(lr=0.1, betas=(0.5, 0.9), weight_decay=0.1, decoupled_weight_decay=True),
    # In 16 bits, kernels that stack matrices and the equations round otherwise.
    "Muon": Partition({"muon": Muon(lr=0.1, ns_dtype=None), "adamw": adamw()}, funcopt.muon_label),
    "Adafactor": Adafactor(lr=0.1, weight_decay=0.1),
    "Adafactor, an eps of its own": Adafactor(lr=0.1, eps=(1e-30, 1e-3), step_per_leaf=True),
    "Frozen": Frozen(),
    "Partition": Partition({"first": adamw(), "second": adamw(lr=0.01)}, label),
    "Clip": Clip(adamw(), 1.0),
    "Clip, infinity norm, skipping": Clip(adamw(), 1.0, norm_type=math.inf, nonfinite="skip"),
    "ClipValue": ClipValue(adamw(), 0.5),
    "ClipAdaptive": ClipAdaptive(adamw(), 0.1),
    "Accumulate": Accumulate(adamw(), every=2),
    "SkipNonfinite": SkipNonfinite(adamw()),
    "LossScale": LossScale(adamw(), init_scale=4.0),
    "Ema": Ema(adamw(), 0.9),
    "Lookahead": Lookahead(adamw(), every=2),
    "Best": Best(adamw(), patience=2),
    "Plateau": Plateau(adamw(), patience=2),
    "MasterWeights": MasterWeights(adamw()),
    "Compensated": Compensated(adamw()),
    "Transform": faded(adamw()),
    "ScheduleFree": ScheduleFree(adamw(), weight_decay=0.5),
    "ScheduleFree, a schedule": ScheduleFree(adamw(lr=funcopt.schedules.Linear(0.0, 0.1, 5))),
    "Cautious": Cautious(adamw(weight_decay=0.0)),
    "Cautious, with decay": Cautious(adamw(), rescale=False, weight_decay=0.5),
    "pure": funcopt.pure(torch.optim.NAdam, lr=0.1, weight_decay=0.1),
    "Zero1": Zero1(adamw(), mesh=None),
    "Zero1, all at once": Zero1(Clip(adamw(), 1.0), mesh=None),
    "LocalUpdates": LocalUpdates(adamw(), every=2, mesh=None, outer_lr=0.7, outer_momentum=0.9),
}


def public_optimizers():
    """The classes of all optimizers that can be imported, but for that of stacked trees alone."""
    named = [getattr(module, name) for module in (funcopt, distributed) for name in module.__all__]
    found = {cls for cls in named if dataclasses.is_dataclass(cls) and hasattr(cls, "update_")}
    return found - {funcopt.Members}
