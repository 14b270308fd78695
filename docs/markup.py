"""What the site adds to Markdown: equations, links to files beside `docs/`, runs of examples."""

import re
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor

from .build import with_runs

# On a code host a page links to `../examples/ensemble.png`, as the file lies in the clone. The site
# has that file at the same place below its own root, by a symbolic link in `docs/`.
_BESIDE_DOCS = re.compile(r"^((?:\.\./)*)\.\./((?:examples|tests)/|CHANGELOG\.md)")


class InlineEquation(InlineProcessor):
    """`$x$`, but not where a dollar stands in code, or is escaped."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802, ARG002
        """Return the equation as MathML, and where it stands."""
        return self.md.htmlStash.store(convert(m.group(1))), m.start(0), m.end(0)


class DisplayedEquation(BlockProcessor):
    """A paragraph that begins with `$$`."""

    def test(self, parent: Element, block: str) -> bool:  # noqa: ARG002
        """Whether a paragraph is an equation."""
        return block.lstrip().startswith("$$")

    def run(self, parent: Element, blocks: list[str]) -> None:
        """Put it into the page as MathML; what follows in the paragraph is text again."""
        _, equation, rest = blocks.pop(0).split("$$", 2)
        paragraph = SubElement(parent, "div", {"class": "equation"})
        mathml = convert(equation.strip(), display="block")
        paragraph.text = self.parser.md.htmlStash.store(mathml)
        if rest.strip():
            blocks.insert(0, rest.strip())


class LinksBesideDocs(Treeprocessor):
    """Links to files of the clone that do not lie in `docs/`."""

    def run(self, root: Element) -> None:
        """Let each lead to the copy of the site."""
        for element in root.iter():
            for attribute in ("src", "href"):
                if link := element.get(attribute):
                    element.set(attribute, _BESIDE_DOCS.sub(r"\1\2", link))


class PicturesToOpen(Treeprocessor):
    """Pictures, which are too small to read on a narrow screen."""

    def run(self, root: Element) -> None:
        """Let each lead to itself, where it is shown as large as it is."""
        for parent in list(root.iter()):
            for index, picture in enumerate(parent):
                if picture.tag == "img" and parent.tag != "a":
                    link = Element("a", {"href": picture.get("src", "")})
                    link.tail, picture.tail = picture.tail, None
                    parent[index] = link
                    link.append(picture)


class RunsOfExamples(Preprocessor):
    """The gallery's runs, which `docs/build.py` has made."""

    def run(self, lines: list[str]) -> list[str]:
        """Put each into the page where its command stands in a comment."""
        return list(with_runs(lines))


class Markup(Extension):
    """All of these."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Register them: after code, before backslashes and emphasis."""
        md.preprocessors.register(RunsOfExamples(md), "runs_of_examples", 100)
        inline = InlineEquation(r"(?<![\\$])\$(?=\S)((?:[^$\\]|\\.)+?)(?<=\S)\$", md)
        md.inlinePatterns.register(inline, "inline_equation", 185)
        displayed = DisplayedEquation(md.parser)
        md.parser.blockprocessors.register(displayed, "displayed_equation", 85)
        md.treeprocessors.register(PicturesToOpen(md), "pictures_to_open", 6)
        md.treeprocessors.register(LinksBesideDocs(md), "links_beside_docs", 5)


def makeExtension(**options: Any) -> Markup:  # noqa: N802
    """Return the extension: the name by which Markdown asks for it."""
    return Markup(**options)
