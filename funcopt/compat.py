"""funcopt's optimizers behind the calls of optax and of TorchOpt, for libraries that take theirs.

Both have a pair of functions: `init(params)`, and `update(grads, state, params)`, which returns
what is to be added to the parameters. An optimizer here returns the new parameters themselves, so
an update is made of their difference:

    >>> import torch, funcopt
    >>> from funcopt import compat
    >>> opt = compat.as_optax(funcopt.SGD(lr=0.5))
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> updates, state = opt.update({"w": torch.tensor([1.0, -1.0])}, opt.init(params), params)
    >>> updates
    {'w': tensor([-0.5000,  0.5000])}
    >>> compat.apply_updates(params, updates)
    {'w': tensor([0.5000, 2.5000])}

**How near the sum is to the new parameters.** For each update there is a note of the parameter that
it leads to, which is in memory as long as the update. `apply_updates` here takes that one, and so
gives every bit of it, if the update is the very tensor that `update` returned, not changed since,
and the parameter the one that was given.

Whoever adds the two, as `apply_updates` of TorchOpt does, has every bit where a parameter keeps its
sign and changes by a factor of 2 at the most, and where it does not change: there neither the
difference nor the sum is rounded. Elsewhere both are rounded, and the sum is off by at most
`eps / 2 * (|new - old| + |new|)`, with `eps` of the dtype. So a parameter that comes close to zero
in one step from far away is right as measured by where it came from. No update could be added to
make it exact: there may be none in the dtype. The same sum is made beneath vmap, grad and compile,
where no tensor outlives its transform, and of updates that were changed in between.

A TorchOpt optimizer changes updates and state in place if told `inplace=True`. Here both are always
new, so that it takes the state that is returned to go on.

**What stands for what of optax.** Where its chains put small transforms one after another, here a
wrapper is around an optimizer: `chain(clip_by_global_norm(1.0), adamw(lr))` is
`Clip(AdamW(lr), 1.0)`.

| optax | funcopt |
|---|---|
| `adam`, `amsgrad`, `scale_by_adam`, `scale_by_amsgrad` | `Adam`, with `amsgrad=True` |
| `adamw` | `AdamW`; for its mask, a tree of numbers as `weight_decay=` |
| `nadam` | `Adam(nesterov=True)` |
| `adafactor`, `contrib.muon` | `Adafactor`, `Muon`, with the equations and defaults of torch |
| `adagrad`, `radam`, `rmsprop` | `Adagrad`, `RAdam`, `RMSprop`, likewise |
| `adadelta`, `adamax`, `rprop` | `pure(torch.optim.Adadelta)`, and so on, likewise |
| `sgd`, `trace` | `SGD`, with `momentum=` and `nesterov=` |
| `lion`, `scale_by_lion` | `Lion` |
| `sign_sgd`, `scale_by_sign`, `centralize`, `add_noise`, `noisy_sgd` | `Transform`: the examples |
| `signum` | the example of `extend` |
| `stateless`, `stateless_with_tree_map`, `zero_nans`, `scale`, `clip_by_block_rms` | `Transform` |
| `chain`, `named_chain`, `identity` | wrappers, one in another |
| `add_decayed_weights` | `weight_decay=` |
| `scale_by_learning_rate`, `scale_by_schedule` | `lr=`, a number, tensor or schedule |
| `inject_hyperparams`, `inject_stateful_hyperparams` | tensors for numbers, and `replace` |
| `clip` | `ClipValue` |
| `clip_by_global_norm` | `Clip` |
| `adaptive_grad_clip` | `ClipAdaptive` |
| `apply_every`, `MultiSteps` | `Accumulate` |
| `apply_if_finite`, `skip_not_finite` | `SkipNonfinite` |
| `conditionally_transform`, `conditionally_mask`, `skip_large_updates` | `active=` of an update |
| `ema` | `Ema`, of the parameters; of gradients, `SGD` with `momentum=` and `dampening=` |
| `lookahead` | `Lookahead` |
| `masked`, `partition`, `multi_transform`, `selective_transform` | `Partition` |
| `set_to_zero`, `freeze` | `Frozen` |
| `monitor`, `measure_with_ema`, `snapshot` | the state has names: `find` |
| `flatten` | what is elementwise goes through all leaves at once anyway |
| `with_extra_args_support` | `active=` and `value=` of an update |
| `contrib.reduce_on_plateau` | `Plateau` |
| `contrib.schedule_free` | `ScheduleFree` |
| `contrib.schedule_free_sgd`, `contrib.schedule_free_adamw` | `ScheduleFree(SGD(lr))`, of `Adam` |
| `contrib.schedule_free_eval_params` | `averaged` |
| `contrib.split_real_and_imaginary` | nothing: complex leaves are pairs of real numbers here |

**What is not here.** Each of the following, and the `scale_by` transform that it is made of, would
be a rule of one's own, as `extend` shows: `adabelief`, `adamaxw`, `adan`, `fromage`,
`lamb`, `lars`, `nadamw`, `novograd`, `optimistic_adam`, `optimistic_adam_v2`,
`optimistic_gradient_descent`, `sm3`, `yogi`, `contrib.acprop`, `contrib.ademamix`,
`contrib.simplified_ademamix`, `contrib.adopt`, `contrib.cocob`, `contrib.galore`, `contrib.madgrad`
and `contrib.normalize`. What changes the update of an optimizer would be a wrapper of one's own:
`normalize_by_update_norm`, `scale_by_trust_ratio`, `scale_by_param_block_norm`,
`scale_by_param_block_rms`, `keep_params_nonnegative`. Of what searches for a learning rate or
evaluates the loss, nothing is here: `lbfgs`, `polyak_sgd`, `scale_by_distance_over_gradients`,
`scale_by_zoom_linesearch`, `scale_by_backtracking_linesearch`, `contrib.dadapt_adamw`,
`contrib.dog`, `contrib.dowg`, `contrib.mechanize`, `contrib.momo`, `contrib.momo_adam`,
`contrib.prodigy`, `contrib.sam`, `contrib.sophia`, `contrib.hutchinson_estimator_diag_hessian`. For
`contrib.dpsgd`, `contrib.differentially_private_aggregate`, `per_example_global_norm_clip` and
`per_example_layer_norm_clip`, a `vmap` of `grad` gives the gradients of each example.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._core import pytree, transforms
from ._core.inner import OptimizerLike
from ._core.types import ParamsT, Tree, check_is_optimizer, kind_of
from ._engine.prepare import keep_requiring

__all__ = ["GradientTransformation", "apply_updates", "as_optax", "as_torchopt"]


class GradientTransformation(NamedTuple):
    """A pair of pure functions, as optax and TorchOpt have it.

    Attributes:
        init: `init(params)` returns the state before the first update.
        update: `update(grads, state, params)` returns the updates, to be added to the parameters,
            and the new state. The parameters may be given by name, as with TorchOpt; they must be
            given. What `update` of an optimizer here may be told besides, such as `value=`, is
            handed on. `inplace=` is taken, and changes nothing.
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


class _Goal(NamedTuple):
    """Where an update leads."""

    new: Tensor
    old: Tensor
    versions: tuple[int, ...]  # of these and of the update, when it was made


# By the update, as long as there is one. In an attribute it would be saved with the update.
_goals: MutableMapping[Tensor, _Goal] = WeakTensorKeyDictionary()


def as_optax(opt: OptimizerLike[Any]) -> GradientTransformation:
    """Return an optimizer as a pair of functions, called as optax's and TorchOpt's are.

    Args:
        opt: The optimizer, with wrappers and schedules as it may have.

    Returns:
        The pair. Its updates are trees like the gradients, with 0 for a leaf without one, and None
        for a leaf at rest (as under `Frozen`) that is no tensor.

    Raises:
        TypeError: If `opt` is no optimizer. An update raises one if no parameters are given.

    Example:
        >>> import torch, funcopt
        >>> from funcopt import compat
        >>> opt = compat.as_optax(funcopt.Clip(funcopt.AdamW(lr=1e-3), max_norm=1.0))
        >>> params = torch.ones(2)
        >>> state = opt.init(params)
        >>> updates, state = opt.update(torch.ones(2), state, params)
    """
    check_is_optimizer("opt", opt)

    def update(grads: Tree, state: Any, params: Tree = None, **extras: Any) -> tuple[Tree, Any]:
        extras.pop("inplace", None)
        if params is None:
            raise TypeError(
                f"no params: {type(opt).__name__} needs the parameters, of which its updates are "
                f"the difference. Call update(grads, state, params), or with params=params."
            )
        new_params, new_state = opt.update(grads, state, params, **extras)
        return _difference(new_params, params, grads), new_state

    return GradientTransformation(opt.init, update)


def as_torchopt(opt: OptimizerLike[Any]) -> Any:
    """Return an optimizer as TorchOpt's functional ones are, such as `torchopt.adam()`.

    If TorchOpt is installed, it is a `torchopt.base.GradientTransformation`, which
    `torchopt.FuncOptimizer`, `torchopt.Optimizer` and `torchopt.MetaOptimizer` ask for; else a
    `GradientTransformation` with the same functions, which is enough for whoever only calls them.

    Args:
        opt: The optimizer.

    Raises:
        TypeError: As `as_optax`.

    Example:
        >>> import torch, funcopt
        >>> from funcopt import compat
        >>> opt, params = compat.as_torchopt(funcopt.SGD(lr=0.5)), (torch.ones(2),)
        >>> opt.update((torch.ones(2),), opt.init(params), params=params, inplace=False)[0]
        (tensor([-0.5000, -0.5000]),)
    """
    pair = as_optax(opt)
    try:
        theirs = importlib.import_module("torchopt.base")
    except ImportError:
        return pair
    return theirs.GradientTransformation(*pair)


def apply_updates(params: ParamsT, updates: Tree) -> ParamsT:
    """Return the parameters after updates, to the bit as the optimizer made them if it can be.

    See the text of `funcopt.compat`. The result is new, in the dtype of the parameter. Where an
    update has no history, nor has the result; it requires a gradient if the parameter does.

    Args:
        params: The parameters. They are not changed.
        updates: What `update` returned: a tree with the same keys, also with None, which leaves a
            parameter as it is.

    Raises:
        TypeError: If an update, or what it is added to, is no tensor.
        ValueError: If the trees do not match, or the shapes of a parameter and its update.

    Example:
        >>> import torch
        >>> from funcopt import compat
        >>> compat.apply_updates({"w": torch.ones(2)}, {"w": torch.full((2,), -0.5)})
        {'w': tensor([0.5000, 0.5000])}
    """
    olds, structure = pytree.flatten(params)
    found = pytree.pair(updates, "updates", structure).leaves
    _check_updates(olds, found, structure)
    news = [_applied(old, update) for old, update in zip(olds, found, strict=True)]
    result: ParamsT = pytree.unflatten(structure, news)
    return result


def _difference(new_params: Tree, params: Tree, grads: Tree) -> Tree:
    """Return what is to be added to parameters: a tree like the gradients, if none is missing."""
    olds, structure = pytree.flatten(params)
    news = pytree.pair(new_params, "new_params", structure).leaves
    updates = [_update(old, new) for old, new in zip(olds, news, strict=True)]
    if len(pytree.flatten(grads)[0]) == len(updates):
        return pytree.pair(grads, "grads", structure).rebuild(updates)
    return pytree.unflatten(structure, updates)


def _update(old: Any, new: Any) -> Any:
    """Return what is to be added to a parameter: where it does not change, a 0 that keeps -0."""
    if not isinstance(old, Tensor):
        return None
    if not (old.is_floating_point() or old.is_complex()):  # at rest
        return torch.zeros_like(old)
    if transforms.transformed() or (new.requires_grad and not new.is_leaf):
        return -(old - new)
    update = _plain_update(old, new)
    if _is_followed(old, new, update):
        _goals[update] = _Goal(new, old, _versions(new, old, update))
    return update


@torch.no_grad()
def _plain_update(old: Tensor, new: Tensor) -> Tensor:
    update = -(old - new)
    if old.is_complex():
        return update
    return update.masked_fill(new == old, -0.0)  # also where infinity less infinity would be NaN


def _is_followed(*tensors: Tensor) -> bool:
    """Whether it will be seen if a tensor is written to."""
    if transforms.tracing() or not transforms.all_plain(tensors):
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def _still_leads(update: Tensor, goal: _Goal, old: Tensor) -> bool:
    return goal.old is old and goal.versions == _versions(goal.new, old, update)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


@torch.no_grad()
def _with_bits_of(sums: Tensor, update: Tensor, goal: _Goal) -> Tensor:
    """Return the new parameter, where an update still is the one that leads there, else the sum.

    What is written by way of `.data` or of numpy is seen by no count of versions.
    """
    leads = _bits(update) == _bits(_plain_update(goal.old, goal.new))
    if sums.is_complex():
        leads = leads.all(-1)
    return torch.where(leads, goal.new, sums)


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.contiguous().view(_WORDS[real.element_size()])


def _check_updates(olds: Sequence[Any], updates: Sequence[Any], structure: Any) -> None:
    """Refuse what cannot be added without broadcasting."""
    for index, (old, update) in enumerate(zip(olds, updates, strict=True)):
        if update is None:
            continue
        for root, own in (("params", old), ("updates", update)):
            if not isinstance(own, Tensor):
                raise TypeError(
                    f"{pytree.path(structure, root, index)} is {kind_of(own)}: it must be a "
                    f"tensor. None for an update leaves a parameter as it is."
                )
        if old.shape != update.shape:
            raise ValueError(
                f"{pytree.path(structure, 'updates', index)}: shape {tuple(update.shape)}, the "
                f"parameter has {tuple(old.shape)}. Nothing is broadcast: give both the same shape."
            )


def _applied(old: Any, update: Any) -> Any:
    """Return a parameter after an update."""
    if update is None:
        return old
    goal = None if transforms.tracing() else _goals.get(update)
    with torch.set_grad_enabled(
        torch.is_grad_enabled() and (transforms.transformed() or update.requires_grad)
    ):
        new = (old + update).to(old.dtype)
    if goal is not None and _still_leads(update, goal, old):
        new = _with_bits_of(new, update, goal)
    keep_requiring([new], [old])
    return new
