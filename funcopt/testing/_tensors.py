"""Tensors from recipes: what a value and a layout are called, and how they are made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _real(
    shape: tuple[int, ...], dtype: torch.dtype, values: str, generator: torch.Generator
) -> Tensor:
    """Values in float64, each of which `dtype` can hold."""
    limits = torch.finfo(dtype)

    def constant(value: float) -> Tensor:
        return torch.full(shape, value, dtype=torch.float64, device="cpu")

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cpu").double()

    simple: dict[str, Callable[[], Tensor]] = {
        "zeros": lambda: constant(0.0),
        "ones": lambda: constant(1.0),
        "normal": normal,
        "sparse": lambda: integers(0, 2) * normal(),
        "tiny": lambda: integers(-3, 4) * (limits.smallest_normal * limits.eps),
        # A quarter of the largest, so that sums of a few stay finite.
        "huge": lambda: (integers(0, 2) - 0.5) * (limits.max / 2),
    }
    return simple[values]()


VALUES = ("zeros", "ones", "normal", "sparse", "tiny", "huge")


def build(
    shape: tuple[int, ...], dtype: torch.dtype, values: str, layout: str, seed: int
) -> Tensor:
    """Make a tensor from its recipe, on the CPU; the same recipe gives the same tensor."""
    generator = torch.Generator("cpu").manual_seed(seed)
    content = _real(shape, dtype, values, generator)
    if dtype.is_complex:
        content = torch.complex(content, _real(shape, dtype, values, generator))
    return _LAYOUTS[layout](content.to(dtype))


def like(leaf: Tensor, values: str, layout: str, seed: int) -> Tensor:
    """Make a tensor of the shape, dtype and device of another."""
    return build(tuple(leaf.shape), leaf.dtype, values, layout, seed).to(leaf.device)


def _transposed(tensor: Tensor) -> Tensor:
    """The same values in column-major order."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _sliced(tensor: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor, behind an offset."""
    if tensor.ndim == 0:
        return torch.stack([tensor, tensor])[1]
    larger = tensor.repeat_interleave(2, dim=-1)
    return torch.cat([larger[..., :1], larger], dim=-1)[..., 1::2]


def _expanded(tensor: Tensor) -> Tensor:
    """The first slice in place of every other, without memory of their own."""
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        return tensor
    return tensor[:1].expand(tensor.shape)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "expanded": _expanded,
}

LAYOUTS = tuple(_LAYOUTS)
