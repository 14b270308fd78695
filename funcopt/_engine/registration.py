"""What makes a class an optimizer: it is a pytree, its fields are checked, its methods served."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.types import (
    Hyperparam,
    Range,
    Tree,
    at_rest,
    leaves_at_rest,
    optimizers_in,
    own_traits,
    remember_traits,
)
from .checks import sharding
from .hyperparameters import check_choice, check_flag, normalize_fields
from .rule import UpdateRule

OptimizerT = TypeVar("OptimizerT")
StateT = TypeVar("StateT")


def register_optimizer(cls: type[OptimizerT]) -> type[OptimizerT]:
    """Make a frozen dataclass an optimizer: a pytree node, with methods that serve every tensor.

    The tensors among its fields, at any depth, are leaves for `torch.func` and for optree. Two
    values are equal if their tensors are, in value, dtype, shape and device, and all else is. Its
    methods run with autocast turned off, and those that update are given the local parts of
    DTensors in place of these, if its `traits` allow it. One with a field `inner` leaves at rest
    what that one does. A wrong call of the class names the arguments there are, and says where
    parameters go. It shows itself by what differs from the default, unless it has a `__repr__` of
    its own.

    Returns:
        The class, so that this can stand above its definition.

    Raises:
        TypeError: If it is no frozen dataclass, or one of its hyperparameters names no field.
    """
    from .._core import show, torch_names  # noqa: PLC0415  # apart, as no update needs them
    from .definitions import check_definition  # noqa: PLC0415  # likewise

    check_definition(cls)
    dataclass: Any = cls  # which is more than its type says
    fields = [field.name for field in dataclasses.fields(dataclass)]
    advice = "Parameters are given to init(): opt = {}; state = opt.init(params)."
    if getattr(vars(cls).get("traits"), "rests", False):
        leaves_at_rest(cls, lambda _, leaves, __: range(len(leaves)))
    register_dataclass(cls, advice.format(f"{cls.__name__}({'...' if fields else ''})"))
    wrap_methods(cls)
    remember_traits(cls)
    dataclass.__getstate__ = without_memory
    show.let_optimizers_show(cls)
    torch_names.refuse_names_of_torch(cls)
    if "inner" in fields:
        leaves_at_rest(cls, lambda opt, leaves, own: at_rest(opt.inner, leaves, own))
        dataclass.__init__ = _checking_order(dataclass.__init__)
    return cls


def state_class(cls: type[StateT]) -> type[StateT]:
    """Let states, NamedTuples of trees, show shapes where tensors are large.

    `torch.load(weights_only=True)` reads them from now on. Returns the class.
    """
    from .._core import show  # noqa: PLC0415  # as above

    show.let_states_show(cls)
    return cls


def without_memory(opt: Any) -> dict[str, Any]:
    """Return all that an optimizer is made of, without what it only remembers."""
    return {name: value for name, value in vars(opt).items() if name not in _REMEMBERED}


_REMEMBERED = frozenset(("_setup", "_checked", "_read"))


def _checking_order(init: Callable[..., None]) -> Callable[..., None]:
    """Refuse a wrapper that decides by the gradients of one process, where others go on.

    It would decide otherwise on each: where one leaves a step out, processes that go on together by
    the mean of their gradients are a step apart for good.
    """

    @functools.wraps(init)
    def checked(opt: Any, *args: Any, **kwargs: Any) -> None:
        init(opt, *args, **kwargs)
        inner = next((p for p in optimizers_in(opt) if own_traits(p).takes_local_gradients), None)
        if inner is None or inner is opt or own_traits(opt).linear:
            return
        name, within = type(opt).__name__, type(inner).__name__
        raise ValueError(
            f"{name} is around {within}, which takes the gradients of each process by itself: what "
            f"{name} makes of them (it does not have the trait `linear`) would differ between "
            f"processes, which would go apart. Let it be inside, {within}({name}(...), ...); or "
            f"around Zero1 with gradients that are averaged before: average_gradients(grads, mesh) "
            f"and Zero1(..., gradients='averaged'); or, if what it hands on depends linearly on "
            f"the gradients, say so: traits = Traits(linear=True, ...)."
        )

    return checked


_MOMENTS = (torch.bfloat16, torch.float16, torch.float32)


def _check_moments(moments: object) -> None:
    """Refuse what is no dtype that moments can be kept in, nor says which one that is."""
    if moments in ("auto", None) or moments in _MOMENTS:
        return
    kinds = ", ".join(map(str, _MOMENTS))
    raise ValueError(
        f"moments={moments!r}: must be 'auto' (float32 beside 16-bit parameters, else the "
        f"parameter's dtype), None (the parameter's dtype), or one of {kinds}."
    )


_ROUNDINGS = ("nearest", "stochastic")
_SEED = Hyperparam(
    "seed",
    Range(
        "must be a whole number of at least 0 and below 2**53",
        lambda value: 0.0 <= value < 2.0**53 and value == int(value),
        whole=True,
    ),
)


def check_fields(opt: Any) -> None:
    """Check and normalize the fields of an optimizer that has a `rule`: for its `__post_init__`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.
    """
    rule: UpdateRule = opt.rule
    for own in rule.hyperparams:
        field, index = own.place
        if index == 0:
            _check_group(opt, field, sum(field == other.place[0] for other in rule.hyperparams))
    normalize_fields(opt, rule.hyperparams, trees=True)
    defaults = {field.name: field.default for field in dataclasses.fields(opt)}
    for name, default in defaults.items():
        if isinstance(default, bool) and name in (*rule.options, "step_per_leaf"):
            check_flag(name, getattr(opt, name))
    if getattr(opt, "differentiable", None) is not None:
        check_flag("differentiable", opt.differentiable)
    if "kernel" in defaults:
        check_choice("kernel", opt.kernel, rule.kernel_names)
    if "moments" in defaults:
        _check_moments(opt.moments)
    if "rounding" in defaults:
        check_choice("rounding", opt.rounding, _ROUNDINGS)
        normalize_fields(opt, (_SEED,))
    object.__setattr__(opt, "_setup", rule.set_up(opt))


def _check_group(opt: Any, field: str, length: int) -> None:
    """Refuse what is not so many numbers, and keep what is as a tuple."""
    value = getattr(opt, field)
    if not isinstance(value, tuple | list) or len(value) != length:
        wanted = "a pair" if length == 2 else f"{length} numbers"
        default = next(own.default for own in dataclasses.fields(opt) if own.name == field)
        raise TypeError(f"{field}={value!r}: must be {wanted}, such as {default}.")
    object.__setattr__(opt, field, tuple(value))


def wrap_methods(cls: Any) -> None:
    """Let an optimizer keep out of autocast, and its updates serve DTensors.

    The outermost optimizer replaces each by its local part, and makes of the results DTensors that
    lie as the old ones do. Optimizers within it are given plain tensors, with which nothing is done
    here. (`init` needs no such thing: to make zeros and copies is what a DTensor can do by itself.)
    Where it is being compiled, such an update stays out of the graph, as does one of many leaves.
    All three leave the thread's gradient mode as it was, whatever ends them.
    """
    served: dict[str, Callable[[Any], Any]] = {
        "init": lambda method: transforms.restoring(transforms.outside_autocast(method)),
        "update": functools.partial(_serving, in_place=False),
        "update_": functools.partial(_serving, in_place=True),
    }
    for name, serve in served.items():
        if name in vars(cls):
            setattr(cls, name, serve(vars(cls)[name]))


def _serving(method: Callable[..., Any], *, in_place: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def serve(self: Any, grads: Tree, state: Tree, params: Tree, **extras: Any) -> Any:
        if extras:
            return _with_extras(serve, in_place, self, grads, state, params, extras)
        shards = sharding()
        sharded = shards is not None and shards.has_sharded(params)
        own = functools.partial(_on_local_parts, method) if sharded else method
        if transforms.autocasting():
            own = functools.partial(transforms.without_autocast, own)
        if transforms.compiling():
            if sharded or _too_many_to_compile(params):
                return transforms.uncompiled(serve, self, grads, state, params)
            return own(self, grads, state, params)
        if transforms.capturing():
            _check_replayed(self, state, params)
        enabled = torch.is_grad_enabled()
        try:
            return own(self, grads, state, params)
        except BaseException:  # an interrupt may have come before something else put it back
            transforms.set_grad_enabled(enabled)
            raise

    return serve


def _with_extras(*args: Any) -> Any:
    from .extras import update_with_extras  # noqa: PLC0415  # which most updates do without

    return update_with_extras(*args)


def _on_local_parts(method: Callable[..., Any], *args: Any) -> Any:
    from . import sharded  # noqa: PLC0415  # which nobody needs who has no DTensors

    return getattr(sharded, method.__name__)(method, *args)


def _check_replayed(opt: Any, state: Tree, params: Tree) -> None:
    from .captured import check_replayed  # noqa: PLC0415  # nor this, who captures nothing

    check_replayed(opt, state, params)


# Compiling takes a fraction of a second for each leaf, and more for each the more there are.
_MOST_TO_COMPILE = 400


def _too_many_to_compile(params: Tree) -> bool:
    """Whether an update that is being compiled had better stay out of the graph.

    Where it cannot, within a derivative or a vmap and in an export, it goes in at whatever length.
    """
    if transforms.exporting() or transforms.transformed():
        return False
    if isinstance(params, (dict, list, tuple)) and len(params) > _MOST_TO_COMPILE:
        return True  # without a look inside
    return len(pytree.flatten(params)[0]) > _MOST_TO_COMPILE


DataclassT = TypeVar("DataclassT")


class _Static(NamedTuple):
    """What of an optimizer is no leaf: all but the tensors among its fields."""

    structure: pytree.Structure
    dynamic: tuple[bool, ...]  # for each leaf of that structure, whether it is a tensor
    leaves: tuple[Any, ...]  # the others


def register_dataclass(cls: type[DataclassT], advice: str = "") -> type[DataclassT]:
    """Make a frozen dataclass a pytree node for `torch.func` and for optree.

    Fields may be trees themselves: of a pair of numbers, or of another such value, the tensors are
    leaves. Two values are equal if their tensors are, in value, dtype, shape and device, and all
    else is; a hash knows nothing of the values of tensors, which may be filled with others. A wrong
    call of the class names the arguments there are, and gives this advice besides.
    """
    dataclass: Any = cls  # which is more than its type says
    fields = [field.name for field in dataclasses.fields(dataclass)]

    def flatten(opt: DataclassT) -> tuple[list[Any], _Static]:
        if "_placeholders" in vars(opt):
            children, static = vars(opt)["_placeholders"]
            return children, static
        leaves, structure = pytree.flatten({name: getattr(opt, name) for name in fields})
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)], _Static(
            structure,
            tuple(isinstance(leaf, Tensor) for leaf in leaves),
            tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor)),
        )

    def unflatten(static: _Static, children: Iterable[Any]) -> DataclassT:
        # Not through __init__: transforms rebuild a node around placeholders, which no check knows.
        children = list(children)
        tensors, others = iter(children), iter(static.leaves)
        leaves = [next(tensors if dynamic else others) for dynamic in static.dynamic]
        opt = object.__new__(cls)
        for name, value in pytree.unflatten(static.structure, leaves).items():
            object.__setattr__(opt, name, value)
        if not all(isinstance(child, Tensor) for child in children):
            # What is no tensor would not be found to be a leaf again, so remember that it is one.
            object.__setattr__(opt, "_placeholders", (children, static))
        return opt

    def names(opt: DataclassT) -> list[str]:
        _, static = flatten(opt)
        paths = pytree.paths(static.structure, "")
        return [
            path.replace("['", "", 1).replace("']", "", 1)
            for path, dynamic in zip(paths, static.dynamic, strict=True)
            if dynamic
        ]

    pytree.register_node(cls, flatten, unflatten, names)
    _registered.add(cls)
    dataclass.__eq__, dataclass.__hash__ = _comparing(fields)
    if transforms.OLD_DYNAMO:
        from .._core.old_dynamo import let_it_hash  # noqa: PLC0415

        let_it_hash(cls)
    dataclass.__init__ = _explaining(dataclass.__init__, cls.__name__, fields, advice)
    return cls


# By the very type, as whoever flattens them goes by.
_registered: set[type] = set()


def is_registered(value: object) -> bool:
    """Whether something is an optimizer or schedule, of which tensors alone are leaves."""
    return type(value) in _registered


def _comparing(
    fields: list[str],
) -> tuple[Callable[[Any, object], Any], Callable[[Any], int]]:
    """Return what says whether two values with these fields are equal, and what hashes one."""

    def equal(opt: Any, other: object) -> Any:
        if type(other) is not type(opt):
            return NotImplemented
        return all(_are_equal(getattr(opt, name), getattr(other, name)) for name in fields)

    def hashed(opt: Any) -> int:
        return hash((type(opt), *(_hashable(getattr(opt, name)) for name in fields)))

    return equal, hashed


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two fields are equal, or two parts of them."""
    for kind in (tuple, list):
        if isinstance(one, kind) and isinstance(other, kind):
            return len(one) == len(other) and all(map(_are_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if one is other:
        return True
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return bool(one == other)
    if _hashable(one) != _hashable(other):
        return False
    try:
        return torch.equal(one, other)
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(
            "whether two optimizers are equal depends on tensors whose values cannot be read here: "
            "they are mapped over, traced, or on the meta device. Compare them outside."
        ) from error


def _hashable(value: Any) -> Any:
    """Return what of a field goes into a hash: of a tensor not the values, which may change."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return frozenset((key, _hashable(part)) for key, part in value.items())
    return value if isinstance(value, Hashable) else type(value)


def _explaining(
    init: Callable[..., None], name: str, fields: list[str], advice: str
) -> Callable[..., None]:
    """Make the error of a wrong call list the arguments."""

    @functools.wraps(init)
    def explained(*args: Any, **kwargs: Any) -> None:
        try:
            init(*args, **kwargs)
        except TypeError as error:
            own = error.__traceback__
            if own is None or own.tb_next is not None:  # then it is from within
                raise
            found = str(error).partition("() ")[2] or str(error)
            takes = ", ".join(fields) or "no arguments"
            raise TypeError(f"{name}() {found}. It takes {takes}. {advice}".rstrip()) from None

    return explained
