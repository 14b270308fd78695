"""What `update_` refuses: whatever writing in place would make wrong, found before it writes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import _transforms
from ._checks import check_distinct
from ._kernels import PUBLIC_NAMES, Scalars
from ._work import Work

__all__ = ["check_inplace"]


def check_inplace(work: Work, numbers: Iterable[Scalars]) -> None:
    """Refuse to write in place where that would lose a derivative or memory.

    Raises:
        RuntimeError: Under a transform of `torch.func` or forward mode, or if anything that goes
            into the update carries history.
        ValueError: If a tensor to be written overlaps itself or another one.
    """
    if _transforms.transformed() or _transforms.forward_mode():
        raise RuntimeError(
            "update_() writes in place, which a transform (vmap, grad, jvp, ...) cannot follow. "
            "Use update()."
        )
    for name, tensor in _history(work, numbers):
        raise RuntimeError(
            f"{name} {'has a history' if tensor.grad_fn else 'requires a gradient'}, which writing "
            f"in place would lose. Use update(), or detach it if no derivative is wanted."
        )
    if _transforms.tracing():
        return
    written = list(work.written())
    for root, index, tensor in written:
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{work.path(root, index)} was made in inference mode, outside of which it cannot "
                f"be written. Use update(), or clone it first."
            )
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise ValueError(
                f"{work.path(root, index)} has strides {tensor.stride()} at shape "
                f"{tuple(tensor.shape)}: several elements share one place in memory. "
                f"Clone it first."
            )
    check_distinct(
        [tensor for _, _, tensor in written],
        lambda position: work.path(*written[position][:2]),
        "one would be written over the other",
    )


def _history(work: Work, numbers: Iterable[Scalars]) -> list[tuple[str, Tensor]]:
    found = [
        (PUBLIC_NAMES.get(name, name), number)
        for own in numbers
        for name, number in own._asdict().items()
        if isinstance(number, Tensor) and number.requires_grad
    ]
    for index, grad in enumerate(work.grads):
        if grad is not None and grad.requires_grad:
            found.append((work.path("grads", index), grad))
    for root, index, tensor in work.written():
        # A parameter that merely requires a gradient is what everyone trains.
        if tensor.requires_grad and not (root == "params" and tensor.is_leaf):
            found.append((work.path(root, index), tensor))
    return found


def _overlaps_itself(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
