#!/usr/bin/env bash
# The optimizers of bitsandbytes round float64 parameters to float32, unless that has changed.
#
# On the CPU a step computes in float32 and copies the result over the parameter, whatever its dtype.
# Nothing refuses float64 or warns of it. So even a step with lr=0 and a gradient of zeros changes
# every parameter that is no float32 number, and whoever trains in float64 for its precision has that
# of float32.
#
# Seen with bitsandbytes 0.50.2, torch 2.13.0 (CPU), Python 3.11, Linux x86-64: AdamW, Lion and SGD
# with momentum move 1/3 by 1e-8 in such a step; a float32 parameter keeps every bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.3.5 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from bitsandbytes.optim import SGD, AdamW, Lion


def moved(kind, dtype, **options):
    weight = torch.nn.Parameter(torch.tensor([0.1, 1 / 3, 2 / 3], dtype=dtype))
    before = weight.detach().clone()
    optimizer = kind([weight], lr=0.0, **options)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return (weight.detach() - before).abs().max().item(), torch.equal(weight, weight.float().to(dtype))


for kind, options in ((AdamW, {}), (Lion, {}), (SGD, {"momentum": 0.9})):
    (double, is_float), (single, _) = (moved(kind, dtype, **options) for dtype in (torch.float64, torch.float32))
    print(f"{kind.__name__}: by lr=0 and no gradient, float64 moves by {double:.3g}, float32 by {single:.3g}")
    assert single == 0
    assert 0 < double < 1e-7 and is_float, "float64 parameters keep their precision now"
PYTHON
echo "As described."
