"""Which optimizer of torch is which of ours, and what differs between the two: the one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._engine.rule import Slot, UpdateRule
from ..optimizers.adam import Adam
from ..optimizers.adamw import AdamW
from ..optimizers.sgd import SGD, fused_is_wrong


class Counterpart(NamedTuple):
    """An optimizer of torch, and ours.

    The numbers and flags of ours have the names that torch has in its param groups, and its slots
    those that torch has in its state.
    """

    torch: type[torch.optim.Optimizer]
    ours: type[Any]
    # What a param group of torch's has beyond that, and beyond what says how it is to be computed.
    # Of a source, `decoupled_weight_decay` must be this.
    constants: Mapping[str, Any] = {}
    counts: bool = True  # whether torch counts the updates of each parameter, as `step`
    # Whether torch's fused kernel is not to be trusted with a leaf.
    fused_is_wrong: Callable[[Tensor], bool] = lambda _leaf: False

    @property
    def rule(self) -> UpdateRule:
        """The rule of ours."""
        rule: UpdateRule = self.ours.rule
        return rule

    @property
    def fields(self) -> list[str]:
        """What ours and a param group of torch's have in common, in the order of our fields."""
        shared = {own.place[0] for own in self.rule.hyperparams} | set(self.rule.options)
        return [name for name in self.ours.__dataclass_fields__ if name in shared]

    @property
    def options(self) -> list[str]:
        """What a param group of torch's must have."""
        others = [name for name in self.constants if name != "decoupled_weight_decay"]
        return [*self.fields, "foreach", "fused", *others, "differentiable"]

    def kept_slots(self, group: Mapping[str, Any]) -> list[Slot]:
        """Return the slots that torch keeps with the options of a param group."""
        return self.rule.kept_slots(SimpleNamespace(**{str(key): group[key] for key in group}))


COUNTERPARTS = (
    Counterpart(torch.optim.AdamW, AdamW, {"capturable": False, "decoupled_weight_decay": True}),
    Counterpart(torch.optim.Adam, Adam, {"capturable": False, "decoupled_weight_decay": False}),
    Counterpart(torch.optim.SGD, SGD, counts=False, fused_is_wrong=fused_is_wrong),
)


def counterpart_of(opt: Any) -> Counterpart | None:
    """Return what is known of one of our optimizers; None if torch has none like it."""
    return next((own for own in COUNTERPARTS if isinstance(opt, own.ours)), None)


def counterpart_of_group(group: Mapping[str, Any]) -> Counterpart:
    """Return whose param group this is most likely: the one of which it lacks least.

    Whether weight decay is coupled decides between those that are alike otherwise.
    """

    def unlike(own: Counterpart) -> tuple[int, bool]:
        lacking = sum(name not in group for name in own.options)
        decoupled = own.constants.get("decoupled_weight_decay")
        return lacking, decoupled is not group.get("decoupled_weight_decay", decoupled)

    return min(COUNTERPARTS, key=unlike)
