"""A module that holds the optimizer, as torch's RPC trainer does: scripted, and as it is."""

from typing import Any

import torch
from torch import Tensor, nn

from funcopt.torchscript import FunctionalAdamW

# How a trainer is run.
FORMS = {"scripted": torch.jit.script, "unscripted": lambda trainer: trainer}


class Trainer(nn.Module):
    params: list[Tensor]

    def __init__(self, params: list[Tensor], **options: Any) -> None:
        super().__init__()
        self.params = params
        self.opt = FunctionalAdamW(params, **options)

    @torch.jit.export
    def step(self, gradients: list[Tensor | None]) -> None:
        self.opt.step(gradients)

    @torch.jit.export
    def step_param(self, param: Tensor, grad: Tensor | None) -> None:
        self.opt.step_param(param, grad)

    @torch.jit.export
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self.opt.state

    @torch.jit.export
    def parameters_now(self) -> list[Tensor]:
        return self.params

    @torch.jit.export
    def set_lr(self, lr: float) -> None:
        self.opt.defaults["lr"] = lr


def trainer(form: str, params: list[Tensor], **options: Any) -> Any:
    return FORMS[form](Trainer(params, **options))


def tensors_of(made: Any) -> list[Tensor]:
    """Copy all that a trainer has: parameters, and the state in their order."""
    state = made.state()
    found = list(made.parameters_now())
    for param in made.parameters_now():
        found += state[param].values() if param in state else ()
    return [tensor.detach().clone() for tensor in found]


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Make parameters in several layouts, some of which a kernel could get wrong."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    shapes = [normal(4, 3), normal(), normal(0, 3), normal(5, 2).t(), normal(8, 6)[::2, 1:]]
    return [nn.Parameter(tensor) for tensor in shapes]


def gradients_of(params: list[Tensor], steps: int) -> list[list[Tensor | None]]:
    """Make the gradients of some steps; now and then a parameter has none."""
    return [
        [None if (i + index) % 4 == 3 else torch.randn_like(p) for index, p in enumerate(params)]
        for i in range(steps)
    ]


def step_torch(opt: torch.optim.Optimizer, params: list[Tensor], grads: Any) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    opt.step()
