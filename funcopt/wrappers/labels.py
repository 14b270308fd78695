"""Labels of leaves: a function, a tree or patterns say to which group each one belongs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .._core import pytree, transforms
from .._core.types import Tree
from .._engine.hyperparameters import check_takes

Labels: TypeAlias = Callable[[str, Any], str] | Mapping[re.Pattern[str], str] | Tree
"""A function `label(name, leaf)`, a dict from compiled pattern to label, or a tree of labels."""

_EMBEDDING = re.compile(r"(?<![a-z])(embed|(emb|embs|wte|wpe)(?![a-z]))", re.IGNORECASE)

# The most names in a message.
_MOST = 5


def decay_label(name: str, leaf: Tensor) -> str:
    """Label a leaf `"decay"` or `"no_decay"`, by the usual rule of which leaves decay.

    Leaves of less than two dimensions (biases, the scales of norms) do not decay. Nor do
    embeddings, which are known by their names: `embed`, `emb`, `wte` or `wpe` at the start of a
    word, as in `token_embedding.weight`, `embed_tokens.weight` or `transformer.wte.weight`. Only
    the name counts: a leaf with such a name does not decay, whatever it is, and an embedding with
    another name does. Where that is wrong, write a function of your own that calls this one.

    The attribute `decay_label.possible_labels` names both labels. So either may be without a leaf,
    as in a model without biases; its optimizer then moves nothing.

    Args:
        name: The leaf's keys joined by dots.
        leaf: The leaf. Its first dimension must not be one of members: under vmap it is none, so
            make the state of an ensemble by `vmap(init)`.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Partition(
        ...     {
        ...         "decay": funcopt.SGD(momentum=0.9, weight_decay=0.1),
        ...         "no_decay": funcopt.SGD(momentum=0.9),
        ...     },
        ...     labels=funcopt.decay_label,
        ... )
        >>> state = opt.init(dict(torch.nn.Linear(2, 1).named_parameters()))
        >>> {label: list(inner.momentum_buffer) for label, inner in state.inner.items()}
        {'decay': ['weight'], 'no_decay': ['bias']}
    """
    return "no_decay" if leaf.ndim < 2 or _EMBEDDING.search(name) else "decay"


_own: Any = decay_label  # which as a function has no attributes of its own for a type checker
_own.possible_labels = ("decay", "no_decay")

_HEAD = re.compile(r"(?<![a-z])(heads?|classifier|unembed|unembedding)(?![a-z])", re.IGNORECASE)


def muon_label(name: str, leaf: Tensor) -> str:
    """Label a leaf `"muon"` or `"adamw"`, by the usual rule of what `Muon` should move.

    The matrices of hidden layers, of two or more dimensions, go to `Muon`. Leaves of less than two
    dimensions get the other label, and so do these, known by their names: embeddings, by the
    words of `decay_label`, and last layers, by the words `head`, `heads`, `classifier`, `unembed`
    and `unembedding` with no letter before or behind, as in `lm_head.weight` or
    `classifier.2.weight`. Only the name counts: a last layer with another name goes to `Muon`, and
    a hidden layer that is named `attn.head.weight` does not. Where that is wrong, write a function
    of your own that calls this one, and let it have `possible_labels`, as this one has.

    Args:
        name: The leaf's keys joined by dots.
        leaf: The leaf. Its first dimension must not be one of members, as for `decay_label`.

    Example:
        >>> import torch, funcopt
        >>> shapes = {"wte.weight": (9, 4), "h.0.attn.weight": (4, 4), "lm_head.weight": (9, 4)}
        >>> {name: funcopt.muon_label(name, torch.zeros(shape)) for name, shape in shapes.items()}
        {'wte.weight': 'adamw', 'h.0.attn.weight': 'muon', 'lm_head.weight': 'adamw'}
    """
    by_name = _EMBEDDING.search(name) or _HEAD.search(name)
    return "adamw" if leaf.ndim < 2 or by_name else "muon"


_muon: Any = muon_label
_muon.possible_labels = ("muon", "adamw")


def _possible(labels: Labels) -> Collection[str]:
    """Return the labels that a function says it may give; nothing if it does not say.

    It need not give all of them: they tell without a leaf that no label is misspelt.
    """
    found = getattr(labels, "possible_labels", ()) if callable(labels) else ()
    if not isinstance(found, (tuple, list, set, frozenset)):
        raise TypeError(
            f"labels.possible_labels={found!r}: must be a tuple of the labels that the function "
            f"may give."
        )
    return found


def check_labels(labels: Labels, known: Iterable[str]) -> None:
    """Refuse what cannot be labels of any tree, as far as that is known without a tree."""
    if callable(labels):
        check_takes("labels", labels, 2, "it is called with the name and the leaf")
        possible = _possible(labels)
        for label in known if possible else ():
            if label not in possible:
                raise ValueError(
                    f"inner has the label {label!r}, which labels never gives: by its "
                    f"possible_labels there are {', '.join(map(repr, possible))}. Correct one of "
                    f"the two."
                )
        return
    given = list(labels.values()) if _are_patterns(labels) else pytree.flatten(labels)[0]
    if isinstance(labels, dict) and any(isinstance(key, re.Pattern) for key in labels):
        mixed = [key for key in labels if not isinstance(key, re.Pattern)]
        if mixed:
            raise TypeError(
                f"labels has {mixed[0]!r} among its patterns: give it as re.compile({mixed[0]!r})."
            )
    for label in given:
        _check_label(label, "labels", known)


def name_leaves(structure: pytree.Structure) -> list[str]:
    """Return for each leaf its keys joined by dots, by which labels and groups know it.

    Raises:
        ValueError: If two leaves have one name.
    """
    if transforms.compiling():
        return _names_apart(structure)
    names = _names.get(structure)
    if names is None:
        if len(_names) >= _MOST_STRUCTURES:
            _names.clear()
        names = _names[structure] = _names_apart(structure)
    return names


# To walk through a tree takes longer than to move small leaves.
_names: dict[pytree.Structure, list[str]] = {}
_MOST_STRUCTURES = 256


def _names_apart(structure: pytree.Structure) -> list[str]:
    names = pytree.names(structure)
    if len(set(names)) == len(names):
        return names
    first: dict[str, str] = {}
    for name, path in zip(names, pytree.paths(structure, "params"), strict=True):
        if name in first:
            raise ValueError(
                f"{path} and {first[name]} are both named {name!r}: rename a key, so that names "
                f"tell leaves apart."
            )
        first[name] = path
    return names


class _Patterns(NamedTuple):
    """Compiled patterns with their labels, as pairs: Dynamo of torch 2.11 knows no dict of them."""

    pairs: tuple[tuple[re.Pattern[str], str], ...]


def patterns_in(labels: Any) -> _Patterns | None:
    """Return the patterns of labels that are a dict from these, else None."""
    return _Patterns(tuple(labels.items())) if _are_patterns(labels) else None


def label_leaves(
    labels: Labels | _Patterns,
    known: Sequence[str],
    names: Sequence[str],
    leaves: Sequence[Any],
    structure: pytree.Structure,
) -> list[str]:
    """Return the label of each leaf: one of those that are known.

    Raises:
        TypeError: If a label is no string.
        ValueError: If a leaf has no label, an unknown one, or two; or a pattern no leaf; or a label
            none, unless a function says that this may be.
    """
    patterns = labels if isinstance(labels, _Patterns) else patterns_in(labels)
    if patterns is not None:
        found = _by_pattern(patterns.pairs, names, structure)
    elif callable(labels):
        found = [labels(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    else:
        found = pytree.pair(labels, "labels", structure).leaves
    for index, label in enumerate(found):
        if type(label) is not str or label not in known:
            _check_label(label, pytree.path(structure, "params", index), known)
    for label in known:
        if names and label not in found and label not in _possible(labels):
            raise ValueError(
                f"no leaf has the label {label!r}: each label must have a leaf, or one that is "
                f"misspelt would go unnoticed. Correct labels, or leave its optimizer out. Leaves "
                f"are named {_some(names)}. (A function says which labels may have none in its "
                f"attribute possible_labels, as decay_label does.)"
            )
    return found


def _are_patterns(labels: Any) -> bool:
    return (
        isinstance(labels, Mapping)
        and len(labels) > 0
        and all(isinstance(key, re.Pattern) for key in labels)
    )


def _by_pattern(
    pairs: Sequence[tuple[re.Pattern[str], str]], names: Sequence[str], structure: pytree.Structure
) -> list[str]:
    used: set[int] = set()
    found = []
    for index, name in enumerate(names):
        matching = [number for number, (own, _) in enumerate(pairs) if own.search(name)]
        labels = {pairs[number][1]: pairs[number][0] for number in matching}
        if len(labels) != 1:
            path = pytree.path(structure, "params", index)
            if not matching:
                raise ValueError(
                    f"{path} has no label: no pattern is found in its name {name!r}. Add one that "
                    f"is, with the label of a Frozen() if it is not to move, or give a function."
                )
            first, second, *_ = labels.items()
            raise ValueError(
                f"{path} has two labels, {first[0]!r} by the pattern {first[1].pattern!r} and "
                f"{second[0]!r} by {second[1].pattern!r}, both of which are found in its name "
                f"{name!r}: it can have one. Narrow a pattern, or give a function."
            )
        found.append(pairs[matching[0]][1])
        used.update(matching)
    unused = [own for number, (own, _) in enumerate(pairs) if number not in used]
    if names and unused:
        raise ValueError(
            f"the pattern {unused[0].pattern!r} of labels is found in no name: one that is "
            f"misspelt would go unnoticed. Correct it, or leave it out. Leaves are named "
            f"{_some(names)}."
        )
    return found


def _check_label(label: Any, owner: str, known: Iterable[str]) -> None:
    there = ", ".join(map(repr, known))
    if not isinstance(label, str):
        kind = "no label" if label is None else f"a {type(label).__name__} for a label"
        raise TypeError(f"{owner} has {kind}: each leaf needs one of {there}.")
    if label not in known:
        raise ValueError(
            f"{owner} has the label {label!r}, for which there is no optimizer: there are {there}. "
            f"Correct the label, or add an optimizer for it, such as Frozen()."
        )


def _some(names: Sequence[str]) -> str:
    return pytree.some(list(map(repr, names)), _MOST)
