"""The memory of results: used again once nobody holds them, and given back when asked.

`update` returns fresh tensors. Large ones cost more to allocate than to compute, so on the CPU
funcopt keeps their storages, and writes into one again once nobody else holds it. A tensor that
anyone still holds, in whatever way (a view, a detached tensor, NumPy, DLPack, what autograd saved,
another thread or process), is never written.

No more is kept than the results of four steps for trees of one look; what is not asked for during
some 32 updates of other trees is given back.
"""

from __future__ import annotations

from typing import Literal

from ._engine import results as _results

__all__ = ["kept_bytes", "release", "reuse"]


def reuse(device_type: Literal["cpu", "cuda"], enabled: bool) -> None:
    """Let results on devices of a type be used again, or do not. On: `"cpu"`; off: `"cuda"`.

    On CUDA, results are used again on the stream that made them. There is one condition, which
    funcopt cannot see, and for which it is off: a tensor that other streams still work on must be
    held until they are done. To mark it by `Tensor.record_stream` and drop it, which torch's own
    allocator respects, is not enough.

    Args:
        device_type: `"cpu"` or `"cuda"`.
        enabled: Whether to. False gives back what is kept on all devices.

    Raises:
        ValueError: If the type is another one.

    Example:
        >>> import funcopt
        >>> funcopt.memory.reuse("cuda", True)
        >>> funcopt.memory.reuse("cuda", False)
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f'device_type={device_type!r}: must be "cpu" or "cuda".')
    _results.set_reuse(device_type, bool(enabled))


def kept_bytes() -> int:
    """Return how many bytes funcopt keeps of results, be they held by others as well or not.

    Example:
        >>> import torch, funcopt
        >>> funcopt.memory.release()
        >>> opt = funcopt.SGD(lr=0.1)
        >>> params, grads = {"w": torch.ones(1 << 20)}, {"w": torch.ones(1 << 20)}
        >>> params, state = opt.update(grads, opt.init(params), params)
        >>> funcopt.memory.kept_bytes() == params["w"].nbytes
        True
    """
    return _results.kept_bytes()


def release() -> None:
    """Give back all that is kept. Results that somebody holds stay as they are.

    Example:
        >>> import funcopt
        >>> funcopt.memory.release()
        >>> funcopt.memory.kept_bytes()
        0
    """
    _results.release_all()
