"""The tables that the tests run over: options, trees, and tensors of every layout."""

import contextlib
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor

import funcopt
from funcopt import extend
from funcopt.extend import Traits

KERNELS = ("plain", "foreach", "fused")

# What torch.optim calls the kernels.
TORCH_FLAGS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

OPTIONS = [
    {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": weight_decay, "lr": lr}
    for amsgrad, maximize, weight_decay, lr in itertools.product(
        (False, True), (False, True), (0.0, 0.1), (1e-3, 0.3)
    )
]


def fade(grads: Any, own: Any, params: Any) -> tuple[Any, Any]:
    """For a `Transform`: gradients that fade, by a count of its own."""
    share = 1 / (1 + own["step"])
    faded = extend.tree_map(lambda grad: grad * extend.fit(share, grad), grads)
    return faded, {"step": own["step"] + 1}


def faded(inner: funcopt.Optimizer[Any]) -> funcopt.Transform:
    """A `Transform` of gradients that fade."""
    return funcopt.Transform(inner, fade, {"step": 0}, Traits(elementwise=True, linear=True))


_INNER = funcopt.AdamW(lr=0.1)

# Each optimizer, on leaves "w", "v" and "u".
WRAPPED: dict[str, funcopt.Optimizer[Any]] = {
    "AdamW": _INNER,
    "AdamW of many kinds": funcopt.AdamW(lr=0.1, amsgrad=True, step_per_leaf=True, maximize=True),
    "Clip": funcopt.Clip(_INNER, 0.5),
    "Clip that skips": funcopt.Clip(_INNER, torch.tensor(0.5), nonfinite="skip"),
    "ClipValue": funcopt.ClipValue(_INNER, 0.5),
    "ClipAdaptive": funcopt.ClipAdaptive(_INNER, 0.01),
    "Accumulate": funcopt.Accumulate(_INNER, 2),
    "SkipNonfinite": funcopt.SkipNonfinite(_INNER, 3),
    "LossScale": funcopt.LossScale(_INNER, 4.0),
    "Ema": funcopt.Ema(_INNER, 0.9),
    "Lookahead": funcopt.Lookahead(_INNER, 2, 0.5),
    "Best": funcopt.Best(_INNER, patience=2),
    "Plateau": funcopt.Plateau(_INNER, patience=0),
    "MasterWeights": funcopt.MasterWeights(_INNER),
    "Compensated": funcopt.Compensated(_INNER),
    "Transform": faded(_INNER),
    "ScheduleFree": funcopt.ScheduleFree(_INNER),
    "Cautious": funcopt.Cautious(_INNER, weight_decay=0.5),
    "Partition": funcopt.Partition(
        {"a": _INNER, "b": funcopt.Frozen(), "c": funcopt.Clip(_INNER, 1.0)},
        {"w": "a", "v": "b", "u": "c"},
    ),
}


class Point(NamedTuple):
    x: Any
    y: Any


def trees(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Trees of every kind of node, by name."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    return {
        "a tensor": leaf(3),
        "no leaf": {},
        "dict": {"b": leaf(2, 3), "a": leaf(4)},
        "OrderedDict": OrderedDict(weight=leaf(2, 3), bias=leaf(3)),
        "nested": {"layer": [leaf(2), (leaf(), leaf(0, 3))], "out": Point(leaf(1), {"z": leaf(5)})},
        "integer keys": {0: leaf(2), 1: leaf(3)},
    }


def layouts(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of shape (2, 3, 4, 5) in every layout that a kernel might get wrong, by name."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    return {
        "contiguous": normal(2, 3, 4, 5),
        "channels_last": normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": normal(5, 4, 3, 2).permute(3, 2, 1, 0),
        "sliced": normal(2, 3, 4, 10)[..., ::2],
        "offset": normal(3, 3, 4, 5)[1:],
        "expanded": normal(2, 1, 4, 1).expand(2, 3, 4, 5),
        "negative bit": torch.complex(normal(2, 3, 4, 5), normal(2, 3, 4, 5)).conj().imag,
    }


NOT_DENSE = ("nested and strided", "nested and jagged", "sparse")


def not_dense(kind: str, like: Tensor) -> Tensor:
    """A tensor of a dtype that is not dense, in one of those ways."""
    if kind == "sparse":
        return like.to_sparse()
    layout = torch.strided if kind == "nested and strided" else torch.jagged
    parts = [torch.ones(2, dtype=like.dtype), torch.ones(3, dtype=like.dtype)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are a prototype
        return torch.nested.nested_tensor(parts, layout=layout)


def tree_map(function: Any, tree: Any, *rest: Any) -> Any:
    return optree.tree_map(function, tree, *rest, namespace="torch")


def leaves(tree: Any) -> list[Tensor]:
    return optree.tree_leaves(tree, namespace="torch")


def random_like(tree: Any) -> Any:
    return tree_map(torch.randn_like, tree)


def clone(tree: Any) -> Any:
    return tree_map(torch.clone, tree)


def assert_same_bits(one: Any, other: Any) -> None:
    assert optree.tree_structure(one, namespace="torch") == optree.tree_structure(
        other, namespace="torch"
    )
    for a, b in zip(leaves(one), leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def attempt(opt: Any, grads: Any, state: Any, params: Any) -> str:
    """Return what update_ has to say against it, having seen that nothing was written."""
    before = clone((state, params))
    with pytest.raises((RuntimeError, TypeError, ValueError)) as refused:
        opt.update_(grads, state, params)
    assert_same_bits((state, params), before)
    return str(refused.value)


def assert_close(one: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def run(opt: funcopt.AdamW, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    """Return parameters and state after the updates with these gradients."""
    state = opt.init(params)
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    return params, state


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Let whatever waits for a CUDA device be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
