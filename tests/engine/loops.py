"""A training loop that stops between two steps, and all that can be seen of what it computes.

`Loop` remembers whatever funcopt remembers. `Forgetful` makes the same steps by code that remembers
nothing: before each, all that was learned is forgotten, and the optimizer is built anew.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import optree
import torch
from torch import Tensor

import funcopt
from funcopt._core import pytree
from funcopt._engine import memory

Trees = dict[str, Tensor]
Update = Callable[..., tuple[Any, Any]]

FLOAT32 = torch.float32

# Names, shapes and dtypes of the leaves of each tree.
TREES: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
    "few": {"w": ((6, 5), FLOAT32), "u": ((6, 5), FLOAT32), "b": ((6,), FLOAT32)},
    "of two dtypes": {
        "w": ((4, 8), FLOAT32),
        "u": ((4, 8), torch.float64),
        "b": ((), FLOAT32),
        "n": ((3, 0), FLOAT32),
    },
    "in 16 bits": {"w": ((6, 5), torch.bfloat16), "u": ((6, 5), FLOAT32), "b": ((6,), FLOAT32)},
    "complex": {"w": ((6, 5), torch.complex64), "u": ((6, 5), FLOAT32), "b": ((2,), FLOAT32)},
    "many": {
        "w": ((60, 90), FLOAT32),
        "u": ((60, 90), FLOAT32),
        "b": ((4,), FLOAT32),
        **{f"l{number}": ((number, 4), FLOAT32) for number in range(1, 11)},
    },
}


HALF_WRITTEN = "half-written"


class Loop:
    """A loop that makes one step after another on gradients of its own."""

    def __init__(self, opt: Any, method: str, tree: str = "few") -> None:
        self.opt, self.method = opt, method
        self.like = dict(TREES[tree])  # of the gradients
        self.params: Any = normals(self.like, 0)
        self.state: Any = opt.init(self.params)
        self.count = 0
        self.change_grads: Callable[[Trees], Any] = lambda grads: grads
        self.within: Callable[[Update], Update] = lambda update: update
        self.held: list[tuple[Any, Any]] = []  # what somebody holds, and how it looked
        self.seen: list[Any] = []

    def step(self) -> None:
        """Make a step, and note what came of it."""
        self.count += 1
        grads = self.gradients()
        before = look((grads, self.state, self.params))
        update = self.within(getattr(self.afresh(), self.method))
        try:
            params, state = update(grads, self.state, self.params)
        except Exception as error:
            is_whole = look((grads, self.state, self.params)) == before
            self.seen.append((_told(error), "unchanged" if is_whole else HALF_WRITTEN))
        else:
            if self.method == "update":
                assert look((grads, self.state, self.params)) == before, "the inputs are written"
            given, made = starts((grads, self.state, self.params)), starts((params, state))
            is_given = params is self.params, state is self.state
            self.seen.append((look((params, state)), is_given, bool(given & made)))
            self.params, self.state = params, state
        for holder, as_it_was in self.held:
            assert look(holder) == as_it_was, "what somebody holds is written"

    def gradients(self) -> Any:
        """Return those of this step, changed if that can be."""
        try:
            return self.change_grads(normals(self.like, self.count))
        except Exception as error:
            self.seen.append((_told(error),))
            return normals(self.like, self.count)

    def hold(self, holder: Any) -> None:
        """Hold a tree, which is not to change from now on."""
        self.held.append((holder, look(holder)))

    def look_again(self) -> None:
        """Take what is held for what it is now."""
        self.held = [(holder, look(holder)) for holder, _ in self.held]

    def afresh(self) -> Any:
        """Return the optimizer of the next step."""
        return self.opt

    def another(self, opt: Any, method: str = "update") -> Loop:
        """Return a loop on trees of its own that look as these did at first."""
        loop = type(self)(opt, method)
        loop.like = self.like
        loop.params = normals(loop.like, 100)
        loop.state = opt.init(loop.params)
        return loop


def _told(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)


def made_in_this_process(given: bytes) -> Any:
    """Return what is seen of one step on what was saved, as the first thing that this one does."""
    torch.set_num_threads(1)
    opt, method, *trees = torch.load(io.BytesIO(given), weights_only=False)
    try:
        return look(getattr(opt, method)(*trees))
    except Exception as error:
        return _told(error)


class Elsewhere(Loop):
    """The same, where each step is made by a new process as well, which has to see the same."""

    apply: Callable[..., Any]  # calls a function in a new process

    def step(self) -> None:
        """Make a step in both."""
        saved = io.BytesIO()
        torch.save((self.opt, self.method, self._next_gradients(), self.state, self.params), saved)
        expected = self.apply(made_in_this_process, (saved.getvalue(),))
        super().step()
        assert self.seen[-1][0] == expected

    def _next_gradients(self) -> Any:
        self.count += 1
        grads = self.gradients()
        self.count -= 1
        return grads


class Forgetful(Loop):
    """The same by code that remembers nothing."""

    def afresh(self) -> Any:
        """Forget all, and return the optimizer, built anew."""
        forget()
        return rebuilt(self.opt)


def forget() -> None:
    """Let funcopt forget all that it learned, and give back all that it keeps."""
    memory.forget()
    pytree._structures.clear()
    funcopt.memory.release()


def rebuilt(opt: Any) -> Any:
    """Return an equal optimizer that was never used."""
    inner = {"inner": rebuilt(opt.inner)} if hasattr(opt, "inner") else {}
    return dataclasses.replace(opt, **inner)


def normals(like: dict[str, tuple[tuple[int, ...], torch.dtype]], seed: int) -> Trees:
    """Return tensors of these shapes and dtypes, whose values depend on the seed alone."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            shape, generator=source, dtype=dtype if dtype.is_complex else FLOAT32, device="cpu"
        ).to(dtype)
        for name, (shape, dtype) in like.items()
    }


# A change goes around one step: what it does before that may last, or be undone after it.
Change = Callable[[Loop], AbstractContextManager[object]]


def seen_of(loop: Loop, changes: Sequence[Change]) -> list[Any]:
    """Return what is seen of a loop of as many steps, each within a change.

    A change that cannot be made, such as one of a leaf that is None by now, is left out.
    """
    for change in changes:
        with ExitStack() as stack:
            try:
                stack.enter_context(change(loop))
            except Exception as error:
                loop.seen.append((_told(error),))
            loop.step()
    return loop.seen


def look(value: Any) -> Any:
    """Return all that can be seen of a tree, to the bit, as something that can be compared."""
    if isinstance(value, Tensor):
        return _look_of(value)
    if isinstance(value, dict):
        return type(value).__name__, [(key, look(own)) for key, own in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [look(own) for own in value]
    return value


def _look_of(tensor: Tensor) -> tuple[object, ...]:
    about = type(tensor), tensor.dtype, tuple(tensor.shape), str(tensor.device), tensor.layout
    history = tensor.requires_grad, tensor.is_leaf, tensor.is_inference()
    if not _has_values(tensor):
        return *about, *history
    with torch.no_grad():
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        flat = torch.empty(plain.numel(), dtype=plain.dtype, device="cpu").copy_(plain.reshape(-1))
        bits = flat.view(torch.uint8).numpy().tobytes()
    # By what number a step raises the version is nobody's business; that it does is autograd's.
    return *about, *history, tensor.stride(), _is_written(tensor), bits


def _is_written(tensor: Tensor) -> bool | None:
    try:
        return tensor._version > 0
    except RuntimeError:  # of inference mode, or with data from there
        return None


def _has_values(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and type(tensor).__name__ != "FakeTensor"
    )


def starts(tree: Any) -> set[int]:
    """Return where the tensors of a tree start in memory."""
    tensors: Iterator[Any] = iter(optree.tree_leaves(tree, namespace="torch"))
    return {
        tensor.data_ptr()
        for tensor in tensors
        if isinstance(tensor, Tensor) and _has_values(tensor) and tensor.numel() > 0
    }
