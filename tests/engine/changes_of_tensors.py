"""What may be done to one tensor of a loop between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .loops import Change, Loop, Trees

PLACES = ("params", "grads", "slot", "own")


class Named(Tensor):
    """A subclass that overrides nothing."""


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what casts, without the warning of torch that an imaginary part is lost."""
    return lambda t: (t.detach().real if t.is_complex() else t.detach()).to(dtype)


def in_inference(tensor: Tensor) -> Tensor:
    """Return a copy made in inference mode."""
    with torch.inference_mode():
        return tensor.detach().clone()


def _with_data(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # with data from elsewhere torch itself cannot use it
            return tensor
        tensor.data = make(tensor.detach())
        return tensor

    return change


def _offset(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:1], flat])[flat.numel() > 0 :].view(tensor.shape)


def _transposed(tensor: Tensor) -> Tensor:
    order = list(reversed(range(tensor.ndim)))
    return tensor.detach().permute(order).contiguous().permute(order)


def _sliced(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach(), tensor.detach()], -1)[..., 0]


def _set(tensor: Tensor) -> Tensor:
    other = tensor.detach() + 1
    with torch.no_grad():
        return tensor.set_(other.untyped_storage(), 0, tensor.shape, tensor.stride())


def _resized(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.resize_((tensor.numel() + 6,)).fill_(1.0)  # what is new in it is anything


def _grown(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(2 * tensor.untyped_storage().nbytes() + 64)
    return tensor


def _swapped(tensor: Tensor) -> Tensor:
    torch.utils.swap_tensors(tensor, cast(torch.float64)(tensor))
    return tensor


# What one tensor is replaced by, or what is done to it.
OF_A_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "cloned": lambda t: t.detach().clone(),
    "detached": Tensor.detach,
    "a view": lambda t: t.view(t.shape),
    "an alias": torch.ops.aten.alias,
    "a lazy clone": lambda t: torch._lazy_clone(t.detach()),
    "told to require a gradient": Tensor.requires_grad_,
    "told to require none": lambda t: t.requires_grad_(False) if t.is_leaf else t.detach(),
    "with a history": lambda t: t.detach().clone().requires_grad_() * 1,
    "a parameter of a module": lambda t: nn.Parameter(t.detach().clone()),
    "of a subclass": lambda t: t.detach().clone().as_subclass(Named),
    "given other data": _with_data(lambda t: t + 1),
    "given data of another dtype": _with_data(cast(torch.bfloat16)),
    "given data of another shape": _with_data(lambda t: t[None]),
    "given transposed data": _with_data(_transposed),
    "set to another storage": _set,
    "resized": _resized,
    "in a storage that was resized": _grown,
    "swapped for another": _swapped,
    "not aligned": _offset,
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": lambda t: t.detach().sum().expand(t.shape),
    "negative when read": lambda t: torch.complex(t.detach(), -t.detach()).conj().imag,
    "in float64": cast(torch.float64),
    "in float16": cast(torch.float16),
    "in complex64": cast(torch.complex64),
    "in int64": cast(torch.int64),
    "without values": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "of inference mode": in_inference,
    "from NumPy": lambda t: torch.from_numpy(t.detach().numpy().copy()),
    "in shared memory": lambda t: t.detach().clone().share_memory_(),
    "not a number": lambda t: t.detach() * float("nan"),
    "of one more dimension": lambda t: t.detach()[None],
    "empty": lambda t: t.detach().reshape(-1)[:0],
    "None": lambda t: None,
    "a number": lambda t: 1.0,
}


def of_a_tensor(how: Callable[[Tensor], Any], place: str, name: str = "w") -> Change:
    """Return the change of one leaf of one tree."""

    @contextmanager
    def change(loop: Loop) -> Iterator[None]:
        before = loop.change_grads
        if place == "params":
            loop.params = _changed(loop.params, name, how)
        elif place == "grads":
            loop.change_grads = lambda grads: _changed(before(grads), name, how)
        else:
            loop.state = in_state(loop.state, place, lambda tree: _changed(tree, name, how))
        loop.look_again()  # at what is held, which the change may have written
        yield
        loop.change_grads = before

    return change


def _changed(tree: Any, name: str, how: Callable[[Tensor], Any]) -> Any:
    return {key: how(leaf) if key == name else leaf for key, leaf in tree.items()}


def in_state(state: Any, place: str, how: Callable[[Trees], Any]) -> Any:
    """Change a tree of a state: a slot of the innermost one, or the wrapper's own if it has one."""
    if place == "slot" and hasattr(state, "inner"):
        return state._replace(inner=in_state(state.inner, place, how))
    for field, value in zip(state._fields, state, strict=True):
        if isinstance(value, dict) and field != "step":
            return state._replace(**{field: how(value)})
    return state
