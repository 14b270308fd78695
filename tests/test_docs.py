"""The README and the pages of `docs/`: code that runs, links that lead somewhere, every name."""

import gc
import importlib
import pathlib
import re
import sys
import tomllib
from types import ModuleType

import pytest
import torch
from torch.func import vmap

from .cases import leaves

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
# What a symbolic link in docs/ leads to lies elsewhere in the clone, and its links are of there.
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if not path.is_symlink()
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULES = [
    "funcopt",
    *(
        f"funcopt.{name}"
        for name in (
            *("compat", "distributed", "extend", "interop", "members", "memory", "schedules"),
            *("testing", "testing.laws", "testing.oracles", "testing.strategies", "torchscript"),
        )
    ),
]
MEMORY = pathlib.Path("/proc/self/statm")


def python_blocks(page):
    """Return the blocks of Python that are meant to run: those marked `py` need processes."""
    return [
        code for language, code in FENCE.findall(PAGES[page].read_text()) if language == "python"
    ]


def run(page, blocks):
    """Return the names that the blocks of a page define."""
    # torch.compile imports the module of a class that it traces, and knows it from then on.
    name = re.sub(r"\W", "_", page)
    module = sys.modules[name] = ModuleType(name)
    try:
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"{page}, python block {number}", "exec"), vars(module))
    finally:
        del sys.modules[name]
    return vars(module)


def anchors(path):
    """Return the anchors of the headings of a page, as a code host and the site make them."""
    text = FENCE.sub("", path.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_every_python_block_of_a_page_runs(page, capsys):
    run(page, python_blocks(page))


def test_the_readme_and_every_guide_show_code():
    assert all(python_blocks(page) for page in PAGES if page.startswith(("README", "docs/guides")))


def test_code_that_is_no_python_says_what_it_is():
    languages = {word for path in PAGES.values() for word, _ in FENCE.findall(path.read_text())}
    assert languages == {"python", "py", "sh"}


def test_the_readme_is_short():
    assert len(PAGES["README.md"].read_text().split()) < 1200


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    path = PAGES[page]
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        if re.match(r"\w+://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_what_lies_beside_docs_is_linked_into_the_site(page):
    path = PAGES[page]
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        target = (path.parent / link.partition("#")[0]).resolve()
        if not re.match(r"\w+://", link) and not target.is_relative_to(DOCS):
            linked = DOCS / target.relative_to(ROOT)
            assert linked.exists(), f"ln -s to {target} at {linked}"
            assert linked.resolve() == target


def test_every_page_is_in_the_navigation():
    text = (ROOT / "zensical.toml").read_text()
    shown = set(re.findall(r'"([\w/-]+\.md)"', text))
    assert tomllib.loads(text)["project"]["strict"] is True
    assert {f"docs/{page}" for page in shown} == PAGES.keys() - {"README.md"}


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    reference = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", reference, re.MULTILINE)
    assert len(shown) == len(set(shown))
    public = importlib.import_module(module)
    if module != "funcopt":
        assert module in shown
    for name in public.__all__:
        if isinstance(getattr(public, name), ModuleType):
            assert f"{module}.{name}" in MODULES
        elif name == "__version__":
            assert f"`{module}.{name}`" in reference
        else:
            # `laws` gives the two exceptions of `testing` once more.
            other = f"funcopt.testing.{name}" if module == "funcopt.testing.laws" else ""
            assert f"{module}.{name}" in shown or other in shown, f"{module}.{name}"


@pytest.mark.skipif(not MEMORY.exists(), reason="memory is read from /proc")
def test_members_that_rest_as_shown_take_no_memory_from_step_to_step():
    page = "docs/guides/ensembles.md"
    blocks = python_blocks(page)
    (last,) = (index for index, block in enumerate(blocks) if "stack_module_state" in block)
    shown = run(page, blocks[: last + 1])
    step, running = shown["step_or_rest"], shown["running"]
    params, state = shown["params"], shown["state"]
    resting = {name: stacked[2].clone() for name, stacked in params.items()}
    taken = []
    for _ in range(10):
        for _ in range(100):
            params, state = vmap(step)(running, state, params)
        gc.collect()
        taken.append(int(MEMORY.read_text().split()[1]))
    assert not any(leaf.requires_grad for leaf in leaves((params, state)))
    assert all(torch.equal(params[name][2], stacked) for name, stacked in resting.items())
    # With a history, each step of these four small members keeps six pages more.
    assert taken[-1] - taken[1] < 400
