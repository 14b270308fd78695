"""Classes of torch.optim as functions: their bits, their state, and what is refused."""

import dataclasses
import pickle
import re

import pytest
import torch
from torch import optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import grad, vmap

from funcopt import Accumulate, Clip, Members, Partition, PureState, members, pure
from funcopt._core.types import Traits
from funcopt.interop import from_state_dict, to_state_dict
from funcopt.testing import check_optimizer, laws

from .. import pure_table
from ..cases import assert_same_bits, clone, random_like, tree_map
from ..distributed.harness import run_ranks

KINDS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "ASGD",
    "LBFGS",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
]


def tree():
    return {"w": torch.randn(4, 3), "v": [torch.randn(2, 2), torch.randn(3, 5).double()]}


def run(opt, params, gradients, state=None):
    state = opt.init(params) if state is None else state
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    return params, state


# All that torch's own tests try.


def test_these_are_all_optimizers_of_torch():
    assert set(pure_table.inputs()) == set(KINDS)


WRITTEN = pure_table.TABLE.read_text().splitlines()
# Another torch has other paths: there, all that is not refused must be right.
IS_OF_THIS_TORCH = f"with torch {pure_table.version()}," in "".join(WRITTEN)


@pytest.mark.parametrize("name", KINDS)
def test_every_option_is_as_the_table_says(name):
    for options in pure_table.inputs()[name]:
        row = pure_table.row(name, options)
        assert row in WRITTEN or not IS_OF_THIS_TORCH, row


def test_the_table_has_all_that_is_tried_and_nothing_else():
    tried = [(name, own) for name, tried in pure_table.inputs().items() for own in tried]
    assert len(tried) >= 80
    starts = {f"| {name} | {pure_table.shown(own)} |" for name, own in tried}
    rows = {" | ".join(line.split(" | ")[:2]) + " |" for line in WRITTEN if line.startswith("| ")}
    assert rows - {"| Class | Options |"} == starts or not IS_OF_THIS_TORCH


# The state.


def test_a_new_state_has_all_that_the_class_keeps():
    state = pure(optim.Adam, amsgrad=True).init({"w": torch.ones(2)})
    assert set(state.slots) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert_same_bits(state.slots["exp_avg"], {"w": torch.zeros(2)})
    assert_same_bits(state.slots["step"], {"w": torch.tensor(0.0)})
    assert state[1:] == ({}, {}, ())


def test_what_a_new_state_holds_is_what_the_class_would_make():
    params = {"w": torch.ones(2)}
    assert_same_bits(
        pure(optim.Rprop, lr=0.5).init(params).slots["step_size"]["w"], torch.full((2,), 0.5)
    )
    assert_same_bits(
        pure(optim.Adagrad, initial_accumulator_value=0.5).init(params).slots["sum"]["w"],
        torch.full((2,), 0.5),
    )
    assert_same_bits(pure(optim.ASGD, lr=0.5).init(params).slots["eta"]["w"], torch.tensor(0.5))


def test_a_class_that_keeps_nothing_has_an_empty_state():
    assert pure(optim.SGD).init({"w": torch.ones(2)}) == PureState({}, {}, {}, ())


def test_a_buffer_that_the_first_gradient_makes_is_told_from_zeros():
    opt, params = pure(optim.SGD, lr=1.0, momentum=0.5, dampening=0.75), {"w": torch.zeros(1)}
    state = opt.init(params)
    assert not state.made["momentum_buffer"]["w"]
    _, state = opt.update({"w": torch.full((1,), -0.0)}, state, params)
    assert state.made["momentum_buffer"]["w"]
    assert state.slots["momentum_buffer"]["w"].signbit()  # the gradient itself, not 0 plus it
    params, state = opt.update({"w": torch.ones(1)}, state, params)
    assert_same_bits(state.slots["momentum_buffer"]["w"], torch.tensor([0.25]))


def test_slots_that_some_leaves_lack_are_empty_there():
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    state = pure(optim.Adafactor).init(params)
    assert state.slots["variance"]["w"] == ()
    assert state.slots["row_var"]["b"] == ()
    assert state.slots["row_var"]["w"].shape == (2, 1)


@pytest.mark.parametrize("kind", [optim.Adafactor, optim.NAdam])
def test_a_state_goes_on_from_a_checkpoint_with_the_same_bits(kind, tmp_path):
    opt, params = pure(kind, lr=0.1), tree()
    gradients = [random_like(params) for _ in range(4)]
    whole = run(opt, params, gradients)
    halfway, state = run(opt, params, gradients[:2])
    torch.save(to_state_dict(state), tmp_path / "state.pt")
    read = from_state_dict(opt.init(params), torch.load(tmp_path / "state.pt"))
    assert_same_bits(run(opt, halfway, gradients[2:], read), whole)


def test_a_state_goes_on_from_a_pickle(tmp_path):
    opt, params = pure(optim.SGD, lr=0.1, momentum=0.9), tree()
    gradients = [random_like(params) for _ in range(2)]
    _, state = run(opt, params, gradients)
    torch.save(state, tmp_path / "state.pt")
    assert_same_bits(torch.load(tmp_path / "state.pt", weights_only=False), state)


def test_a_state_of_other_keys_in_another_order_is_paired_by_key():
    opt, params = pure(optim.Adafactor, lr=0.1), {"w": torch.randn(2, 2), "b": torch.randn(3)}
    grads = random_like(params)
    _, state = run(opt, params, [grads])
    turned = state._replace(
        slots={n: dict(reversed(own.items())) for n, own in state.slots.items()}
    )
    one, two = opt.update(grads, state, params), opt.update(grads, turned, params)
    assert_same_bits(one[0], two[0])
    assert list(two[1].slots["step"]) == ["b", "w"]


def test_empty_nodes_of_the_parameters_are_no_leaves():
    opt, params = (
        pure(optim.Adafactor, lr=0.1),
        {"w": torch.randn(2, 2), "x": (), "b": torch.ones(3)},
    )
    grads = random_like(params)
    new_params, state = run(opt, params, [grads, grads])
    assert new_params["x"] == ()
    assert state.slots["variance"]["x"] == ()
    assert_same_bits(state.slots["step"]["w"], torch.tensor(2.0))


def test_a_leaf_without_a_gradient_stays_and_does_not_count():
    opt, params = pure(optim.AdamW, lr=0.1), {"w": torch.ones(2), "b": torch.ones(2)}
    state = opt.init(params)
    new_params, new_state = opt.update({"w": torch.ones(2), "b": None}, state, params)
    assert_same_bits(new_params["b"], params["b"])
    assert new_params["b"] is not params["b"]
    assert [float(new_state.slots["step"][key]) for key in "wb"] == [1.0, 0.0]


def test_new_parameters_have_no_gradient_attached_and_require_one_as_before():
    opt, params = pure(optim.Adam), {"w": torch.nn.Parameter(torch.ones(2)), "b": torch.ones(2)}
    new_params, _ = opt.update({"w": torch.ones(2), "b": torch.ones(2)}, opt.init(params), params)
    assert [leaf.grad for leaf in new_params.values()] == [None, None]
    assert [leaf.requires_grad for leaf in new_params.values()] == [True, False]
    assert new_params["w"].is_leaf


def test_complex_leaves_have_the_bits_of_the_class():
    params = {"w": torch.randn(3, dtype=torch.complex64)}
    gradients = [random_like(params) for _ in range(3)]
    for name in ("Adam", "SGD", "Rprop", "RMSprop"):
        found, state = run(pure(getattr(optim, name), lr=0.1), params, gradients)
        expected = pure_table.steps_of_torch(name, {"lr": 0.1}, params, gradients)
        assert_same_bits((found, state.slots), expected)


# Numbers.


def test_a_schedule_gives_the_class_its_number_of_each_step():
    params = {"w": torch.ones(2)}
    grads, rates = {"w": torch.tensor([1.0, -1.0])}, [0.1, 0.2, 0.3]
    opt = pure(optim.RAdam, lr=lambda count: 0.1 * (1 + count))
    own = torch.nn.Parameter(params["w"].clone())
    theirs = optim.RAdam([own])
    state = opt.init(params)
    for count, rate in enumerate(rates):
        assert float(state.step) == count
        params, state = opt.update(grads, state, params)
        theirs.param_groups[0]["lr"] = float(0.1 * (1 + torch.tensor(count, dtype=torch.float64)))
        own.grad = grads["w"]
        theirs.step()
        assert rate == pytest.approx(theirs.param_groups[0]["lr"])
    assert_same_bits(params["w"], own.detach())
    opt.update_(grads, state, params)
    assert float(state.step) == 4


def test_other_numbers_may_be_schedules_and_the_state_must_have_a_count():
    opt, params = pure(optim.SGD, lr=0.1, momentum=lambda count: 0.5), {"w": torch.ones(2)}
    assert opt.init(params).step.shape == ()
    with pytest.raises(ValueError, match="momentum is a schedule, and the state has no count"):
        opt.update(params, pure(optim.SGD, momentum=0.5).init(params), params)
    nan = pure(optim.SGD, lr=lambda count: float("nan"))
    with pytest.raises(ValueError, match="lr=nan from its schedule: lr must be finite"):
        nan.update(params, nan.init(params), params)


def test_a_tensor_for_a_learning_rate_is_swept_by_vmap():
    rates, params = torch.tensor([0.1, 0.2]), {"w": torch.randn(2, 3)}
    opts = pure(optim.NAdam, lr=rates)
    grads = random_like(params)
    state = vmap(lambda opt, own: opt.init(own))(opts, params)
    moved, _ = vmap(lambda opt, *own: opt.update(*own))(opts, grads, state, params)
    for index in range(2):
        opt, own = pure(optim.NAdam, lr=rates[index]), {"w": params["w"][index]}
        expected, _ = opt.update({"w": grads["w"][index]}, opt.init(own), own)
        assert_same_bits(moved["w"][index], expected["w"])
    stacked, _ = Members(opts).update(grads, Members(opts).init(params), params)
    assert_same_bits(stacked, moved)


def test_an_update_takes_one_number():
    opt, params = pure(optim.Adam, lr=torch.tensor([0.1, 0.2])), {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"lr has shape \(2,\): one update takes one number"):
        opt.init(params)


def test_the_first_step_of_sgd_has_a_derivative_which_torch_detaches():
    opt, params = pure(optim.SGD, lr=0.5, momentum=0.9, dampening=0.5), torch.zeros(())

    def loss(gradient):
        return opt.update(gradient, opt.init(params), params)[0]

    assert grad(loss)(torch.tensor(1.0)) == -0.5


def test_plain_autograd_records_a_step_of_gradients_with_a_history():
    opt, params = pure(optim.Adam, lr=0.1), torch.ones(2)
    scale = torch.tensor(2.0, requires_grad=True)
    gradient = torch.tensor([1.0, 2.0])
    one, state = opt.update(gradient * scale, opt.init(params), params)
    assert one.requires_grad
    two, _ = opt.update(gradient, state, one)
    (found,) = torch.autograd.grad(two.sum(), scale)
    assert found.isfinite()
    assert found != 0
    off = pure(optim.Adam, lr=0.1, differentiable=False)
    assert not off.update(gradient * scale, off.init(params), params)[0].requires_grad


# As a value, and among others.


def test_it_is_a_value():
    opt = pure(optim.AdamW, lr=torch.tensor(0.1), betas=(0.8, 0.9))
    assert opt == pure(optim.AdamW, lr=torch.tensor(0.1), betas=(0.8, 0.9))
    assert opt != pure(optim.Adam, lr=torch.tensor(0.1), betas=(0.8, 0.9))
    assert opt == pickle.loads(pickle.dumps(opt))
    assert opt == dataclasses.replace(opt)
    assert repr(opt) == "pure(torch.optim.AdamW, lr=tensor(0.1000), betas=(0.8, 0.9))"


def test_wrappers_take_it():
    params, parts = tree(), {"all": pure(optim.Muon, lr=0.1), "w": pure(optim.Adam)}
    matrices = Partition(parts, lambda name, leaf: "w" if name == "w" else "all")
    opt = Accumulate(Clip(matrices, 1.0), 2)
    gradients = [random_like(params) for _ in range(4)]
    moved, _ = run(opt, params, gradients)
    assert not torch.equal(moved["w"], params["w"])
    copied, state = clone(params), opt.init(params)
    for grads in gradients:
        opt.update_(grads, state, copied)
    assert_same_bits(copied, moved)


def test_it_is_compiled_beside_what_is_compiled():
    opt, params = pure(optim.Adamax, lr=0.1), {"w": torch.ones(2)}
    state, grads = opt.init(params), {"w": torch.ones(2)}
    compiled = torch.compile(opt.update, backend="eager")
    assert_same_bits(compiled(grads, state, params), opt.update(grads, state, params))
    torch.compiler.reset()  # which forgets that this code is left out of graphs
    whole = torch.compile(opt.update, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"by a class of torch.optim"):
        whole(grads, state, params)


OWN = {"AdamW": {"lr": 0.1, "foreach": False}, "SGD": {"lr": 0.1, "momentum": 0.9}}
# In float16 torch's eps is 0, and its derivative of a square root at 0 is infinite.
OF_THE_CLASS = {
    "AdamW": {
        "survives_zero_gradients",
        "agrees_with_itself_in_float64",
        "gradient_is_finite",
        "gradient_matches_differences",
    },
    "SGD": set(),
}


@pytest.mark.parametrize("name", OWN)
def test_every_law_holds_but_those_that_the_class_breaks(name, examples):
    opt = pure(getattr(optim, name), **OWN[name])
    others = [law for law in laws.LAWS if law is not laws.compiles_once]
    report = check_optimizer(opt, laws=others, max_examples=examples())
    assert set(report.broken) <= OF_THE_CLASS[name], report


# Classes that are not torch's.


class Numbered(optim.Optimizer):
    """Keeps a Python number, a copy of the parameter as it was, and one of the last gradient."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["first"] = p.clone()
                if "last" not in state:
                    state["last"] = p.grad.clone()
                state["step"] += 1
                p.grad.add_(p, alpha=0.1)
                p.sub_(p.grad + state["last"] - state["first"], alpha=group["lr"] / state["step"])
                state["last"] = p.grad


def test_a_class_of_ones_own_has_its_bits_and_a_state_from_the_first():
    opt, params = pure(Numbered, lr=0.2), tree()
    state = opt.init(params)
    assert_same_bits(state.slots["first"], params)
    assert_same_bits(state.slots["last"], tree_map(torch.zeros_like, params))
    assert not state.made["last"]["w"]
    assert_same_bits(state.numbers["step"]["w"], torch.tensor(0))
    gradients = [random_like(params) for _ in range(5)]
    gradients[0]["w"] = None
    own = tree_map(lambda leaf: torch.nn.Parameter(leaf.clone()), params)
    theirs = Numbered([own["w"], *own["v"]], lr=0.2)
    inplace, inplace_state = clone(params), opt.init(params)
    for grads in gradients:
        before = clone((grads["v"], state, params))
        new_params, new_state = opt.update(grads, state, params)
        assert_same_bits((grads["v"], state, params), before)
        params, state = new_params, new_state
        opt.update_(grads, inplace_state, inplace)
        for leaf, gradient in zip([own["w"], *own["v"]], [grads["w"], *grads["v"]], strict=True):
            leaf.grad = None if gradient is None else gradient.clone()
        theirs.step()
    assert_same_bits(params, tree_map(torch.Tensor.detach, own))
    assert_same_bits((inplace, inplace_state), (params, state))
    assert_same_bits(state.numbers["step"]["w"], torch.tensor(4))
    assert [theirs.state[own["w"]]["step"], theirs.state[own["v"][0]]["step"]] == [4, 5]


def test_members_of_a_class_of_ones_own_count_by_themselves():
    opt, params = pure(Numbered), {"w": torch.randn(2, 3)}
    state, grads = vmap(opt.init)(params), random_like(params)
    assert_same_bits(state.numbers["step"]["w"], torch.tensor([0, 0]))
    moved, state = vmap(opt.update)(grads, state, params)
    one = {"w": params["w"][1]}
    expected, _ = opt.update({"w": grads["w"][1]}, opt.init(one), one)
    assert_same_bits(moved["w"][1], expected["w"])
    assert_same_bits(state.numbers["step"]["w"], torch.tensor([1, 1]))


def test_nothing_is_promised_of_a_class_of_ones_own():
    traits = pure(Numbered).traits
    assert traits == Traits(tells_leaves_apart=True, decides_on_host=True)
    assert pure(optim.RAdam).traits.elementwise
    assert pure(optim.Muon).traits.leafwise
    assert not pure(optim.Muon).traits.elementwise


class InGroups(Numbered):
    def step(self):
        super().step()
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


class InItself(Numbered):
    calls = 0

    def step(self):
        super().step()
        self.calls += 1


class OfLists(Numbered):
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = []


class Later(Numbered):
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            if self.state[p]["step"] > 1:
                self.state[p]["later"] = p.clone()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (InGroups, "keeps param_groups[0]['k'] from step to step"),
        (InItself, "keeps self.calls from step to step"),
        (OfLists, "state[param]['history'] is of type list"),
    ],
)
def test_a_class_that_keeps_anything_else_is_refused(kind, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        pure(kind).init({"w": torch.ones(2)})


def test_a_state_that_grows_later_is_refused_then():
    opt, params = pure(Later), {"w": torch.ones(2)}
    params, state = run(opt, params, [params])
    with pytest.raises(
        RuntimeError, match="changed what it keeps for a parameter in this step: later"
    ):
        opt.update(params, state, params)


# What is refused.


def test_a_call_that_cannot_be_is_refused_with_the_reason():
    params = [torch.ones(2)]
    for given, message in {
        optim.LBFGS: "torch.optim.LBFGS needs a closure",
        optim.SparseAdam: "torch.optim.SparseAdam takes sparse gradients alone",
        torch.nn.Linear: "it must be a class of torch.optim",
        optim.Adam(params): "it must be a class of torch.optim",
    }.items():
        with pytest.raises(TypeError, match=message):
            pure(given)
    with pytest.raises(TypeError, match=r"torch.optim.Adam has no beta\. It takes lr, betas, eps"):
        pure(optim.Adam, beta=0.9)
    with pytest.raises(ValueError, match="refuses its hyperparameters: Invalid learning rate: -1"):
        pure(optim.Adam, lr=-1)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        pure(optim.Adam, lr=torch.tensor([0.1, -0.1]))


def test_a_leaf_that_the_class_refuses_is_named():
    with pytest.raises(ValueError, match=r"torch.optim.Muon refuses params\['b'\]: Muon only"):
        pure(optim.Muon).init({"w": torch.ones(2, 2), "b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"refuses params\['c'\]: Adafactor does not support"):
        pure(optim.Adafactor).init({"c": torch.ones(2, dtype=torch.complex64)})


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written():
    opt, params = pure(optim.Adam), {"w": torch.ones(2), "b": torch.ones(3)}
    state, grads = opt.init(params), random_like(params)
    slots = state.slots
    wrong = {
        r"state.slots\['exp_avg'\]\['b'\]: shape": slots["exp_avg"] | {"b": torch.ones(1)},
        r"no state.slots\['exp_avg'\]\['b'\]": {"w": torch.ones(2)},
        r"state.slots\['exp_avg'\]\['b'\] is None": slots["exp_avg"] | {"b": None},
    }
    before = clone((params, state))
    for message, own in wrong.items():
        for method in (opt.update, opt.update_):
            bad = state._replace(slots=slots | {"exp_avg": own})
            with pytest.raises((TypeError, ValueError), match=message):
                method(grads, bad, params)
    for name in slots:
        bad = state._replace(slots={n: own for n, own in slots.items() if n != name})
        with pytest.raises(RuntimeError, match="Make the state with init"):
            opt.update(grads, bad, params)
    with pytest.raises(TypeError, match="it must be the PureState that init"):
        opt.update(grads, params, state)
    assert_same_bits((params, state), before)


def test_a_state_that_vmap_made_is_for_vmap():
    opt, params = pure(optim.NAdam), {"w": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"\['step'\]\['w'\] has shape \(2,\): it must have shape"):
        opt.update(params, vmap(opt.init)(params), params)


@pytest.mark.parametrize("kind", [optim.Muon, optim.Adafactor])
def test_a_derivative_that_the_class_would_lose_is_refused(kind):
    opt, params = pure(kind), torch.ones(2, 2)
    state = opt.init(params)
    with pytest.raises(ValueError, match="has no differentiable=: its step is not recorded"):
        grad(lambda own: opt.update(own, state, params)[0].sum())(torch.ones(2, 2))
    with pytest.raises(ValueError, match="derivative through it would be lost"):
        opt.update(torch.ones(2, 2).requires_grad_(), state, params)


class Reading(Numbered):
    """Says that it can be differentiated, and reads a value."""

    def __init__(self, params, lr=0.1, differentiable=False):
        optim.Optimizer.__init__(self, params, {"lr": lr, "differentiable": differentiable})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=1 / p.grad.abs().max().item())


def test_the_function_that_stands_in_the_way_is_named():
    opt, params = pure(Reading), torch.randn(2, 3)
    state = vmap(opt.init)(params)

    def loss(own):
        return vmap(opt.update)(own, state, params)[0].sum()

    with pytest.raises(
        RuntimeError, match=r"Reading cannot be followed here: .*\.step, line \d+, st"
    ):
        grad(loss)(torch.ones(2, 3))


def test_a_derivative_of_a_number_that_the_class_reads_is_refused():
    params = torch.randn(2, 3)
    opt = pure(optim.Adagrad, lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="lr is a tensor that may have a derivative"):
        opt.update(params, pure(optim.Adagrad).init(params), params)


def test_nothing_is_written_where_the_class_fails_at_a_later_leaf():
    opt, params = pure(optim.Adafactor), {"a": torch.ones(2), "b": torch.ones(0)}
    state, grads = opt.init(params), {"a": torch.ones(2), "b": torch.ones(0)}
    before = clone((params, state))
    with pytest.raises(RuntimeError, match=r"_single_tensor_adafactor, line \d+: float division"):
        opt.update_(grads, state, params)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize(
    ("opt", "other"),
    [
        (pure(optim.Adam), pure(optim.SGD)),
        (pure(optim.RMSprop), pure(optim.SGD)),
        (pure(optim.SGD, momentum=0.9), pure(optim.SGD)),
    ],
    ids=["Adam", "RMSprop", "SGD with momentum"],
)
def test_nothing_is_written_where_a_state_lacks_what_the_class_goes_by(opt, other):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    state, grads = other.init(params), clone(params)
    for update in (opt.update, opt.update_):
        with pytest.raises(RuntimeError, match="in the state of a parameter, which has none"):
            update(grads, state, params)
    assert_same_bits(params, grads)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (torch.tensor(True), "has dtype torch.bool: it must be a real number"),
        (torch.tensor(1j), "has dtype torch.complex64: it must be a real number"),
        (torch.tensor(1.0, device="meta"), "is on meta, and its parameter on cpu"),
    ],
    ids=["bool", "complex", "elsewhere"],
)
def test_nothing_is_written_where_the_count_of_a_later_leaf_is_none(count, message):
    opt, params = pure(optim.Adam, foreach=False), {"a": torch.ones(2), "b": torch.ones(3)}
    state = opt.init(params)
    state.slots["step"]["b"] = count
    grads, first = clone(params), clone(state.slots["exp_avg"])
    for update in (opt.update, opt.update_):
        with pytest.raises(ValueError, match=re.escape(f"state.slots['step']['b'] {message}")):
            update(grads, state, params)
    assert_same_bits((params, state.slots["exp_avg"]), (grads, first))


@pytest.mark.parametrize("kind", [optim.SGD, optim.RMSprop])
def test_a_momentum_that_begins_with_0_has_the_bits_of_the_class(kind):
    opt = pure(kind, lr=0.1, momentum=lambda count: 0.0 if count < 2 else 0.5)
    params = own = torch.randn(3)
    state = opt.init(params)
    theirs = torch.nn.Parameter(params.clone())
    peer = kind([theirs], lr=0.1)
    if kind is optim.RMSprop:  # which makes its buffer at the first step, or never
        peer.state[theirs] = {
            "step": torch.tensor(0.0),
            "square_avg": torch.zeros(3),
            "momentum_buffer": torch.zeros(3),
        }
    in_place, written = params.clone(), opt.init(params)
    for count in range(4):
        grads = torch.randn(3)
        peer.param_groups[0]["momentum"] = 0.0 if count < 2 else 0.5
        theirs.grad = grads
        peer.step()
        own, state = opt.update(grads, state, own)
        opt.update_(grads, written, in_place)
        assert_same_bits((own, in_place), (theirs.detach(), theirs.detach()))
        if kind is optim.SGD:
            assert state.made["momentum_buffer"].item() is (count >= 2)


@pytest.mark.parametrize("kind", [optim.SGD, optim.RMSprop])
def test_members_of_which_some_have_a_momentum_of_0_have_the_bits_of_the_class(kind):
    momenta = [0.0, 0.5]
    sweep = members.stack([pure(kind, lr=0.1, momentum=own) for own in momenta])
    first = params = {"w": torch.randn(2, 3)}
    state = vmap(lambda opt, params: opt.init(params))(sweep, params)
    gradients = [{"w": torch.randn(2, 3)} for _ in range(3)]
    for grads in gradients:
        params, state = vmap(lambda opt, *trees: opt.update(*trees))(sweep, grads, state, params)
    for index, momentum in enumerate(momenta):
        theirs = torch.nn.Parameter(first["w"][index].clone())
        peer = kind([theirs], lr=0.1, momentum=momentum)
        for grads in gradients:
            theirs.grad = grads["w"][index].clone()
            peer.step()
        assert_same_bits(params["w"][index], theirs.detach())


def test_a_buffer_that_a_momentum_of_0_has_no_use_for_stays():
    params = torch.ones(2)
    state = pure(optim.SGD, momentum=0.9).init(params)
    new_params, new_state = pure(optim.SGD, lr=0.5).update(params, state, params)
    assert_same_bits((new_params, new_state), (torch.full((2,), 0.5), state))


def _sharded(rank):
    mesh = init_device_mesh("cpu", (2,))

    def distributed(tree):
        return {key: distribute_tensor(leaf, mesh, [Shard(0)]) for key, leaf in tree.items()}

    for kind, options in ((optim.NAdam, {}), (optim.SGD, {"momentum": 0.9})):
        opt = pure(kind, lr=0.1, **options)
        params = {"w": torch.arange(12.0).reshape(6, 2), "b": torch.ones(3)}
        gradients = [tree_map(lambda leaf, n=n: (leaf + n).sin(), params) for n in range(3)]
        expected, _ = run(opt, params, gradients)
        found, state = run(opt, distributed(params), list(map(distributed, gradients)))
        assert_same_bits({key: leaf.full_tensor() for key, leaf in found.items()}, expected)
        slot = min(state.slots)
        assert state.slots[slot]["w"].placements == (Shard(0),)
    opt, own = pure(optim.Muon), distributed({"w": torch.ones(4, 2)})
    state = opt.init(own)
    with pytest.raises(TypeError, match="Pure does not say that it works on parts of leaves"):
        opt.update(own, state, own)


def test_elementwise_classes_move_the_parts_of_sharded_leaves():
    run_ranks(2, _sharded)


def test_an_update_in_place_under_a_transform_is_refused():
    opt, params = pure(optim.Adam), torch.ones(2, 3)
    state = vmap(opt.init)(params)
    with pytest.raises(RuntimeError, match="update_\\(\\) writes in place"):
        vmap(opt.update_)(params.clone(), state, params)
