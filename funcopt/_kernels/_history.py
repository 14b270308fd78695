"""Whether plain autograd is to record a step: the one place that decides who builds a graph."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .. import _transforms
from ._operands import Leaves, Scalars, Variant

__all__ = ["recording"]


def recording(
    leaves: Leaves, scalars: Iterable[Scalars], variant: Variant
) -> AbstractContextManager[object]:
    """Turn gradient recording off unless this step is to be recorded.

    Under a transform of `torch.func` nothing is turned off here: its derivatives are always taken.
    """
    if _transforms.transformed() or not torch.is_grad_enabled():
        return nullcontext()
    if variant.differentiable is not None:
        return torch.set_grad_enabled(variant.differentiable)
    numbers = (n for own in {id(own): own for own in scalars}.values() for n in own)
    history = (
        any(number.requires_grad for number in numbers if isinstance(number, Tensor))
        or any(tensor.requires_grad for column in leaves[2:] for tensor in column)
        or _from_elsewhere(leaves.grads, leaves.params)
    )
    return torch.set_grad_enabled(history)


def _from_elsewhere(grads: list[Tensor], params: list[Tensor]) -> bool:
    """Whether the gradients depend on anything that requires a gradient, besides the parameters.

    Parameters that merely require a gradient must not count, or the loop that everyone writes would
    grow a graph without end. They also give their gradients a history (`torch.func.grad` at an
    `nn.Parameter` does), so a history that leads back to these very parameters and nowhere else
    does not count either.
    """
    if not any(grad.requires_grad for grad in grads):
        return False
    if _transforms.tracing():  # no graph to walk: go by the parameters alone
        return not any(param.requires_grad and param.is_leaf for param in params)
    own = {id(_origin(param)) for param in params}
    pending: list[Node] = []
    for grad in grads:
        if grad.grad_fn is not None:
            pending.append(grad.grad_fn)
        elif grad.requires_grad and id(grad) not in own:
            return True
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = _leaf_of(node)
        if leaf is not None and id(leaf) not in own:
            return True
        pending.extend(following for following, _ in node.next_functions if following is not None)
    return False


def _origin(param: Tensor) -> Tensor:
    """The leaf of which a parameter is a view: vmap's rule sees views of what the user gave."""
    node = param.grad_fn if param._is_view() else None
    while node is not None:
        leaf = _leaf_of(node)
        if leaf is not None:
            return leaf
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return param


def _leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient is accumulated at this node, where its graph ends."""
    return getattr(node, "variable", None)
