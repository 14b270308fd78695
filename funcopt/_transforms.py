"""Who is watching: the one place that knows torch's transforms, tracers and modes.

Each question is asked of torch's dispatcher as a whole, never of a tensor, so the answers cost well
under a microsecond and hold for every tensor of the step. The functorch queries are private to
torch, which has no public ones; all of them live here. Where torch no longer had one, the answer
falls on the safe side: plain operators, which are right everywhere and only slower.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "all_plain",
    "compiling",
    "forward_mode",
    "tracing",
    "transformed",
    "watched_by_operator",
]

try:
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    _RULED: set[TransformType] | None = {TransformType.Vmap, TransformType.Grad}
except ImportError:  # pragma: no cover
    _RULED = None


def compiling() -> bool:
    """Whether this very Python code is being compiled or exported."""
    return torch.compiler.is_compiling()


def tracing() -> bool:
    """Whether operators are being recorded, so that no tensor's value may be read."""
    return (
        compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def transformed() -> bool:
    """Whether any transform of `torch.func` is under way (vmap, grad, jvp, functionalize, ...)."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether a forward-mode derivative is under way, in `torch.func` or in plain autograd."""
    return forward_ad._current_level >= 0


def watched_by_operator() -> bool:
    """Whether the step must be spelt out in plain operators.

    True for tracers, which would record a fused call or a constant in place of the equations, and
    for forward-mode derivatives and functionalize, which know no rule for a step as a whole. False
    in plain eager code and under vmap and reverse-mode grad, for which there is such a rule.
    """
    if tracing() or forward_mode():
        return True
    if not transformed():
        return False
    if _RULED is None:  # pragma: no cover
        return True
    return any(level.key() not in _RULED for level in retrieve_all_functorch_interpreters())


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are just tensors: no fake, sharded or otherwise overriding subclass."""
    return _PLAIN.issuperset(map(type, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
