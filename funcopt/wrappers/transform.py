"""Gradients changed by a function of one's own before the inner update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import write
from .._core.types import (
    Extras,
    ParamsT,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
    kind_of,
)
from .._engine.checks import check_dense, check_no_history, check_state, is_like
from .._engine.hyperparameters import check_takes, short
from .._engine.registration import register_optimizer, state_class
from ._shared import (
    Gradients,
    check_wrapper_inplace,
    device_of_tensors,
    gather_gradients,
    gather_params,
    records,
)


@state_class
class TransformState(NamedTuple, Generic[InnerStateT]):
    """The state of `Transform`.

    Attributes:
        inner: The state of the inner optimizer.
        own: What the function keeps: any tree of tensors, `()` if it keeps nothing.
    """

    inner: InnerStateT
    own: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class Transform(Generic[InnerT_co]):
    r"""Change the gradients by a function of your own, then update.

    With the function $f$, its own state $s$ and the parameters $\theta$,

    $$ (g', s') = f(g, s, \theta), $$

    and the inner optimizer is given $g'$. This stands where optax chains small transforms.

    The function must be pure: it returns new tensors, changes none that it is given, draws nothing
    from a generator, and depends on nothing else that changes. It is written in plain functions of
    torch, and then works under vmap, grad and compile. `None`, where a parameter has no gradient,
    stays None: `extend.tree_map` sees to that. A derivative flows through the function and through
    its state, and to tensors that it closes over. Leaves at rest (as under `Frozen`) come without a
    gradient.

    Args:
        inner: The optimizer that is given the changed gradients.
        function: Called as `function(grads, own, params)`, it returns the changed gradients, a tree
            like the parameters, and its new state, which has the structure, shapes, dtypes and
            devices of the old.
        initial: The state of the function before the first update: a tree of tensors and numbers,
            or a function of the parameters that returns one. Numbers become float64 tensors of
            shape (). The tensors of a tree are leaves of the optimizer: where it is mapped over by
            vmap, each member may begin with its own. Default: `()`, for a function without state.
        traits: What holds of the function: see `extend.Traits`. What is not promised is not done.
            Without `elementwise=True`, DTensors and `Zero1` are refused; with it, a leaf that the
            function is given may be a part of a parameter, or several side by side.

    Raises:
        TypeError: If `inner` is no optimizer, `function` cannot be called with three arguments, or
            `traits` are none. An update raises one if the function returns no pair.
        ValueError: An update raises one if the gradients do not match the parameters, or the new
            state the old one.

    Example:
        The sign of each gradient, which takes no state:

        >>> import torch, funcopt
        >>> from funcopt.extend import Traits, normal_like, tree_map
        >>> inner, params = funcopt.SGD(lr=0.1), {"w": torch.zeros(2, 2)}
        >>> opt = funcopt.Transform(inner, lambda grads, own, _: (tree_map(torch.sign, grads), own))
        >>> grads = {"w": torch.tensor([[1.0, 3.0], [-2.0, 0.0]])}
        >>> opt.update(grads, opt.init(params), params)[0]
        {'w': tensor([[-0.1000, -0.1000],
                [ 0.1000,  0.0000]])}

        Centralization, which looks at whole leaves, one by one:

        >>> def centralize(grads, own, params):
        ...     def center(grad):
        ...         return grad - grad.mean(-1, keepdim=True) if grad.ndim > 1 else grad
        ...     return tree_map(center, grads), own
        >>> opt = funcopt.Transform(inner, centralize, traits=Traits(leafwise=True, linear=True))
        >>> opt.update(grads, opt.init(params), params)[0]
        {'w': tensor([[ 0.1000, -0.1000],
                [ 0.1000, -0.1000]])}

        Noise that fades, by a key and a count in the state:

        >>> def add_noise(grads, own, params):
        ...     size = 0.01 * (1 + own["step"]) ** -0.55
        ...     names = sorted(grads)
        ...     noisy = {
        ...         name: grads[name] + size.float() * normal_like(grads[name], **own, leaf=i)
        ...         for i, name in enumerate(names)
        ...     }
        ...     return noisy, {"key": own["key"], "step": own["step"] + 1}
        >>> opt = funcopt.Transform(inner, add_noise, initial={"key": 7, "step": 0})
        >>> state = opt.init(params)
        >>> one, later = opt.update(grads, state, params)
        >>> torch.equal(one["w"], opt.update(grads, state, params)[0]["w"])  # nothing is drawn
        True
        >>> later.own["step"]
        tensor(1., dtype=torch.float64)
    """

    inner: InnerT_co
    function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    initial: Tree | Callable[[Tree], Tree] = ()
    # By a factory, since it is not said of the class: it differs from one instance to another.
    traits: Traits = field(default_factory=Traits)

    def __post_init__(self) -> None:
        """Check what was given."""
        check_is_optimizer("inner", self.inner)
        if not callable(self.function) or isinstance(self.function, type):
            raise TypeError(
                f"function={short(self.function)}: must be a function of gradients, its own state "
                f"and parameters, which returns gradients and its new state."
            )
        check_takes("function", self.function, 3, "it is called as function(grads, own, params)")
        if callable(self.initial):
            check_takes("initial", self.initial, 1, "it is called as initial(params)")
        if not isinstance(self.traits, Traits):
            raise TypeError(
                f"traits={short(self.traits)}: must be Traits, such as "
                f"funcopt.extend.Traits(elementwise=True)."
            )

    def init(self: Transform[OptimizerLike[StateT]], params: Tree) -> TransformState[StateT]:
        """Return the state before the first update: that of the function is a copy."""
        leaves, structure, _ = gather_params(self, params)
        none = pytree.Paired([None for _ in leaves], structure, None)
        recorded = records(self, Gradients(leaves, structure, none), ())
        with torch.set_grad_enabled(recorded):
            own = self.initial(params) if callable(self.initial) else self.initial
            own_leaves, own_structure = pytree.flatten(own)
            place = device_of_tensors(params)
            copies = [
                _first(leaf, place, partial(pytree.path, own_structure, "initial", index))
                for index, leaf in enumerate(own_leaves)
            ]
        return TransformState(self.inner.init(params), pytree.unflatten(own_structure, copies))

    def update(
        self: Transform[OptimizerLike[StateT]],
        grads: Tree,
        state: TransformState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, TransformState[StateT]]:
        """Return the new parameters and the new state, in fresh memory."""
        gradients = self._gather(grads, state, params)
        recorded = records(self, gradients, state)
        changed, own, structure = self._call(gradients, state, params, recorded)
        if not recorded and _have_history([*pytree.flatten(changed)[0], *own]):
            # The function closes over a tensor with a history, so it is to be followed as a whole.
            changed, own, structure = self._call(gradients, state, params, recorded=True)
        new_params, inner = self.inner.update(changed, state.inner, params)
        return new_params, TransformState(inner, pytree.unflatten(structure, own))

    def update_(
        self: Transform[OptimizerLike[StateT]],
        grads: Tree,
        state: TransformState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, TransformState[StateT]]:
        """Do the same in place, but for the changed gradients."""
        gradients = self._gather(grads, state, params)
        olds, structure = pytree.flatten(state.own)
        paths = pytree.paths(structure, "state.own")
        check_wrapper_inplace({}, dict(zip(paths, olds, strict=True)), gradients)
        changed, own, _ = self._call(gradients, state, params, recorded=False)
        check_no_history(
            (p, leaf) for p, leaf in zip(paths, own, strict=True) if leaf.requires_grad
        )
        self.inner.update_(changed, state.inner, params)
        with torch.no_grad():
            for old, new in zip(olds, own, strict=True):
                write(old, new)
        return params, state

    def _gather(self, grads: Tree, state: TransformState, params: Tree) -> Gradients:
        check_state(state, TransformState)
        own, structure = pytree.flatten(state.own)
        path = partial(pytree.path, structure, "state.own")
        for index, leaf in enumerate(own):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{path(index)} is {kind_of(leaf)}: the state of a function is made of "
                    f"tensors. Make the state with init() of this optimizer."
                )
        check_dense(own, path)
        return gather_gradients(self, grads, params)

    def _call(
        self, gradients: Gradients, state: TransformState, params: Tree, recorded: bool
    ) -> tuple[Tree, list[Tensor], pytree.Structure]:
        """Return what the function makes of gradients and of its state, checked, the latter flat.

        Where nothing is recorded, it is given tensors without a history. So what has one then, has
        it from a tensor that the function closes over.
        """
        leaves = _without_history(gradients.params, recorded)
        given = gradients.replace(_without_history(gradients.tensors, recorded)).tree
        made = self.function(given, state.own, pytree.unflatten(gradients.structure, leaves))
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(
                f"function={short(self.function)} returned something {kind_of(made)}: it must be a "
                f"pair, of the changed gradients and of its new state, such as (grads, own)."
            )
        changed, own = made
        try:
            gather_gradients(self, changed, params)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"function={short(self.function)} returned gradients that do not go with the "
                f"parameters: {error}"
            ) from None
        olds, structure = pytree.flatten(state.own)
        news = self._checked(own, olds, structure)
        others = [*gradients.params, *gradients.tensors, *olds]
        return (
            changed,
            _apart(news, [leaf for leaf in others if isinstance(leaf, Tensor)]),
            structure,
        )

    def _checked(self, own: Tree, olds: list[Tensor], structure: pytree.Structure) -> list[Tensor]:
        """Return the leaves of the new state of the function, which must look like the old ones."""
        news, found = pytree.flatten(own)
        if not pytree.same(found, structure):
            raise ValueError(
                f"function={short(self.function)} returned a state of another structure than it "
                f"was given: {found} in place of {structure}. Give it such a state as initial=."
            )
        for index, (new, old) in enumerate(zip(news, olds, strict=True)):
            if not is_like(new, old.shape, old.dtype, old.device):
                raise ValueError(
                    f"function={short(self.function)} returned "
                    f"{pytree.path(structure, 'own', index)} {kind_of(new)}, where it was given "
                    f"one of {old.dtype} and shape {tuple(old.shape)} on {old.device}: its state "
                    f"must keep shape, dtype and device. Convert it, or begin with such a one."
                )
        return news


def _first(leaf: object, place: torch.device, path: Callable[[], str]) -> Tensor:
    """Return the first value of a leaf of the function's state, in fresh memory."""
    if isinstance(leaf, (bool, int, float)):
        return torch.full((), leaf, dtype=torch.float64, device=place)
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{path()} is {kind_of(leaf)}: the state of a function is made of tensors.")
    return leaf.clone()


def _without_history(leaves: Sequence[Any], recorded: bool) -> list[Any]:
    """Return leaves without their history, unless what is done with them is to be recorded.

    Beneath a vmap a history cannot be seen.
    """
    if recorded:
        return list(leaves)
    hidden = transforms.transformed() if transforms.tracing() else transforms.in_vmaps_alone()
    return [
        leaf.detach() if isinstance(leaf, Tensor) and (hidden or leaf.requires_grad) else leaf
        for leaf in leaves
    ]


def _have_history(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def _apart(news: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Return tensors of which none shares memory with another one, nor with those that were given.

    So whoever writes one of them, writes nothing else. Where there is no memory to look at, all are
    copied.
    """
    if transforms.tracing() or transforms.transformed() or not transforms.all_plain(news):
        return [new.clone() for new in news]
    taken = {other.untyped_storage().data_ptr() for other in others} if news else set()
    apart = []
    for new in news:
        start = new.untyped_storage().data_ptr()
        apart.append(new.clone() if start in taken else new)
        taken.add(start)
    return apart
