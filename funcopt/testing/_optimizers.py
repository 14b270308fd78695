"""Hypothesis strategies for optimizers: their hyperparameters, precisions, and wrappers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from .._core.types import Optimizer
from ..optimizers.adafactor import Adafactor
from ..optimizers.adagrad import Adagrad
from ..optimizers.adam import Adam
from ..optimizers.adamw import AdamW
from ..optimizers.lion import Lion
from ..optimizers.nadam import NAdam
from ..optimizers.radam import RAdam
from ..optimizers.rmsprop import RMSprop
from ..optimizers.sgd import SGD
from ..wrappers.best import Best
from ..wrappers.clip_value import ClipValue
from ..wrappers.compensated import Compensated
from ..wrappers.ema import Ema
from ..wrappers.lookahead import Lookahead
from ..wrappers.master_weights import MasterWeights
from ..wrappers.plateau import Plateau
from ..wrappers.schedule_free import ScheduleFree
from ..wrappers.skip_nonfinite import SkipNonfinite

HALF = (torch.bfloat16, torch.float16)

# What may be drawn for each number of an optimizer.
_NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.1, 1e-3, 0.0, 1.0]),
    "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.75), (0.0, 0.0), (0.9, 0.0), (0.0, 0.99)]),
    "lr_decay": st.sampled_from([0.0, 0.1, 1.0]),
    "initial_accumulator_value": st.sampled_from([0.0, 0.1, 2.0]),
    "momentum_decay": st.sampled_from([4e-3, 0.0, 0.5]),
    "alpha": st.sampled_from([0.99, 0.9, 0.5]),
    "beta2_decay": st.sampled_from([-0.8, -0.5, 0.0]),
    "d": st.sampled_from([1.0, 2.0]),
    "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
    "momentum": st.sampled_from([0.0, 0.9, 0.5, 1.0]),
    "dampening": st.sampled_from([0.0, 0.25, 1.0]),
    "weight_decay": st.sampled_from([0.0, 1e-2, 0.5]),
}
# Lion moves each element by lr itself.
_LION_LR = st.sampled_from([1e-2, 1e-4, 0.0, 1.0])
# A pair, of which the first may be that of the dtype.
_ADAFACTOR_EPS = st.sampled_from([(None, 1e-3), (1e-30, 1e-3), (1e-3, 1.0)])


def hyperparameters(
    kind: type[Any] = AdamW, *, tensor: bool = False
) -> st.SearchStrategy[dict[str, Any]]:
    """The hyperparameters of an optimizer, as keyword arguments.

    Args:
        kind: Its class, such as `AdamW` or `SGD`.
        tensor: Whether its numbers may be 0-dim float64 tensors.
    """
    own = {name: _NUMBERS[name] for name in kind.__dataclass_fields__ if name in _NUMBERS}
    if kind is Lion:
        own["lr"] = _LION_LR
    if kind is Adafactor:
        own["eps"] = _ADAFACTOR_EPS
    if tensor:
        own = {name: st.one_of(drawn, drawn.map(_as_tensor)) for name, drawn in own.items()}
    flags = {name: st.booleans() for name in (*kind.rule.options, "step_per_leaf")}
    return st.fixed_dictionaries({**own, **flags})


# What may be drawn for the dtype of moments. As float16 has no room for the square of a gradient
# above 256, nor of one below 2**-12, it takes gradients of moderate size.
_MOMENTS = ("auto", None, torch.float32, torch.bfloat16, torch.float16)


def precisions(*, half: bool = True, stochastic: bool = True) -> st.SearchStrategy[dict[str, Any]]:
    """The dtype of an optimizer's moments, and how it rounds to 16 bits, as keyword arguments.

    Args:
        half: Whether moments may be in float16 and bfloat16, beside which no leaf is complex:
            `params_for` draws what goes with them.
        stochastic: Whether to draw stochastic rounding as well, with its seed.
    """
    moments = st.sampled_from([own for own in _MOMENTS if half or own not in HALF])
    nearest = st.fixed_dictionaries({"moments": moments, "rounding": st.just("nearest")})
    if not stochastic:
        return nearest
    seeds = st.sampled_from([0, 1, 2**53 - 1])
    by_chance = {"moments": moments, "rounding": st.just("stochastic"), "seed": seeds}
    return st.one_of(nearest, st.fixed_dictionaries(by_chance))


def _as_tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_tensor, value))
    if value is None:
        return None
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _built(kind: type[Any], fixed: dict[str, Any]) -> st.SearchStrategy[Any]:
    tensor = fixed.pop("tensor", False)
    for name, value in fixed.items():
        if name not in kind.__dataclass_fields__:
            raise InvalidArgument(f"{name}={value!r}: {kind.__name__} has no such field.")

    def build_one(drawn: dict[str, Any], precision: dict[str, Any]) -> Any:
        own = {**drawn, **precision, **fixed}
        if own.get("nesterov"):  # which needs momentum, and no dampening
            own = {**own, "momentum": own["momentum"] or 0.9, "dampening": 0.0, **fixed}
        return kind(**own)

    return st.builds(build_one, hyperparameters(kind, tensor=tensor), precisions())


def adamws(**fixed: Any) -> st.SearchStrategy[AdamW]:
    """`AdamW` optimizers of every precision, with some hyperparameters fixed.

    `params_for` draws parameters that go with one.

    Args:
        fixed: Hyperparameters by name, `moments`, `rounding` and `seed` among them, which are not
            drawn then; `tensor=True` is passed on to `hyperparameters`.
    """
    return _built(AdamW, fixed)


def adams(**fixed: Any) -> st.SearchStrategy[Adam]:
    """`Adam` optimizers; the arguments are those of `adamws`."""
    return _built(Adam, fixed)


def sgds(**fixed: Any) -> st.SearchStrategy[SGD]:
    """`SGD` optimizers; the arguments are those of `adamws`."""
    return _built(SGD, fixed)


def lions(**fixed: Any) -> st.SearchStrategy[Lion]:
    """`Lion` optimizers; the arguments are those of `adamws`."""
    return _built(Lion, fixed)


def rmsprops(**fixed: Any) -> st.SearchStrategy[RMSprop]:
    """`RMSprop` optimizers; the arguments are those of `adamws`."""
    return _built(RMSprop, fixed)


def adagrads(**fixed: Any) -> st.SearchStrategy[Adagrad]:
    """`Adagrad` optimizers; the arguments are those of `adamws`."""
    return _built(Adagrad, fixed)


def nadams(**fixed: Any) -> st.SearchStrategy[NAdam]:
    """`NAdam` optimizers; the arguments are those of `adamws`."""
    return _built(NAdam, fixed)


def radams(**fixed: Any) -> st.SearchStrategy[RAdam]:
    """`RAdam` optimizers; the arguments are those of `adamws`."""
    return _built(RAdam, fixed)


def adafactors(**fixed: Any) -> st.SearchStrategy[Adafactor]:
    """`Adafactor` optimizers; the arguments are those of `adamws`.

    `optimizers` draws none, as the parameters of whoever draws from it may be complex.
    """
    return _built(Adafactor, fixed)


# Wrappers that move each leaf by itself, with a state of numbers and of trees like the parameters,
# which can be split and joined; a new one joins by one line. (What takes a norm of several elements
# is ill-conditioned where it is zero, so that no two ways of computing it agree there.)
_WRAPPERS = (
    partial(ClipValue, max_value=0.5),
    Best,
    partial(Ema, decay=0.75),
    partial(Ema, decay=0.5, debias=False),
    partial(Lookahead, every=2),
    ScheduleFree,
    Plateau,
    MasterWeights,
    Compensated,
    SkipNonfinite,
)


def optimizers() -> st.SearchStrategy[Optimizer[Any]]:
    """Optimizers of every sort and precision, bare or inside wrappers nested at random.

    `params_for` draws parameters that go with one.
    """
    wrappers = st.sampled_from(_WRAPPERS)
    return st.recursive(
        st.one_of(adamws(), adams(), sgds(), lions(), radams(), nadams(), adagrads(), rmsprops()),
        lambda inner: st.builds(lambda wrap, opt: wrap(opt), wrappers, inner),
        max_leaves=3,
    )
