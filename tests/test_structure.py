"""The layout of the code: imports point downward, and each private thing is known in one place."""

import ast
import pathlib
import re
import subprocess
import sys

from torch.utils._device import _device_constructors

import funcopt
from funcopt import distributed, interop

ROOT = pathlib.Path(funcopt.__file__).parent
FILES = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}

# From the ground up: a module may import only what stands before it.
FLOORS = [
    "_types",
    "_walk",
    "_old_dynamo",
    "_transforms",
    "_modes",
    "_tree",
    "_sharded",
    "_over_shards",
    "_captured",
    "_checks",
    "_hyperparameters",
    "_kernels._operands",
    "_kernels.plain",
    "_kernels.foreach",
    "_kernels.fused",
    "_kernels._threads",
    "_kernels._layout",
    "_kernels._pages",
    "_kernels._memory",
    "_kernels._triton_source",
    "_kernels.triton",
    "_kernels._adjoint",
    "_kernels._history",
    "_kernels._eager",
    "_kernels._rules",
    "_kernels",
    "_entry",
    "_resting",
    "_node",
    "_counts",
    "_work",
    "_inplace",
    "_routine",
    "_numbers",
    "_lists",
    "_scaled",
    "_adamw",
    "schedules._checks",
    "schedules._phases",
    "schedules._curves",
    "schedules._runs",
    "schedules._compositions",
    "schedules",
    "_frozen",
    "_labels",
    "_together",
    "_partition",
    "_update_if",
    "_wrapping",
    "_clip",
    "_clip_value",
    "_clip_adaptive",
    "_accumulate",
    "_averages",
    "_ema",
    "_read_average",
    "_lookahead",
    "_finite",
    "_skip_nonfinite",
    "_loss_scale",
    "_find",
    "",
    "interop._getter",
    "interop._peers",
    "interop._source",
    "interop._from_torch",
    "interop._to_torch",
    "interop._entries",
    "interop._checkpoint",
    "interop",
    "distributed._buckets",
    "distributed._collectives",
    "distributed._shards",
    "distributed._step",
    "distributed._refusals",
    "distributed._zero1",
    "distributed._whole",
    "distributed._average",
    "distributed._meeting",
    "distributed._local_updates",
    "distributed._leafwise",
    "distributed._reducer",
    "distributed._in_backward",
    "distributed._fake_world",
    "distributed._onlooker",
    "distributed._planned",
    "distributed._plan",
    "distributed",
    "_operators",
    "torchscript",
    "testing._tensors",
    "testing._trees",
    "testing.strategies",
    "testing._compare",
    "testing._subject",
    "testing.oracles",
    "testing.laws._purity",
    "testing.laws._agreement",
    "testing.laws._transforms",
    "testing.laws._algebra",
    "testing.laws._leaves",
    "testing.laws._descent",
    "testing.laws",
    "testing._check",
    "testing._machine",
    "testing",
]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path):
    """The modules of the package that a file imports."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(FILES[path])):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join((*base, node.module))
            else:
                yield from (".".join((*base, alias.name)) for alias in node.names)


def test_every_module_has_its_floor():
    assert {name_of(path) for path in FILES} == set(FLOORS)


def test_imports_point_downward():
    for path in FILES:
        for imported in imports_of(path):
            assert FLOORS.index(imported) < FLOORS.index(name_of(path)), (path.name, imported)


def places(pattern):
    return {name_of(path) for path, text in FILES.items() if re.search(pattern, text)}


def test_one_place_knows_pytrees():
    assert places(r"\boptree\.\w|_pytree") == {"_tree", "_old_dynamo"}


def test_one_place_knows_the_transforms():
    assert places(r"torch\._C(?!\._dynamo)|_functorch|is_compiling|forward_ad") == {
        "_modes",
        "_transforms",
    }
    assert places(r"torch\._C\._dynamo") == {"_kernels._layout"}
    assert places(r"stream_capturing") == {"_transforms"}


def test_each_private_operator_is_called_in_one_place():
    assert places(r"torch\._fused_") == {"_kernels.fused"}
    assert places(r"torch\._foreach_") == {"_averages", "_kernels.foreach", "_lists"}


def test_every_tensor_that_is_made_says_where():
    """Else it is made wherever the process makes its own, as on the meta device without values."""
    makers = {maker.__name__ for maker in _device_constructors()}
    for path, text in FILES.items():
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("torch."):
                name = ast.unparse(call.func).removeprefix("torch.")
                said = {keyword.arg for keyword in call.keywords}
                assert name not in makers or "device" in said, (path.name, ast.unparse(call))


def test_files_and_functions_can_be_taken_in_at_a_glance():
    for path, text in FILES.items():
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                length = node.end_lineno - node.lineno - docstring.count("\n")
                assert length <= 50, (path.name, node.name, length)


def loaded_by(module):
    """The modules there are once this one is imported."""
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_core_does_without_what_stands_beside_it():
    beside = {"funcopt.distributed", "funcopt.interop", "funcopt.testing"}
    assert not beside & loaded_by("funcopt")
    assert not {"safetensors", "hypothesis"} & loaded_by("funcopt.interop")


def core_places(pattern):
    """Those outside of `funcopt.distributed`, which is about nothing else."""
    return {name for name in places(pattern) if not name.startswith("distributed")}


def test_one_place_knows_collectives_and_no_place_imports_them():
    assert core_places(r"torch\.distributed\.(?!is_)\w+\(|get_group") == {"_over_shards"}
    assert core_places(r"torch\.distributed\.is_\w+\(") == {"_sharded"}
    assert not core_places(r"(?m)^\s*(import|from) torch\.distributed")
    collectives = r"\bdist\.\w+\(|all_gather_|all_to_all_|reduce_scatter_"
    assert places(collectives) == {"distributed._collectives"}


def test_every_public_name_is_documented_with_an_example():
    for name in ("AdamW", "Frozen", "Optimizer", "Partition", "decay_label"):
        assert ">>>" in getattr(funcopt, name).__doc__, name
    for method in ("init", "update", "update_"):
        assert ">>>" in getattr(funcopt.AdamW, method).__doc__, method
    for package in (interop, distributed):
        for name in package.__all__:
            if not name.endswith("State"):
                assert ">>>" in getattr(package, name).__doc__, name


def test_parts_that_bring_more_with_them_are_imported_when_they_are_asked_for():
    code = """
import sys
import funcopt
parts = ["distributed", "interop", "testing", "torchscript"]
assert not any(f"funcopt.{part}" in sys.modules for part in parts)
assert "hypothesis" not in sys.modules
assert all(getattr(funcopt, part).__name__ == f"funcopt.{part}" for part in parts)
assert not hasattr(funcopt, "Adam")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
