#!/usr/bin/env bash
# Adai of pytorch_optimizer makes bfloat16 parameters NaN in its first step, unless that is mended.
#
# It has a beta1 for each element, which goes by how large the element's second moment is beside the
# mean of all, and is kept to 1 - 1e-3 at most. Everything is computed in the dtype of the parameter.
# In bfloat16 0.999 rounds to 1. So where a gradient is small beside the others, beta1 is 1: then the
# average of the gradients stays 0, and what corrects its bias, 1 - beta1, is 0, and 0 / 0 is NaN. In
# float32 the same gradients are fine.
#
# Seen with pytorch_optimizer 4.1.0, torch 2.13.0 (CPU), Python 3.11, Linux x86-64: of 64 elements
# with gradients from N(0, 1) some are NaN after the first step, as with 9 of 10 seeds or more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.3.5 pytorch_optimizer==4.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from pytorch_optimizer import Adai


def count_nan(dtype, seed):
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(64).to(dtype))
    optimizer = Adai([weight])
    weight.grad = torch.randn(64).to(dtype)
    optimizer.step()
    largest = optimizer.state[weight]["beta1_prod"].max().item()
    return int(weight.isnan().sum()), largest


found = {dtype: [count_nan(dtype, seed) for seed in range(10)] for dtype in (torch.float32, torch.bfloat16)}
for dtype, counts in found.items():
    print(f"{dtype}: NaN in {[nan for nan, _ in counts]} of 64 elements; the largest beta1 is "
          f"{max(largest for _, largest in counts):.6f}")
assert all(nan == 0 for nan, _ in found[torch.float32])
assert sum(nan > 0 for nan, _ in found[torch.bfloat16]) >= 5, "bfloat16 parameters stay finite now"
assert all(largest == 1.0 for nan, largest in found[torch.bfloat16] if nan)
PYTHON
echo "As described."
