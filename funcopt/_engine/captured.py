"""What a CUDA graph cannot replay: an update that depends on the host is refused in a capture.

A graph repeats what the GPU was told when it was captured, and nothing that the host did. A tensor
on the CPU is read once then, and written once: a count stands still, and the branch that was taken
for its sake is taken at each replay. On the GPU, beside the parameters, the same count goes on, and
what depends on it is chosen in the graph. No value is read from there, in no update. So where the
tensors are is all that there is to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._core import pytree
from .._core.types import Tree, own_traits
from .._core.walk import text, walk


def check_replayed(opt: Any, state: Tree, params: Tree) -> None:
    """Refuse an update of which a CUDA graph, which is being captured, would replay but a part.

    Where all parameters are on the CPU nothing is captured, and all is done now, as always.

    Raises:
        RuntimeError: If a tensor of the state or of the optimizer is on the CPU, or if an optimizer
            says that it decides on the host.
    """
    leaves = pytree.flatten(params)[0]
    if all(leaf.is_cpu for leaf in leaves if isinstance(leaf, Tensor)):
        return
    for place in walk(opt, ()):
        if own_traits(place.value).decides_on_host:
            raise RuntimeError(
                f"{text(place.steps) or 'the optimizer'} is a {type(place.value).__name__}, which "
                f"decides on the host what an update does: each replay of the CUDA graph that is "
                f"being captured would do what it does now. Leave this update out of the capture."
            )
    leaves, structure = pytree.flatten(state)
    paths = pytree.paths(structure, "state")
    found = [path for path, leaf in zip(paths, leaves, strict=True) if _is_on_host(leaf)]
    if found:
        raise RuntimeError(
            f"{_some(found)} on the CPU, where no replay of the CUDA graph that is being captured "
            f"counts or decides anew. Move what is there to the GPU before the capture, with "
            f"{_remedy(found)}: there each replay does."
        )
    found = [text(place.steps) for place in walk(opt, ()) if _is_on_host(place.value)]
    if found:
        raise RuntimeError(
            f"{_some(found)} on the CPU: each replay of the CUDA graph that is being captured "
            f"would take the value of now, whatever is written there. Give a number for what "
            f"stays, or a tensor on the GPU, of which a replay takes the value that it has by then."
        )


def _is_on_host(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cpu


def _some(paths: Sequence[str]) -> str:
    return f"{pytree.some(paths)} {'is' if len(paths) == 1 else 'are'}"


def _remedy(paths: Sequence[str]) -> str:
    """Return what moves tensors of a state, in full where they are fields of it."""
    names = [path.removeprefix("state.") for path in paths]
    if not all(map(str.isidentifier, names)):
        return ".cuda()"
    return f"state._replace({', '.join(f'{name}=state.{name}.cuda()' for name in names)})"
