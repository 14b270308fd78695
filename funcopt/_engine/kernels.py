"""What kernels made of torch's own list operators share: whom they serve, and in which dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import compute_dtype
from .._core.types import Number
from .rule import Kernel, StepInputs


def serves_any_dtypes(_param: torch.dtype, _slots: Sequence[torch.dtype]) -> bool:
    """Serve slots in any dtype."""
    return True


def serves_float64_alone(param: torch.dtype, slots: Sequence[torch.dtype]) -> bool:
    """Serve float64 where all is in it, and any other dtypes side by side."""
    doubles = [dtype is torch.float64 for dtype in (param, *slots)]
    return all(doubles) or not any(doubles)


def fused(
    step_: Callable[..., None], needed: str, paths: Mapping[str, str] = MappingProxyType({})
) -> Kernel:
    """Return a kernel that is one operator of torch, which is made for 16-bit leaves, too.

    Where moments are in another dtype than parameters, both come to it in the dtype to compute in.

    Where torch lacks the operator that is needed, the kernel serves nothing. `paths` has what
    messages call those numbers that have another name in the rule.
    """
    reason = partial(_unsupported_reason, (needed,), paths)
    return Kernel(partial(_alike, step_), reason, serves_dtypes=serves_any_dtypes)


def foreach(
    step_: Callable[..., None],
    needed: Sequence[str],
    paths: Mapping[str, str] = MappingProxyType({}),
) -> Kernel:
    """Return a kernel of `_foreach_` operators; leaves come to it in the dtype to compute in.

    The operators are named without `_foreach_`. The rest is as for `fused`.
    """
    names = tuple(f"_foreach_{name}" for name in ("copy_", *needed))
    reason = partial(_unsupported_reason, names, paths)
    return Kernel(partial(_widened, step_), reason, serves_dtypes=serves_any_dtypes)


def fused_lr(lr: Number, device: torch.device) -> Number:
    """Return a learning rate as torch's fused kernels take it.

    On CUDA they take it as a double, or as a tensor in float32 and in no other dtype. One that
    could be read without waiting is a Python number by now, and loses nothing. One on the device is
    rounded, by a part in 2**24 at most.
    """
    return lr.to(device, torch.float32) if isinstance(lr, Tensor) else lr


def _alike(step_: Callable[..., None], inputs: StepInputs, numbers: Any, options: Any) -> None:
    """Make a step by a kernel that wants all of a leaf in one dtype; where it is not, by copies."""
    if len({column[0].dtype for column in inputs.columns}) > 1:
        _widened(step_, inputs, numbers, options)
    else:
        step_(inputs, numbers, options)


def _widened(step_: Callable[..., None], inputs: StepInputs, numbers: Any, options: Any) -> None:
    dtype = compute_dtype(inputs.params[0].dtype)
    wide = StepInputs.of(
        [
            column if column[0].dtype is dtype else [tensor.to(dtype) for tensor in column]
            for column in inputs.columns
        ],
        inputs.ids,
    )
    step_(wide, numbers, options)
    for column, computed in zip(inputs.targets.columns, wide.targets.columns, strict=True):
        if computed is not column:
            torch._foreach_copy_(column, computed)


def _unsupported_reason(
    needed: tuple[str, ...], paths: Mapping[str, str], device: torch.device, numbers: Any
) -> str | None:
    lacking = [name for name in needed if not hasattr(torch, name)]
    if lacking:  # pragma: no cover
        return f"torch {torch.__version__} lacks {', '.join(lacking)}"
    if device.type not in ("cpu", "cuda"):
        return f"it serves cpu and cuda, not {device.type}"
    for name, number in zip(getattr(numbers, "_fields", ()), numbers or (), strict=True):
        if not isinstance(number, Tensor) or transforms.on_host(number):
            continue
        if name == "grad_scale":  # no kernel that asks this is told of it
            continue
        if name not in ("step", "lr") or number.ndim > 0 or number.device != device:
            path = paths.get(name, name)
            return f"it takes numbers whose value can be read, and {path} is on {number.device}"
    return None
