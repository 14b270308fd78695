"""What the page of other libraries says: what was seen, and nothing that makes one crash."""

import pytest
import torch

from .. import peers
from ..peers import Copied, Peer, by_design, in_a_process, page

FAILS = ["goes_downhill", "fails", "goes_downhill: step 1, params", "({'p0': tensor(0.)}, [])"]
RAISES = ["deterministic", "error", "IndexError", ""]
HOLDS = ["names_do_not_matter", "holds", "", ""]


def test_the_page_has_a_row_for_each_and_the_example_of_what_fails_alone():
    text = page(
        {
            "some.Lion": {"version": "1.2", "how": "pure", "verdicts": [FAILS, RAISES, HOLDS]},
            "other.Lion": {"what": "not installed, so not checked"},
        }
    )
    assert "| `some.Lion` | 1.2 | pure | 1 | `goes_downhill`, `deterministic` |  |" in text
    assert "| `other.Lion` |  |  |  |  | not installed, so not checked |" in text
    assert "`some.Lion`, `goes_downhill`: `goes_downhill: step 1, params`\n  `({'p0'" in text
    assert "- `some.Lion`, `deterministic`: it raises `IndexError`\n" in text


def test_what_differs_by_design_is_told_apart_from_a_fault():
    assert by_design("torch.optim.Rprop", "zero_lr_moves_nothing", "step 2")
    assert not by_design("torch.optim.SGD", "zero_lr_moves_nothing", "step 2")
    assert by_design("torch.optim.Adam", "survives_zero_gradients", "(torch.float16): step 1")
    assert not by_design("torch.optim.Adam", "survives_zero_gradients", "(torch.float32): step 1")


def test_one_that_hangs_or_crashes_does_not_end_the_run(monkeypatch):
    peer = Peer("torch", "torch", lambda own: None, ())
    monkeypatch.setitem(peers.PEERS, "unknown.Peer", peer)  # which the other process lacks
    assert in_a_process("unknown.Peer")["what"].startswith("the process ended with 1: KeyError")
    assert in_a_process("unknown.Peer", seconds=0.01)["what"] == "not done after 0.01 seconds"
    monkeypatch.setitem(peers.PEERS, "unknown.Peer", peer._replace(package="none-of-this-name"))
    assert in_a_process("unknown.Peer") == {"what": "not installed, so not checked"}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_copy_makes_the_step_of_the_class(kind):
    params, grads = [torch.tensor([1.0, -2.0])], [torch.tensor([0.5, 0.25])]
    parameter = torch.nn.Parameter(params[0].clone())
    theirs, opt = kind([parameter], lr=0.1), Copied(kind, 0.1)
    state = opt.init(params)
    for _ in range(3):
        parameter.grad = grads[0].clone()
        theirs.step()
        params, state = opt.update(grads, state, params)
        assert torch.equal(params[0], parameter.detach())
