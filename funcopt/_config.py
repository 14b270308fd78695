"""What serves on this machine: kernels, instruction set, threads."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch

from ._engine.rule import UpdateRule


def show_config() -> None:
    """Print which kernels serve the leaves of each device here, and why the others do not.

    Those that serve are in the order in which `kernel="auto"` tries them; on a GPU, those that
    write elsewhere than they read are tried first by `update`. The line of the native kernel says
    which instructions of the processor it uses and how many threads it may use, which is
    `torch.get_num_threads()`; small trees are moved on one thread.

    Example:
        >>> import funcopt
        >>> funcopt.show_config()  # doctest: +ELLIPSIS
        funcopt 0.1.0, torch ...
        native kernel: ...
        cpu
          SGD: ...
    """
    package = importlib.import_module(__package__)
    public = [getattr(package, name) for name in package.__all__]
    optimizers = [opt for opt in public if isinstance(getattr(opt, "rule", None), UpdateRule)]
    print(f"funcopt {package.__version__}, torch {torch.__version__}")
    print(f"native kernel: {_native()}")
    for device in _devices():
        print(device)
        for opt in optimizers:
            for line in _kernels(opt.__name__, opt.rule, device):
                print(line)


def _native() -> str:
    from .optimizers import _native  # noqa: PLC0415  # loaded when it is first asked for

    if _native.unserved is not None:
        return _native.unserved
    threads = torch.get_num_threads()
    return f"{_native.instruction_sets()[0][0]}, up to {threads} thread{'s' if threads > 1 else ''}"


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _kernels(name: str, rule: UpdateRule, device: torch.device) -> Iterator[str]:
    """Yield a line of those kernels that serve, and one for each that does not."""
    reasons = {own: rule.kernel(own).unsupported_reason(device, None) for own in rule.kernels}
    serving = [own for own, reason in reasons.items() if reason is None]
    yield f"  {name}: {', '.join([*serving, 'plain'])}"
    for own, reason in reasons.items():
        if reason is not None:
            yield f"    not {own}: {reason}"
