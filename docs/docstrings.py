"""What the site changes in docstrings and annotations before it shows them."""

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


_PLAIN = {"InnerT_co": "Optimizer", "InnerStateT": "Any"}


class WithoutTypeParameters(griffe.Extension):
    """What is inside a wrapper shows as an `Optimizer`, or any state: checkers know more."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Change the annotation of one field."""
        attr.annotation = _PLAIN.get(str(attr.annotation), attr.annotation)
