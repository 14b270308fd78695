#!/usr/bin/env bash
# A learning rate is never lowered while a negative score gets worse, step by step.
#
# torch's ReduceLROnPlateau calls a score better, with its defaults mode="min" and
# threshold_mode="rel", if it is below best * (1 - 1e-4). Where the best score is below zero, such as
# a log-likelihood's negative or a reward's, that bound lies above it: a score that is worse by less
# than a ten-thousandth counts as better, and becomes the best. So one that rises by half of that at
# each step is a new best each time. The mirror image of it above zero lowers the rate as it should.
# optax.contrib.reduce_on_plateau compares alike, with the same defaults. Take threshold_mode="abs"
# in torch, and rtol=0 with an atol in optax.
#
# Seen with torch 2.13.0 (CPU), optax 0.2.8, jax 0.10.2, Python 3.11, Linux x86-64, after 1,000
# scores that rise by 5e-5 each, with factor 0.5 and patience 10:
#   first score   best score at the end   learning rate at the end
#    1.0           1.0                    1.5e-8 (torch), 1.6e-30 (optax)
#   -1.0          -0.95005                1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax.contrib
import torch

STEPS, RISE = 1000, 5e-5


def by_torch(first):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    for step in range(STEPS):
        scheduler.step(first + RISE * step)
    return float(scheduler.best), optimizer.param_groups[0]["lr"]


def by_optax(first):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=10)
    state = plateau.init(jnp.zeros(1))
    update = jax.jit(lambda value, state: plateau.update(jnp.ones(1), state, value=value)[1])
    for step in range(STEPS):
        state = update(first + RISE * step, state)
    return float(state.best_value), float(state.scale)


for name, judge in (("torch", by_torch), ("optax", by_optax)):
    for first in (1.0, -1.0):
        best, rate = judge(first)
        print(f"{name}: scores from {first} up: best {best:.5f}, learning rate {rate:.3g}")
        if first > 0:
            assert best == first and rate < 1e-3, "a rising score above zero lowers the rate"
        else:
            assert best > first + 0.04 and rate == 1.0, "now a rising score below zero lowers it"
PYTHON
echo "As described."
