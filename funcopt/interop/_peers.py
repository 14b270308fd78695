"""Optimizers of other libraries: how their state dicts are told, and what in them an AdamW can use.

The docstring of `funcopt.interop` has the same as a table, with the versions that it was read off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_REBUILD = (
    "Put them into the state_dict() of a new torch.optim.AdamW with the same hyperparameters, and "
    "take over that: help(funcopt.interop) shows how."
)
_DEBIASED = (
    "{} are moments whose bias is corrected already: torch's are these times 1 - beta1**t and "
    f"1 - beta2**t, where t is {{}} of the param group. {_REBUILD}"
)

# For each name: keys that its param groups have, and those of none other here; and what to do.
# The schedule-free ones come first, which some of the other libraries have, too.
_PEERS: dict[str, tuple[set[str], str]] = {
    "a schedule-free optimizer": (
        {"weight_lr_power", "weight_sum"},
        "It has no first moment, which an AdamW needs. Begin with opt.init(params) from the "
        "parameters that it shows in evaluation mode.",
    ),
    "optimi": (
        {"beta1", "beta2", "max_lr", "kahan_sum"},
        _DEBIASED.format("Its exp_avg and exp_avg_sq", "'step'"),
    ),
    "the StableAdamW of pytorch_optimizer": (
        {"weight_decouple", "kahan_sum"},
        _DEBIASED.format("Its exp_avg and exp_avg_sq", "'step'"),
    ),
    "heavyball": (
        {"caution", "storage_dtype"},
        _DEBIASED.format("Its ..._exp_avg_0 and ..._exp_avg_sq_0, a level deeper,", "'step_count'"),
    ),
    "bitsandbytes": (
        {"alpha", "t_alpha", "t_beta3"},
        "Its state1 and state2 are torch's exp_avg and exp_avg_sq; those of uint8 are had from "
        f"bitsandbytes.functional.dequantize_blockwise. {_REBUILD}",
    ),
}
_TORCHAO = (
    "torchao, whose moments are quantized. Load its state dict into a torch.optim.AdamW, and take "
    "over that: they are then dequantized."
)


def advice_on(group: Mapping[str, Any], entries: Iterable[Mapping[Any, Any]]) -> str | None:
    """Return of which library a source is, and what to do with it; None if of none that is known.

    `group` is one of its param groups, `entries` are the states of its parameters.
    """
    for name, (keys, advice) in _PEERS.items():
        if keys <= group.keys():
            return f"{name}. {advice}"
    values = (value for entry in entries for value in entry.values())
    if any(type(value).__module__.partition(".")[0] == "torchao" for value in values):
        return _TORCHAO
    return None
