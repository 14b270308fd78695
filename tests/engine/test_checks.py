"""Every bad input, tried as a new user would: path, value and remedy, and nothing half-written."""

import optree
import pytest
import torch
from torch import nn
from torch.func import vmap

from funcopt import (
    Accumulate,
    AdamW,
    AdamWState,
    Best,
    Clip,
    Compensated,
    Ema,
    Frozen,
    Lookahead,
    MasterWeights,
    Partition,
    ScheduleFree,
    SkipNonfinite,
)
from funcopt._engine import memory
from funcopt.schedules import Constant

from ..cases import NOT_DENSE, assert_same_bits, clone, not_dense
from ..every_optimizer import OPTIMIZERS


def params():
    return {"layer": {"weight": torch.ones(4, 3), "bias": torch.ones(3)}}


def with_weight(weight):
    return {"layer": {"weight": weight, "bias": torch.ones(3)}}


BAD_GRADIENTS = {
    "shape": (
        with_weight(torch.ones(3, 4)),
        ValueError,
        r"grads\['layer'\]\['weight'\]: shape \(3, 4\), the parameter has \(4, 3\).*broadcast",
    ),
    "broadcastable shape": (
        with_weight(torch.ones(1, 3)),
        ValueError,
        r"grads\['layer'\]\['weight'\]: shape \(1, 3\), the parameter has \(4, 3\)",
    ),
    "dtype": (
        with_weight(torch.ones(4, 3, dtype=torch.float64)),
        ValueError,
        r"grads\['layer'\]\['weight'\]: dtype torch.float64, the parameter has torch.float32.*\.to",
    ),
    "device": (
        with_weight(torch.ones(4, 3, device="meta")),
        ValueError,
        r"grads\['layer'\]\['weight'\]: device meta, the parameter has cpu",
    ),
    "sparse": (
        with_weight(torch.ones(4, 3).to_sparse()),
        TypeError,
        r"grads\['layer'\]\['weight'\] has layout torch.sparse_coo.*to_dense",
    ),
    "a number": (
        with_weight(1.0),
        TypeError,
        r"grads\['layer'\]\['weight'\] is of type float: a gradient must be a tensor",
    ),
    "renamed key": (
        {"layer": {"weights": torch.ones(4, 3), "bias": torch.ones(3)}},
        ValueError,
        r"no grads\['layer'\]\['weight'\] for params\['layer'\]\['weight'\] and "
        r"grads\['layer'\]\['weights'\] without a parameter of that path.*None where it has none",
    ),
    "missing key": (
        {"layer": {"weight": torch.ones(4, 3)}},
        ValueError,
        r"no grads\['layer'\]\['bias'\] for params\['layer'\]\['bias'\]",
    ),
    "extra key": (
        {**params(), "head": torch.ones(1)},
        ValueError,
        r"grads\['head'\] without a parameter",
    ),
    "None for a subtree": (
        {"layer": None},
        ValueError,
        r"no grads\['layer'\]\['weight'\], grads\['layer'\]\['bias'\]",
    ),
    "None": (None, ValueError, "grads does not have the structure of params"),
}


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("wrap", [lambda opt: opt, lambda opt: Clip(opt, 1.0)])
def test_what_is_given_in_place_of_a_tree_of_parameters_is_named(wrap, method):
    opt = wrap(AdamW())
    state = opt.init(params())
    for wrong in (nn.Linear(2, 3), torch.nn.Linear(2, 3).parameters()):
        with pytest.raises(TypeError, match=r"^params is of type .*: every leaf must be a tensor"):
            getattr(opt, method)(params(), state, wrong)


LAYER = nn.Linear(2, 3)
NO_TREES = {
    "a generator": LAYER.parameters(),
    "named parameters": LAYER.named_parameters(),
    "a list of pairs": list(LAYER.named_parameters()),
    "a filter": filter(lambda param: param.requires_grad, LAYER.parameters()),
    "the values of a dict": dict(LAYER.named_parameters()).values(),
    "a set": set(LAYER.parameters()),
    "a module": LAYER,
}


@pytest.mark.parametrize("name", NO_TREES)
def test_what_gives_parameters_and_is_no_tree_of_them_leads_to_named_parameters(name):
    with pytest.raises(TypeError, match=r"Pass dict\(module.named_parameters\(\)\)"):
        AdamW().init(NO_TREES[name])


@pytest.mark.parametrize("leaf", [1.0, 2, torch.ones(2).numpy()], ids=type)
def test_a_leaf_of_numbers_leads_to_a_tensor(leaf):
    with pytest.raises(TypeError, match=r"params\['w'\] is of type .*with torch.as_tensor\(\)"):
        AdamW().init({"w": leaf})


def test_a_leaf_of_another_kind_leads_to_a_registered_node():
    with pytest.raises(TypeError, match="register its type as a pytree node"):
        AdamW().init({"w": object()})


# Their states have trees like the parameters: moments, sums, averages, slow parameters.
STATEFUL = {
    "AdamW": AdamW(),
    "Accumulate": Accumulate(AdamW(), 2),
    "Ema": Ema(AdamW()),
    "Best": Best(AdamW()),
    "Lookahead": Lookahead(AdamW(), 2),
    "MasterWeights": MasterWeights(AdamW()),
    "ScheduleFree": ScheduleFree(AdamW()),
    "Compensated": Compensated(AdamW()),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_of_all_members_at_once_leads_to_vmap_of_init(name):
    opt = STATEFUL[name]
    stacked = {"w": torch.ones(2, 3)}
    state = opt.init(stacked)
    with pytest.raises(ValueError, match=r"Under vmap, .*: state = vmap\(opt.init\)\(params\)"):
        vmap(opt.update, (0, None, 0))(stacked, state, stacked)
    with pytest.raises(ValueError, match="parameter") as refused:
        opt.update({"w": torch.ones(3)}, state, {"w": torch.ones(3)})
    assert "vmap" not in str(refused.value)


@pytest.mark.parametrize("name", BAD_GRADIENTS)
@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_bad_gradient_is_named_and_nothing_is_written(name, method):
    grads, error, message = BAD_GRADIENTS[name]
    opt = AdamW()
    weights = params()
    state = opt.init(weights)
    before = clone((weights, state))
    with pytest.raises(error, match=message):
        getattr(opt, method)(grads, state, weights)
    assert_same_bits((weights, state), before)


BAD_PARAMETERS = {
    "integers": (
        torch.ones(2, dtype=torch.int64),
        TypeError,
        r"params\['layer'\]\['weight'\] has dtype torch.int64.*tree of their own",
    ),
    "booleans": (torch.ones(2).bool(), TypeError, "has dtype torch.bool"),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), TypeError, "has dtype torch.float8_e4m3fn"),
    "sparse": (torch.eye(2).to_sparse(), TypeError, "has layout torch.sparse_coo.*to_dense"),
    "a number": (1.0, TypeError, r"params\['layer'\]\['weight'\] is of type float"),
    "None": (
        None,
        TypeError,
        r"params\['layer'\]\['weight'\] is None: every leaf must be a tensor",
    ),
    "a module": (nn.Linear(2, 2), TypeError, r"is of type Linear.*dict\(module.named_parameters"),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_a_bad_parameter_is_named_by_init(name):
    leaf, error, message = BAD_PARAMETERS[name]
    with pytest.raises(error, match=message):
        AdamW().init(with_weight(leaf))


@pytest.mark.parametrize("how", ["the same tensor", "a detached view", "a reshaped view"])
@pytest.mark.parametrize("method", ["init", "update", "update_"])
def test_tied_tensors_are_refused_with_both_paths(how, method):
    shared = torch.ones(4)
    other = {
        "the same tensor": shared,
        "a detached view": shared.detach(),
        "a reshaped view": shared.view(2, 2),
    }[how]
    tied = {"embed": shared, "head": other}
    opt = AdamW()
    state = opt.init(clone(tied))
    call = {
        "init": lambda: opt.init(tied),
        "update": lambda: opt.update(clone(tied), state, tied),
        "update_": lambda: opt.update_(clone(tied), state, tied),
    }[method]
    with pytest.raises(ValueError, match=r"params\['head'\] shares its memory with .*'embed'.*one"):
        call()
    assert torch.equal(shared, torch.ones(4))


def test_the_tied_weights_of_a_state_dict_are_found():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match="shares its memory"):
        AdamW().init(model.state_dict())
    AdamW().init(dict(model.named_parameters()))  # which names a shared parameter once


def test_empty_leaves_share_nothing():
    empty = torch.empty(0)
    AdamW().init({"a": empty, "b": empty[:0]})


BAD_STATES = {
    "not a state": (
        lambda state: {"step": 0},
        TypeError,
        r"state is of type dict: .*update\(grads, state, params\)",
    ),
    "grads and state swapped": (lambda state: params(), TypeError, "AdamWState"),
    "a moment of another shape": (
        lambda state: state._replace(exp_avg=with_weight(torch.zeros(3, 4))),
        ValueError,
        r"state.exp_avg\['layer'\]\['weight'\]: shape \(3, 4\), the parameter has \(4, 3\)",
    ),
    "a moment of another dtype": (
        lambda state: state._replace(exp_avg_sq=with_weight(torch.zeros(4, 3).double())),
        ValueError,
        r"state.exp_avg_sq\['layer'\]\['weight'\]: dtype torch.float64",
    ),
    "a moment that is None": (
        lambda state: state._replace(exp_avg=with_weight(None)),
        TypeError,
        r"state.exp_avg\['layer'\]\['weight'\] is None: a moment must be a tensor",
    ),
    "a renamed key": (
        lambda state: state._replace(exp_avg={"layers": state.exp_avg["layer"]}),
        ValueError,
        r"no state.exp_avg\['layer'\]\['weight'\].*Make the state with init",
    ),
    "amsgrad's maximum where there is none": (
        lambda state: state._replace(max_exp_avg_sq=state.exp_avg_sq),
        ValueError,
        "holds a tree, but this optimizer has amsgrad=False",
    ),
    "a stacked count": (
        lambda state: state._replace(step=torch.zeros(3)),
        ValueError,
        r"state.step has shape \(3,\).*vmap",
    ),
    "a count of each leaf": (
        lambda state: state._replace(step=params()),
        ValueError,
        "state.step is a dict: with step_per_leaf=False it is one tensor",
    ),
    "a Python count": (
        lambda state: state._replace(step=3),
        TypeError,
        r"state.step is of type int: the count must be a tensor",
    ),
    "a negative count": (
        lambda state: state._replace(step=torch.tensor(-2.0)),
        ValueError,
        "step=-1.0: step must be finite and count the updates from 1",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_bad_state_is_named_and_nothing_is_written(name, method):
    change, error, message = BAD_STATES[name]
    opt = AdamW()
    weights = params()
    bad = change(opt.init(weights))
    before = clone(weights)
    with pytest.raises(error, match=message):
        getattr(opt, method)(params(), bad, weights)
    assert_same_bits(weights, before)


def test_amsgrad_without_its_maximum_is_refused():
    weights = params()
    with pytest.raises(ValueError, match=r"max_exp_avg_sq is empty, but .* amsgrad=True"):
        AdamW(amsgrad=True).update(params(), AdamW().init(weights), weights)


def test_an_error_in_the_last_leaf_leaves_the_first_unmoved():
    opt = AdamW()
    weights = [torch.ones(2), torch.ones(2)]
    state = opt.init(weights)
    with pytest.raises(ValueError, match=r"grads\[1\]: dtype"):
        opt.update_([torch.ones(2), torch.ones(2, dtype=torch.float16)], state, weights)
    assert_same_bits((weights, state), ([torch.ones(2)] * 2, opt.init(clone(weights))))


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_a_kernel_that_cannot_serve_a_device_says_why(kernel):
    opt = AdamW(kernel=kernel)
    weights = {"w": torch.ones(2, device="meta")}
    state = AdamWState(torch.zeros(()), weights, weights, ())
    message = (
        rf"params\['w'\] is on meta, which kernel='{kernel}' cannot serve: it serves cpu.*auto"
    )
    with pytest.raises(ValueError, match=message):
        opt.update(weights, state, weights)


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_a_leaf_without_a_gradient_needs_no_kernel(kernel):
    opt = AdamW(kernel=kernel)
    weights = {"skipped": torch.ones(2, device="meta"), "w": torch.ones(2)}
    moved, _ = opt.update({"skipped": None, "w": torch.ones(2)}, opt.init(weights), weights)
    assert not torch.equal(moved["w"], weights["w"])


LOOKING = {name: opt for name, opt in OPTIMIZERS.items() if not isinstance(opt, Frozen)}


def weights():
    return {"w": torch.ones(3), "b": torch.ones(2, 2)}


@pytest.fixture
def unknown_leaves():
    """Nothing is known of leaves from the steps of other tests, so that each of them is checked."""
    memory.forget()


@pytest.mark.usefixtures("unknown_leaves")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("name", LOOKING)
def test_parameters_and_gradients_that_are_not_dense_are_refused(name, kind):
    opt, params = LOOKING[name], weights()
    wrong = params | {"w": not_dense(kind, params["w"])}
    state, grads = opt.init(params), clone(params)
    message = r"\['w'\] has (a nested layout|layout torch.sparse_coo): "
    with pytest.raises(TypeError, match="params" + message):
        opt.init(wrong)
    for update in (opt.update, opt.update_):
        with pytest.raises(TypeError, match="params" + message):
            update(grads, state, wrong)
        with pytest.raises(TypeError, match="grads" + message):
            update(grads | {"w": wrong["w"]}, state, params)


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_what_is_not_dense_is_refused_after_steps_on_what_is(kind):
    opt, params, grads = AdamW(), weights(), clone(weights())
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(grads, state, params)
    wrong = {"w": not_dense(kind, grads["w"])}
    for update in (opt.update, opt.update_):
        with pytest.raises(TypeError, match=r"^grads\['w'\] has "):
            update(grads | wrong, state, params)
        with pytest.raises(TypeError, match=r"^state\.exp_avg\['w'\] has "):
            update(grads, state._replace(exp_avg=state.exp_avg | wrong), params)


@pytest.mark.usefixtures("unknown_leaves")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("name", LOOKING)
def test_a_state_that_is_not_dense_is_refused_with_its_path(name, kind):
    opt, params = LOOKING[name], weights()
    # After the first of two steps, so that in the next everything in the state is of use.
    _, state = opt.update(clone(params), opt.init(params), params)
    tensors, structure = optree.tree_flatten(state, namespace="torch")
    before, grads = clone((params, state)), clone(params)
    for index, tensor in enumerate(tensors):
        changed = list(tensors)
        changed[index] = not_dense(kind, tensor)
        wrong = optree.tree_unflatten(structure, changed)
        for update in (opt.update, opt.update_):
            memory.forget()
            with pytest.raises((TypeError, ValueError), match=r"^\S*state\.\S+ .*(nested|sparse)"):
                update(grads, wrong, params)
    assert_same_bits((params, state), before)
    assert len(tensors) > 0


@pytest.mark.usefixtures("unknown_leaves")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_hyperparameter_that_is_not_dense_is_refused(kind):
    number = not_dense(kind, torch.tensor(0.1))
    params = weights()
    made = (
        lambda: AdamW(lr=number),
        lambda: AdamW(betas=(0.9, number)),
        lambda: Clip(AdamW(), number),
        lambda: Constant(number),
        lambda: AdamW(lr=lambda count: number).update(params, AdamW().init(params), params),
        lambda: put(AdamW(lr=torch.tensor(0.1)), number).update(
            params, AdamW().init(params), params
        ),
        lambda: put(Clip(AdamW(), torch.tensor(1.0)), number).update(
            params, Clip(AdamW(), 1.0).init(params), params
        ),
    )
    for make in made:
        with pytest.raises(TypeError, match=r"is a tensor of .*(nested layout|sparse_coo): make"):
            make()


def put(opt, number):
    """The optimizer with another tensor in place of the one that it holds."""
    return optree.tree_map(lambda _: number, opt, namespace="torch")


@pytest.mark.usefixtures("unknown_leaves")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_an_inner_state_that_is_not_dense_is_refused_where_it_would_only_be_copied(kind):
    params = weights()
    for opt in (Accumulate(AdamW(), every=2), SkipNonfinite(AdamW())):
        state = opt.init(params)
        wrong = state.inner._replace(exp_avg=params | {"w": not_dense(kind, params["w"])})
        grads = {"w": torch.full((3,), torch.inf), "b": torch.ones(2, 2)}
        with pytest.raises(TypeError, match=r"^state\.inner\.exp_avg\['w'\] has .*layout"):
            opt.update(grads, state._replace(inner=wrong), params)


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_what_is_frozen_need_not_be_dense(kind):
    opt = Partition({"frozen": Frozen(), "moving": AdamW(lr=0.1)}, {"f": "frozen", "w": "moving"})
    params = {"f": not_dense(kind, torch.ones(3)), "w": torch.ones(2)}
    state = opt.init(params)
    new_params, _ = opt.update({"w": torch.ones(2)}, state, params)
    assert new_params["f"] is params["f"]
    opt.update_({"w": torch.ones(2)}, state, params)
    assert torch.equal(params["w"], new_params["w"])
