"""Agreement with other ways to the same numbers: kernels, torch, an oracle, a compiler."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._core import pytree
from ..._core.types import Tree, optimizers_in, own_traits, traits_of
from ...interop._counterparts import COUNTERPARTS, counterpart_of
from ...wrappers.cautious import Cautious
from ...wrappers.compensated import Compensated
from .._compare import EXACT, ROUNDING, NotApplicable, compare, compare_moved
from .._subject import (
    cast,
    fields,
    kernels,
    leaves_of,
    other_than,
    replace,
    rounded,
    run,
    tree_map,
    with_moments_of_params,
)
from ..oracles import Oracle, own_update, registered


def kernels_agree(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Every kernel takes the same step, to a few ulp."""
    serving = kernels(opt, params)
    for step in run(opt, params, gradient_sequence):
        for name in serving:
            moved = replace(opt, kernel=name).update(*step.given)
            law, before = f"kernels_agree (kernel={name!r})", (step.params, step.state)
            compare_moved(law, step.number, moved, step.moved, ROUNDING, before)


_TORCH_FLAGS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def matches_torch(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Each kernel gives the bits of torch.optim on the CPU in float32 and float64."""
    kind = counterpart_of(opt)
    if kind is None:
        ours = [own.ours for own in COUNTERPARTS]
        names = ", ".join(own.__name__ for own in ours)
        raise NotApplicable(f"it holds for {names}, and {other_than(opt, ours)}")
    if kind.beyond(opt):
        raise NotApplicable(f"torch.optim has no counterpart of {type(opt).__name__} as it is")
    if any(not isinstance(number, float) for number in opt.rule.hyperparams_of(opt)):
        raise NotApplicable("torch.optim takes its bits from Python numbers")
    if opt.moments not in ("auto", None):
        raise NotApplicable("torch.optim keeps moments in the dtype of the parameter")
    dtypes = (torch.float32, torch.float64)
    chosen = [i for i, leaf in enumerate(pytree.flatten(params)[0]) if leaf.dtype in dtypes]

    def pick(tree: Tree) -> list[Any]:
        leaves = pytree.pair(tree, "grads", pytree.flatten(params)[1]).leaves
        # In one layout: torch's fused kernel goes wrong where gradient and parameter differ in it.
        return [None if leaves[i] is None else leaves[i].contiguous() for i in chosen]

    if not kind.alike:
        raise NotApplicable(f"torch's {type(opt).__name__} rounds otherwise")
    for kernel in kind.alike:
        flags = {name: on for name, on in _TORCH_FLAGS[kernel].items() if name in kind.flags}
        ours = replace(opt, kernel=kernel, step_per_leaf=True)
        theirs = [torch.nn.Parameter(leaf.detach().clone()) for leaf in pick(params)]
        if not theirs:
            raise NotApplicable("there is no leaf in float32 or float64")
        options: dict[str, Any] = {name: getattr(opt, name) for name in kind.fields}
        torchs = kind.torch(theirs, **{**options, **flags})
        for step in run(ours, pick(params), [pick(grads) for grads in gradient_sequence]):
            for parameter, grad in zip(theirs, step.grads, strict=True):
                parameter.grad = None if grad is None else grad.clone()
            torchs.step()
            law = f"matches_torch (kernel={kernel!r})"
            detached = [parameter.detach() for parameter in theirs]
            compare(law, step.number, "params", step.new_params, detached, EXACT)


def matches_oracle(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Each step is its oracle's, rounded to the dtype of the leaf, if one is registered for it.

    The oracle takes each step in float64 from what the optimizer stored, so that what is compared
    is one step's rounding, not what rounding grows into.
    """
    oracle = registered(opt)
    if oracle is None:
        raise NotApplicable(f"no oracle is registered for {type(opt).__name__}")
    _matches("matches_oracle", oracle, opt, params, gradient_sequence)


def agrees_with_itself_in_float64(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Each step is the one that the optimizer itself takes in float64, rounded.

    It says nothing of where a step should lead, but that no more is lost on the way there than the
    dtype of the leaf takes.
    """

    def in_float64(opt: Any, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        return own_update(with_moments_of_params(opt), grads, state, params)

    _matches("agrees_with_itself_in_float64", in_float64, opt, params, gradient_sequence)


def _matches(
    law: str, oracle: Oracle, opt: Any, params: Tree, gradient_sequence: list[Tree]
) -> None:
    # A norm over all leaves brings the rounding of the coarsest to each.
    coarse = any(leaf.dtype not in _DOUBLE for leaf in leaves_of(params))
    coupled = coarse and not traits_of(opt).leafwise
    if fields(opt, "debias") and any(leaf.itemsize == 2 for leaf in leaves_of(params)):
        raise NotApplicable("its average is wider than the rounded parameters that are averaged")
    if any(isinstance(part, Cautious) for part in optimizers_in(opt)):
        raise NotApplicable("a rounding may decide which elements it holds back")
    if _is_compensated(opt) and any(leaf.itemsize == 2 for leaf in leaves_of(params)):
        raise NotApplicable("in float64 it has no compensation, and moves the parameters alone")
    # Moments in float32 are those of gradients that a wrapper has rounded to 16 bits.
    halves = sorted((p.dtype for p in leaves_of(params) if p.itemsize == 2), key=str)
    for step in run(opt, params, gradient_sequence):
        exact = oracle(opt, *(cast(tree, torch.float64) for tree in step.given))
        trees = step.moved, rounded(exact, step.moved)
        if coupled:
            trees = tree_map(_narrowed, trees)
        if halves and not own_traits(opt).by_rule:
            trees = tree_map(partial(_in_16_bits, halves[0]), trees)
        compare_moved(law, step.number, *trees, ROUNDING, (step.params, step.state))


def _is_compensated(opt: Any) -> bool:
    return any(isinstance(part, Compensated) for part in optimizers_in(opt))


_DOUBLE = torch.float64, torch.complex128


def _in_16_bits(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """A tensor in 16 bits, if it is real and in float32."""
    return tensor.to(dtype) if tensor.dtype is torch.float32 else tensor


def _narrowed(tensor: Tensor) -> Tensor:
    """A tensor in float32, if it is in float64."""
    if tensor.dtype not in _DOUBLE:
        return tensor
    return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)


def compiles_once(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """One compiled graph serves every step, and gives what eager execution gives."""
    compiler: Any = torch.compiler  # typed in part
    compiler.reset()
    step_once: Any = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    # The counts of two steps at least, or a constant in the graph would go unnoticed.
    sequence = (gradient_sequence * 3)[: max(3, len(gradient_sequence))]
    try:
        for step in run(opt, params, sequence):
            # In one layout, since another one rightly compiles anew; and without history, likewise.
            grads, state, params = tree_map(_plain_layout, step.given)
            expected = opt.update(grads, state, params)
            result = step_once(grads, state, params)
            compiler.set_stance("fail_on_recompile")
            before = params, state
            compare_moved("compiles_once", step.number, result, expected, ROUNDING, before)
    finally:
        compiler.set_stance("default")


def _plain_layout(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
