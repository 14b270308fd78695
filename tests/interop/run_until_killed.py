"""Train, save a checkpoint, and go on until killed: `python -m tests.interop.run_until_killed`.

The arguments are the format and the directory.
"""

import pathlib
import sys
import time

import torch

from funcopt import AdamW
from funcopt.interop import to_state_dict

from .formats import FORMATS

OPT = AdamW(lr=0.1, amsgrad=True, step_per_leaf=True)
SAVED, STEPS = 7, 15


def start():
    generator = torch.Generator().manual_seed(0)
    params = {"out": torch.randn(3, 2, generator=generator), "in": [torch.zeros(4)]}
    return params, OPT.init(params)


def step(number, state, params):
    """One update, with gradients that depend on the parameters, and are sometimes None."""
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(number))
    rest = None if number % 3 == 0 else noise.sum() - params["in"][0]
    grads = {"out": params["out"] + noise, "in": [rest]}
    return OPT.update(grads, state, params)


def whole(params, state):
    """What is saved."""
    return {"params": params, "state": state}


def main(kind, directory):
    params, state = start()
    for number in range(STEPS):
        if number == SAVED:
            FORMATS[kind][0](to_state_dict(whole(params, state)), directory / "checkpoint")
            (directory / "saved").touch()
        params, state = step(number, state, params)
        if number > SAVED:  # so that it is killed on its way
            time.sleep(10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
