"""Optimizers of other libraries: how their state dicts are told, and what in them an AdamW can use.

Read off torch-optimi 0.3.3, pytorch_optimizer 4.1.0, heavyball 3.2.1, schedulefree 1.4.1,
bitsandbytes 0.50.2 and torchao 0.18.0. The docstring of `funcopt.interop` has the same as a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class _Peer(NamedTuple):
    name: str
    keys: frozenset[str]  # which its param groups have, and those of none other in the list
    advice: str


_REBUILD = (
    "Put them into the state_dict() of a new torch.optim.AdamW with the same hyperparameters, and "
    "take over that: help(funcopt.interop) shows how."
)
_DEBIASED = (
    "{} are moments whose bias is corrected already: torch's are these times 1 - beta1**t and "
    f"1 - beta2**t, where t is {{}} of the param group. {_REBUILD}"
)

# The schedule-free ones come first, which some of the other libraries have, too.
_PEERS = (
    _Peer(
        "a schedule-free optimizer",
        frozenset(("weight_lr_power", "weight_sum")),
        "It has no first moment, which an AdamW needs. Begin with opt.init(params) from the "
        "parameters that it shows in evaluation mode.",
    ),
    _Peer(
        "optimi",
        frozenset(("beta1", "beta2", "max_lr", "kahan_sum")),
        _DEBIASED.format("Its exp_avg and exp_avg_sq", "'step'"),
    ),
    _Peer(
        "the StableAdamW of pytorch_optimizer",
        frozenset(("weight_decouple", "kahan_sum")),
        _DEBIASED.format("Its exp_avg and exp_avg_sq", "'step'"),
    ),
    _Peer(
        "heavyball",
        frozenset(("caution", "storage_dtype")),
        _DEBIASED.format("Its ..._exp_avg_0 and ..._exp_avg_sq_0, a level deeper,", "'step_count'"),
    ),
    _Peer(
        "bitsandbytes",
        frozenset(("alpha", "t_alpha", "t_beta3")),
        "Its state1 and state2 are torch's exp_avg and exp_avg_sq; those of uint8 are had from "
        f"bitsandbytes.functional.dequantize_blockwise. {_REBUILD}",
    ),
)
_TORCHAO = (
    "torchao, whose moments are quantized. Load its state dict into a torch.optim.AdamW, and take "
    "over that: they are then dequantized."
)


def advice_on(group: Mapping[str, Any], entries: Iterable[Mapping[Any, Any]]) -> str | None:
    """Return of which library a source is, and what to do with it; None if of none that is known.

    Args:
        group: One of its param groups.
        entries: The states of its parameters.
    """
    for peer in _PEERS:
        if peer.keys <= group.keys():
            return f"{peer.name}. {peer.advice}"
    values = (value for entry in entries for value in entry.values())
    if any(type(value).__module__.partition(".")[0] == "torchao" for value in values):
        return _TORCHAO
    return None
