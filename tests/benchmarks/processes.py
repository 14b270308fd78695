"""Running a part of the benchmark in a process of its own, with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["OutOfTime", "ask"]

_ROOT = Path(__file__).parents[2]


class OutOfTime(Exception):  # noqa: N818 - it is a result
    """Raised when a process was not done in time, and was stopped."""


def ask(module: str, *arguments: str, limit: float, environment: dict[str, str]) -> Any:
    """Run a module of this package, and return what it prints in its last line, as JSON.

    Args:
        module: The module, by its name within the package.
        arguments: What follows it on the command line.
        limit: How many seconds it may take.
        environment: Variables that it sees besides those of this process.

    Raises:
        OutOfTime: If it takes longer.
        RuntimeError: If it fails.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.{module}", *arguments],
        cwd=_ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that it can be stopped along with whatever it starts
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _stop(process)
        raise OutOfTime from None
    except BaseException:
        _stop(process)
        raise
    if process.returncode != 0:
        raise RuntimeError((errors.strip().splitlines() or ["no message"])[-1])
    return json.loads(output.strip().splitlines()[-1])


def _stop(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
