#!/usr/bin/env bash
# torch.optim.NAdam in float64 has the precision of float32, unless that is no longer the default.
#
# It keeps the product of its momenta, mu_product, in a tensor of torch's default dtype, whatever the
# dtype of the parameter. Each step multiplies it and rounds it to that, and divides the update by
# 1 - mu_product. So with parameters in float64 the steps are right to some 8 digits, and the same
# code gives other numbers once torch.set_default_dtype(torch.float64) was called. The count, in the
# same dtype, is exact up to 2**24.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, Linux x86-64, after 100 steps of lr 1e-2 on a float64
# parameter that begins at 1: 0.78494033588 and 0.78494033574, which are 2e-10 of themselves apart,
# nearly a million times what one rounding in float64 is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def after_100_steps(default):
    torch.set_default_dtype(default)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.NAdam([weight], lr=1e-2)
    for step in range(100):
        weight.grad = torch.full((1,), step % 7 - 2.5, dtype=torch.float64)
        optimizer.step()
    return weight.item(), optimizer.state[weight]["mu_product"].dtype


(one, dtype), (other, other_dtype) = map(after_100_steps, (torch.float32, torch.float64))
roundings = abs(one - other) / abs(other) / torch.finfo(torch.float64).eps
print(f"default float32: {one:.11f}, mu_product in {dtype}")
print(f"default float64: {other:.11f}, mu_product in {other_dtype}; {roundings:.3g} roundings apart")
assert dtype is torch.float32 and other_dtype is torch.float64
assert roundings > 1e5, "now both have the precision of float64"
PYTHON
echo "As described."
