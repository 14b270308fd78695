"""How Muon makes a step: its equations, its kernels, its rules, and who is moved by which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import double, fit
from .._core.types import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    Hyperparam,
    Number,
    Range,
    Traits,
    Tree,
)
from .._dtensor.shards import Place, current_parts
from .._engine import kernels
from .._engine.registration import state_class
from .._engine.rule import Slot, StepInputs, UpdateRule
from ._newton_schulz import Iteration, orthogonalize, orthogonalize_all, stacks
from ._terms import add_scaled


@state_class
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
    matrix = _as_matrix(direction, options).to(_dtype_to_divide_in(direction, options))
    matrix = orthogonalize(matrix, _iteration(own, options))
    step = matrix.to(param.dtype).view_as(param)
    lr = own.lr * _ratio(matrix.shape, options.adjust_lr_fn)
    return [add_scaled(param * own.kept, step, -lr), momentum_buffer]


def _iteration(own: Coefficients, options: Any) -> Iteration:
    late = torch.float16 if options.ns_dtype is torch.float16 else None
    return Iteration(own.a, own.b, own.c, own.eps, options.ns_steps, options.gram, late)


def _dtype_to_divide_in(direction: Tensor, options: Any) -> torch.dtype:
    """Return the dtype in which a matrix is divided by its norm.

    As in torch that of the iterations; but in float16 small gradients would be 0, and the norm of
    large ones infinite.
    """
    own = None if options.ns_dtype is torch.float16 else options.ns_dtype
    return own or direction.dtype


def _matrix_shape(shape: torch.Size, options: Any) -> torch.Size:
    if options.matrices == "stack":
        return shape
    return torch.Size((shape[0], math.prod(shape[1:])))


def _as_matrix(leaf: Tensor, options: Any) -> Tensor:
    """See a leaf as one matrix, of as many rows as its first dimension has, or as a stack."""
    return leaf.reshape(_matrix_shape(leaf.shape, options))


def _ratio(shape: Sequence[int], adjust_lr_fn: str | None) -> float:
    """Return what the learning rate is multiplied by for matrices of a shape."""
    rows, columns = shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * _root(_larger(rows, columns))
    return _root(_larger(1, rows / _larger(columns, 1)))


def _larger(one: Any, other: Any) -> Any:
    """Return the larger of two numbers, which may be symbols for sizes that are not known yet."""
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return max(one, other)  # where Dynamo of torch 2.11 takes no numbers in sym_max
    return torch.sym_max(one, other)  # type: ignore[no-untyped-call]  # which torch left untyped


def _root(number: float) -> float:
    """Return a root, also of what is traced for every size: `math.sqrt` would see one size."""
    root: float = math.sqrt(number) if isinstance(number, (int, float)) else number**0.5
    return root


def _batched_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (buffers,), _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    shapes = [_matrix_shape(param.shape, options) for param in params]
    dtype = options.ns_dtype or params[0].dtype
    for indices in stacks(shapes, dtype, params[0].device):
        directions = [_direction_(grads[i], buffers[i], own, options) for i in indices]
        matrices = [_as_matrix(direction, options) for direction in directions]
        made = orthogonalize_all(matrices, _iteration(own, options))
        for index, matrix in zip(indices, made, strict=True):
            _move_(params[index], matrix, shapes[index], own, options)


def _direction_(grad: Tensor, buffer: Tensor, own: Coefficients, options: Any) -> Tensor:
    """Write the new momentum, and return what is to be made orthogonal."""
    buffer.lerp_(grad, own.gain)
    direction = torch.lerp(grad, buffer, own.momentum) if options.nesterov else buffer
    return direction.to(_dtype_to_divide_in(direction, options))


def _move_(
    param: Tensor, matrix: Tensor, shape: Sequence[int], own: Coefficients, options: Any
) -> None:
    """Write the new parameter, given matrices of a shape."""
    lr = own.lr * _ratio(shape, options.adjust_lr_fn)
    # That of a tall matrix is the transpose of a wide one: added so, it takes three times as long.
    step = matrix.contiguous().to(param.dtype).view_as(param)
    param.mul_(fit(own.kept, param))
    if isinstance(lr, Tensor):  # on the device, where its value is not read
        param.add_(step * fit(-lr, param))
    else:
        param.add_(step, alpha=-lr)


class _Lying(NamedTuple):
    """How the parts of an update lie."""

    places: list[Place | None]  # of every leaf
    turns: Iterator[Place | None]  # of those with a gradient, for who asks once for each in order


_lying: ContextVar[_Lying] = ContextVar("lying")


def _on_parts_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    """Make a step of leaves of which parts lie here: each matrix is made by one process."""
    from .._dtensor.wholes import on_wholes  # noqa: PLC0415  # which is for processes alone

    params, grads, (buffers,), ids = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    places = [_lying.get().places[index] for index in ids or range(len(params))]
    directions = [
        _direction_(grad, buffer, own, options) for grad, buffer in zip(grads, buffers, strict=True)
    ]
    made = on_wholes(directions, places, partial(_orthogonal, own, options))
    for param, step, place in zip(params, made, places, strict=True):
        shape = _matrix_shape(param.shape if place is None else place.shape, options)
        _move_(param, step, shape, own, options)


def _orthogonal(own: Coefficients, options: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Return whole leaves made orthogonal, in their shapes."""
    shapes = [_matrix_shape(leaf.shape, options) for leaf in leaves]
    results = list(leaves)
    for indices in stacks(shapes, leaves[0].dtype, leaves[0].device):
        matrices = [_as_matrix(leaves[index], options) for index in indices]
        made = orthogonalize_all(matrices, _iteration(own, options))
        for index, matrix in zip(indices, made, strict=True):
            results[index] = matrix.to(leaves[index].dtype).reshape(leaves[index].shape)
    return results


def _equations_of_part(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of the part of a leaf, for a mode that looks at each operator."""
    from .._dtensor.wholes import on_wholes  # noqa: PLC0415  # as above

    if transforms.followed((param, grad, *slots)):
        raise RuntimeError(
            "params has DTensors, of which Muon makes whole matrices by what other processes send: "
            "no derivative follows that. Detach what asks for one (a gradient, a state tensor, a "
            "hyperparameter, differentiable=True), or give whole tensors, as of .full_tensor()."
        )
    place = next(_lying.get().turns)
    param, buffer = param.clone(), slots[0].clone()
    direction = _direction_(grad, buffer, own, options)
    (made,) = on_wholes([direction], [place], partial(_orthogonal, own, options))
    shape = _matrix_shape(param.shape if place is None else place.shape, options)
    _move_(param, made, shape, own, options)
    return [param, buffer]


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
_PATHS = {own.name: own.path for own in _HYPERPARAMS}

RULE = UpdateRule(
    state=MuonState,
    slots=(Slot("momentum_buffer"),),
    hyperparams=_HYPERPARAMS,
    options=("nesterov", "ns_steps", "adjust_lr_fn", "ns_dtype", "matrices", "gram"),
    coefficients=coefficients,
    equations=_equations,
    kernels={"batched": kernels.foreach(_batched_, (), _PATHS)},
    traits=Traits(leafwise=True, shardable=True, linear=True),
    real_only=True,
)

# What moves DTensors: the same but for the way in which matrices are made orthogonal.
_OF_PARTS = replace(
    RULE,
    equations=_equations_of_part,
    kernels={"whole": kernels.foreach(_on_parts_, (), _PATHS)},
)


def on_matrices(method: Any, opt: Any, grads: Tree, state: Any, params: Tree) -> Any:
    """Make an update by the engine; of DTensors by another rule, that knows how they lie."""
    leaves, structure = pytree.flatten(params)
    check_matrices(leaves, structure)
    parts = current_parts()
    if parts is None or transforms.transformed():  # as where each member of a stack is whole
        return method(opt, grads, state, params)
    unknown = [index for index, leaf in enumerate(leaves) if not parts.knows(leaf)]
    if unknown:
        raise RuntimeError(
            f"{pytree.path(structure, 'params', unknown[0])} stands for no tensor of this update: "
            f"an optimizer around Muon made it. It must hand on its own parameters, so that Muon "
            f"knows of which whole matrix they are parts."
        )
    places = [parts.place(leaf) for leaf in leaves]
    if not any(places):
        return method(opt, grads, state, params)
    twin = copy(opt)
    object.__setattr__(twin, "rule", _OF_PARTS)
    object.__setattr__(twin, "kernel", "whole")
    given = pytree.pair(grads, "grads", structure).leaves
    turns = [place for place, grad in zip(places, given, strict=True) if grad is not None]
    token = _lying.set(_Lying(places, iter(turns)))
    try:
        return method(twin, grads, state, params)
    finally:
        _lying.reset(token)


def check_matrices(leaves: Sequence[Any], structure: pytree.Structure) -> None:
    """Refuse leaves that are no matrices, nor can be seen as such."""
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.is_nested:  # which are refused with all others
            continue
        if leaf.ndim < 2:
            raise ValueError(
                f"{pytree.path(structure, 'params', index)} has shape {tuple(leaf.shape)}: Muon "
                f"moves matrices, which have two dimensions or more. Give it to another optimizer: "
                f'Partition({{"muon": Muon(), "adamw": AdamW()}}, labels=muon_label).'
            )
