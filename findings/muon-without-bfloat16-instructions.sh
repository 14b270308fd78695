#!/usr/bin/env bash
# torch.optim.Muon takes tens of times as long as float32 on x86 processors without AVX-512.
#
# It makes its products of matrices in bfloat16, whatever the dtype of the parameter, and has no
# argument for another one. torch hands such products to oneDNN from AVX-512 on alone. On processors
# with AVX2 it multiplies them by a loop of its own, which is slower than products in float32 by one
# or two orders of magnitude; nothing warns of it. The same iterations in float32 take milliseconds.
# oneDNN is told to use AVX2 alone, so that this can be seen on any x86 processor.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, Linux x86-64, an AMD EPYC with AVX2, one thread: a step
# of one matrix of 256 by 256 took 266 ms, the five iterations in float32 6 ms: 43 times. With larger
# matrices the factor is larger: of the 64 million parameters of a small GPT-2, on two threads, a
# step of Muon and AdamW took 350 seconds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)


def seconds(function):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def iterate_in_float32(matrix):
    """The five iterations that torch.optim.Muon documents, with its coefficients."""
    wide = matrix / matrix.norm()
    for _ in range(5):
        gram = wide @ wide.mT
        update = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        wide = torch.addmm(wide, update, wide, beta=3.4445)
    return wide


weight = torch.nn.Parameter(torch.randn(256, 256))
weight.grad = torch.randn(256, 256)
optimizer = torch.optim.Muon([weight], lr=1e-3)
by_muon = seconds(optimizer.step)
in_float32 = seconds(lambda: iterate_in_float32(weight.grad))
print(f"torch.optim.Muon {by_muon * 1e3:.1f} ms, the iterations in float32 {in_float32 * 1e3:.1f} ms: "
      f"{by_muon / in_float32:.0f} times")
assert by_muon > 8 * in_float32, "products of bfloat16 are no longer slow without AVX-512"
PYTHON
echo "As described."
