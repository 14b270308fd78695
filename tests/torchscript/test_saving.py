"""A scripted module with its optimizer in it, saved and resumed as if nothing had happened."""

import io
import subprocess
import sys

import pytest
import torch

from ..cases import KERNELS, assert_same_bits
from .test_class import FLAGS
from .trainers import gradients_of, parameters, tensors_of, trainer


def saved_and_loaded(made):
    buffer = io.BytesIO()
    torch.jit.save(made, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(kernel, amsgrad, at):
    torch.manual_seed(1)
    made = trainer("scripted", parameters(), lr=0.1, amsgrad=amsgrad, **FLAGS[kernel])
    grads = gradients_of(made.parameters_now(), 12)
    for each in grads[:at]:
        made.step(each)
    loaded = saved_and_loaded(made)
    for each in grads[at:]:
        made.step(each)
        loaded.step(each)
    assert_same_bits(tensors_of(loaded), tensors_of(made))
    assert len(loaded.state()) == len(made.state()) == 5


def test_options_are_saved():
    options = {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}
    made = trainer("scripted", parameters(), **options)
    loaded = saved_and_loaded(made)
    for each in gradients_of(made.parameters_now(), 3):
        made.step(each)
        loaded.step(each)
    assert_same_bits(tensors_of(loaded), tensors_of(made))


def test_a_loaded_optimizer_moves_its_own_copies():
    made = trainer("scripted", [torch.ones(2)])
    loaded = saved_and_loaded(made)
    loaded.step([torch.ones(2)])
    assert torch.equal(made.parameters_now()[0], torch.ones(2))
    assert made.state() == {}


def test_where_the_module_was_not_imported_loading_says_what_is_missing(tmp_path):
    path = tmp_path / "trainer.pt"
    trainer("scripted", [torch.ones(2)]).save(str(path))
    load = f"import torch; torch.jit.load({str(path)!r})"

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )

    without = run(load)
    assert without.returncode != 0
    assert "Unknown builtin op: funcopt::" in without.stderr
    assert run("import funcopt.torchscript; " + load).returncode == 0
