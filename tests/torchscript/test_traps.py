"""What TorchScript silently drops, merges or cannot save, none of which may happen to a step."""

import io

import pytest
import torch
from torch import Tensor, nn

from funcopt.torchscript import FunctionalAdamW

from ..cases import KERNELS
from .test_class import FLAGS
from .trainers import trainer


@torch.jit.script
def trapped(param: Tensor, grad: Tensor) -> None:
    torch._foreach_sub_([param], [grad])


def test_an_operator_in_place_on_a_list_made_on_the_spot_is_dropped():
    """If not, torch has been mended, and the tests below prove less than they seem to."""
    param = torch.ones(2)
    for _ in range(4):
        trapped(param, torch.ones(2))
    assert torch.equal(param, torch.ones(2))


@torch.jit.script
def step_and_forget(param: Tensor, grad: Tensor, foreach: bool, fused: bool) -> None:
    """Use nothing of what a step gives, so that all of it might be thought dead."""
    opt = FunctionalAdamW([param], 0.5, foreach=foreach, fused=fused)
    opt.step_param(param, grad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_is_not_dropped_where_nothing_of_it_is_used(kernel):
    param = torch.ones(2)
    flags = {"foreach": False, "fused": False, **FLAGS[kernel]}
    for count in range(1, 5):  # the first calls are profiled, later ones optimized
        before = param.clone()
        step_and_forget(param, torch.ones(2), **flags)
        assert (param < before - 0.4).all(), count


@torch.jit.script
def step_twice(param: Tensor, grad: Tensor) -> Tensor:
    """Make two steps with the same arguments, which might be taken for one."""
    opt = FunctionalAdamW([param], 0.5, (0.0, 0.0), 0.0, 0.0)
    opt.step_param(param, grad)
    before = param.clone()
    opt.step_param(param, grad)
    return before


def test_equal_steps_are_not_merged_nor_moved():
    for _ in range(4):
        param = torch.ones(2)
        before = step_twice(param, torch.ones(2))
        assert torch.equal(before, torch.full((2,), 0.5))
        assert torch.equal(param, torch.zeros(2))


def test_the_tensors_of_a_scripted_state_share_no_memory():
    params = [torch.ones(3), torch.ones(3)]
    made = trainer("scripted", params, amsgrad=True)
    for _ in range(4):
        made.step([torch.ones(3), torch.ones(3)])
    tensors = params + [t for state in made.state().values() for t in state.values()]
    assert len(tensors) == 10
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 10


class BuiltInForward(nn.Module):
    """Build the optimizer in a scripted method, with arguments by position and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        opt = FunctionalAdamW([self.w], 0.1, (0.8, 0.9), weight_decay=0.0, amsgrad=True)
        for _ in range(3):
            opt.step_param(self.w, x * self.w)
        return opt.state[self.w]["max_exp_avg_sq"]


def test_a_module_that_builds_one_in_forward_can_be_saved():
    scripted = torch.jit.script(BuiltInForward())
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for _ in range(2):
        results = [module(torch.ones(2)) for module in (scripted, loaded, BuiltInForward())]
        assert torch.equal(results[0], results[1])
    assert torch.equal(loaded.w, scripted.w)
    assert not torch.equal(loaded.w, torch.ones(2))
