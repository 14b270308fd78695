"""Any optimizer of torch.optim as a pure function: the class makes the step, on copies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.types import Extras, ParamsT, Traits, Tree
from .._engine.checks import check_state
from .._engine.counts import device_for_count, first_count, next_count
from .._engine.prepare import check_untied, keep_requiring
from .._engine.registration import register_optimizer, state_class
from ..wrappers._in_float32 import check_params_inplace
from ..wrappers._shared import (
    Gradients,
    check_wrapper_inplace,
    gather_gradients,
    gather_params,
    write_fields_and_count,
)
from .source import (
    Kind,
    check_hyperparameters,
    check_kind,
    defaults_of,
    is_scheduled,
    name_of,
    numbers_after,
    traits_of_kind,
)
from .state import LeafState, as_trees, initial
from .step import Leaves, for_each_member, step_, stepped
from .trees import States, gather_states


@state_class
class PureState(NamedTuple):
    """The state of `pure`: what the class keeps in `state[param]`, in trees like the parameters.

    Where the class keeps something for some leaves alone, as `Adafactor` does, others have `()`.

    Attributes:
        slots: The tensors, by the names that the class has for them: `slots["exp_avg"]["weight"]`.
        numbers: The Python numbers, by their names, as tensors of shape ().
        made: For the slots that the class makes of the first gradient, whether it did: bools. That
            of `SGD` with momentum is one; before, its buffer is zeros here.
        step: How many updates were made, for schedules; `()` if no hyperparameter is one.
    """

    slots: dict[str, Tree]
    numbers: dict[str, Tree]
    made: dict[str, Tree]
    step: Tree


def pure(kind: Kind, /, **hyperparameters: Any) -> Pure:
    """Return an optimizer of `torch.optim` as a pure function of trees, with its bits.

    At each update the class itself is built for copies of the leaves, is given gradients and state,
    and makes its step. So every option that it has does what it does there. For small leaves this
    takes about three times as long as the class's own step; `AdamW`, `Adam`, `SGD` and `Lion` are
    funcopt's own, and faster than that.

    The state before the first update has all that the class keeps, which makes it at its first
    step. Torch's own classes are asked for it. Other subclasses of `torch.optim.Optimizer` are
    served if they keep what they go by in `state[param]`, as tensors and numbers, from the first
    step on: `init` makes three steps of copies, with gradients of 1 and -2, to see what they put
    there. One that keeps anything elsewhere, or changes what there is in a later step, is refused.

    Under vmap, each member makes its step by itself, beneath the vmap: with the bits that it has
    alone, and in as much time as a loop takes. A derivative, in reverse or forward mode, takes the
    path of the class for `differentiable=True`, which may round otherwise, and is refused where the
    class has none. Compiled, an update stays out of the graph, so that `fullgraph=True` refuses it.

    Wrappers take it, as they take any optimizer, but for `Zero1`, since each leaf has its own
    count. `Plateau` lowers the `lr` of the class, also where it is the default. Of torch's classes,
    those that move each element by itself take DTensors; `Muon` and `Adafactor`, and classes that
    are not torch's, do not. In 16 bits the class computes in 16 bits, where torch's `eps` may be 0:
    give it float32 by `MasterWeights`.

    Args:
        kind: A class of `torch.optim`, or another one that is like them. Not `LBFGS`, which needs a
            closure, nor `SparseAdam`, which takes sparse gradients alone.
        hyperparameters: What the class takes, but for the parameters. Whatever is a number there
            may be a schedule, which is called with the count of updates made so far, and of which
            the class is given the value. A 0-dim tensor, which vmap maps over, is given as it is to
            the class: many take one for `lr`. Of `SGD`, `Adam` and `AdamW`, `lr` can have a
            derivative.

    Returns:
        An optimizer, whose state is a `PureState`. A leaf whose gradient is None, and its state,
        stay as they are.

    Raises:
        TypeError: If `kind` is no such class, or has no hyperparameter of a name.
        ValueError: If the class refuses a value.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.pure(torch.optim.RMSprop, lr=0.1, alpha=0.75)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([2.0, -2.0])}, state, params)
        >>> params, state.slots["square_avg"], state.slots["step"]
        ({'w': tensor([0.8000, 2.2000])}, {'w': tensor([1., 1.])}, {'w': tensor(1.)})
    """
    return Pure(kind, hyperparameters)


@register_optimizer
@dataclass(frozen=True, repr=False)
class Pure:
    """What `pure` returns: a class and its hyperparameters, as a value and an optimizer.

    Args:
        kind: The class, as for `pure`.
        hyperparameters: What the class takes, by name.

    Raises:
        TypeError: As `pure`.
        ValueError: As `pure`.

    Example:
        >>> import torch, funcopt
        >>> funcopt.Pure(torch.optim.NAdam, {"lr": 0.1}) == funcopt.pure(torch.optim.NAdam, lr=0.1)
        True
    """

    kind: Kind
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let the class check its hyperparameters."""
        check_kind(self.kind)
        check_hyperparameters(self.kind, self.hyperparameters)
        object.__setattr__(self, "hyperparameters", dict(self.hyperparameters))

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in self.hyperparameters.items()]
        return f"pure({', '.join([name_of(self.kind), *given])})"

    @property
    def lr(self) -> Any:
        """The learning rate of the class: a number, a tensor or a schedule; None if it has none."""
        lr = self._value("lr")
        return float(lr) if isinstance(lr, int) else lr

    @property
    def maximize(self) -> bool:
        """Whether the class ascends."""
        return bool(self._value("maximize"))

    def _value(self, name: str) -> Any:
        default = defaults_of(self.kind).get(name)
        value = self.hyperparameters.get(name, default)
        return None if value is inspect.Parameter.empty else value

    @property
    def traits(self) -> Traits:
        """What holds of the class; nothing is promised of one that is not torch's."""
        return traits_of_kind(self.kind, self.hyperparameters)

    def init(self, params: Tree) -> PureState:
        """Return the state before the first update: what the class keeps before its first step."""
        made: PureState = _beside_graphs(_init, self, params)
        return made

    def update(
        self, grads: Tree, state: PureState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, PureState]:
        """Return the new parameters and the new state, in fresh memory."""
        made: tuple[ParamsT, PureState] = _beside_graphs(_update, self, grads, state, params)
        return made

    def update_(
        self, grads: Tree, state: PureState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, PureState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        made: tuple[ParamsT, PureState] = _beside_graphs(_update_, self, grads, state, params)
        return made


def _beside_graphs(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, outside of the graph where one is being compiled."""
    return transforms.uncompiled(function, *args) if transforms.compiling() else function(*args)


def _init(opt: Pure, params: Tree) -> PureState:
    leaves, structure, _ = gather_params(opt, params)
    scheduled = any(is_scheduled(opt.kind, *given) for given in opt.hyperparameters.items())
    step: Tree = first_count(device_for_count(leaves)) if scheduled else ()

    def of_member(hyperparameters: Mapping[str, Any], params: list[Tensor]) -> list[LeafState]:
        values = numbers_after(opt.kind, hyperparameters, step)
        if is_scheduled(opt.kind, "momentum", hyperparameters.get("momentum")):
            values["momentum"] = 0.5  # so that there is a buffer, also if it begins with 0
        with torch.no_grad():
            return initial(opt.kind, params, values, partial(pytree.path, structure, "params"))

    states = for_each_member(of_member, opt.hyperparameters, leaves)
    return PureState(*as_trees(states, partial(pytree.unflatten, structure)), step=step)


def _update(opt: Pure, grads: Tree, state: PureState, params: Tree) -> tuple[Any, PureState]:
    gradients, states = _gather(opt, grads, state, params)
    check_untied(gradients.params, gradients.structure)
    leaves = Leaves(gradients.params, gradients.leaves, states.leaves)
    new_params, new_states = for_each_member(
        partial(stepped, opt.kind), opt.hyperparameters, state.step, leaves
    )
    keep_requiring(new_params, gradients.params)
    new_state = PureState(*states.rebuild(new_states), step=next_count(state.step))
    return pytree.unflatten(gradients.structure, new_params), new_state


def _update_(opt: Pure, grads: Tree, state: PureState, params: Tree) -> tuple[Any, PureState]:
    gradients, states = _gather(opt, grads, state, params)
    own = states.by_path()
    if isinstance(state.step, Tensor):
        own["state.step"] = state.step
    numbers = [leaf for leaf in pytree.flatten(opt.hyperparameters)[0] if isinstance(leaf, Tensor)]
    check_wrapper_inplace(
        {f"hyperparameters {i}": n for i, n in enumerate(numbers)}, own, gradients
    )
    check_params_inplace(gradients, state)
    leaves = Leaves(gradients.params, gradients.leaves, states.leaves)
    with torch.no_grad():
        step_(opt.kind, opt.hyperparameters, state.step, leaves)
        write_fields_and_count(state)
    return params, state


def _gather(opt: Pure, grads: Tree, state: Any, params: Tree) -> tuple[Gradients, States]:
    check_state(state, PureState)
    gradients = gather_gradients(opt, grads, params)
    own, structure = gradients.params, gradients.structure
    return gradients, gather_states(opt.kind, state, params, own, structure)
