"""Other libraries' AdamW on the kit: `python -m tests.peers_of_adamw` prints a report for each.

They are outside subjects, no dependency: a missing one is said to be missing. An adapter only turns
a library's calls into `init` and `update`; every defect reported is the library's own.
"""

import dataclasses
import importlib.util
from typing import Any

import optree
import torch
from torch import Tensor

from funcopt._core.types import ELEMENTWISE
from funcopt.testing import check_optimizer, laws, oracles, strategies

Tree = Any


@dataclasses.dataclass(frozen=True)
class TorchOptAdamW:
    """`torchopt.adamw`: its updates are applied to the parameters, in place unless told not to."""

    traits = ELEMENTWISE

    lr: float = 1e-3
    weight_decay: float = 1e-2
    inplace: bool = True  # what torchopt does unless told not to

    def _transform(self) -> Any:
        import torchopt

        return torchopt.adamw(lr=self.lr, weight_decay=self.weight_decay)

    def init(self, params: Tree) -> Any:
        return self._transform().init(params)

    def update(self, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        import torchopt

        options = {} if self.inplace else {"inplace": False}
        moves, state = self._transform().update(grads, state, params=params, **options)
        return torchopt.apply_updates(params, moves, **options), state


@dataclasses.dataclass(frozen=True)
class OptaxAdamW:
    """`optax.adamw`, with tensors turned into arrays and back."""

    traits = ELEMENTWISE

    lr: float = 1e-3
    weight_decay: float = 1e-4

    def _transform(self) -> Any:
        import optax

        return optax.adamw(self.lr, weight_decay=self.weight_decay)

    def init(self, params: Tree) -> Any:
        return _to_torch(self._transform().init(_to_jax(params)))

    def update(self, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        import optax

        grads, state, params = map(_to_jax, (grads, state, params))
        moves, state = self._transform().update(grads, state, params)
        return _to_torch(optax.apply_updates(params, moves)), _to_torch(state)


def _to_jax(tree: Tree) -> Tree:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    def convert(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.dtype is torch.bfloat16:
            return jnp.asarray(tensor.detach().float().numpy()).astype(jnp.bfloat16)
        return jnp.asarray(tensor.detach().contiguous().numpy())

    return optree.tree_map(convert, tree)


def _to_torch(tree: Tree) -> Tree:
    import jax
    import numpy as np

    def convert(array: Any) -> Any:
        if not isinstance(array, jax.Array):
            return array
        if array.dtype == "bfloat16":
            return torch.from_numpy(np.array(array, dtype=np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(array))

    return optree.tree_map(convert, tree)


# Arrays of another library know no transform of torch, no layout, and no torch bits to hold to.
_OF_NUMBERS = (
    laws.never_mutates,
    laws.deterministic,
    laws.bad_trees_raise,
    laws.survives_zero_gradients,
    laws.agrees_with_itself_in_float64,
    laws.names_do_not_matter,
    laws.leaves_are_independent,
    laws.elements_are_independent,
    laws.goes_downhill,
    laws.zero_lr_moves_nothing,
)

_REAL = strategies.params(
    dtype=strategies.dtypes(complex=False), nodes=("dict", "list", "tuple", "leaf", "namedtuple")
)
_COMPLEX = strategies.params(dtype=torch.complex128)


def on_pairs(opt: Any, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """Judge an optimizer by what it does on complex numbers as pairs, which is what torch does."""

    def back(tree: Tree) -> Tree:
        return optree.tree_map(lambda t: torch.view_as_complex(t) if t.ndim else t, tree)

    pairs = [
        optree.tree_map(lambda t: torch.view_as_real(t) if t.is_complex() else t, tree)
        for tree in (grads, state, params)
    ]
    moved, state = opt.update(*pairs)
    return back(moved), back(state)


class OnComplex(TorchOptAdamW):
    """TorchOpt's AdamW, judged on pairs."""


oracles.register(OnComplex, on_pairs)

PEERS: dict[str, tuple[Any, tuple[laws.Law, ...], Any]] = {
    "torchopt": (TorchOptAdamW(), laws.LAWS, _REAL),
    "torchopt, told not to write": (TorchOptAdamW(inplace=False), laws.LAWS, _REAL),
    "torchopt, complex parameters": (OnComplex(inplace=False), (laws.matches_oracle,), _COMPLEX),
    "optax": (OptaxAdamW(), _OF_NUMBERS, _REAL),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (opt, held_to, params) in PEERS.items():
        library = name.partition(",")[0]
        if importlib.util.find_spec(library) is None:
            print(f"{name}: not installed, so not checked\n")
            continue
        print(f"{name}\n{check_optimizer(opt, laws=held_to, params=params, max_examples=15)}\n")
