"""One update of `Zero1`: gradients averaged, shares moved and put together, bucket after bucket."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .._core import pytree
from .._core.types import Tree
from ._buckets import Bucket, cut, part, whole
from ._collectives import one_ahead, start_all_gather, start_mean
from ._leaves import OwnLeaves
from ._shards import Sharding, separate


class Step(NamedTuple):
    """The checked inputs of an update.

    Generators hand on its buckets, and each begins its collectives just before the arithmetic of
    the one before. Their order depends on the buckets alone, and is the same on every process.
    """

    sharding: Sharding
    leaves: list[Tensor]  # the parameters
    structure: pytree.Structure
    grads: list[Tensor]
    state: Tree  # that of the inner optimizer
    local: Tree  # and this process's shares of it, in the same memory
    averaged: bool  # the gradients
    by_bucket: bool  # whether the inner optimizer may be given one bucket after another
    by_leaf: bool  # whether it is given whole leaves
    resting: Collection[int] = ()  # the leaves that it leaves at rest

    def move(
        self, update: Callable[..., Any], states: list[Tree], *, writing: bool = False
    ) -> Iterator[tuple[Bucket, Tensor]]:
        """Yield each bucket with the new parameters of all processes in it.

        `update` is that of the inner optimizer, or its `update_` if `writing`. To `states` the new
        inner states are added, with this process's shares.
        """
        buckets, ranks = self.sharding.buckets.values(), self.sharding.ranks
        # Without a bucket there is a count to advance all the same.
        moved = (
            self._by_leaf(update, states, writing)
            if self.by_leaf
            else self._by_bucket(update, states, writing)
            if self.by_bucket and buckets
            else self._at_once(update, states)
        )
        wholes = one_ahead(
            start_all_gather(share, ranks.share(bucket.numel), ranks)
            for bucket, share in zip(buckets, moved, strict=True)
        )
        return zip(buckets, wholes, strict=True)

    def moved(self, bucket: Bucket, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the leaves in a bucket after the update, by their indices: those not at rest."""
        for index, leaf in zip(bucket.indices, cut(bucket, flat, self.leaves), strict=True):
            if index not in self.resting:
                yield index, leaf

    def _by_bucket(
        self, update: Callable[..., Any], states: list[Tree], writing: bool
    ) -> Iterator[Tensor]:
        """Yield the new parameters of each bucket as soon as its gradients are there."""
        names = list(self.sharding.buckets)
        separated = separate(self.local, names, writing=writing)
        for name, share, state in zip(names, self._mean_shares(), separated, strict=True):
            bucket = self.sharding.buckets[name]
            params = {name: part(bucket, self.leaves, *self._span(bucket))}
            new_params, new_state = update({name: share}, state, params)
            states.append(new_state)
            yield new_params[name].detach()

    def _at_once(self, update: Callable[..., Any], states: list[Tree]) -> Iterator[Tensor]:
        """Yield the same once all gradients are there, for an optimizer that looks at them all."""
        sharding = self.sharding
        grads = dict(zip(sharding.buckets, self._mean_shares(), strict=True))
        params, state = sharding.parts(self.leaves), self.local
        if sharding.ranks.size > 1:
            grads, params = sharding.distributed(grads), sharding.distributed(params)
            state = self.state
        new_params, new_state = update(grads, state, params)
        if sharding.ranks.size > 1:
            new_params = sharding.local(new_params, "params")
            new_state = sharding.local(new_state, "state.inner")
        states.append(new_state)
        yield from (new_params[name].detach() for name in sharding.buckets)

    def _by_leaf(
        self, update: Callable[..., Any], states: list[Tree], writing: bool
    ) -> Iterator[Tensor]:
        """Yield the same for an optimizer that is given the leaves that are whole here."""
        sharding = self.sharding
        own = OwnLeaves(sharding, self.leaves, self.structure)
        grads = own.of(dict(zip(sharding.buckets, self._mean_shares(), strict=True)))
        shares = sharding.parts(self.leaves)
        new_params, new_state = update(grads, own.of_state(self.local), own.of(shares))
        if not writing:
            shares = own.shares(new_params)
            states.append(own.shares_of_state(new_state))
        yield from (shares[name] for name in sharding.buckets)

    def _mean_shares(self) -> Iterator[Tensor]:
        """Yield this process's share of the mean gradients, bucket after bucket."""
        buckets, ranks = self.sharding.buckets.values(), self.sharding.ranks
        if self.averaged:
            yield from (part(bucket, self.grads, *self._span(bucket)) for bucket in buckets)
            return
        means = one_ahead(
            start_mean(whole(bucket, self.grads, ranks.share(bucket.numel) * ranks.size), ranks)
            for bucket in buckets
        )
        for bucket, mean in zip(buckets, means, strict=True):
            start, stop = self._span(bucket)
            yield mean[: stop - start]

    def _span(self, bucket: Bucket) -> tuple[int, int]:
        return self.sharding.ranks.span(bucket.numel)
