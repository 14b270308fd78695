#!/usr/bin/env bash
# torch.optim.Muon without Nesterov, on bfloat16 parameters, keeps the normalized momentum.
#
# With nesterov=False the matrix that is made orthogonal is the momentum buffer itself. It is cast to
# bfloat16, which for a buffer in bfloat16 is no copy, and is then divided by its norm in place. So
# after every step the buffer has norm 1 (nearly), whatever the gradients were, and the next step
# adds a gradient of its true size to that: past gradients count for next to nothing, or for nearly
# all, as the scale of the loss has it. In float32 the cast is a copy, and with Nesterov the matrix is
# one of its own: there the buffer is right.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, Linux x86-64: the buffer after one step, momentum 0.5,
# of a 4 x 6 matrix whose gradient is 8 everywhere (4 is right):
#   nesterov   float32   bfloat16
#   True       4.0       4.0
#   False      4.0       0.204   = 1 / sqrt(24), rounded
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def buffer_after_one_step(nesterov, dtype):
    weight = torch.nn.Parameter(torch.zeros(4, 6, dtype=dtype))
    optimizer = torch.optim.Muon([weight], momentum=0.5, nesterov=nesterov)
    weight.grad = torch.full((4, 6), 8.0, dtype=dtype)
    optimizer.step()
    return optimizer.state[weight]["momentum_buffer"].float()


for nesterov in (True, False):
    for dtype in (torch.float32, torch.bfloat16):
        buffer = buffer_after_one_step(nesterov, dtype)
        mean, norm = buffer.mean().item(), buffer.norm().item()
        print(f"nesterov={nesterov}, {dtype}: mean {mean:.4f}, norm {norm:.3f}")
        if nesterov or dtype is torch.float32:
            assert mean == 4.0, "the buffer was right with Nesterov, and in float32"
        else:
            assert abs(norm - 1.0) < 0.01, "now the buffer is no longer overwritten"
PYTHON
echo "As described."
