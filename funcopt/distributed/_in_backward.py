"""Updating inside the backward pass: each gradient is used and freed as soon as it exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .._core import pytree
from .._core.inner import OptimizerLike
from .._core.types import Optimizer, check_is_optimizer, own_traits
from ..wrappers.partition import Partition
from ._checks import check_kept
from ._reducer import BucketHook, check_reducer


class InBackward:
    """A module whose parameters move in its backward pass: their state, and how to end it.

    `update_in_backward` makes it. It is a context manager, which ends in `remove`.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import update_in_backward
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with update_in_backward(model, funcopt.SGD()) as handle:
        ...     model(torch.ones(2)).sum().backward()
        >>> handle.state["weight"].step
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, opts: Mapping[str, Optimizer[Any]], params: Mapping[str, Tensor]) -> None:
        self._opts = dict(opts)
        self._params = dict(params)
        self._state = {name: opt.init({name: params[name]}) for name, opt in opts.items()}
        self._handles: list[Any] = []
        self._hook: BucketHook | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The state of each parameter's own optimizer, by the name of the parameter.

        Backward passes write into it. Set it to go on from another one, such as that of a
        checkpoint, which is checked, and written into from then on.

        Raises:
            TypeError: If it is no mapping.
            ValueError: If it does not go with the parameters.
        """
        return dict(self._state)

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(
                f"state is of type {type(state).__name__}: it must be a dict of a state for each "
                f"parameter, {{name: opt.init({{name: parameter}})}}, as a handle has."
            )
        olds, wanted = pytree.flatten(self._state)
        leaves = pytree.pair(dict(state), "state", wanted).leaves
        check_kept(
            leaves,
            olds,
            [old.dtype for old in olds],
            partial(pytree.path, wanted, "state"),
            "Give the state of the same optimizer and parameters.",
        )
        self._state = pytree.unflatten(wanted, leaves)

    def remove(self) -> None:
        """Let backward passes leave gradients again, and move no parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._hook is not None:
            self._hook.closed = True

    def __enter__(self) -> InBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _move(self, name: str, grad: Tensor) -> None:
        own = {name: self._params[name]}
        self._opts[name].update_({name: grad}, self._state[name], own)

    def _take(self, name: str, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is None:
            raise RuntimeError(
                f"The gradient of {name!r} is gone: someone else uses up gradients in the backward "
                f"pass. remove() the one before."
            )
        self._move(name, grad)

    def _attach(self, reduced: DistributedDataParallel | None) -> None:
        """Begin to move the parameters."""
        names: dict[int, str] = {}  # of the parameters that the module averages
        if reduced is not None:
            ignored = getattr(reduced, "parameters_to_ignore", ())
            own = {name: param for name, param in self._params.items() if name not in ignored}
            names = {id(param): name for name, param in own.items()}
            self._hook = BucketHook(
                reduced, list(own.values()), lambda param, grad: self._move(names[id(param)], grad)
            )
        for name, param in self._params.items():
            if id(param) not in names:
                register: Any = param.register_post_accumulate_grad_hook  # untyped in torch
                self._handles.append(register(partial(self._take, name)))
        if self._hook is not None:
            self._hook.closed = False


def update_in_backward(
    module: torch.nn.Module, opt: OptimizerLike[Any], state: Mapping[str, Any] | None = None
) -> InBackward:
    """Let the backward pass move each parameter of a module as soon as its gradient is there.

    The gradient is freed then, so that never all gradients are there at once: that saves about the
    memory of the parameters. Each parameter that requires a gradient now is moved by `opt.update_`
    as the only leaf of a tree, `{name: parameter}`, with a state of its own. So it counts its own
    updates, of the backward passes that reached it, as with `step_per_leaf=True`. The bits are
    those of a loop that updates after the backward pass.

    The optimizer must move each leaf by itself: `SGD`, `ClipValue`, `ClipAdaptive`, `Ema`,
    `Lookahead`, `Accumulate`, `Frozen`, a `Partition` of such, and all whose traits are `leafwise`
    or `elementwise`. Others, such as `Clip`, are refused. One backward pass is one update: to have
    several for one, wrap in `Accumulate`.

    A `DistributedDataParallel` averages gradients by buckets. Parameters move a bucket at a time,
    once it is averaged and while the next one is; the numbers are those that the module itself
    gives. It keeps its buckets, of the size of all parameters; only the gradients beside them are
    freed, and with `gradient_as_bucket_view=True` there are none. Within `no_sync()` gradients add
    up, and nothing moves. A module takes such a hook only once, before its first backward pass, and
    `remove` lets it average as before. Give the `DistributedDataParallel` itself: the parameters of
    the module within it would move before gradients are averaged, which cannot be seen from there.
    Of FSDP2's modules, give one whose parameters are sharded, as they are before the first forward
    pass or after `reshard()`.

    An error in an update comes out of `backward()`, when other parameters have moved already. If
    checkpointed segments share a parameter, use `use_reentrant=False`: with reentrant checkpointing
    each segment runs a backward pass of its own, and moves the parameter by its part of the
    gradient. Until `remove`, parameters and state stay in memory.

    To resume, `handle.state = from_state_dict(handle.state, checkpoint)`, with
    `to_state_dict(handle.state)` before.

    Args:
        module: The module, which goes on to be used as it is. There are no gradients to zero.
        opt: The optimizer.
        state: The `state` of another handle to go on from, which is written into.

    Returns:
        A handle, with the `state`, a dict by the names of the parameters, and `remove()`.

    Raises:
        TypeError: If `opt` is no optimizer, `module` no module, or a parameter no dense tensor.
        ValueError: If `opt` looks at several leaves at once, if no parameter requires a gradient,
            if `state` does not match, if a `DistributedDataParallel` has
            `find_unused_parameters`, `static_graph` or mixed precision, or is within the module.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import update_in_backward
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> handle = update_in_backward(model, funcopt.SGD(lr=0.1, momentum=0.9))
        >>> model(torch.ones(2)).sum().backward()
        >>> model.weight, model.weight.grad
        (Parameter containing:
        tensor([[0.9000, 0.9000]], requires_grad=True), None)
        >>> handle.state["weight"].momentum_buffer
        {'weight': tensor([[1., 1.]])}
        >>> handle.remove()
    """
    check_is_optimizer("opt", opt)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is of type {type(module).__name__}: it must be an nn.Module.")
    reduced = module if isinstance(module, DistributedDataParallel) else None
    if reduced is not None:
        check_reducer(reduced)
    own = module if reduced is None else reduced.module
    for name, part in own.named_modules():
        if isinstance(part, DistributedDataParallel):
            raise ValueError(
                f"module has a DistributedDataParallel in it, {name!r}, whose gradients are "
                f"averaged after a parameter's own hook: each process would move by its own. Give "
                f"that one itself, and compile what is in it rather than it."
            )
    params = {name: param for name, param in own.named_parameters() if param.requires_grad}
    if not params:
        raise ValueError("module has no parameter that requires a gradient: nothing would move.")
    handle = InBackward(_one_for_each(opt, params), params)
    if state is not None:
        handle.state = state
    try:
        handle._attach(reduced)
        return handle
    except BaseException:  # also an interrupt: nobody would have the handle
        handle.remove()
        raise


def _one_for_each(opt: Optimizer[Any], params: dict[str, Tensor]) -> dict[str, Optimizer[Any]]:
    """Return for each leaf, by its name, the optimizer that moves it as `opt` would with the rest.

    In place of a `Partition` comes the optimizer of the leaf's label. One that is not `leafwise` is
    refused.
    """
    if type(opt) is Partition:
        groups = opt._groups(params)
        found = {}
        for label, indices in groups.members.items():
            own = {groups.names[index]: groups.leaves[index] for index in indices}
            found.update(_one_for_each(opt.inner[label], own))
        return {name: found[name] for name in params}
    if not own_traits(opt).leafwise:
        raise ValueError(
            f"opt has a {type(opt).__name__}, which may look at the gradients of several leaves at "
            f"once, as for a norm over all of them: the first would have moved when the last is "
            f"known. If it moves each leaf by itself, say `traits = Traits(leafwise=True)` in its "
            f"class. ClipValue bounds each element by itself; or update after the backward pass."
        )
    wrapped: Any = opt
    if not hasattr(opt, "inner"):
        return dict.fromkeys(params, opt)
    return {
        name: opt if inner is wrapped.inner else dataclasses.replace(wrapped, inner=inner)
        for name, inner in _one_for_each(wrapped.inner, params).items()
    }
