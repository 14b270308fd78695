"""Muon: its state, its equations, its kernel, its rule, and the optimizer as a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree
from .._core.tensors import double, fit
from .._core.types import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    Extras,
    Hyperparam,
    Number,
    NumberTree,
    ParamsT,
    Range,
    Schedule,
    Traits,
    Tree,
)
from .._engine import kernels
from .._engine.hyperparameters import check_choice
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer
from .._engine.rule import Slot, StepInputs, UpdateRule
from .._engine.update import update, update_
from ._newton_schulz import Iteration, orthogonalize, orthogonalize_all, stacks
from ._terms import add_scaled


class MuonState(NamedTuple):
    """The state of `Muon`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        momentum_buffer: The running mean of the gradients.
    """

    step: Tree
    momentum_buffer: Tree


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    lr: Number
    kept: Number  # what weight decay leaves of a parameter
    momentum: Number
    gain: Number  # 1 - momentum
    a: Number
    b: Number
    c: Number
    eps: Number


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    _, lr, weight_decay, momentum, a, b, c, eps, *_ = numbers
    return Coefficients(lr, 1 - lr * weight_decay, momentum, 1 - momentum, a, b, c, eps)


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim.Muon."""
    momentum_buffer = torch.lerp(slots[0], grad, own.gain)
    direction = momentum_buffer
    if options.nesterov:
        direction = torch.lerp(grad, momentum_buffer, own.momentum)
    matrix = orthogonalize(_to_orthogonalize(direction, options), _iteration(own, options))
    step = matrix.to(param.dtype).view_as(param)
    lr = own.lr * _ratio(matrix.shape, options.adjust_lr_fn)
    return [add_scaled(param * own.kept, step, -lr), momentum_buffer]


def _iteration(own: Coefficients, options: Any) -> Iteration:
    return Iteration(own.a, own.b, own.c, own.eps, options.ns_steps)


def _as_matrix(leaf: Tensor, options: Any) -> Tensor:
    """See a leaf as one matrix, of as many rows as its first dimension has, or as a stack."""
    return leaf if options.matrices == "stack" else leaf.flatten(1)


def _to_orthogonalize(direction: Tensor, options: Any) -> Tensor:
    return _as_matrix(direction, options).to(options.ns_dtype or direction.dtype)


def _ratio(shape: Sequence[int], adjust_lr_fn: str | None) -> float:
    """Return what the learning rate is multiplied by for matrices of a shape."""
    rows, columns = shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / max(columns, 1)))


def _batched_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (buffers,), _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    shapes = [_as_matrix(param, options).shape for param in params]
    dtype = options.ns_dtype or params[0].dtype
    for indices in stacks(shapes, dtype, params[0].device):
        directions = [_direction_(grads[i], buffers[i], own, options) for i in indices]
        made = orthogonalize_all(directions, _iteration(own, options))
        for index, matrix in zip(indices, made, strict=True):
            _move_(params[index], matrix, own, options)


def _direction_(grad: Tensor, buffer: Tensor, own: Coefficients, options: Any) -> Tensor:
    """Write the new momentum, and return the matrix that is to be made orthogonal."""
    buffer.lerp_(grad, own.gain)
    direction = torch.lerp(grad, buffer, own.momentum) if options.nesterov else buffer
    return _to_orthogonalize(direction, options)


def _move_(param: Tensor, matrix: Tensor, own: Coefficients, options: Any) -> None:
    """Write the new parameter."""
    lr = own.lr * _ratio(matrix.shape, options.adjust_lr_fn)
    step = matrix.to(param.dtype).view_as(param)
    param.mul_(fit(own.kept, param))
    if isinstance(lr, Tensor):  # on the device, where its value is not read
        param.add_(step * fit(-lr, param))
    else:
        param.add_(step, alpha=-lr)


_FINITE = Range("must be finite", math.isfinite)
_HYPERPARAMS = (
    Hyperparam("lr", AT_LEAST_ZERO),
    Hyperparam("weight_decay", AT_LEAST_ZERO),
    Hyperparam("momentum", BELOW_ONE),
    Hyperparam("a", _FINITE, "ns_coefficients[0]"),
    Hyperparam("b", _FINITE, "ns_coefficients[1]"),
    Hyperparam("c", _FINITE, "ns_coefficients[2]"),
    Hyperparam("eps", ABOVE_ZERO),
)
_BATCHED = kernels.foreach(_batched_, (), {own.name: own.path for own in _HYPERPARAMS})

_RULE = UpdateRule(
    state=MuonState,
    slots=(Slot("momentum_buffer"),),
    hyperparams=_HYPERPARAMS,
    options=("nesterov", "ns_steps", "adjust_lr_fn", "ns_dtype", "matrices"),
    coefficients=coefficients,
    equations=_equations,
    kernels={"batched": _BATCHED},
    traits=Traits(leafwise=True, linear=True, by_rule=True),
)

# By the rule of torch: more make no sense, and a learning rate put here would be noticed.
_MOST_STEPS = 99
_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)


@register_optimizer
@dataclass(frozen=True)
class Muon:
    r"""Momentum made nearly orthogonal: an optimizer for the matrices of hidden layers.

    With gradient $g_t$, learning rate $\eta$, weight decay $\lambda$ and momentum $\mu$,

    $$ b_t = \mu\,b_{t-1} + (1 - \mu)\,g_t, \qquad
       d_t = \mu\,b_t + (1 - \mu)\,g_t \quad (\text{without nesterov } d_t = b_t), $$

    $$ \theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \eta\,r\,\operatorname{NS}(d_t). $$

    $\operatorname{NS}(d)$ has the singular vectors of $d$, and singular values near 1 in place of
    its own. It is made by `ns_steps` Newton-Schulz iterations of $X = d / \lVert d \rVert$:

    $$ X \leftarrow a X + b\,(X X^\top) X + c\,(X X^\top)^2 X. $$

    $r$ depends on the shape, $A$ rows and $B$ columns: it is $\sqrt{\max(1, A/B)}$, or, so that a
    learning rate of AdamW serves, $0.2 \sqrt{\max(A, B)}$.

    Every leaf must have two or more dimensions. One of more is seen as one matrix, of as many rows
    as its first dimension has, as suits the filters of a convolution; or as a stack of matrices in
    its last two. Vectors and scalars, and by experience embeddings and the last layer too, want
    another optimizer: a `Partition` by `muon_label` gives them one, as below. A `Muon` is a frozen
    value and a pytree, as `AdamW` is: map over it with vmap, differentiate with respect to it,
    also through the iterations.

    From Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024), with the
    ratio of Liu et al., *Muon is Scalable for LLM Training* (2025). In float32 and float64 the bits
    are those of `torch.optim.Muon`, which takes matrices alone. 16-bit leaves are computed in
    float32, where torch in bfloat16 without Nesterov writes into its own buffer what is meant for
    the parameter. Where nobody follows operators, matrices of one shape are stacked, and on the CPU
    a symmetric product is made by its half: there only where that was found to leave every bit as
    it is, on other devices always. `kernel="plain"` makes each matrix by itself.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        weight_decay: At least 0, multiplied by the learning rate; likewise, so that it may have a
            schedule of its own.
        momentum: At least 0 and below 1; likewise.
        nesterov: Look ahead by the momentum.
        ns_coefficients: $a$, $b$ and $c$: finite; each likewise.
        eps: The least that a matrix is divided by in place of its norm: above 0; likewise.
        ns_steps: How many iterations to make: from 1 to 99.
        adjust_lr_fn: `"original"` or None for the first $r$, `"match_rms_adamw"` for the second.
        ns_dtype: The dtype of the iterations: `torch.bfloat16`, as in torch, another one, or None
            for that of the leaf (float32 for one in 16 bits).
        matrices: `"flatten"` sees a leaf of more than two dimensions as one matrix, `"stack"` as
            one for each index of all but the last two dimensions.
        step_per_leaf: Count the updates of each leaf; a schedule then sees each leaf's own count.
            Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"batched"` and `"plain"`
            name one. Tracers, transforms and derivatives always see plain operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the momentum, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> params = {"embed": torch.ones(8, 4), "w": torch.eye(2, 3), "b": torch.zeros(2)}
        >>> opt = funcopt.Partition(
        ...     {"muon": funcopt.Muon(lr=0.02), "adamw": funcopt.AdamW(lr=3e-4)},
        ...     labels=funcopt.muon_label,
        ... )
        >>> state = opt.init(params)
        >>> list(state.inner["muon"].momentum_buffer), list(state.inner["adamw"].exp_avg)
        (['w'], ['embed', 'b'])
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 1e-3
    weight_decay: Number | Schedule | NumberTree = 0.1
    momentum: Number | Schedule | NumberTree = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[Number | Schedule, Number | Schedule, Number | Schedule] = (
        3.4445,
        -4.775,
        2.0315,
    )
    eps: Number | Schedule | NumberTree = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None
    ns_dtype: torch.dtype | None = torch.bfloat16
    matrices: str = "flatten"
    step_per_leaf: bool = False
    kernel: str = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | str | None = "auto"

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        steps = self.ns_steps
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"ns_steps={steps!r}: must be a whole number, such as 5.")
        if not 1 <= steps <= _MOST_STEPS:
            raise ValueError(f"ns_steps={steps}: must be at least 1 and at most {_MOST_STEPS}.")
        if self.adjust_lr_fn is not None:
            check_choice("adjust_lr_fn", self.adjust_lr_fn, ("original", "match_rms_adamw"))
        check_choice("matrices", self.matrices, ("flatten", "stack"))
        if self.ns_dtype not in _DTYPES:
            kinds = ", ".join(map(str, _DTYPES))
            raise ValueError(f"ns_dtype={self.ns_dtype!r}: must be one of {kinds}.")
        check_fields(self)

    def init(self, params: Tree) -> MuonState:
        """Return the state before the first update: zeros.

        Raises:
            TypeError: If a leaf is complex.
            ValueError: If a leaf has fewer than two dimensions.
        """
        _check_matrices(params)
        state: MuonState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: MuonState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, MuonState]:
        """Return the new parameters and the new state, in fresh memory.

        Raises:
            TypeError: If a leaf is complex.
            ValueError: If a leaf has fewer than two dimensions.
        """
        _check_matrices(params)
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: MuonState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, MuonState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        _check_matrices(params)
        return update_(self, grads, state, params)


def _check_matrices(params: Tree) -> None:
    """Refuse leaves that are no matrices, nor can be seen as such."""
    leaves, structure = pytree.flatten(params)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.is_nested:  # which are refused with all others
            continue
        if leaf.ndim < 2:
            raise ValueError(
                f"{pytree.path(structure, 'params', index)} has shape {tuple(leaf.shape)}: Muon "
                f"moves matrices, which have two dimensions or more. Give it to another optimizer: "
                f'Partition({{"muon": Muon(), "adamw": AdamW()}}, labels=muon_label).'
            )
        if leaf.is_complex():
            raise TypeError(
                f"{pytree.path(structure, 'params', index)} has dtype {leaf.dtype}: Muon moves "
                f"real matrices. Give it to another optimizer, by a Partition."
            )
