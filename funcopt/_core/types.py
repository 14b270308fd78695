"""What an optimizer is, a tree, a schedule, a number, and what an optimizer says of itself.

Nobody recognizes an optimizer by its class or by the names of its fields. Whoever cuts, packs,
stacks or shards leaves, or wants to know what a wrapper does with gradients, asks for its traits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict, TypeVar, runtime_checkable

import torch
from torch import Tensor

Tree: TypeAlias = Any
"""Tensors in any nest of dicts, lists, tuples, NamedTuples or registered pytree nodes.

A bare tensor is a tree of one leaf. No type checker can spell this, so it is an alias of `Any`.
"""

Number: TypeAlias = float | Tensor
"""A Python number or a 0-dim tensor; beneath a vmap, with dimensions of members."""

Schedule: TypeAlias = Callable[[Any], Number]  # a number for a plot; optimizers give a tensor
"""A pure function from the count of updates made so far (a 0-dim tensor) to a hyperparameter."""

NumberTree: TypeAlias = dict[Any, Any] | list[Any] | tuple[Any, ...]
"""A tree of hyperparameters, one for each leaf of the parameters, or for all below a node of it."""

ParamsT = TypeVar("ParamsT")
StateT = TypeVar("StateT")


class Extras(TypedDict, total=False):
    """What `update` and `update_` of every optimizer here may be told besides the three trees.

    The outermost optimizer takes them: none within has to hand them on, and they reach every depth.

    Attributes:
        active: Whether the update is made at all: a bool, or a bool tensor of shape (), which under
            vmap may be one for each member. Where it is False, parameters, state and counts keep
            every bit, whatever the gradients are. Default: True.
        value: A score of the parameters that are given, such as a validation loss: a number, or a
            floating-point tensor of shape (), likewise. `Best` and `Plateau` go by it; without them
            it is checked, and changes nothing. No derivative flows through it. Default: None.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.SGD(lr=0.1)
        >>> params = {"w": torch.ones(2)}
        >>> opt.update({"w": torch.ones(2)}, opt.init(params), params, active=False)[0]
        {'w': tensor([1., 1.])}
    """

    active: bool | Tensor | None
    value: Number | None


@runtime_checkable
class Optimizer(Protocol[StateT]):
    """What every optimizer here is: a value with three methods.

    There is no base class: whatever has these methods is an optimizer, and a wrapper around one
    (gradient clipping, say) is a value with the same three methods. What holds of the methods of
    all is said here; a class says what is special about its own. What may be done with its leaves,
    it says in its attribute `traits`: see `Traits`.

    Example:
        >>> import funcopt
        >>> isinstance(funcopt.SGD(), funcopt.Optimizer)
        True
    """

    def init(self, params: Tree) -> StateT:
        """Return the state before the first update. Never touches `params`.

        Args:
            params: The parameters: any tree of dense floating-point or complex tensors that share
                no memory. Those that `Frozen` leaves at rest may be anything.

        Raises:
            TypeError: If a leaf is anything else.
            ValueError: If two leaves share their memory.
        """

    def update(self, grads: Tree, state: StateT, params: ParamsT) -> tuple[ParamsT, StateT]:
        """Return the new parameters and the new state, in fresh memory. The inputs are not changed.

        On the CPU, small leaves of what is returned may share a storage, of up to 2**18 elements:
        clone one before you save it alone or call `resize_` on it.

        Args:
            grads: The gradients: a tree with the keys of `params`, each like its parameter in
                shape, dtype and device, or None, which leaves that parameter alone.
            state: The state that `init` or the last update returned.
            params: The parameters.

        Returns:
            The pair `(new_params, new_state)`. Leaves of `Frozen` are the very tensors that were
            given.

        Raises:
            TypeError: If a leaf is no such tensor, or the state is that of another optimizer.
            ValueError: If the trees, or a leaf and its parameter, do not match; or if a
                hyperparameter is not one number, or is out of range, now that it is looked at again
                or its schedule is called.
        """
        ...

    def update_(self, grads: Tree, state: StateT, params: ParamsT) -> tuple[ParamsT, StateT]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Everything is checked before anything is written. But if an interrupt (Ctrl-C) comes in the
        middle, they are half-written.

        Args:
            grads: The gradients, as for `update`, which are not written.
            state: The state, which is overwritten.
            params: The parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or if a derivative would be lost: what
                goes into the update has a history, or requires a gradient and is no parameter.
            TypeError: As `update`.
            ValueError: As `update`; or if a tensor to be written is expanded, or starts in memory
                where another one, or a gradient, does.
        """
        ...


def check_is_optimizer(name: str, value: object) -> None:
    """Refuse what is no optimizer to wrap."""
    if not isinstance(value, Optimizer) or isinstance(value, type):
        raise TypeError(
            f"{name}={value!r}: must be an optimizer, which has init, update and update_. Give an "
            f"instance, such as SGD()."
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is strided and not nested: some nested tensors have that layout, too.

    What looks at every leaf of every step asks both questions itself, which takes half the time.
    """
    return tensor.layout is torch.strided and not tensor.is_nested


def shown_layout(tensor: Tensor) -> str:
    """Return the layout of a tensor that is not dense, for a message."""
    return "a nested layout" if tensor.is_nested else f"layout {tensor.layout}"


def kind_of(value: object) -> str:
    """Return what something is, as messages have it."""
    if not isinstance(value, Tensor):
        return "None" if value is None else f"of type {type(value).__name__}"
    if value.is_nested:
        return f"a nested tensor of {value.dtype}"
    layout = "" if is_dense(value) else f" and layout {value.layout}"
    return f"of {value.dtype} and shape {tuple(value.shape)}{layout}"


def shown(value: object) -> str:
    """Return a shape, dtype or device as messages have it."""
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


@dataclass(frozen=True)
class Traits:
    """What holds of an optimizer. Whatever is not said does not hold.

    A class says it of itself, in its attribute `traits` (or in that of its rule). Where it depends
    on the arguments, it is a property. A wrapper speaks of what it does on its own; what holds of
    it together with the optimizers inside holds of each.

    Args:
        elementwise: Each element moves by its own gradient, value and state, as with Adam, so that
            leaves may be cut, packed, stacked and sharded. Then the next four hold, too.
        leafwise: Each leaf moves by itself, as with Muon.
        shardable: Leaves may be the local parts of sharded ones: what is computed over a whole
            leaf, or over several, is reduced over the processes.
        packable: Leaves may lie in pieces, or side by side, in one tensor, as for a norm over all.
        complex_as_pairs: Complex leaves may come as pairs of real ones, as in such a tensor.
        memberwise: Dimension 0 of every tensor is the member of a stack, and each member is updated
            as the optimizer within would update it alone. So members may be sharded, each whole in
            one process, whatever that optimizer computes over its leaves.
        linear: What it hands to the inner optimizer commutes with the mean over processes, which
            may be taken before or after, as with a factor. What clips or skips is not linear.
        by_rule: Its updates are those of its rule and nothing besides, so that what wraps it may
            go to the engine itself, as with a number to multiply gradients by.
        rests: It leaves every leaf, and its own state, as they are.
        sees_overflow: It has to see gradients that are infinite or NaN, as a loss scale has: nobody
            around it may take such a step away.
        sends: It sends tensors to other processes.
        takes_local_gradients: The gradients that it takes are those of this process alone, so that
            a norm of them, or whether they are finite, differs from process to process.
        tells_leaves_apart: It treats leaves by their names, or counts for each of them, so that
            they must not lie side by side as one.
        decides_on_host: What an update does depends on what the host knows, beyond tensors, so that
            a CUDA graph would not replay it.
        small_steps_add_up: Steps below half a unit in the last place move a 16-bit parameter, at
            least in the mean. Only what moves parameters last can say it, not what is inside.

    Example:
        >>> import funcopt
        >>> funcopt.SGD.rule.traits.elementwise
        True
    """

    elementwise: bool = False
    leafwise: bool = False
    shardable: bool = False
    memberwise: bool = False
    packable: bool = False
    complex_as_pairs: bool = False
    linear: bool = False
    by_rule: bool = False
    rests: bool = False
    sees_overflow: bool = False
    sends: bool = False
    takes_local_gradients: bool = False
    tells_leaves_apart: bool = False
    decides_on_host: bool = False
    small_steps_add_up: bool = False

    def __post_init__(self) -> None:
        """Add what follows from an element's moving by itself."""
        if self.elementwise:
            for name in ("leafwise", "shardable", "packable", "complex_as_pairs"):
                object.__setattr__(self, name, True)


ELEMENTWISE = Traits(elementwise=True, linear=True)
ELEMENTWISE_BY_RULE = Traits(elementwise=True, linear=True, by_rule=True)

# These hold of a wrapper if they hold of it or of an optimizer within it; the others, of each.
_WARNINGS = frozenset(
    ("decides_on_host", "sees_overflow", "sends", "takes_local_gradients", "tells_leaves_apart")
)
_said: dict[type, Traits] = {}


def remember_traits(cls: type) -> None:
    """Note what a class says of itself, if it does not depend on the arguments."""
    said = vars(cls)
    traits = said.get("traits") or getattr(said.get("rule"), "traits", None)
    if isinstance(traits, Traits):
        _said[cls] = traits


def own_traits(opt: object) -> Traits:
    """Return what a class says of itself, without the optimizers inside.

    A subclass may do otherwise than what it inherits from. Of that class it has the warnings alone.
    What is in a field, it was told itself.
    """
    traits = _said.get(type(opt))
    if traits is None:
        said = vars(type(opt))
        given = getattr(opt, "traits", None) or getattr(getattr(opt, "rule", None), "traits", None)
        traits = given if isinstance(given, Traits) else Traits()
        if not {"traits", "rule"} & {*said, *getattr(opt, "__dict__", ())}:
            traits = Traits(**{name: getattr(traits, name) for name in _WARNINGS})
    if getattr(opt, "rounding", "nearest") == "stochastic":
        # Its random bits go by the place of an element in its leaf, and of the leaf in the tree.
        known = {name: getattr(traits, name) for name in ("leafwise", "linear", "by_rule")}
        return Traits(**known, tells_leaves_apart=True, small_steps_add_up=True)
    if getattr(opt, "step_per_leaf", False) or has_trees(opt):
        return dataclasses.replace(traits, tells_leaves_apart=True)
    return traits


def optimizers_in(opt: Any, *, of_stacks: bool = False) -> Iterator[Any]:
    """Yield an optimizer and all that are within it.

    Of stacks: without those that see the members of a stack one by one.
    """
    yield opt
    inner = None if of_stacks and own_traits(opt).memberwise else getattr(opt, "inner", None)
    for part in inner.values() if isinstance(inner, Mapping) else () if inner is None else (inner,):
        yield from optimizers_in(part, of_stacks=of_stacks)


def traits_of(opt: object) -> Traits:
    """Return what holds of an optimizer together with all that are within it."""
    said, whole = [own_traits(part) for part in optimizers_in(opt)], {}
    for name in _NAMES:
        values = [getattr(traits, name) for traits in said]
        whole[name] = True in values if name in _WARNINGS else False not in values
    return Traits(**whole)


TREES = (dict, list, tuple)  # as in `NumberTree`


def has_trees(opt: object) -> bool:
    """Whether a hyperparameter is a tree, which mostly was found out before."""
    if (trees := getattr(getattr(opt, "_setup", None), "trees", None)) is not None:
        return bool(trees)
    hyperparams = getattr(getattr(opt, "rule", None), "hyperparams", ())
    return any(isinstance(own.of(opt), TREES) for own in hyperparams)


_NAMES = tuple(field.name for field in fields(Traits))


Rule: TypeAlias = Callable[[Any, Sequence[Any], Any], Collection[int]]
"""Of an optimizer, leaves and their structure: which leaves it leaves at rest, by their indices."""

# By the very type: what another wrapper hands on to the optimizer within it is not known.
_resting: dict[type, Rule] = {}


def leaves_at_rest(kind: type, rule: Rule) -> None:
    """Let a rule say of optimizers of a type which leaves they leave at rest, by their indices."""
    _resting[kind] = rule


def at_rest(opt: Optimizer[Any], leaves: Sequence[Any], structure: Any) -> Collection[int]:
    """Return which of its leaves an optimizer leaves at rest, by their indices."""
    rule = _resting.get(type(opt))
    return () if rule is None else rule(opt, leaves, structure)


def may_rest(opt: Optimizer[Any]) -> bool:
    """Whether an optimizer may leave a leaf at rest, found without any."""
    if type(opt) not in _resting:
        return False
    inner: Any = getattr(opt, "inner", None)
    if inner is None:
        return True
    return any(map(may_rest, inner.values())) if isinstance(inner, Mapping) else may_rest(inner)


class Range(NamedTuple):
    """What values a hyperparameter may have."""

    words: str  # as a message says it: "must be ..."
    holds: Callable[[float], bool]  # False for a NaN, which is in no range
    whole: bool = False  # it counts something


AT_LEAST_ZERO = Range("must be finite and at least 0", lambda value: 0.0 <= value < math.inf)
ABOVE_ZERO = Range("must be finite and above 0", lambda value: 0.0 < value < math.inf)
BELOW_ONE = Range("must be at least 0 and below 1", lambda value: 0.0 <= value < 1.0)
FRACTION = Range("must be at least 0 and at most 1", lambda value: 0.0 <= value <= 1.0)
SHARE = Range("must be above 0 and at most 1", lambda value: 0.0 < value <= 1.0)
COUNT = Range(
    "must be a whole number of at least 1",
    lambda value: 1.0 <= value < math.inf and value == int(value),
    whole=True,
)


class Hyperparam(NamedTuple):
    """A number of an optimizer.

    Attributes:
        name: As the equations call it, such as `"momentum"`.
        range: What it may be.
        field: The field of the optimizer that holds it, if that has another name. `"betas[0]"` is
            the first of a pair.
    """

    name: str
    range: Range
    field: str = ""

    @property
    def path(self) -> str:
        """As users and messages call it."""
        return self.field or self.name

    @property
    def place(self) -> tuple[str, int | None]:
        """The field that holds it, and which one of several in there it is."""
        field, _, index = self.path.partition("[")
        return field, int(index[:-1]) if index else None

    def of(self, opt: Any) -> Any:
        """Return what an optimizer was given for it."""
        if not self.field:
            return getattr(opt, self.name)
        field, index = self.place
        value = getattr(opt, field)
        return value if index is None else value[index]

    def put(self, opt: Any, value: Any) -> None:
        """Replace what a frozen optimizer was given for it."""
        field, index = self.place
        if index is not None:
            own = getattr(opt, field)
            value = (*own[:index], value, *own[index + 1 :])
        object.__setattr__(opt, field, value)
