"""Partitions in two, and the optimizers in them, that several tests share."""

import dataclasses
from typing import Any

from funcopt import AdamW, Partition

from .cases import clone, tree_map


@dataclasses.dataclass(frozen=True)
class Halved:
    """Somebody's wrapper, of which nothing is known but that it keeps to the rules."""

    inner: Any

    def init(self, params):
        return (self.inner.init(params),)

    def update(self, grads, state, params):
        params, inner = self.inner.update(tree_map(lambda g: g / 2, grads), state[0], params)
        return params, (inner,)

    def update_(self, grads, state, params):
        self.inner.update_(tree_map(lambda g: g / 2, grads), state[0], params)
        return params, state


def all_one(name, leaf):
    return "all"


def by_first_key(name, leaf):
    return "second" if name.startswith(("second", "c")) else "first"


def two(first=None, second=None):
    return Partition(
        {
            "first": first or AdamW(lr=0.1, weight_decay=0.1),
            "second": second or AdamW(lr=0.01, betas=(0.5, 0.75), amsgrad=True),
        },
        by_first_key,
    )


def steps_in_place(opt, params, gradients):
    params, state = clone(params), opt.init(params)
    for grads in gradients:
        opt.update_(grads, state, params)
    return params, state
