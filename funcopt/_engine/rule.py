"""What an optimizer says of itself: its state, its numbers, its equations, its kernels, its traits.

The engine knows no optimizer. All that it has to know of one is in an `UpdateRule`: a value, which
the class of the optimizer holds as its attribute `rule`.
"""

from __future__ import annotations

import importlib
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import compute_dtype
from .._core.types import TREES, Hyperparam, Traits

Equations: TypeAlias = Callable[[Tensor, Tensor, tuple[Tensor, ...], Any, Any], Sequence[Tensor]]
"""`equations(param, grad, slots, numbers, options)` gives the new parameter and the new slots."""


class StepInputs(NamedTuple):
    """The tensors that go into a step, leaf by leaf: parallel lists."""

    params: list[Tensor]
    grads: list[Tensor]
    slots: tuple[list[Tensor], ...]  # those trees of the state that are kept, in the rule's order
    ids: list[int] | None = None  # which leaf of the tree each is; None if they are all, in order

    @property
    def columns(self) -> tuple[list[Tensor], ...]:
        """All lists in one tuple."""
        return (self.params, self.grads, *self.slots)

    @property
    def targets(self) -> StepOutputs:
        """What a step in place writes: all but the gradients."""
        return StepOutputs(self.params, self.slots)

    @classmethod
    def of(cls, columns: Iterable[list[Tensor]], ids: list[int] | None = None) -> StepInputs:
        """Return these lists: the parameters, the gradients, and the slots."""
        params, grads, *slots = columns
        return cls(params, grads, tuple(slots), ids)

    def take(self, indices: list[int]) -> StepInputs:
        """Return the leaves at these indices, which are in order."""
        if len(indices) == len(self.params):
            return self
        ids = indices if self.ids is None else [self.ids[i] for i in indices]
        return StepInputs.of([[column[i] for i in indices] for column in self.columns], ids)


class StepOutputs(NamedTuple):
    """The tensors that come out of a step, leaf by leaf."""

    params: list[Tensor]
    slots: tuple[list[Tensor], ...]
    starts: list[int] | None = None  # where all of them start in memory, if that is known

    @property
    def columns(self) -> tuple[list[Tensor], ...]:
        """All lists in one tuple."""
        return (self.params, *self.slots)

    @classmethod
    def of(cls, columns: Iterable[list[Tensor]]) -> StepOutputs:
        """Return these lists, of which the first is that of the parameters."""
        params, *slots = columns
        return cls(params, tuple(slots))

    def take(self, indices: list[int]) -> StepOutputs:
        """Return the leaves at these indices, which are in order."""
        if len(indices) == len(self.params):
            return self
        return StepOutputs.of([[column[i] for i in indices] for column in self.columns])


_NUMBERS = (int, float)  # False is one, too
_FLOAT = frozenset((float,))


class Slot(NamedTuple):
    """A tree of the state that is like the parameters.

    Attributes:
        name: The field of the state.
        option: The field of the optimizer that must be neither False nor 0 for the slot to be
            kept; always kept if it is empty. Where it is not kept, the state holds `()`.
        is_moment: Whether its dtype is what `moments` says; else it is the parameter's.
        shape_of: `shape_of(shape)` returns its shape beside a parameter of a shape; by default the
            same. Another one is only for a rule that is not elementwise.
    """

    name: str
    option: str = ""
    is_moment: bool = True
    shape_of: Callable[[torch.Size], Sequence[int]] = tuple

    def is_kept(self, opt: Any) -> bool:
        """Whether an optimizer keeps this slot."""
        if not self.option:
            return True
        value = getattr(opt, self.option)
        return not (isinstance(value, _NUMBERS) and value == 0)


def slot_dtype(slot: Slot, moments: torch.dtype | str | None, param: torch.dtype) -> torch.dtype:
    """Return the dtype of a slot beside a parameter of a dtype.

    Raises:
        ValueError: If there is no complex dtype for the moments of a complex parameter.
    """
    if not slot.is_moment or moments is None:
        return param
    if not isinstance(moments, torch.dtype):
        return compute_dtype(param)
    if not param.is_complex:
        return moments
    if moments is not torch.float32:
        raise ValueError(
            f"moments={moments} beside a parameter of {param}: there is no complex dtype of that "
            f"precision. Give moments='auto', or another one to the complex leaves, by a Partition."
        )
    return torch.complex64


def _serves_all(_device: torch.device, _numbers: Any) -> str | None:
    """Refuse nothing."""
    return None


def _serves_alike(param: torch.dtype, slots: Sequence[torch.dtype]) -> bool:
    """Serve slots in the dtype of the parameter alone."""
    return all(slot is param for slot in slots)


class Kernel(NamedTuple):
    """A way to make the step of many leaves at once.

    The leaves that a kernel is given are of the same dtypes, on one device, real, dense, and the
    tensors of a leaf are laid out alike. Nobody differentiates or maps over what it does.

    Attributes:
        step_: `step_(inputs, numbers, options)` writes the new parameters and slots over the old.
        unsupported_reason: `unsupported_reason(device, numbers)` says why leaves on this device
            (with these numbers, if they are given) cannot be served, None if they can.
        step_to: `step_to(inputs, outputs, numbers, options)` writes the same into the tensors of a
            `StepOutputs`, each laid out like its parameter, if a kernel can do that in one pass.
            Such a kernel is given all leaves of a dtype and device at once.
        scales_gradients: Whether it multiplies gradients by `numbers.grad_scale` on its way.
        takes_members: Whether numbers may differ between the members of stacked leaves.
        takes_leaves: Whether numbers may be `PerLeaf`.
        launcher: `launcher(inputs, options)` returns what makes steps of leaves of these sizes, and
            knows all that is the same in each. Its `step(inputs, outputs, numbers, new_count=None,
            applies=None, addresses=None)` writes into the outputs, which may be the inputs'
            targets. `addresses` has where the inputs start, column by column, if that is known.
        counts_on_device: Whether it takes two more. Where `new_count` is given, a float64 tensor of
            shape () on the device, `numbers.step` is one as well, the count before the step, and
            the one after it is written there, perhaps over it. Where the bool tensor `applies` is
            False, outputs and count are what they were before the step, to the bit.
        serves_dtypes: `serves_dtypes(param, slots)` says whether it takes these dtypes of a
            parameter and its slots; by default, only those where all are one.
        rounds_stochastically: Whether it rounds to 16 bits as `rounding="stochastic"` wants it.
    """

    step_: Callable[[StepInputs, Any, Any], None]
    unsupported_reason: Callable[[torch.device, Any], str | None] = _serves_all
    step_to: Callable[[StepInputs, StepOutputs, Any, Any], None] | None = None
    scales_gradients: bool = False
    takes_members: bool = False
    takes_leaves: bool = False
    launcher: Callable[[StepInputs, Any], Any] | None = None
    counts_on_device: bool = False
    serves_dtypes: Callable[[torch.dtype, Sequence[torch.dtype]], bool] = _serves_alike
    rounds_stochastically: bool = False


class Adjoint(NamedTuple):
    """A derivative of the step that is written by hand.

    Attributes:
        keep: `keep(inputs, outputs, needs)` returns lists of those tensors that the derivative
            needs. `needs` has for each number whether its cotangent is wanted.
        pull_back: `pull_back(kept, numbers, options, needs, cotangents)` returns the cotangents of
            the numbers, and those of the columns of `StepInputs`, from those of the columns of
            `StepOutputs`. None stands for zeros. Each has the shape of what it belongs to: that of
            a 0-dim number is a sum. In `grad` of `vmap`, both have first dimensions of members.
    """

    keep: Callable[[StepInputs, StepOutputs, Any], Sequence[list[Tensor]]]
    pull_back: Callable[..., tuple[list[Tensor | None], list[list[Tensor | None]]]]


def _as_they_are(numbers: Any, _options: Any) -> Any:
    return numbers


class Setup(NamedTuple):
    """What is fixed about an optimizer.

    Attributes:
        options: A NamedTuple of what the rule names in `options`, and of `kernel`, `moments`,
            `rounding`, `differentiable` and `step_per_leaf`, which an optimizer may leave out.
        kept: For each slot of the rule, whether it is kept.
        slots: Those that are.
        numbers: The hyperparameters, if all are Python numbers: then they are the same at every
            update, and were checked.
        trees: Which of them are trees, with a number for each leaf.
    """

    options: Any
    kept: tuple[bool, ...]
    slots: tuple[Slot, ...]
    numbers: tuple[float, ...] | None
    trees: tuple[int, ...]

    def keeps(self, dtypes: Iterable[tuple[torch.dtype, ...]]) -> bool:
        """Whether slots like their parameters, of all these dtypes, are as it keeps them."""
        moments = self.options.moments
        return all(
            dtype is slot_dtype(slot, moments, param) and slot.shape_of is tuple
            for param, *kept in dtypes
            for slot, dtype in zip(self.slots, kept, strict=True)
        )


# What any optimizer may have as a field, and what holds where it has none.
_COMMON = {
    "kernel": "auto",
    "moments": None,
    "rounding": "nearest",
    "differentiable": None,
    "step_per_leaf": False,
}


@dataclass(frozen=True, eq=False)
class UpdateRule:
    """All that the engine has to know of an optimizer.

    Args:
        state: The class of its state: a NamedTuple of `step` and then the slots.
        slots: The trees of the state that are like the parameters, in the order of the equations.
        hyperparams: Its numbers, in the order of `numbers`.
        equations: One step of one leaf in plain differentiable operators: the definition, and what
            tracers see. It is called as `equations(param, grad, slots, numbers, options)`; 16-bit
            leaves come to it in float32, complex ones of an elementwise rule as pairs of real ones.
        equations_: The same written over the parameter and the slots, which spares most of the
            memory that operators ask for.
        coefficients: What the equations want in place of the numbers themselves, such as bias
            corrections: `coefficients(numbers, options)` gives a NamedTuple, once for all leaves.
            Tensors among the numbers come to it in float64, and go to the equations in the dtype
            of the leaf.
        options: The fields of the optimizer, flags mostly, that the equations look at.
        kernels: Faster ways by name, in the order in which `"auto"` tries them: a `Kernel`, or
            `"package.module:NAME"`, which is imported when it is first asked for.
        adjoint: The derivative by hand, or where to import it from; else it is that of the
            equations.
        traits: What may be done with its leaves; none is the careful answer.
        real_only: Whether complex leaves are refused, with their path.

    Example:
        >>> from funcopt import SGD
        >>> [slot.name for slot in SGD.rule.slots], SGD.rule.traits.elementwise
        (['momentum_buffer'], True)
    """

    state: type[Any]
    slots: tuple[Slot, ...]
    hyperparams: tuple[Hyperparam, ...]
    equations: Equations
    equations_: Callable[[Tensor, Tensor, tuple[Tensor, ...], Any, Any], None] | None = None
    coefficients: Callable[[Any, Any], Any] = _as_they_are
    options: tuple[str, ...] = ()
    kernels: Mapping[str, Kernel | str] = field(default_factory=dict)
    adjoint: Adjoint | str | None = None
    traits: Traits = field(default_factory=Traits)
    real_only: bool = False

    numbers: Callable[..., Any] = field(init=False, repr=False)
    paths: Mapping[str, str] = field(init=False, repr=False)
    _options: Callable[..., Any] = field(init=False, repr=False)
    _loaded: dict[str, Kernel] = field(init=False, repr=False, default_factory=dict)
    _places: Sequence[tuple[str, int | None]] = field(init=False, repr=False)
    optional: Sequence[int] = field(init=False, repr=False)  # the slots that may not be kept

    def __post_init__(self) -> None:
        """Check that the state is made of these slots, and make the NamedTuples of the rule.

        `numbers` is the one of the numbers of a step: the count of updates with this one (from 1),
        the hyperparameters, the key of random bits (0 if there are none), `active`, which is 0
        for members that stay as they are, and `grad_scale`, by which gradients are multiplied
        first. A tensor among them is 0-dim, or has the leading dimensions of every leaf (each of
        the same size or of size 1): so numbers that differ between the members of a vmap arrive
        here. `paths` is what users and messages call them.
        """
        fields = getattr(self.state, "_fields", None)
        wanted = ("step", *(slot.name for slot in self.slots))
        if fields not in (wanted, (*wanted, "key")):
            raise TypeError(
                f"state={self.state!r}: must be a NamedTuple with the fields {', '.join(wanted)}, "
                f"which are the count of updates and the slots of the rule, and perhaps key=(), "
                f"of random bits."
            )
        paths = {"step": "step", **{own.name: own.path for own in self.hyperparams}}
        paths |= {"key": "state.key", "active": "active", "grad_scale": "grad_scale"}
        made: dict[str, Any] = {
            "numbers": namedtuple("Numbers", paths, defaults=[0.0, 1.0, 1.0]),
            "paths": paths,
            "_options": namedtuple("_Options", [*self.options, *_COMMON]),
        }
        made["_places"] = [own.place for own in self.hyperparams]
        made["optional"] = [index for index, slot in enumerate(self.slots) if slot.option]
        for name, value in made.items():
            object.__setattr__(self, name, value)
        _STATES.add(self.state)

    def setup_of(self, opt: Any) -> Setup:
        """Return what is fixed about an optimizer, which remembers it."""
        setup: Setup | None = vars(opt).get("_setup")
        if setup is None:
            setup = self.set_up(opt)
            if not transforms.compiling():
                object.__setattr__(opt, "_setup", setup)
        return setup

    def state_of(self, setup: Setup, kept: Iterable[Any], key: Any) -> Any:
        """Return the state of a count, of the slots that are kept, and of a key; () is none."""
        own = iter(kept)
        state = self.state(next(own), *[next(own) if is_kept else () for is_kept in setup.kept])
        return state if type(key) is tuple else state._replace(key=key)

    def set_up(self, opt: Any) -> Setup:
        """Find out what is fixed about an optimizer."""
        own = [getattr(opt, name) for name in self.options]
        if (name := getattr(opt, "kernel", "auto")) in self.kernels:
            self.kernel(name)  # loaded here, since a compiler cannot import it
        options = self._options(*own, *(getattr(opt, *common) for common in _COMMON.items()))
        given = tuple(self.hyperparams_of(opt))
        numbers = given if is_read(given) else None
        kept = tuple(slot.is_kept(opt) for slot in self.slots)
        trees = tuple(i for i, own in enumerate(given) if isinstance(own, TREES))
        return Setup(options, kept, tuple(compress(self.slots, kept)), numbers, trees)

    def hyperparams_of(self, opt: Any) -> list[Any]:
        """Return the hyperparameters of an optimizer as they were given, in order."""
        return [
            getattr(opt, field) if index is None else getattr(opt, field)[index]
            for field, index in self._places
        ]

    def kept_slots(self, opt: Any) -> list[Slot]:
        """Return those slots that an optimizer keeps."""
        return [slot for slot in self.slots if slot.is_kept(opt)]

    @cached_property
    def kernel_names(self) -> tuple[str, ...]:
        """What `kernel` may be."""
        return ("auto", *self.kernels, "plain")

    def kernel(self, name: str) -> Kernel:
        """Return the kernel of this name."""
        kernel = self._loaded.get(name)
        if kernel is None:
            kernel = self._loaded[name] = _loaded(self.kernels[name])
        return kernel

    @cached_property
    def derivative(self) -> Adjoint | None:
        """The derivative by hand, if there is one."""
        derivative: Adjoint | None = _loaded(self.adjoint)
        return derivative


_STATES: weakref.WeakSet[type] = weakref.WeakSet()


def is_state(node: object) -> bool:
    """Whether something is the state of an optimizer that is made by a rule."""
    return type(node) in _STATES


def _loaded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    module, _, name = value.partition(":")
    return getattr(importlib.import_module(module), name)


def is_read(numbers: Any) -> bool:
    """Whether all numbers are Python numbers."""
    return _FLOAT.issuperset(map(type, numbers))
