"""The README's code, run as it stands, block after block in one namespace."""

import gc
import pathlib
import re

import pytest
import torch
from torch.func import vmap

from .cases import leaves

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
PAGES = pathlib.Path("/proc/self/statm")


def run(blocks):
    """Return the names that the blocks define."""
    namespace = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    return namespace


def test_every_python_block_of_the_readme_runs():
    assert len(BLOCKS) >= 5
    run(BLOCKS)


@pytest.mark.skipif(not PAGES.exists(), reason="memory is read from /proc")
def test_members_that_rest_as_shown_take_no_memory_from_step_to_step():
    (last,) = (index for index, block in enumerate(BLOCKS) if "stack_module_state" in block)
    shown = run(BLOCKS[: last + 1])
    step, running = shown["step_or_rest"], shown["running"]
    params, state = shown["params"], shown["state"]
    resting = {name: stacked[2].clone() for name, stacked in params.items()}
    taken = []
    for _ in range(10):
        for _ in range(100):
            params, state = vmap(step)(running, state, params)
        gc.collect()
        taken.append(int(PAGES.read_text().split()[1]))
    assert not any(leaf.requires_grad for leaf in leaves((params, state)))
    assert all(torch.equal(params[name][2], stacked) for name, stacked in resting.items())
    # With a history, each step of these four small members keeps six pages more.
    assert taken[-1] - taken[1] < 400
