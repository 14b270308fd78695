"""What a checker must refuse: each line that ends with `# refused`, and no other."""

import torch
from torch import Tensor

import funcopt
from funcopt import schedules

opt = funcopt.Clip(funcopt.AdamW(), 1.0)
params: dict[str, Tensor] = {}
state = opt.init(params)


def never_called() -> None:
    """Hold the lines, which would be refused when they run, too."""
    funcopt.AdamW(kernel="typo")  # refused
    funcopt.AdamW(lr="x")  # refused
    funcopt.AdamW(lr=lambda count: "x")  # refused
    funcopt.AdamW(betas=0.9)  # refused
    funcopt.AdamW(rate=0.1)  # refused
    funcopt.Clip(funcopt.AdamW(), 1.0, nonfinite="stop")  # refused
    funcopt.Clip(0.1, 1.0)  # refused
    funcopt.Clip(torch.optim.SGD([torch.ones(1)]), 1.0)  # refused
    funcopt.Partition({"all": 0.1}, {"w": "all"})  # refused
    opt.update(params, state.inner, params)  # refused
    opt.update(params, state, params, value="x")  # refused
    opt.update(params, state, params, activ=True)  # refused
    opt.update(params, state)  # refused
    print(state.inner.inner)  # refused
    print(opt.inner.rate)  # refused
    schedules.Cosine(peak=1.0)  # refused
    schedules.Cosine(peak=1.0, steps=10)("x")  # refused
