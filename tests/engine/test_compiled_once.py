"""What is imported on the way to a compiled step does not have it compiled again."""

import subprocess
import sys

COUNTING = """
import torch, funcopt

opt, params = funcopt.SGD(lr=0.1), {"w": torch.ones(3)}
state, step = opt.init(params), torch.compile(opt.update, fullgraph=True, backend="aot_eager")
for _ in range(3):
    params, state = step({"w": torch.ones(3)}, state, params)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_the_first_step_of_a_process_is_compiled_once():
    """The compiler imports DTensors on its way, which funcopt looks for."""
    ran = subprocess.run(
        [sys.executable, "-c", COUNTING], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "1"
