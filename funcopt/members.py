"""Members of an ensemble: stacked, taken apart, copied over one another, replaced.

A stacked tree holds several members, and dimension 0 of each of its tensors says which. That is
what `torch.func.vmap` maps over by default. Parameters, states, optimizers, schedules and buffers
are all trees here, and so is a tuple of them: `take((opt, state, params), best)`.

Nothing that is returned shares memory with what was given, so that `update_` on one of the two
leaves the other alone. Derivatives flow through: detach parameters of a module before they are
stacked, or the result depends on them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._core import pytree, transforms
from ._core.types import Tree, kind_of
from ._engine.checks import sharding
from ._engine.indices import listed_of, positions_of
from ._engine.merge import Merger

__all__ = ["put", "select", "size", "stack", "take", "unstack"]

TreeT = TypeVar("TreeT")

# Under autocast, torch would have some dtypes only.
_stacked: Callable[[Any], Tensor] = transforms.outside_autocast(torch.stack)


def stack(trees: Sequence[TreeT]) -> TreeT:
    """Stack trees of one structure into one tree, whose tensors have the members in front.

    Numbers of optimizers and schedules that differ become float64 tensors of shape `(members,)`, on
    the CPU or beside the tensor that another member has there. Those that are the same in all stay
    numbers, with which an update is faster. All else must be the same in all members.

    Args:
        trees: The members, at least one. A tensor of shape `(...)` must have the same shape, dtype
            and device in each.

    Returns:
        A tree of the same structure, with tensors of shape `(members, ...)` in fresh memory.

    Raises:
        TypeError: If `trees` is no list or tuple.
        ValueError: If there are none, or two of them differ in something that cannot be stacked:
            their structure, the look of a tensor, a class, a function, a flag, a kernel.

    Example:
        >>> import torch, funcopt
        >>> from torch.func import vmap
        >>> from funcopt import members
        >>> opts = members.stack([funcopt.SGD(lr=lr, momentum=0.9) for lr in (0.1, 0.2)])
        >>> opts.lr, opts.momentum
        (tensor([0.1000, 0.2000], dtype=torch.float64), 0.9)
        >>> params = members.stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])
        >>> grads = {"w": torch.ones(2, 3)}
        >>> state = vmap(funcopt.SGD(momentum=0.9).init)(params)
        >>> params, state = vmap(lambda opt, *given: opt.update(*given))(opts, grads, state, params)
        >>> params["w"]
        tensor([[-0.1000, -0.1000, -0.1000],
                [ 0.8000,  0.8000,  0.8000]])
    """
    if not isinstance(trees, (list, tuple)):
        raise TypeError(f"trees is {kind_of(trees)}: must be a list of trees, one for each member.")
    if not trees:
        raise ValueError("trees is empty: must have one member at least.")
    roots = [f"trees[{index}]" for index in range(len(trees))]
    merger = Merger(roots, _stacked, (), "Make them alike, or stack only those that are.")
    merged: TreeT = merger.merge(trees, lambda: "")
    return merged


def unstack(tree: TreeT) -> list[TreeT]:
    """Return the members of a stacked tree, one by one: what `stack` takes.

    They are copies, so that `update_` on one changes neither the others nor the stack. A number
    that became a tensor when it was stacked is a tensor of shape `()` now, of the same value.

    Args:
        tree: The stacked tree, with tensors of shape `(members, ...)`.

    Returns:
        A list of trees, with tensors of shape `(...)`.

    Raises:
        ValueError: As `size`. An optimizer in which no tensor is does not say how many members
            there are: unstack it together with what does, as `unstack((opt, params))`. Or if a
            tensor is a DTensor.

    Example:
        >>> import torch
        >>> from funcopt import members
        >>> members.unstack({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
        [{'w': tensor([1., 2.])}, {'w': tensor([3., 4.])}]
    """
    count = size(tree)
    leaves, structure = pytree.flatten(tree)
    for index, leaf in enumerate(leaves):
        if _is_sharded(leaf):
            raise ValueError(
                f"{pytree.path(structure, 'tree', index)} is a DTensor with placements "
                f"{leaf.placements}: its members are on several processes. Give .full_tensor(), or "
                f".to_local() for those that are here; take(tree, index) gives one to all."
            )
    columns = [
        [part.clone() for part in leaf.unbind(0)] if isinstance(leaf, Tensor) else [leaf] * count
        for leaf in leaves
    ]
    return [pytree.unflatten(structure, [own[i] for own in columns]) for i in range(count)]


def take(tree: TreeT, indices: int | Iterable[int] | Tensor) -> TreeT:
    """Return the members at these indices, in this order, copied.

    An index may come several times, so that the best are copied over the worst; it may be negative,
    and count from the end. A tree without tensors, as an optimizer of numbers that are the same in
    all members, is its own member and is returned as it is.

    Of DTensors that are sharded along dimension 0, members are sent to the processes that are to
    have them, by one all-to-all for each tensor, in which each process gets a member at most once.
    The results are sharded likewise; a single member is on all processes. Every process must call
    this, with the same indices, or with a DTensor of them.

    Args:
        tree: The stacked tree, with tensors of shape `(members, ...)`.
        indices: Which members: a list or a tensor of integers, of shape `(taken,)`, gives a stack
            of so many. A single one, an integer or a tensor of shape `()` such as
            `losses.argmin()`, gives that member itself, without the dimension. A bool tensor or
            list of shape `(members,)` takes those where it is True.

    Returns:
        A tree of the same structure, with tensors of shape `(taken, ...)` or `(...)`.

    Raises:
        IndexError: If an index is out of range. Those in a tensor on a GPU are not read, so as not
            to wait for it: torch itself stops at one.
        RuntimeError: If a DTensor requires a gradient, which would not get back to it.
        TypeError: If `indices` are no integers or bools.
        ValueError: If `indices` have another shape, or as `size`; or if another dimension of a
            DTensor is sharded.

    Example:
        >>> import torch
        >>> from funcopt import members
        >>> params = {"w": torch.tensor([10.0, 20.0, 30.0])}
        >>> losses = torch.tensor([0.3, 0.1, 0.2])
        >>> members.take(params, losses.argsort()[[0, 0, 1]])  # the best twice, the worst not
        {'w': tensor([20., 20., 30.])}
        >>> members.take(params, losses.argmin())
        {'w': tensor(20.)}
        >>> members.take(params, losses < 0.25)
        {'w': tensor([20., 30.])}
    """
    count = _count(tree, "tree")
    if count is None:
        return tree
    positions = positions_of(_whole(indices), count)
    listed = cache(partial(listed_of, positions, count))
    rows_on = _copies_of(positions.reshape(-1))

    def taken(leaf: Tensor, where: Callable[[], str]) -> Tensor:
        if _is_sharded(leaf):
            single = positions.ndim == 0
            made: Tensor = _of_dtensors().take(leaf, listed(), where, single=single)
            return made
        # Not leaf[positions], which under vmap would read an index of shape ().
        part = leaf.index_select(0, rows_on(leaf.device))
        return part if positions.ndim else part.squeeze(0)

    leaves, structure = pytree.flatten(tree)
    news = [
        taken(leaf, partial(pytree.path, structure, "tree", index))
        if isinstance(leaf, Tensor)
        else leaf
        for index, leaf in enumerate(leaves)
    ]
    made: TreeT = pytree.unflatten(structure, news)
    return made


def put(tree: TreeT, indices: int | Iterable[int] | Tensor, new: TreeT) -> TreeT:
    """Return a copy of the tree in which the members at these indices are `new`; `take` reads them.

    The other members keep every bit. A number of an optimizer that is not the same in both becomes
    a tensor, as where `stack` does it.

    Args:
        tree: The stacked tree, with tensors of shape `(members, ...)`.
        indices: Which members, as for `take`, each once at most.
        new: What `take` would return: a single member for an integer or a tensor of shape `()`,
            else a stack of as many members as there are indices.

    Returns:
        A tree of the same structure, in fresh memory.

    Raises:
        IndexError: As `take`.
        TypeError: As `take`.
        ValueError: If an index comes twice, where it can be read at no price; if `new` does not
            match the members that it replaces; or as `take` and `size`.

    Example:
        >>> import torch
        >>> from funcopt import members
        >>> params = {"w": torch.tensor([10.0, 20.0, 30.0])}
        >>> members.put(params, 1, {"w": torch.tensor(2.0)})
        {'w': tensor([10.,  2., 30.])}
        >>> members.put(params, [0, -1], {"w": torch.tensor([1.0, 3.0])})
        {'w': tensor([ 1., 20.,  3.])}
    """
    count = size(tree)
    positions = positions_of(indices, count)
    targets = positions.reshape(-1)
    values = () if transforms.transformed() else transforms.values_at_hand(targets) or ()
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"indices has member {twice:.0f} twice: must have each once at most.")
    remedy = "Give members such as take(tree, indices) returns."
    roots = ("new", "take(tree, indices)")
    merger = Merger(roots, operator.itemgetter(0), positions.shape, remedy)
    alike: TreeT = merger.merge((new, take(tree, indices)), lambda: "")
    where = torch.zeros(count, dtype=torch.bool, device=targets.device)
    first = torch.zeros(count, dtype=torch.int64, device=targets.device)
    rows_on = _copies_of(
        first.scatter(0, targets, torch.arange(len(targets), device=targets.device))
    )

    def spread(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        own = leaf if positions.ndim else leaf.unsqueeze(0)
        if len(own) == 0:  # where nobody is put, there is no row to repeat
            return own.new_empty(count, *own.shape[1:])
        return own.index_select(0, rows_on(own.device))

    chosen: TreeT = select(where.scatter(0, targets, True), pytree.tree_map(spread, alike), tree)
    return chosen


def select(mask: Tensor, new: TreeT, old: TreeT) -> TreeT:
    """Return each member from `new` where the mask is True, else from `old`, to the bit.

    What is not taken leaves no trace, be it NaN. A number of an optimizer that is not the same in
    both becomes a tensor, as where `stack` does it. Of DTensors, which must lie alike, nothing is
    sent but a mask that is one itself.

    Args:
        mask: A bool tensor of shape `(members,)`, the same on every process.
        new: A stacked tree, with tensors of shape `(members, ...)`.
        old: Another of the same structure, whose tensors are alike in shape, dtype and device.

    Returns:
        A tree of that structure, in fresh memory.

    Raises:
        TypeError: If the mask is no bool tensor.
        ValueError: If it has another shape, or the trees do not match, or as `size`.

    Example:
        >>> import torch
        >>> from funcopt import members
        >>> new, old = {"w": torch.tensor([[1.0], [torch.nan]])}, {"w": torch.zeros(2, 1)}
        >>> members.select(new["w"].isfinite().all(1), new, old)  # who diverged stays behind
        {'w': tensor([[1.],
                [0.]])}
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask is {kind_of(mask)}: must be a bool tensor of shape (members,).")
    mask = _whole(mask)
    if mask.ndim != 1:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: must have shape (members,), one bool for each."
        )
    for root, tree in (("new", new), ("old", old)):
        count = _count(tree, root)
        if count not in (None, len(mask)):
            raise ValueError(
                f"mask has {len(mask)} members and {root} has {count}: both must have as many. "
                f"Give one bool for each member."
            )
    mask_on = _copies_of(mask)

    def chosen(pair: Sequence[Tensor]) -> Tensor:
        one, other = pair
        if _is_sharded(one) or _is_sharded(other):
            made: Tensor = _of_dtensors().select(mask, pair)
            return made
        return torch.where(mask_on(one.device).reshape(-1, *(1,) * (one.ndim - 1)), one, other)

    remedy = "Give two trees of the same members, such as those before and after an update."
    merger = Merger(("new", "old"), chosen, (len(mask),), remedy)
    merged: TreeT = merger.merge((new, old), lambda: "")
    return merged


def size(tree: Tree) -> int:
    """Return how many members a stacked tree has.

    Args:
        tree: The tree, with tensors of shape `(members, ...)`.

    Raises:
        ValueError: If a tensor has no dimension of members, or not as many as another, or there is
            no tensor.

    Example:
        >>> import torch
        >>> from funcopt import members
        >>> members.size({"w": torch.zeros(4, 3), "b": torch.zeros(4)})
        4
    """
    count = _count(tree, "tree")
    if count is None:
        raise ValueError(
            "tree has no tensors, so it does not say how many members it has. Give it together "
            "with a tree that does, as in (opt, params)."
        )
    return count


def _count(tree: Tree, root: str) -> int | None:
    """Return how many members a tree has, which all its tensors must have; None without tensors."""
    leaves, structure = pytree.flatten(tree)
    first = None
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.ndim == 0:
            raise ValueError(
                f"{pytree.path(structure, root, index)} has shape (): dimension 0 of every tensor "
                f"must be the member. Stack members with stack(), and make their state by "
                f"vmap(opt.init)."
            )
        if first is None:
            first = index
        elif len(leaf) != len(leaves[first]):
            here, there = (pytree.path(structure, root, at) for at in (index, first))
            raise ValueError(
                f"{here} has {len(leaf)} members, of shape {tuple(leaf.shape)}, and {there} has "
                f"{len(leaves[first])}: dimension 0 of every tensor must be the member. Stack what "
                f"all share as often as there are members, or leave it out."
            )
    return None if first is None else len(leaves[first])


def _is_sharded(leaf: Any) -> bool:
    shards = sharding()
    kind = None if shards is None else shards.dtensor()
    return kind is not None and isinstance(leaf, kind)


def _whole(given: Any) -> Any:
    return given.full_tensor() if _is_sharded(given) else given


def _of_dtensors() -> Any:
    from ._dtensor import exchange  # noqa: PLC0415  # which nobody needs who has no DTensors

    return exchange


def _copies_of(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """Return what gives a tensor on a device, to which it is copied once."""
    moved: dict[torch.device, Tensor] = {}

    def on(device: torch.device) -> Tensor:
        if device not in moved:
            moved[device] = tensor.to(device)
        return moved[device]

    return on
