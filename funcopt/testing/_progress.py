"""How far a check is: a bar in a terminal, or a line for each law."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def shown(laws: Sequence[T], name: str, progress: bool | None) -> Iterator[T]:
    """Yield the laws, and say on stderr which one is next.

    If not told whether to, it does so where stderr is a terminal and no test is running.
    """
    if progress is None:
        progress = sys.stderr.isatty() and "PYTEST_CURRENT_TEST" not in os.environ
    if not progress:
        yield from laws
        return
    bar = _bar(len(laws), name)
    for number, law in enumerate(laws, 1):
        title = getattr(law, "__name__", repr(law))
        if bar is None:
            print(f"{name}: law {number} of {len(laws)}, {title}", file=sys.stderr, flush=True)
        else:
            bar.set_postfix_str(title)
        yield law
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def _bar(total: int, name: str) -> Any:
    """Return a bar of tqdm, if it is installed and stderr is a terminal."""
    if not sys.stderr.isatty():
        return None
    try:
        tqdm: Any = importlib.import_module("tqdm")
    except ImportError:
        return None
    return tqdm.tqdm(total=total, desc=name, unit="law", leave=False)
