"""Muon: the optimizer as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch

from .._core import pytree
from .._core.types import (
    Extras,
    Number,
    NumberTree,
    ParamsT,
    Schedule,
    Tree,
)
from .._engine.hyperparameters import check_choice
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer
from .._engine.rule import UpdateRule
from .._engine.update import update, update_
from ._muon import RULE, MuonState, check_matrices, on_matrices

# By the rule of torch: more make no sense, and a learning rate put here would be noticed.
_MOST_STEPS = 99
_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)


@register_optimizer
@dataclass(frozen=True)
class Muon:
    r"""Momentum made nearly orthogonal: an optimizer for the matrices of hidden layers.

    With gradient $g_t$, learning rate $\eta$, weight decay $\lambda$ and momentum $\mu$,

    $$ b_t = \mu\,b_{t-1} + (1 - \mu)\,g_t, \qquad
       d_t = \mu\,b_t + (1 - \mu)\,g_t \quad (\text{without nesterov } d_t = b_t), $$

    $$ \theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \eta\,r\,\operatorname{NS}(d_t). $$

    $\operatorname{NS}(d)$ has the singular vectors of $d$, and singular values near 1 in place of
    its own. It is made by `ns_steps` Newton-Schulz iterations of $X = d / \lVert d \rVert$:

    $$ X \leftarrow a X + b\,(X X^\top) X + c\,(X X^\top)^2 X. $$

    $r$ depends on the shape, $A$ rows and $B$ columns: it is $\sqrt{\max(1, A/B)}$, or, so that a
    learning rate of AdamW serves, $0.2 \sqrt{\max(A, B)}$.

    Every leaf must have two or more dimensions. One of more is seen as one matrix, of as many rows
    as its first dimension has, as suits the filters of a convolution; or as a stack of matrices in
    its last two. Vectors and scalars, and by experience embeddings and the last layer too, want
    another optimizer: a `Partition` by `muon_label` gives them one, as below. A `Muon` is a frozen
    value and a pytree, as `AdamW` is: map over it with vmap, differentiate with respect to it,
    also through the iterations.

    From Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024), with the
    ratio of Liu et al., *Muon is Scalable for LLM Training* (2025). In float32 and float64 the bits
    are those of `torch.optim.Muon`, which takes matrices alone. 16-bit leaves are computed in
    float32, where torch in bfloat16 without Nesterov writes into its own buffer what is meant for
    the parameter. Where nobody follows operators, matrices of one shape are stacked, and on the CPU
    a symmetric product is made by its half: there only where that was found to leave every bit as
    it is, on other devices always. `kernel="plain"` makes each matrix by itself.

    DTensors are served with the same numbers, though a matrix is seen whole: each is made by one of
    the processes that have its parts, which are shared out by what they cost. A process sends its
    parts of the directions, in `ns_dtype` if that is not float16, and gets back its parts of what
    they come to, by one all-to-all each way; what is whole on every process is made on every one,
    and not sent. A leaf that is cut along several dimensions of a mesh is gathered by all.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        weight_decay: At least 0, multiplied by the learning rate; likewise, so that it may have a
            schedule of its own.
        momentum: At least 0 and below 1; likewise.
        nesterov: Look ahead by the momentum.
        ns_coefficients: $a$, $b$ and $c$: finite; each likewise.
        eps: The least that a matrix is divided by in place of its norm: above 0; likewise.
        ns_steps: How many iterations to make: from 1 to 99.
        adjust_lr_fn: `"original"` or None for the first $r$, `"match_rms_adamw"` for the second.
        ns_dtype: The dtype of the iterations: `torch.bfloat16`, as in torch, another one, or None
            for that of the leaf (float32 for one in 16 bits). A matrix is divided by its norm in
            this dtype, as in torch; for `torch.float16`, which has no room for squares, before.
        matrices: `"flatten"` sees a leaf of more than two dimensions as one matrix, `"stack"` as
            one for each index of all but the last two dimensions.
        gram: Make most of the iterations on the Gram matrix $X X^\top$, which takes about half the
            products for matrices of four times as many columns as rows, or the reverse. Those that
            are less than one and a half times as long as wide are iterated as without. On the CPU
            in bfloat16, all products are made by the compiled extension where it is faster than
            torch, of symmetric ones a half: on processors that have AVX-512 with bfloat16 and no
            matrix registers, and by far on those with AVX2 alone, where torch has no fast product
            of bfloat16. It is another rounding of the same: not torch's bits, nor those of another
            kernel or kind of processor.
        step_per_leaf: Count the updates of each leaf; a schedule then sees each leaf's own count.
            Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"batched"` and `"plain"`
            name one. Tracers, transforms and derivatives always see plain operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the momentum, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> params = {"embed": torch.ones(8, 4), "w": torch.eye(2, 3), "b": torch.zeros(2)}
        >>> opt = funcopt.Partition(
        ...     {"muon": funcopt.Muon(lr=0.02), "adamw": funcopt.AdamW(lr=3e-4)},
        ...     labels=funcopt.muon_label,
        ... )
        >>> state = opt.init(params)
        >>> list(state.inner["muon"].momentum_buffer), list(state.inner["adamw"].exp_avg)
        (['w'], ['embed', 'b'])
    """

    rule: ClassVar[UpdateRule] = RULE

    lr: Number | Schedule | NumberTree = 1e-3
    weight_decay: Number | Schedule | NumberTree = 0.1
    momentum: Number | Schedule | NumberTree = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[Number | Schedule, Number | Schedule, Number | Schedule] = (
        3.4445,
        -4.775,
        2.0315,
    )
    eps: Number | Schedule | NumberTree = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None
    ns_dtype: torch.dtype | None = torch.bfloat16
    matrices: str = "flatten"
    gram: bool = False
    step_per_leaf: bool = False
    kernel: str = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | str | None = "auto"

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        steps = self.ns_steps
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"ns_steps={steps!r}: must be a whole number, such as 5.")
        if not 1 <= steps <= _MOST_STEPS:
            raise ValueError(f"ns_steps={steps}: must be at least 1 and at most {_MOST_STEPS}.")
        if self.adjust_lr_fn is not None:
            check_choice("adjust_lr_fn", self.adjust_lr_fn, ("original", "match_rms_adamw"))
        check_choice("matrices", self.matrices, ("flatten", "stack"))
        if self.ns_dtype not in _DTYPES:
            kinds = ", ".join(map(str, _DTYPES))
            raise ValueError(f"ns_dtype={self.ns_dtype!r}: must be one of {kinds}.")
        check_fields(self)

    def init(self, params: Tree) -> MuonState:
        """Return the state before the first update: zeros.

        Raises:
            TypeError: If a leaf is complex.
            ValueError: If a leaf has fewer than two dimensions.
        """
        check_matrices(*pytree.flatten(params))
        state: MuonState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: MuonState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, MuonState]:
        """Return the new parameters and the new state, in fresh memory.

        Raises:
            TypeError: If a leaf is complex.
            ValueError: If a leaf has fewer than two dimensions.
        """
        moved: tuple[ParamsT, MuonState] = on_matrices(update, self, grads, state, params)
        return moved

    def update_(
        self, grads: Tree, state: MuonState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, MuonState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        moved: tuple[ParamsT, MuonState] = on_matrices(update_, self, grads, state, params)
        return moved
