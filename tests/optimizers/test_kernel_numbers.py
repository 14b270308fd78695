"""Every number of a step, in every form that it may have, as each kernel takes it."""

import contextlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from funcopt import AdamW
from funcopt._core import transforms

from .. import oracle
from ..cases import no_synchronization, random_like

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Those kernels that serve one device alone.
SERVED = {"native": "cpu", "triton": "cuda"}
# Each dtype holds them in its own way, and within their ranges.
NUMBERS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.3}


def as_strict_as_on_cuda(real):
    """The fused kernel of the CPU, where it refuses what that of CUDA refuses or misreads.

    There, a learning rate is a double or a float32 on the device; counts are read as float32,
    whatever they are; the tensors of a leaf have one dtype, device, shape and strides.
    """

    def fused(
        params, grads, exp_avgs, exp_avg_sqs, maxima, steps, *, lr, amsgrad, maximize, **rest
    ):
        assert all(type(number) is float for number in rest.values()), rest
        device = params[0].device
        for tensor in [*steps, *([lr] if isinstance(lr, Tensor) else [])]:
            assert tensor.device == device
            assert tensor.numel() == 1
            assert not tensor.requires_grad
            if tensor.dtype is not torch.float32:
                raise RuntimeError(f"expected scalar type Float but found {tensor.dtype}")
        assert isinstance(lr, Tensor) or type(lr) is float
        columns = [params, grads, exp_avgs, exp_avg_sqs, *([maxima] if amsgrad else [])]
        for leaf in zip(*columns, strict=True):
            assert len({(t.dtype, t.device, t.shape, t.stride()) for t in leaf}) == 1
        assert len({param.dtype for param in params}) == 1
        options = {"amsgrad": amsgrad, "maximize": maximize, **rest}
        return real(params, grads, exp_avgs, exp_avg_sqs, maxima, steps, lr=lr, **options)

    return fused


class Place(NamedTuple):
    """Where parameters are, and where numbers that are tensors are."""

    params: str
    numbers: str
    read: bool  # whether these can be read without waiting


PLACES = {
    "all on the CPU": Place("cpu", "cpu", True),
    # The CPU stands for a device: what is there is taken for what cannot be read.
    "all on a device": Place("cpu", "cpu", False),
    "numbers on the CPU beside CUDA": Place("cuda", "cpu", True),
    "all on CUDA": Place("cuda", "cuda", False),
}


@pytest.fixture
def place(request, monkeypatch) -> Place:
    """The place of this name, if there is such a device."""
    found = PLACES[request.param]
    if found.params == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if found.params == "cpu":
        monkeypatch.setattr(torch, "_fused_adamw_", as_strict_as_on_cuda(torch._fused_adamw_))
        if not found.read:
            monkeypatch.setattr(transforms, "on_host", lambda tensor: False)
    return found


def forms(name: str, place: Place) -> dict[str, Any]:
    """Return a number in every form that it may have."""
    number = NUMBERS[name]
    found: dict[str, Any] = {"a number": number}
    for dtype in DTYPES:
        found[f"a tensor of {dtype}"] = torch.tensor(number, dtype=dtype, device=place.numbers)
    if name in ("lr", "weight_decay"):
        found["a schedule of numbers"] = lambda count: number
        found["a schedule by the count"] = lambda count: number / (1 + count)
        found["a schedule of float32"] = lambda count: (number / (1 + count)).float()
    return found


def opt_with(name: str, form: Any, kernel: str) -> AdamW:
    given = {**NUMBERS, name: form}
    betas = given.pop("beta1"), given.pop("beta2")
    return AdamW(betas=betas, kernel=kernel, **given)


def values_at(name: str, form: Any, count: float) -> dict[str, Any]:
    """Return the numbers of the oracle's step after so many."""
    value = float(form(torch.tensor(count, dtype=torch.float64)) if callable(form) else form)
    given = {**NUMBERS, name: value}
    return {"betas": (given.pop("beta1"), given.pop("beta2")), **given}


def check(opt, method, place, name, form) -> None:
    """Make two steps, and hold them to the oracle."""
    where = {"device": place.params}
    params = {
        "w": torch.randn(4, 3, **where),
        "b": torch.randn((), **where),
        "double": torch.randn(5, dtype=torch.float64, **where),
    }
    expected = {key: leaf.double() for key, leaf in params.items()}
    states = {key: oracle.init(leaf) for key, leaf in expected.items()}
    state = opt.init(params)
    for count in range(2):
        grads = random_like(params)
        for key, grad in grads.items():
            expected[key], states[key] = oracle.update(
                grad.double(), states[key], expected[key], **values_at(name, form, count)
            )
        waits = count > 0 and place.params == "cuda"  # the first step may compile a kernel
        with no_synchronization() if waits else contextlib.nullcontext():
            params, state = getattr(opt, method)(grads, state, params)
    for key, leaf in params.items():
        torch.testing.assert_close(leaf.double(), expected[key], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize(
    ("place", "kernel"),
    [
        (name, kernel)
        for name, place in PLACES.items()
        for kernel in AdamW.rule.kernel_names
        if SERVED.get(kernel, place.params) == place.params
    ],
    indirect=["place"],
)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_any_form_is_taken_or_refused_by_name(name, kernel, method, place):
    for form in forms(name, place).values():
        opt = opt_with(name, form, kernel)
        on_device = not place.read and not isinstance(form, float)
        if kernel == "native" and not place.read:  # it takes no count that it cannot read
            with pytest.raises(ValueError, match=r"step is on .*kernel='auto'"):
                check(opt, method, place, name, form)
        elif on_device and kernel in ("fused", "foreach") and name != "lr" and form_is_tensor(form):
            public = {"beta1": r"betas\[0\]", "beta2": r"betas\[1\]"}.get(name, name)
            with pytest.raises(ValueError, match=f"{public} is on .*kernel='auto'"):
                check(opt, method, place, name, form)
        else:
            check(opt, method, place, name, form)


def form_is_tensor(form: Any) -> bool:
    return isinstance(form(torch.zeros(())) if callable(form) else form, Tensor)
