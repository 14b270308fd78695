"""The checks of what goes to other processes: optimizers, meshes, parameters and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .._core import pytree, transforms
from .._core.types import Optimizer, Tree, has_trees, kind_of, optimizers_in, own_traits, traits_of
from .._engine.checks import check_apart, check_leaves, check_unwatched, check_writable, is_like
from .._pure.optimizer import Pure
from ..wrappers._shared import Gradients, records


def check_whole_number(name: str, value: object, or_what: str = "") -> None:
    """Refuse what is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a whole number{or_what}.")
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1.")


def check_untransformed(name: str, *trees: Tree) -> None:
    """Refuse to send anything under a transform, or what is of tensors that have a tangent."""
    if transforms.watched(leaf for tree in trees for leaf in pytree.flatten(tree)[0]):
        raise RuntimeError(
            f"{name} sends tensors to other processes, which a transform (vmap, "
            f"grad, jvp, ...) cannot follow. Take it outside."
        )


def check_unrecorded(opt: Optimizer[Any], gradients: Gradients, state: Tree) -> None:
    """Refuse an update through which a derivative is asked for."""
    if records(opt, gradients, state):
        raise RuntimeError(
            f"The update would be recorded by autograd, and no derivative goes through what "
            f"{type(opt).__name__} sends. Detach the gradients, the state and the "
            f"hyperparameters, or say differentiable=False to the optimizer inside."
        )


def check_packable(inner: Optimizer[Any]) -> None:
    """Refuse an inner optimizer to which buckets are not as good as their leaves."""
    for opt in optimizers_in(inner):
        traits, name = own_traits(opt), type(opt).__name__
        if traits.sends:
            raise ValueError(
                f"inner={inner!r} has a {name}, which takes leaves to be the same on all "
                f"processes (its trait `sends`), where each has its own share of the buckets. Let "
                f"it be around Zero1, with another dimension of the mesh."
            )
        if getattr(opt, "step_per_leaf", False):
            raise ValueError(
                f"inner={inner!r} has step_per_leaf=True, where the inner optimizer sees no leaves "
                f"but buckets of many, which all have a gradient. Leave it out."
            )
        if getattr(opt, "rounding", "nearest") == "stochastic":
            raise ValueError(
                f"inner={inner!r} has rounding='stochastic': its random bits go by the place of an "
                f"element in its leaf, where the inner optimizer sees parts of leaves in buckets. "
                f"Take Compensated({name}(...)) or MasterWeights({name}(...)) instead."
            )
        if has_trees(opt):
            raise ValueError(
                f"inner={inner!r} has a number for each leaf, where the inner optimizer sees "
                f"buckets of many. Give each number an optimizer of its own, outside: "
                f'Partition({{"decay": Zero1(...), ...}}, labels).'
            )
        _check_shapes_of_state(inner, opt)
        _check_counts(inner, opt)
        if traits.tells_leaves_apart:
            raise ValueError(
                f"inner={inner!r} has a {name}, which tells leaves apart (its trait "
                f"`tells_leaves_apart`), where the inner optimizer sees buckets of many. Let it be "
                f"outside, with a Zero1 for each label: "
                f'{name}({{"decay": Zero1(...), ...}}, labels). What clips or skips by the '
                f"gradients of all labels goes around that, with gradients that are averaged "
                f"already: average_gradients(grads, mesh), and Zero1(..., gradients='averaged')."
            )
        if not traits.packable and not traits_of(inner).leafwise:
            raise ValueError(
                f"inner={inner!r} has a {name}, which does not say that leaves may lie in pieces "
                f"or side by side (by its traits `elementwise` or `packable`), where the inner "
                f"optimizer sees buckets of many; nor do all in it say that they move each leaf by "
                f"itself (`leafwise`), for which it would see whole leaves, some in each process. "
                f"Let it be outside, around gradients that are "
                f"averaged already (average_gradients): {name}(Zero1(..., gradients='averaged')); "
                f"or say it in its class, if it is so."
            )


def _check_counts(inner: Any, opt: Any) -> None:
    if isinstance(opt, Pure):
        raise ValueError(
            f"inner={inner!r} has a class of torch.optim, which counts the updates of each leaf, "
            f"where the inner optimizer sees buckets of many. Take funcopt's own optimizer, such "
            f"as funcopt.SGD for torch.optim.SGD, if there is one; or let it be without Zero1, "
            f"with gradients that are averaged before: average_gradients(grads, mesh)."
        )


def _check_shapes_of_state(inner: Any, opt: Any) -> None:
    rule = getattr(opt, "rule", None)
    if rule is not None and any(slot.shape_of is not tuple for slot in rule.slots):
        raise ValueError(
            f"inner={inner!r} has a {type(opt).__name__}, whose state has other shapes than the "
            f"leaves, where shares of buckets hold what has the shape of a leaf. Let it be without "
            f"Zero1, with gradients that are averaged before: average_gradients(grads, mesh)."
        )


def check_kept(
    tensors: Sequence[Any],
    likes: Sequence[Tensor],
    dtypes: Iterable[torch.dtype],
    path: Callable[[int], str],
    remedy: str,
) -> None:
    """Refuse leaves of a state that are not like these in shape and device, or of other dtypes."""
    for index, (tensor, like, dtype) in enumerate(zip(tensors, likes, dtypes, strict=True)):
        if not is_like(tensor, like.shape, dtype, like.device):
            where = f", on {tensor.device}" if isinstance(tensor, Tensor) else ""
            raise ValueError(
                f"{path(index)} is {kind_of(tensor)}{where}: for this parameter it must be a dense "
                f"tensor of {dtype} and shape {tuple(like.shape)}, on {like.device}. {remedy}"
            )


def check_mesh(mesh: object) -> None:
    """Refuse what is no mesh of one dimension that this process is on."""
    if mesh is None:
        return
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh={mesh!r}: must be a DeviceMesh, as init_device_mesh() makes it, or None for "
            f"this process alone."
        )
    if mesh.ndim != 1:
        name = mesh.mesh_dim_names[0] if mesh.mesh_dim_names else "data"
        raise ValueError(
            f"mesh={mesh!r}: has {mesh.ndim} dimensions. Give the one along which data differ, "
            f"by its name: mesh[{name!r}]."
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh={mesh!r}: this process is not on it. Update on its processes alone."
        )


def check_whole(
    leaves: Sequence[Tensor],
    structure: pytree.Structure,
    mesh: DeviceMesh | None,
    inner: Optimizer[Any],
) -> None:
    """Refuse parameters that are sharded already, not where the mesh is, or not what they seem."""
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, DTensor):
            raise TypeError(
                f"{pytree.path(structure, 'params', index)} is a DTensor: Zero1 shares out what is "
                f"whole on every process. Use the inner optimizer itself, which serves DTensors."
            )
        device = transforms.stand_in(leaf.device)
        if mesh is not None and device.type != mesh.device_type:
            raise ValueError(
                f"{pytree.path(structure, 'params', index)} is on {leaf.device}, the mesh on "
                f"{mesh.device_type!r}. Nothing is moved silently: put both on one."
            )
        if leaf.is_complex() and not traits_of(inner).complex_as_pairs:
            raise ValueError(
                f"{pytree.path(structure, 'params', index)} is complex, and lies in its bucket as "
                f"pairs of real numbers, which are not the same to inner={inner!r} (by its trait "
                f"`complex_as_pairs`): a norm, for one, is that of the complex numbers only at "
                f"norm_type=2.0. Give the pairs as the parameter, or let it be around Zero1."
            )


def check_averageable(
    grads: Sequence[Tensor], structure: pytree.Structure, indices: Sequence[int]
) -> None:
    """Refuse gradients without a mean, and sharded ones, given their indices in a tree."""

    def path(position: int) -> str:
        return pytree.path(structure, "grads", indices[position])

    check_leaves(grads, path)
    for position, grad in enumerate(grads):
        if isinstance(grad, DTensor):
            raise TypeError(
                f"{path(position)} is a DTensor, which has a mesh of its own: give what each "
                f"process has of its own (.to_local()), or the whole (.full_tensor())."
            )


def check_gradients(grads: Sequence[Tensor | None], structure: pytree.Structure) -> None:
    """Refuse a gradient that is missing or sharded."""
    for index, grad in enumerate(grads):
        if grad is None:
            raise ValueError(
                f"{pytree.path(structure, 'grads', index)} is None, for which there is no place in "
                f"a bucket. Give zeros, which leave it to its momentum and weight decay; or let a "
                f"Partition around Zero1 keep it as it is, with Frozen."
            )
        if isinstance(grad, DTensor):
            raise TypeError(
                f"{pytree.path(structure, 'grads', index)} is a DTensor, the parameter is not: "
                f"give what each process has of its own (.to_local()), or the whole "
                f"(.full_tensor())."
            )


def check_targets(
    leaves: Sequence[Tensor], grads: Sequence[Tensor], structure: pytree.Structure
) -> None:
    """Refuse parameters that cannot be written, or not without losing something."""
    check_unwatched()
    path, grad_path = (partial(pytree.path, structure, root) for root in ("params", "grads"))
    histories = [
        *(path(index) for index, leaf in enumerate(leaves) if not leaf.is_leaf),
        *(grad_path(index) for index, grad in enumerate(grads) if grad.requires_grad),
    ]
    if histories:
        raise RuntimeError(
            f"{histories[0]} has a history, which writing in place would lose. Detach it, as no "
            f"derivative is wanted."
        )
    check_writable(leaves, path)
    check_apart(leaves, grads, path, grad_path)
