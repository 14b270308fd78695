"""What `import funcopt` brings with it, and what it shows."""

import subprocess
import sys

import funcopt

STEPS = """
import torch, funcopt
opt = funcopt.Clip(funcopt.AdamW(), 1.0)
params = {"w": torch.ones(3)}
params, state = opt.update(params, opt.init(params), params)
opt.update_({"w": torch.ones(3)}, state, params)
"""
# Each takes longer to import than funcopt itself.
COSTLY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "hypothesis", "sympy")


def modules_after(code):
    """The names of the modules that a new process has after some code."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_a_step_imports_nothing_costly_that_torch_does_not():
    found = modules_after(STEPS) - modules_after("import torch")
    assert "funcopt" in found
    assert found.isdisjoint(COSTLY)


def test_nothing_is_imported_but_funcopt_and_optree_and_small_parts():
    others = modules_after(STEPS) - modules_after("import torch, optree")
    assert len({name for name in others if not name.startswith("funcopt")}) < 20


def test_dir_shows_public_names_and_parts_alone():
    shown = dir(funcopt)
    assert set(shown) == {
        *funcopt.__all__,
        "compat",
        "distributed",
        "interop",
        "testing",
        "torchscript",
    }
    assert all(hasattr(funcopt, name) for name in shown)


def test_the_collector_rests_while_it_is_imported_and_is_left_as_it_was():
    code = """
import gc, sys, torch
%s
runs = []
def note(phase, _):
    if "funcopt._core" in sys.modules and "funcopt.wrappers.transform" not in sys.modules:
        runs.append(phase)
gc.callbacks.append(note)
import funcopt
assert not runs, runs
print(gc.isenabled())
"""
    for before, after in (("", "True"), ("gc.disable()", "False")):
        command = [sys.executable, "-c", code % before]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.split() == [after]
