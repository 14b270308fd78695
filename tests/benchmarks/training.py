"""A whole step of training: loss, gradients, clipping and update of a transformer of four layers.

What an optimizer takes beside the rest of a step, and what compiling the whole of it gives: where
the update is a pure function, one graph holds all from the parameters to the new parameters. torch
compiles its model; its clipping and its fused optimizer stay kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.nn.utils import clip_grad_norm_

import funcopt

from .measure import Candidate, Settings, Step, compare
from .results import Section
from .workloads import Tensors, describe

__all__ = ["WORKLOADS", "Size", "candidates", "section"]

WORKLOADS = ("training",)

TORCH = "torch"
TORCH_COMPILED = "torch, model compiled"
BY_GRAD = "funcopt update, torch.func.grad"
BY_AUTOGRAD = "funcopt update, autograd"
IN_PLACE = "funcopt update_, autograd"
BY_GRAD_COMPILED = "funcopt update, one compiled graph"
BY_AUTOGRAD_COMPILED = "funcopt update, model compiled"
IN_PLACE_COMPILED = "funcopt update_, model compiled"

_RATE = 1e-3
_LARGEST_NORM = 1.0


class Size(NamedTuple):
    """How large the model and the batch are."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    vocabulary: int = 512
    context: int = 64
    batch: int = 8


def section(workload: str, settings: Settings) -> Section:
    """Measure a workload."""
    size = Size()
    everyone = [
        Candidate(name, lambda run=run: run().step, required=True)
        for name, run in candidates(size, settings.device).items()
    ]
    measured = compare(everyone, settings)
    about = (
        f"{size.layers} layers of width {size.width}, {size.batch} times {size.context} tokens: "
        f"the loss, its gradients, their norm cut to {_LARGEST_NORM:g}, and AdamW, for everyone. "
        f"{measured.caution()}"
    ).strip()
    rows = [measured.row(candidate.name, TORCH) for candidate in everyone]
    rows += [
        measured.row(name, TORCH_COMPILED, label=f"{name} / {TORCH_COMPILED}", drawn=False)
        for name in (BY_GRAD_COMPILED, BY_AUTOGRAD_COMPILED, IN_PLACE_COMPILED)
    ]
    shapes = {name: tuple(p.shape) for name, p in _model(size).named_parameters()}
    return Section(workload, describe(shapes), about, f"time / {TORCH}", rows)


class Run(NamedTuple):
    """A training run that goes on step by step."""

    step: Step
    params: Callable[[], Tensors]  # as they are after the last step


def candidates(size: Size, device: torch.device) -> dict[str, Callable[[], Run]]:
    """Return for everyone what begins a run. All begin with the same weights and tokens."""
    runs = {
        TORCH: partial(_torch, compiled=False),
        BY_GRAD: partial(_by_grad, compiled=False),
        BY_AUTOGRAD: partial(_by_autograd, in_place=False, compiled=False),
        IN_PLACE: partial(_by_autograd, in_place=True, compiled=False),
        TORCH_COMPILED: partial(_torch, compiled=True),
        BY_GRAD_COMPILED: partial(_by_grad, compiled=True),
        BY_AUTOGRAD_COMPILED: partial(_by_autograd, in_place=False, compiled=True),
        IN_PLACE_COMPILED: partial(_by_autograd, in_place=True, compiled=True),
    }
    return {name: partial(run, size, device) for name, run in runs.items()}


def _torch(size: Size, device: torch.device, *, compiled: bool) -> Run:
    model, tokens = _model(size).to(device), _tokens(size, device)
    opt = torch.optim.AdamW(model.parameters(), _RATE, fused=True)
    logits = torch.compile(model) if compiled else model

    def step() -> None:
        opt.zero_grad()
        _loss(logits(tokens[:, :-1]), tokens).backward()
        clip_grad_norm_(model.parameters(), _LARGEST_NORM)
        opt.step()

    return Run(step, lambda: dict(model.named_parameters()))


def _by_grad(size: Size, device: torch.device, *, compiled: bool) -> Run:
    model, tokens = _model(size).to(device), _tokens(size, device)
    opt = _optimizer()

    def loss(params: Tensors) -> Tensor:
        return _loss(functional_call(model, params, (tokens[:, :-1],)), tokens)

    def train_step(params: Tensors, state: Any) -> tuple[Tensors, Any]:
        return opt.update(grad(loss)(params), state, params)

    params = {name: param.detach() for name, param in model.named_parameters()}
    return _run(torch.compile(train_step) if compiled else train_step, opt.init(params), params)


def _by_autograd(size: Size, device: torch.device, *, in_place: bool, compiled: bool) -> Run:
    model, tokens = _model(size).to(device), _tokens(size, device)
    opt = _optimizer()
    update = opt.update_ if in_place else opt.update

    def loss(params: Tensors) -> Tensor:
        return _loss(functional_call(model, params, (tokens[:, :-1],)), tokens)

    own_loss = torch.compile(loss) if compiled else loss

    def train_step(params: Tensors, state: Any) -> tuple[Tensors, Any]:
        grads = torch.autograd.grad(own_loss(params), list(params.values()))
        return update(dict(zip(params, grads, strict=True)), state, params)

    params = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in params.values():
        param.requires_grad_()
    return _run(train_step, opt.init(params), params)


TrainStep: TypeAlias = Callable[[Tensors, Any], tuple[Tensors, Any]]


def _run(train_step: TrainStep, state: Any, params: Tensors) -> Run:
    def step() -> None:
        nonlocal params, state
        params, state = train_step(params, state)

    return Run(step, lambda: params)


def _optimizer() -> funcopt.Clip:
    # torch's own weight decay, which is that of funcopt's AdamW, too.
    return funcopt.Clip(funcopt.AdamW(lr=_RATE), _LARGEST_NORM)


# ------------------------------------------------------------------------------------- the model


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wider, self.narrower = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.from_heads(mixed.transpose(1, 2).flatten(-2))
        return x + self.narrower(gelu(self.wider(self.norm_2(x))))


class _Transformer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Parameter(0.02 * torch.randn(size.context, size.width))
        self.blocks = nn.Sequential(*(_Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.logits = nn.Linear(size.width, size.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.norm(self.blocks(self.tokens(tokens) + self.places)))


def _model(size: Size) -> _Transformer:
    """Return the model, whose weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Transformer(size)


def _tokens(size: Size, device: torch.device) -> Tensor:
    source = torch.Generator().manual_seed(0)
    shape = size.batch, size.context + 1
    return torch.randint(size.vocabulary, shape, generator=source).to(device)


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
