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

# From the ground up. "" is what `import funcopt` gives.
ROOMS = [
    "_core",
    "_dtensor",
    "_engine",
    "optimizers",
    "schedules",
    "wrappers",
    "",
    "interop",
    "distributed",
    "torchscript",
    "testing",
]

# Likewise, room by room: a module may import only what stands before it.
FLOORS = [
    "_core",
    "_core.old_dynamo",
    "_core.pages",
    "_core.threads",
    "_core.traits",
    "_core.transforms",
    "_core.modes",
    "_core.recording",
    "_core.types",
    "_core.arithmetic",
    "_core.hyperparameters",
    "_core.pytree",
    "_core.node",
    "_core.walk",
    "_core.nested",
    "_dtensor",
    "_dtensor.shards",
    "_dtensor.methods",
    "_dtensor.reductions",
    "_engine",
    "_engine.captured",
    "_engine.checks",
    "_engine.counts",
    "_engine.entry",
    "_engine.resting",
    "_engine.rule",
    "_engine.equations",
    "_engine.kernels",
    "_engine.layout",
    "_engine.memory",
    "_engine.dispatch",
    "_engine.autograd",
    "_engine.numbers",
    "_engine.prepare",
    "_engine.inplace",
    "_engine.scaled",
    "_engine.driver",
    "_engine.registration",
    "optimizers",
    "optimizers._adam",
    "optimizers._adam.triton_source",
    "optimizers.adamw",
    "optimizers._adam.adjoint",
    "optimizers._adam.kernels",
    "optimizers._adam.triton",
    "optimizers.frozen",
    "schedules._checks",
    "schedules._phases",
    "schedules._compositions",
    "schedules._curves",
    "schedules._runs",
    "schedules",
    "wrappers",
    "wrappers.base",
    "wrappers.clip_adaptive",
    "wrappers.clip_value",
    "wrappers.finite",
    "wrappers.labels",
    "wrappers.shadow_params",
    "wrappers.ema",
    "wrappers.together",
    "wrappers.partition",
    "wrappers.averaged",
    "wrappers.update_if",
    "wrappers.accumulate",
    "wrappers.clip_norm",
    "wrappers.lookahead",
    "wrappers.loss_scale",
    "wrappers.skip_nonfinite",
    "",
    "interop._entries",
    "interop._checkpoint",
    "interop._getter",
    "interop._peers",
    "interop._source",
    "interop._from_torch",
    "interop._to_torch",
    "interop",
    "distributed._buckets",
    "distributed._collectives",
    "distributed._average",
    "distributed._fake_world",
    "distributed._leafwise",
    "distributed._meeting",
    "distributed._onlooker",
    "distributed._planned",
    "distributed._reducer",
    "distributed._in_backward",
    "distributed._refusals",
    "distributed._local_updates",
    "distributed._plan",
    "distributed._shards",
    "distributed._step",
    "distributed._zero1",
    "distributed._whole",
    "distributed",
    "torchscript._operators",
    "torchscript",
    "testing._compare",
    "testing._subject",
    "testing._tensors",
    "testing._trees",
    "testing.laws._algebra",
    "testing.laws._descent",
    "testing.laws._leaves",
    "testing.laws._purity",
    "testing.laws._transforms",
    "testing.oracles",
    "testing.laws._agreement",
    "testing.laws",
    "testing.strategies",
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


def test_floors_are_in_the_order_of_the_rooms():
    rooms = [name.split(".")[0] for name in FLOORS]
    assert rooms == sorted(rooms, key=ROOMS.index)
    assert set(rooms) == set(ROOMS)


def test_imports_point_downward():
    for path in FILES:
        for imported in imports_of(path):
            assert FLOORS.index(imported) < FLOORS.index(name_of(path)), (path.name, imported)


def places(pattern):
    return {name_of(path) for path, text in FILES.items() if re.search(pattern, text)}


def test_one_place_knows_pytrees():
    assert places(r"\boptree\.\w|_pytree") == {"_core.pytree", "_core.old_dynamo"}


def test_one_place_knows_the_transforms():
    assert places(r"torch\._C(?!\._dynamo)|_functorch|is_compiling|forward_ad") == {
        "_core.modes",
        "_core.transforms",
    }
    assert places(r"torch\._C\._dynamo") == {"_engine.layout"}
    assert places(r"stream_capturing") == {"_core.transforms"}


def test_each_private_operator_is_called_in_one_place():
    fused = r"""(?:torch\.|["'])(_fused_\w+)"""
    names = {name for text in FILES.values() for name in re.findall(fused, text)}
    assert "_fused_adamw_" in names
    for name in names:
        (place,) = places(rf"""(?:torch\.|["']){name}\b""")
        assert place.startswith("optimizers."), name
    elsewhere = {name for name in places(r"torch\._foreach_") if name.split(".")[0] != "optimizers"}
    assert elsewhere == {"_core.arithmetic", "_engine.kernels", "wrappers.shadow_params"}


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
    assert core_places(r"torch\.distributed\.(?!is_)\w+\(|get_group") == {"_dtensor.reductions"}
    assert core_places(r"torch\.distributed\.is_\w+\(") == {"_dtensor.shards"}
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
assert not hasattr(funcopt, "Nadir")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_optimizer_is_named_where_all_are_served():
    """Nor a slot or a number of one: what an optimizer is, its rule says."""
    serving = ("_core", "_dtensor", "_engine", "wrappers", "distributed")
    named = places(r"exp_avg|AdamW|beta1")
    assert not {name for name in named if name.split(".")[0] in serving}
