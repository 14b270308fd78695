"""Which optimizer of torch is which of ours, and what differs between the two: the one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._engine.rule import Slot, UpdateRule
from ..optimizers.adafactor import Adafactor
from ..optimizers.adagrad import Adagrad
from ..optimizers.adam import Adam
from ..optimizers.adamw import AdamW
from ..optimizers.muon import Muon
from ..optimizers.nadam import NAdam, mu_product
from ..optimizers.radam import RAdam
from ..optimizers.rmsprop import RMSprop
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
    flags: Sequence[str] = ("foreach", "fused")  # how a param group of torch's names a kernel
    alike: Sequence[str] = ("plain", "foreach", "fused")  # the kernels with the same bits
    more: Sequence[str] = ()  # fields that both have and no step depends on
    # Options that ours alone has, by name, with what torch does.
    lacks: Mapping[str, Any] = {}
    records: bool = True  # whether torch has an option `differentiable`
    # Whether torch keeps a slot of this name beside a leaf, and what leaves it refuses.
    keeps: Callable[[str, Tensor], bool] = lambda _name, _leaf: True
    refuses: Callable[[Tensor], str | None] = lambda _leaf: None
    # What torch keeps of each parameter and ours computes from the count, by name.
    computed: Mapping[str, Callable[[Mapping[str, Any], float], float]] = {}

    @property
    def rule(self) -> UpdateRule:
        """The rule of ours."""
        rule: UpdateRule = self.ours.rule
        return rule

    @property
    def fields(self) -> list[str]:
        """What ours and a param group of torch's have in common, in the order of our fields."""
        numbers = {own.place[0] for own in self.rule.hyperparams}
        shared = numbers.union(self.rule.options, self.more).difference(self.lacks)
        return [name for name in self.ours.__dataclass_fields__ if name in shared]

    @property
    def options(self) -> list[str]:
        """What a param group of torch's must have."""
        others = [name for name in self.constants if name != "decoupled_weight_decay"]
        return [*self.fields, *self.flags, *others, *["differentiable"] * self.records]

    def beyond(self, opt: Any) -> dict[str, Any]:
        """Return what one of ours has in options that torch lacks, where torch does otherwise."""
        given = {name: getattr(opt, name) for name in self.lacks}
        return {name: value for name, value in given.items() if value != self.lacks[name]}

    def kept_slots(self, group: Mapping[str, Any], leaf: Tensor | None = None) -> list[Slot]:
        """Return the slots that torch keeps with the options of a param group, of one leaf."""
        kept = self.rule.kept_slots(SimpleNamespace(**{str(key): group[key] for key in group}))
        return [slot for slot in kept if leaf is None or self.keeps(slot.name, leaf)]


def _mu_product(group: Mapping[str, Any], count: float) -> float:
    return float(mu_product(count, group["betas"][0], group["momentum_decay"]))


def _keeps_of_adafactor(name: str, leaf: Tensor) -> bool:
    return (name == "variance") == (leaf.ndim < 2)  # factors else


def _refused_by_muon(leaf: Tensor) -> str | None:
    return None if leaf.ndim == 2 else "torch.optim.Muon moves matrices alone"


COUNTERPARTS = (
    Counterpart(torch.optim.AdamW, AdamW, {"capturable": False, "decoupled_weight_decay": True}),
    Counterpart(
        torch.optim.Adam,
        Adam,
        {"capturable": False, "decoupled_weight_decay": False},
        lacks={"nesterov": False},
    ),
    Counterpart(torch.optim.SGD, SGD, counts=False, fused_is_wrong=fused_is_wrong),
    Counterpart(
        torch.optim.NAdam,
        NAdam,
        {"capturable": False},
        flags=("foreach",),
        alike=(),
        computed={"mu_product": _mu_product},
    ),
    Counterpart(
        torch.optim.RAdam, RAdam, {"capturable": False}, flags=("foreach",), alike=("plain",)
    ),
    Counterpart(
        torch.optim.RMSprop,
        RMSprop,
        {"capturable": False},
        flags=("foreach",),
        alike=("plain", "foreach"),
    ),
    Counterpart(
        torch.optim.Adagrad,
        Adagrad,
        alike=("plain", "foreach"),
        more=("initial_accumulator_value",),
    ),
    Counterpart(
        torch.optim.Adafactor,
        Adafactor,
        flags=("foreach",),
        alike=(),
        records=False,
        keeps=_keeps_of_adafactor,
    ),
    Counterpart(
        torch.optim.Muon,
        Muon,
        counts=False,
        flags=(),
        alike=("plain",),
        lacks={"ns_dtype": torch.bfloat16, "matrices": "flatten", "gram": False},
        records=False,
        refuses=_refused_by_muon,
    ),
)
SERVED = "torch.optim.AdamW, Adam, SGD, NAdam, RAdam, RMSprop, Adagrad, Adafactor or Muon"


def counterpart_of(opt: Any) -> Counterpart | None:
    """Return what is known of one of our optimizers; None if torch has none like it."""
    return next((own for own in COUNTERPARTS if isinstance(opt, own.ours)), None)


def counterpart_of_group(group: Mapping[str, Any]) -> Counterpart:
    """Return whose param group this is most likely: the one that differs in the fewest options.

    Whether weight decay is coupled decides between those that are alike otherwise.
    """
    given = _OPTIONS.intersection(group)

    def unlike(own: Counterpart) -> tuple[int, bool]:
        decoupled = own.constants.get("decoupled_weight_decay")
        differing = given.symmetric_difference((*own.options, *own.constants))
        return len(differing), decoupled is not group.get("decoupled_weight_decay", decoupled)

    return min(COUNTERPARTS, key=unlike)


_OPTIONS = {name for own in COUNTERPARTS for name in (*own.options, *own.constants)}
