"""AdamW as a TorchScript class: in place of torch's own in its DDP, RPC and ZeRO trainers.

`FunctionalAdamW` has the interface of `torch.distributed.optim._FunctionalAdamW`, and `register`
puts it where torch's trainers look for that. The class keeps the state, since that is what a
scripted module saves. All else is done by operators written in Python, which call `funcopt.AdamW`:
a scripted module that uses the class runs where Python does, and where this module was imported,
before `torch.jit.load` as well. Otherwise torch says `Unknown builtin op: funcopt::adamw_check`.
"""

# The annotations of a scripted class are read by TorchScript, which does not follow strings.

import importlib
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]  # which torch did not list

from . import _operators

__all__ = ["FunctionalAdamW", "register", "unregister"]


class _Turn:
    """Keep other threads from making a step, in TorchScript, which leaves a `with` on an error."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> None:
        torch.ops.funcopt.begin_step()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        torch.ops.funcopt.end_step()


class FunctionalAdamW:
    """AdamW with gradients as arguments and its state by parameter, for scripted modules.

    The interface is that of `torch.distributed.optim._FunctionalAdamW`, the numbers are those of
    `funcopt.AdamW`: by default, on the CPU in float32 and float64, to the bit those of
    `torch.optim.AdamW(foreach=False)`. It differs from torch's class in that

    - a step either moves all that has a gradient or raises and moves nothing, unless Ctrl-C comes
      in its middle;
    - gradients that are sparse, or not of the shape, dtype and device of their parameter, are
      refused, as are hyperparameters that are NaN or infinite;
    - steps exclude each other: any number of threads may take them at once, with one optimizer or
      with several that share parameters;
    - it can be built and saved in a scripted module, with any kernel;
    - `state[param]["step"]` is a float64 tensor, which counts on beyond 2**24. A float32 one, as
      torch makes it, is served as well, and stays one.

    Args:
        params: The parameters that `step` moves: dense floating-point or complex tensors.
        lr: Learning rate: at least 0.
        betas: Decay rates of the two running means: each at least 0 and below 1.
        eps: Added to the denominator: at least 0.
        weight_decay: At least 0, multiplied by the learning rate.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend instead of descending.
        foreach: Take the foreach kernel instead of the plain one.
        fused: Take the fused kernel.
        _allow_empty_param_list: Whether `params` may be empty, as for `step_param` alone.

    Attributes:
        defaults: The hyperparameters `lr`, `beta1`, `beta2`, `eps` and `weight_decay`, as each step
            reads them.
        param_group: The parameters, under `"params"`.
        state: Of each parameter that had a gradient: `step`, `exp_avg`, `exp_avg_sq` and, with
            amsgrad, `max_exp_avg_sq`.

    Raises:
        ValueError: If a hyperparameter is out of range, both kernels are asked for, or there is no
            parameter. When scripted, every error is a `RuntimeError` with the same message.

    Example:
        >>> import torch
        >>> from funcopt.torchscript import FunctionalAdamW
        >>> class Trainer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.ones(2))
        ...         self.opt = FunctionalAdamW([self.w], lr=0.1)
        ...
        ...     def forward(self, x: torch.Tensor):
        ...         grads = torch.autograd.grad([(self.w * x).sum()], [self.w])
        ...         self.opt.step(grads)
        >>> trainer = torch.jit.script(Trainer())
        >>> trainer(torch.ones(2))
        >>> trainer.w
        Parameter containing:
        tensor([0.8990, 0.8990], requires_grad=True)
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool = False,
        fused: bool = False,
        _allow_empty_param_list: bool = False,
    ) -> None:
        self.defaults = {
            "lr": float(lr),
            "eps": float(eps),
            "beta1": float(betas[0]),
            "beta2": float(betas[1]),
            "weight_decay": float(weight_decay),
        }
        self.amsgrad = amsgrad
        self.maximize = maximize
        self.foreach = foreach
        self.fused = fused
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.param_group = {"params": params}
        torch.ops.funcopt.adamw_check(self.defaults, amsgrad, maximize, foreach, fused)
        if len(params) == 0 and not _allow_empty_param_list:
            raise ValueError(
                "params is empty, so that no step would ever move anything. Give the parameters, "
                + "or say _allow_empty_param_list=True to give them to step_param()."
            )

    def step(self, gradients: list[Tensor | None]) -> None:
        """Move the parameters that the optimizer was given.

        Args:
            gradients: For each parameter its gradient, like it in shape, dtype and device, or None,
                which leaves the parameter and its state as they are.

        Raises:
            ValueError: If there are not as many gradients as parameters, one does not match its
                parameter, or two parameters start at one place; the message has the index.
            TypeError: If a gradient or parameter is not dense, or no dtype that can be moved.
        """
        self._move(self.param_group["params"], gradients)

    def step_param(self, param: Tensor, grad: Tensor | None) -> None:
        """Move one parameter, be it among those that the optimizer was given or not, as `step`."""
        self._move([param], [grad])

    def _move(self, params: list[Tensor], gradients: list[Tensor | None]) -> None:
        if is_scripting():
            with _Turn():
                self._step(params, gradients)
        else:
            _operators.exclusively(self._step, params, gradients)

    def _step(self, params: list[Tensor], gradients: list[Tensor | None]) -> None:
        states: list[dict[str, Tensor]] = []
        for param in params:
            states.append(self.state.get(param, {}))
        started = torch.ops.funcopt.adamw_step_(
            params,
            gradients,
            states,
            self.defaults,
            self.amsgrad,
            self.maximize,
            self.foreach,
            self.fused,
        )
        for param, state in zip(params, started):  # noqa: B905  # TorchScript has no strict=
            if len(state) > 0:
                self.state[param] = state


# Compiled here, so that an error shows now and not at first use. Without torch's warning that its
# compiler is deprecated: who uses the class knows.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    torch.jit.script(FunctionalAdamW)


class _Undo:
    """Undoes one call of `register` on exit."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        try:
            self._undo()
        except BaseException:  # an interrupt
            self._undo()
            raise

    def _undo(self) -> None:
        if self in _registration:
            unregister()


# While `FunctionalAdamW` stands in torch's table: the context manager of the call of `register`
# that put it there, and what stood there before.
_registration: list[Any] = []


def register() -> AbstractContextManager[object]:
    """Let torch's trainers use `FunctionalAdamW` wherever they are asked for `torch.optim.AdamW`.

    They are `DistributedOptimizer` (where it is built; the workers that own parameters need no
    call of their own, only funcopt), `DistributedDataParallel._register_fused_optim`,
    `ZeroRedundancyOptimizer(overlap_with_ddp=True)` and `as_functional_optim`. What was built
    before keeps the class it has. All read one table,
    `torch.distributed.optim.utils.functional_optim_map`, which `torch.distributed.optim.optimizer`
    and `zero_redundancy_optimizer` import by name; it is changed in place, so they see it as well.

    Returns:
        A context manager that undoes it on exit; it may be left unused. Where the class was in the
        table already, nothing is done, and nothing undone on exit. If Ctrl-C comes just when it
        begins to undo, call `unregister`.

    Example:
        >>> import torch
        >>> from funcopt import torchscript
        >>> with torchscript.register():
        ...     opt = torch.distributed.optim.as_functional_optim(torch.optim.AdamW, lr=0.1)
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt.step_param(w, torch.ones(2))
        >>> w
        Parameter containing:
        tensor([0.8990, 0.8990], requires_grad=True)
    """
    table = _table()
    if table.get(torch.optim.AdamW) is FunctionalAdamW:
        return nullcontext()
    undo = _Undo()
    _registration[:] = [undo, table.get(torch.optim.AdamW)]
    # Last, and no call: an interrupt comes before, or when the caller has the way back.
    table[torch.optim.AdamW] = FunctionalAdamW
    return undo


def unregister() -> None:
    """Undo `register`: put back what it found. Where another class stands by now, it stays.

    Example:
        >>> from funcopt import torchscript
        >>> _ = torchscript.register()
        >>> torchscript.unregister()
    """
    table = _table()
    if not _registration or table.get(torch.optim.AdamW) is not FunctionalAdamW:
        return
    _, found = _registration
    if found is None:
        del table[torch.optim.AdamW]
    else:
        table[torch.optim.AdamW] = found
    _registration.clear()


def _table() -> dict[type, Any]:
    # torch's own way in, `register_functional_optim`, does nothing where a class stands already.
    utils = importlib.import_module("torch.distributed.optim.utils")  # slow, and not in all builds
    table: dict[type, Any] = utils.functional_optim_map
    return table
