"""State dicts of other libraries, in the shapes that these write: told by name, and not taken."""

import pytest
import torch

from funcopt.interop import from_torch

PARAMS = {"w": torch.zeros(2)}


def saved(entry, **group):
    return {"state": {0: entry}, "param_groups": [{"lr": 0.01, **group, "params": [0]}]}


def torch_group():
    (group,) = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()["param_groups"]
    return group


def moments(first="exp_avg", second="exp_avg_sq"):
    return {first: torch.ones(2), second: torch.ones(2)}


OPTIMI = {
    **{"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "decouple_wd": True},
    **{"decouple_lr": False, "max_lr": None, "kahan_sum": None, "foreach": None, "triton": False},
    **{"gradient_release": False, "setup": True, "step": torch.tensor(5, dtype=torch.int32)},
}
STABLE = {
    **{"betas": (0.9, 0.99), "kahan_sum": True, "weight_decay": 0.1, "weight_decouple": True},
    **{"eps": 1e-8, "foreach": None, "step": 5},
}
HEAVYBALL = {
    **{"caution": False, "warmup_steps": 0, "weight_decay": 0.1, "eps": 1e-8, "betas": (0.9, 0.99)},
    **{"cautious_weight_decay": False, "multi_tensor": True, "storage_dtype": "float32"},
    **{"step_count": torch.tensor(5), "step": None},
}
SCHEDULE_FREE = {
    **{"betas": (0.9, 0.99), "eps": 1e-8, "r": 0.0, "k": 5, "warmup_steps": 0, "train_mode": True},
    **{"weight_sum": 5e-4, "lr_max": 0.01, "weight_lr_power": 2.0, "weight_decay": 0.1},
}
BITSANDBYTES = {
    **{"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
    **{"alpha": 0.0, "t_alpha": None, "t_beta3": None},
}
QUANTIZED = {"step": 5, "__bnb_optimizer_quant_state__": moments("state1", "state2")}

PEERS = {
    "optimi": (saved({**moments(), "kahan_comp": None}, **OPTIMI), r"but of optimi. .*'step'"),
    "StableAdamW": (
        saved({**moments(), "kahan_comp": None}, **STABLE),
        "StableAdamW of pytorch_optimizer. .*1 - beta1",
    ),
    "heavyball": (
        saved({0: moments("update_by_adam_exp_avg_0", "update_by_adam_exp_avg_sq_0")}, **HEAVYBALL),
        "but of heavyball. .*_exp_avg_0 .*1 - beta2.*'step_count'",
    ),
    "heavyball, schedule-free": (
        saved({0: moments("z", "v")}, **HEAVYBALL, weight_lr_power=2.0, weight_sum=1.0),
        "but of a schedule-free optimizer",
    ),
    "schedulefree": (
        saved(moments("z"), **SCHEDULE_FREE),
        r"no first moment, .* opt.init\(params\)",
    ),
    "bitsandbytes": (saved(QUANTIZED, **BITSANDBYTES), "state1 and state2 .*dequantize_blockwise"),
    "bitsandbytes, loaded into torch's": (
        saved(QUANTIZED, **{**torch_group(), **BITSANDBYTES}),
        "but of bitsandbytes",
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_source_of_another_library_is_refused_by_name_with_what_can_be_done(name):
    source, message = PEERS[name]
    with pytest.raises(ValueError, match=message):
        from_torch(source, PARAMS)


class Quantized(torch.Tensor):
    """Stands for a moment of torchao."""


Quantized.__module__ = "torchao.optim.subclass_8bit"


def test_quantized_moments_are_sent_by_way_of_torch_and_taken_from_there():
    moment = torch.ones(2).as_subclass(Quantized)
    entry = {"step": torch.tensor(5.0), "exp_avg": moment, "exp_avg_sq": moment}
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False}
    source = saved(entry, **group)
    with pytest.raises(ValueError, match=r"but of torchao, .*Load its state dict into a torch"):
        from_torch(source, PARAMS)
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    theirs.load_state_dict(source)
    _, state = from_torch(theirs.state_dict(), PARAMS)
    assert type(state.exp_avg["w"]) is torch.Tensor
    assert state.step == 5


def test_what_was_rebuilt_in_place_is_taken_though_keys_of_the_other_library_are_left():
    entry = {"step": torch.tensor(5.0), **moments()}
    _, state = from_torch(saved(entry, **{**torch_group(), **BITSANDBYTES}), PARAMS)
    assert state.step == 5
