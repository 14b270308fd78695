"""What makes a class an optimizer: it is a pytree, its fields are checked, its methods served."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .._core.hyperparameters import check_choice, check_flag, normalize_fields
from .._core.node import register_dataclass
from .._core.traits import optimizers_in, own_traits
from . import driver
from .entry import wrap_methods
from .resting import as_inner, leaves_at_rest
from .rule import UpdateRule

__all__ = ["check_fields", "register_optimizer"]

OptimizerT = TypeVar("OptimizerT")


def register_optimizer(cls: type[OptimizerT]) -> type[OptimizerT]:
    """Make a frozen dataclass an optimizer: a pytree node, with methods that serve every tensor.

    The tensors among its fields, at any depth, are leaves for `torch.func` and for optree. Two
    values are equal if their tensors are, in value, dtype, shape and device, and all else is. Its
    methods run with autocast turned off, and those that update are given the local parts of
    DTensors in place of these, if its `traits` allow it. One with a field `inner` leaves at rest
    what that one does. A wrong call of the class names the arguments there are, and says where
    parameters go.

    Returns:
        The class, so that this can stand above its definition.
    """
    dataclass: Any = cls  # which is more than its type says
    fields = [field.name for field in dataclasses.fields(dataclass)]
    advice = "Parameters are given to init(): opt = {}; state = opt.init(params)."
    register_dataclass(cls, advice.format(f"{cls.__name__}({'...' if fields else ''})"))
    wrap_methods(cls)
    driver.serve(cls)
    if "inner" in fields:
        leaves_at_rest(cls, as_inner)
        dataclass.__init__ = _checking_order(dataclass.__init__)
    return cls


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
    normalize_fields(opt, rule.hyperparams)
    defaults = {field.name: field.default for field in dataclasses.fields(opt)}
    for name, default in defaults.items():
        if isinstance(default, bool) and name in (*rule.options, "step_per_leaf"):
            check_flag(name, getattr(opt, name))
    if getattr(opt, "differentiable", None) is not None:
        check_flag("differentiable", opt.differentiable)
    if "kernel" in defaults:
        check_choice("kernel", opt.kernel, rule.kernel_names)


def _check_group(opt: Any, field: str, length: int) -> None:
    """Refuse what is not so many numbers, and keep what is as a tuple."""
    value = getattr(opt, field)
    if not isinstance(value, tuple | list) or len(value) != length:
        wanted = "a pair" if length == 2 else f"{length} numbers"
        default = next(own.default for own in dataclasses.fields(opt) if own.name == field)
        raise TypeError(f"{field}={value!r}: must be {wanted}, such as {default}.")
    object.__setattr__(opt, field, tuple(value))
