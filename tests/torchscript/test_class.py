"""The class has torch's interface and torch's bits, and refuses what torch's lets pass."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import funcopt
from funcopt.torchscript import FunctionalAdamW

from ..cases import KERNELS, NOT_DENSE, TORCH_FLAGS, assert_close, assert_same_bits, not_dense
from .trainers import FORMS, gradients_of, parameters, step_torch, tensors_of, trainer

FLAGS = {"plain": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
VARIANTS = {
    "as it comes": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "maximize": {"maximize": True, "lr": 0.3, "betas": (0.8, 0.9)},
    "both": {"amsgrad": True, "maximize": True, "eps": 1e-3},
}


def legacy(params, **options):
    """Make an optimizer of torch's own class, which warns that it will go."""
    from torch.distributed.optim.functional_adamw import _FunctionalAdamW

    with pytest.warns(DeprecationWarning, match="functional optimizers is deprecated"):
        return _FunctionalAdamW(params, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twenty_steps_have_the_bits_of_torch(form, kernel, variant, dtype):
    params = parameters(dtype)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    reference = torch.optim.AdamW(copies, **TORCH_FLAGS[kernel], **VARIANTS[variant])
    made = trainer(form, params, **FLAGS[kernel], **VARIANTS[variant])
    start = [param.detach().clone() for param in params]
    for grads in gradients_of(params, 20):
        made.step(grads)
        step_torch(reference, copies, grads)
    assert_same_bits([p.detach() for p in params], [p.detach() for p in copies])
    for param, copy, before in zip(params, copies, start, strict=True):
        assert param.numel() == 0 or not torch.equal(param, before)
        expected, state = reference.state[copy], made.state()[param]
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16])
def test_other_dtypes_have_the_bits_of_update(form, dtype):
    params = parameters(dtype)
    pure = [param.detach().clone() for param in params]
    opt = funcopt.AdamW(lr=0.1, step_per_leaf=True, kernel="plain", moments=None)
    state = opt.init(pure)
    made = trainer(form, params, lr=0.1)
    for grads in gradients_of(params, 5):
        made.step(grads)
        pure, state = opt.update(grads, state, pure)
    assert_same_bits([p.detach() for p in params], pure)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_device_is_served(form, kernel, device):
    params = [nn.Parameter(param.to(device)) for param in parameters()]
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    reference = torch.optim.AdamW(copies, **TORCH_FLAGS[kernel])
    made = trainer(form, params, **FLAGS[kernel])
    for grads in gradients_of(params, 8):
        made.step(grads)
        step_torch(reference, copies, grads)
    assert_close([p.detach() for p in params], [p.detach() for p in copies])
    assert all(made.state()[param]["step"].device.type == "cpu" for param in params)
    assert all(made.state()[param]["exp_avg"].device == param.device for param in params)


def test_the_interface_is_that_of_torch():
    from torch.distributed.optim.functional_adamw import _FunctionalAdamW

    for method in ("__init__", "step", "step_param"):
        own = inspect.signature(getattr(FunctionalAdamW, method)).parameters.values()
        theirs = inspect.signature(getattr(_FunctionalAdamW, method)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in own] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
    params = [torch.ones(2)]
    ours = FunctionalAdamW(params, 0.1, (0.5, 0.6))
    original = legacy(params, lr=0.1, betas=(0.5, 0.6))
    assert vars(ours).keys() == vars(original).keys()
    assert ours.defaults == original.defaults
    assert ours.param_group["params"] is params
    assert ours.state == {}


@pytest.mark.parametrize("form", FORMS)
def test_a_parameter_that_is_not_listed_is_moved_by_step_param(form):
    made = trainer(form, [], _allow_empty_param_list=True)
    made.step([])
    param, copy = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    reference = torch.optim.AdamW([copy], foreach=False)
    for _ in range(3):
        made.step_param(param, torch.ones(3))
        step_torch(reference, [copy], [torch.ones(3)])
    assert torch.equal(param, copy)
    assert made.state()[param]["step"] == 3


@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_gradient_is_left_alone(form):
    params = [torch.ones(2), torch.ones(2)]
    made = trainer(form, params)
    made.step([None, torch.ones(2)])
    made.step_param(params[0], None)
    for _ in range(3):
        made.step([None, None])
    assert torch.equal(params[0], torch.ones(2))
    assert list(made.state()) == [params[1]]
    assert made.state()[params[1]]["step"] == 1


def test_defaults_are_read_at_each_step():
    param, copy = torch.ones(3), nn.Parameter(torch.ones(3))
    made = trainer("scripted", [param])
    reference = torch.optim.AdamW([copy], foreach=False)
    for lr in (0.1, 0.2):
        made.set_lr(lr)
        reference.param_groups[0]["lr"] = lr
        made.step([torch.ones(3)])
        step_torch(reference, [copy], [torch.ones(3)])
    assert torch.equal(param, copy)
    made.set_lr(float("nan"))
    with pytest.raises(RuntimeError, match="lr=nan"):
        made.step([torch.ones(3)])
    assert torch.equal(param, copy)


BAD_GRADIENTS = {
    "shape": (torch.ones(3, 4), ValueError, r"grads\[1\]: shape \(3, 4\), the parameter has"),
    "broadcastable shape": (torch.ones(1, 3), ValueError, r"grads\[1\]: shape \(1, 3\).*broadcast"),
    "0-dim": (torch.ones(()), ValueError, r"grads\[1\]: shape \(\)"),
    "dtype": (torch.ones(4, 3).double(), ValueError, r"grads\[1\]: dtype torch.float64.*\.to\("),
    "device": (torch.ones(4, 3, device="meta"), ValueError, r"grads\[1\]: device meta"),
    "sparse": (torch.ones(4, 3).to_sparse(), TypeError, r"grads\[1\] has layout torch.sparse_coo"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD_GRADIENTS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_bad_gradient_is_named_and_nothing_has_moved(form, name, warm):
    bad, error, message = BAD_GRADIENTS[name]
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4, 3)), torch.ones(2)]
    made = trainer(form, params, amsgrad=True)
    good = [torch.ones_like(param) for param in params]
    if warm:
        made.step(good)
    before = tensors_of(made)
    with pytest.raises(RuntimeError if form == "scripted" else error, match=message):
        made.step([good[0], bad, good[2]])
    with pytest.raises(
        RuntimeError if form == "scripted" else error, match=message.replace("1", "0", 1)
    ):
        made.step_param(params[1], bad)
    assert_same_bits(tensors_of(made), before)
    made.step(good)
    assert len(made.state()) == 3


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_too_few_or_too_many_is_refused(form):
    made = trainer(form, [torch.ones(2), torch.ones(2)])
    for grads in ([torch.ones(2)], [torch.ones(2)] * 3):
        with pytest.raises((ValueError, RuntimeError), match=r"\d gradients for 2 parameters"):
            made.step(grads)
    assert made.state() == {}


BAD_OPTIONS = {
    "negative lr": ({"lr": -1.0}, "lr=-1.0"),
    "NaN lr": ({"lr": float("nan")}, "lr=nan"),
    "infinite lr": ({"lr": float("inf")}, "lr=inf"),
    "beta of 1": ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"),
    "NaN beta": ({"betas": (0.9, float("nan"))}, r"betas\[1\]=nan"),
    "infinite eps": ({"eps": float("inf")}, "eps=inf"),
    "NaN weight decay": ({"weight_decay": float("nan")}, "weight_decay=nan"),
    "two kernels": ({"foreach": True, "fused": True}, "foreach=True and fused=True.*one"),
}


@torch.jit.script
def build(
    param: torch.Tensor,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    foreach: bool = False,
    fused: bool = False,
) -> float:
    opt = FunctionalAdamW([param], lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
    return opt.defaults["lr"]


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_refused(name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        FunctionalAdamW([torch.ones(1)], **options)
    with pytest.raises(RuntimeError, match=message):
        build(torch.ones(1), **options)
    assert build(torch.ones(1), 0.5) == 0.5


def test_no_parameters_must_be_meant():
    with pytest.raises(ValueError, match=r"params is empty.*_allow_empty_param_list"):
        FunctionalAdamW([])
    FunctionalAdamW([], _allow_empty_param_list=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_is_no_part_of_a_graph(form, kernel):
    param = nn.Parameter(torch.ones(3))
    made = trainer(form, [param], **FLAGS[kernel])
    grads = torch.autograd.grad(param.pow(3).sum(), param, create_graph=True)
    assert grads[0].requires_grad
    assert torch.is_grad_enabled()
    made.step(list(grads))
    assert param.is_leaf
    assert param.requires_grad
    assert not any(tensor.requires_grad for tensor in made.state()[param].values())


def test_a_step_is_seen_by_autograd_as_a_change():
    param = nn.Parameter(torch.ones(3))
    loss = param.pow(3).sum()
    FunctionalAdamW([param], fused=True).step([torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_inference_mode_began_goes_on_outside(form, kernel):
    param, copy = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    made = trainer(form, [param], **FLAGS[kernel])
    reference = torch.optim.AdamW([copy], **TORCH_FLAGS[kernel])
    with torch.inference_mode():
        made.step([torch.ones(3)])
    made.step([torch.ones(3)])
    for _ in range(2):
        step_torch(reference, [copy], [torch.ones(3)])
    assert torch.equal(param, copy)


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_written_is_refused_and_nothing_has_moved(form):
    params = [torch.ones(3), torch.ones(1).expand(3)]
    made = trainer(form, params)
    with pytest.raises((ValueError, RuntimeError), match=r"params\[1\] has strides .*Clone it"):
        made.step([torch.ones(3), torch.ones(3)])
    assert torch.equal(params[0], torch.ones(3))
    assert made.state() == {}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_share_memory_are_refused(form):
    param = torch.ones(3)
    made = trainer(form, [param, param])
    with pytest.raises((ValueError, RuntimeError), match=r"params\[1\] shares .* params\[0\]"):
        made.step([torch.ones(3), torch.ones(3)])
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_state_of_torch_is_taken_over(amsgrad):
    params = parameters()
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    original = legacy(copies, lr=0.1, amsgrad=amsgrad)
    grads = gradients_of(params, 10)
    for each in grads[:5]:
        original.step(each)
    ours = FunctionalAdamW(params, lr=0.1, amsgrad=amsgrad)
    for param, copy in zip(params, copies, strict=True):
        param.detach().copy_(copy.detach())
        ours.state[param] = {name: t.clone() for name, t in original.state[copy].items()}
    for each in grads[5:]:
        original.step(each)
        ours.step(each)
    for param, copy in zip(params, copies, strict=True):
        assert torch.equal(param, copy)
        assert_same_bits(ours.state[param], original.state[copy])


def test_an_incomplete_state_is_named():
    param = torch.ones(3)
    ours = FunctionalAdamW([param], amsgrad=True)
    ours.state[param] = {"step": torch.tensor(1.0), "exp_avg": param * 0, "exp_avg_sq": param * 0}
    with pytest.raises(ValueError, match=r"parameter 0 has .* and no max_exp_avg_sq.*amsgrad"):
        ours.step([torch.ones(3)])
    assert torch.equal(param, torch.ones(3))


def test_steps_are_counted_beyond_those_that_float32_can_count():
    param = torch.ones(3)
    ours = FunctionalAdamW([param])
    ours.step([torch.ones(3)])
    ours.state[param]["step"].fill_(2.0**25)
    ours.step([torch.ones(3)])
    assert ours.state[param]["step"].item() == 2**25 + 1


def test_a_construction_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FunctionalAdamW([torch.ones(1)]).step([torch.ones(1)])


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    "code",
    [
        "import funcopt, sys; assert 'funcopt.torchscript' not in sys.modules",
        # Under -W error a warning is an error.
        "import torch; import funcopt.torchscript",
        # Nor is a warning turned off for others.
        "import funcopt.torchscript, warnings; assert 'jit.script' not in str(warnings.filters)",
    ],
)
def test_an_import_is_quiet(code):
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_parameter_that_is_not_dense_is_refused(kind):
    made = FunctionalAdamW([not_dense(kind, torch.ones(3))])
    with pytest.raises(TypeError, match=r"params\[0\] has .*(nested layout|sparse_coo)"):
        made.step([torch.ones(3)])
