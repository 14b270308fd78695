"""What the page of other libraries says: what was seen, and nothing that makes one crash."""

import re

import pytest
import torch

from .. import peers
from ..peers import PAGE, PEERS, REQUIREMENTS, Copied, Peer, by_design, in_a_process, page

FAILS = ["goes_downhill", "fails", "goes_downhill: step 1, params", "({'p0': tensor(0.)}, [])"]
RAISES = ["deterministic", "error", "IndexError", ""]
HOLDS = ["names_do_not_matter", "holds", "", ""]


def test_the_page_has_a_row_for_each_and_the_example_of_what_fails_alone():
    text = page(
        {
            "some.Lion": {"version": "1.2", "how": "pure", "verdicts": [FAILS, RAISES, HOLDS]},
            "other.Lion": {"version": "3.4", "what": "not done after 90 seconds"},
        }
    )
    assert "| `some.Lion` | 1.2 | pure | 1 | `goes_downhill`, `deterministic` |  |" in text
    assert "| `other.Lion` | 3.4 |  |  |  | not done after 90 seconds |" in text
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


def test_other_versions_than_those_of_the_file_are_named():
    here = peers.version_of("torch")
    lines = f"# a remark\ntorch=={here}\n\noptree==0.0.1\nnone-of-this-name==1.2\n"
    optree, missing = peers.other_versions(lines)
    assert optree.startswith("optree ")
    assert optree.endswith(", not 0.0.1")
    assert missing == "none-of-this-name none, not 1.2"


def test_the_version_of_every_peer_is_in_the_file():
    names = re.findall(r"^(\S+)==\S+$", REQUIREMENTS.read_text(), re.MULTILINE)
    assert {peer.package for peer in PEERS.values()} <= set(names)


def test_the_page_has_a_row_for_every_peer_with_the_version_of_the_file():
    rows = re.findall(r"^\| `(.+?)` \| (\S*) \|", PAGE.read_text(), re.MULTILINE)
    versions = dict(line.split("==") for line in REQUIREMENTS.read_text().split() if "==" in line)
    assert rows == [(name, versions[peer.package]) for name, peer in PEERS.items()]


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
