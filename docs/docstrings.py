"""What the site changes in docstrings before it shows them."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    """`Example:` becomes `Examples:`, whose doctests griffe shows as code, and not as a note."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub("Examples:", obj.docstring.value)
