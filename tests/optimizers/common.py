"""What the tests of optimizers share: runs, in torch as here, and derivatives."""

import itertools

import torch
from torch.func import jacrev, jvp, vmap

from funcopt._engine.rule import StepOutputs

from ..cases import TORCH_FLAGS, assert_close, assert_same_bits, clone, random_like, tree_map

SHAPES = [(3, 4), (), (5,), (0,), (1,), (2, 3, 4), (129,)]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def crossed(**choices):
    """Every combination of options."""
    return [dict(zip(choices, own, strict=True)) for own in itertools.product(*choices.values())]


def same_memory(one, other):
    """Whether two tensors are alike to the bit, the sign of zero included."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def fresh_step(kernel, inputs, numbers, options):
    """Return what a kernel writes that writes elsewhere, in fresh memory of the same layout."""
    outputs = StepOutputs.of(
        [torch.empty_like(p) for p in inputs.params] for _ in inputs.targets.columns
    )
    kernel.step_to(inputs, outputs, numbers, options)
    return outputs


def assert_16_bit_steps_match(opt, oracle, dtype, steps):
    """Hold steps of leaves in 16 bits to an oracle in float64, each from where the last one led."""
    for size in (1, 33):
        param = torch.randn(size).to(dtype)
        state = opt.init(param)
        for _ in range(steps):
            gradient = torch.randn(size).to(dtype)
            wide = tree_map(torch.Tensor.double, state)
            expected = oracle(opt, gradient.double(), wide, param.double())
            param, state = opt.update(gradient, state, param)
            found = param.double(), tree_map(torch.Tensor.double, state)
            assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def run_with_skipped_leaves(torchs, opt):
    """Return parameters of torch and ours, and our state, after steps that leave leaves out."""
    params = [torch.randn(3), torch.randn(2), torch.randn(4)]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torch_opt, state = torchs(theirs), opt.init(params)
    for i in range(12):
        skipped = [(i + j) % 3 == 0 or j == 2 for j in range(3)]
        grads = [
            None if skip else torch.randn_like(param)
            for skip, param in zip(skipped, params, strict=True)
        ]
        for param, own in zip(theirs, grads, strict=True):
            param.grad = None if own is None else own.clone()
        torch_opt.step()
        params, state = opt.update(grads, state, params)
    return [param.detach() for param in theirs], params, state


def assert_torchs_bits(ours, torchs, options, kernel, dtype):
    """Hold 100 steps of `update` and of `update_` to torch's; return the states of both."""
    params = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torch_opt = torchs(theirs, **options, **TORCH_FLAGS[kernel])
    opt = ours(kernel=kernel, **options)
    pure, state = params, opt.init(params)
    in_place, state_in_place = clone(params), opt.init(params)
    for _ in range(100):
        grads = random_like(params)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        torch_opt.step()
        pure, state = opt.update(grads, state, pure)
        opt.update_(grads, state_in_place, in_place)
    for one, other, their in zip(pure, in_place, theirs, strict=True):
        assert same_memory(one, their.detach())
        assert same_memory(other, their.detach())
    assert_same_bits(state, state_in_place)
    assert state.step == 100
    return state, [torch_opt.state.get(their, {}) for their in theirs]


def run(opt, params, gradients, update="update"):
    state = opt.init(params)
    for grads in gradients:
        params, state = getattr(opt, update)(grads, state, params)
    return params, state


def assert_vmap_is_loop(opt, members=3, steps=4, **tolerance):
    """Members of a vmap move as they would one by one; tensors of the optimizer are theirs."""
    params = {"w": torch.randn(members, 4, 5), "b": torch.randn(members, 3).bfloat16()}
    state = vmap(opt.init)(params) if _is_shared(opt) else vmap(lambda o, p: o.init(p))(opt, params)
    singles = [tree_map(lambda leaf, i=i: leaf[i], params) for i in range(members)]
    opts = [tree_map(lambda leaf, i=i: leaf[i], opt) for i in range(members)]
    states = [own.init(single) for own, single in zip(opts, singles, strict=True)]
    axis = None if _is_shared(opt) else 0
    step = vmap(lambda o, g, s, p: o.update(g, s, p), in_dims=(axis, 0, 0, 0))
    for _ in range(steps):
        grads = random_like(params)
        params, state = step(opt, grads, state, params)
        for i, own in enumerate(opts):
            own_grads = tree_map(lambda leaf, i=i: leaf[i], grads)
            singles[i], states[i] = own.update(own_grads, states[i], singles[i])
            member = tree_map(lambda leaf, i=i: leaf[i], (params, state))
            assert_close(member, (singles[i], states[i]), **tolerance)


def _is_shared(opt):
    found = []
    tree_map(found.append, opt)
    return not found


def unrolled(build, *, steps=3, kernel="auto"):
    """Return a function of flat numbers, and these: start, gradients, state and hyperparameters.

    It builds an optimizer of the hyperparameters, takes some steps from a state that has moved, and
    returns a number in which each result has a weight of its own.
    """
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    param, grads, pushes = normal(4), normal(steps, 4), normal(4)
    weights = normal(4)

    def loss(hyperparams, param, grads):
        opt = build(*hyperparams.unbind())
        state = opt.init(param)
        for grad in grads:
            param, state = opt.update(grad, state, param)
        slots = [leaf for tree in state[1:] if isinstance(tree, torch.Tensor) for leaf in tree]
        return (weights * param).sum() + sum((pushes[0] * slot for slot in slots), 0.0)

    return loss, param, grads


def assert_derivatives_are_those_of_differences(build, hyperparams, **options):
    """By reverse mode to the second order, by forward mode, and by both together."""
    loss, param, grads = unrolled(build, **options)
    given = (hyperparams.clone(), param, grads)
    for tensor in given:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(loss, given, eps=1e-7, atol=1e-4)
    assert torch.autograd.gradgradcheck(loss, given, eps=1e-7, atol=1e-3)
    param, grads = param.detach(), grads.detach()

    def of(hyperparams):
        return loss(hyperparams, param, grads)

    direction = torch.randn(4, dtype=torch.float64)
    expected = torch.func.grad(of)(hyperparams)
    assert_close(jvp(of, (hyperparams,), (direction,))[1], expected @ direction, rtol=1e-9)
    hessian = jacrev(torch.func.grad(of))(hyperparams)
    forward = jvp(torch.func.grad(of), (hyperparams,), (direction,))[1]
    assert_close(forward, hessian @ direction, rtol=1e-8, atol=1e-10)
