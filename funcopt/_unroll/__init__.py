"""Derivatives of long training in memory that one has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.pytree import Structure
from .closures import closure_of
from .looks import taken
from .probe import check_step, in_reverse_mode, is_followed_back, requires_grad
from .segments import Loop, Made, Split, joined, run, run_plainly

CarryT = TypeVar("CarryT")

Keep: TypeAlias = Literal["all", "sqrt", "log"] | int

__all__ = ["unroll"]


def unroll(
    step: Callable[[CarryT, int], tuple[CarryT, Any]],
    carry: CarryT,
    steps: int,
    *,
    keep: Keep = "all",
    truncate: int | None = None,
) -> tuple[CarryT, Any]:
    """Make steps one after another, to be differentiated as one function in memory that one has.

    With keep="all", this is the loop

        for i in range(steps):
            carry, out = step(carry, i)

    and a derivative of it keeps what every step leaves behind. Otherwise, in reverse mode, some
    carries are kept alone, and the steps between two of them are made once more when the derivative
    goes back through them (Griewank and Walther 2000, "Algorithm 799: revolve"; Chen et al. 2016,
    arXiv:1604.06174). The results are those of the loop to the bit, the derivatives those of the
    loop but for rounding, to any order, also in what `step` closes over. It works under
    `torch.func.grad`, `vjp`, `vmap` and their compositions, and under plain autograd, where
    `torch.utils.checkpoint` cannot be used within `torch.func`. Forward mode (`jvp`) keeps nothing
    from step to step; where it is active, and where operators are traced (`torch.compile`,
    `make_fx`), the loop is run as it is, so that forward over reverse keeps all.

    In place of the whole, compile `step`: it may be compiled by
    `torch.compile(..., fullgraph=True)` under plain autograd, for first derivatives. Compiled once
    with a derivative and once without, it serves all steps; its optimizer is told
    `differentiable=True`. What is compiled rounds in its own way, so the results are then those of
    the loop but for rounding. torch cannot follow it in `torch.func.grad` or in a second
    derivative.

    Args:
        step: A pure function from a carry and the index of the step, a Python integer from 0 on, to
            the next carry and an output. It is called more than once for a step, so it must do the
            same again: it writes into nothing that it was given (`opt.update`, not `opt.update_`),
            reads no iterator (take `batches[i]`), and takes gradients by `torch.func.grad`, not by
            `torch.autograd.grad`. What it draws from torch's generators, or from a
            `torch.Generator` in the carry or in what it closes over, it draws again. Random numbers
            of Python or NumPy it would not.

            Tensors that it closes over get their derivatives, too: those in variables of enclosing
            functions, in globals, defaults and partials, in objects with attributes such as
            modules and optimizers, and in lists, tuples and dicts. One that is found nowhere there
            is an error. An update at parameters is always differentiated, as if it were told
            `differentiable=True`, unless plain autograd is to go through gradients that are
            detached: there, say so.
        carry: Any tree. A tensor in it keeps its shape, dtype and device from step to step, and the
            tree its structure. What is no tensor may change, as a Python number that counts.
        steps: How many, an integer of at least 0.
        keep: What is kept for the derivative, where T is what a step leaves behind, and C a carry:

            - "all": everything, K T for K steps.
            - "sqrt": sqrt(K) carries, and at a time sqrt(K) steps: sqrt(K) (C + T). Every step is
              made twice.
            - "log": a handful of carries, divided again and again: 4 log4(K) C + 8 T. Every step is
              made log4(K / 8) times more.
            - an integer k of at least 1: k carries: k C + K/k T. Every step is made twice.

            Where `torch.func.grad` is the outermost, which can always be differentiated again, a
            cotangent as large as a carry is kept with each, and "all" keeps about twice as much.
        truncate: The derivative goes back through so many steps from the last one on, an integer of
            at least 1; through all, if there are not as many. The steps before are made without
            any. To have windows that give a gradient each, call `unroll` for each, and detach the
            carry between them.

    Returns:
        The last carry; and the outputs, stacked: each tensor in them has shape `(steps, ...)`.
        None where they are None, or there is no step.

    Raises:
        TypeError: If `steps` or `truncate` is no integer, `step` does not return a pair, or a leaf
            of an output is neither a tensor nor None.
        RuntimeError: If torch is asked to follow a compiled step by a transform.
        ValueError: If `steps`, `truncate` or `keep` is out of range; if a carry or an output does
            not look like the one before, which is named by its path; if `step` reads an iterator,
            writes into the carry, or uses a tensor with a derivative that was not found.

    Example:
        >>> import torch, funcopt
        >>> def loss_after(lr):
        ...     opt, params = funcopt.SGD(lr=lr), torch.ones(3)
        ...     def step(carry, i):
        ...         params, state = carry
        ...         grads, loss = torch.func.grad_and_value(lambda p: p.square().sum())(params)
        ...         return opt.update(grads, state, params), loss
        ...     (params, _), losses = funcopt.unroll(
        ...         step, (params, opt.init(params)), 100, keep="sqrt"
        ...     )
        ...     return params.square().sum(), losses
        >>> slope, losses = torch.func.grad(loss_after, has_aux=True)(torch.tensor(0.01))
        >>> print(f"{slope:.2f}")  # d/dr 3 (1 - 2 r)^200 = -1200 (1 - 2 r)^199
        -21.54
        >>> losses.shape
        torch.Size([100])

        A gradient from each window of ten steps, and an update of the learning rate:

        >>> lr, meta = torch.tensor(0.01), funcopt.Adam(lr=1e-3)
        >>> carry, meta_state = torch.ones(3), meta.init(lr)
        >>> def window(lr, params):
        ...     def step(params, i):
        ...         return params - lr * 2 * params, None
        ...     params, _ = funcopt.unroll(step, params, 10, keep="sqrt")
        ...     return params.square().sum(), params.detach()
        >>> for _ in range(5):
        ...     slope, carry = torch.func.grad(window, has_aux=True)(lr, carry)
        ...     lr, meta_state = meta.update(slope, meta_state, lr)
    """
    _check_whole(steps, "steps", 0)
    if truncate is not None:
        _check_whole(truncate, "truncate", 1)
    split = _split_of(keep)
    leaves, structure = pytree.flatten(carry)
    last = steps if truncate is None else min(steps, truncate)
    head = _run_detached(step, structure, leaves, steps - last) if last < steps else None
    leaves = leaves if head is None else head.leaves
    tail = _run_recorded(step, structure, leaves, steps - last, last, split, keep == "log")
    outs, shape = tail.outs, tail.structure
    if head is not None:
        outs = joined(torch.cat, [head.outs, tail.outs])
    out = None if shape is None else pytree.unflatten(shape, outs)
    last_carry: CarryT = pytree.unflatten(structure, tail.leaves)
    return last_carry, out


def _run_recorded(
    step: Callable[..., Any],
    structure: Structure,
    leaves: list[Any],
    first: int,
    count: int,
    split: Split | None,
    recursive: bool,
) -> Made:
    """Make steps through which a derivative may go back."""
    if split is None or count == 0 or transforms.compiling():
        return run_plainly(step, structure, _without_autograd_leaves(leaves), first, count)
    closure = closure_of(step, "step")
    tensors = [*closure.tensors, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    if transforms.needs_plain_operators(tensors) or not is_followed_back(tensors):
        return run_plainly(step, structure, _without_autograd_leaves(leaves), first, count)
    check_step(closure, structure, leaves, first)
    loop = Loop(closure, structure, split, recursive)
    return run(loop, closure.tensors, leaves, first, count)


def _run_detached(
    step: Callable[..., Any], structure: Structure, leaves: list[Any], count: int
) -> Made:
    """Make steps through which no derivative goes back: what each returns is cut off."""

    def detached(carry: Any, index: int) -> tuple[Any, Any]:
        pair: tuple[Any, Any] = _detached(taken(step, carry, index))
        return pair

    return run_plainly(detached, structure, _detached(leaves), 0, count)


def _without_autograd_leaves(leaves: list[Any]) -> list[Any]:
    """Return copies of autograd's leaves, at which an update would not be recorded."""
    if transforms.compiling() or in_reverse_mode() or not torch.is_grad_enabled():
        return leaves
    return [
        leaf.clone() if isinstance(leaf, Tensor) and requires_grad(leaf) else leaf
        for leaf in leaves
    ]


def _detached(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


_LEAST = 8
_PARTS = 4


def _split_of(keep: object) -> Split | None:
    """Return how steps are divided into segments; None if all is kept."""
    if keep == "all":
        return None
    if keep == "sqrt":
        return lambda count: _evenly(count, math.isqrt(count - 1) + 1)
    if keep == "log":
        return lambda count: _evenly(count, _PARTS) if count > _LEAST else []
    if isinstance(keep, int) and not isinstance(keep, bool) and keep > 0:
        return lambda count: _evenly(count, keep)
    raise ValueError(
        f"keep={keep!r}: must be 'all', 'sqrt', 'log', or how many carries to keep, an integer of "
        f"at least 1."
    )


def _evenly(count: int, parts: int) -> list[int]:
    """Divide so many steps into so many parts, if there are as many."""
    parts = min(parts, count)
    each, more = divmod(count, parts)
    return [each + (index < more) for index in range(parts)]


def _check_whole(value: object, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be an integer of at least {least}.")
    if value < least:
        raise ValueError(f"{name}={value}: must be an integer of at least {least}.")
