#!/usr/bin/env bash
# torch.optim.RMSprop(centered=True) turns parameters with a steady gradient into NaN.
#
# The variance is the running mean of squares less the square of the running mean. Where a gradient
# stays the same, both come to the same number, and their difference is 0 up to rounding: for one
# gradient in two it ends a rounding below 0, of which torch takes the root. No gradient is infinite,
# and nothing is said. A bias behind a ReLU, or a scale that a loss is linear in, has such gradients.
# The values at which it stays above 0 end in steps of lr * grad / eps.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, Linux x86-64: of 100 parameters with the gradients 0.01,
# 0.02 and so on to 1, alpha 0.9, as many are NaN:
#   after steps   foreach=False   foreach=True
#   100            0               0
#   150           49              49
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def lost_after(steps, foreach):
    gradients = torch.linspace(0.01, 1.0, 100)
    weights = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.RMSprop([weights], lr=1e-2, alpha=0.9, centered=True, foreach=foreach)
    for _ in range(steps):
        weights.grad = gradients.clone()
        optimizer.step()
    return int(weights.isnan().sum())


for foreach in (False, True):
    early, late = lost_after(100, foreach), lost_after(150, foreach)
    print(f"foreach={foreach}: {early} of 100 are NaN after 100 steps, {late} after 150")
    assert early == 0
    assert 30 <= late <= 70, "now a variance that rounds below zero is no longer rooted"
PYTHON
echo "As described."
