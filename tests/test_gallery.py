"""The gallery: every example is in it, and the site shows what came of each."""

import subprocess
import sys

import pytest

from docs import build

ROOT = build.ROOT
PAGE = build.PAGE.read_text()
EXAMPLES = build.examples(PAGE)
SECTION = """
## A title

```sh
.venv/bin/python examples/some.py
```

Words.

<!-- small: some.py --steps 2 --lrs 1e-3 1e-2 -->
"""


def test_every_example_has_a_section():
    names = [example.name for example in EXAMPLES]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_a_section_is_about_one_script_and_shows_its_picture(example):
    section = PAGE.partition(f"## {example.title}\n")[2].partition("\n## ")[0]
    script = f"examples/{example.name}.py"
    assert script in example.full
    assert f"[The source.](../{script})" in section
    picture = f"examples/{example.name}.png"
    assert (f"](../{picture})" in section) == (ROOT / picture).exists()


def test_commands_are_read_from_the_page():
    (example,) = build.examples(SECTION)
    assert example.title == "A title"
    assert example.full == ["python", "examples/some.py"]
    assert example.small == [*example.full, "--steps", "2", "--lrs", "1e-3", "1e-2"]


@pytest.mark.parametrize("lacking", ["<!-- small", "```sh"])
def test_a_section_without_a_command_is_an_error_that_names_it(lacking):
    with pytest.raises(ValueError, match="'A title': a section needs a block of sh"):
        build.examples(SECTION.replace(lacking, ""))


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Return an example in a clone of its own."""
    for name in ("examples", "out/gallery", "docs/drawn"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "PICTURES", tmp_path / "docs" / "drawn")
    monkeypatch.setattr(build, "RUNS", tmp_path / "out" / "gallery")
    (example,) = build.examples(SECTION)
    return example


def write(text):
    (build.ROOT / "examples" / "some.py").write_text(text)


DRAWS = """
import sys
from pathlib import Path
Path("out/some.png").write_bytes(b"picture")
print("ran with", *sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("full", "title", "printed"),
    [(False, "A small run", "ran with --steps 2"), (True, "The full run", "ran with")],
)
def test_a_run_takes_the_place_of_the_comment(example, full, title, printed):
    write(DRAWS)
    (build.RUNS / "some.md").write_text(build.run(example, full))
    lines = list(build.with_runs(SECTION.splitlines()))
    text = "\n".join(lines)
    assert f'??? example "{title}' in text
    assert f"    {printed}" in text
    assert "    ![The picture of this run](drawn/some.png)" in lines
    assert (build.PICTURES / "some.png").read_bytes() == b"picture"
    assert "<!--" not in text
    assert text.startswith(SECTION.partition("<!--")[0])


def test_a_picture_of_an_earlier_run_is_not_shown(example):
    (build.ROOT / "out" / "some.png").write_bytes(b"of before")
    write("print('no picture')")
    assert "drawn/" not in build.run(example, full=False)
    assert not list(build.PICTURES.iterdir())


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("import sys; sys.exit('losses differ')", "losses differ"),
        ("import warnings; warnings.warn('deprecated')", "UserWarning: deprecated"),
    ],
)
def test_an_example_that_fails_or_warns_ends_the_build(example, script, word):
    write(script)
    with pytest.raises(RuntimeError, match=f"(?s)some.py --steps 2 .* failed:.*{word}"):
        build.run(example, full=False)


def test_where_nothing_was_run_the_comment_is_left_out(example):
    assert "small" not in "\n".join(build.with_runs(SECTION.splitlines()))


def test_the_command_says_what_it_does():
    command = [sys.executable, "-m", "docs.build", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--full" in done.stdout
