"""What `update_` writes, and what it refuses to write over."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from funcopt import AdamW

from ..cases import KERNELS, assert_same_bits, clone, layouts, leaves, random_like, run, trees


@pytest.mark.parametrize("name", trees())
@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_it_gives_the_bits_of_update_in_the_memory_it_was_given(name, kernel):
    params = trees()[name]
    gradients = [random_like(params) for _ in range(3)]
    opt = AdamW(amsgrad=True, kernel=kernel)
    expected = run(opt, params, gradients)
    state = opt.init(params)
    pointers = [leaf.data_ptr() for leaf in leaves((params, state))]
    for grads in gradients:
        moved = opt.update_(grads, state, params)
        assert moved[0] is params
        assert moved[1] is state
    assert_same_bits((params, state), expected)
    assert [leaf.data_ptr() for leaf in leaves((params, state))] == pointers


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", [name for name in layouts() if name != "expanded"])
def test_it_writes_every_layout_of_parameter_and_gradient(layout, kernel):
    opt = AdamW(lr=0.1, kernel=kernel)
    plain = torch.randn(2, 3, 4, 5)
    grads = layouts()
    expected = run(opt, plain, [grads[name].contiguous() for name in grads])
    param = layouts()[layout]
    param.copy_(plain)
    strides = param.stride()
    state = opt.init(param)
    for name in grads:
        opt.update_(grads[name], state, param)
    torch.testing.assert_close(param, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.exp_avg_sq, expected[1].exp_avg_sq, rtol=1e-5, atol=1e-9)
    assert param.stride() == strides


def test_parameters_of_a_module_stay_leaves_that_require_a_gradient():
    model = nn.Linear(3, 2)
    params = dict(model.named_parameters())
    opt = AdamW(lr=0.1)
    state = opt.init(params)
    before = model.weight.detach().clone()
    opt.update_({name: torch.ones_like(p) for name, p in params.items()}, state, params)
    assert not torch.equal(model.weight, before)
    assert model.weight.is_leaf
    assert model.weight.requires_grad
    assert not state.exp_avg["weight"].requires_grad


def test_autograd_notices_that_a_saved_parameter_was_overwritten():
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    opt = AdamW()
    opt.update_(torch.ones(3), opt.init(weight), weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


TRANSFORMS = {
    "vmap": lambda f, x: vmap(f)(x.expand(2, 3)),
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_it_refuses_to_run_under_a_transform(transform):
    opt = AdamW()
    params = torch.ones(3)
    state = opt.init(params)
    with pytest.raises(RuntimeError, match=r"update_\(\) writes in place.*Use update\(\)"):
        TRANSFORMS[transform](lambda g: opt.update_(g, state, params)[0], torch.ones(3))
    assert_same_bits((params, state), (torch.ones(3), opt.init(torch.ones(3))))


def test_it_refuses_to_run_in_forward_mode():
    opt = AdamW()
    params = torch.ones(3)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"Use update\(\)"):
        opt.update_(forward_ad.make_dual(params * 2, params), opt.init(params), params)


def history(name, tracked):
    """The arguments of an update in which one tensor is tracked by autograd."""
    opt, params = AdamW(lr=tracked.sum() if name == "lr" else 0.1), {"w": torch.ones(3)}
    state = opt.init(params)
    if name == "params['w']":
        params = {"w": tracked * 2}
    if name == "state.exp_avg['w']":
        state = state._replace(exp_avg={"w": tracked})
    grads = {"w": tracked if name == "grads['w']" else torch.ones(3)}
    return opt, grads, state, params


@pytest.mark.parametrize("name", ["lr", "grads['w']", "state.exp_avg['w']", "params['w']"])
def test_it_refuses_what_carries_history_by_name(name):
    opt, grads, state, params = history(name, torch.ones(3, requires_grad=True))
    before = clone((params, state))
    with pytest.raises(RuntimeError) as error:
        opt.update_(grads, state, params)
    assert str(error.value).startswith(name)
    assert "Use update(), or detach it" in str(error.value)
    assert_same_bits((params, state), before)


def test_it_refuses_an_expanded_parameter():
    params = {"w": torch.ones(1, 3).expand(4, 3)}
    opt = AdamW()
    with pytest.raises(ValueError, match=r"params\['w'\] has strides \(0, 1\).*Clone it first"):
        opt.update_({"w": torch.ones(4, 3)}, opt.init(params), params)


def test_it_refuses_moments_that_share_their_memory():
    params = {"w": torch.ones(3)}
    opt = AdamW()
    state = opt.init(params)
    state = state._replace(exp_avg_sq=state.exp_avg)
    with pytest.raises(ValueError, match=r"state.exp_avg_sq\['w'\] shares .* state.exp_avg\['w'\]"):
        opt.update_({"w": torch.ones(3)}, state, params)
    assert torch.equal(params["w"], torch.ones(3))


def test_a_leaf_without_a_gradient_is_not_written():
    params = [torch.ones(2), torch.ones(2)]
    opt = AdamW()
    state = opt.init(params)
    version = params[0]._version
    opt.update_([None, torch.ones(2)], state, params)
    assert params[0]._version == version
    assert state.step == 1


def test_it_runs_in_inference_mode():
    with torch.inference_mode():
        params = torch.ones(3)
        opt = AdamW()
        opt.update_(torch.ones(3), opt.init(params), params)
    assert not torch.equal(params, torch.ones(3))


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_it_writes_moments_that_are_conjugate_views(name, kernel):
    opt = AdamW(lr=0.1, amsgrad=True, kernel=kernel)
    params, grads = torch.randn(3, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64)
    _, state = opt.update(grads, opt.init(params), params)
    expected = opt.update(grads, state, params)
    lazy = getattr(state, name).conj().resolve_conj().conj()
    opt.update_(grads, state._replace(**{name: lazy}), params)
    torch.testing.assert_close(lazy.resolve_conj(), getattr(expected[1], name))


def test_it_refuses_what_a_schedule_returns_with_a_history():
    peak = torch.tensor(0.1, requires_grad=True)
    opt = AdamW(lr=lambda step: peak * 1)
    params = torch.ones(3)
    with pytest.raises(RuntimeError, match="lr has a history"):
        opt.update_(torch.ones(3), opt.init(params), params)


def test_it_refuses_inference_tensors_outside_of_inference_mode():
    opt = AdamW()
    params = {"w": torch.ones(2)}
    with torch.inference_mode():
        state = opt.init(params)
    with pytest.raises(RuntimeError, match=r"state.exp_avg\['w'\] was made in inference mode"):
        opt.update_({"w": torch.ones(2)}, state, params)
    assert torch.equal(params["w"], torch.ones(2))


def test_it_refuses_gradients_that_it_would_write_over():
    params = {"a": torch.ones(2), "b": torch.zeros(2)}
    opt = AdamW()
    state = opt.init(params)
    with pytest.raises(
        ValueError, match=r"grads\['a'\] shares its memory with a tensor that is to"
    ):
        opt.update_({"a": params["b"], "b": torch.ones(2)}, state, params)
    assert torch.equal(params["a"], torch.ones(2))
