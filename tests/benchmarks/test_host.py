"""What a step on a GPU costs the host, as far as that shows without one."""

import pathlib

import pytest

from . import host

pytest.importorskip("triton")

STEPS = ("update_", "update", "torch", "Clip", "LossScale", "SkipNonfinite", "Ema")
# By how much a step may be slower than torch's own. They are several times what was measured: what
# they tell apart is a step that does something for each leaf by operators from one that does not.
BOUNDS = {"update_": 8, "update": 16, "Clip": 20, "LossScale": 20, "SkipNonfinite": 20, "Ema": 25}


@pytest.fixture(scope="module")
def few():
    with host.Host(host.ROOT, 20) as process:
        yield process


@pytest.fixture(scope="module")
def more():
    with host.Host(host.ROOT, 40) as process:
        yield process


@pytest.mark.parametrize("name", STEPS)
def test_no_operator_is_called_for_each_leaf(few, more, name):
    assert few.operators(name) == more.operators(name) < 60


def test_the_host_is_about_as_busy_as_with_torch(tmp_path):
    rows = {row.name: row for row in host.compare(148, None, rounds=5, count=5)}
    assert tuple(rows) == STEPS
    for name, bound in BOUNDS.items():
        assert rows[name].to_torch < bound, rows[name]
        assert rows[name].to_other is None
    assert rows["torch"].to_torch == pytest.approx(1.0, rel=0.9)


def test_another_checkout_is_measured_beside_this_one(capsys):
    assert host.main(["--leaves", "4", "--rounds", "1", "--against", str(host.ROOT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(STEPS)
    assert all(len(line.split()) == 4 for line in lines[1:])


def test_a_process_that_fails_says_so():
    with pytest.raises(RuntimeError, match="ended with 1"):
        host.Host(pathlib.Path("/nowhere"), -1)
