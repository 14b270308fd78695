"""The package as it is given to users: what is in its archives, and whether it works installed.

    python tests/package.py archives DIST   # a folder with an sdist and a wheel
    python -P tests/package.py installed native   # or: python, where there was no compiler

It needs nothing of the tests, so that it can be run where funcopt is installed, and no clone is.
"""

import contextlib
import doctest
import importlib
import io
import pathlib
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
SHOWN = (".members", ".memory", ".optimizers.adamw", ".schedules", ".wrappers.clip")


def archives(dist: str) -> None:
    """Compare what is in the archives with what is in the clone."""
    (wheel,) = pathlib.Path(dist).glob("*.whl")
    (sdist,) = pathlib.Path(dist).glob("*.tar.gz")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "funcopt").rglob("*.py")}
    sources = {f"funcopt/{path.name}" for path in (ROOT / "funcopt").glob("_native*.[ch]")}

    with zipfile.ZipFile(wheel) as opened:
        inside = {name for name in opened.namelist() if ".dist-info/" not in name}
    expected = modules | {"funcopt/py.typed", "funcopt/_native.abi3.so"}
    assert inside == expected, f"{wheel.name}: {sorted(inside ^ expected)}"
    assert "-cp311-abi3-" in wheel.name, f"{wheel.name}: not for all versions of Python from 3.11"

    with tarfile.open(sdist) as opened:
        inside = {member.name.partition("/")[2] for member in opened if member.isfile()}
    beside = {"README.md", "LICENSE", "constraints.txt", "setup.py", "zensical.toml"}
    missing = {*modules, *sources, *beside, "funcopt/py.typed", "tests/package.py"} - inside
    assert not missing, f"{sdist.name} lacks {sorted(missing)}"
    built = {name for name in inside if name.endswith((".so", ".pyc"))}
    assert not built, f"{sdist.name} has {sorted(built)}"
    print(f"{wheel.name} and {sdist.name} have what they should")


def installed(kernel: str) -> None:
    """Run the examples of some docstrings, and ask whether the native kernel serves."""
    funcopt = importlib.import_module("funcopt")
    place = pathlib.Path(funcopt.__file__).parent
    assert place.is_relative_to(sys.prefix), f"funcopt is {place}, not what was installed"
    assert (place / "py.typed").exists(), "a type checker would not read the types"
    for name in SHOWN:
        module = importlib.import_module(f"funcopt{name}")
        failed, tried = doctest.testmod(module)
        assert failed == 0, f"{failed} of {tried} examples in funcopt{name} failed"
        assert tried, f"funcopt{name} has no example"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        funcopt.show_config()
    (line,) = (line for line in printed.getvalue().splitlines() if line.startswith("native"))
    print(line)
    absent = "not built" in line
    assert absent == (kernel == "python"), line


if __name__ == "__main__":
    {"archives": archives, "installed": installed}[sys.argv[1]](sys.argv[2])
