"""What serves on this machine, and what serves where the extension does not."""

import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

import funcopt
from funcopt import SGD, Adam, AdamW, Lion
from funcopt.optimizers import _native


def test_the_extension_is_built_where_a_compiler_is():
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if not any(map(shutil.which, (compiler, "cc", "gcc", "clang", "cl"))):
        pytest.skip("no compiler")
    assert _native.extension is not None, _native.unserved


def test_the_kernels_that_serve_are_shown_in_the_order_of_auto(capsys):
    funcopt.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"funcopt {funcopt.__version__}, torch {torch.__version__}"
    cpu = lines[lines.index("cpu") :]
    for opt in (AdamW, Adam, SGD, Lion):
        (line,) = [own for own in cpu if own.startswith(f"  {opt.__name__}: ")]
        serving = line.split(": ")[1].split(", ")
        assert serving == [name for name in opt.rule.kernel_names[1:] if name in serving]
        assert serving[-1] == "plain"
    if not _native.unserved:
        names = [name for name, _ in _native.instruction_sets()]
        count = torch.get_num_threads()
        assert re.fullmatch(rf"native kernel: {names[0]}, up to {count} threads?", lines[1])
        assert "  AdamW: native, fused, foreach, plain" in cpu
    assert "    not triton: it serves cuda, not cpu" in cpu


ABSENT = """
import sys
sys.modules["funcopt._native"] = None  # as if it had not been built
import torch, funcopt
for name in ("AdamW", "Adam", "SGD", "Lion"):
    auto = getattr(funcopt, name)(lr=0.1)
    next_best = getattr(funcopt, name)(lr=0.1, kernel="foreach" if name == "Lion" else "fused")
    params, grads = [torch.ones(70), torch.ones(())], [torch.full((70,), 0.3), torch.ones(())]
    for update in ("update", "update_"):
        trees = [
            getattr(opt, update)(grads, opt.init(params), [leaf.clone() for leaf in params])[0]
            for opt in (auto, next_best)
        ]
        assert all(map(torch.equal, *trees)), name
    try:
        native = getattr(funcopt, name)(lr=0.1, kernel="native")
        native.update(grads, native.init(params), params)
    except ValueError as error:
        print(error)
funcopt.show_config()
"""


def test_where_it_is_not_built_the_other_kernels_serve_and_it_is_said_why():
    run = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, check=True)
    refusals = re.findall("kernel='native' cannot serve: its extension was not built: ", run.stdout)
    assert len(refusals) == 4, run.stdout
    assert "\nnative kernel: its extension was not built: " in run.stdout
    assert "\n  AdamW: fused, foreach, plain\n    not native: its extension was not" in run.stdout


def test_it_is_loaded_when_a_step_is_made_and_not_before():
    code = """
import sys, torch, funcopt
assert "funcopt._native" not in sys.modules
opt = funcopt.AdamW(kernel="plain")
opt.update(torch.ones(2), opt.init(torch.ones(2)), torch.ones(2))
assert "funcopt._native" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
