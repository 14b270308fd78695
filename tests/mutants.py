"""Planted defects: patches of the real code, each with a law that must catch it.

`python -m tests.mutants` holds every mutant to every law and writes the table `tests/MUTANTS.md`;
with `--new`, only those that have no row there, and to laws that have no column.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from funcopt import AdamW
from funcopt._core import pytree, transforms
from funcopt._engine import autograd, checks, dispatch, memory, prepare, rounding
from funcopt._engine import kernels as list_kernels
from funcopt._engine import update as engine
from funcopt.optimizers import adamw
from funcopt.optimizers._adam import adjoint
from funcopt.testing import laws
from funcopt.testing._check import check_law
from funcopt.testing._subject import leaves_of, tree_map

# The optimizer that the defects are planted in: nothing about it is a default.
SUBJECT = AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, amsgrad=True)

# The same with rounding by chance, in plain operators, which can be patched.
BY_CHANCE = dataclasses.replace(SUBJECT, rounding="stochastic", seed=5, kernel="plain")
# With a memory so long that 16 bits cannot hold it.
LONG = dataclasses.replace(SUBJECT, betas=(0.9, 0.999))


def reference(subject: AdamW) -> Callable[[Any], torch.optim.Optimizer]:
    """Return how to make what a subject must equal: torch's own."""
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad")
    options = {name: getattr(subject, name) for name in names}
    return lambda params: torch.optim.AdamW(params, **options)


Patch = pytest.MonkeyPatch


class Mutant(NamedTuple):
    name: str
    plant: Callable[[Patch], None]
    law: Callable[..., None]
    subject: AdamW


MUTANTS: list[Mutant] = []


def caught_by(law: Callable[..., None], subject: AdamW = SUBJECT) -> Callable[..., Any]:
    """Add a mutant named after its function, which plants it in a subject."""

    def add(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(plant.__name__.replace("_", " "), plant, law, subject))
        return plant

    return add


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    with Patch.context() as patch:
        patch.setattr(memory, "_recent", ())  # a defect neither finds nor leaves what is known
        mutant.plant(patch)
        yield


def wrap(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(original, *arguments)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def after_update(patch: Patch, change: Callable[..., Any]) -> None:
    """Change what `update` returns: `change(params, state, given)` with what it was given."""

    def changed(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        return change(*original(opt, grads, state, params), (opt, grads, state, params))

    around_update(patch, changed)


def around_update(patch: Patch, change: Callable[..., Any]) -> None:
    """Replace the update by `change(original, opt, grads, state, params)` with its extras."""

    def changed(original: Any, *given: Any, **extras: Any) -> Any:
        return change(functools.partial(original, **extras), *given)

    wrap(patch, AdamW, "update", changed)


def number(patch: Patch, name: str, change: Callable[[Any, AdamW], Any]) -> None:
    """Change a hyperparameter on its way to the kernel."""

    def changed(own: Any, opt: AdamW) -> Any:
        return own._replace(**{name: change(getattr(own, name), opt)})

    numbers(patch, changed)


def numbers(patch: Patch, change: Callable[[Any, AdamW], Any]) -> None:
    """Change the numbers of a step on their way to the kernel."""

    def changed(original: Any, rule: Any, opt: AdamW, *given: Any) -> list[Any]:
        return [change(own, opt) for own in original(rule, opt, *given)]

    wrap(patch, engine, "numbers_at", changed)


# What goes in and comes out.


@caught_by(laws.never_mutates)
def writes_into_the_parameters(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        for old, new in zip(leaves_of(given[3]), leaves_of(params), strict=True):
            old.copy_(new)
        return params, state

    after_update(patch, change)


@caught_by(laws.never_mutates)
def negates_the_gradients_in_place(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        if opt.maximize:
            return original(opt, grads, state, params)
        for grad in leaves_of(grads):
            if 0 not in grad.stride():
                grad.mul_(0.5)
        return original(opt, grads, state, params)

    around_update(patch, change)


@caught_by(laws.never_mutates)
def counts_in_place(patch: Patch) -> None:
    patch.setattr(prepare.Counts, "after", lambda own, *_: [count.add_(1) for count in own.tensors])


@caught_by(laws.outputs_share_no_memory)
def returns_one_tensor_for_two_moments_that_are_equal(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        means, squares = leaves_of(state.exp_avg), leaves_of(state.exp_avg_sq)
        shared = [m if torch.equal(m, s) else s for m, s in zip(means, squares, strict=True)]
        structure = pytree.flatten(state.exp_avg_sq)[1]
        return params, state._replace(exp_avg_sq=pytree.unflatten(structure, shared))

    after_update(patch, change)


@caught_by(laws.outputs_share_no_memory)
def returns_the_count_it_was_given_where_nothing_moved(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        still = all(not grad.any() for grad in leaves_of(given[1]))
        return params, state._replace(exp_avg_sq=given[2].exp_avg_sq) if still else state

    after_update(patch, change)


@caught_by(laws.state_keeps_no_history)
def moments_have_the_history_of_the_parameters(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        news, structure = pytree.flatten(state.exp_avg)
        olds = pytree.flatten(given[3])[0]
        follow = [new + (0 * old).to(new.dtype) for new, old in zip(news, olds, strict=True)]
        return params, state._replace(exp_avg=pytree.unflatten(structure, follow))

    after_update(patch, change)


@caught_by(laws.deterministic)
def adds_noise(patch: Patch) -> None:
    after_update(
        patch,
        lambda params, state, _: (tree_map(lambda p: p + 1e-3 * torch.rand_like(p), params), state),
    )


@caught_by(laws.deterministic)
def counts_outside_of_the_state(patch: Patch) -> None:
    calls = []

    def change(own: Any, opt: AdamW) -> Any:
        calls.append(1)
        return own._replace(step=torch.tensor(float(len(calls))))

    numbers(patch, change)


@caught_by(laws.keeps_structure)
def keeps_moments_in_float32_whatever_the_parameter(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        return params, state._replace(
            exp_avg=tree_map(lambda m: m if m.is_complex() else m.float(), state.exp_avg)
        )

    after_update(patch, change)


@caught_by(laws.keeps_structure)
def returns_everything_contiguous(patch: Patch) -> None:
    after_update(patch, lambda params, state, _: (tree_map(Tensor.contiguous, params), state))


@caught_by(laws.keeps_structure)
def returns_dicts_sorted(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        return dict(sorted(params.items())) if type(params) is dict else list(params), state

    after_update(patch, change)


@caught_by(laws.inplace_is_pure)
def update_in_place_forgets_the_moments(patch: Patch) -> None:
    def update_(opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        for old, new in zip(
            leaves_of(params), leaves_of(opt.update(grads, state, params)[0]), strict=True
        ):
            old.copy_(new)
        return params, state

    patch.setattr(AdamW, "update_", update_)


@caught_by(laws.inplace_is_pure)
def update_in_place_is_not_in_place(patch: Patch) -> None:
    patch.setattr(AdamW, "update_", AdamW.update)


@caught_by(laws.round_trips)
def remembers_which_tensor_it_made(patch: Patch) -> None:
    made = []

    def change(params: Any, state: Any, given: Any) -> Any:
        known = any(given[2].step is step for step in made)
        made.append(state.step)
        return tree_map(lambda p: p + (0.5 if known else 0.0), params), state

    after_update(patch, change)


@caught_by(laws.bad_trees_raise)
def pairs_trees_by_position(patch: Patch) -> None:
    def pair(tree: Any, root: str, structure: Any) -> Any:
        return pytree.Paired(*pytree.flatten(tree), None)

    patch.setattr(prepare.pytree, "pair", pair)


@caught_by(laws.missing_gradients_leave_others_alone)
def gradients_that_there_are_go_to_the_first_leaves(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        structure = pytree.flatten(params)[1]
        leaves = pytree.pair(grads, "grads", structure).leaves
        found = [leaf for leaf in leaves if leaf is not None]
        found += [None] * (len(leaves) - len(found))
        return original(opt, pytree.unflatten(structure, found), state, params)

    around_update(patch, change)


@caught_by(laws.bad_trees_raise)
def broadcasts_gradients(patch: Patch) -> None:
    def change(original: Any, leaf: Any, param: Tensor, *rest: Any) -> None:
        if leaf.shape == param.shape:
            original(leaf, param, *rest)

    wrap(patch, checks, "_refuse_unlike", change)
    patch.setattr(memory, "_is_ready", lambda tensor: False)
    patch.setattr(
        memory,
        "_in_layout_of",
        lambda tensor, param: torch.empty_like(param).copy_(tensor.expand_as(param)),
    )


# The dispatch.


@caught_by(laws.matches_oracle)
def moments_are_swapped(patch: Patch) -> None:
    after_update(
        patch,
        lambda params, state, _: (
            params,
            state._replace(exp_avg=state.exp_avg_sq, exp_avg_sq=state.exp_avg),
        ),
    )


@caught_by(laws.matches_oracle)
def the_count_stands_still(patch: Patch) -> None:
    after_update(
        patch, lambda params, state, given: (params, state._replace(step=given[2].step.clone()))
    )


@caught_by(laws.matches_torch)
def the_bias_correction_is_one_step_ahead(patch: Patch) -> None:
    numbers(patch, lambda own, opt: own._replace(step=own.step + 1))


@caught_by(laws.matches_reference)
def the_bias_correction_is_missing(patch: Patch) -> None:
    numbers(patch, lambda own, opt: own._replace(step=own.step + 1e9))


@caught_by(laws.decay_is_decoupled)
def decay_goes_through_the_moments(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        structure = pytree.flatten(params)[1]
        pairs = zip(pytree.pair(grads, "grads", structure).leaves, leaves_of(params), strict=True)
        decayed = [None if g is None else g + opt.weight_decay * p for g, p in pairs]
        patch.setattr(AdamW, "weight_decay", 0.0, raising=False)
        return original(opt, pytree.unflatten(structure, decayed), state, params)

    around_update(patch, change)
    number(patch, "weight_decay", lambda decay, _: 0.0)


@caught_by(laws.decay_is_decoupled)
def decay_is_applied_twice(patch: Patch) -> None:
    number(patch, "weight_decay", lambda decay, _: 2 * decay)


@caught_by(laws.matches_torch)
def decay_comes_after_the_step(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        factor = 1 - float(given[0].lr) * float(given[0].weight_decay)
        return tree_map(lambda p: p * factor, params), state

    after_update(patch, change)
    number(patch, "weight_decay", lambda decay, _: 0.0)


@caught_by(laws.kernels_agree)
def eps_is_inside_the_square_root_of_one_kernel(patch: Patch) -> None:
    patch.setattr(adamw, "safe_sqrt", lambda squares: (squares + 1e-4).sqrt())


@caught_by(laws.scale_invariant)
def eps_has_a_floor(patch: Patch) -> None:
    number(patch, "eps", lambda eps, _: eps + 0.1)


@caught_by(laws.first_step_is_sign)
def the_learning_rate_is_half_as_large_again(patch: Patch) -> None:
    number(patch, "lr", lambda lr, _: lr * 1.5)


@caught_by(laws.zero_lr_moves_nothing)
def the_learning_rate_has_a_floor(patch: Patch) -> None:
    number(patch, "lr", lambda lr, _: lr + 0.01)


def _without(patch: Patch, kernel: str, **flags: Any) -> None:
    own = AdamW.rule.kernel(kernel)

    def step_(inputs: Any, numbers: Any, options: Any) -> None:
        own.step_(inputs, numbers, options._replace(**flags))

    patch.setitem(AdamW.rule._loaded, kernel, own._replace(step_=step_))


@caught_by(laws.maximize_is_minimize_negated)
def maximize_is_ignored_by_the_foreach_kernel(patch: Patch) -> None:
    _without(patch, "foreach", maximize=False)


@caught_by(laws.maximize_is_minimize_negated)
def maximize_is_ignored_by_the_fused_kernel(patch: Patch) -> None:
    _without(patch, "fused", maximize=False)


@caught_by(laws.matches_torch)
def amsgrads_maximum_is_dropped_by_the_foreach_kernel(patch: Patch) -> None:
    own = AdamW.rule.kernel("foreach")

    def step_(inputs: Any, numbers: Any, options: Any) -> None:
        own.step_(inputs._replace(slots=inputs.slots[:2]), numbers, options)

    patch.setitem(AdamW.rule._loaded, "foreach", own._replace(step_=step_))


@caught_by(laws.survives_zero_gradients)
def sixteen_bits_are_computed_in_sixteen_bits(patch: Patch) -> None:
    for where in (dispatch, list_kernels):
        patch.setattr(where, "compute_dtype", lambda dtype: dtype)
    for name in ("native", "fused"):
        kernel = AdamW.rule.kernel(name)
        lacking = kernel._replace(unsupported_reason=lambda *_: "it is not there")
        patch.setitem(AdamW.rule._loaded, name, lacking)
    number(patch, "eps", lambda eps, _: 1e-8)


@caught_by(laws.matches_oracle)
def strides_are_ignored(patch: Patch) -> None:
    patch.setattr(memory, "_is_ready", lambda tensor: True)


@caught_by(laws.matches_oracle)
def complex_gradients_are_conjugated(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        return original(opt, tree_map(torch.conj, grads), state, params)

    around_update(patch, change)


@caught_by(laws.agrees_with_itself_in_float64)
def parameters_in_float32_are_rounded_to_bfloat16(patch: Patch) -> None:
    def rounded(param: Tensor) -> Tensor:
        return param.bfloat16().float() if param.dtype is torch.float32 else param

    after_update(patch, lambda params, state, _: (tree_map(rounded, params), state))


@caught_by(laws.goes_downhill)
def ascends(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        return original(opt, tree_map(torch.neg, grads), state, params)

    around_update(patch, change)


@caught_by(laws.goes_downhill)
def a_matrix_ascends_beside_others_that_descend(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        turned = tree_map(lambda g: -g if g.ndim == 2 else g, grads)
        return original(opt, turned, state, params)

    around_update(patch, change)


@caught_by(laws.names_do_not_matter)
def the_first_leaf_moves_twice_as_far(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        (new, *others), structure = pytree.flatten(params)
        old = pytree.flatten(given[3])[0][0]
        return pytree.unflatten(structure, [2 * new - old, *others]), state

    after_update(patch, change)


@caught_by(laws.elements_are_independent)
def gradients_are_scaled_by_the_norm_of_their_leaf(patch: Patch) -> None:
    def scaled(grad: Tensor) -> Tensor:
        return (grad / (1 + grad.abs().double().square().sum())).to(grad.dtype)

    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        return original(opt, tree_map(scaled, grads), state, params)

    around_update(patch, change)


@caught_by(laws.leaves_are_independent)
def gradients_are_scaled_by_their_norm_over_the_tree(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        norm = sum(g.abs().double().square().sum() for g in leaves_of(grads))
        return original(opt, tree_map(lambda g: (g / (1 + norm)).to(g.dtype), grads), state, params)

    around_update(patch, change)


@caught_by(laws.matches_oracle)
def a_zero_gradient_is_taken_for_none(patch: Patch) -> None:
    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        kept = tree_map(lambda g: g if bool(g.any()) else None, grads)
        return original(opt, kept, state, params)

    around_update(patch, change)


# The transforms.


@caught_by(laws.vmap_is_loop)
def members_are_stacked_in_reverse(patch: Patch) -> None:
    def change(original: Any, leaf: Tensor, dim: int | None, size: int) -> Tensor:
        return original(leaf, dim, size).flip(0)

    wrap(patch, autograd, "_leaf_to_front", change)


@caught_by(laws.vmap_is_loop)
def only_the_first_dimension_can_be_mapped(patch: Patch) -> None:
    def change(original: Any, leaf: Tensor, dim: int | None, size: int) -> Tensor:
        front = original(leaf, dim, size)
        return front if dim in (None, 0) else leaf.reshape(front.shape)

    wrap(patch, autograd, "_leaf_to_front", change)


@caught_by(laws.nested_vmap_is_loop)
def the_outer_of_two_maps_reverses_its_members(patch: Patch) -> None:
    def change(original: Any, leaf: Tensor, dim: int | None, size: int) -> Tensor:
        front = original(leaf, dim, size)
        return front if autograd.transforms.transformed() else front.roll(1, 0)

    wrap(patch, autograd, "_leaf_to_front", change)


@caught_by(laws.per_member_hyperparameters)
def every_member_has_the_learning_rate_of_the_first(patch: Patch) -> None:
    def change(original: Any, value: Any, dim: int | None) -> Any:
        first = isinstance(value, Tensor) and dim is not None and value.ndim == 1
        return value[0] if first else original(value, dim)

    wrap(patch, autograd, "_with_dim_of_vmap", change)


@caught_by(laws.inactive_updates_change_nothing)
def the_count_goes_on_while_nothing_is_active(patch: Patch) -> None:
    def change(params: Any, state: Any, given: Any) -> Any:
        return params, state._replace(step=tree_map(lambda count: count + 1, given[2].step))

    after_update(patch, change)


@caught_by(laws.inactive_updates_change_nothing)
def moments_of_a_member_that_is_not_active_move(patch: Patch) -> None:
    def change(original: Any, *given: Any, **extras: Any) -> Any:
        params, state = original(*given, **extras)
        if extras and transforms.transformed():
            state = state._replace(exp_avg=original(*given)[1].exp_avg)
        return params, state

    wrap(patch, AdamW, "update", change)


@caught_by(laws.inactive_updates_change_nothing)
def update_in_place_is_always_active(patch: Patch) -> None:
    wrap(patch, AdamW, "update_", lambda original, *given, **_: original(*given))


@caught_by(laws.gradient_is_finite)
def the_derivative_of_the_root_is_infinite_at_zero(patch: Patch) -> None:
    patch.setattr(
        adjoint, "_of_square", lambda of_root, safe, zero: of_root / safe.masked_fill(zero, 0.0)
    )


@caught_by(laws.gradient_matches_differences)
def the_adjoint_forgets_the_second_moment(patch: Patch) -> None:
    patch.setattr(adjoint, "_of_square", lambda of_root, *_: torch.zeros_like(of_root))


@caught_by(laws.gradient_matches_differences)
def the_adjoint_forgets_weight_decay(patch: Patch) -> None:
    def change(original: Any, leaf: Any, pulled: Any, *others: Any) -> Any:
        return (pulled.param, *original(leaf, pulled, *others)[1:])

    wrap(patch, adjoint, "_before", change)


@caught_by(laws.compiles_once)
def the_count_is_read_in_python(patch: Patch) -> None:
    def after(own: prepare.Counts, *_: Any) -> list[Tensor]:
        return [torch.full_like(count, float(count) + 1) for count in own.tensors]

    patch.setattr(prepare.Counts, "after", after)


# Sixteen bits.


def _squeeze_moments(patch: Patch, dtype: torch.dtype) -> None:
    def squeezed(moment: Tensor) -> Tensor:
        return moment.to(dtype).float() if moment.dtype is torch.float32 else moment

    def change(params: Any, state: Any, given: Any) -> Any:
        return params, state._replace(exp_avg_sq=tree_map(squeezed, state.exp_avg_sq))

    after_update(patch, change)


@caught_by(laws.moments_follow_gradients, LONG)
def moments_in_float32_are_rounded_to_bfloat16(patch: Patch) -> None:
    _squeeze_moments(patch, torch.bfloat16)


@caught_by(laws.moments_have_room, LONG)
def moments_in_float32_are_rounded_to_float16(patch: Patch) -> None:
    _squeeze_moments(patch, torch.float16)


@caught_by(laws.matches_oracle, LONG)
def beta2_is_rounded_to_16_bits(patch: Patch) -> None:
    number(patch, "beta2", lambda beta2, _: float(torch.tensor(beta2).half()))


@caught_by(laws.small_steps_add_up, BY_CHANCE)
def chance_always_rounds_up(patch: Patch) -> None:
    def change(original: Any, *given: Any) -> Tensor:
        return torch.full_like(original(*given), 2**16 - 1)

    wrap(patch, rounding, "random_bits", change)


@caught_by(laws.random_bits_go_by_key, BY_CHANCE)
def random_bits_ignore_the_step(patch: Patch) -> None:
    def change(original: Any, key: Any, step: Any, *where: Any) -> Tensor:
        return original(key, 0.0 * step, *where)

    wrap(patch, rounding, "random_bits", change)


@caught_by(laws.random_bits_go_by_key, BY_CHANCE)
def random_bits_ignore_the_key(patch: Patch) -> None:
    def change(original: Any, key: Any, *where: Any) -> Tensor:
        return original(0.0 * key, *where)

    wrap(patch, rounding, "random_bits", change)


# What other libraries got wrong in 2026.


@caught_by(laws.decay_is_decoupled)
def decay_scales_the_whole_step(patch: Patch) -> None:
    """What a parameter moves by, decay and all, is multiplied by 1 - lr * decay."""

    def change(params: Any, state: Any, given: Any) -> Any:
        opt, _, _, before = given
        factor = 1 - float(opt.lr) * float(opt.weight_decay)
        news, structure = pytree.flatten(params)
        olds = pytree.pair(before, "params", structure).leaves
        moved = [old + (new - old) * factor for new, old in zip(news, olds, strict=True)]
        return pytree.unflatten(structure, moved), state

    after_update(patch, change)


@caught_by(laws.decay_is_decoupled)
def decay_is_added_to_the_gradient_of_the_step_alone(patch: Patch) -> None:
    """Coupled in the direction of the step, while the moments know nothing of it."""

    def change(original: Any, opt: AdamW, grads: Any, state: Any, params: Any) -> Any:
        structure = pytree.flatten(params)[1]
        pairs = zip(pytree.pair(grads, "grads", structure).leaves, leaves_of(params), strict=True)
        decayed = [None if g is None else (g + 0.1 * p).to(g.dtype) for g, p in pairs]
        kept = original(opt, grads, state, params)[1]
        return original(opt, pytree.unflatten(structure, decayed), state, params)[0], kept

    around_update(patch, change)
    number(patch, "weight_decay", lambda decay, _: 0.0)


@caught_by(laws.matches_oracle, LONG)
def beta2_is_rounded_to_bfloat16(patch: Patch) -> None:
    number(patch, "beta2", lambda beta2, _: float(torch.tensor(beta2).bfloat16()))


@caught_by(laws.moments_follow_gradients, LONG)
def the_second_moment_stalls_in_bfloat16(patch: Patch) -> None:
    """It keeps float32, and stays where it is if bfloat16 would not show the change."""

    def stalled(new: Tensor, old: Tensor) -> Tensor:
        if new.dtype is not torch.float32:
            return new
        return torch.where(new.bfloat16() == old.bfloat16(), old, new)

    def change(params: Any, state: Any, given: Any) -> Any:
        news, structure = pytree.flatten(state.exp_avg_sq)
        olds = pytree.pair(given[2].exp_avg_sq, "state", structure).leaves
        kept = [stalled(new, old) for new, old in zip(news, olds, strict=True)]
        return params, state._replace(exp_avg_sq=pytree.unflatten(structure, kept))

    after_update(patch, change)


@caught_by(laws.matches_oracle)
def the_count_skips_a_number(patch: Patch) -> None:
    """The second update counts twice."""

    def change(params: Any, state: Any, given: Any) -> Any:
        return params, state._replace(
            step=tree_map(lambda count: count + (count == 2).to(count.dtype), state.step)
        )

    after_update(patch, change)


TABLE = pathlib.Path(__file__).with_name("MUTANTS.md")


def caught(mutant: Mutant, known: Mapping[str, str]) -> dict[str, str]:
    """Return for each law a dot where it catches a mutant: what is known, or what is found."""
    marks = {}
    for law in laws.LAWS:
        name = law.__name__
        marks[name] = known[name] if name in known else _mark(mutant, law)
    return marks


def _mark(mutant: Mutant, law: laws.Law) -> str:
    own = mutant.subject
    with planted(mutant):
        status = check_law(law, own, shrink=False, like=reference(own)).status
    return "•" if status in ("fails", "error") else " "


def marks_there() -> dict[str, dict[str, str]]:
    """Read the table as it is: for each mutant, the mark of each law."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    names = [line.split("`")[1] for line in lines if "` catches " in line]
    cells = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return {
        name.strip(): dict(zip(names, [mark.strip() or " " for mark in marks], strict=True))
        for name, *marks in cells
        if name.strip()
    }


def matrix(known: Mapping[str, Mapping[str, str]]) -> str:
    """Hold every mutant to every law of which nothing is known; return a Markdown table."""
    names = [law.__name__ for law in laws.LAWS]
    head = [
        "# Planted defects, and the laws that catch them",
        "",
        "Written by `python -m tests.mutants`. A dot: the law is broken, or raises.",
        "",
        "|  | " + " | ".join(f"{number}" for number in range(1, len(names) + 1)) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    rows = [(own.name, caught(own, known.get(own.name, {}))) for own in MUTANTS]
    body = [f"| {name} | " + " | ".join(marks.values()) + " |" for name, marks in rows]
    foot = [
        f"{i}. `{name}` catches {sum(marks[name] == '•' for _, marks in rows)}"
        for i, name in enumerate(names, 1)
    ]
    return "\n".join([*head, *body, "", *foot, ""])


if __name__ == "__main__":
    torch.set_num_threads(1)
    TABLE.write_text(matrix(marks_there() if "--new" in sys.argv[1:] else {}))
    print(TABLE.read_text())
