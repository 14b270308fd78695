"""A state as a flat dict: through every format to the bit, and strict about what it is given."""

import pathlib
import pickle
from collections import OrderedDict

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from funcopt import AdamW, AdamWState, Ema, Partition
from funcopt.interop import from_state_dict, from_torch, to_state_dict
from funcopt.testing import strategies

from ..cases import (
    NOT_DENSE,
    Point,
    assert_same_bits,
    clone,
    layouts,
    leaves,
    not_dense,
    random_like,
    tree_map,
    trees,
)
from .formats import FORMATS

GOLDEN = pathlib.Path(__file__).parent / "golden"

quickly = hypothesis.settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def zeros_like(tree):
    return tree_map(torch.zeros_like, tree)


def by_key(d):
    """A dict in the order of its keys, which is not the same in every format."""
    return dict(sorted(d.items()))


def moved(params, **options):
    """A state after two updates, which gives small leaves in storages that they share."""
    opt = AdamW(**options)
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(random_like(params), state, params)
    return state


@st.composite
def states(draw):
    """The state of any optimizer, some updates on, with its first state."""
    opt = draw(strategies.optimizers())
    params = draw(strategies.params_for(opt))
    state = opt.init(params)
    for grads in draw(strategies.gradient_sequences(params, st.integers(1, 2), none=True)):
        params, state = opt.update(grads, state, params)
    return opt.init(params), state


@quickly
@given(states())
def test_every_state_comes_back_to_the_bit(drawn):
    template, state = drawn
    d = to_state_dict(state)
    assert all(type(key) is str and type(entry) is Tensor for key, entry in d.items())
    assert len({entry.untyped_storage()._cdata for entry in d.values()}) == len(d)
    loaded = from_state_dict(template, safetensors.torch.load(safetensors.torch.save(d)))
    assert_same_bits(loaded, state)
    assert all(
        one.stride() == other.stride()
        for one, other in zip(leaves(loaded), leaves(template), strict=True)
    )


STATES = {
    **{name: moved(tree, amsgrad=True, step_per_leaf=True) for name, tree in trees().items()},
    "complex": moved(
        [torch.randn(3, dtype=torch.complex64), torch.randn((), dtype=torch.complex128)]
    ),
    "16 bits": moved({"w": torch.randn(2).half(), "v": torch.randn(2).bfloat16()}),
    "large": moved({"w": torch.randn(100, 100), "v": torch.randn(3)}),
    "parameters too": {"params": [torch.nn.Parameter(torch.ones(2))], "count": torch.tensor(3)},
    "every layout": layouts(),
    "one tensor twice": [torch.ones(2)] * 2,
    "halves of one": dict(enumerate(torch.arange(4.0).split(2))),
    "conjugate": [torch.randn(3, dtype=torch.complex64).conj()],
    "conjugate or negative, not yet computed": {
        "negative": torch._neg_view(torch.ones(2)),
        "negative complex": torch._neg_view(torch.randn(2, dtype=torch.complex64)),
        "both": torch._neg_view(torch.randn(2, dtype=torch.complex64).conj()),
        "of shape ()": torch.tensor(1 + 2j).conj().imag,
    },
    "booleans": (torch.tensor([True, False]), torch.tensor(2**62)),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_takes_the_dict_as_it_is_and_gives_it_back_exactly(kind, name, tmp_path):
    save, load = FORMATS[kind]
    d = to_state_dict(STATES[name])
    kept = clone(d)
    save(d, tmp_path / "checkpoint")
    template = zeros_like(STATES[name])
    found = load(tmp_path / "checkpoint", to_state_dict(template))
    assert_same_bits(by_key(found), by_key(kept))
    assert_same_bits(from_state_dict(template, found), tree_map(Tensor.detach, STATES[name]))


def test_a_state_itself_is_bytes_to_dcp_but_the_dict_is_tensors(tmp_path):
    """Why the documentation steers away from handing it a NamedTuple."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

    state = moved({"w": torch.ones(2)})
    kinds = {}
    for name, saved in {"state": {"state": state}, "dict": to_state_dict(state)}.items():
        FORMATS["dcp"][0](saved, tmp_path / name)
        metadata = pickle.loads((tmp_path / name / ".metadata").read_bytes())
        kinds[name] = {type(entry) for entry in metadata.state_dict_metadata.values()}
    assert kinds == {"state": {BytesStorageMetadata}, "dict": {TensorStorageMetadata}}


# Keys.

KEYS = {
    "dots": ({"a.b": 1, "a": {"b": 2}}, ["state['a']['b']", "state['a.b']"]),
    "a number and its digits": ([{0: 1}, {"0": 2}], ["state[0][0]", "state[1]['0']"]),
    "attributes and items": (
        [Point(1, 2), {"x": 3}],
        ["state[0].x", "state[0].y", "state[1]['x']"],
    ),
    "a leaf": (1, ["state"]),
    "quotes": ({"it's": 1, 'say "it"': 2}, ['state["it\'s"]', "state['say \"it\"']"]),
    "the names of the format": (
        {"funcopt.format": 1, "version": 2},
        ["state['funcopt.format']", "state['version']"],
    ),
    "nothing": ({}, []),
    "empty nodes": ([(), {}, 1], ["state[2]"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_are_the_expressions_that_reach_the_tensors(name):
    tree, keys = KEYS[name]
    state = tree_map(torch.tensor, tree)
    d = to_state_dict(state)
    assert sorted(d) == sorted(["funcopt.format", *keys])
    for key in keys:
        assert eval(key, {"state": state}).data_ptr() == d[key].data_ptr()
    assert_same_bits(from_state_dict(zeros_like(state), d), state)


def test_the_order_and_kind_of_a_dict_make_no_difference():
    d = to_state_dict({"b": torch.ones(1), "a": torch.zeros(2)})
    other = OrderedDict(b=torch.zeros(1), a=torch.ones(2))
    assert torch.equal(from_state_dict(other, d)["b"], torch.ones(1))


class Alike:
    def __init__(self, place):
        self.place = place

    def __lt__(self, other):
        return self.place < other.place

    def __repr__(self):
        return "alike"


def test_two_leaves_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match=r"state\[alike\] is the path of two leaves"):
        to_state_dict({Alike(0): torch.ones(1), Alike(1): torch.ones(1)})


@pytest.mark.parametrize("leaf", [1.0, None, "text", torch.ones(2).to_sparse()], ids=str)
def test_what_is_no_dense_tensor_is_refused_by_its_path(leaf):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
        to_state_dict({"a": [torch.ones(1), leaf]})


# Memory.


def test_what_is_alone_in_its_storage_is_live_and_what_is_not_is_copied():
    alone, whole = torch.ones(2), torch.zeros(4)
    state = {
        "alone": alone,
        "part": whole[:2],
        "all": whole.view(2, 2),
        "across": torch.ones(2, 3).T,
    }
    d = to_state_dict(state)
    shared = {name: d[f"state['{name}']"].data_ptr() == state[name].data_ptr() for name in state}
    assert shared == {"alone": True, "part": False, "all": True, "across": False}


def test_the_result_shares_memory_with_neither_template_nor_dict():
    template = {"w": torch.ones(2, dtype=torch.complex64), "v": torch.ones(3), "u": torch.ones(1)}
    d = to_state_dict(tree_map(lambda leaf: leaf * 2, template))
    del d["state['u']"]
    kept_template, kept = clone(template), clone(d)
    for leaf in leaves(from_state_dict(template, d, strict=False)):
        leaf.zero_()
    assert_same_bits(template, kept_template)
    assert_same_bits(d, kept)


def test_values_go_to_the_device_of_the_template(device):
    template = [torch.zeros(2, device=device)]
    (loaded,) = from_state_dict(template, to_state_dict([torch.ones(2)]))
    assert loaded.device.type == device
    assert loaded.sum() == 2


def test_what_requires_a_gradient_is_stored_without_and_comes_back_as_the_template_has_it():
    weight = torch.ones(2, requires_grad=True)
    state = [weight, weight[:1] * 2, torch.ones(2)]
    d = to_state_dict(state)
    assert not any(entry.requires_grad for entry in d.values())
    loaded = from_state_dict(state, d)
    assert [leaf.requires_grad for leaf in loaded] == [True, True, False]
    assert all(leaf.is_leaf for leaf in loaded)
    assert loaded[1] == 2


def test_the_device_that_the_process_makes_tensors_on_makes_no_difference():
    state = moved({"w": torch.ones(2)})
    with torch.device("meta"):
        d = to_state_dict(state)
        loaded = from_state_dict(state, d)
    assert_same_bits(d, to_state_dict(state))
    assert_same_bits(loaded, state)


# One count for all leaves, and one for each.


def after(opt, gradients):
    """A state after updates with these gradients, some of which may be None."""
    params = {"b": torch.ones(3), "w": torch.ones(2, dtype=torch.complex64)}
    state = opt.init(params)
    template = clone(state)
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    return template, state, params


GRADS = {"b": torch.full((3,), 0.5), "w": torch.full((2,), 1 - 2j)}
SHARED, OWN = AdamW(lr=0.1), AdamW(lr=0.1, step_per_leaf=True)
# The optimizers of one kind and of the other, bare and where their states lie deeper.
PAIRS = {
    "bare": (SHARED, OWN),
    "wrapped": (Ema(SHARED, 0.5), Ema(OWN, 0.5)),
    "of a group": tuple(
        Partition({"one": opt, "other": SHARED}, {"b": "one", "w": "other"})
        for opt in (SHARED, OWN)
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("direction", ["one for each", "each for one"])
def test_a_run_goes_on_to_the_bit_where_counts_of_the_other_kind_say_the_same(name, direction):
    before, beyond = PAIRS[name] if direction == "one for each" else reversed(PAIRS[name])
    template = after(beyond, [])[0]
    _, state, params = after(before, [GRADS, GRADS])
    loaded = from_state_dict(template, to_state_dict(state), strict=False)
    expected = before.update(GRADS, state, params)[0]
    assert_same_bits(beyond.update(GRADS, loaded, params)[0], expected)


def test_counts_of_the_other_kind_are_refused_by_strict_with_the_way_to_have_them_taken():
    for opt, other, word in ((SHARED, OWN, "gives it to each"), (OWN, SHARED, "takes it from")):
        d = to_state_dict(after(opt, [GRADS])[1])
        with pytest.raises(
            ValueError, match=f"state.step: one count .*strict=False {word}"
        ) as error:
            from_state_dict(after(other, [])[0], d)
        assert str(error.value).count("\n  ") == 1


@pytest.mark.parametrize("strict", [True, False])
def test_counts_that_differ_do_not_become_one(strict):
    d = to_state_dict(after(OWN, [GRADS, {**GRADS, "w": None}])[1])
    message = r"state.step\['b'\] is 2.0, state.step\['w'\] is 1.0, .* step_per_leaf=True"
    with pytest.raises(ValueError, match=message):
        from_state_dict(after(SHARED, [])[0], d, strict=strict)


def test_a_leaf_that_the_dict_does_not_have_is_not_given_the_count_of_the_others():
    d = to_state_dict(SHARED.update({"b": torch.ones(3)}, *_first({"b": torch.ones(3)}))[1])
    loaded = from_state_dict(after(OWN, [])[0], d, strict=False)
    assert {name: float(step) for name, step in loaded.step.items()} == {"b": 1.0, "w": 0.0}


def _first(params):
    return SHARED.init(params), params


@pytest.mark.parametrize("opt", [SHARED, OWN], ids=["one", "each"])
def test_moments_without_their_count_are_refused(opt):
    template, state, _ = after(opt, [GRADS])
    d = {key: entry for key, entry in to_state_dict(state).items() if "step" not in key}
    with pytest.raises(ValueError, match=r"state.step.*: missing, and the moments whose updates"):
        from_state_dict(template, d, strict=False)


@pytest.mark.parametrize(
    ("count", "message"),
    {
        "float32": (torch.ones(()), "dtype torch.float32, the template has torch.float64"),
        "a number": (1.0, "of type float, not a tensor"),
        "meta": (torch.ones((), device="meta").double(), "on the meta device"),
        "a shape": (torch.ones(1).double(), r"shape \(1,\), the template has \(\)"),
    }.values(),
    ids=str,
)
def test_counts_of_the_other_kind_must_be_counts(count, message):
    for opt, other in ((SHARED, OWN), (OWN, SHARED)):
        d = to_state_dict(after(opt, [GRADS])[1])
        d.update((key, count) for key in list(d) if key.startswith("state.step"))
        with pytest.raises(ValueError, match=message):
            from_state_dict(after(other, [])[0], d, strict=False)


# What is refused.

PARAMS = {"b": torch.ones(3), "w": torch.ones(2, 3)}


def changed(**entries):
    d = to_state_dict(AdamW().init(PARAMS))
    for name, entry in entries.items():
        key = {"fmt": "funcopt.format", "step": "state.step"}.get(name, f"state.exp_avg['{name}']")
        if entry is None:
            del d[key]
        else:
            d[key] = entry
    return d


REFUSED = {
    r"state.exp_avg\['w'\]: missing\n": {"w": None},
    r"state.exp_avg\['z'\]: not in the template\n": {"z": torch.ones(1)},
    r"state.exp_avg\['w'\]: shape \(3, 2\), the template has \(2, 3\)": {"w": torch.ones(3, 2)},
    r"state.step: shape \(1,\), the template has \(\)": {"step": torch.ones(1).double()},
    r"state.step: dtype torch.float32, the template has torch.float64": {"step": torch.ones(())},
    r"state.exp_avg\['b'\]: of type float, not a tensor": {"b": 1.0},
    r"state.exp_avg\['b'\]: layout torch.sparse_coo": {"b": torch.ones(3).to_sparse()},
    r"state.exp_avg\['b'\]: a nested layout": {"b": not_dense("nested and strided", torch.ones(3))},
    r"state.exp_avg\['b'\]: on the meta device": {"b": torch.ones(3, device="meta")},
    r"no entry 'funcopt.format'": {"fmt": None},
    r"funcopt.format is 2: this version of funcopt reads 1": {"fmt": torch.tensor(2)},
    r"funcopt.format is one:": {"fmt": "one"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_dict_that_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        from_state_dict(AdamW().init(PARAMS), changed(**REFUSED[message]))


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_state_or_a_template_that_is_not_dense_is_refused(kind):
    params = {"w": torch.ones(3)}
    state = AdamW().init(params)
    wrong = state._replace(exp_avg={"w": not_dense(kind, params["w"])})
    message = r"state.exp_avg\['w'\] has (a nested layout|layout torch.sparse_coo): make it dense"
    with pytest.raises(TypeError, match=message):
        to_state_dict(wrong)
    with pytest.raises(TypeError, match=message):
        from_state_dict(wrong, to_state_dict(state))


def test_all_faults_are_named_at_once_but_no_more_than_can_be_read():
    with pytest.raises(ValueError, match="does not fit") as refused:
        from_state_dict(AdamW().init(PARAMS), changed(w=None, b=torch.ones(2), z=torch.ones(1)))
    assert str(refused.value).count("\n  ") == 3
    many = to_state_dict(list(torch.ones(100)))
    with pytest.raises(ValueError, match=r"\.\.\. \(100 in all\)") as refused:
        from_state_dict([], many)
    assert str(refused.value).count("\n") < 25


def test_a_template_without_values_is_refused():
    with pytest.raises(ValueError, match="the template is on the meta device"):
        from_state_dict([torch.ones(2, device="meta")], to_state_dict([torch.ones(2)]))


@pytest.mark.parametrize("wrong", [[torch.ones(1)], None, AdamW().init(PARAMS)], ids=type)
def test_what_is_no_dict_is_refused(wrong):
    with pytest.raises(TypeError, match="The order is"):
        from_state_dict(AdamW().init(PARAMS), wrong)


def test_without_strict_the_template_fills_gaps_and_extras_are_left_out():
    template = AdamW().init(PARAMS)._replace(exp_avg={"b": torch.ones(3), "w": torch.ones(2, 3)})
    d = changed(w=None, z=torch.ones(1), b=torch.full((3,), 5.0))
    loaded = from_state_dict(template, d, strict=False)
    assert torch.equal(loaded.exp_avg["w"], torch.ones(2, 3))
    assert torch.equal(loaded.exp_avg["b"], torch.full((3,), 5.0))


@pytest.mark.parametrize("message", [key for key, change in REFUSED.items() if {*change} - {"z"}])
def test_without_strict_what_is_there_must_fit_nevertheless(message):
    if "missing" in message:
        return
    with pytest.raises(ValueError, match=message):
        from_state_dict(AdamW().init(PARAMS), changed(**REFUSED[message]), strict=False)


# What was saved once can always be read.

GOLDEN_STATE = AdamWState(
    step=torch.tensor(33554433.0, dtype=torch.float64),
    exp_avg={
        "0.weight": torch.tensor([[0.1, -0.2], [3e-40, 0.0]]),
        "half": [torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 3)],
        "phase": torch.tensor([1.25 - 2.5j], dtype=torch.complex128),
    },
    exp_avg_sq=({7: torch.tensor([0.1], dtype=torch.float64)},),
    max_exp_avg_sq=(),
)

GOLDEN_ENTRIES = {
    "funcopt.format": torch.tensor(1),
    "state.step": torch.tensor(33554433.0, dtype=torch.float64),
    "state.exp_avg['0.weight']": torch.tensor([[0.1, -0.2], [3e-40, 0.0]]),
    "state.exp_avg['half'][0]": torch.tensor(1.5, dtype=torch.bfloat16),
    "state.exp_avg['half'][1]": torch.zeros(0, 3),
    "torch.view_as_real(state.exp_avg['phase'])": torch.tensor([[1.25, -2.5]], dtype=torch.float64),
    "state.exp_avg_sq[0][7]": torch.tensor([0.1], dtype=torch.float64),
}


@pytest.mark.parametrize("load", [torch.load, safetensors.torch.load_file])
def test_the_golden_files_are_read_as_they_were_written(load):
    name = "state-1.pt" if load is torch.load else "state-1.safetensors"
    found = load(GOLDEN / name)
    assert_same_bits(by_key(found), by_key(GOLDEN_ENTRIES))
    assert_same_bits(from_state_dict(zeros_like(GOLDEN_STATE), found), GOLDEN_STATE)


def test_the_format_is_that_of_the_golden_files():
    assert_same_bits(to_state_dict(GOLDEN_STATE), GOLDEN_ENTRIES)


def test_a_state_dict_that_torch_2_13_wrote_is_read():
    saved = torch.load(GOLDEN / "torch-2.13.pt", weights_only=True)
    opt, state = from_torch(saved, {"second": torch.zeros(2, 2), "first": torch.zeros(2, 2)})
    assert opt == AdamW(amsgrad=True, kernel="plain")
    assert state.step == 1
    for name, one, square in (("first", 0.1, 0.001), ("second", 0.2, 0.004)):
        assert torch.equal(state.exp_avg[name], torch.full((2, 2), one))
        assert torch.equal(state.exp_avg_sq[name], torch.full((2, 2), square))
        assert torch.equal(state.max_exp_avg_sq[name], torch.full((2, 2), square))


def test_a_dict_of_members_says_how_a_template_for_them_is_made():
    params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    d = to_state_dict(torch.func.vmap(AdamW().init)(params))
    one = {name: leaf[0] for name, leaf in params.items()}
    with pytest.raises(ValueError, match=r"of 3 members: .* torch\.func\.vmap\(opt\.init\)"):
        from_state_dict(AdamW().init(one), d)
    with pytest.raises(ValueError, match=r"from the same parameters\.$"):
        from_state_dict(AdamW().init({"w": torch.ones(3, 2), "b": torch.ones(4)}), d)


@pytest.mark.parametrize("root", [lambda state: state, lambda state: {"state": state}])
def test_a_wrapper_more_on_either_side_is_named(root):
    params = {"w": torch.ones(2)}
    plain, wrapped = root(AdamW().init(params)), root(Ema(AdamW(), 0.9).init(params))
    with pytest.raises(ValueError, match=r"The dict is of one with a wrapper more"):
        from_state_dict(plain, to_state_dict(wrapped))
    with pytest.raises(ValueError, match=r"The template is of one with a wrapper more"):
        from_state_dict(wrapped, to_state_dict(plain))
