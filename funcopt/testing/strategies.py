"""Hypothesis strategies for what an optimizer is given: tensors, trees, gradients, hyperparameters.

They follow the manner of `hypothesis.extra.numpy`: keyword-only options, bad options refused with
the value in the message, and simplest things first, so that a failing example shrinks to the
smallest tree of the plainest tensors. A tensor is drawn as a recipe (shape, dtype, kind of values,
layout, seed), never element by element, which keeps drawing a tree to a millisecond or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from torch import Tensor

from .._core import pytree
from .._core.types import Tree, optimizers_in
from ._optimizers import (
    HALF,
    adafactors,
    adagrads,
    adams,
    adamws,
    hyperparameters,
    lions,
    nadams,
    optimizers,
    precisions,
    radams,
    rmsprops,
    sgds,
)
from ._subject import fields
from ._tensors import LAYOUTS, VALUES, build, like
from ._trees import NODES, assemble

__all__ = [
    "adafactors",
    "adagrads",
    "adams",
    "adamws",
    "dtypes",
    "gradient_sequences",
    "gradients",
    "hyperparameters",
    "lions",
    "nadams",
    "optimizers",
    "params",
    "params_for",
    "precisions",
    "radams",
    "rmsprops",
    "sgds",
    "shapes",
    "tensors",
    "trees",
]

T = TypeVar("T")

_REAL = (torch.float32, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


def dtypes(*, half: bool = True, complex: bool = True) -> st.SearchStrategy[torch.dtype]:  # noqa: A002
    """Dtypes that a parameter may have.

    Args:
        half: Whether to draw float16 and bfloat16.
        complex: Whether to draw complex64 and complex128.

    Example:
        >>> from funcopt.testing import strategies
        >>> strategies.dtypes(half=False, complex=False)
        sampled_from((torch.float32, torch.float64))
    """
    return st.sampled_from(_REAL + (HALF if half else ()) + (_COMPLEX if complex else ()))


@st.composite
def _shapes(
    draw: st.DrawFn, min_dims: int, max_dims: int, min_side: int, max_side: int
) -> tuple[int, ...]:
    # One draw for all sides: shrinking it shrinks the shape, at a third of the cost of a list.
    dims = draw(st.integers(min_dims, max_dims))
    return tuple(draw(st.integers(min_side, max_side)) for _ in range(dims))


def shapes(
    *, min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes, from `()` up; a side of 0 makes an empty tensor.

    Args:
        min_dims: The fewest dimensions: at least 0.
        max_dims: The most dimensions.
        min_side: The smallest size of one: at least 0.
        max_side: The largest.

    Raises:
        InvalidArgument: If a bound is negative or above its counterpart.
    """
    for low, high in (("min_dims", "max_dims"), ("min_side", "max_side")):
        least, most = locals()[low], locals()[high]
        if not 0 <= least <= most:
            raise InvalidArgument(f"{low}={least}, {high}={most}: must be 0 <= {low} <= {high}.")
    return _shapes(min_dims, max_dims, min_side, max_side)


def _strategy(name: str, value: Any, kind: type[T], default: st.SearchStrategy[T]) -> Any:
    """Turn None into a default, a value into itself drawn, and leave a strategy as it is."""
    if value is None:
        return default
    if isinstance(value, st.SearchStrategy):
        return value
    if isinstance(value, kind):
        return st.just(value)
    raise InvalidArgument(f"{name}={value!r}: must be a {kind.__name__} or a strategy for one.")


def _choice(name: str, names: Sequence[str], known: Sequence[str]) -> st.SearchStrategy[str]:
    if isinstance(names, st.SearchStrategy):
        raise InvalidArgument(f"{name}={names!r}: must be names, not a strategy for one.")
    names = list(names)
    wrong = [given for given in names if given not in known]
    if wrong or not names:
        raise InvalidArgument(f"{name}={names!r}: must be some of {', '.join(known)}.")
    return st.sampled_from([given for given in known if given in names])


@st.composite
def _tensors(draw: st.DrawFn, dtype: Any, shape: Any, values: Any, layouts: Any) -> Tensor:
    return build(draw(shape), draw(dtype), draw(values), draw(layouts), draw(_SEEDS))


_SEEDS = st.integers(0, 2**16)


def tensors(
    *,
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] | None = None,
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]] | None = None,
    values: Sequence[str] = VALUES,
    layouts: Sequence[str] = LAYOUTS,
) -> st.SearchStrategy[Tensor]:
    """Tensors: all finite, of every kind of value and layout that a kernel might get wrong.

    Args:
        dtype: A dtype or a strategy for one; `dtypes()` if None.
        shape: A shape or a strategy for one; `shapes()` if None.
        values: Some of `"zeros"`, `"ones"`, `"normal"`, `"sparse"` (normal with exact zeros),
            `"tiny"` (subnormal), `"huge"`.
        layouts: Some of `"contiguous"`, `"transposed"`, `"channels_last"`, `"sliced"`,
            `"expanded"`.

    Raises:
        InvalidArgument: If an option is of the wrong type or names something unknown.

    Example:
        >>> import torch
        >>> from hypothesis import given
        >>> from funcopt.testing import strategies
        >>> @given(strategies.tensors(dtype=torch.float32))
        ... def all_are_finite(tensor):
        ...     assert tensor.isfinite().all()
        >>> all_are_finite()
    """
    if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
        raise InvalidArgument(f"dtype={dtype}: must be floating-point or complex.")
    return _tensors(
        _strategy("dtype", dtype, torch.dtype, dtypes()),
        _strategy("shape", shape, tuple, shapes()),
        _choice("values", values, VALUES),
        _choice("layouts", layouts, LAYOUTS),
    )


@st.composite
def _trees(draw: st.DrawFn, leaves: Any, min_leaves: int, max_leaves: int, nodes: Any) -> Tree:
    count = draw(st.integers(min_leaves, max_leaves))
    kinds = [draw(nodes) for _ in range(2)]
    return assemble([draw(leaves) for _ in range(count)], kinds)


def trees(
    leaves: st.SearchStrategy[Any] | None = None,
    *,
    min_leaves: int = 1,
    max_leaves: int = 4,
    nodes: Sequence[str] = NODES,
) -> st.SearchStrategy[Tree]:
    """Trees of whatever `leaves` draws, up to two nodes deep.

    Args:
        leaves: A strategy for the leaves; `tensors()` if None.
        min_leaves: The fewest leaves: at least 0.
        max_leaves: The most.
        nodes: Some of `"dict"`, `"list"`, `"tuple"`, `"leaf"` (a bare leaf, if there is just one),
            `"OrderedDict"`, `"namedtuple"`, `"unsorted dict"`, `"custom"`.

    Raises:
        InvalidArgument: If a bound is out of range or a node is unknown.
    """
    if not 0 <= min_leaves <= max_leaves:
        raise InvalidArgument(
            f"min_leaves={min_leaves}, max_leaves={max_leaves}: must be 0 <= min_leaves <= "
            f"max_leaves."
        )
    drawn = _strategy("leaves", leaves, type(None), tensors())
    return _trees(drawn, min_leaves, max_leaves, _choice("nodes", nodes, NODES))


def params(
    *,
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] | None = None,
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]] | None = None,
    min_leaves: int = 1,
    max_leaves: int = 4,
    nodes: Sequence[str] = NODES,
    values: Sequence[str] = ("zeros", "ones", "normal", "sparse"),
    layouts: Sequence[str] = ("contiguous", "transposed", "channels_last", "sliced"),
) -> st.SearchStrategy[Tree]:
    """Trees of parameters: of moderate size, and of no layout that overlaps itself.

    The options are those of `tensors` and `trees`.
    """
    leaves = tensors(dtype=dtype, shape=shape, values=values, layouts=layouts)
    return trees(leaves, min_leaves=min_leaves, max_leaves=max_leaves, nodes=nodes)


def params_for(opt: Any, **options: Any) -> st.SearchStrategy[Tree]:
    """Trees of parameters that an optimizer takes.

    They have no complex leaf if it keeps moments in 16 bits, in which there is no complex dtype, or
    if its rule is `real_only`, or that of an optimizer within it.

    Args:
        opt: The optimizer.
        options: Those of `params`.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.testing import strategies
        >>> drawn = strategies.params_for(funcopt.AdamW(moments=torch.bfloat16))
    """
    rules = [getattr(part, "rule", None) for part in optimizers_in(opt)]
    real_only = any(getattr(rule, "real_only", False) for rule in rules)
    if real_only or any(moments in HALF for moments in fields(opt, "moments")):
        options = {"dtype": dtypes(complex=False), **options}
    return params(**options)


@st.composite
def _gradients(
    draw: st.DrawFn, structure: Any, leaves: list[Tensor], values: Any, layouts: Any, none: bool
) -> Tree:
    drawn: list[Tensor | None] = []
    for leaf in leaves:
        if none and draw(st.integers(0, 4)) == 4:
            drawn.append(None)
        else:
            drawn.append(like(leaf, draw(values), draw(layouts), draw(_SEEDS)))
    return pytree.unflatten(structure, drawn)


def gradients(
    params: Tree,
    *,
    values: Sequence[str] = ("ones", "normal", "sparse", "zeros"),
    layouts: Sequence[str] = ("contiguous", "transposed", "expanded"),
    none: bool = False,
) -> st.SearchStrategy[Tree]:
    """Gradients for these parameters, in any layout.

    Args:
        params: The parameters.
        values: Kinds of values, as for `tensors`.
        layouts: Layouts, as for `tensors`; they need not be those of the parameters.
        none: Whether a leaf may have None instead.
    """
    leaves, structure = pytree.flatten(params)
    kinds = _choice("values", values, VALUES), _choice("layouts", layouts, LAYOUTS)
    return _gradients(structure, leaves, *kinds, none)


def gradient_sequences(
    params: Tree,
    steps: int | st.SearchStrategy[int] = 2,
    *,
    values: Sequence[str] = ("ones", "normal", "sparse", "zeros"),
    layouts: Sequence[str] = ("contiguous", "transposed", "expanded"),
    none: bool = False,
) -> st.SearchStrategy[list[Tree]]:
    """Lists of gradients, one for each update: `steps` of them, which may be drawn, at least 1.

    The other arguments are those of `gradients`.

    Raises:
        InvalidArgument: If `steps` is less than 1.
    """
    if isinstance(steps, int) and steps < 1:
        raise InvalidArgument(f"steps={steps}: must be at least 1.")
    count: st.SearchStrategy[int] = _strategy("steps", steps, int, st.just(2))
    one = gradients(params, values=values, layouts=layouts, none=none)
    return count.flatmap(lambda n: st.lists(one, min_size=n, max_size=n))
