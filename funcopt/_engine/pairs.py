"""Complex leaves, which elementwise optimizers move as pairs of real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._core.tensors import view_as_complex_like, view_as_real
from .rule import StepInputs, StepOutputs


def as_real(inputs: StepInputs) -> StepInputs:
    """Return views of the leaves in which those that are complex are pairs of real numbers."""
    columns = [list(map(view_as_real, column)) for column in inputs.columns]
    return StepInputs.of(columns, inputs.ids)


def step_as_real(
    step: Callable[[StepInputs, Any], StepOutputs], inputs: StepInputs, numbers: Any | list[Any]
) -> StepOutputs:
    """Return leaves after a step of which some are complex, by a step on real ones.

    Real leaves beside them take a step of their own. Results of one step may share a storage, and
    `torch.save` refuses tensors that view one storage as real and as complex numbers.

    Args:
        step: The step on real leaves, as a function of these and their numbers.
        inputs: The leaves.
        numbers: The numbers of the step, or a list of them, one for each leaf.
    """
    groups: tuple[list[int], list[int]] = ([], [])
    for index, param in enumerate(inputs.params):
        groups[param.is_complex()].append(index)
    columns: list[list[Any]] = [[None] * len(inputs.params) for _ in inputs.targets.columns]
    for indices in filter(None, groups):
        part = inputs.take(indices)
        own = [numbers[i] for i in indices] if isinstance(numbers, list) else numbers
        for column, moved in zip(columns, step(as_real(part), own).columns, strict=True):
            for index, tensor in zip(indices, moved, strict=True):
                column[index] = view_as_complex_like(tensor, inputs.params[index])
    return StepOutputs.of(columns)
