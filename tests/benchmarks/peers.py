"""Other libraries' AdamW as candidates, where they are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from .measure import Absent, Candidate, Step, in_turn
from .workloads import Tensors

__all__ = [
    "OPTAX",
    "OPTAX_MAPPED",
    "TORCHOPT",
    "candidates",
    "installed",
    "optax_mapped",
    "torchopt_update",
    "version",
]

OPTAX = "optax jit"
OPTAX_MAPPED = "optax jit(vmap)"
TORCHOPT = "TorchOpt"

_MISSING = "not installed"


def candidates(params: Tensors, grads: Tensors) -> list[Candidate]:
    """Return the peers' steps on a tree, whether they can be taken here or not."""
    return [
        Candidate(TORCHOPT, partial(_torchopt, params, grads, accelerated=False)),
        Candidate("TorchOpt accelerated", partial(_torchopt, params, grads, accelerated=True)),
        Candidate(OPTAX, partial(_optax, params, grads, donated=False)),
        Candidate("optax jit, donated", partial(_optax, params, grads, donated=True)),
    ]


def version(library: str) -> str:
    """Return the version that is installed, or say that none is."""
    return importlib.metadata.version(library) if installed(library) else _MISSING


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def _need(*libraries: str) -> None:
    if not all(map(installed, libraries)):
        raise Absent(_MISSING)


def torchopt_update(
    lr: float = 1e-3, *, accelerated: bool
) -> tuple[Callable[..., Any], Callable[..., tuple[Any, Any]]]:
    """Return TorchOpt's AdamW as `init` and as an `update` that changes nothing."""
    _need("torchopt")
    import torchopt

    opt = torchopt.adamw(lr, use_accelerated_op=accelerated)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # Only so is the accelerated operator recorded by autograd, too.
        moves, state = opt.update(grads, state, params=params, inplace=False)
        return torchopt.apply_updates(params, moves, inplace=False), state

    return opt.init, update


def _torchopt(params: Tensors, grads: Tensors, *, accelerated: bool) -> Step:
    init, update = torchopt_update(accelerated=accelerated)
    return in_turn(update, grads, init(params), params)


def _optax(params: Tensors, grads: Tensors, *, donated: bool) -> Step:
    return _optax_in_turn(params, grads, mapped=False, donated=donated)


def optax_mapped(params: Tensors, grads: Tensors) -> Step:
    """Return a step of every member of a stacked ensemble, mapped and compiled."""
    return _optax_in_turn(params, grads, mapped=True, donated=False)


def _optax_in_turn(params: Tensors, grads: Tensors, *, mapped: bool, donated: bool) -> Step:
    _need("optax", "jax")
    import jax
    import optax

    own, given = _arrays(params), _arrays(grads)
    opt = optax.adamw(1e-3, weight_decay=1e-2)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        moves, state = opt.update(grads, state, params)
        return optax.apply_updates(params, moves), state

    # Put where the results will be, or everything would be compiled again for the second step.
    state = jax.device_put((jax.vmap(opt.init) if mapped else opt.init)(own), _device(params))
    compiled = jax.jit(
        jax.vmap(update) if mapped else update, donate_argnums=(1, 2) if donated else ()
    )

    def step() -> None:
        nonlocal own, state
        own, state = jax.block_until_ready(compiled(given, state, own))

    return step


def _arrays(tensors: Tensors) -> dict[str, Any]:
    """Return copies that jax owns: it cannot give away memory that it does not."""
    import jax

    device = _device(tensors)
    return {
        name: jax.device_put(tensor.cpu().numpy(), device, may_alias=False)
        for name, tensor in tensors.items()
    }


def _device(tensors: Tensors) -> Any:
    """Return jax's name for the device that tensors are on."""
    import jax

    platform = next(iter(tensors.values())).device.type
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        raise Absent(f"this jax has no {platform}") from None
