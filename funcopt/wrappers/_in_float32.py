"""What moves 16-bit parameters in float32: wider gradients, and checks of what is written besides.

`MasterWeights` and `Compensated` hand on float32 tensors in place of the parameters, so that what
the inner optimizer checks is not what is written in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import compute_dtype
from .._core.types import Tree
from .._engine.checks import check_apart, check_no_history, check_writable
from ._shared import Gradients


def widened(gradients: Gradients, recorded: bool) -> Gradients:
    """Return the gradients with those in 16 bits in float32.

    The inner optimizer is given other tensors than the parameters, so that to it a history that
    leads back to these leads elsewhere: it is taken off where the wrapper records nothing.
    """
    hidden = not recorded and transforms.transformed()  # beneath a vmap, it cannot be seen here
    with torch.set_grad_enabled(recorded):
        return gradients.replace(
            _wide(grad.detach() if hidden or (grad.requires_grad and not recorded) else grad)
            for grad in gradients.tensors
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def check_params_inplace(gradients: Gradients, inner: Tree) -> None:
    """Refuse to write parameters in place that the inner optimizer does not see.

    It checks its state, but neither beside these nor beside gradients of which it has copies.

    Raises:
        RuntimeError: If a parameter has a history, or was made in inference mode, outside of which
            it would be written.
        ValueError: If two of the tensors to be written, or one and a gradient, start at the same
            place, or the elements of a parameter do.
    """
    structure = gradients.structure
    indices = [index for index in range(len(gradients.params)) if index not in gradients.resting]
    params = [gradients.params[index] for index in indices]
    own, inner_structure = pytree.flatten(inner)
    states = [index for index, leaf in enumerate(own) if isinstance(leaf, Tensor)]

    def path(position: int) -> str:
        if position < len(indices):
            return pytree.path(structure, "params", indices[position])
        return pytree.path(inner_structure, "state.inner", states[position - len(indices)])

    # A parameter that merely requires a gradient is what everyone trains.
    check_no_history((path(i), p) for i, p in enumerate(params) if p.requires_grad and p.grad_fn)
    if transforms.tracing():  # there is no memory yet
        return
    check_writable(params, path)
    given = [index for index, grad in enumerate(gradients.leaves) if grad is not None]
    check_apart(
        [*params, *(own[index] for index in states)],
        gradients.tensors,
        path,
        lambda position: pytree.path(structure, "grads", given[position]),
    )
