'''Optimizers and wrappers of your own, with all that funcopt's have.

**An optimizer** is an `UpdateRule`: the trees of its state, its hyperparameters with their ranges,
the equations of one step of one leaf in plain differentiable operators, and traits, which say what
may be done with its leaves. From that the engine makes `init`, `update` and `update_`: under vmap,
grad and compile, for 16-bit and complex leaves, with schedules and tensors for numbers, with checks
whose messages name the path. Complete:

    >>> from dataclasses import dataclass
    >>> from typing import Any, ClassVar, NamedTuple
    >>> import torch, funcopt
    >>> from funcopt import extend
    >>> class SignumState(NamedTuple):
    ...     step: Any
    ...     momentum: Any
    >>> def equations(param, grad, slots, numbers, options):
    ...     momentum = torch.lerp(slots[0], grad, numbers.gain)
    ...     return [param - numbers.lr * momentum.sign(), momentum]
    >>> class Coefficients(NamedTuple):  # what the equations want in place of the numbers
    ...     lr: Any
    ...     gain: Any
    >>> @extend.register_optimizer
    ... @dataclass(frozen=True)
    ... class Signum:
    ...     """Descend by the sign of the running mean of the gradients."""
    ...
    ...     rule: ClassVar[extend.UpdateRule] = extend.UpdateRule(
    ...         state=SignumState,
    ...         slots=(extend.Slot("momentum"),),
    ...         hyperparams=(
    ...             extend.Hyperparam("lr", extend.AT_LEAST_ZERO),
    ...             extend.Hyperparam("beta", extend.BELOW_ONE),
    ...         ),
    ...         coefficients=lambda numbers, options: Coefficients(numbers.lr, 1 - numbers.beta),
    ...         equations=equations,
    ...         traits=extend.Traits(elementwise=True),
    ...     )
    ...     lr: funcopt.Number | funcopt.Schedule = 1e-3
    ...     beta: funcopt.Number | funcopt.Schedule = 0.9
    ...     __post_init__ = extend.check_fields
    ...     init = extend.init
    ...     update = extend.update
    ...     update_ = extend.update_
    >>> opt, w = Signum(lr=0.1), torch.tensor([1.0, 2.0])
    >>> opt.update(torch.tensor([0.5, -0.5]), opt.init(w), w)[0]
    tensor([0.9000, 2.1000])
    >>> opt.update([torch.ones(2)], opt.init([w]), [torch.ones(3)])
    Traceback (most recent call last):
    ValueError: ...

Numbers that are tensors come to `coefficients` in float64, and go from there to the equations in
the dtype of the leaf; `numbers.step` is the count of updates with this one. Options that are no
numbers are named in `options=`, and a slot that is kept only with one of them says so:
`Slot("max_momentum", option="maximum")`. Faster kernels and a derivative by hand can be given to
the rule, by name; without them the equations are what runs, and what is differentiated.

**Traits** are promises, and what is not promised is not done: without `elementwise`, leaves are
neither packed nor stacked nor cut, DTensors and `Zero1` are refused, with the trait in the message.
A class that looks at whole leaves, as Muon does, says `Traits(leafwise=True)`. `funcopt.testing`
holds an optimizer to what it says: run `check_optimizer(Signum())`.

**A wrapper** has a field `inner`, and hands on what it makes of the gradients:

    >>> @extend.register_optimizer
    ... @dataclass(frozen=True)
    ... class Centralized:
    ...     """Subtract from each gradient of two or more dimensions the mean of each row."""
    ...
    ...     traits: ClassVar[extend.Traits] = extend.Traits(leafwise=True, linear=True)
    ...     inner: funcopt.Optimizer[Any]
    ...
    ...     def init(self, params):
    ...         return self.inner.init(params)
    ...
    ...     def update(self, grads, state, params):
    ...         return self.inner.update(extend.tree_map(self.centralize, grads), state, params)
    ...
    ...     def update_(self, grads, state, params):
    ...         return self.inner.update_(extend.tree_map(self.centralize, grads), state, params)
    ...
    ...     @staticmethod
    ...     def centralize(grad):
    ...         return grad - grad.mean(-1, keepdim=True) if grad.ndim > 1 else grad
    >>> opt, w = Centralized(Signum(lr=0.1)), torch.zeros(1, 2)
    >>> opt.update(torch.tensor([[1.0, 3.0]]), opt.init(w), w)[0]
    tensor([[ 0.1000, -0.1000]])

One that keeps something of its own has a NamedTuple for its state, with the state of the inner
optimizer as its field `inner`. Its numbers may be tensors and schedules, if they are named in
`hyperparams`; schedules are called with a count of its own, in the field `step`:

    >>> class ScaledState(NamedTuple):
    ...     inner: Any
    ...     step: Any
    >>> @extend.register_optimizer
    ... @dataclass(frozen=True)
    ... class Scaled:
    ...     """Multiply the gradients by a number."""
    ...
    ...     traits: ClassVar[extend.Traits] = extend.Traits(elementwise=True, linear=True)
    ...     hyperparams: ClassVar[tuple[extend.Hyperparam, ...]] = (
    ...         extend.Hyperparam("factor", extend.AT_LEAST_ZERO),
    ...     )
    ...     inner: funcopt.Optimizer[Any]
    ...     factor: funcopt.Number | funcopt.Schedule
    ...
    ...     def __post_init__(self):
    ...         extend.check_is_optimizer("inner", self.inner)
    ...         extend.normalize_fields(self, self.hyperparams)
    ...
    ...     def init(self, params):
    ...         step = extend.first_count(extend.device_of_tensors(params))
    ...         return ScaledState(self.inner.init(params), step)
    ...
    ...     def update(self, grads, state, params):
    ...         gradients, numbers = self.gather(grads, state, params)
    ...         scaled = self.scaled(gradients, **numbers)
    ...         new_params, inner = self.inner.update(scaled, state.inner, params)
    ...         return new_params, ScaledState(inner, extend.next_count(state.step))
    ...
    ...     def update_(self, grads, state, params):
    ...         gradients, numbers = self.gather(grads, state, params)
    ...         own = {"state.step": state.step}  # what it writes, by path
    ...         extend.check_wrapper_inplace(numbers, own, gradients)  # before anything is written
    ...         self.inner.update_(self.scaled(gradients, **numbers), state.inner, params)
    ...         extend.write_fields_and_count(state)
    ...         return params, state
    ...
    ...     def gather(self, grads, state, params):
    ...         extend.check_state(state, ScaledState)
    ...         numbers = extend.numbers_of(self, state.step)
    ...         return extend.gather_gradients(self, grads, params), numbers
    ...
    ...     @staticmethod
    ...     def scaled(gradients, factor):
    ...         return gradients.replace(g * extend.fit(factor, g) for g in gradients.tensors).tree
    >>> opt, w = Scaled(funcopt.SGD(lr=0.1), factor=lambda step: 1 / (1 + step)), torch.zeros(2)
    >>> state = opt.init(w)
    >>> for _ in range(2):
    ...     w, state = opt.update(torch.ones(2), state, w)
    >>> w
    tensor([-0.1500, -0.1500])

`gather_gradients` returns `Gradients`: the parameters and their gradients in one order. A wrapper
with a tree of its own makes it by `copied_params`, and pairs it with those by `leaves_beside`. What
it does to tensors in `update` stands within `torch.set_grad_enabled(records(...))`, so that
`nn.Parameter`s leave no history and `torch.func` can differentiate. The guide "Write a wrapper" has
one.

`numbers_of` gives floats, or tensors as they are, a schedule's in float64: `fit` gives such a
number the dtype, the device and the dimensions with which it meets a leaf. Where a wrapper should
count only if one of its numbers is a schedule, as funcopt's do, `first_count_if_scheduled(self,
place)` is `()` otherwise, and stays so. An update must come out the same for the same arguments: a
random number is a function of a key and a count in the state, such as `normal_like` makes, never of
torch's own generator, which vmap refuses and which a checkpoint does not hold.

Where a function of the gradients is all there is, `funcopt.Transform` makes a wrapper of it.
'''

from ._core.pytree import tree_map
from ._core.tensors import fit
from ._core.types import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    COUNT,
    FRACTION,
    SHARE,
    Hyperparam,
    Range,
    Traits,
    check_is_optimizer,
    traits_of,
)
from ._engine.checks import check_state
from ._engine.counts import first_count, next_count
from ._engine.dispatch import safe_sqrt
from ._engine.hyperparameters import normalize_fields, numbers_of
from ._engine.normal import normal_like
from ._engine.prepare import init
from ._engine.registration import check_fields, register_optimizer
from ._engine.rule import Adjoint, Kernel, Slot, StepInputs, StepOutputs, UpdateRule
from ._engine.update import update, update_
from .wrappers._shadow_params import copied_params, leaves_beside
from .wrappers._shared import (
    Gradients,
    check_wrapper_inplace,
    device_of_tensors,
    first_count_if_scheduled,
    gather_gradients,
    records,
    write_fields_and_count,
)

__all__ = [
    "ABOVE_ZERO",
    "AT_LEAST_ZERO",
    "BELOW_ONE",
    "COUNT",
    "FRACTION",
    "SHARE",
    "Adjoint",
    "Gradients",
    "Hyperparam",
    "Kernel",
    "Range",
    "Slot",
    "StepInputs",
    "StepOutputs",
    "Traits",
    "UpdateRule",
    "check_fields",
    "check_is_optimizer",
    "check_state",
    "check_wrapper_inplace",
    "copied_params",
    "device_of_tensors",
    "first_count",
    "first_count_if_scheduled",
    "fit",
    "gather_gradients",
    "init",
    "leaves_beside",
    "next_count",
    "normal_like",
    "normalize_fields",
    "numbers_of",
    "records",
    "register_optimizer",
    "safe_sqrt",
    "traits_of",
    "tree_map",
    "update",
    "update_",
    "write_fields_and_count",
]
