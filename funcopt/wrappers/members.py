"""An optimizer of stacked members, each with its own state and, where they differ, numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Unpack

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.inner import InnerT_co, OptimizerLike
from .._core.tensors import write
from .._core.types import (
    Extras,
    Number,
    Optimizer,
    ParamsT,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
    own_traits,
    traits_of,
)
from .._engine.checks import sharding
from .._engine.extras import (
    check_is_mask,
    forget_value,
    takes_extras_of_members,
    told_members,
)
from .._engine.prepare import are_shards, keep_requiring
from .._engine.registration import register_optimizer
from .._engine.stacked_wrappers import update_stacked
from ._rows import Rows, rows_of


@register_optimizer
@dataclass(frozen=True)
class Members(Generic[InnerT_co]):
    r"""Update the members of a stack, each as the inner optimizer would update it alone.

    With members $i$, whose parameters $\theta_i$, gradients $g_i$ and states $s_i$ are stacked
    along dimension 0 of every tensor,

    $$ \theta_i', s_i' = \mathrm{update}_i(g_i, s_i, \theta_i), $$

    which is what `torch.func.vmap(opt.update)` makes of them, to the bit. So each member has a
    gradient norm of its own beneath `Clip`, and a count of its own beneath `Accumulate`. `update_`
    is there for every inner optimizer.

    Where the innermost optimizer moves each element by itself, all members take one step of a
    kernel, without a vmap, which takes many times longer than the step. On the CPU that also holds
    within these wrappers, and these within each other: `Clip`, `ClipValue`, `Ema`, `Accumulate`,
    `SkipNonfinite`, `LossScale`, `Best`, `Plateau`, `Lookahead`, `MasterWeights` and `Partition`.
    All else is mapped over by vmap: other wrappers; any wrapper on another device; a wrapper around
    `Frozen` leaves, or one of whose numbers is a schedule; `Lookahead` with `reset_state`; within
    wrappers, a mask for a kernel that takes no members, parameters that require a gradient, are
    complex, or do not lie one element after another; and whatever a derivative is asked of.

    `active=` and `value=` have one for each member, or one for all. In place, the parameters and
    state of a member that is not active are not written. The fewer members of many parameters are
    active, the less a step costs; of small ones, a few that rest are not worth a mask.

    What is mapped over by vmap on the CPU is computed, in place, for the rows of the active members
    alone, and for some others, up to 63, that keep every bit as it is among all of them: so it is
    for many members. For all it is computed where a bit may depend on how many there are, as with
    `Muon`.

    Members may lie on many processes, as DTensors that are sharded along dimension 0, or whole on
    each. A step sends nothing: each member is whole in one process, so that its norm is known
    there. What `init` makes lies as the parameters do, and so must gradients and state. Numbers of
    the members, `active=` and `value=` are such DTensors, or plain tensors of shape `(members,)`
    with all members, the same on every process, of which each takes its own.

    Args:
        inner: The optimizer. Of its numbers, those of shape `(members,)` differ between members, as
            `funcopt.members.stack` makes them; numbers and tensors of shape `()` are for all.

    Raises:
        TypeError: If `inner` is no optimizer.
        ValueError: In a step, if a DTensor does not lie so: the message says where to bring it.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Members(funcopt.SGD(lr=torch.tensor([0.1, 0.2, 0.3])))
        >>> params = {"w": torch.ones(3, 2)}
        >>> state = opt.init(params)
        >>> stays = torch.tensor([True, True, False])
        >>> params, state = opt.update({"w": torch.ones(3, 2)}, state, params, active=stays)
        >>> params["w"], state.step
        (tensor([[0.9000, 0.9000],
                [0.8000, 0.8000],
                [1.0000, 1.0000]]), tensor([1., 1., 0.], dtype=torch.float64))
    """

    traits: ClassVar[Traits] = Traits(leafwise=True, shardable=True, memberwise=True, linear=True)

    inner: InnerT_co

    def __post_init__(self) -> None:
        """Check the inner optimizer."""
        check_is_optimizer("inner", self.inner)

    def init(self: Members[OptimizerLike[StateT]], params: Tree) -> StateT:
        """Return the state before the first update: that of each member, stacked.

        Args:
            params: The parameters, with tensors of shape `(members, ...)`.

        Raises:
            TypeError: As the inner optimizer does.
            ValueError: Likewise, or if two tensors have not as many members, or DTensors lie
                otherwise than along dimension 0.
        """
        shards = sharding()
        if shards is None or not shards.has_sharded(params):
            state: StateT = _init(self.inner, params)
            return state
        from .._dtensor import members  # noqa: PLC0415  # which nobody needs who has no DTensors

        sharded: StateT = members.init(_init, self.inner, params)
        return sharded

    def update(
        self: Members[OptimizerLike[StateT]],
        grads: Tree,
        state: StateT,
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, StateT]:
        """Return the new parameters and the new state, in fresh memory."""
        return self._update(grads, state, params, None, None, in_place=False)

    def update_(
        self: Members[OptimizerLike[StateT]],
        grads: Tree,
        state: StateT,
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, StateT]:
        """Do the same in place.

        What is mapped over by vmap is computed out of place first, which takes memory of its size,
        or of the rows of the active members.
        """
        return self._update(grads, state, params, None, None, in_place=True)

    def _update(
        self,
        grads: Tree,
        state: Any,
        params: Tree,
        active: Tensor | None,
        value: Number | None,
        *,
        in_place: bool,
    ) -> tuple[Tree, Any]:
        """Update with what is told of each member, or of all."""
        inner, told = self.inner, {"active": active, "value": value}
        shards = sharding()
        if shards is not None and (are_shards() or shards.has_sharded((inner, told))):
            from .._dtensor import members  # noqa: PLC0415  # which few need

            return members.update(_update, inner, grads, state, params, told, in_place=in_place)
        return _update(inner, grads, state, params, active, value, in_place=in_place)


def _init(inner: Optimizer[Any], params: Tree) -> Any:
    trees = {"params": params}
    _check_members(trees, {"inner": inner})
    return _mapped(lambda own, trees: own.init(trees["params"]), inner, trees)


def _update(
    inner: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    active: Tensor | None,
    value: Number | None,
    *,
    in_place: bool,
) -> tuple[Tree, Tree]:
    """Update a stack with what is told of each member, or of all."""
    if active is not None:
        check_is_mask(active)
    made = _update_together(inner, grads, state, params, active, value, in_place=in_place)
    if made is not None:
        return made
    trees = {"grads": grads, "state": state, "params": params, "active": active, "value": value}
    told = {root: tree for root, tree in trees.items() if tree is not None}
    numbers = {"inner": inner, "active": active, "value": value}
    _check_members({"grads": grads, "state": state, "params": params}, numbers)
    if in_place and _update_active_(inner, told):
        return params, state
    news: tuple[Tree, Tree] = _mapped(_updated, inner, told)
    keep_requiring(*(_tensors(tree) for tree in (news[0], params)))
    if not in_place:
        return news
    with torch.no_grad():
        for old, new in zip(_tensors((params, state)), _tensors(news), strict=True):
            write(old, new)
    return params, state


def _update_together(
    inner: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    active: Tensor | None,
    value: Number | None,
    *,
    in_place: bool,
) -> tuple[Tree, Tree] | None:
    """Update all members by one step of a kernel; None, and nothing done, if that is not so."""
    if value is None and (active is None or active.ndim == 1):
        return update_stacked(inner, grads, state, params, active, in_place=in_place)
    tensors = _tensors(params)
    members = len(tensors[0]) if tensors and tensors[0].ndim else 0
    if active is not None and active.ndim == 0:
        active = active.expand(members)
    if active is not None and active.ndim > 1:
        return None
    if value is None:
        return update_stacked(inner, grads, state, params, active, in_place=in_place)
    told = told_members(state, value, members)
    if told is None or own_traits(inner).by_rule:
        return None
    made = update_stacked(inner, grads, told, params, active, in_place=in_place)
    if made is None or in_place:
        return None if made is None else (params, state)
    return made[0], forget_value(made[1])


def _updated(inner: Optimizer[Any], trees: dict[str, Tree]) -> Any:
    """Return what the update of one member makes of its trees, with what it is told."""
    told = dict(trees)
    own = [told.pop(root) for root in ("grads", "state", "params")]
    return inner.update(*own, **told)


def _update_active_(inner: Optimizer[Any], trees: dict[str, Tree]) -> bool:
    """Update the rows of the active members alone, in place; False, and nothing done, if not so.

    That is where the mask cannot be read, or all are active; where a derivative may be asked for by
    way of something else than parameters that are leaves; or where bits may depend on how many rows
    there are, as those of products of matrices do.
    """
    active: Any = trees.get("active")
    rows = rows_of(active) if active is not None and active.ndim == 1 else None
    if rows is None or len(rows) == len(active) or transforms.may_be_dual():
        return False
    if len(rows) == 0:
        return True
    if not traits_of(inner).shardable:
        return False
    others = {root: tree for root, tree in trees.items() if root != "active"}
    leaves, structure = pytree.flatten((inner, others))
    stacked = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim]
    given = [leaves[index] for index in stacked]
    params = _tensors(trees["params"])
    requiring = {id(leaf) for leaf in given if leaf.requires_grad}
    if not transforms.all_plain(given) or requiring - {id(p) for p in params if p.is_leaf}:
        return False
    numbers = [tensor for tensor in _tensors((inner, trees["state"])) if tensor.ndim == 1]
    own = Rows.of(rows, len(active), numbers)
    if own is None:
        return False
    for index, taken in zip(stacked, own.take(given), strict=True):
        leaves[index] = taken
    news = _mapped(_updated, *pytree.unflatten(structure, leaves))
    own.put(_tensors((trees["params"], trees["state"])), _tensors(news))
    return True


takes_extras_of_members(Members, Members._update)


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in pytree.flatten(tree)[0] if isinstance(leaf, Tensor)]


def _mapped(function: Callable[..., Tree], inner: Optimizer[Any], trees: dict[str, Tree]) -> Any:
    """Return what a function makes of the optimizer and the trees of each member, stacked."""
    leaves, structure = pytree.flatten((inner, trees))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    dims = tuple(0 if leaves[index].ndim else None for index in places)
    structures: list[Any] = []

    def of_member(*tensors: Tensor) -> list[Tensor]:
        own = list(leaves)
        for index, tensor in zip(places, tensors, strict=True):
            own[index] = tensor
        results, made = pytree.flatten(function(*pytree.unflatten(structure, own)))
        structures.append(made)
        return results

    stacked = torch.func.vmap(of_member, dims)(*(leaves[index] for index in places))
    return pytree.unflatten(structures[0], list(map(_with_memory_of_each, stacked)))


def _check_members(trees: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Refuse a tensor without a dimension of members, or with another number of them.

    Of the numbers, those of shape () are for all.
    """
    first, members = "", 0
    for root, tree in reversed(trees.items()):
        leaves, structure = pytree.flatten(tree)
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            path = pytree.path(structure, root, index)
            members, first = (members, first) if first else (len(leaf) if leaf.ndim else 0, path)
            if leaf.ndim == 0 or len(leaf) != members:
                others = "" if path == first else f", and {first} has {members} members"
                raise ValueError(
                    f"{path} has shape {tuple(leaf.shape)}{others}: dimension 0 of every tensor "
                    f"must be the member. Stack members with funcopt.members.stack, and make their "
                    f"state with init() of this optimizer."
                )
    if not first:
        raise ValueError("params has no tensors, so it does not say how many members it has.")
    for root, tree in numbers.items():
        leaves, structure = pytree.flatten(tree)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.ndim > 0:
                _check_number(pytree.path(structure, root, index), root, leaf, members)


def _check_number(path: str, root: str, number: Tensor, members: int) -> None:
    """Refuse a number that is not one for each member; one of each element has more dimensions."""
    of_elements = root == "inner" and number.ndim > 1
    if len(number) != members or (number.ndim > 1 and not of_elements):
        raise ValueError(
            f"{path} has shape {tuple(number.shape)} for {members} members: must have shape "
            f"({members},{' ...' * of_elements}), one for each, or ()."
        )


def _with_memory_of_each(result: Tensor) -> Tensor:
    """Return a result as it is, or copied if all members share its memory, as vmap leaves it."""
    return result.clone(memory_format=torch.contiguous_format) if 0 in result.stride() else result
