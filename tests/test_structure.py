"""The layout of the code: imports point downward, and each private thing is known in one place."""

import ast
import inspect
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
    "_pure",
    "_unroll",
    "extend",
    "members",
    "memory",
    "_config",
    "",
    "compat",
    "interop",
    "distributed",
    "torchscript",
    "testing",
]

# Likewise, room by room: a module may import only what stands before it.
FLOORS = [
    "_core",
    "_core.types",
    "_core.inner",
    "_core.old_dynamo",
    "_core.uncompiled",
    "_core.transforms",
    "_core.pytree",
    "_core.show",
    "_core.tensors",
    "_core.torch_names",
    "_core.walk",
    "_dtensor",
    "_dtensor.shards",
    "_dtensor.methods",
    "_dtensor.members",
    "_dtensor.exchange",
    "_dtensor.reductions",
    "_dtensor.wholes",
    "_engine",
    "_engine.hints",
    "_engine.rule",
    "_engine.hyperparameters",
    "_engine.counts",
    "_engine.equations",
    "_engine.results",
    "_engine.memory",
    "_engine.rounding",
    "_engine.dispatch",
    "_engine.autograd",
    "_engine.captured",
    "_engine.checks",
    "_engine.per_leaf",
    "_engine.prepare",
    "_engine.pairs",
    "_engine.update",
    "_engine.compensated",
    "_engine.definitions",
    "_engine.recorded",
    "_engine.stacked",
    "_engine.scaled",
    "_engine.update_where",
    "_engine.update_if",
    "_engine.extras",
    "_engine.indices",
    "_engine.kernels",
    "_engine.sharded",
    "_engine.registration",
    "_engine.merge",
    "_engine.normal",
    "_engine.stacked_wrappers",
    "optimizers",
    "optimizers._adam",
    "optimizers.adamw",
    "optimizers._adam.adjoint",
    "optimizers._adam.kernels",
    "optimizers._terms",
    "optimizers._adam.nesterov",
    "optimizers._adam.triton_arguments",
    "optimizers._native",
    "optimizers._adam.triton_launch",
    "optimizers._adam.triton",
    "optimizers._adam.triton_numbers",
    "optimizers._adam.triton_round",
    "optimizers._adam.triton_source",
    "optimizers._products",
    "optimizers._newton_schulz",
    "optimizers._muon",
    "optimizers.adafactor",
    "optimizers.adagrad",
    "optimizers.adam",
    "optimizers.frozen",
    "optimizers.lion",
    "optimizers.muon",
    "optimizers.nadam",
    "optimizers.radam",
    "optimizers.rmsprop",
    "optimizers.sgd",
    "schedules._checks",
    "schedules._phases",
    "schedules._compositions",
    "schedules._curves",
    "schedules._runs",
    "schedules",
    "wrappers",
    "wrappers._shared",
    "wrappers._finite",
    "wrappers._hold_back",
    "wrappers._in_float32",
    "wrappers._scores",
    "wrappers._lr",
    "wrappers._rows",
    "wrappers._shadow_params",
    "wrappers._stacks",
    "wrappers._together",
    "wrappers.accumulate",
    "wrappers.ema",
    "wrappers.labels",
    "wrappers.partition",
    "wrappers.schedule_free",
    "wrappers.averaged",
    "wrappers.best",
    "wrappers.cautious",
    "wrappers.clip",
    "wrappers.clip_adaptive",
    "wrappers.clip_value",
    "wrappers.compensated",
    "wrappers.find_replace",
    "wrappers.lookahead",
    "wrappers.loss_scale",
    "wrappers.master_weights",
    "wrappers.members",
    "wrappers.plateau",
    "wrappers.skip_nonfinite",
    "wrappers.transform",
    "_pure",
    "_pure.source",
    "_pure.state",
    "_pure.step",
    "_pure.trees",
    "_pure.optimizer",
    "_unroll.closures",
    "_unroll.looks",
    "_unroll.checkpoint",
    "_unroll.randomness",
    "_unroll.probe",
    "_unroll.autocast",
    "_unroll.segments",
    "_unroll",
    "extend",
    "members",
    "memory",
    "_config",
    "",
    "compat",
    "interop._entries",
    "interop._checkpoint",
    "interop._counterparts",
    "interop._getter",
    "interop._peers",
    "interop._source",
    "interop._from_torch",
    "interop._to_torch",
    "interop",
    "distributed._buckets",
    "distributed._checks",
    "distributed._collectives",
    "distributed._average",
    "distributed._reducer",
    "distributed._in_backward",
    "distributed._sync",
    "distributed._local_updates",
    "distributed._cost_counter",
    "distributed._fake_world",
    "distributed._planned",
    "distributed._plan",
    "distributed._shards",
    "distributed._leaves",
    "distributed._step",
    "distributed._zero1",
    "distributed._whole",
    "distributed",
    "torchscript._operators",
    "torchscript",
    "testing._adapters",
    "testing._compare",
    "testing._progress",
    "testing._report",
    "testing._subject",
    "testing.laws._transforms",
    "testing.laws._active",
    "testing.oracles",
    "testing.laws._agreement",
    "testing.laws._algebra",
    "testing._tensors",
    "testing.laws._descent",
    "testing.laws._leaves",
    "testing.laws._missing",
    "testing.laws._precision",
    "testing.laws._purity",
    "testing.laws._reference",
    "testing.laws",
    "testing._optimizers",
    "testing._trees",
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


def reached_from(module):
    """The modules that a module imports when it is imported, and those that these import.

    What is imported within a function, or for an old torch alone, is not among them.
    """
    paths = {name_of(path): path for path in FILES}
    found, pending = set(), [module]
    while pending:
        name = pending.pop()
        if name in found or name not in paths:
            continue
        found.add(name)
        package = paths[name].relative_to(ROOT).parent.parts
        for node in ast.parse(FILES[paths[name]]).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                own = ".".join((*base, node.module)) if node.module else ".".join(base)
                pending += [own, *(f"{own}.{alias.name}" for alias in node.names)]
    empty = {name for name in found if paths[name].name == "__init__.py"}
    return found - empty - {module}


def test_whoever_reads_an_optimizer_has_thirteen_modules_to_know():
    assert len(reached_from("optimizers.adamw")) <= 13, sorted(reached_from("optimizers.adamw"))


def test_gradients_pass_through_few_modules_and_never_climb_back():
    """From `AdamW.update` to the kernel: each stage calls those that stand before it."""
    code = """
import sys, torch, funcopt
opt = funcopt.AdamW()
params = {"w": torch.ones(3), "b": torch.ones(2)}
state = opt.init(params)
for _ in range(3):
    opt.update(params, state, params)
calls = []
def note(frame, event, _):
    name = frame.f_globals.get("__name__", "")
    if event == "call" and name.startswith("funcopt."):
        caller = frame.f_back.f_globals.get("__name__", "")
        calls.append((caller, name))
sys.setprofile(note)
opt.update(params, state, params)
sys.setprofile(None)
for caller, name in calls:
    print(caller.removeprefix("funcopt."), name.removeprefix("funcopt."))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    calls = [line.split() for line in run.stdout.splitlines()]
    for caller, name in calls:
        # Out of the methods' own wrapping, and out of the engine to a kernel, it goes by a value.
        given = ("_engine.registration", "_core.tensors")  # which call what they are given
        within = caller not in FLOORS or caller in (name, *given)
        if not within and not name.startswith(("optimizers", "_engine.kernels")):
            assert FLOORS.index(name) < FLOORS.index(caller), (caller, name)


def places(pattern):
    return {name_of(path) for path, text in FILES.items() if re.search(pattern, text)}


def test_one_place_knows_pytrees():
    assert places(r"\boptree\.\w|_pytree") == {"_core.pytree", "_core.old_dynamo"}


def test_one_place_knows_the_transforms():
    assert places(r"torch\._C\b(?!\._dynamo|, ._storage)|_functorch|is_compiling|forward_ad") == {
        "_core.transforms"
    }
    assert places(r"torch\._C\._dynamo") == {"_engine.memory"}
    assert places(r"_storage_Use_Count") == {"_engine.results"}
    assert places(r"stream_capturing") == {"_core.transforms"}


def test_each_private_operator_is_called_in_one_place():
    fused = r"""(?:torch\.|["'])(_fused_\w+)"""
    names = {name for text in FILES.values() for name in re.findall(fused, text)}
    assert "_fused_adamw_" in names
    for name in names:
        (place,) = places(rf"""(?:torch\.|["']){name}\b""")
        assert place.startswith("optimizers."), name
    elsewhere = {name for name in places(r"torch\._foreach_") if name.split(".")[0] != "optimizers"}
    assert elsewhere == {"_core.tensors", "_engine.kernels"}


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


def test_few_places_know_collectives_and_no_place_imports_them():
    assert core_places(r"torch\.distributed\.(?!is_)\w+\(|get_group") == {
        "_dtensor.reductions",
        "_dtensor.exchange",
        "_dtensor.wholes",
    }
    assert core_places(r"torch\.distributed\.is_\w+\(") == {"_dtensor.shards"}
    assert not core_places(r"(?m)^\s*(import|from) torch\.distributed")
    collectives = r"\bdist\.\w+\(|all_gather_|all_to_all_|reduce_scatter_"
    assert places(collectives) == {
        "distributed._collectives",
        "_dtensor.exchange",
        "_dtensor.wholes",
    }


def test_every_public_name_is_documented_with_an_example():
    for method in ("init", "update", "update_"):
        assert ">>>" in getattr(funcopt.AdamW, method).__doc__, method
    packages = (funcopt, interop, distributed, funcopt.members, funcopt.memory, funcopt.schedules)
    for package in packages:
        for name in package.__all__:
            shown = getattr(package, name)
            ours = getattr(shown, "__module__", "").startswith("funcopt")
            defined = inspect.isclass(shown) or inspect.isfunction(shown)
            if ours and defined and not name.endswith("State"):
                assert ">>>" in (shown.__doc__ or ""), f"{package.__name__}.{name}"


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
