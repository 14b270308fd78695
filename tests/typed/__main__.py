"""Strict mypy and pyright over all code that users see, as they would have it in their own files.

`python -m tests.typed` checks the Python blocks of the README and of `docs/`, a page as one
program, the examples, and two files beside this one: `test_accepted.py`, whose types must be found
to be what they are asserted to be, and `refused.py`, of which each line that ends with `# refused`
must be an error, and no other line. Pyright is basedpyright, which brings all that it needs in its
wheels.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from ..test_docs import FENCE, PAGES, ROOT

HERE = pathlib.Path(__file__).parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
REFUSED = HERE / "refused.py"

# A page goes on with the same names, as a notebook does, which pyright takes as it is. Methods of
# torch such as `backward` have no types. Of an installed library nothing is reported.
MYPY = """[mypy]
strict = true
untyped_calls_exclude = torch
python_version = 3.11
mypy_path = {root}:{root}/examples:{pages}
[mypy-sklearn.*,tqdm.*,torchopt.*]
ignore_missing_imports = true
[mypy-funcopt.*]
follow_imports = silent
[mypy-{modules}]
allow_redefinition = true
"""
# All that pyright calls strict but for what is unknown because another library has no types, and
# for what is no matter of types: a guide shows the value of an expression, and imports again what
# the next block needs.
PYRIGHT = {
    "typeCheckingMode": "strict",
    "pythonVersion": "3.11",
    "useLibraryCodeForTypes": False,
    **dict.fromkeys(
        (
            *("reportMissingImports", "reportMissingTypeStubs", "reportMissingModuleSource"),
            *("reportUnknownArgumentType", "reportUnknownLambdaType", "reportUnknownMemberType"),
            *("reportUnknownParameterType", "reportUnknownVariableType"),
            *("reportUnusedExpression", "reportUnusedVariable", "reportDuplicateImport"),
        ),
        False,
    ),
}


class Found(NamedTuple):
    """An error that a checker found."""

    path: pathlib.Path
    line: int
    message: str


def write_pages(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """Write the Python of each page to a file of its own, with the line numbers of the page."""
    written = {}
    for page, path in PAGES.items():
        text = path.read_text()
        code = [""] * text.count("\n")
        for block in FENCE.finditer(text):
            if block[1] == "python":
                first = text.count("\n", 0, block.start(2))
                lines = block[2].splitlines()
                code[first : first + len(lines)] = lines
        if any(code):
            name = re.sub(r"\W", "_", page.removesuffix(".md"))
            file = folder / f"page_{name}.py"
            file.write_text("\n".join(code) + "\n")
            written[file] = page
    return written


def output_of(checker: str, *arguments: object) -> str:
    """Return what a checker printed, which exits with 1 where it finds an error."""
    command = [sys.executable, "-m", checker, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1):
        sys.exit(run.stdout + run.stderr)
    return run.stdout


def by_mypy(folder: pathlib.Path, files: list[pathlib.Path]) -> Iterator[Found]:
    """Yield what mypy finds in these files."""
    modules = ",".join(file.stem for file in files if file.parent != HERE)
    config = folder / "mypy.ini"
    config.write_text(MYPY.format(root=ROOT, pages=folder, modules=modules))
    looks = ("--no-error-summary", "--hide-error-context", "--no-color-output")
    printed = output_of("mypy", f"--config-file={config}", *looks, "--show-absolute-path", *files)
    for path, line, message in re.findall(r"^(.+?):(\d+): error: (.*)$", printed, re.MULTILINE):
        yield Found(pathlib.Path(path), int(line), message)


def by_pyright(folder: pathlib.Path, files: list[pathlib.Path]) -> Iterator[Found]:
    """Yield what pyright finds in these files."""
    config = folder / "pyrightconfig.json"
    where = {"include": files, "extraPaths": [ROOT, ROOT / "examples", folder]}
    config.write_text(json.dumps(PYRIGHT | where, default=str))
    where_is = f"--project={config}", f"--pythonpath={sys.executable}"
    report = json.loads(output_of("basedpyright", "--outputjson", *where_is))
    if report["summary"]["filesAnalyzed"] < len(files):
        sys.exit(f"pyright saw {report['summary']['filesAnalyzed']} of {len(files)} files.")
    for own in report["generalDiagnostics"]:
        if own["severity"] in ("error", "warning"):
            line = own["range"]["start"]["line"] + 1
            yield Found(pathlib.Path(own["file"]), line, own["message"])


def wrong_in(found: list[Found], names: dict[pathlib.Path, str]) -> list[str]:
    """Return a line for each error, and for each line that had to be one and is none."""
    lines = REFUSED.read_text().splitlines()
    wanted = {number for number, line in enumerate(lines, 1) if line.endswith("# refused")}
    refused = {own.line for own in found if own.path == REFUSED}
    accepted = sorted(wanted - refused)
    return [
        *(f"{REFUSED.relative_to(ROOT)}:{number}: was not refused" for number in accepted),
        *(
            f"{names.get(own.path, own.path)}:{own.line}: {own.message}"
            for own in found
            if own.path != REFUSED or own.line not in wanted
        ),
    ]


def main() -> None:
    """Check everything, and exit with the errors."""
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve()
        pages = write_pages(folder)
        files = [*pages, *EXAMPLES, HERE / "test_accepted.py", REFUSED]
        for check in (by_mypy, by_pyright):
            wrong = wrong_in(list(check(folder, files)), pages)
            failed |= bool(wrong)
            print(f"{check.__name__}: {len(files)} files, {len(wrong)} errors", *wrong, sep="\n  ")
    sys.exit(failed)


if __name__ == "__main__":
    main()
