"""The parameters that steps are timed on: flat dicts by name, as `named_parameters` gives them."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["MEMBERS", "SHAPES", "Shapes", "Tensors", "describe", "elements", "mlp", "random_like"]

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Tensors: TypeAlias = dict[str, Tensor]

MEMBERS = 32  # of each ensemble


def mlp(*widths: int, members: int | None = None) -> Shapes:
    """Return the shapes of a fully connected network; stacked, of an ensemble of them."""
    stack = () if members is None else (members,)
    shapes: Shapes = {}
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        shapes[f"{layer}.weight"] = (*stack, outputs, inputs)
        shapes[f"{layer}.bias"] = (*stack, outputs)
    return shapes


def gpt2(
    width: int = 512, blocks: int = 12, vocabulary: int = 50257, context: int = 1024
) -> Shapes:
    """Return the shapes of a small GPT-2, whose output weights are those of the embedding."""
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    matrices = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for block in range(blocks):
        for norm in ("ln_1", "ln_2"):
            shapes |= _affine(f"h.{block}.{norm}", (width,))
        for name, shape in matrices.items():
            shapes |= _affine(f"h.{block}.{name}", shape)
    return shapes | _affine("ln_f", (width,))


def resnet50() -> Shapes:
    """Return the shapes of ResNet-50 under torchvision's names."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **_affine("bn1", (64,))}
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            sizes = ((width, inputs, 1), (width, width, 3), (4 * width, width, 1))
            for number, (outputs, own, side) in enumerate(sizes, 1):
                shapes[f"{name}.conv{number}.weight"] = (outputs, own, side, side)
                shapes |= _affine(f"{name}.bn{number}", (outputs,))
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                shapes |= _affine(f"{name}.downsample.1", (4 * width,))
            inputs = 4 * width
    return shapes | {"fc.weight": (1000, inputs), "fc.bias": (1000,)}


def _affine(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}


SHAPES: dict[str, Shapes] = {
    "gpt2-60m": gpt2(),
    "resnet-25m": resnet50(),
    "leaves-2000": {f"leaf{number}": (64,) for number in range(2000)},
    "mlp": mlp(784, 128, 10),
    "mlp-tiny": mlp(16, 32, 4),
    "ensemble-large": mlp(784, 128, 10, members=MEMBERS),
    "ensemble-small": mlp(16, 32, 32, 4, members=MEMBERS),
}


def random_like(shapes: Shapes, seed: int, device: torch.device, scale: float = 0.1) -> Tensors:
    """Return tensors of these shapes; the values depend on the seed alone."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(shape, generator=source)).to(device)
        for name, shape in shapes.items()
    }


def describe(shapes: Shapes) -> str:
    """Say how large a tree is."""
    total = elements(shapes)
    count = f"{total / 1e6:.1f}M" if total >= 1e6 else f"{total:,}"
    return f"{count} parameters in {len(shapes)} leaves"


def elements(shapes: Shapes) -> int:
    """Return the number of elements of a tree."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())
