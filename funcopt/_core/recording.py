"""Whether plain autograd is to record a step: the one place that decides who builds a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import Node

from . import transforms

__all__ = ["recording"]


def recording(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    others: Iterable[object],
    differentiable: bool | None,
) -> AbstractContextManager[object]:
    """Turn gradient recording off unless plain autograd is to record this step.

    Under a transform of `torch.func` nothing is turned off: `grad` and its kin always see the step,
    and what plain autograd records beneath a vmap is decided where vmap's rule gets to the tensors.

    Args:
        params: The parameters.
        grads: Their gradients.
        others: Whatever else goes into the step: moments and numbers.
        differentiable: What the user said: yes, no, or None for what the inputs say.
    """
    if transforms.transformed() or not torch.is_grad_enabled():
        return nullcontext()
    if differentiable is None:
        differentiable = any(
            isinstance(other, Tensor) and other.requires_grad for other in others
        ) or _from_elsewhere(grads, params)
    return torch.set_grad_enabled(differentiable)


def _from_elsewhere(grads: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether the gradients depend on anything that requires a gradient, besides the parameters.

    Parameters that merely require a gradient must not count, or the loop that everyone writes would
    grow a graph without end. They also give their gradients a history (`torch.func.grad` at an
    `nn.Parameter` does), so a history that leads back to these very parameters and nowhere else
    does not count either.
    """
    if not any(grad.requires_grad for grad in grads):
        return False
    if transforms.tracing():  # no graph to walk: go by the parameters alone
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
