"""Build the site: run every example, show in the gallery what came of it, and check all links.

`docs/gallery.md` is the table of the examples. Each of its sections has a title, the command of the
full run, what came of that run, and a comment with the command of a small run:

    <!-- small: migrate.py --steps 12 -->

`python -m docs.build` makes the small runs, and `python -m docs.build --full` the full ones, which
take minutes each. On the site a run takes the place of the comment: its command, its picture, and
what it printed. A run that fails ends the build.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "drawn"  # within docs/, as all that the site shows
RUNS = ROOT / "out" / "gallery"  # a piece of the page for each run

_SMALL = re.compile(r"^<!-- small: (\w+)\.py\b(.*) -->$", re.MULTILINE)
_COMMAND = re.compile(r"^```sh\n(?:.*&& )?(.*)\n```$", re.MULTILINE)


class Example(NamedTuple):
    """A section of the gallery."""

    title: str
    name: str
    small: list[str]
    full: list[str]


def examples(page: str) -> list[Example]:
    """Return the examples of the gallery, in its order.

    Raises:
        ValueError: A section lacks one of its commands.
    """
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        small, full = _SMALL.search(section), _COMMAND.search(section)
        if small is None or full is None:
            raise ValueError(
                f"{PAGE.name}, {title!r}: a section needs a block of sh with the command of the "
                "full run, and a comment `<!-- small: NAME.py FLAGS -->` for a small one"
            )
        name, flags = small.groups()
        command = ["python", f"examples/{name}.py", *shlex.split(flags)]
        found.append(Example(title, name, command, shlex.split(full[1].replace(".venv/bin/", ""))))
    return found


def run(example: Example, full: bool) -> str:
    """Run an example, keep its picture, and return the piece of the page that shows the run.

    Raises:
        RuntimeError: The example fails, or warns of something.
    """
    command = example.full if full else example.small
    programs = {
        "python": ["-W", "error::UserWarning"],
        "torchrun": ["-m", "torch.distributed.run"],
    }
    picture = ROOT / "out" / f"{example.name}.png"
    picture.unlink(missing_ok=True)
    # Small runs are made side by side. On several threads torch's forward pass can also round
    # differently from run to run, where two small runs are compared.
    threads = {} if full else {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *programs[command[0]], *command[1:]],
        check=False,
        cwd=ROOT,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    drawn = picture.exists()
    if drawn:
        shutil.copyfile(picture, PICTURES / picture.name)
    return shown(example, command, done.stdout, drawn)


def shown(example: Example, command: list[str], printed: str, drawn: bool) -> str:
    """Return the piece of the page that shows a run, folded."""
    title = "The full run, as this build made it"
    lines = ["````sh", shlex.join(command), "````", ""]
    if command == example.small:
        title = "A small run, as this build made it"
        lines += ["What is said above is of the full run, and not of this one.", ""]
    if drawn:
        lines += [f"![The picture of this run](drawn/{example.name}.png)", ""]
    lines += ["````text", *printed.strip("\n").splitlines(), "````"]
    indented = [f"    {line}".rstrip() for line in lines]
    return "\n".join([f'??? example "{title}"', "", *indented, ""])


def with_runs(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a page, with the runs there are in place of the comments."""
    for line in lines:
        small = _SMALL.match(line)
        if small is None:
            yield line
        elif (piece := RUNS / f"{small[1]}.md").exists():
            yield from piece.read_text().splitlines()


def main() -> None:
    """Run the examples, and build the site."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="make the full runs, one by one")
    full = parser.parse_args().full
    for folder in (PICTURES, RUNS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with ThreadPoolExecutor(1 if full else os.cpu_count()) as pool:
        runs = {
            example.name: pool.submit(run, example, full) for example in examples(PAGE.read_text())
        }
        for name, piece in runs.items():
            (RUNS / f"{name}.md").write_text(piece.result())
            print(f"ran examples/{name}.py", flush=True)
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    sys.exit(subprocess.run(build, check=False, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
