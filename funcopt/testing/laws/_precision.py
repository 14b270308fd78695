"""What is kept of small steps and of moments in 16 bits, and how bits are drawn to round by.

These laws give an optimizer gradients of their own, for many updates, in the tree that was drawn:
leaves of some hundred elements, in float16 where the drawn leaf is, in bfloat16 elsewhere. What
comes of it they hold against the same optimizer's updates in float32 or float64.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ..._core import pytree
from ..._core.types import Tree, own_traits, traits_of
from .._compare import LawBroken, NotApplicable, wide
from .._subject import cast, field, fields, last, leaves_of, replace, run, tree_map

# In so many elements, what is rounded by chance comes near its mean.
_ELEMENTS = 512


def small_steps_add_up(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:  # noqa: ARG001
    """Steps below half a unit in the last place move a 16-bit parameter as one in float32.

    From 1.0, by gradients of 1.0 with a learning rate of an eighth of half a unit, 100 updates move
    the mean of a leaf by what they move it in float32, up to a tenth and half a unit. Rounded to
    the nearest number, no step of them moves anything.

    It applies to an optimizer that says so in its class, by `traits =
    Traits(small_steps_add_up=True)`, or by a field `rounding` that is `"stochastic"`. A wrapper
    around one does not say it: what it does to the parameters afterwards may round them.
    """
    if not own_traits(opt).small_steps_add_up:
        raise NotApplicable(
            "it does not say that small steps add up, by traits = Traits(small_steps_add_up=True) "
            "in its class, or by rounding='stochastic'"
        )
    field(opt, "lr")
    for dtype in _dtypes(params):
        start = tree_map(lambda leaf, dtype=dtype: _full(1.0, dtype, leaf), params)
        unit = torch.finfo(dtype).eps / 2  # between 0.5 and 1
        slow = replace(opt, lr=unit / 16)
        step = last(slow, start, [start] * 100)
        expected = last(slow, cast(start, torch.float32), [cast(start, torch.float32)] * 100)
        _means_agree(
            "small_steps_add_up",
            step.number,
            {"params": (step.new_params, expected.new_params)},
            lambda value, unit=unit: 0.1 * abs(value - 1.0) + unit,
        )


_RISE, _FALL = 500, 200


def moments_follow_gradients(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:  # noqa: ARG001
    """Running means rise to a constant gradient, and fall from it, beside 16-bit parameters.

    After 500 gradients of 1.0, and again after 200 of 0.0, the mean over each leaf of each moment
    is what it is in float64, up to 1% of the largest that it was. The learning rate is 0, so that
    whatever else the state has stays as it is.

    What an optimizer claims, it claims by its state: a moment in float32 or wider beside a 16-bit
    parameter has to obey, and one in 16 bits if all fields `rounding` are `"stochastic"`. A moment
    in 16 bits that is rounded to the nearest number is not judged: with a rate of 0.999 in
    bfloat16, a running mean of squares never falls, and stops at a quarter of its limit.
    """
    field(opt, "lr")
    still = replace(opt, lr=0.0)
    ones = tree_map(lambda leaf: _full(1.0, _narrow(leaf), leaf), params)
    zeros = tree_map(torch.zeros_like, ones)
    states = [_states(still, ones, [ones] * _RISE + [zeros] * _FALL)]
    doubles = [cast(tree, torch.float64) for tree in (ones, zeros)]
    states.append(_states(still, doubles[0], [doubles[0]] * _RISE + [doubles[1]] * _FALL))
    judged = _moments(*(state[0] for state in states), by_chance=_rounds_by_chance(opt))
    if not judged:
        raise NotApplicable("it has no moments in float32, nor any that it rounds stochastically")
    # By the largest mean over the run, which both ends of the rise and of the fall may be.
    for number in (0, 1):
        ours, exact = (_by_path(own[number]) for own in states)
        risen = _by_path(states[1][0])
        for path in judged:
            got, wanted = _mean(ours[path]), _mean(exact[path])
            allowed = 0.01 * max(abs(_mean(risen[path])), abs(wanted))
            if not abs(got - wanted) <= allowed:
                step = _RISE + number * _FALL
                raise LawBroken(
                    f"moments_follow_gradients: step {step}, {path}: got a mean of {got:.9g}, "
                    f"expected {wanted:.9g}"
                )


def moments_have_room(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:  # noqa: ARG001
    """Moments in float32 neither vanish nor overflow where a gradient in float16 does not.

    In float16, the square of 1e-3 is a few units of the smallest number, and that of 9000 is
    infinite. After 100 such gradients, moments beside float16 parameters are those beside float32
    ones, up to 5%, which wrappers may lose where they scale a small gradient in 16 bits; parameters
    up to a quarter of their way, if float16 holds it.

    It applies to an optimizer all of whose moments are in float32 or wider beside float16: by that
    it claims to have room. One that has to see overflow scales gradients itself, and is not judged.
    """
    if traits_of(opt).sees_overflow:
        raise NotApplicable("it divides gradients by a scale of its own")
    field(opt, "lr")
    still, slow = replace(opt, lr=0.0), replace(opt, lr=1e-3)
    for size in (1e-3, 9000.0):
        start = tree_map(lambda leaf: _full(0.0, torch.float16, leaf, 8), params)
        grads = tree_map(lambda leaf, size=size: torch.full_like(leaf, size), start)
        wide_start, wide_grads = cast(start, torch.float32), cast(grads, torch.float32)
        # Without a learning rate, as weight decay may let parameters into the moments.
        step = last(still, start, [grads] * 100)
        exact = last(still, wide_start, [wide_grads] * 100)
        ours, theirs = _by_path(step.new_state), _by_path(exact.new_state)
        both = [path for path in ours if path in theirs]
        if not both or any(ours[path].itemsize == 2 for path in both):
            raise NotApplicable("it has no moments, or some in 16 bits")
        law = f"moments_have_room (gradients of {size:g})"
        pairs = {path: (ours[path], theirs[path]) for path in both}
        _means_agree(law, step.number, pairs, lambda value: 0.05 * abs(value))
        step = last(slow, start, [grads] * 100)
        exact = last(slow, wide_start, [wide_grads] * 100)
        largest = max((float(wide(p).abs().max()) for p in leaves_of(exact.new_params)), default=0)
        if largest < torch.finfo(torch.float16).max / 2:
            moved = {"params": (step.new_params, exact.new_params)}
            _means_agree(law, step.number, moved, lambda value: 0.25 * abs(value) + 2.0**-24)


def random_bits_go_by_key(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:  # noqa: ARG001
    """The same key gives the same bits, alone as under vmap; another key, step or leaf, others.

    Steps of about a quarter of a unit are rounded up or down. Members of a vmap with keys of their
    own become what each becomes alone, but for a hundredth of the elements: another order of
    operations may have other last digits. Whether an element goes up is uncorrelated between two
    updates, two keys and two leaves that are equal. That the same inputs give the same bits, in
    place as well, `deterministic` and `inplace_is_pure` say.

    It applies to an optimizer with a field `rounding` of its own that is `"stochastic"`, and with a
    field `seed`. A wrapper may take a step back, which correlates with the step.
    """
    if getattr(opt, "rounding", "nearest") != "stochastic":
        raise NotApplicable("it does not say that it rounds by chance, by rounding='stochastic'")
    dtype = torch.bfloat16
    start = tree_map(lambda leaf: _full(1.5, dtype, leaf, 2048), params)
    grads = tree_map(torch.ones_like, start)
    field(opt, "seed"), field(opt, "lr")
    slow = replace(opt, lr=torch.finfo(dtype).eps / 4)
    seeds = [3.0, 4.0]
    runs = [
        [step.new_params for step in run(replace(slow, seed=seed), start, [grads] * 4)]
        for seed in seeds
    ]
    _members_are_rounded_alike(slow, seeds, start, grads, runs)
    moves = [[_moves(before, after) for before, after in _pairs(start, own)] for own in runs]
    _uncorrelated("two updates", list(zip(moves[0][:-1], moves[0][1:], strict=True)))
    _uncorrelated("two keys", list(zip(*moves, strict=True)))
    turned = [own[1:] + own[:1] for own in moves[0]]
    if len(leaves_of(start)) > 1:
        _uncorrelated("two leaves", list(zip(moves[0], turned, strict=True)))


def _members_are_rounded_alike(
    opt: Any, seeds: list[float], start: Tree, grads: Tree, runs: list[list[Tree]]
) -> None:
    keys = torch.tensor(seeds, dtype=torch.float64, device=leaves_of(start)[0].device)
    stack = partial(tree_map, lambda leaf: torch.stack([leaf] * len(seeds)))
    params, both = stack(start), stack(grads)
    state = vmap(lambda seed, own: replace(opt, seed=seed).init(own))(keys, params)
    for number in range(1, 3):
        params, state = vmap(opt.update)(both, state, params)
        for i, own in enumerate(runs):
            member = leaves_of(tree_map(lambda leaf, i=i: leaf[i], params))
            for got, wanted in zip(member, leaves_of(own[number - 1]), strict=True):
                share = (got != wanted).double().mean().item()
                if share > 0.01:
                    raise LawBroken(
                        f"random_bits_go_by_key: step {number}, params: got {share:.2%} of the "
                        f"elements of member {i} rounded in another way than alone, expected less "
                        f"than 1%"
                    )


def _pairs(start: Tree, trees: list[Tree]) -> list[tuple[Tree, Tree]]:
    return list(zip([start, *trees[:-1]], trees, strict=True))


def _moves(before: Tree, after: Tree) -> list[Tensor]:
    """Return, of each leaf, by how much each element moved, less the mean, of size 1."""
    centred = []
    for old, new in zip(leaves_of(before), leaves_of(after), strict=True):
        move = wide(new) - wide(old)
        unit = torch.finfo(old.dtype).eps
        # Where next to nothing moved, or all moved alike, nothing can be told.
        spread = move - move.mean()
        size = spread.norm()
        told = float(size) > 0.1 * unit * math.sqrt(move.numel())
        centred.append(spread / size if told else torch.zeros_like(spread))
    return centred


def _uncorrelated(what: str, moves: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    for number, (ones, others) in enumerate(moves, 1):
        for one, other in zip(ones, others, strict=True):
            found = float((one * other).sum())
            if abs(found) > 0.2:  # nine times what chance makes it
                raise LawBroken(
                    f"random_bits_go_by_key: step {number}, params: got a correlation of "
                    f"{found:.3f} between the roundings of {what}, expected none"
                )


def _narrow(leaf: Tensor) -> torch.dtype:
    return torch.float16 if leaf.dtype is torch.float16 else torch.bfloat16


def _dtypes(params: Tree) -> list[torch.dtype]:
    return sorted({_narrow(leaf) for leaf in leaves_of(params)}, key=str)


def _full(value: float, dtype: torch.dtype, like: Tensor, elements: int = _ELEMENTS) -> Tensor:
    return torch.full((elements,), value, dtype=dtype, device=like.device)


def _states(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> list[Tree]:
    """Return the states after the rise and after the fall."""
    return [
        step.new_state
        for step in run(opt, params, gradient_sequence)
        if step.number in (_RISE, _RISE + _FALL)
    ]


def _by_path(state: Tree) -> dict[str, Tensor]:
    """Return what the state has like the parameters, by its path: no count, no key.

    Nor what has no elements, as factors of a second moment beside a vector, which have no mean.
    """
    leaves, structure = pytree.flatten(state)
    return {
        path: leaf
        for path, leaf in zip(pytree.paths(structure, "state"), leaves, strict=True)
        if isinstance(leaf, Tensor)
        and leaf.ndim == 1
        and leaf.numel() > 0
        and leaf.is_floating_point()
    }


def _rounds_by_chance(opt: Any) -> bool:
    return set(fields(opt, "rounding")) == {"stochastic"}


def _moments(state: Tree, exact: Tree, *, by_chance: bool) -> list[str]:
    ours, others = _by_path(state), _by_path(exact)
    return [
        path for path, leaf in ours.items() if path in others and (leaf.itemsize > 2 or by_chance)
    ]


def _mean(tensor: Tensor) -> float:
    return float(wide(tensor).mean())


def _means_agree(law: str, number: int, pairs: dict[str, tuple[Tree, Tree]], allowed: Any) -> None:
    """Hold the mean of each leaf to that of another tree's."""
    for root, (ours, theirs) in pairs.items():
        paths = pytree.paths(pytree.flatten(ours)[1], root)
        for path, one, other in zip(paths, leaves_of(ours), leaves_of(theirs), strict=True):
            got, wanted = _mean(one), _mean(other)
            if not abs(got - wanted) <= allowed(wanted):
                raise LawBroken(
                    f"{law}: step {number}, {path}: got a mean of {got:.9g}, expected {wanted:.9g}"
                )
