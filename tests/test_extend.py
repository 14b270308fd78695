"""What others can build by what is public and documented, and what is refused to them."""

import doctest
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import (
    SGD,
    Accumulate,
    AdamW,
    Clip,
    ClipValue,
    Compensated,
    Ema,
    MasterWeights,
    Number,
    Optimizer,
    Partition,
    Schedule,
    SkipNonfinite,
    extend,
)
from funcopt.distributed import LocalUpdates, Zero1
from funcopt.testing import check_optimizer, laws
from funcopt.testing._check import check_law

from .cases import assert_close, assert_same_bits, clone


class FactoredState(NamedTuple):
    step: Any
    rows: Any
    columns: Any


def by_rows_and_columns(param, grad, slots, numbers, options):
    """Gradients of two dimensions, divided by means of their squares over rows and columns."""
    if grad.ndim != 2:
        return [param - numbers.lr * grad, *slots]
    squares = grad.square()
    rows = torch.lerp(slots[0], squares.mean(1, keepdim=True), 0.5)
    columns = torch.lerp(slots[1], squares.mean(0, keepdim=True), 0.5)
    step = grad / ((rows @ columns / rows.mean()).sqrt() + 1e-3)
    return [param - numbers.lr * step, rows, columns]


@extend.register_optimizer
@dataclass(frozen=True)
class Factored:
    rule: ClassVar[extend.UpdateRule] = extend.UpdateRule(
        state=FactoredState,
        slots=(
            extend.Slot("rows", shape_of=lambda own: (own[0], 1) if len(own) == 2 else (0,)),
            extend.Slot("columns", shape_of=lambda own: (1, own[1]) if len(own) == 2 else (0,)),
        ),
        hyperparams=(extend.Hyperparam("lr", extend.AT_LEAST_ZERO),),
        equations=by_rows_and_columns,
        traits=extend.Traits(leafwise=True),
    )
    lr: Number | Schedule = 0.1
    __post_init__ = extend.check_fields
    init, update, update_ = extend.init, extend.update, extend.update_


class SignumState(NamedTuple):
    step: Any
    momentum: Any


def signum(param, grad, slots, numbers, options):
    momentum = torch.lerp(slots[0], grad, 1 - numbers.beta)
    sign = momentum.sign()
    return [param + numbers.lr * sign if options.maximize else param - numbers.lr * sign, momentum]


def rule_of(equations, traits=None):
    return extend.UpdateRule(
        state=SignumState,
        slots=(extend.Slot("momentum"),),
        hyperparams=(
            extend.Hyperparam("lr", extend.AT_LEAST_ZERO),
            extend.Hyperparam("beta", extend.BELOW_ONE),
        ),
        options=("maximize",),
        equations=equations,
        traits=traits or extend.Traits(),
    )


def optimizer(name, equations, traits=None):
    """Make the class of an optimizer as one writes it by hand."""

    @extend.register_optimizer
    @dataclass(frozen=True)
    class Own:
        rule: ClassVar[extend.UpdateRule] = rule_of(equations, traits)
        lr: Number | Schedule = 0.1
        beta: Number | Schedule = 0.5
        maximize: bool = False
        __post_init__ = extend.check_fields
        init, update, update_ = extend.init, extend.update, extend.update_

    Own.__name__ = name
    return Own


Signum = optimizer("Signum", signum, extend.Traits(elementwise=True, linear=True))


def by_norm(param, grad, slots, numbers, options):
    """A step that looks at a whole leaf: each row is divided by its norm."""
    momentum = torch.lerp(slots[0], grad, 1 - numbers.beta)
    norm = momentum.reshape(-1).norm()
    step = numbers.lr * momentum / (norm + 1e-3)
    return [param + step if options.maximize else param - step, momentum]


Whole = optimizer("Whole", by_norm, extend.Traits(leafwise=True, linear=True))
Unsaid = optimizer("Unsaid", by_norm)


def run(opt, params, steps, in_place=False):
    state = opt.init(params)
    for grads in steps:
        params, state = (opt.update_ if in_place else opt.update)(grads, state, params)
    return params, state


def by_hand(w, steps, lr=0.1, beta=0.5):
    m = torch.zeros_like(w)
    for g in steps:
        m = beta * m + (1 - beta) * g
        w = w - lr * m.sign()
    return w


def steps_for(w, count=5):
    return [torch.randn_like(w) for _ in range(count)]


def test_an_optimizer_of_ones_own_moves_by_its_equations():
    w = torch.randn(3, 2, dtype=torch.float64)
    steps = steps_for(w)
    assert_close(run(Signum(), w, steps)[0], by_hand(w, steps))
    assert_close(run(Signum(), w.clone(), steps, in_place=True)[0], by_hand(w, steps))
    assert_close(run(Signum(lr=lambda step: 0.1 + 0 * step), w, steps)[0], by_hand(w, steps))


@pytest.mark.by_day(1)
@pytest.mark.parametrize("opt", [Signum(), Whole(), Unsaid()], ids=["Signum", "Whole", "Unsaid"])
def test_every_law_that_applies_to_it_holds(opt):
    report = check_optimizer(opt, max_examples=4)
    assert report.ok, report


@pytest.mark.parametrize("kind", [Signum, Whole, Unsaid])
def test_members_of_a_vmap_move_as_if_they_were_alone(kind):
    w, rates = torch.randn(4, 3, 2), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    steps = steps_for(w)

    def train(lr, w, *steps):
        return run(kind(lr=lr), w, steps)[0]

    mapped = vmap(train)(rates, w, *steps)
    alone = [train(rates[i], w[i], *(g[i] for g in steps)) for i in range(len(w))]
    assert_close(mapped, torch.stack(alone), rtol=1e-5)


@pytest.mark.parametrize("kind", [Whole, Unsaid])
def test_an_optimizer_that_sees_whole_leaves_is_given_whole_leaves(kind):
    """Small leaves of one width would be packed side by side for one that is elementwise."""
    params = {f"{i}": torch.randn(32, 4) for i in range(20)}
    steps = [{name: torch.randn(32, 4) for name in params} for _ in range(3)]
    found = run(kind(), params, steps)[0]
    for name, w in params.items():
        assert_close(found[name], run(kind(), w, [g[name] for g in steps])[0])


def test_derivatives_go_through_it_in_both_modes():
    w = torch.randn(5, dtype=torch.float64)
    steps = steps_for(w, 2)

    def loss(w):
        return run(Whole(), w, steps)[0].square().sum()

    direction = torch.randn_like(w)
    eps = 1e-6
    difference = (loss(w + eps * direction) - loss(w - eps * direction)) / (2 * eps)
    assert_close(grad(loss)(w) @ direction, difference, rtol=1e-7, atol=1e-7)
    assert_close(jvp(loss, (w,), (direction,))[1], difference, rtol=1e-7, atol=1e-7)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def of_lr(lr):
        return run(Whole(lr=lr), w, steps)[0].square().sum()

    difference = (of_lr(lr + eps) - of_lr(lr - eps)) / (2 * eps)
    assert_close(grad(of_lr)(lr), difference, rtol=1e-7, atol=1e-7)


def test_it_compiles_to_one_graph():
    torch.compiler.reset()
    opt, w = Signum(), torch.randn(3)
    state = opt.init(w)
    step = torch.compile(opt.update, fullgraph=True, backend="aot_eager")
    assert_same_bits(step(w, state, w), opt.update(w, state, w))


class RealState(NamedTuple):
    step: Any
    momentum: Any


@extend.register_optimizer
@dataclass(frozen=True)
class RealOnly:
    rule: ClassVar[extend.UpdateRule] = extend.UpdateRule(
        state=RealState,
        slots=(extend.Slot("momentum"),),
        hyperparams=(extend.Hyperparam("lr", extend.AT_LEAST_ZERO),),
        equations=lambda p, g, slots, numbers, options: [p - numbers.lr * g, slots[0] + g],
        traits=extend.Traits(elementwise=True, linear=True, by_rule=True),
        real_only=True,
    )
    lr: Number | Schedule = 0.1
    __post_init__ = extend.check_fields
    init, update, update_ = extend.init, extend.update, extend.update_


REFUSED = (
    r"params\['z'\] has dtype torch.complex64: RealOnly moves real leaves alone. Leave the comp"
)


@pytest.mark.parametrize("opt", [RealOnly(), Clip(RealOnly(), 1.0)], ids=["bare", "Clip"])
def test_complex_leaves_are_refused_with_their_path_by_who_is_real_only(opt):
    params = {"w": torch.ones(2), "z": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(TypeError, match=REFUSED):
        opt.init(params)
    grads, before = clone(params), clone(params)
    other = SGD(momentum=0.9)
    state = other.init(params)
    for _ in range(3):  # after which leaves like these are known
        other.update_(grads, state, params)
    params = clone(before)
    own = RealState(torch.zeros((), dtype=torch.float64), clone(grads))
    for update in (RealOnly().update, RealOnly().update_):
        with pytest.raises(TypeError, match=REFUSED):
            update(grads, own, params)
        assert_same_bits(params, before)
    real = {"w": torch.ones(2)}
    moved, _ = opt.update(real, opt.init(real), real)
    assert (moved["w"] < 1).all()


def factored_by_hand(w, steps):
    rows, columns = torch.zeros(len(w), 1).to(w.dtype), torch.zeros(1, w.shape[1]).to(w.dtype)
    for g in steps:
        rows = (rows + g.square().mean(1, keepdim=True)) / 2
        columns = (columns + g.square().mean(0, keepdim=True)) / 2
        w = w - 0.1 * g / ((rows @ columns / rows.mean()).sqrt() + 1e-3)
    return w, rows, columns


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("lay", [lambda w: w, lambda w: w.t().contiguous().t()], ids=["rows", "t"])
def test_a_slot_may_have_another_shape_than_its_parameter(lay, in_place):
    w, b = torch.randn(3, 4), torch.randn(5)
    steps = [(torch.randn(3, 4), torch.randn(5)) for _ in range(4)]
    given = [{"w": lay(g), "b": h} for g, h in steps]
    params, state = run(Factored(), {"w": lay(w.clone()), "b": b.clone()}, given, in_place)
    expected, rows, columns = factored_by_hand(w, [g for g, _ in steps])
    assert_close(params["w"], expected)
    assert_close((state.rows["w"], state.columns["w"]), (rows, columns))
    assert state.rows["b"].shape == state.columns["b"].shape == (0,)
    assert_close(params["b"], b - 0.1 * sum(h for _, h in steps))


def test_slots_of_other_shapes_are_mapped_over_and_differentiated_and_compiled():
    w, steps = torch.randn(6, 3, 4, dtype=torch.float64), [torch.randn(6, 3, 4).double()] * 2
    mapped = vmap(lambda w, *steps: run(Factored(), w, steps)[0])(w, *steps)
    alone = [run(Factored(), w[i], [g[i] for g in steps])[0] for i in range(6)]
    assert_close(mapped, torch.stack(alone))

    def moved(g):
        return run(Factored(), w[0], [g, 2 * g])[0]

    assert torch.autograd.gradcheck(moved, steps[0][0].clone().requires_grad_())
    step = torch.compile(Factored().update, fullgraph=True, backend="aot_eager")
    given = steps[0][0], Factored().init(w[0]), w[0]
    assert_close(step(*given), Factored().update(*given))


def test_a_slot_of_a_wrong_shape_is_refused_also_after_steps_on_such_tensors():
    w, g = torch.randn(3, 4), torch.randn(3, 4)
    state = Factored().init(w)
    wrong = state._replace(rows=torch.zeros(3, 4), columns=torch.zeros(3, 4))
    whole = AdamW().init(w)
    for _ in range(2):
        Factored().update(g, state, w)
        AdamW(moments=None).update(g, whole, w)
        with pytest.raises(
            ValueError,
            match=r"state.rows: shape \(3, 4\), and beside this parameter it must be \(3, 1",
        ):
            Factored().update(g, wrong, w)
        with pytest.raises(ValueError, match=r"state.exp_avg: shape"):
            AdamW().update(g, whole._replace(exp_avg=state.rows, exp_avg_sq=state.columns), w)


WRAPPED = {
    "Clip": lambda opt: Clip(opt, 100.0),
    "ClipValue": lambda opt: ClipValue(opt, 100.0),
    "SkipNonfinite": SkipNonfinite,
    "Ema": lambda opt: Ema(opt, 0.9),
    "Partition": lambda opt: Partition({"all": opt}, lambda name, leaf: "all"),
    "Accumulate": lambda opt: Accumulate(opt, 1),
    "MasterWeights": MasterWeights,
    "Compensated": Compensated,
    "Zero1": lambda opt: Zero1(opt, None),
    "LocalUpdates": lambda opt: LocalUpdates(opt, 10, None),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_it_moves_the_same_within_each_wrapper(wrap, in_place):
    params = {"w": torch.randn(3, 2)}
    steps = [{"w": g} for g in steps_for(params["w"])]
    expected = run(Signum(), params, steps)[0]
    copy = {"w": params["w"].clone()}
    assert_close(run(wrap(Signum()), copy, steps, in_place)[0], expected)


def test_without_a_trait_that_says_how_leaves_are_shared_out_zero1_refuses_with_their_names():
    with pytest.raises(ValueError, match=r"`elementwise` or `packable`.*gradients='averaged'"):
        Zero1(Unsaid(), None)
    with pytest.raises(ValueError, match="`elementwise` or `packable`"):
        Zero1(Clip(Unsaid(), 1.0), None)


def scale_of(kind):
    """Make the class of a wrapper as one writes it by hand."""

    @extend.register_optimizer
    @dataclass(frozen=True)
    class Scaled:
        traits: ClassVar[extend.Traits] = kind
        hyperparams: ClassVar[tuple[extend.Hyperparam, ...]] = (
            extend.Hyperparam("scale", extend.AT_LEAST_ZERO),
        )
        inner: Optimizer[Any]
        scale: Number | Schedule = 2.0

        def __post_init__(self):
            extend.normalize_fields(self, self.hyperparams)

        def init(self, params):
            return self.inner.init(params)

        def update(self, grads, state, params):
            return self.inner.update(self.scaled(grads, state), state, params)

        def update_(self, grads, state, params):
            return self.inner.update_(self.scaled(grads, state), state, params)

        def scaled(self, grads, state):
            scale = extend.numbers_of(self, state.step)["scale"]
            return extend.tree_map(lambda grad: grad * scale, grads)

    return Scaled


def test_a_wrapper_of_ones_own_hands_on_what_it_makes_of_gradients():
    kind = scale_of(extend.Traits(elementwise=True, linear=True))
    w = torch.randn(3, 2)
    steps = steps_for(w)
    for scale in (2.0, torch.tensor(2.0), lambda step: 2.0 + 0 * step):
        found = run(kind(Whole(), scale), w, steps)[0]
        assert_close(found, run(Whole(), w, [2 * g for g in steps])[0])
    with pytest.raises(ValueError, match=r"scale=-1.0: scale must be finite and at least 0"):
        kind(Whole(), -1.0)


def test_a_rule_whose_state_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="NamedTuple with the fields step, velocity"):
        extend.UpdateRule(
            state=SignumState,
            slots=(extend.Slot("velocity"),),
            hyperparams=(),
            equations=signum,
        )


def returning(equations):
    """An optimizer whose equations are these, with one slot."""

    @extend.register_optimizer
    @dataclass(frozen=True)
    class Returning:
        rule: ClassVar[extend.UpdateRule] = extend.UpdateRule(
            state=SignumState,
            slots=(extend.Slot("momentum"),),
            hyperparams=(extend.Hyperparam("lr", extend.AT_LEAST_ZERO),),
            equations=equations,
            traits=extend.Traits(elementwise=True),
        )
        lr: Any = 0.5
        __post_init__, init = extend.check_fields, extend.init
        update, update_ = extend.update, extend.update_

    return Returning()


WRONG_RESULTS = {
    "returned a tensor of shape (2,): they must return a list of 2 tensors, the new parameter and "
    "then the new value of each slot that is kept (momentum)": lambda p, g, *_: p - g,
    "returned a list of length 1": lambda p, g, *_: [p - g],
    "returned a list of length 3": lambda p, g, slots, *_: [p - g, *slots, g],
    "returned None": lambda p, g, *_: None,
    "returned an object of class float as number 1": lambda p, g, *_: [p - g, 0.0],
    "returned a tensor of shape () as number 0": lambda p, g, slots, *_: [(p - g).sum(), *slots],
    "returned a tensor of shape (1,) as number 1: they must return a list of 2 tensors, the new "
    "parameter and then the new value of each slot that is kept (momentum), each of the shape of "
    "what it replaces. Number 1 must have shape (2,)": lambda p, g, slots, *_: [p, slots[0][:1]],
}


@pytest.mark.parametrize("method", ["update", "update_", "in vmap", "in grad"])
@pytest.mark.parametrize("message", WRONG_RESULTS)
def test_equations_that_return_the_wrong_thing_are_named_with_what_is_wanted(message, method):
    opt = returning(WRONG_RESULTS[message])
    w = torch.ones(3, 2) if method == "in vmap" else torch.ones(2)

    def moved(w):
        return opt.update(torch.ones_like(w), opt.init(w), w)[0]

    calls = {
        "update": lambda: moved(w),
        "update_": lambda: opt.update_(torch.ones_like(w), opt.init(w), w),
        "in vmap": lambda: vmap(moved)(w),
        "in grad": lambda: grad(lambda w: moved(w).sum())(w),
    }
    with pytest.raises((TypeError, ValueError)) as raised:
        calls[method]()
    shown = str(raised.value)
    assert shown.startswith("equations ")
    assert "<lambda> of the rule with the state SignumState" in shown
    # A vmap has its members in the first dimension.
    assert message in shown or (method == "in vmap" and "returned a tensor of shape (" in shown)


def test_equations_may_return_a_tuple():
    opt = returning(lambda p, g, slots, numbers, _: (p - numbers.lr * g, *slots))
    assert (
        opt.update(torch.ones(2), opt.init(torch.ones(2)), torch.ones(2))[0].tolist() == [0.5] * 2
    )


def test_a_class_that_is_no_frozen_dataclass_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match=r"Plain is no dataclass: .* @dataclass\(frozen=True\)"):

        @extend.register_optimizer
        class Plain:
            lr: Any = 0.1

    with pytest.raises(TypeError, match=r"Thawed is a dataclass that is not frozen"):

        @extend.register_optimizer
        @dataclass
        class Thawed:
            lr: Any = 0.1


def test_a_hyperparam_that_names_no_field_is_refused_when_the_class_is_defined():
    numbers = extend.Hyperparam("lr", extend.AT_LEAST_ZERO), extend.Hyperparam("gain", extend.SHARE)
    own_rule = extend.UpdateRule(
        state=SignumState, slots=(extend.Slot("momentum"),), hyperparams=numbers, equations=signum
    )
    with pytest.raises(
        TypeError, match=r"Gainless has Hyperparam\('gain'\), .*: it has the fields lr"
    ):

        @extend.register_optimizer
        @dataclass(frozen=True)
        class Gainless:
            rule: ClassVar[extend.UpdateRule] = own_rule
            lr: Any = 0.1

    with pytest.raises(TypeError, match=r"no field 'betas'"):

        @extend.register_optimizer
        @dataclass(frozen=True)
        class Wrapper:
            hyperparams: ClassVar = (extend.Hyperparam("b", extend.SHARE, field="betas[0]"),)
            inner: Any


def test_a_number_out_of_its_range_is_refused_by_its_words():
    with pytest.raises(ValueError, match=r"beta=1.0: beta must be at least 0 and below 1"):
        Signum(beta=1.0)
    with pytest.raises(TypeError, match="maximize=1: must be True or False"):
        Signum(maximize=1)


def documented():
    """The names that the examples in the docstring of `extend` define."""
    found = {}
    for test in doctest.DocTestFinder(recurse=False).find(extend):
        for example in test.examples:
            if example.source.startswith(("class", "@", "def", "from", "import")):
                exec(example.source, found)  # our own docstring
    return found


@pytest.mark.parametrize("factor", [0.5, lambda step: 1 / (2 + step)], ids=["number", "schedule"])
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold_of_the_wrapper_that_the_docs_show(law, factor):
    opt = documented()["Scaled"](AdamW(lr=0.1), factor)
    verdict = check_law(law, opt, max_examples=2)
    assert verdict.status in ("holds", "not applicable"), verdict
