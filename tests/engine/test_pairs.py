"""Complex leaves are moved as pairs of real numbers, and the results are apart from real ones."""

import io

import pytest
import torch
from torch.func import vmap

from funcopt import SGD, AdamW, Lion

from ..cases import assert_same_bits

OPTIMIZERS = [Lion(), AdamW(), SGD(lr=0.1, momentum=0.9)]


def start(seed=0):
    """Leaves that would share a storage if complex ones were pairs of real numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, dtype=dtype, generator=generator)

    return {
        "scalar": draw(),
        "complex scalar": draw(dtype=torch.complex128),
        "empty": draw(0),
        "vector": draw(5),
        "complex vector": draw(4, dtype=torch.complex128),
        "pairs": draw(4, 2),
    }


def saved_and_loaded(tensors):
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("recorded", [False, True])
def test_results_of_real_and_complex_leaves_can_be_saved_together(opt, recorded):
    params = start()
    grads = {name: grad.requires_grad_(recorded) for name, grad in start(seed=1).items()}
    new_params, state = opt.update(grads, opt.init(params), params)
    moved = {name: leaf.detach() for name, leaf in new_params.items()}
    assert_same_bits(saved_and_loaded(moved), moved)
    moments = [column for column in state if isinstance(column, dict)]
    assert moments
    for column in moments:
        kept = {name: leaf.detach() for name, leaf in column.items()}
        assert_same_bits(saved_and_loaded(kept), kept)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_leaf_among_others_gets_what_it_gets_alone(opt):
    params, grads = start(), start(seed=1)
    moved, _ = opt.update(grads, opt.init(params), params)
    for name, leaf in params.items():
        alone, _ = opt.update({name: grads[name]}, opt.init({name: leaf}), {name: leaf})
        assert_same_bits(moved[name], alone[name])


def test_leaves_with_counts_of_their_own_keep_them():
    opt, params, grads = AdamW(lr=0.1, step_per_leaf=True), start(), start(seed=1)
    state = opt.init(params)
    counts = {name: torch.tensor(float(i)) for i, name in enumerate(params)}
    moved, _ = opt.update(grads, state._replace(step=counts), params)
    for name, leaf in params.items():
        own = opt.init({name: leaf})._replace(step={name: counts[name]})
        alone, _ = opt.update({name: grads[name]}, own, {name: leaf})
        assert_same_bits(moved[name], alone[name])


def test_members_of_a_vmap_get_what_they_get_alone():
    opt = AdamW(lr=0.1)
    members = [start(seed) for seed in range(3)]
    stacked = {name: torch.stack([m[name] for m in members]) for name in members[0]}
    state = vmap(opt.init)(stacked)
    moved, _ = vmap(opt.update)(stacked, state, stacked)
    for index, own in enumerate(members):
        alone, _ = opt.update(own, opt.init(own), own)
        for name, leaf in alone.items():
            torch.testing.assert_close(moved[name][index], leaf, rtol=1e-14, atol=1e-14)
